//! Disks that fill up, run out of inodes, or are read-only. These need root to mount one.

use std::fs;
use std::io::{Read, Write};

use super::support::{Mounted, labelled, open, temporaries};
use super::*;

/// Gives bytes, and fills the disk up when the first of them are asked for.
struct FillsTheDisk<'a> {
    content: &'a [u8],
    filler: Option<PathBuf>,
}

impl Read for FillsTheDisk<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(path) = self.filler.take() {
            fill(&path);
        }
        self.content.read(buf)
    }
}

fn fill(path: &Path) {
    let mut file = fs::File::create(path).unwrap();
    for block in [1 << 20, 4096, 1] {
        while file.write_all(&vec![7; block]).is_ok() {}
    }
    let _ = file.sync_all();
}

fn append_while_filling(volume: &DirectoryVolume, content: &[u8]) -> Result<Written, Error> {
    let mut source = FillsTheDisk {
        content,
        filler: Some(volume.location().join("lost+found/filler")),
    };
    volume.append(
        &name("segments/000000/2"),
        content.len() as u64,
        &hash(content),
        &mut source,
    )
}

#[test]
fn an_object_that_does_not_fit_is_refused_before_anything_is_written() {
    let Some(disk) = Mounted::new("ext4", 16, &[]) else {
        return;
    };
    let volume = labelled(&disk.path());
    let free = volume.free_bytes().unwrap();
    let error = append(
        &volume,
        &name("x"),
        &data(1, usize::try_from(free + 1).unwrap()),
    )
    .unwrap_err();
    assert!(error.is_full(), "{error}");
    let Error::Full {
        needed, free: said, ..
    } = &error
    else {
        panic!("{error}");
    };
    assert!(needed > said && error.to_string().contains("bytes"));
    assert!(volume.list().unwrap().is_empty());
    assert_eq!(volume.free_bytes().unwrap(), free);
}

#[test]
fn a_volume_takes_objects_until_it_is_full_and_all_of_them_are_whole() {
    let Some(disk) = Mounted::new("ext4", 16, &[]) else {
        return;
    };
    let volume = labelled(&disk.path());
    let mut stored = 0;
    let free = volume.free_bytes().unwrap();
    let error = loop {
        let at = name(&format!("segments/000000/{stored:010}"));
        match append(&volume, &at, &data(stored, 700_000)) {
            Ok(_) => stored += 1,
            Err(error) => break error,
        }
    };
    assert!(error.is_full(), "{error}");
    assert!(stored > 10, "{stored}");
    assert!(free - volume.free_bytes().unwrap() >= stored * 700_000);
    let volume = open(&disk.path());
    assert_eq!(volume.list().unwrap().len() as u64, stored);
    for entry in volume.list().unwrap() {
        volume.verify(&entry.name).unwrap();
    }
    // What fits still goes in, and what is there is found.
    append(&volume, &name("small"), b"x").unwrap();
    let first = name("segments/000000/0000000000");
    assert_eq!(
        append(&volume, &first, &data(0, 700_000)).unwrap(),
        Written::AlreadyThere
    );
    assert!(temporaries(&disk.path()).is_empty());
}

#[test]
fn a_disk_that_fills_up_in_the_middle_is_full_and_nothing_is_left() {
    // Without extents there is no fallocate, so the disk fills up under the write.
    let options = ["-O", "^extent,^64bit,^metadata_csum"];
    let Some(disk) = Mounted::new("ext4", 32, &options) else {
        return;
    };
    let volume = labelled(&disk.path());
    append(&volume, &name("segments/000000/1"), b"first").unwrap();
    let content = data(2, 8_000_000);
    let error = append_while_filling(&volume, &content).unwrap_err();
    assert!(error.is_full(), "{error}");
    assert!(temporaries(&disk.path()).is_empty());
    assert_eq!(volume.list().unwrap().len(), 1);
    fs::remove_file(disk.path().join("lost+found/filler")).unwrap();
    assert_eq!(
        append(&volume, &name("segments/000000/2"), &content).unwrap(),
        Written::Stored
    );
    volume.verify(&name("segments/000000/2")).unwrap();
}

#[test]
fn space_is_reserved_before_the_first_byte() {
    let Some(disk) = Mounted::new("ext4", 32, &[]) else {
        return;
    };
    let volume = labelled(&disk.path());
    append(&volume, &name("segments/000000/1"), b"first").unwrap();
    let content = data(2, 8_000_000);
    // The object's own bytes are safe; its entry may not fit, then it is completed later.
    if let Err(error) = append_while_filling(&volume, &content) {
        assert!(error.is_full(), "{error}");
        assert_eq!(
            volume.inventory().unwrap().unlisted,
            [name("segments/000000/2")]
        );
    }
    assert!(temporaries(&disk.path()).is_empty());
    fs::remove_file(disk.path().join("lost+found/filler")).unwrap();
    let again = append(&volume, &name("segments/000000/2"), &content).unwrap();
    assert_eq!(again, Written::AlreadyThere);
    volume.verify(&name("segments/000000/2")).unwrap();
}

#[test]
fn a_disk_without_inodes_is_full() {
    let Some(disk) = Mounted::new("ext4", 16, &["-N", "32"]) else {
        return;
    };
    let volume = labelled(&disk.path());
    let error = (0..32)
        .find_map(|i| append(&volume, &name(&format!("{i}")), b"x").err())
        .unwrap();
    assert!(
        error.is_full() && error.to_string().contains("inodes"),
        "{error}"
    );
    assert_eq!(volume.free_bytes().unwrap(), 0);
    assert!(temporaries(&disk.path()).is_empty());
    for entry in volume.list().unwrap() {
        volume.verify(&entry.name).unwrap();
    }
}

#[test]
fn a_read_only_medium_is_read_and_nothing_else() {
    let Some(disk) = Mounted::new("ext4", 16, &[]) else {
        return;
    };
    let volume = labelled(&disk.path());
    append(&volume, &name("a/b"), b"content").unwrap();
    disk.remount("ro");
    let volume = open(&disk.path());
    assert_eq!(volume.list().unwrap().len(), 1);
    volume.verify(&name("a/b")).unwrap();
    assert_eq!(crate::contract::content(&volume, &name("a/b")), b"content");
    assert_eq!(
        append(&volume, &name("a/b"), b"content").unwrap(),
        Written::AlreadyThere
    );
    for other in ["a/c", "new/c"] {
        let error = append(&volume, &name(other), b"x").unwrap_err();
        assert!(matches!(error, Error::ReadOnly { .. }), "{error}");
    }
    disk.remount("rw");
    append(&volume, &name("a/c"), b"x").unwrap();
}
