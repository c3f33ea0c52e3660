//! `replay --stubs` of what the daemon logged: the names are back at once, and the daemon fetches the rest.

use std::fs;
use std::path::Path;

use hsm_tests::changes::{self, noise};
use hsm_tests::compare::{Tree, assert_equal, ignore_holes};
use hsm_tests::loopfs::{Kind, ROOMY_BYTES};
use hsm_tests::system::{Setup, System};
use hsm_tests::workload::{Workload, seed};

/// Everything that hsmd logs, versions of files and all, and a stopped daemon.
fn grown(kind: Kind) -> System {
    ignore_holes();
    let mut system = Setup::new(kind).bytes(ROOMY_BYTES).build();
    let all = changes::all(kind);
    changes::prepare(system.root(), &all);
    for n in 0..10u64 {
        fs::write(system.at(format!("large{n}")), noise(n, 1_500_000)).expect("a file");
    }
    system.start();
    changes::apply(system.root(), &all);
    Workload::start(system.root(), seed(), 2, 600).finish();
    changes::let_go();
    system.sync_all();
    system.stop();
    system
}

fn stubs_in(system: &System, root: &Path) -> u64 {
    let verified = system.replay_from(&system.volumes(0), root, &["--verify", "--json"]);
    let verified = verified.done().json();
    verified["released"].as_u64().expect("a count")
}

fn names_come_back_at_once(kind: Kind) {
    let mut system = grown(kind);
    let expected = Tree::read(system.root());
    let fresh = system.fresh();
    let made = system.replay_from(&system.volumes(0), fresh.root(), &["--stubs", "--json"]);
    let made = made.done().json();
    assert!(made["stubs"].as_u64() > Some(10), "{made}");
    assert_eq!(made["frames"], 0, "no content is fetched: {made}");
    let found = Tree::read(fresh.root()).without_content();
    assert_equal(
        &expected.clone().without_content(),
        &found,
        &format!("{kind}: names"),
    );
    assert!(stubs_in(&system, fresh.root()) > 10);

    // The daemon takes it over, and gives everybody the bytes.
    system.move_to(fresh);
    system.hand_over();
    system.start();
    assert_equal(
        &expected,
        &Tree::read(system.root()),
        &format!("{kind}: read through the daemon"),
    );
    system.sync_all();
    let logged = system.status()["logged_bytes"].as_u64();
    assert!(
        logged < Some(2_000_000),
        "{kind}: {logged:?} bytes of content are logged again"
    );
    system.check(&format!("{kind}: the log goes on"));
}

#[test]
fn names_come_back_at_once_on_ext4() {
    names_come_back_at_once(Kind::Ext4);
}

#[test]
fn names_come_back_at_once_on_xfs() {
    names_come_back_at_once(Kind::Xfs);
}

#[test]
fn names_come_back_at_once_on_btrfs() {
    names_come_back_at_once(Kind::Btrfs);
}
