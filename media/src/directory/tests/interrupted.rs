//! Kills and failures at every step of an append and of a labelling, and kills of a real process.

use std::io::Cursor;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::support::{MANUALS, Place, labelled, new_label, open, temporaries, tree};
use super::*;
use crate::fault::testing::{Fault, inject, steps};

const OBJECT: &str = "segments/000000/0000000002.hsm.zst";

/// What is listed is whole, and the object that was hit can be stored now.
fn check_and_store_again(path: &Path, content: &[u8], step: &str) {
    let volume = open(path);
    let inventory = volume.inventory().unwrap();
    assert!(
        inventory.faults.is_empty() && inventory.strangers.is_empty(),
        "{step}: {inventory:?}"
    );
    for entry in &inventory.entries {
        volume.verify(&entry.name).unwrap();
    }
    let listed = inventory.entries.iter().any(|e| e.name == name(OBJECT));
    let unlisted = inventory.unlisted == [name(OBJECT)];
    let expected = if listed || unlisted {
        Written::AlreadyThere
    } else {
        Written::Stored
    };
    assert_eq!(
        append(&volume, &name(OBJECT), content).unwrap(),
        expected,
        "{step}"
    );
    assert_eq!(volume.list().unwrap().len(), 2, "{step}");
    volume.verify(&name(OBJECT)).unwrap();
    assert!(
        temporaries(path).is_empty(),
        "{step}: {:?}",
        temporaries(path)
    );
}

fn fault_at_every_step(fault: Fault, check: impl Fn(&Path, &str, Option<Result<Written, Error>>)) {
    let content = data(5, 2_500_000);
    let mut steps = Vec::new();
    for n in 0.. {
        let place = Place::new();
        let volume = labelled(place.path());
        append(
            &volume,
            &name("segments/000000/0000000001.hsm.zst"),
            b"first",
        )
        .unwrap();
        let (hit, result) = inject(n, fault, || append(&volume, &name(OBJECT), &content));
        let Some(step) = hit else {
            assert_eq!(result.unwrap().unwrap(), Written::Stored);
            break;
        };
        steps.push(step);
        check(place.path(), step, result);
        check_and_store_again(place.path(), &content, step);
    }
    for step in [
        "reserve",
        "write",
        "sync file",
        "read back",
        "rename",
        "sync directory",
        "protect",
    ] {
        assert!(steps.contains(&step), "{step} is not among {steps:?}");
    }
}

#[test]
fn p4_a_kill_at_any_step_loses_nothing_that_is_listed() {
    fault_at_every_step(Fault::Kill, |_, step, result| {
        assert!(result.is_none(), "{step}");
    });
}

#[test]
fn an_input_output_error_at_any_step_leaves_no_rest() {
    fault_at_every_step(Fault::Errno(libc::EIO), |path, step, result| {
        let error = result.unwrap().unwrap_err();
        assert!(!error.is_full() && !error.is_absent(), "{step}: {error}");
        assert!(
            error.to_string().contains(path.to_str().unwrap()),
            "{step}: {error}"
        );
        assert!(temporaries(path).is_empty(), "{step}");
    });
}

#[test]
fn a_full_disk_at_any_step_leaves_no_rest() {
    for errno in [libc::ENOSPC, libc::EDQUOT] {
        fault_at_every_step(Fault::Errno(errno), |path, step, result| {
            let error = result.unwrap().unwrap_err();
            assert!(error.is_full(), "{step}: {error}");
            assert!(temporaries(path).is_empty(), "{step}");
        });
    }
}

#[test]
fn the_first_object_of_a_volume_survives_kills_too() {
    for n in 0.. {
        let place = Place::new();
        let volume = labelled(place.path());
        let (hit, _) = inject(n, Fault::Kill, || append(&volume, &name("a/b/c"), b"x"));
        let again = open(place.path());
        append(&again, &name("a/b/c"), b"x").unwrap();
        assert_eq!(again.list().unwrap().len(), 1, "{hit:?}");
        assert!(temporaries(place.path()).is_empty(), "{hit:?}");
        if hit.is_none() {
            break;
        }
    }
}

