//! A replay that was killed goes on where it was, and ends with the same tree.

use std::thread;
use std::time::Duration;

use hsm_tests::changes::{self, noise};
use hsm_tests::compare::{Tree, assert_equal, ignore_holes};
use hsm_tests::loopfs::{Kind, ROOMY_BYTES};
use hsm_tests::program::Running;
use hsm_tests::report::say;
use hsm_tests::system::{Setup, System};
use hsm_tests::workload::{Workload, rounds, seed};

fn grown(kind: Kind) -> System {
    ignore_holes();
    let mut system = Setup::new(kind).bytes(ROOMY_BYTES).build();
    let all = changes::all(kind);
    changes::prepare(system.root(), &all);
    changes::apply(system.root(), &all);
    Workload::start(system.root(), seed(), 2, 1500).finish();
    for n in 0..80u64 {
        let bytes = noise(n, 1_000_000);
        std::fs::write(system.at(format!("large{n}")), bytes).expect("a file");
    }
    system.start();
    system.sync_all();
    system.stop();
    system
}

fn killed_and_run_again(kind: Kind) {
    let system = grown(kind);
    let expected = Tree::read(system.root());
    for round in 0..rounds(2) {
        let fresh = system.fresh();
        let mut kills = 0;
        for wait in [5, 30, 70, 150, 300, 600, 1000] {
            let command = system.replay_command(&system.volumes(0), fresh.root(), &[]);
            let mut replay = Running::start(command, system.home().path(), "replay");
            thread::sleep(Duration::from_millis(wait + u64::from(round) * 13));
            let alive = replay.is_alive();
            replay.kill();
            if !alive {
                // It had come to its end; what is complete is no longer an interrupted replay.
                break;
            }
            kills += 1;
        }
        say(format_args!("killed {kills} times"));
        let last = system.replay_from(&system.volumes(0), fresh.root(), &[]);
        assert!(
            last.code == 0 || kills < 7,
            "killed {kills} times, then: {last}"
        );
        let context = format!("killed {kills} times, then: {last}");
        assert_equal(&expected, &Tree::read(fresh.root()), &context);
        // Once more on what is complete changes nothing.
        let _ = system.replay_from(&system.volumes(0), fresh.root(), &[]);
        assert_equal(
            &expected,
            &Tree::read(fresh.root()),
            "run again on a complete tree",
        );
        let verify = system.replay_from(&system.volumes(0), fresh.root(), &["--verify"]);
        assert_eq!(verify.code, 0, "{verify}");
    }
}

#[test]
fn killed_and_run_again_on_ext4() {
    killed_and_run_again(Kind::Ext4);
}

#[test]
fn killed_and_run_again_on_xfs() {
    killed_and_run_again(Kind::Xfs);
}

#[test]
fn killed_and_run_again_on_btrfs() {
    killed_and_run_again(Kind::Btrfs);
}

/// `--verify` finds what differs from the log, names it, and says so by its status.
#[test]
fn verify_names_what_differs() {
    let system = Setup::new(Kind::Ext4).start();
    for n in 0..5u64 {
        std::fs::write(system.at(format!("file{n}")), noise(n, 100_000)).expect("a file");
    }
    system.sync_all();
    let fresh = system.replay_to_fresh(&[]);
    let same = system.replay_from(&system.volumes(0), fresh.root(), &["--verify"]);
    assert_eq!(same.code, 0, "{same}");
    std::fs::write(fresh.at("file2"), noise(77, 100_000)).expect("a file");
    std::fs::remove_file(fresh.at("file3")).expect("to remove a file");
    std::fs::write(fresh.at("foreign"), "x").expect("a file");
    let differs = system.replay_from(&system.volumes(0), fresh.root(), &["--verify"]);
    assert!(differs.code == 1 || differs.code == 3, "{differs}");
    for name in ["file2", "file3", "foreign"] {
        assert!(differs.text().contains(name), "{name}: {differs}");
    }
    assert!(!differs.text().contains("file1"), "{differs}");
}

/// `--list` says what a replay needs, and needs no target.
#[test]
fn list_says_what_is_needed() {
    let system = Setup::new(Kind::Ext4).pools(2).start();
    std::fs::write(system.at("file"), noise(1, 3_000_000)).expect("a file");
    system.sync_all();
    let mut command = std::process::Command::new(hsm_tests::program::locate("replay"));
    for volume in system.all_volumes() {
        command.arg("--from").arg(volume);
    }
    command.args(["--list", "--json"]);
    let listed = hsm_tests::program::run(command).done();
    let _ = listed.json();
}
