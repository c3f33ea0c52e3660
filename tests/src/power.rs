//! A disk whose power can fail: what was not flushed is lost then, whatever lies on it.
//!
//! ext4 and XFS can be cut off from their device by an ioctl of their own, btrfs cannot. So the disk is a
//! file of an inner ext4, which is cut off in its place: that is where the loop device above keeps what it
//! has not flushed, as a real disk does in its cache. The file is written from end to end and nothing of it is
//! ever discarded: each write of the loop device goes to blocks that are there already, and whether they last
//! hangs on nothing but their own way to the device.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::home::Home;
use crate::loopfs::{must, unmount};
use crate::sys;

/// What the inner filesystem needs beside the file.
const OVERHEAD_BYTES: u64 = 64 << 20;
/// The image's size is a multiple of it.
const PIECE: usize = 1 << 20;

/// See the module.
pub struct Disk {
    store: PathBuf,
    dir: PathBuf,
}

impl Disk {
    /// Makes one that holds an image of so many bytes, all of them zeros.
    pub fn new(home: &Home, bytes: u64) -> Self {
        let disk = Self {
            store: home.at("store"),
            dir: home.dir("disk"),
        };
        File::create(&disk.store)
            .and_then(|file| file.set_len(bytes + OVERHEAD_BYTES))
            .expect("a store");
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.args(["-F", "-q", "-b", "4096", "-m", "0", "-J", "size=8"]);
        mkfs.args(["-E", "nodiscard,lazy_itable_init=0"]);
        must(mkfs.arg(&disk.store));
        disk.mount();
        let image = File::create(disk.image()).expect("an image");
        let zeros = vec![0; PIECE];
        for at in (0..bytes).step_by(PIECE) {
            image.write_all_at(&zeros, at).expect("a whole image");
        }
        image.sync_all().expect("a durable image");
        disk
    }

    /// The file that the loop device is to be made of.
    pub fn image(&self) -> PathBuf {
        self.dir.join("image")
    }

    fn mount(&self) {
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop,nodiscard"]);
        must(mount.arg(&self.store).arg(&self.dir));
    }

    /// From here on nothing reaches it, and nothing can be read that was not read before.
    pub fn fails(&self) {
        let root = File::open(&self.dir).expect("the inner filesystem");
        sys::cut_off(&root).expect("cut off");
    }

    /// It is there again, with what was flushed. Nothing must use it.
    pub fn returns(&self) {
        unmount(&self.dir);
        self.mount();
    }
}

/// A loop device never discards: else its blocks would come to be and go with the inner journal.
pub fn forbid_discards(device: &Path) {
    let name = device.file_name().expect("a device's name");
    let limit = Path::new("/sys/block")
        .join(name)
        .join("queue/discard_max_bytes");
    fs::write(&limit, "0").unwrap_or_else(|error| panic!("{}: {error}", limit.display()));
}
