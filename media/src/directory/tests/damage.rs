//! The damage matrix: truncated, flipped, emptied, removed, duplicated, replaced, for the object, its
//! entry and the label. Each is named by an error, nothing panics, and the rest stays usable.

use std::fs;

use super::support::{Place, flip, labelled, open, unlock, writable};
use super::*;
use crate::contract::content;

const DAMAGED: &str = "segments/000000/0000000002.hsm.zst";
const OTHERS: [&str; 2] = [
    "segments/000000/0000000001.hsm.zst",
    "segments/000000/0000000003.hsm.zst",
];

struct Case {
    place: Place,
    content: Vec<u8>,
}

impl Case {
    fn new() -> Self {
        let place = Place::new();
        let volume = labelled(place.path());
        let content = data(2, 150_000);
        append(&volume, &name(DAMAGED), &content).unwrap();
        for other in OTHERS {
            append(&volume, &name(other), other.as_bytes()).unwrap();
        }
        unlock(place.path());
        Self { place, content }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.place.path().join(file)
    }

    fn entry(&self) -> PathBuf {
        self.path(&format!("{DAMAGED}.b3"))
    }

    /// The other objects are listed, read and verified as before.
    fn rest_is_usable(&self) {
        let volume = open(self.place.path());
        let inventory = volume.inventory().unwrap();
        for other in OTHERS {
            assert!(inventory.entries.iter().any(|e| e.name.as_str() == other));
            volume.verify(&name(other)).unwrap();
            assert_eq!(content(&volume, &name(other)), other.as_bytes());
        }
        append(
            &volume,
            &name("segments/000000/0000000004.hsm.zst"),
            b"next",
        )
        .unwrap();
    }

    fn verify(&self) -> Error {
        open(self.place.path()).verify(&name(DAMAGED)).unwrap_err()
    }

    fn append(&self) -> Result<Written, Error> {
        append(&open(self.place.path()), &name(DAMAGED), &self.content)
    }
}

fn names_the_place(error: &Error, file: &str) {
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(error.to_string().contains(file), "{error}");
}

