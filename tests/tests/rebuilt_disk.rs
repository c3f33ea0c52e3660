//! hsmd, pointed at a disk that replay has made, goes on with the same log.

use std::fs;

use hsm_tests::changes::{self, noise};
use hsm_tests::compare::{Tree, assert_equal, ignore_holes};
use hsm_tests::loopfs::{Kind, LoopFs, ROOMY_BYTES, must};
use hsm_tests::system::{Setup, System};
use hsm_tests::workload::{Workload, seed};

/// A tree with content enough to notice if it were logged again.
fn grown(kind: Kind) -> System {
    ignore_holes();
    let system = Setup::new(kind).bytes(ROOMY_BYTES).start();
    let all = changes::all(kind);
    changes::prepare(system.root(), &all);
    changes::apply(system.root(), &all);
    for n in 0..20u64 {
        fs::write(system.at(format!("large{n}")), noise(n, 1_000_000)).expect("a file");
    }
    Workload::start(system.root(), seed(), 2, 600).finish();
    changes::let_go();
    system.sync_all();
    system
}

fn number(system: &System, key: &str) -> u64 {
    system.status()[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key}: {:#}", system.status()))
}

/// After `system` was pointed at the rebuilt disk: the same log goes on, and only changes are added.
fn goes_on(mut system: System, log_id: &str, lsn: u64, tree: &Tree, context: &str) {
    system.start();
    system.sync_all();
    assert_eq!(system.status()["log_id"], log_id, "{context}: another log");
    let logged = number(&system, "logged_bytes");
    assert!(
        logged < 2_000_000,
        "{context}: {logged} bytes of content are logged again"
    );
    assert_equal(
        tree,
        &Tree::read(system.root()),
        &format!("{context}: the disk itself"),
    );
    system.check(&format!("{context}: nothing changed yet"));

    Workload::start(system.root(), seed(), 2, 400).finish();
    fs::write(system.at("afterwards"), "new").expect("a file");
    system.sync_all();
    assert!(
        number(&system, "durable_lsn") > lsn,
        "{context}: LSNs go on"
    );
    system.check(&format!("{context}: after further changes"));
    let fresh = system.replay_to_fresh(&["--until", &lsn.to_string()]);
    assert_equal(
        tree,
        &Tree::read(fresh.root()),
        &format!("{context}: as of LSN {lsn}"),
    );
}

fn log_id(system: &System) -> String {
    system.status()["log_id"]
        .as_str()
        .expect("log_id")
        .to_owned()
}

/// The disk died, the machine is the same: spool and catalog are there.
fn new_disk(kind: Kind) {
    let mut system = grown(kind);
    let (id, lsn) = (log_id(&system), number(&system, "durable_lsn"));
    let tree = Tree::read(system.root());
    system.stop();
    let fresh = system.replay_to_fresh(&[]);
    system.move_to(fresh);
    goes_on(system, &id, lsn, &tree, &format!("a new {kind} disk"));
}

#[test]
fn new_disk_with_ext4() {
    new_disk(Kind::Ext4);
}

#[test]
fn new_disk_with_xfs() {
    new_disk(Kind::Xfs);
}

#[test]
fn new_disk_with_btrfs() {
    new_disk(Kind::Btrfs);
}

/// The machine is gone: all that is left is the volume, which is carried to another one.
#[test]
fn new_machine() {
    let old = grown(Kind::Ext4);
    let (id, lsn) = (log_id(&old), number(&old, "durable_lsn"));
    let tree = Tree::read(old.root());
    let mut new = Setup::new(Kind::Ext4).bytes(ROOMY_BYTES).build();
    let _ = old.replay_from(&old.volumes(0), new.root(), &[]).done();
    let volume = new.home().at("pool0/carried");
    // What was carried is moved, not copied: the old daemon must not write on it any more.
    let mut old = old;
    old.stop();
    must(
        std::process::Command::new("cp")
            .args(["-a", "-T"])
            .args([&old.volumes(0)[0], &volume]),
    );
    new.set_volumes(0, vec![volume]);
    // Nothing is begun anew by mistake: the catalog is asked for first.
    let refused = new
        .try_start()
        .expect_err("a start without spool and catalog");
    let _ = refused.refuses(&["catalog rebuild", &id]);
    let _ = new.tierctl(&["catalog", "rebuild"]).done();
    goes_on(new, &id, lsn, &tree, "a new machine");
}

/// Replay to an earlier moment, and go on from there: what came later stays in the log.
#[test]
fn back_to_an_earlier_moment() {
    let mut system = grown(Kind::Ext4);
    let id = log_id(&system);
    let early_lsn = number(&system, "durable_lsn");
    let early = Tree::read(system.root());
    fs::write(system.at("a mistake"), "x").expect("a file");
    fs::remove_file(system.at("large3")).expect("to remove a file");
    Workload::start(system.root(), seed(), 2, 300).finish();
    system.sync_all();
    let late_lsn = number(&system, "durable_lsn");
    let late = Tree::read(system.root());
    system.stop();

    let fresh = LoopFs::new(Kind::Ext4, ROOMY_BYTES);
    let until = early_lsn.to_string();
    let _ = system
        .replay_from(&system.volumes(0), fresh.root(), &["--until", &until])
        .done();
    system.move_to(fresh);
    system.start();
    system.sync_all();
    assert_eq!(log_id(&system), id);
    assert_equal(
        &early,
        &Tree::read(system.root()),
        "the disk is left as it was replayed",
    );
    system.check("back to an earlier moment");
    let fresh = system.replay_to_fresh(&["--until", &late_lsn.to_string()]);
    assert_equal(
        &late,
        &Tree::read(fresh.root()),
        "what came later is still in the log",
    );
}
