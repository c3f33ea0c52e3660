//! The power fails at any moment, also during recovery, again and again.

use tierfs::disk::sim::{Fault, Rng, SimDisk};
use tierfs::spool::Spool;

use crate::support::*;

#[test]
fn power_fails_at_random_moments() {
    for_seeds(150, |seed| {
        let mut rng = Rng(seed);
        let segment_bytes = [3000, 20_000, 1 << 20][rng.below(3) as usize];
        let mut disk = SimDisk::new();
        let mut ledger = Ledger::default();
        Spool::create(&disk, LOG, None).unwrap();
        for epoch in 1..5 {
            let (spool, _) = open_spool(&disk, segment_bytes, &ledger.floor())
                .unwrap_or_else(|error| panic!("epoch {epoch}: {error}"));
            compare(&read_all(&spool), &mut ledger);
            let mut driver = Driver::new(&spool, epoch);
            for _ in 0..rng.below(30) {
                driver.step(&mut ledger, &mut rng).unwrap();
            }
            drop((driver, spool));
            disk = if rng.below(4) == 0 {
                disk.restart()
            } else {
                disk.power_loss(rng.number())
            };
        }
        recover_and_go_on(&disk, &mut ledger, segment_bytes, seed);
    });
}

/// Recovery itself is killed at each of its operations, with and without the power.
#[test]
fn recovery_is_killed_at_each_of_its_steps() {
    for_seeds(12, |seed| {
        let crashed = |ledger: &mut Ledger| {
            let mut rng = Rng(seed);
            let disk = SimDisk::new();
            let spool = new_spool(&disk, 5000);
            let mut driver = Driver::new(&spool, 1);
            for _ in 0..20 {
                driver.step(ledger, &mut rng).unwrap();
            }
            disk.power_loss(seed)
        };
        let operations = {
            let mut ledger = Ledger::default();
            let disk = crashed(&mut ledger);
            open_spool(&disk, 5000, &ledger.floor()).unwrap();
            disk.operations()
        };
        for at in 0..operations {
            for fault in [Fault::Kill, Fault::KillAfter, Fault::Fail(libc::EIO)] {
                for power in [false, true] {
                    let mut ledger = Ledger::default();
                    let disk = crashed(&mut ledger);
                    disk.fault_at(at, fault);
                    let first = open_spool(&disk, 5000, &ledger.floor());
                    let failed = first.is_err();
                    drop(first);
                    assert!(
                        failed || fault == Fault::KillAfter,
                        "{fault:?} at {at} was not seen"
                    );
                    let disk = if power {
                        disk.power_loss(at)
                    } else {
                        disk.restart()
                    };
                    recover_and_go_on(&disk, &mut ledger, 5000, seed);
                }
            }
        }
    });
}
