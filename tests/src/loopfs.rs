//! Real filesystems in image files on loop devices. Root is needed.
//!
//! A [`LoopFs`] is unmounted lazily and its image removed when it is dropped, also after a panic;
//! what a killed run leaves, the next one clears away (see [`crate::home`]).

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::umount;

use crate::home::Home;
use crate::{power, sys};

/// Enough for all but the tests that write much; the least of mkfs.xfs is 300 MiB.
pub const SMALL_BYTES: u64 = 512 << 20;

/// For workloads that write all the time: a btrfs that is half full spends minutes on making room.
pub const ROOMY_BYTES: u64 = 4 << 30;

/// So many loop devices are made anew at most, see [`LoopFs::device`]: there are not many more.
const RENEWALS: usize = 50;

/// The filesystems that hsmd watches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// ext4, with the block size of large disks.
    Ext4,
    /// xfs.
    Xfs,
    /// btrfs.
    Btrfs,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Xfs, Self::Btrfs];

    /// The name that mount(8) knows.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    fn mkfs_options(self) -> &'static [&'static str] {
        match self {
            // Small images get 1 KiB blocks otherwise.
            Self::Ext4 => &["-F", "-q", "-b", "4096"],
            Self::Xfs | Self::Btrfs => &["-f", "-q"],
        }
    }

    /// The blocks of the image are left what they are.
    fn mkfs_without_discard(self) -> &'static [&'static str] {
        match self {
            Self::Ext4 => &["-E", "nodiscard"],
            Self::Xfs | Self::Btrfs => &["-K"],
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A mounted filesystem of its own.
pub struct LoopFs {
    kind: Kind,
    root: PathBuf,
    image: PathBuf,
    /// What the image lies on, if that can fail.
    disk: Option<power::Disk>,
    home: Home,
}

impl LoopFs {
    /// Makes and mounts one of the given size (sparse).
    pub fn new(kind: Kind, bytes: u64) -> Self {
        Self::with_options(kind, bytes, &[])
    }

    /// Makes and mounts one of [`SMALL_BYTES`].
    pub fn small(kind: Kind) -> Self {
        Self::new(kind, SMALL_BYTES)
    }

    /// Makes one with further arguments of mkfs.
    pub fn with_options(kind: Kind, bytes: u64, options: &[&str]) -> Self {
        let home = Home::for_images();
        let image = home.at("image");
        make_image(&image, bytes);
        Self::made(kind, options, home, image, None)
    }

    /// Makes one on a disk that loses what was not flushed when its power fails (see [`power`]): all of its
    /// bytes are written first.
    pub fn on_failing_disk(kind: Kind, bytes: u64, options: &[&str]) -> Self {
        let home = Home::for_images();
        let disk = power::Disk::new(&home, bytes);
        let options = [kind.mkfs_without_discard(), options].concat();
        Self::made(kind, &options, home, disk.image(), Some(disk))
    }

    /// Makes one whose blocks lie in a store of this size, which others can fill up: what the filesystem has
    /// discarded cannot be written then (as with thin provisioning).
    pub fn thin(kind: Kind, bytes: u64, options: &[&str], store_bytes: u64) -> Self {
        let home = Home::for_images();
        let store = home.dir("store");
        let size = format!("size={store_bytes}");
        must(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", &size, "none"])
                .arg(&store),
        );
        let image = store.join("image");
        make_image(&image, bytes);
        let fs = Self::made(kind, options, home, image, None);
        must(
            Command::new("fallocate")
                .args(["-l", &bytes.to_string()])
                .arg(&fs.image),
        );
        fs
    }

    fn made(
        kind: Kind,
        options: &[&str],
        home: Home,
        image: PathBuf,
        disk: Option<power::Disk>,
    ) -> Self {
        let mut mkfs = Command::new(format!("mkfs.{kind}"));
        mkfs.args(kind.mkfs_options()).args(options).arg(&image);
        must(&mut mkfs);
        let fs = Self {
            kind,
            root: home.dir("mnt"),
            image,
            disk,
            home,
        };
        fs.mount();
        fs
    }

    /// Which filesystem it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where it is mounted.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path on it.
    pub fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root.join(name)
    }

    /// A directory beside it, not on it.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.home.dir(name)
    }

    /// Its image file.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Mounts it (again).
    pub fn mount(&self) {
        let options = match self.disk {
            Some(_) => "loop,nodiscard",
            None => "loop",
        };
        must(Command::new("mount").args([
            OsStr::new("-o"),
            OsStr::new(options),
            self.image.as_os_str(),
            self.root.as_os_str(),
        ]));
    }

    /// Unmounts it; waits for programs that just end.
    pub fn unmount(&self) {
        unmount(&self.root);
    }

    /// Its image as a block device, for hsmd to mount at [`Self::root`]. Must not be mounted.
    pub fn device(&self) -> LoopDevice {
        let mut tries = 0;
        loop {
            let made = must(
                Command::new("losetup")
                    .args(["--find", "--show"])
                    .arg(&self.image),
            );
            let device = LoopDevice(PathBuf::from(made.trim_end()));
            if self.disk.is_some() {
                power::forbid_discards(device.path());
                return device;
            }
            tries += 1;
            if device.discards() || tries == RENEWALS {
                return device;
            }
            device.renew();
        }
    }

    /// The power fails: what is not on the disk yet never will be, and everything but unmounting fails.
    /// Needs a mounted ext4 or XFS, or [`Self::on_failing_disk`].
    pub fn power_fails(&self) {
        if let Some(disk) = &self.disk {
            disk.fails();
        } else {
            let root = File::open(&self.root).expect("the root");
            sys::cut_off(&root).expect("cut off");
        }
    }

    /// The power is there again. Must not be mounted, nor have a [`LoopDevice`] where the disk has failed.
    pub fn power_returns(&self) {
        if let Some(disk) = &self.disk {
            disk.returns();
        }
    }

    /// Whether the disk below fails, and not the filesystem itself.
    pub fn is_on_failing_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Makes it an empty filesystem, with another UUID: the disk has died.
    pub fn replace(&self) {
        self.unmount();
        let bytes = fs::metadata(&self.image).expect("the image").len();
        fs::remove_file(&self.image).expect("to remove the image");
        make_image(&self.image, bytes);
        let mut mkfs = Command::new(format!("mkfs.{}", self.kind));
        must(mkfs.args(self.kind.mkfs_options()).arg(&self.image));
        self.mount();
    }
}

