//! Labelling and recognising: empty, foreign, torn, newer and damaged.

use std::fs;

use super::support::{MANUALS, Place, labelled, new_label, open, tree};
use super::*;

#[test]
fn a_new_volume_has_the_layout_of_the_manual() {
    let place = Place::new();
    assert!(matches!(probe(place.path()).unwrap(), Found::Empty));
    let volume = labelled(place.path());
    let names = [
        "README.txt",
        "VOLUME.json",
        "VOLUME.json.b3",
        "manual/",
        "manual/hsm-log.5.txt",
        "manual/hsm-volume.5.txt",
    ];
    assert_eq!(tree(place.path()), names);
    let readme = fs::read_to_string(place.path().join("README.txt")).unwrap();
    assert!(readme.contains(volume.label().serial.as_str()) && readme.is_ascii());
    assert!(readme.lines().all(|line| line.len() < 80));
    assert_eq!(
        fs::read_to_string(place.path().join("manual/hsm-log.5.txt")).unwrap(),
        "the log\n"
    );
    assert_eq!(open(place.path()).label(), volume.label());
}

#[test]
fn probing_changes_nothing_and_knows_lost_and_found() {
    let place = Place::new();
    fs::create_dir(place.path().join("lost+found")).unwrap();
    assert!(matches!(probe(place.path()).unwrap(), Found::Empty));
    assert_eq!(tree(place.path()), ["lost+found/"]);
    labelled(place.path());
    assert!(open(place.path()).inventory().unwrap().strangers.is_empty());
}

#[test]
fn there_is_nothing_where_there_is_no_directory() {
    let place = Place::new();
    let file = place.path().join("file");
    fs::write(&file, "x").unwrap();
    for path in [place.path().join("none"), file] {
        assert!(matches!(probe(&path).unwrap(), Found::Absent));
        assert!(label(&path, &new_label(), &[]).unwrap_err().is_absent());
        assert!(unprotect(&path).unwrap_err().is_absent());
    }
}

#[test]
fn foreign_content_is_named_and_left_alone() {
    for files in [
        &["holiday.jpg"][..],
        &["README.txt"],
        &["manual"],
        &[".hidden"],
        &[".tmp-editor"],
        &["a", "b", "c", "d", "e", "f", "g"],
    ] {
        let place = Place::new();
        for file in files {
            fs::write(place.path().join(file), "mine").unwrap();
        }
        for error in [
            probe(place.path()).unwrap_err(),
            label(place.path(), &new_label(), &MANUALS).unwrap_err(),
        ] {
            assert!(matches!(error, Error::Foreign { .. }), "{error}");
            assert!(error.to_string().contains(files[0]), "{error}");
            assert_eq!(error.to_string().contains("and 2 more"), files.len() == 7);
        }
        assert_eq!(tree(place.path()), files);
        assert!(
            files
                .iter()
                .all(|f| fs::read(place.path().join(f)).unwrap() == b"mine")
        );
    }
}

#[test]
fn a_volume_that_lost_its_label_is_not_labelled_again() {
    let place = Place::new();
    let volume = labelled(place.path());
    append(&volume, &name("segments/000000/1"), b"x").unwrap();
    support::unlock(place.path());
    fs::remove_file(place.path().join("VOLUME.json")).unwrap();
    let error = label(place.path(), &new_label(), &MANUALS).unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }), "{error}");
    assert!(error.to_string().contains("segments") && error.to_string().contains("VOLUME.json"));
    assert!(
        append(&volume, &name("segments/000000/2"), b"x")
            .unwrap_err()
            .is_absent()
    );
}

#[test]
fn a_labelled_directory_keeps_its_label() {
    let place = Place::new();
    let volume = labelled(place.path());
    let before = tree(place.path());
    let error = label(place.path(), &new_label(), &MANUALS).unwrap_err();
    assert!(
        error.to_string().contains(volume.label().serial.as_str()),
        "{error}"
    );
    label(place.path(), volume.label(), &MANUALS).unwrap();
    assert_eq!(tree(place.path()), before);
}

#[test]
fn manuals_stay_where_they_belong() {
    for bad in ["", "../x", "a/b", ".x", "a\0b", &"m".repeat(201)] {
        let place = Place::new();
        let error = label(place.path(), &new_label(), &[(bad, "x")]).unwrap_err();
        assert!(matches!(error, Error::BadName { .. }), "{error}");
        assert!(tree(place.path()).is_empty());
    }
}

#[test]
fn a_newer_format_is_named() {
    let place = Place::new();
    fs::write(
        place.path().join("VOLUME.json"),
        "{\"format\": 2, \"shape\": \"round\"}",
    )
    .unwrap();
    for error in [
        probe(place.path()).unwrap_err(),
        label(place.path(), &new_label(), &MANUALS).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(
            matches!(
                error,
                Error::NewerFormat {
                    found: 2,
                    known: 1,
                    ..
                }
            ),
            "{text}"
        );
        assert!(text.contains(place.path().to_str().unwrap()) && text.contains("newer version"));
    }
}

#[test]
fn a_label_from_hell_is_an_error() {
    for text in [
        &b""[..],
        b"{",
        b"null",
        b"\xff\xfe",
        b"{\"format\": -1}",
        b"{\"format\": 1}",
        &b"[".repeat(60_000),
        &b" ".repeat(70_000),
    ] {
        let place = Place::new();
        fs::write(place.path().join("VOLUME.json"), text).unwrap();
        let error = probe(place.path()).unwrap_err();
        assert!(matches!(error, Error::BadLabel { .. }), "{error}");
        assert!(error.to_string().contains("VOLUME.json"));
    }
    let place = Place::new();
    fs::create_dir(place.path().join("VOLUME.json")).unwrap();
    assert!(probe(place.path()).is_err());
}

#[test]
fn two_processes_do_not_label_at_once() {
    let place = Place::new();
    let marker = fs::File::create(place.path().join(".tmp-labelling")).unwrap();
    marker.try_lock().unwrap();
    let error = label(place.path(), &new_label(), &MANUALS).unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    drop(marker);
    labelled(place.path());
}
