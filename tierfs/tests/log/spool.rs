//! The spool's life: forks, gaps, foreign files, loss that is accepted, removal, full disks, readers.

use std::sync::mpsc;

use tierfs::catalog::{Catalog, History};
use tierfs::disk::RealDisk;
use tierfs::disk::sim::{Fault, Rng, SimDisk};
use tierfs::fold::{Before, FoldError, Transactions, fold_segment};
use tierfs::segment::{Segment, SegmentError};
use tierfs::spool::{Evidence, Floor, Spool, SpoolError};
use tierfs::writer::WriterError;
use tierfs::{Epoch, LogId, Lsn};

use crate::scenario;
use crate::support::*;

const SEGMENT: u64 = 20_000;

/// Two sealed segments and an open one with `tail` synced appends; killed.
fn killed(seed: u64, tail: u64) -> (SimDisk, Ledger) {
    let disk = SimDisk::new();
    let spool = new_spool(&disk, 1 << 20);
    let mut ledger = Ledger::default();
    let mut rng = Rng(seed);
    let mut driver = Driver::new(&spool, seed + 1);
    for _ in 0..2 {
        driver.append_data(&mut ledger, &mut rng).unwrap();
        driver.append_txns(&mut ledger, &mut rng).unwrap();
        driver.writer.seal_now().unwrap();
    }
    for _ in 0..tail {
        driver.append_data(&mut ledger, &mut rng).unwrap();
        driver.append_txns(&mut ledger, &mut rng).unwrap();
        driver.sync(&mut ledger).unwrap();
    }
    driver.sync(&mut ledger).unwrap();
    (disk.restart(), ledger)
}

fn open_name(disk: &SimDisk) -> String {
    let names = disk.names();
    names
        .into_iter()
        .find(|name| name.contains(".open-"))
        .unwrap()
}

fn error(disk: &SimDisk, floor: &Floor) -> SpoolError {
    let opened = open_spool(disk, SEGMENT, floor);
    opened
        .err()
        .unwrap_or_else(|| panic!("it was opened: {:?}", disk.names()))
}

#[test]
fn a_damaged_frame_in_the_middle_of_the_open_segment_is_refused() {
    let (disk, ledger) = killed(1, 4);
    let name = open_name(&disk);
    let bytes = disk.bytes(&name).unwrap();
    let segment = Segment::salvage(std::sync::Arc::new(bytes.clone()), "x").unwrap();
    let middle = segment.index.frames[3].offset;
    let mut bad = bytes;
    bad[usize::try_from(middle).unwrap() + 200] ^= 4;
    disk.tamper(&name, Some(bad));
    let refused = error(&disk.restart(), &ledger.floor());
    let text = refused.to_string();
    let SpoolError::Damaged {
        path,
        offset,
        evidence,
        ..
    } = refused
    else {
        panic!("{text}");
    };
    assert_eq!(
        (path.file_name().unwrap().to_str().unwrap(), offset),
        (&name[..], middle)
    );
    assert!(matches!(evidence, Evidence::Frames { .. }), "{text}");
    assert!(text.contains("--accept-loss-after"), "{text}");
    // After a boot, without the spool's own record: the later frames say what was durable.
    let rebooted = disk.power_loss(3);
    rebooted.tamper("spool.hsm", None);
    let refused = error(
        &rebooted,
        &Floor {
            log_id: Some(LOG),
            ..Floor::default()
        },
    );
    let known = matches!(
        refused,
        SpoolError::Damaged {
            evidence: Evidence::DurableBytes { .. },
            ..
        }
    );
    assert!(known, "{refused}");
}

