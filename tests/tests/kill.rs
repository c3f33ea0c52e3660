//! SIGKILL of the daemon at random moments of a random workload: after a restart everything that was
//! durable is there as it was, and everything that happened meanwhile is found.
//!
//! `HSM_ROUNDS=100` is what the full suite runs.

use std::thread;
use std::time::Duration;

use hsm_tests::compare::{Tree, assert_equal};
use hsm_tests::loopfs::{Kind, ROOMY_BYTES};
use hsm_tests::report::say;
use hsm_tests::system::{Setup, System};
use hsm_tests::workload::{Workload, rounds, seed};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn pause(random: &mut StdRng, at_most_ms: u64) {
    thread::sleep(Duration::from_millis(random.random_range(0..=at_most_ms)));
}

/// The tree at a durable LSN, to be asked for again after the daemon was killed.
fn durable_moment(system: &System) -> (u64, Tree) {
    (system.sync(&["--sweep"]), Tree::read(system.root()))
}

fn round(system: &mut System, random: &mut StdRng, context: &str) {
    let (lsn, tree) = durable_moment(system);
    let workload = Workload::start(system.root(), random.random(), 3, 1_000_000);
    pause(random, 1200);
    system.kill9();
    // Killed once more while it starts, recovers, examines; the workload goes on.
    for _ in 0..random.random_range(0..3) {
        pause(random, 200);
        system.start_unready();
        pause(random, 600);
        system.kill9();
    }
    if random.random_bool(0.5) {
        system.start();
        pause(random, 500);
        system.kill9();
    }
    let counts = workload.stop();
    say(format_args!(
        "{context}: {} operations",
        counts.values().sum::<u64>()
    ));
    system.start();
    system.check(context);
    let fresh = system.replay_to_fresh(&["--until", &lsn.to_string()]);
    assert_equal(
        &tree,
        &Tree::read(fresh.root()),
        &format!("{context}: durable LSN {lsn}, replayed after the kill"),
    );
}

fn killed_at_random_moments(kind: Kind) {
    hsm_tests::compare::ignore_holes();
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let mut system = Setup::new(kind)
        .bytes(ROOMY_BYTES)
        .with("segment_bytes", "\"1MiB\"")
        .start();
    for number in 0..rounds(3) {
        let context = format!("{kind}, round {number}, HSM_SEED={seed}");
        round(&mut system, &mut random, &context);
        hsm_tests::sys::give_memory_back();
    }
}

#[test]
fn killed_at_random_moments_on_ext4() {
    killed_at_random_moments(Kind::Ext4);
}

#[test]
fn killed_at_random_moments_on_xfs() {
    killed_at_random_moments(Kind::Xfs);
}

#[test]
fn killed_at_random_moments_on_btrfs() {
    killed_at_random_moments(Kind::Btrfs);
}
