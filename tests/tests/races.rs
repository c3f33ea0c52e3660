//! Sweeps that race renames never log a deletion that did not happen.
//!
//! Files and directories change their places all the time, none is ever deleted or made. So the log
//! may hold no deletion at all, each inode must keep its file id, and no content is logged again.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::Kind;
use hsm_tests::report::say;
use hsm_tests::system::{Setup, System};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

const FILES: u64 = 40;
const FILE_BYTES: usize = 20_000;

fn mv(root: &Path, from: &str, to: &str) -> io::Result<()> {
    fs::rename(root.join(from), root.join(to))
}

fn exchange(root: &Path, one: &str, other: &str) -> io::Result<()> {
    let flags = RenameFlags::RENAME_EXCHANGE;
    Ok(renameat2(
        AT_FDCWD,
        &root.join(one),
        AT_FDCWD,
        &root.join(other),
        flags,
    )?)
}

/// One round of a race; afterwards all is where it was, or the other way round.
type Race = fn(&Path) -> io::Result<()>;

const RACES: &[(&str, Race)] = &[
    ("two files swap their names by way of a third", |root| {
        mv(root, "swap/f", "swap/t")?;
        mv(root, "swap/g", "swap/f")?;
        mv(root, "swap/t", "swap/g")
    }),
    ("two files are exchanged", |root| {
        exchange(root, "aaa/x", "zzz/x")
    }),
    ("A/B becomes B/A and back", |root| {
        mv(root, "turn/A/B", "turn/B")?;
        mv(root, "turn/A", "turn/B/A")?;
        mv(root, "turn/B/A", "turn/A")?;
        mv(root, "turn/B", "turn/A/B")
    }),
    ("a directory moves into its sibling and out", |root| {
        mv(root, "sib/one", "sib/two/one")?;
        mv(root, "sib/two/one", "sib/one")
    }),
    (
        "a directory is exchanged with a file deep below another",
        |root| {
            exchange(root, "aaa/dir", "zzz/deep/file")?;
            exchange(root, "aaa/dir", "zzz/deep/file")
        },
    ),
    ("files move from the end to the start and back", |root| {
        for n in 0..FILES {
            mv(root, &format!("zzz/m{n}"), &format!("aaa/m{n}"))?;
        }
        for n in 0..FILES {
            mv(root, &format!("aaa/m{n}"), &format!("zzz/m{n}"))?;
        }
        Ok(())
    }),
    ("a tree is renamed again and again", |root| {
        mv(root, "mmm", "000")?;
        mv(root, "000", "~~~")?;
        mv(root, "~~~", "mmm")
    }),
    ("a file has a second name for a moment", |root| {
        fs::hard_link(root.join("swap/h"), root.join("zzz/h"))?;
        fs::remove_file(root.join("swap/h"))?;
        mv(root, "zzz/h", "swap/h")
    }),
];

fn plant(root: &Path) -> io::Result<()> {
    for dir in [
        "swap", "aaa/dir", "turn/A/B", "sib/one", "sib/two", "zzz/deep", "mmm/a/b",
    ] {
        fs::create_dir_all(root.join(dir))?;
    }
    let mut number = 0;
    let mut file = |name: &str| {
        number += 1;
        fs::write(root.join(name), noise(number, FILE_BYTES))
    };
    for name in [
        "swap/f",
        "swap/g",
        "swap/h",
        "aaa/x",
        "zzz/x",
        "aaa/dir/below",
        "zzz/deep/file",
        "turn/A/a",
        "turn/A/B/b",
        "sib/one/1",
        "sib/two/2",
        "mmm/a/b/c",
        "mmm/d",
    ] {
        file(name)?;
    }
    (0..FILES).try_for_each(|n| file(&format!("zzz/m{n}")))
}

/// All paths below the root.
fn paths(root: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).expect("a directory").flatten() {
            let path = entry.path();
            if path.is_dir() {
                left.push(path.clone());
            }
            found.push(path);
        }
    }
    found.retain(|path| !path.ends_with("lost+found"));
    found
}