#[test]
fn loss_is_accepted_only_by_the_right_word() {
    let (disk, mut ledger) = killed(2, 4);
    let name = open_name(&disk);
    let mut bytes = disk.bytes(&name).unwrap();
    let segment = Segment::salvage(std::sync::Arc::new(bytes.clone()), "x").unwrap();
    let frames = &segment.index.frames;
    bytes[usize::try_from(frames[4].offset).unwrap() + 9] ^= 4;
    disk.tamper(&name, Some(bytes.clone()));
    let mut floor = Floor {
        folded: ledger.durable_lsn(),
        ..ledger.floor()
    };
    let disk = disk.restart();
    let SpoolError::Damaged { end: Some(end), .. } = error(&disk, &floor) else {
        panic!("no damage");
    };
    floor.accept_loss_after = Some(end.get() + 1);
    assert!(matches!(error(&disk, &floor), SpoolError::Damaged { .. }));
    floor.accept_loss_after = Some(end.get());
    let operations = {
        let disk = disk.restart();
        let before = disk.operations();
        let (spool, recovered) = open_spool(&disk, SEGMENT, &floor).unwrap();
        assert!(recovered.loss_accepted && recovered.catalog_is_ahead);
        assert_eq!(recovered.end, Some(end));
        // What lies behind the damage is not thrown away.
        assert_eq!(spool.voids().len(), 1);
        assert_eq!(disk.bytes(&spool.voids()[0].file_name).unwrap(), bytes);
        ledger.durable = (usize::try_from(end.get()).unwrap(), 0);
        compare(&read_all(&spool), &mut ledger);
        drop(spool);
        // Said once, it is settled.
        floor.accept_loss_after = None;
        floor.folded = Some(end);
        floor.durable = Some(end);
        open_spool(&disk, SEGMENT, &floor).unwrap();
        disk.operations() - before
    };
    // Killed at any moment, the same word still serves.
    floor.accept_loss_after = Some(end.get());
    floor.folded = Some(Lsn::new(end.get() + 1).unwrap());
    for at in 0..operations {
        let disk = disk.restart();
        disk.fault_at(at, Fault::Kill);
        drop(open_spool(&disk, SEGMENT, &floor));
        let (spool, _) = open_spool(&disk.restart(), SEGMENT, &floor).unwrap();
        compare(&read_all(&spool), &mut ledger);
    }
}

#[test]
fn what_is_known_elsewhere_is_not_forgotten() {
    let (disk, ledger) = killed(3, 2);
    let end = ledger.durable_lsn().unwrap();
    let known = |floor: Floor| error(&disk.restart(), &floor);
    let refused = known(Floor {
        folded: Some(end.next()),
        ..ledger.floor()
    });
    assert!(matches!(refused, SpoolError::Lost { .. }), "{refused}");
    let (spool, _) = open_spool(&disk.restart(), SEGMENT, &ledger.floor()).unwrap();
    let mut head = spool.head().unwrap();
    drop(spool);
    head.segment = head.segment.next();
    let refused = known(Floor {
        sealed: Some(head.clone()),
        ..ledger.floor()
    });
    assert!(matches!(refused, SpoolError::Behind { .. }), "{refused}");
    let known_hash = tierfs::spool::Head {
        segment: head.segment.prev().unwrap(),
        hash: tierfs::Hash([0; 32]),
        ..head
    };
    let refused = known(Floor {
        sealed: Some(known_hash),
        ..ledger.floor()
    });
    assert!(matches!(refused, SpoolError::Hash { .. }), "{refused}");
    let other = Floor {
        log_id: Some(LogId([1; 16])),
        ..ledger.floor()
    };
    assert!(matches!(known(other), SpoolError::WrongLog { .. }));
}

#[test]
fn forks_gaps_and_foreign_files_are_refused_by_name() {
    let (disk, ledger) = killed(4, 2);
    let (other, _) = killed(5, 2);
    let open = open_name(&disk);
    let (first, second) = ("0000000001.hsm.zst", "0000000002.hsm.zst");
    let tampered = |changes: &[(&str, Option<Vec<u8>>)]| {
        let disk = disk.restart();
        for (name, bytes) in changes {
            disk.tamper(name, bytes.clone());
        }
        let names = disk.names();
        let error = error(&disk, &ledger.floor());
        assert_eq!(disk.names(), names, "{error}");
        error
    };
    let of = |name: &str| disk.bytes(name);
    let theirs = |name: &str| other.bytes(name);
    // Another history's segment, sealed or open, also beside ours.
    for number in [first, second] {
        let error = tampered(&[(number, theirs(number))]);
        assert!(
            matches!(error, SpoolError::Fork { .. } | SpoolError::Hash { .. }),
            "{error}"
        );
        assert!(
            error.to_string().contains(".hsm.zst") || error.to_string().contains(".open-"),
            "{error}"
        );
    }
    let beside = theirs(&open_name(&other));
    let error = tampered(&[(&open_name(&other), beside.clone())]);
    assert!(matches!(error, SpoolError::Fork { .. }), "{error}");
    let error = tampered(&[("0000000002.open-0000000000000006", of(second))]);
    assert!(matches!(error, SpoolError::Fork { .. }), "{error}");
    let error = tampered(&[(&open, None), ("0000000003.open-0000000000000006", beside)]);
    assert!(matches!(error, SpoolError::Fork { .. }), "{error}");
    // A segment under another's name.
    let error = tampered(&[(second, of(first))]);
    assert!(matches!(error, SpoolError::Fork { .. }), "{error}");
    for missing in [first, second] {
        let error = tampered(&[(missing, None)]);
        assert!(matches!(error, SpoolError::Gap { .. }), "{error}");
        assert!(error.to_string().contains("copy them back"), "{error}");
    }
    for name in ["notes.txt", "0000000001.hsm.zst.bak", "0000000001.open-6"] {
        let error = tampered(&[(name, Some(Vec::new()))]);
        assert!(matches!(error, SpoolError::UnknownFile { .. }), "{error}");
        assert!(error.to_string().contains(name), "{error}");
    }
    assert!(matches!(
        tampered(&[(&open, None)]),
        SpoolError::Lost { .. }
    ));
}

