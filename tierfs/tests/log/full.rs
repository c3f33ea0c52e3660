//! Full filesystems, real ones: a loop-mounted image each of ext4, xfs and btrfs. Needs root.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use nix::fcntl::{FallocateFlags, fallocate};
use tierfs::disk::sim::Rng;
use tierfs::disk::{Disk, DiskFile, RealDisk};
use tierfs::segment::ReadAt;
use tierfs::spool::Spool;
use tierfs::writer::WriterError;

use crate::support::*;

const SEGMENT: u64 = 1 << 20;

/// A mounted image, unmounted when it is dropped, also by a panic.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(fs_type: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().join("mount"));
        File::create(&image).unwrap().set_len(400 << 20).unwrap();
        std::fs::create_dir(&at).unwrap();
        let mut mkfs = Command::new(format!("mkfs.{fs_type}"));
        if fs_type == "btrfs" {
            // Data and metadata in the same place, so that space is one thing.
            mkfs.arg("--mixed");
        }
        run(mkfs.arg("-q").arg(&image));
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(image)
            .arg(&at));
        Self(dir)
    }

    fn path(&self) -> std::path::PathBuf {
        self.0.path().join("mount")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

fn run(command: &mut Command) {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = command
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output();
    let output =
        output.unwrap_or_else(|error| panic!("{command:?}: {error}; run tests/setup.sh test"));
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Leaves about `left` bytes free.
fn ballast(at: &Path, left: u64) {
    let disk = RealDisk::open(at).unwrap();
    let file = File::create(at.join("ballast")).unwrap();
    let mut len = 0_i64;
    for step in [32 << 20, 4 << 20, 1 << 20, 128 << 10] {
        while disk.free().unwrap() > left + u64::try_from(step).unwrap()
            && fallocate(&file, FallocateFlags::empty(), len, step).is_ok()
        {
            len += step;
        }
    }
    file.sync_all().unwrap();
}

fn fill(fs_type: &str) {
    let mount = Mount::new(fs_type);
    std::fs::create_dir(mount.path().join("spool")).unwrap();
    let disk = RealDisk::open(&mount.path().join("spool")).unwrap();
    Spool::create(&disk, LOG, None).unwrap();
    ballast(&mount.path(), 6 << 20);
    let (spool, _) = open_spool(&disk, SEGMENT, &Ledger::default().floor()).unwrap();
    let mut driver = Driver::new(&spool, 1);
    let (mut ledger, mut rng) = (Ledger::default(), Rng(1));
    let (mut full, mut all) = (0, Vec::new());
    while full < 3 {
        let done = driver
            .append_txns(&mut ledger, &mut rng)
            .and_then(|()| driver.append_data(&mut ledger, &mut rng));
        match done {
            Ok(()) => continue,
            Err(WriterError::Full { .. }) => full += 1,
            Err(error) => panic!("{fs_type}: {error}"),
        }
        // Sealed within the reserve, synced, and read back.
        driver
            .sync(&mut ledger)
            .unwrap_or_else(|error| panic!("{fs_type}: {error}"));
        // At most a segment that holds nothing but its header is open.
        assert!(driver.writer.open_bytes() < 1000, "{fs_type}");
        assert_eq!(ledger.durable, (ledger.txns.len(), ledger.data.len()));
        if full < 3 {
            all.extend(read_all(&spool).txns);
            for segment in spool.segments() {
                spool.remove(segment.no).unwrap();
            }
        }
    }
    drop((driver, spool));
    let (spool, recovered) = open_spool(&disk, SEGMENT, &ledger.floor()).unwrap();
    assert_eq!(recovered.end, ledger.durable_lsn());
    all.extend(read_all(&spool).txns);
    assert!(all == ledger.txns, "{fs_type}");
}

#[test]
fn a_full_ext4() {
    fill("ext4");
}

#[test]
fn a_full_xfs() {
    fill("xfs");
}

#[test]
fn a_full_btrfs() {
    fill("btrfs");
}

/// What the trait promises, on a real filesystem.
#[test]
fn the_real_disk_keeps_its_promises() {
    let dir = tempfile::tempdir().unwrap();
    let disk = RealDisk::open(dir.path()).unwrap();
    let file = disk.create("a").unwrap();
    file.reserve(1 << 20).unwrap();
    assert_eq!(file.len().unwrap(), 0);
    let parts: Vec<Vec<u8>> = (0..3000_u32)
        .map(|part| part.to_le_bytes().to_vec())
        .collect();
    let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    file.write_all_at(&slices, 7).unwrap();
    file.write_all_at(&[b"", b"start", b""], 0).unwrap();
    let mut bytes = vec![0; 7 + 12_000];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes[..7], b"start\0\0");
    assert!(bytes[7..] == parts.concat());
    file.truncate(5).unwrap();
    file.sync().unwrap();
    file.set_read_only().unwrap();
    disk.create("b").unwrap();
    assert!(disk.rename("a", "b").is_err(), "nothing is replaced");
    assert!(disk.create("b").is_err());
    disk.remove("b").unwrap();
    disk.rename("a", "b").unwrap();
    disk.sync_dir().unwrap();
    assert_eq!(disk.list().unwrap(), ["b"]);
    assert_eq!(disk.open("b").unwrap().len().unwrap(), 5);
    std::os::unix::fs::symlink("b", dir.path().join("c")).unwrap();
    assert!(disk.open("c").is_err(), "no link is followed");
    assert!(disk.remove("c").is_err());
    assert_eq!(disk.boot(), disk.clone().boot());
    assert!(disk.boot().is_some() && disk.free().unwrap() > 0);
}
