//! Pools and volumes: each pool gets the whole log; what is absent or full is waited for and
//! reported, and the rest goes on.

use std::fs;
use std::process::Command;

use hsm_tests::changes::noise;
use hsm_tests::compare::{Tree, assert_equal};
use hsm_tests::loopfs::{Kind, LoopFs, must};
use hsm_tests::system::{Setup, System};

fn write_some(system: &System, from: u64, count: u64) {
    for n in from..from + count {
        fs::write(system.at(format!("file{n}")), noise(n, 1 << 20)).expect("a file");
    }
}

fn replays_from(system: &System, pool: usize) {
    let fresh = system.fresh();
    let _ = system
        .replay_from(&system.volumes(pool), fresh.root(), &[])
        .done();
    assert_equal(
        &Tree::read(system.root()),
        &Tree::read(fresh.root()),
        &format!("from pool {pool} alone"),
    );
}

#[test]
fn each_pool_alone_has_everything() {
    let system = Setup::new(Kind::Ext4).pools(3).start();
    write_some(&system, 0, 10);
    system.sync_all();
    for pool in 0..3 {
        replays_from(&system, pool);
    }
    let listed = system.tierctl(&["volume", "list", "--json"]).done();
    for volume in system.all_volumes() {
        assert!(
            listed.stdout.contains(volume.to_str().expect("ASCII")),
            "{listed}"
        );
        let path = volume.to_str().expect("ASCII");
        let _ = system.tierctl(&["volume", "verify", path]).done();
    }
}

#[test]
fn an_absent_volume_is_waited_for_and_the_other_pool_goes_on() {
    let mut system = Setup::new(Kind::Ext4).pools(2).build();
    let volume = system.volumes(1)[0].clone();
    let away = volume.with_extension("away");
    fs::rename(&volume, &away).expect("to take it away");
    system.start();
    write_some(&system, 0, 12);
    let lsn = system.sync(&[]);
    let status = system.wait_for("pool 0 has it, pool 1 waits", |status| {
        status["pools"][0]["copied_lsn"].as_u64() >= Some(lsn)
            || status["pools"][1]["waiting"].is_object()
                && status["pools"][0]["copied_lsn"].as_u64().is_some()
    });
    let path = volume.to_str().expect("ASCII");
    assert!(status["pools"][1].to_string().contains(path), "{status:#}");
    assert!(system.tierctl(&["status"]).done().stdout.contains(path));

    fs::rename(&away, &volume).expect("to bring it back");
    system.sync_all();
    replays_from(&system, 0);
    replays_from(&system, 1);
}

/// A disk that was unplugged and plugged in again, while the daemon runs.
#[test]
fn a_volume_goes_and_comes_back() {
    let system = Setup::new(Kind::Xfs).pools(2).start();
    write_some(&system, 0, 5);
    system.sync_all();
    let volume = system.volumes(0)[0].clone();
    let away = volume.with_extension("away");
    fs::rename(&volume, &away).expect("to take it away");
    write_some(&system, 5, 10);
    system.sync(&[]);
    fs::rename(&away, &volume).expect("to bring it back");
    write_some(&system, 15, 3);
    system.sync_all();
    replays_from(&system, 0);
    replays_from(&system, 1);
}

#[test]
fn a_full_volume_is_followed_by_the_next() {
    let (small, large) = (LoopFs::new(Kind::Ext4, 32 << 20), LoopFs::small(Kind::Ext4));
    must(Command::new("rm").arg("-rf").arg(small.at("lost+found")));
    must(Command::new("rm").arg("-rf").arg(large.at("lost+found")));
    let mut system = Setup::new(Kind::Ext4).build();
    let (first, second) = (small.at("vol"), large.at("vol"));
    fs::create_dir(&first).expect("a directory");
    fs::create_dir(&second).expect("a directory");
    system.set_volumes(0, vec![first.clone()]);
    system.start();
    write_some(&system, 0, 50);
    let status = system.wait_for("the volume is full", |status| {
        status["pools"][0].to_string().contains("full")
    });
    assert!(
        status["notices"].to_string().contains("pool0"),
        "{status:#}"
    );
    system.stop();
    system.set_volumes(0, vec![first, second]);
    system.start();
    system.sync_all();
    replays_from(&system, 0);
}

/// A pool that comes later gets the whole log, from its start.
#[test]
fn a_new_pool_gets_what_was_before() {
    let mut system = Setup::new(Kind::Ext4).start();
    write_some(&system, 0, 10);
    system.sync_all();
    system.stop();
    let late = system.home().dir("late");
    system.set_volumes(1, vec![late]);
    system.start();
    write_some(&system, 10, 3);
    system.sync_all();
    replays_from(&system, 1);
}
