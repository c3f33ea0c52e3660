//! Tests of the directory backend: the contract on every filesystem at hand, and what is its own.

mod damage;
mod full;
mod interrupted;
mod labels;
mod places;
mod power_loss;
mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;

use self::support::{Mounted, Place, labelled};
use super::*;
use crate::contract::{self, append, data, hash, name};
use crate::{Volume, Written};

/// Labels directories below one place.
struct Directories<'a>(&'a Path);

impl contract::Backend for Directories<'_> {
    type Volume = DirectoryVolume;

    fn fresh(&self) -> DirectoryVolume {
        let path = self.0.join(crate::Serial::random().unwrap().as_str());
        fs::create_dir(&path).unwrap();
        labelled(&path)
    }

    fn again(&self, volume: &DirectoryVolume) -> DirectoryVolume {
        support::open(volume.location())
    }

    fn flip(&self, volume: &DirectoryVolume, name: &ObjectName, at: u64) {
        support::flip(&volume.location().join(name.as_str()), at);
    }
}

#[test]
fn contract_holds_on_this_filesystem() {
    let place = Place::new();
    contract::holds(&Directories(place.path()));
}

#[test]
fn contract_holds_on_ext4() {
    if let Some(disk) = Mounted::new("ext4", 64, &[]) {
        contract::holds(&Directories(&disk.path()));
    }
}

#[test]
fn contract_holds_on_ext4_without_fallocate() {
    if let Some(disk) = Mounted::new("ext4", 64, &["-O", "^extent,^64bit,^metadata_csum"]) {
        contract::holds(&Directories(&disk.path()));
    }
}

#[test]
fn contract_holds_on_xfs() {
    if let Some(disk) = Mounted::new("xfs", 512, &[]) {
        contract::holds(&Directories(&disk.path()));
    }
}

#[test]
fn contract_holds_on_btrfs() {
    if let Some(disk) = Mounted::new("btrfs", 256, &[]) {
        contract::holds(&Directories(&disk.path()));
    }
}

#[test]
fn contract_holds_on_tmpfs() {
    if let Some(disk) = Mounted::tmpfs(256) {
        contract::holds(&Directories(&disk.path()));
    }
}

#[test]
fn p5_an_entry_is_exactly_what_b3sum_prints() {
    let place = Place::new();
    let volume = labelled(place.path());
    let at = name("segments/000000/0000000001.hsm.zst");
    append(&volume, &at, b"abc").unwrap();
    let dir = place.path().join("segments/000000");
    let line = fs::read_to_string(dir.join("0000000001.hsm.zst.b3")).unwrap();
    let abc = "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85";
    assert_eq!(line, format!("{abc}  0000000001.hsm.zst\n"));
    let check = |dir: &Path, file: &str| {
        Command::new("b3sum")
            .current_dir(dir)
            .arg("-c")
            .arg(file)
            .output()
    };
    let Ok(good) = check(&dir, "0000000001.hsm.zst.b3") else {
        eprintln!("no b3sum here: the line was compared with a known one only");
        return;
    };
    assert!(good.status.success(), "{good:?}");
    assert!(
        check(place.path(), "VOLUME.json.b3")
            .unwrap()
            .status
            .success()
    );
    support::flip(&dir.join("0000000001.hsm.zst"), 1);
    assert!(
        !check(&dir, "0000000001.hsm.zst.b3")
            .unwrap()
            .status
            .success()
    );
}

