//! P1, complete: every kind of change comes back from the log, on every filesystem, whenever it was
//! made: before the first start, while the daemon runs, is stopped, killed or starved.
//!
//! One run makes all changes, each in a directory of its own, and reports by kind of change.
//! `HSM_ONLY=rename` makes only those whose names contain "rename".

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};

use hsm_tests::changes::{self, Change};
use hsm_tests::compare::{Tree, differences};
use hsm_tests::loopfs::Kind;
use hsm_tests::sys;
use hsm_tests::system::{Setup, System};

fn setup(kind: Kind) -> Setup {
    Setup::new(kind).bytes(1 << 30)
}

/// Replays, and reports what is not equal, change by change. Changes of which `counts` is false are
/// not looked at.
fn report(system: &System, when: &str, counts: impl Fn(&Change) -> bool) {
    let fresh = system.replay_to_fresh(&[]);
    let found = differences(&Tree::read(system.root()), &Tree::read(fresh.root()));
    let kind = system.fs().kind();
    let ignored: Vec<&str> = changes::all(kind)
        .iter()
        .filter(|change| !counts(change))
        .map(|change| change.name)
        .collect();
    let mut failed: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for difference in &found {
        let change = difference.path.split('/').next().unwrap_or_default();
        if !ignored.contains(&change) {
            let lines = failed.entry(change).or_default();
            lines.push(difference.to_string());
        }
    }
    let mut text = String::new();
    for (change, lines) in &failed {
        let _ = write!(text, "\n{change}");
        for line in lines.iter().take(5) {
            let _ = write!(text, "\n    {line}");
        }
        if lines.len() > 5 {
            let _ = write!(text, "\n    ... {} in all", lines.len());
        }
    }
    assert!(
        failed.is_empty(),
        "{} of {} kinds of change are lost, {when}, on {kind} (expected / found):{text}",
        failed.len(),
        changes::all(kind).len()
    );
}

fn everything(_: &Change) -> bool {
    true
}

/// The root directory has attributes too.
fn change_the_root(system: &System) {
    let root = system.root();
    fs::set_permissions(root, fs::Permissions::from_mode(0o1770)).expect("chmod");
    chown(root, Some(12), Some(34)).expect("chown");
    sys::set_xattr(root, c"user.root", b"of the tree").expect("an xattr");
    let dir = File::open(root).expect("the root");
    sys::change_flags(&dir, sys::NODUMP_FL, 0).expect("chattr");
}

fn while_it_runs(kind: Kind) {
    let system = setup(kind).start();
    let all = changes::all(kind);
    changes::prepare(system.root(), &all);
    system.sync(&[]);
    changes::apply(system.root(), &all);
    change_the_root(&system);
    system.sync(&["--to", "media"]);
    report(&system, "made while hsmd runs, without a sweep", |change| {
        change.raises_event
    });
    system.sync_all();
    report(&system, "made while hsmd runs", everything);
}

fn before_the_first_start(kind: Kind) {
    let mut system = setup(kind).build();
    let all = changes::all(kind);
    changes::prepare(system.root(), &all);
    changes::apply(system.root(), &all);
    change_the_root(&system);
    system.start();
    system.sync_all();
    report(&system, "made before the first start", everything);
}

fn while_it_is_stopped(kind: Kind) {
    let mut system = setup(kind).start();
    let all = changes::all(kind);
    changes::prepare(system.root(), &all);
    system.sync(&["--sweep"]);
    system.stop();
    changes::apply(system.root(), &all);
    change_the_root(&system);
    system.start();
    system.sync_all();
    report(&system, "made while hsmd was stopped", everything);
}

/// Nothing is awaited: the daemon dies somewhere in its work on what was prepared.
fn while_it_is_killed(kind: Kind) {
    let mut system = setup(kind).start();
    let all = changes::all(kind);
    changes::prepare(system.root(), &all);
    system.kill9();
    changes::apply(system.root(), &all);
    change_the_root(&system);
    system.start();
    system.sync_all();
    report(&system, "made while hsmd was killed", everything);
}

/// The daemon gets all events at once, when everything has happened.
fn while_it_is_starved(kind: Kind) {
    let mut system = setup(kind).start();
    let all = changes::all(kind);
    changes::prepare(system.root(), &all);
    system.sync(&[]);
    system.pause();
    changes::apply(system.root(), &all);
    change_the_root(&system);
    system.resume();
    system.sync_all();
    report(&system, "made while hsmd was starved", everything);
}

macro_rules! on_every_filesystem {
    ($($when:ident)*) => {
        $(mod $when {
            use super::Kind;

            #[test]
            fn ext4() {
                super::$when(Kind::Ext4);
            }

            #[test]
            fn xfs() {
                super::$when(Kind::Xfs);
            }

            #[test]
            fn btrfs() {
                super::$when(Kind::Btrfs);
            }
        })*
    };
}

on_every_filesystem! {
    while_it_runs
    before_the_first_start
    while_it_is_stopped
    while_it_is_killed
    while_it_is_starved
}

/// What one filesystem has comes back on another kind, as far as that can hold it.
#[test]
fn from_ext4_to_the_others() {
    let mut system = setup(Kind::Ext4).build();
    let common: Vec<Change> = changes::all(Kind::Xfs)
        .into_iter()
        .filter(|change| {
            changes::all(Kind::Ext4)
                .iter()
                .any(|c| c.name == change.name)
        })
        .filter(|change| !change.name.starts_with("flag") && change.name != "symlink_longest")
        .collect();
    changes::prepare(system.root(), &common);
    changes::apply(system.root(), &common);
    system.start();
    system.sync_all();
    let expected = Tree::read(system.root());
    for kind in [Kind::Xfs, Kind::Btrfs] {
        let fresh = hsm_tests::loopfs::LoopFs::new(kind, 1 << 30);
        let _ = system.replay_from(&system.volumes(0), fresh.root(), &[]);
        hsm_tests::compare::assert_equal(
            &expected,
            &Tree::read(fresh.root()),
            &format!("from ext4 to {kind}"),
        );
    }
}
