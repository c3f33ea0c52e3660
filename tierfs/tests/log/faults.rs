//! A fault at every operation of the disk in turn: nothing acknowledged is lost, nothing half appears.

use tierfs::disk::sim::{Fault, Rng, SimDisk};
use tierfs::spool::Spool;

use crate::support::*;

const SEGMENT: u64 = 20_000;

/// A run that seals, syncs late, and ends in the middle. Stops at the first error.
fn run(disk: &SimDisk, seed: u64) -> Ledger {
    let mut ledger = Ledger::default();
    if Spool::create(disk, LOG, None).is_err() {
        return ledger;
    }
    let Ok((spool, _)) = open_spool(disk, SEGMENT, &ledger.floor()) else {
        return ledger;
    };
    let mut rng = Rng(seed);
    let mut driver = Driver::new(&spool, seed);
    for _ in 0..24 {
        if driver.step(&mut ledger, &mut rng).is_err() {
            break;
        }
    }
    let _ = driver.sync(&mut ledger);
    ledger
}

fn recover(disk: &SimDisk, ledger: &mut Ledger, seed: u64) {
    if Spool::is_empty(disk).unwrap() {
        // The fault came before there was a spool.
        assert_eq!(ledger.durable, (0, 0));
        Spool::create(disk, LOG, None).unwrap();
    }
    recover_and_go_on(disk, ledger, SEGMENT, seed);
}

fn at_every_operation(fault: Fault, after: impl Fn(&SimDisk, u64) -> SimDisk) {
    for seed in 0..2 {
        let operations = {
            let disk = SimDisk::new();
            run(&disk, seed);
            disk.operations()
        };
        for at in 0..operations {
            let disk = SimDisk::new();
            disk.fault_at(at, fault);
            let mut ledger = run(&disk, seed);
            let what = disk.log().get(usize::try_from(at).unwrap()).cloned();
            let crashed = after(&disk, seed * 1000 + at);
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                recover(&crashed, &mut ledger, at);
            }));
            if let Err(panic) = result {
                eprintln!("seed {seed}, {fault:?} at operation {at}: {what:?}");
                std::panic::resume_unwind(panic);
            }
        }
    }
}

#[test]
fn an_operation_fails_and_the_process_ends() {
    at_every_operation(Fault::Fail(libc::EIO), |disk, _| disk.restart());
}

#[test]
fn an_operation_fails_and_the_power_fails() {
    at_every_operation(Fault::Fail(libc::EIO), SimDisk::power_loss);
}

#[test]
fn a_write_stops_short() {
    at_every_operation(Fault::Short(libc::EIO), |disk, _| disk.restart());
}

#[test]
fn the_disk_is_full_at_one_operation() {
    at_every_operation(Fault::Short(libc::ENOSPC), |disk, _| disk.restart());
    at_every_operation(Fault::Fail(libc::ENOSPC), SimDisk::power_loss);
}

#[test]
fn a_kill_in_the_middle_of_an_operation() {
    at_every_operation(Fault::Kill, |disk, _| disk.restart());
    at_every_operation(Fault::Kill, SimDisk::power_loss);
}

#[test]
fn a_kill_after_an_operation() {
    at_every_operation(Fault::KillAfter, |disk, _| disk.restart());
    at_every_operation(Fault::KillAfter, SimDisk::power_loss);
}