#[test]
fn p4_stored_files_are_read_only_and_immutable() {
    let Some(disk) = Mounted::new("ext4", 64, &[]) else {
        return;
    };
    let place = disk.path().join("volume");
    fs::create_dir(&place).unwrap();
    let volume = labelled(&place);
    append(&volume, &name("segments/000000/1"), &data(1, 5000)).unwrap();
    for file in [
        "VOLUME.json",
        "VOLUME.json.b3",
        "README.txt",
        "manual/hsm-log.5.txt",
        "segments/000000/1",
        "segments/000000/1.b3",
    ] {
        let path = place.join(file);
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o444,
            "{file}"
        );
        assert!(
            fs::OpenOptions::new().write(true).open(&path).is_err(),
            "{file}"
        );
        assert!(fs::remove_file(&path).is_err(), "{file}");
        assert!(fs::rename(&path, place.join("gone")).is_err(), "{file}");
    }
    assert_eq!(
        fs::metadata(place.join("segments")).unwrap().mode() & 0o777,
        0o700
    );
    assert_eq!(unprotect(&place).unwrap(), 7);
    assert_eq!(unprotect(&place).unwrap(), 0);
    fs::remove_dir_all(&place).unwrap();
}

#[test]
fn p4_appending_again_changes_no_byte_and_no_time() {
    let place = Place::new();
    let volume = labelled(place.path());
    let at = name("a/b/c");
    append(&volume, &at, &data(1, 70_000)).unwrap();
    let stamp = |file: &str| {
        let meta = fs::metadata(place.path().join(file)).unwrap();
        (
            meta.ino(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec(),
        )
    };
    let before = [stamp("a/b/c"), stamp("a/b/c.b3")];
    assert_eq!(
        append(&volume, &at, &data(1, 70_000)).unwrap(),
        Written::AlreadyThere
    );
    append(&volume, &at, &data(2, 70_000)).unwrap_err();
    assert_eq!(before, [stamp("a/b/c"), stamp("a/b/c.b3")]);
}

#[test]
fn listing_ten_thousand_objects_is_linear() {
    let Some(disk) = Mounted::tmpfs(128) else {
        return;
    };
    let place = disk.path();
    let volume = labelled(&place);
    let fill = |from: u32, to: u32| {
        for i in from..to {
            // Written directly: ten thousand syncs are not what is measured.
            let dir = place.join(format!("segments/{:06}", i / 1000));
            fs::create_dir_all(&dir).unwrap();
            let file = format!("{i:010}.hsm.zst");
            fs::write(dir.join(&file), i.to_le_bytes()).unwrap();
            let line = entry::encode(&file, &hash(&i.to_le_bytes()));
            fs::write(dir.join(format!("{file}.b3")), line).unwrap();
        }
    };
    let timed = |expected: usize| {
        (0..5)
            .map(|_| {
                let start = std::time::Instant::now();
                assert_eq!(volume.list().unwrap().len(), expected);
                start.elapsed()
            })
            .min()
            .unwrap()
    };
    fill(0, 1000);
    let small = timed(1000);
    fill(1000, 10_000);
    let large = timed(10_000);
    eprintln!("1,000 objects: {small:?}, 10,000: {large:?}");
    assert!(
        large < small * 40,
        "ten times the objects took {large:?} after {small:?}"
    );
    let listed = volume.list().unwrap();
    assert!(listed.is_sorted_by(|a, b| a.name < b.name));
}

/// Bytes that this thread had read from block devices.
fn bytes_from_disks() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/io").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("read_bytes: "));
    line.unwrap().parse().unwrap()
}

#[test]
fn read_back_comes_from_the_medium() {
    const BYTES: usize = 8 << 20;
    let disks = [
        Mounted::new("ext4", 64, &[]),
        Mounted::new("xfs", 512, &[]),
        Mounted::new("btrfs", 256, &[]),
    ];
    for disk in disks.into_iter().flatten() {
        let volume = labelled(&disk.path());
        let content = data(1, BYTES);
        for what in ["stored", "there already", "verified"] {
            let before = bytes_from_disks();
            match what {
                "verified" => drop(volume.verify(&name("a")).unwrap()),
                _ => drop(append(&volume, &name("a"), &content).unwrap()),
            }
            let read = bytes_from_disks() - before;
            assert!(
                read >= BYTES as u64,
                "{what}: only {read} bytes came from the disk"
            );
        }
    }
}