#[test]
fn a_newer_version_is_said_to_be_one() {
    use tierfs::segment::encode_header;
    let (disk, ledger) = killed(6, 1);
    for name in ["0000000002.hsm.zst".to_owned(), open_name(&disk)] {
        let bytes = disk.bytes(&name).unwrap();
        let segment = Segment::salvage(std::sync::Arc::new(bytes.clone()), "x").unwrap();
        let mut header = segment.header.clone();
        header.version = 2;
        let mut newer = encode_header(&header).0;
        newer.extend(&bytes[newer.len()..]);
        let disk = disk.restart();
        disk.tamper(&name, Some(newer));
        let error = error(&disk, &ledger.floor());
        assert!(
            matches!(
                error,
                SpoolError::Segment(SegmentError::NewerVersion { version: 2, .. })
            ),
            "{error}"
        );
    }
}

#[test]
fn segments_leave_in_order_and_the_log_goes_on_without_them() {
    let (mut disk, ledger) = killed(7, 3);
    let mut end = ledger.durable_lsn();
    for round in 0..3 {
        let floor = Floor {
            durable: end,
            ..ledger.floor()
        };
        let (spool, recovered) = open_spool(&disk, SEGMENT, &floor).unwrap();
        assert_eq!(recovered.end, end);
        let segments = spool.segments();
        if let [_, second, ..] = &segments[..] {
            let refused = spool.remove(second.no).unwrap_err();
            assert!(matches!(refused, SpoolError::NotOldest { .. }));
        }
        for segment in &segments {
            let reader = spool.open_segment(segment.no).unwrap();
            spool.remove(segment.no).unwrap();
            // Who reads it goes on reading.
            assert!(Transactions::new(&reader).all(|next| next.is_ok()));
            assert!(matches!(
                spool.open_segment(segment.no),
                Err(SpoolError::NoSuchSegment { .. })
            ));
        }
        assert_eq!(spool.bytes_used(), 0);
        let head = spool.head().unwrap();
        assert_eq!(spool.removed(), Some((head.segment, head.hash)));
        // The power fails: the empty spool still knows the end of the log.
        drop(spool);
        disk = disk.power_loss(round);
        let (spool, _) = open_spool(&disk, SEGMENT, &floor).unwrap();
        let mut writer = Driver::new(&spool, 100 + round);
        assert_eq!(writer.writer.next_lsn(), Lsn::after(end));
        let mut more = Ledger::default();
        let mut rng = Rng(round);
        writer.append_txns(&mut more, &mut rng).unwrap();
        writer.sync_quietly();
        end = writer.writer.watermarks().durable;
        drop((writer, spool));
        disk = disk.restart();
    }
}

#[test]
fn a_lost_spool_is_begun_again_at_the_logs_end() {
    let (disk, ledger) = killed(8, 2);
    let (spool, _) = open_spool(&disk, SEGMENT, &ledger.floor()).unwrap();
    let head = spool.head().unwrap();
    let fresh = SimDisk::new();
    Spool::create(&fresh, LOG, Some(head.clone())).unwrap();
    let again = Spool::create(&fresh, LOG, None).unwrap_err();
    assert!(matches!(again, SpoolError::NotEmpty { .. }), "{again}");
    let (spool, _) = open_spool(&fresh, SEGMENT, &ledger.floor()).unwrap();
    let mut driver = Driver::new(&spool, 77);
    assert_eq!(driver.writer.next_lsn(), head.next_lsn);
    let taken = spool.writer_with(Epoch(1), fixed_time).err().unwrap();
    assert!(matches!(taken, SpoolError::WriterTaken { .. }));
    let mut more = Ledger::default();
    driver.append_txns(&mut more, &mut Rng(1)).unwrap();
    driver.writer.seal_now().unwrap();
    driver.sync_quietly();
    let segment = spool.open_segment(head.segment.next()).unwrap();
    assert_eq!(segment.header.previous, Some(head.hash));
    let predecessor = segment.header.predecessor.unwrap();
    assert_eq!(
        (predecessor.epoch, predecessor.segment),
        (head.epoch, head.segment)
    );
}

