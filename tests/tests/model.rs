//! Random operations by several threads while the daemon runs; at the end everything comes back.
//!
//! `HSM_SEED` brings a run back, `HSM_ROUNDS` makes more of them, each with a seed of its own.

use hsm_tests::loopfs::{Kind, ROOMY_BYTES};
use hsm_tests::report::say;
use hsm_tests::system::Setup;
use hsm_tests::workload::{Workload, rounds, seed};

fn random_operations(kind: Kind) {
    let first = seed();
    for round in 0..u64::from(rounds(1)) {
        let seed = first + round;
        let system = Setup::new(kind).bytes(ROOMY_BYTES).start();
        let counts = Workload::start(system.root(), seed, 4, 2500).finish();
        say(format_args!("{counts:?}"));
        system.check(&format!("{kind}, HSM_SEED={seed}"));
        // Once more, on a tree that the log knows, with pauses that let the daemon catch up.
        for part in 0..3 {
            Workload::start(system.root(), seed.wrapping_mul(31) + part, 3, 300).finish();
            system.sync(&[]);
        }
        system.check(&format!("{kind}, second part, HSM_SEED={seed}"));
    }
}

#[test]
fn random_operations_on_ext4() {
    hsm_tests::compare::ignore_holes();
    random_operations(Kind::Ext4);
}

#[test]
fn random_operations_on_xfs() {
    hsm_tests::compare::ignore_holes();
    random_operations(Kind::Xfs);
}

#[test]
fn random_operations_on_btrfs() {
    hsm_tests::compare::ignore_holes();
    random_operations(Kind::Btrfs);
}