type Damage = (&'static str, fn(&Path));

const CHANGES: [Damage; 6] = [
    ("truncate", |path| {
        let file = writable(path);
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    }),
    ("truncate to half", |path| {
        let file = writable(path);
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    }),
    ("empty", |path| writable(path).set_len(0).unwrap()),
    ("extend", |path| {
        let file = writable(path);
        file.set_len(file.metadata().unwrap().len() + 1).unwrap();
    }),
    ("flip the first byte", |path| flip(path, 0)),
    ("flip a late byte", |path| {
        let bytes = fs::metadata(path).unwrap().len();
        flip(path, bytes - 2);
    }),
];

#[test]
fn damaged_objects() {
    for (what, change) in CHANGES {
        eprintln!("{what}");
        let case = Case::new();
        change(&case.path(DAMAGED));
        let damaged = fs::read(case.path(DAMAGED)).unwrap();
        names_the_place(&case.verify(), DAMAGED);
        names_the_place(&case.append().unwrap_err(), DAMAGED);
        assert_eq!(open(case.place.path()).list().unwrap().len(), 3);
        assert_eq!(
            fs::read(case.path(DAMAGED)).unwrap(),
            damaged,
            "{what}: it was touched"
        );
        case.rest_is_usable();
    }
}

#[test]
fn damaged_entries() {
    for (what, change) in CHANGES {
        eprintln!("{what}");
        let case = Case::new();
        change(&case.entry());
        let damaged = fs::read(case.entry()).unwrap();
        let volume = open(case.place.path());
        match volume.verify(&name(DAMAGED)).unwrap_err() {
            // A flipped digit is a hash that the object does not have.
            error if what == "flip the first byte" => names_the_place(&error, DAMAGED),
            error => {
                names_the_place(&error, ".b3");
                names_the_place(&volume.list().unwrap_err(), ".b3");
                let inventory = volume.inventory().unwrap();
                assert_eq!((inventory.entries.len(), inventory.faults.len()), (2, 1));
            }
        }
        names_the_place(&case.append().unwrap_err(), ".b3");
        assert_eq!(
            fs::read(case.entry()).unwrap(),
            damaged,
            "{what}: it was touched"
        );
        assert_eq!(content(&volume, &name(DAMAGED)), case.content);
        case.rest_is_usable();
    }
}

#[test]
fn removed_object() {
    let case = Case::new();
    fs::remove_file(case.path(DAMAGED)).unwrap();
    let volume = open(case.place.path());
    names_the_place(&case.verify(), DAMAGED);
    names_the_place(&volume.list().unwrap_err(), DAMAGED);
    assert!(matches!(
        volume.open(&name(DAMAGED)),
        Err(Error::NoObject { .. })
    ));
    case.rest_is_usable();
    // Only the same bytes may come back.
    let error = append(&volume, &name(DAMAGED), b"other").unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    assert_eq!(case.append().unwrap(), Written::Stored);
    volume.verify(&name(DAMAGED)).unwrap();
}

#[test]
fn removed_entry() {
    let case = Case::new();
    fs::remove_file(case.entry()).unwrap();
    let volume = open(case.place.path());
    assert!(matches!(case.verify(), Error::NoObject { .. }));
    let inventory = volume.inventory().unwrap();
    assert_eq!(inventory.unlisted, [name(DAMAGED)]);
    assert_eq!(volume.list().unwrap().len(), 2);
    case.rest_is_usable();
    let error = append(&volume, &name(DAMAGED), b"other").unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    assert_eq!(case.append().unwrap(), Written::AlreadyThere);
    volume.verify(&name(DAMAGED)).unwrap();
}

#[test]
fn removed_object_and_entry() {
    let case = Case::new();
    fs::remove_file(case.path(DAMAGED)).unwrap();
    fs::remove_file(case.entry()).unwrap();
    assert!(matches!(case.verify(), Error::NoObject { .. }));
    case.rest_is_usable();
    assert_eq!(case.append().unwrap(), Written::Stored);
}

#[test]
fn torn_object_without_entry_is_never_overwritten() {
    let case = Case::new();
    fs::remove_file(case.entry()).unwrap();
    writable(&case.path(DAMAGED)).set_len(1000).unwrap();
    let error = case.append().unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    assert_eq!(fs::metadata(case.path(DAMAGED)).unwrap().len(), 1000);
}

#[test]
fn duplicated_object_and_entry() {
    let case = Case::new();
    let copy = case.path("segments/000000/0000000009.hsm.zst");
    fs::copy(case.path(DAMAGED), &copy).unwrap();
    let volume = open(case.place.path());
    assert_eq!(volume.inventory().unwrap().unlisted.len(), 1);
    fs::copy(
        case.entry(),
        case.path("segments/000000/0000000009.hsm.zst.b3"),
    )
    .unwrap();
    names_the_place(&volume.list().unwrap_err(), "0000000009.hsm.zst.b3");
    names_the_place(
        &volume
            .verify(&name("segments/000000/0000000009.hsm.zst"))
            .unwrap_err(),
        ".b3",
    );
    // An entry of another object is not taken for this one's.
    fs::remove_file(case.entry()).unwrap();
    fs::copy(case.path(&format!("{}.b3", OTHERS[0])), case.entry()).unwrap();
    names_the_place(&case.verify(), DAMAGED);
    case.rest_is_usable();
}

#[test]
fn replaced_by_another_kind_of_file() {
    for file in [DAMAGED.to_owned(), format!("{DAMAGED}.b3")] {
        let case = Case::new();
        let path = case.path(&file);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
        names_the_place(&case.verify(), &file);
        assert!(case.append().is_err());
        let inventory = open(case.place.path()).inventory().unwrap();
        assert_eq!(inventory.strangers, std::slice::from_ref(&path));
        case.rest_is_usable();
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(case.append().is_err());
        case.rest_is_usable();
    }
}

#[test]
fn strangers_are_listed() {
    let case = Case::new();
    let strangers = [
        "Notes.txt",
        "segments/.hidden",
        "segments/000000/deep",
        "segments/UPPER",
    ];
    fs::write(case.path(strangers[0]), "x").unwrap();
    fs::write(case.path(strangers[1]), "x").unwrap();
    fs::create_dir(case.path(strangers[2])).unwrap();
    fs::create_dir(case.path(strangers[3])).unwrap();
    let mut found = open(case.place.path()).inventory().unwrap().strangers;
    let mut expected = strangers.map(|s| case.path(s));
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    case.rest_is_usable();
}

#[test]
fn damaged_labels() {
    for file in ["VOLUME.json", "VOLUME.json.b3"] {
        for (what, change) in CHANGES {
            let case = Case::new();
            let volume = open(case.place.path());
            change(&case.path(file));
            for error in [
                probe(case.place.path()).unwrap_err(),
                volume.list().unwrap_err(),
                append(&volume, &name("new"), b"x").unwrap_err(),
            ] {
                assert!(!error.is_absent(), "{what}: {error}");
                names_the_place(&error, "VOLUME.json");
            }
            assert!(!case.path("new").exists());
        }
    }
}

#[test]
fn every_bit_of_the_label_counts() {
    let place = Place::new();
    labelled(place.path());
    let path = place.path().join("VOLUME.json");
    let bytes = fs::metadata(&path).unwrap().len();
    for at in 0..bytes {
        flip(&path, at);
        assert!(probe(place.path()).is_err(), "byte {at}");
        flip(&path, at);
    }
    open(place.path());
}

#[test]
fn a_label_without_its_entry_is_read() {
    let case = Case::new();
    fs::remove_file(case.path("VOLUME.json.b3")).unwrap();
    case.rest_is_usable();
}

#[test]
fn a_duplicated_label_is_a_stranger() {
    let case = Case::new();
    fs::copy(case.path("VOLUME.json"), case.path("VOLUME.json.bak")).unwrap();
    let strangers = open(case.place.path()).inventory().unwrap().strangers;
    assert_eq!(strangers, [case.path("VOLUME.json.bak")]);
}

#[test]
fn a_label_that_changed_under_an_open_volume_is_refused() {
    let place = Place::new();
    let volume = labelled(place.path());
    unlock(place.path());
    fs::remove_file(place.path().join("VOLUME.json.b3")).unwrap();
    let path = place.path().join("VOLUME.json");
    let text = fs::read_to_string(&path)
        .unwrap()
        .replace("archive", "another");
    fs::remove_file(&path).unwrap();
    fs::write(&path, text).unwrap();
    let error = append(&volume, &name("x"), b"x").unwrap_err();
    assert!(matches!(error, Error::BadLabel { .. }), "{error}");
}