/// A crash between a removal's record and the removal itself.
#[test]
fn a_removal_is_finished_after_a_crash() {
    let (disk, ledger) = killed(9, 2);
    for power in [false, true] {
        let probe = disk.restart();
        let (spool, _) = open_spool(&probe, SEGMENT, &ledger.floor()).unwrap();
        let (no, before) = (spool.segments()[0].no, probe.operations());
        spool.remove(no).unwrap();
        let after = probe.operations();
        for at in before..after {
            for fault in [Fault::Kill, Fault::KillAfter] {
                let disk = disk.restart();
                disk.fault_at(at, fault);
                let (spool, _) = open_spool(&disk, SEGMENT, &ledger.floor()).unwrap();
                let _ = spool.remove(no);
                drop(spool);
                let disk = if power {
                    disk.power_loss(at)
                } else {
                    disk.restart()
                };
                let (spool, _) = open_spool(&disk, SEGMENT, &ledger.floor()).unwrap();
                let first = spool.segments()[0].no;
                assert!(first == no || first == no.next());
                assert_eq!(first == no.next(), spool.removed().is_some());
            }
        }
    }
}

#[test]
fn a_full_disk_loses_nothing_and_goes_on_when_there_is_space() {
    for_seeds(20, |seed| {
        let mut rng = Rng(seed);
        let disk = SimDisk::new();
        let spool = new_spool(&disk, SEGMENT);
        let mut ledger = Ledger::default();
        let mut driver = Driver::new(&spool, 1);
        disk.set_capacity(Some(30_000 + rng.below(60_000)));
        let mut full = 0;
        let mut all = Ledger::default();
        for _ in 0..120 {
            let done = if rng.below(2) == 0 {
                driver.append_txns(&mut ledger, &mut rng)
            } else {
                driver.append_data(&mut ledger, &mut rng)
            };
            match done {
                Ok(()) => continue,
                Err(WriterError::Full { .. }) => full += 1,
                Err(error) => panic!("{error}"),
            }
            // The full disk sealed what there was; that is synced, copied and removed.
            driver.sync(&mut ledger).unwrap();
            assert_eq!(ledger.durable, (ledger.txns.len(), ledger.data.len()));
            let content = read_all(&spool);
            all.txns.extend(content.txns);
            assert_eq!(all.txns.len(), ledger.txns.len());
            for segment in spool.segments() {
                spool.remove(segment.no).unwrap();
            }
        }
        assert!(full > 0);
        driver.sync(&mut ledger).unwrap();
        let durable = ledger.durable_lsn();
        drop((driver, spool));
        // Also the start needs no more space than there is.
        let disk = disk.restart();
        disk.set_capacity(Some(disk.capacity_used() + rng.below(2) * 20_000));
        let (spool, recovered) = open_spool(&disk, SEGMENT, &ledger.floor()).unwrap();
        assert_eq!(recovered.end, durable);
        assert!(
            !disk
                .names()
                .iter()
                .any(|name| name.contains(".open-") || name.contains(".tmp-"))
        );
        all.txns.extend(read_all(&spool).txns);
        assert!(all.txns == ledger.txns);
    });
}

