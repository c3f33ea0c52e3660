//! P7, any moment: the tree, a part of it, or one file as of an earlier LSN or time.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use hsm_tests::compare::{Tree, assert_equal};
use hsm_tests::loopfs::{Kind, ROOMY_BYTES, must};
use hsm_tests::program::{locate, run};
use hsm_tests::system::{Setup, System};
use hsm_tests::workload::{Workload, seed};

/// A moment at which all was durable and nothing moved.
struct Moment {
    lsn: u64,
    time: String,
    tree: Tree,
    /// A file that is there, and what it holds.
    file: (PathBuf, Vec<u8>),
}

fn now() -> String {
    let text = must(Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%S.%NZ"]));
    text.trim().to_owned()
}

fn moments(system: &System, seed: u64, number: u64) -> Vec<Moment> {
    let (dir, file) = (system.at("steady"), system.at("steady/file"));
    fs::create_dir(&dir).expect("a directory");
    (0..number)
        .map(|part| {
            Workload::start(system.root(), seed + part, 3, 500).finish();
            fs::write(&file, format!("version {part}\n").repeat(20_000)).expect("a file");
            fs::write(dir.join(format!("new{part}")), "new").expect("a file");
            let lsn = system.sync(&["--sweep"]);
            let time = now();
            thread::sleep(Duration::from_millis(20));
            Moment {
                lsn,
                time,
                tree: Tree::read(system.root()),
                file: (file.clone(), fs::read(&file).expect("the file")),
            }
        })
        .collect()
}

fn any_moment(kind: Kind) {
    let seed = seed();
    let system = Setup::new(kind).bytes(ROOMY_BYTES).start();
    let moments = moments(&system, seed, 4);
    system.sync_all();
    for (number, moment) in moments.iter().enumerate() {
        let context = format!("{kind}, LSN {}, HSM_SEED={seed}", moment.lsn);
        let until = moment.lsn.to_string();
        let fresh = system.replay_to_fresh(&["--until", &until]);
        assert_equal(&moment.tree, &Tree::read(fresh.root()), &context);

        let fresh = system.replay_to_fresh(&["--until", &moment.time, "--path", "steady"]);
        let part = fresh.at("steady");
        let part = if part.exists() {
            part
        } else {
            fresh.root().to_owned()
        };
        assert_equal(
            &moment.tree.below("steady"),
            &Tree::read(&part),
            &format!("{context}: a part, by time {}", moment.time),
        );

        let mut cat = Command::new(locate("tierctl"));
        cat.arg("--config")
            .arg(system.config())
            .args(["log", "cat"])
            .arg(&moment.file.0)
            .args([
                "--at",
                if number % 2 == 0 {
                    &until
                } else {
                    &moment.time
                },
            ]);
        let ran = run(cat).done();
        assert!(
            ran.stdout.as_bytes() == moment.file.1,
            "{context}: tierctl log cat gives other bytes"
        );
    }
}

#[test]
fn any_moment_on_ext4() {
    hsm_tests::compare::ignore_holes();
    any_moment(Kind::Ext4);
}

#[test]
fn any_moment_on_xfs() {
    hsm_tests::compare::ignore_holes();
    any_moment(Kind::Xfs);
}

#[test]
fn any_moment_on_btrfs() {
    hsm_tests::compare::ignore_holes();
    any_moment(Kind::Btrfs);
}

/// What is deleted is not gone: it is listed, read and replayed as of when it was there.
#[test]
fn a_deleted_file_is_found_again() {
    hsm_tests::compare::ignore_holes();
    let system = Setup::new(Kind::Ext4).start();
    let file = system.at("dir/precious");
    fs::create_dir(system.at("dir")).expect("a directory");
    fs::write(&file, "first").expect("a file");
    let first = system.sync(&[]);
    fs::write(&file, "second, longer").expect("a file");
    let second = system.sync(&[]);
    fs::remove_dir_all(system.at("dir")).expect("to remove it");
    let third = system.sync(&[]);
    assert!(first < second && second < third);

    let path = file.to_str().expect("a path");
    let list = system.tierctl(&["log", "list", path, "--json"]).done();
    for lsn in [first, second, third] {
        assert!(list.stdout.contains(&lsn.to_string()), "LSN {lsn}: {list}");
    }
    for (lsn, text) in [(first, "first"), (second, "second, longer")] {
        let at = lsn.to_string();
        let cat = system.tierctl(&["log", "cat", path, "--at", &at]).done();
        assert_eq!(cat.stdout, text);
    }
    let gone = system.tierctl(&["log", "cat", path]);
    assert!(gone.code != 0, "{gone}");
    system.check("after a deletion");
}