/// The log's file id of every inode.
fn file_ids(system: &System) -> BTreeMap<u64, u64> {
    let all = paths(system.root());
    let mut words = vec!["state", "--json"];
    words.extend(all.iter().map(|path| path.to_str().expect("ASCII")));
    let answer = system.tierctl(&words).done().json();
    let states = answer
        .as_array()
        .or_else(|| answer["states"].as_array())
        .unwrap_or_else(|| panic!("no list: {answer:#}"));
    assert_eq!(states.len(), all.len());
    all.iter()
        .zip(states)
        .map(|(path, state)| {
            let id = state["file"].as_u64();
            let id = id.unwrap_or_else(|| panic!("{}: {state:#}", path.display()));
            (fs::metadata(path).expect("a file").ino(), id)
        })
        .collect()
}

/// Operations of this kind in the transactions after `from`.
fn operations(system: &System, kinds: &[&str], from: u64, to: u64) -> Vec<String> {
    let mut found = Vec::new();
    for lsn in from + 1..=to {
        let shown = system.tierctl(&["log", "show", &lsn.to_string(), "--json"]);
        let shown = shown.done().json();
        for operation in shown["operations"].as_array().expect("operations") {
            if kinds.contains(&operation["kind"].as_str().unwrap_or_default()) {
                found.push(format!("LSN {lsn}: {operation}"));
            }
        }
    }
    found
}

fn sweeps_race_renames(kind: Kind) {
    let system = Setup::new(kind).start();
    plant(system.root()).expect("a tree");
    let before = system.sync(&["--sweep"]);
    let ids = file_ids(&system);
    let logged = system.status()["logged_bytes"]
        .as_u64()
        .expect("logged_bytes");
    let end = Instant::now() + Duration::from_secs(6);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for (name, race) in RACES {
            let (root, stop) = (system.root(), &stop);
            scope.spawn(move || {
                let mut rounds = 0u32;
                while !stop.load(Ordering::Relaxed) {
                    race(root).unwrap_or_else(|e| panic!("{name}: {e}"));
                    rounds += 1;
                    // Fast and slow in turn: a merged burst, and single events.
                    if rounds.is_multiple_of(16) {
                        thread::sleep(Duration::from_millis(u64::from(rounds % 7)));
                    }
                }
                say(format_args!("{rounds} times: {name}"));
            });
        }
        let mut sweeps = 0;
        while Instant::now() < end {
            system.sync(&["--sweep"]);
            sweeps += 1;
        }
        say(format_args!("{sweeps} sweeps"));
        stop.store(true, Ordering::Relaxed);
    });
    let after = system.sync(&["--sweep"]);
    say(format_args!("LSN {before} to {after}"));
    let status = system.status();
    let relogged = status["logged_bytes"].as_u64().expect("logged_bytes") - logged;
    assert!(
        relogged < 50_000,
        "{relogged} bytes of content were logged again"
    );
    assert_eq!(ids, file_ids(&system), "the file id of an inode changed");
    let from = after.saturating_sub(3000).max(before);
    let deletions = operations(&system, &["delete"], from, after);
    assert!(
        deletions.is_empty(),
        "nothing was deleted, but the log says, HSM: {}",
        deletions.join("\n")
    );
    system.check("after the race");
}

#[test]
fn sweeps_race_renames_on_ext4() {
    hsm_tests::compare::ignore_holes();
    sweeps_race_renames(Kind::Ext4);
}

#[test]
fn sweeps_race_renames_on_xfs() {
    hsm_tests::compare::ignore_holes();
    sweeps_race_renames(Kind::Xfs);
}

#[test]
fn sweeps_race_renames_on_btrfs() {
    hsm_tests::compare::ignore_holes();
    sweeps_race_renames(Kind::Btrfs);
}
