//! P6, no single database: the catalog is made again from spool and volumes, and is equal.

use std::fs;
use std::path::Path;
use std::process::Command;

use hsm_tests::changes::{self, noise};
use hsm_tests::compare::{Tree, assert_equal, ignore_holes};
use hsm_tests::loopfs::{Kind, ROOMY_BYTES};
use hsm_tests::report::say;
use hsm_tests::system::{Setup, System};
use hsm_tests::workload::{Workload, seed};

fn digest(system: &System) -> String {
    let answer = system
        .tierctl(&["catalog", "digest", "--json"])
        .done()
        .json();
    let digest = answer["digest"].as_str().expect("a digest").to_owned();
    assert_eq!(digest.len(), 64);
    digest
}

fn grown(kind: Kind) -> System {
    ignore_holes();
    let system = Setup::new(kind)
        .bytes(ROOMY_BYTES)
        .with("segment_bytes", "\"1MiB\"")
        .start();
    let all = changes::all(kind);
    changes::prepare(system.root(), &all);
    system.sync(&[]);
    changes::apply(system.root(), &all);
    Workload::start(system.root(), seed(), 3, 1000).finish();
    system
}

/// Removes the catalog and what SQLite puts beside it.
fn remove_catalog(catalog: &Path) {
    let dir = catalog.parent().expect("a directory");
    let name = catalog
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        if entry.file_name().to_string_lossy().starts_with(&name) {
            fs::remove_file(entry.path()).expect("to remove it");
        }
    }
}

fn rebuilt_catalog_is_equal(kind: Kind) {
    let mut system = grown(kind);
    system.sync_all();
    let before = digest(&system);
    let refused = system.tierctl(&["catalog", "rebuild"]);
    let _ = refused.refuses(&["hsmd"]);
    system.stop();

    remove_catalog(&system.catalog());
    say(format_args!(
        "{}",
        system.tierctl(&["catalog", "rebuild"]).done()
    ));
    assert!(system.catalog().exists());
    system.start();
    assert_eq!(before, digest(&system), "rebuilt from spool and volumes");
    system.check("after a rebuild");

    // Without having been asked to: a start with no catalog makes it too, or says how.
    let before = digest(&system);
    system.stop();
    remove_catalog(&system.catalog());
    match system.try_start() {
        Ok(()) => {}
        Err(ran) => {
            let _ = ran.refuses(&["catalog rebuild"]);
            let _ = system.tierctl(&["catalog", "rebuild"]).done();
            system.start();
        }
    }
    assert_eq!(before, digest(&system), "made at a start");
    fs::write(system.at("afterwards"), "x").expect("a file");
    system.check("after a start without a catalog");
}

#[test]
fn rebuilt_catalog_is_equal_on_ext4() {
    rebuilt_catalog_is_equal(Kind::Ext4);
}

#[test]
fn rebuilt_catalog_is_equal_on_btrfs() {
    rebuilt_catalog_is_equal(Kind::Btrfs);
}

/// A catalog of an earlier moment (a snapshot brought back, a lost tail) is folded on.
#[test]
fn an_older_catalog_is_folded_on() {
    ignore_holes();
    let mut system = Setup::new(Kind::Xfs)
        .with("segment_bytes", "\"1MiB\"")
        .start();
    Workload::start(system.root(), seed(), 2, 500).finish();
    system.sync_all();
    system.stop();
    let state = system.catalog().parent().expect("a directory").to_owned();
    let kept = system.home().at("kept");
    let copied = Command::new("cp")
        .args(["-a", "-T"])
        .args([&state, &kept])
        .status();
    assert!(copied.expect("cp").success());
    system.start();
    Workload::start(system.root(), seed(), 2, 500).finish();
    system.sync_all();
    let after = digest(&system);
    system.stop();
    fs::remove_dir_all(&state).expect("to remove the catalog");
    fs::rename(kept, state).expect("to bring the older one back");
    system.start();
    assert_eq!(after, digest(&system));
    system.check("with an older catalog");
}

/// Damage in the catalog is never taken for the log's word.
#[test]
fn a_damaged_catalog_is_noticed_or_rebuilt() {
    let mut system = Setup::new(Kind::Ext4).start();
    Workload::start(system.root(), seed(), 2, 500).finish();
    system.sync_all();
    let before = digest(&system);
    system.stop();
    let tree = Tree::read(system.root());
    let len = fs::metadata(system.catalog()).expect("the catalog").len();
    let mut bytes = fs::read(system.catalog()).expect("the catalog");
    let from = usize::try_from(len / 2).expect("an index");
    let end = (from + 5000).min(bytes.len());
    bytes[from..end].fill(0xa5);
    fs::write(system.catalog(), bytes).expect("to damage it");
    if let Err(ran) = system.try_start() {
        let _ = ran.refuses(&["catalog rebuild"]);
    } else {
        let asked = system.tierctl(&["catalog", "digest", "--json"]);
        if asked.code == 0 && asked.stdout.contains(&before) {
            say(format_args!("the damage hit nothing that counts"));
        } else {
            // Running on with a damaged catalog is only right where the daemon says so.
            let said = format!("{}{}", asked.text(), system.status()["notices"]);
            assert!(
                said.contains("catalog rebuild"),
                "no word of the damage: {said}"
            );
        }
        system.kill9();
    }
    remove_catalog(&system.catalog());
    let _ = system.tierctl(&["catalog", "rebuild"]).done();
    system.start();
    assert_eq!(before, digest(&system));
    system.sync_all();
    let fresh = system.replay_to_fresh(&[]);
    assert_equal(
        &tree,
        &Tree::read(fresh.root()),
        "after damage to the catalog",
    );
}

/// The disk of a volume is not mounted: where it belongs is still known, and its mount point is left
/// alone.
#[test]
fn a_rebuilt_catalog_knows_where_volumes_belong() {
    let mut system = Setup::new(Kind::Ext4).pools(2).start();
    fs::write(system.at("before"), "x").expect("a file");
    system.sync_all();
    system.stop();
    let volume = system.volumes(1)[0].clone();
    let away = volume.with_extension("away");
    fs::rename(&volume, &away).expect("to take it away");
    fs::create_dir(&volume).expect("the mount point");
    remove_catalog(&system.catalog());
    let _ = system.tierctl(&["catalog", "rebuild"]).done();
    system.start();
    for n in 0..12 {
        fs::write(system.at(format!("after{n}")), noise(n, 1 << 20)).expect("a file");
    }
    let lsn = system.sync(&[]);
    let status = system.wait_for("pool 0 has it, or pool 1 waits", |status| {
        status["pools"][0]["copied_lsn"].as_u64() >= Some(lsn)
            || status["pools"][1]["waiting"].is_object()
    });
    assert!(
        status["pools"][1].to_string().contains("belongs there"),
        "{status:#}"
    );
    let left = fs::read_dir(&volume).expect("the mount point").count();
    assert_eq!(left, 0, "the mount point of a missing disk was used");

    fs::remove_dir(&volume).expect("an empty directory");
    fs::rename(&away, &volume).expect("to bring it back");
    system.sync_all();
    let fresh = system.fresh();
    let _ = system
        .replay_from(&system.volumes(1), fresh.root(), &[])
        .done();
    assert_equal(
        &Tree::read(system.root()),
        &Tree::read(fresh.root()),
        "from the volume that came back",
    );
}