#[test]
fn completing_an_interrupted_append_can_be_interrupted() {
    for fault in [Fault::Kill, Fault::Errno(libc::EIO)] {
        for n in 0.. {
            let place = Place::new();
            let volume = labelled(place.path());
            append(&volume, &name("a/b"), b"content").unwrap();
            support::unlock(place.path());
            std::fs::remove_file(place.path().join("a/b.b3")).unwrap();
            let volume = open(place.path());
            let (hit, _) = inject(n, fault, || append(&volume, &name("a/b"), b"content"));
            let again = open(place.path());
            assert_eq!(
                append(&again, &name("a/b"), b"content").unwrap(),
                Written::AlreadyThere
            );
            again.verify(&name("a/b")).unwrap();
            if hit.is_none() {
                break;
            }
        }
    }
}

#[test]
fn labelling_can_be_resumed_after_a_fault_at_any_step() {
    for fault in [Fault::Kill, Fault::Errno(libc::EIO)] {
        for n in 0.. {
            let place = Place::new();
            let first = new_label();
            let (hit, _) = inject(n, fault, || label(place.path(), &first, &MANUALS));
            // A daemon that starts again draws another serial, unless the label is there already.
            let next = match probe(place.path()).unwrap() {
                Found::Labelled(volume) => volume.label().clone(),
                Found::Empty => new_label(),
                Found::Absent => panic!("gone after {hit:?}"),
            };
            let volume = label(place.path(), &next, &MANUALS).unwrap();
            append(&volume, &name("a"), b"x").unwrap();
            assert_eq!(
                tree(place.path()).len(),
                8,
                "{hit:?}: {:?}",
                tree(place.path())
            );
            let readme = std::fs::read_to_string(place.path().join("README.txt")).unwrap();
            assert!(readme.contains(next.serial.as_str()), "{hit:?}");
            if hit.is_none() {
                break;
            }
        }
    }
}

#[test]
fn an_append_syncs_what_it_must_and_no_more() {
    let file = [
        "create",
        "write",
        "sync file",
        "read back",
        "rename",
        "sync directory",
    ];
    let mut object = file.to_vec();
    object.insert(1, "reserve");
    let rest = [&object[..], &file, &["protect"]].concat();

    let place = Place::new();
    let volume = labelled(place.path());
    let store = |volume: &DirectoryVolume, at, content: &[u8]| {
        steps(|| {
            append(volume, &name(at), content).unwrap();
        })
    };
    // Each new directory's name is made durable in the one above it.
    let made = ["mkdir", "sync directory"].repeat(2);
    let first = store(&volume, "a/b/1", b"1");
    assert_eq!(first, [&made[..], &rest].concat());
    let next = store(&volume, "a/b/2", b"2");
    assert_eq!(next, rest);
    // A process that was killed may have left names that are not durable: done once more.
    let volume = open(place.path());
    let again = store(&volume, "a/b/3", b"3");
    assert_eq!(again, first);
    let there = store(&volume, "a/b/3", b"3");
    assert_eq!(there, ["sync directory", "read back", "protect"]);
}

const CHILD_PLACE: &str = "MEDIA_TEST_KILL_PLACE";

/// Not a test of its own: what the next test starts and kills.
#[test]
fn child_that_appends_until_it_is_killed() {
    let Some(path) = std::env::var_os(CHILD_PLACE) else {
        return;
    };
    let volume = open(Path::new(&path));
    let mut number = volume.list().unwrap().len() as u64;
    loop {
        let content = data(number, usize::try_from(number * 7919 % 1_500_000).unwrap());
        let at = name(&format!("segments/{:06}/{number:010}", number / 10));
        volume
            .append(
                &at,
                content.len() as u64,
                &hash(&content),
                &mut Cursor::new(&content),
            )
            .unwrap();
        number += 1;
    }
}

#[test]
fn p4_sigkill_at_any_moment_loses_nothing_that_is_listed() {
    let place = Place::new();
    labelled(place.path());
    let mut listed = Vec::new();
    for round in 0..30u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "directory::tests::interrupted::child_that_appends_until_it_is_killed",
            ])
            .env(CHILD_PLACE, place.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(10 + round * 37 % 90));
        child.kill().unwrap();
        child.wait().unwrap();
        let now = open(place.path()).list().unwrap();
        assert_eq!(now[..listed.len()], listed[..], "round {round}");
        listed = now;
    }
    let volume = open(place.path());
    for (number, entry) in listed.iter().enumerate() {
        assert!(entry.name.as_str().ends_with(&format!("{number:010}")));
        volume.verify(&entry.name).unwrap();
    }
    append(&volume, &name("last"), b"x").unwrap();
    assert!(temporaries(place.path()).is_empty());
    assert!(!listed.is_empty(), "no child came to store anything");
}