#[test]
fn the_spools_own_limit_is_a_full_disk_too() {
    let disk = SimDisk::new();
    Spool::create(&disk, LOG, None).unwrap();
    let mut options = options(SEGMENT);
    options.bytes_max = 50_000;
    let (spool, _) = Spool::open(disk, options, &Floor::default()).unwrap();
    let mut driver = Driver::new(&spool, 1);
    let (mut ledger, mut rng) = (Ledger::default(), Rng(1));
    let error = loop {
        if let Err(error) = driver.append_data(&mut ledger, &mut rng) {
            break error;
        }
    };
    assert!(
        matches!(error, WriterError::Full { source: None, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("/sim"), "{error}");
    driver.sync(&mut ledger).unwrap();
    assert_eq!(driver.writer.open_bytes(), 0);
    assert!(spool.bytes_used() < 60_000);
    for segment in spool.segments() {
        spool.remove(segment.no).unwrap();
    }
    driver.append_data(&mut ledger, &mut rng).unwrap();
}

#[test]
fn a_failed_sync_ends_the_writer() {
    let disk = SimDisk::new();
    let spool = new_spool(&disk, 1 << 20);
    let mut driver = Driver::new(&spool, 1);
    let (mut ledger, mut rng) = (Ledger::default(), Rng(1));
    driver.append_txns(&mut ledger, &mut rng).unwrap();
    driver.sync(&mut ledger).unwrap();
    driver.append_txns(&mut ledger, &mut rng).unwrap();
    disk.fault_at(disk.operations(), Fault::Fail(libc::EIO));
    let error = driver.sync(&mut ledger).unwrap_err();
    assert!(matches!(error, WriterError::Failed { .. }), "{error}");
    assert_eq!(driver.writer.watermarks().durable, ledger.durable_lsn());
    let error = driver.append_txns(&mut ledger, &mut rng).unwrap_err();
    assert!(matches!(error, WriterError::Poisoned { .. }), "{error}");
    assert!(driver.writer.seal_now().is_err());
    assert!(driver.writer.take_sync().is_none());
}

#[test]
fn frames_that_do_not_continue_the_log_are_refused() {
    let disk = SimDisk::new();
    let spool = new_spool(&disk, 1 << 20);
    let mut writer = spool.writer_with(Epoch(1), fixed_time).unwrap();
    let mut packer = tierfs::frame::Packer::new(1).unwrap();
    let mut rng = Rng(1);
    let second = pack_txns(&mut packer, &[txn(Lsn::FIRST.next(), &mut rng)]);
    assert!(matches!(
        writer.append_txns(&second),
        Err(WriterError::Order { .. })
    ));
    assert!(matches!(
        writer.append_data(&second[0]),
        Err(WriterError::Order { .. })
    ));
    assert!(matches!(
        writer.append_txns([]),
        Err(WriterError::Order { .. })
    ));
    let first = pack_txns(&mut packer, &[txn(Lsn::FIRST, &mut rng)]);
    writer.append_txns(&first).unwrap();
    writer.append_txns(&second).unwrap();
    assert_eq!(writer.next_lsn().get(), 3);
}

#[test]
fn the_open_segment_is_read_while_it_grows() {
    let dir = tempfile::tempdir().unwrap();
    let disk = RealDisk::open(dir.path()).unwrap();
    Spool::create(&disk, LOG, None).unwrap();
    let (spool, _) = open_spool(&disk, 200_000, &Floor::default()).unwrap();
    let mut driver = Driver::new(&spool, 1);
    let (mut ledger, mut rng) = (Ledger::default(), Rng(1));
    for _ in 0..50 {
        driver.step(&mut ledger, &mut rng).unwrap();
        let Some((id, content, placed)) = ledger.data.last() else {
            continue;
        };
        let segment = spool.open_segment(placed.segment).unwrap();
        let number = segment.frame_at(placed.frame_offset).unwrap();
        let raw = segment.read_frame(number).unwrap();
        let entries = &segment.index.frames[number].data;
        let entry = entries.iter().find(|entry| entry.id == *id).unwrap();
        let start = entry.raw_offset as usize;
        assert_eq!(raw[start..start + entry.len as usize], content[..]);
    }
    assert!(spool.bytes_used() > 0 && spool.bytes_free().unwrap() > 0);
    driver.sync(&mut ledger).unwrap();
    let marks = driver.writer.watermarks();
    assert_eq!(marks.durable, marks.written);
}

/// Appending goes on while another thread syncs; both in their own time.
#[test]
fn appending_and_syncing_overlap() {
    let dir = tempfile::tempdir().unwrap();
    let disk = RealDisk::open(dir.path()).unwrap();
    Spool::create(&disk, LOG, None).unwrap();
    let (spool, _) = open_spool(&disk, 300_000, &Floor::default()).unwrap();
    let mut driver = Driver::new(&spool, 1);
    let (mut ledger, mut rng) = (Ledger::default(), Rng(1));
    let (to, jobs) = mpsc::channel::<tierfs::writer::SyncJob<RealDisk>>();
    let (back, results) = mpsc::channel();
    let syncer = std::thread::spawn(move || {
        for job in jobs {
            back.send(job.run()).unwrap();
        }
    });
    let mut waiting = false;
    for _ in 0..300 {
        driver.append_data(&mut ledger, &mut rng).unwrap();
        driver.append_txns(&mut ledger, &mut rng).unwrap();
        if waiting && let Ok(result) = results.try_recv() {
            driver.writer.done(result).unwrap();
            waiting = false;
        }
        if let Some(job) = driver.writer.take_sync() {
            to.send(job).unwrap();
            waiting = true;
        }
    }
    while waiting || driver.writer.is_dirty() {
        if waiting {
            driver.writer.done(results.recv().unwrap()).unwrap();
            waiting = false;
        }
        if let Some(job) = driver.writer.take_sync() {
            to.send(job).unwrap();
            waiting = true;
        }
    }
    drop(to);
    syncer.join().unwrap();
    ledger.durable = (ledger.txns.len(), ledger.data.len());
    assert_eq!(driver.writer.watermarks().durable, ledger.durable_lsn());
    drop((driver, spool));
    let (spool, _) = open_spool(&disk, 300_000, &ledger.floor()).unwrap();
    compare(&read_all(&spool), &mut ledger);
}

/// Before a segment has its name, it and all before it are synced; before anything counts as
/// durable, the names are.
#[test]
fn the_order_of_syncs_is_the_promised_one() {
    let disk = SimDisk::new();
    let spool = new_spool(&disk, 5000);
    let mut driver = Driver::new(&spool, 1);
    let (mut ledger, mut rng) = (Ledger::default(), Rng(8));
    while driver.writer.watermarks().written_bytes < 30_000 {
        driver.append_data(&mut ledger, &mut rng).unwrap();
    }
    let before = disk.log().len();
    driver.sync(&mut ledger).unwrap();
    let log = disk.log().split_off(before);
    let mut synced = Vec::new();
    let mut directory = false;
    for line in &log {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["sync", "the", "directory"] => directory = true,
            ["sync", name] => synced.push(name),
            ["rename", from, "to", _] => assert_eq!(synced.last(), Some(&from), "{log:?}"),
            ["write", "spool.hsm", ..] => assert!(directory, "{log:?}"),
            ["chmod" | "truncate", ..] => {}
            _ => panic!("{line} was not expected in {log:?}"),
        }
    }
    assert!(
        synced.len() > 2 && log.last().unwrap().starts_with("write spool.hsm"),
        "{log:?}"
    );
    assert_eq!(
        log.iter()
            .filter(|line| *line == "sync the directory")
            .count(),
        1
    );
}

#[test]
fn folding_checks_log_chain_and_gaps() {
    let (spool, _, _) = scenario::write();
    let segments: Vec<_> = spool.segments();
    let open = |number: usize| spool.open_segment(segments[number].no).unwrap();
    let catalog = |log| Catalog::temporary(None, log, History::Keep).unwrap();
    let mut foreign = catalog(LogId([9; 16]));
    let error = fold_segment(&mut foreign, &open(0), None, Before::Unknown).unwrap_err();
    assert!(matches!(error, FoldError::WrongLog { .. }), "{error}");
    let mut ours = catalog(LOG);
    let error = fold_segment(&mut ours, &open(1), None, Before::Unknown).unwrap_err();
    assert!(matches!(error, FoldError::Gap { .. }), "{error}");
    let error = fold_segment(&mut ours, &open(1), None, Before::Hash(None)).unwrap_err();
    assert!(matches!(error, FoldError::Chain { .. }), "{error}");
    let mut ours = catalog(LOG);
    let first = fold_segment(&mut ours, &open(0), None, Before::Hash(None)).unwrap();
    assert_eq!(first.transactions, 4);
    let again = fold_segment(&mut ours, &open(0), None, Before::Unknown).unwrap();
    assert_eq!((again.transactions, again.data), (0, first.data));
    let known = Before::Hash(Some(segments[0].hash));
    fold_segment(&mut ours, &open(1), Lsn::new(5), known).unwrap();
    assert_eq!(ours.folded(), Lsn::new(5));
    fold_segment(&mut ours, &open(1), None, known).unwrap();
    fold_segment(
        &mut ours,
        &open(2),
        None,
        Before::Hash(Some(segments[1].hash)),
    )
    .unwrap();
    for segment in &segments {
        ours.add_segment(&segment.row()).unwrap();
    }
    assert_eq!(ours.folded(), segments[2].last_lsn);
    assert!(spool.voids().is_empty());
}
