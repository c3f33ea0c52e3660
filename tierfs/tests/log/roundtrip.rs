//! What is written is read back, for every size of segment; the order of operations is the promised one.

use tierfs::disk::RealDisk;
use tierfs::disk::sim::{Rng, SimDisk};
use tierfs::spool::{Floor, Spool, SpoolError};

use crate::support::*;

#[test]
fn what_is_written_is_read_back() {
    for_seeds(40, |seed| {
        let mut rng = Rng(seed);
        let segment_bytes = [1, 3000, 50_000, 1 << 20, 64 << 20][rng.below(5) as usize];
        let disk = SimDisk::new();
        let mut ledger = Ledger::default();
        for epoch in 1..4 {
            if epoch == 1 {
                Spool::create(&disk, LOG, None).unwrap();
            }
            let (spool, _) = open_spool(&disk, segment_bytes, &ledger.floor()).unwrap();
            compare(&read_all(&spool), &mut ledger);
            let mut driver = Driver::new(&spool, epoch);
            for _ in 0..40 {
                driver.step(&mut ledger, &mut rng).unwrap();
            }
            driver.sync(&mut ledger).unwrap();
            let marks = driver.writer.watermarks();
            assert_eq!(marks.durable_bytes, marks.written_bytes);
        }
        let (spool, _) = open_spool(&disk, segment_bytes, &ledger.floor()).unwrap();
        compare(&read_all(&spool), &mut ledger);
        for sealed in spool.segments() {
            assert!(disk.is_read_only(&sealed.file_name));
        }
    });
}

#[test]
fn on_a_real_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = RealDisk::open(dir.path()).unwrap();
    Spool::create(&disk, LOG, None).unwrap();
    let mut ledger = Ledger::default();
    let mut rng = Rng(1);
    for epoch in 1..3 {
        let (spool, _) = open_spool(&disk, 100_000, &ledger.floor()).unwrap();
        let mut driver = Driver::new(&spool, epoch);
        for _ in 0..40 {
            driver.step(&mut ledger, &mut rng).unwrap();
        }
        driver.sync(&mut ledger).unwrap();
        let second = open_spool(&disk, 100_000, &Floor::default());
        let pid = std::process::id();
        assert!(matches!(second, Err(SpoolError::Locked { pid: Some(found), .. }) if found == pid));
    }
    let (spool, recovered) = open_spool(&disk, 100_000, &ledger.floor()).unwrap();
    assert_eq!(recovered.segments.len(), 1);
    compare(&read_all(&spool), &mut ledger);
    let files = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(files, spool.segments().len() + 2);
}
