//! Volumes that vanish, come back, and are exchanged, with real mounts.

use std::fs;
use std::io::Read;

use super::support::{Mounted, Place, labelled, open, tree, unmount};
use super::*;

fn every_operation(volume: &DirectoryVolume) -> Vec<Error> {
    vec![
        append(volume, &name("a/new"), b"x").unwrap_err(),
        append(volume, &name("a/b"), b"content").unwrap_err(),
        volume.open(&name("a/b")).err().unwrap(),
        volume.verify(&name("a/b")).unwrap_err(),
        volume.list().unwrap_err(),
        volume.free_bytes().unwrap_err(),
    ]
}

#[test]
fn nothing_is_written_into_an_unmounted_mount_point() {
    let Some(disk) = Mounted::new("ext4", 16, &[]) else {
        return;
    };
    let volume = labelled(&disk.path());
    append(&volume, &name("a/b"), b"content").unwrap();
    // Holding the value does not keep the medium busy.
    disk.unmount();
    for error in every_operation(&volume) {
        assert!(error.is_absent(), "{error}");
        assert!(
            error.to_string().contains(volume.label().serial.as_str()),
            "{error}"
        );
    }
    assert!(tree(&disk.path()).is_empty());
    disk.mount();
    assert_eq!(
        append(&volume, &name("a/b"), b"content").unwrap(),
        Written::AlreadyThere
    );
    append(&volume, &name("a/new"), b"x").unwrap();
}

#[test]
fn another_volume_in_the_place_is_not_touched() {
    let (Some(one), Some(two)) = (Mounted::new("ext4", 16, &[]), Mounted::new("ext4", 16, &[]))
    else {
        return;
    };
    let volume = labelled(&one.path());
    let other = labelled(&two.path());
    append(&volume, &name("a/b"), b"content").unwrap();
    let before = tree(&two.path());
    one.unmount();
    two.unmount();
    assert!(two.mount_at(&one.path()));
    for error in every_operation(&volume) {
        assert!(error.is_absent(), "{error}");
        assert!(
            error.to_string().contains(other.label().serial.as_str()),
            "{error}"
        );
    }
    assert_eq!(tree(&one.path()), before);
}

/// Unmounts lazily and mounts another medium when the first bytes are asked for.
struct Exchanges<'a> {
    from: &'a Mounted,
    to: Option<&'a Mounted>,
}

impl Read for Exchanges<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(to) = self.to.take() else {
            return Ok(0);
        };
        assert!(unmount(&self.from.path(), &["-l"]));
        assert!(to.mount_at(&self.from.path()));
        buf[..4].copy_from_slice(b"data");
        Ok(4)
    }
}

#[test]
fn a_write_under_way_stays_on_its_medium() {
    let (Some(one), Some(two)) = (Mounted::new("ext4", 16, &[]), Mounted::new("ext4", 16, &[]))
    else {
        return;
    };
    let volume = labelled(&one.path());
    labelled(&two.path());
    two.unmount();
    let mut source = Exchanges {
        from: &one,
        to: Some(&two),
    };
    volume
        .append(&name("x/y/z"), 4, &hash(b"data"), &mut source)
        .unwrap();
    assert!(
        !one.path().join("x").exists(),
        "redirected to the new medium"
    );
    assert!(volume.list().unwrap_err().is_absent());
    assert!(unmount(&one.path(), &[]));
    one.mount();
    open(&one.path()).verify(&name("x/y/z")).unwrap();
}

#[test]
fn a_removed_or_replaced_directory_is_absent() {
    let place = Place::new();
    let path = place.path().join("volume");
    fs::create_dir(&path).unwrap();
    let volume = labelled(&path);
    append(&volume, &name("a/b"), b"content").unwrap();
    let object = volume.open(&name("a/b")).unwrap();
    fs::rename(&path, place.path().join("elsewhere")).unwrap();
    assert!(every_operation(&volume).iter().all(Error::is_absent));
    fs::write(&path, "a file").unwrap();
    assert!(every_operation(&volume).iter().all(Error::is_absent));
    assert_eq!(fs::read(&path).unwrap(), b"a file");
    // What is open stays readable, and a volume may move.
    object.read_exact_at(0, &mut [0; 7]).unwrap();
    open(&place.path().join("elsewhere"))
        .verify(&name("a/b"))
        .unwrap();
}