/// A loop device that goes with its owner.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Its node.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Whether what is discarded on it is given back by its image's file. A loop device that had a file which
    /// could not do that keeps it off for all later ones.
    fn discards(&self) -> bool {
        let name = self.0.file_name().unwrap_or_default().to_string_lossy();
        let limit = format!("/sys/block/{name}/queue/discard_max_bytes");
        fs::read_to_string(limit).is_ok_and(|text| text.trim_end() != "0")
    }

    /// Detaches it, and has the kernel forget it: its number begins anew.
    fn renew(self) {
        let digits = self.0.to_string_lossy();
        let number = digits.trim_start_matches(|c: char| !c.is_ascii_digit());
        let number = number.parse().expect("a loop device's number");
        drop(self);
        // Others may have taken it at once.
        let _ = crate::sys::forget_loop_device(number);
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // What still has it mounted keeps it until then.
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}

/// Unmounts; waits for programs that just end.
pub fn unmount(place: &Path) {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match umount(place) {
            Ok(()) => return,
            Err(Errno::EBUSY) if Instant::now() < end => {
                thread::sleep(Duration::from_millis(50));
            }
            Err(e) => panic!("umount {}: {e}", place.display()),
        }
    }
}

/// A sparse file.
fn make_image(path: &Path, bytes: u64) {
    File::create(path)
        .and_then(|file| file.set_len(bytes))
        .expect("an image file");
}

/// Runs a program that must succeed; gives what it printed.
pub fn must(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}: install it", command.get_program().display()));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {} (root is needed)\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::home::mounts_below;

    #[test]
    fn each_kind_is_mounted_and_goes_with_its_owner() {
        for kind in Kind::ALL {
            let fs = LoopFs::small(kind);
            fs::write(fs.at("file"), "here").expect("a file");
            fs.unmount();
            assert!(!fs.at("file").exists());
            fs.mount();
            assert_eq!(fs::read(fs.at("file")).expect("the file"), b"here");
            fs.replace();
            assert!(!fs.at("file").exists());
            let home = fs.home.path().to_owned();
            // A process that still uses it must not keep its owner from going.
            let open = File::create(fs.at("open")).expect("a file");
            drop(fs);
            drop(open);
            assert!(!home.exists());
            assert_eq!(mounts_below(&home).expect("mounts"), Vec::<PathBuf>::new());
        }
    }
    #[test]
    fn what_was_not_flushed_goes_with_the_power() {
        for kind in Kind::ALL {
            let fs = LoopFs::on_failing_disk(kind, 320 << 20, &[]);
            fs.unmount();
            let device = fs.device();
            let mount = |device: &LoopDevice| {
                must(Command::new("mount").arg(device.path()).arg(fs.root()));
            };
            mount(&device);
            fs::write(fs.at("durable"), "here").expect("a file");
            let file = File::open(fs.at("durable")).expect("the file");
            file.sync_all().expect("synced");
            drop(file);
            fs::write(fs.at("new"), "in memory").expect("a file");
            fs.power_fails();
            let file = File::create(fs.at("late"));
            assert!(
                file.and_then(|file| file.sync_all()).is_err(),
                "{kind}: it reaches the disk"
            );
            fs.unmount();
            drop(device);
            fs.power_returns();
            let device = fs.device();
            mount(&device);
            assert_eq!(fs::read(fs.at("durable")).expect("the file"), b"here");
            assert!(!fs.at("new").exists(), "{kind}: it was never flushed");
            let home = fs.home.path().to_owned();
            drop((device, fs));
            assert!(!home.exists());
        }
    }
}
