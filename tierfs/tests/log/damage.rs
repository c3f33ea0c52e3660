//! The damage matrix: (truncate, flip, duplicate, remove) x (every part of a segment), sealed and open.
//! Nothing panics, nothing wrong is read, and the message names the file.

use std::sync::Arc;

use tierfs::disk::sim::{Rng, SimDisk};
use tierfs::fold::Transactions;
use tierfs::frame::{FRAME_PREFIX_LEN, FrameKind};
use tierfs::record::{Record, Txn};
use tierfs::segment::{Segment, SegmentError, TRAILER_LEN};
use tierfs::spool::{Spool, SpoolError};

use crate::support::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    Truncate,
    Flip,
    Duplicate,
    Remove,
}

pub const ALL: [Damage; 4] = [
    Damage::Truncate,
    Damage::Flip,
    Damage::Duplicate,
    Damage::Remove,
];

/// Does it to a part of a file.
pub fn damage(bytes: &[u8], part: std::ops::Range<usize>, how: Damage, rng: &mut Rng) -> Vec<u8> {
    let mut bad = bytes.to_vec();
    let at = part.start + rng.below((part.end - part.start) as u64) as usize;
    match how {
        Damage::Truncate => bad.truncate(at),
        Damage::Flip => bad[at] ^= 1 << rng.below(8),
        Damage::Duplicate => drop(bad.splice(part.end..part.end, bytes[part].to_vec())),
        Damage::Remove => drop(bad.drain(part)),
    }
    bad
}

/// The parts of a sealed segment by name.
pub fn parts(segment: &Segment, len: usize) -> Vec<(String, std::ops::Range<usize>)> {
    let first = segment.index.frames[0].offset as usize;
    let mut parts = vec![
        ("the header".to_owned(), 0..first),
        ("the file".to_owned(), 0..len),
    ];
    for (number, frame) in segment.index.frames.iter().enumerate() {
        let start = frame.offset as usize;
        let body = start + FRAME_PREFIX_LEN;
        let end = frame.end() as usize;
        parts.push((format!("header of frame {number}"), start..body));
        parts.push((format!("body of frame {number}"), body..end));
        parts.push((format!("frame {number}"), start..end));
    }
    let end = segment.index.frames.last().unwrap().end() as usize;
    parts.push(("the index".to_owned(), end..len - TRAILER_LEN));
    parts.push(("the trailer".to_owned(), len - TRAILER_LEN..len));
    parts
}

fn sealed_segment(seed: u64) -> (Vec<u8>, Vec<Txn>) {
    let disk = SimDisk::new();
    let spool = new_spool(&disk, 1 << 20);
    let mut ledger = Ledger::default();
    let mut rng = Rng(seed);
    let mut driver = Driver::new(&spool, seed);
    for _ in 0..3 {
        driver.append_data(&mut ledger, &mut rng).unwrap();
        driver.append_txns(&mut ledger, &mut rng).unwrap();
    }
    driver.writer.seal_now().unwrap();
    driver.sync(&mut ledger).unwrap();
    let bytes = disk.bytes("0000000001.hsm.zst").unwrap();
    (bytes, ledger.txns)
}

/// Everything in the segment, as a careful reader gets it.
fn read(segment: &Segment) -> Result<(Vec<Txn>, usize), SegmentError> {
    let mut txns = Vec::new();
    for next in Transactions::new(segment) {
        txns.push(next?.0);
    }
    let mut data = 0;
    for (number, frame) in segment.index.frames.iter().enumerate() {
        if frame.kind == FrameKind::Data {
            data += segment.read_records(number)?.len();
        }
    }
    Ok((txns, data))
}

fn named(error: &SegmentError) {
    let text = error.to_string();
    assert!(text.contains("the segment's name"), "{text}");
    match error {
        SegmentError::Corrupt { .. } => assert!(text.contains("at byte"), "{text}"),
        SegmentError::NotSealed { .. } | SegmentError::NewerVersion { .. } => {}
        SegmentError::Io { .. } => panic!("{text}"),
    }
}

#[test]
fn damage_of_a_sealed_segment_is_found_wherever_it_is() {
    for_seeds(6, |seed| {
        let (good, txns) = sealed_segment(seed);
        let open = |bytes: &[u8]| Segment::open(Arc::new(bytes.to_vec()), "the segment's name");
        let whole = open(&good).unwrap();
        let expected = read(&whole).unwrap();
        assert_eq!(expected.0, txns);
        let mut rng = Rng(seed);
        for (name, part) in parts(&whole, good.len()) {
            for how in ALL {
                for _ in 0..4 {
                    let bad = damage(&good, part.clone(), how, &mut rng);
                    let found = open(&bad).and_then(|segment| read(&segment));
                    let error = found
                        .err()
                        .unwrap_or_else(|| panic!("{how:?} of {name} was not seen"));
                    named(&error);
                    salvage(&bad, &txns, &format!("{how:?} of {name}"));
                }
            }
        }
    });
}

/// What is salvaged is a part of what was written, in order.
fn salvage(bad: &[u8], txns: &[Txn], what: &str) {
    let Ok(segment) = Segment::salvage(Arc::new(bad.to_vec()), "salvaged") else {
        return;
    };
    let whole = Transactions::new(&segment).map_while(Result::ok);
    let found: Vec<Txn> = whole.map(|(txn, _)| txn).collect();
    assert!(txns.starts_with(&found), "{what}");
    for number in 0..segment.index.frames.len() {
        segment.read_records(number).unwrap();
    }
}

#[test]
fn salvage_keeps_every_frame_but_the_damaged_one() {
    let (good, _) = sealed_segment(3);
    let segment = Segment::open(Arc::new(good.clone()), "x").unwrap();
    let frames = segment.index.frames.clone();
    for number in 0..frames.len() {
        let mut bad = good.clone();
        bad[frames[number].offset as usize + FRAME_PREFIX_LEN] ^= 1;
        let salvaged = Segment::salvage(Arc::new(bad), "x").unwrap();
        let mut expected = frames.clone();
        expected.remove(number);
        assert_eq!(salvaged.index.frames, expected);
    }
    // Without its end, it has them all.
    let cut = good[..frames.last().unwrap().end() as usize].to_vec();
    assert!(matches!(
        Segment::open(Arc::new(cut.clone()), "x"),
        Err(SegmentError::NotSealed { .. } | SegmentError::Corrupt { .. })
    ));
    assert_eq!(
        Segment::salvage(Arc::new(cut), "x").unwrap().index.frames,
        frames
    );
}

/// A spool with sealed segments and an open one, everything acknowledged, then killed.
fn killed(seed: u64) -> (SimDisk, Ledger) {
    let disk = SimDisk::new();
    let spool = new_spool(&disk, 20_000);
    let mut ledger = Ledger::default();
    let mut rng = Rng(seed);
    let mut driver = Driver::new(&spool, seed);
    for _ in 0..8 {
        driver.append_data(&mut ledger, &mut rng).unwrap();
        driver.append_txns(&mut ledger, &mut rng).unwrap();
        driver.sync(&mut ledger).unwrap();
    }
    driver.writer.seal_now().unwrap();
    for _ in 0..3 {
        driver.append_data(&mut ledger, &mut rng).unwrap();
        driver.append_txns(&mut ledger, &mut rng).unwrap();
        driver.sync(&mut ledger).unwrap();
    }
    (disk.restart(), ledger)
}

#[test]
fn damage_of_the_open_segment_is_refused_and_nothing_is_changed() {
    for_seeds(4, |seed| {
        let (disk, ledger) = killed(seed);
        let name = disk
            .names()
            .into_iter()
            .find(|name| name.contains("open"))
            .unwrap();
        let good = disk.bytes(&name).unwrap();
        let whole = Segment::salvage(Arc::new(good.clone()), "x").unwrap();
        let mut rng = Rng(seed);
        let all = parts(&whole, good.len() + TRAILER_LEN);
        for (part_name, part) in &all[..all.len() - 2] {
            if part_name == "the file" {
                continue;
            }
            for how in ALL {
                let bad = damage(&good, part.clone(), how, &mut rng);
                // A whole frame twice at the end contradicts nothing: the second is not the next.
                let harmless = how == Damage::Duplicate && part.end == good.len();
                disk.tamper(&name, Some(bad.clone()));
                let disk = disk.restart();
                let names = disk.names();
                match open_spool(&disk, 20_000, &ledger.floor()) {
                    Ok((spool, _)) => {
                        assert!(harmless, "{how:?} of {part_name} was not seen");
                        compare(&read_all(&spool), &mut Ledger { ..clone(&ledger) });
                    }
                    Err(error) => {
                        let text = error.to_string();
                        assert!(text.contains(&name) || text.contains("/sim"), "{text}");
                        assert!(
                            matches!(error, SpoolError::Damaged { .. } | SpoolError::Fork { .. }),
                            "{how:?} of {part_name}: {text}"
                        );
                        assert_eq!(disk.names(), names);
                        assert_eq!(disk.bytes(&name).unwrap(), bad);
                    }
                }
            }
        }
        // The whole file is gone.
        disk.tamper(&name, None);
        let error = open_spool(&disk.restart(), 20_000, &ledger.floor())
            .err()
            .unwrap();
        assert!(matches!(error, SpoolError::Lost { .. }), "{error}");
    });
}

fn clone(ledger: &Ledger) -> Ledger {
    Ledger {
        txns: ledger.txns.clone(),
        data: ledger.data.clone(),
        durable: ledger.durable,
    }
}

#[test]
fn damage_of_a_sealed_segment_in_the_spool_is_refused_or_found_by_verify() {
    for_seeds(3, |seed| {
        let (disk, ledger) = killed(seed);
        let (spool, _) = open_spool(&disk, 20_000, &ledger.floor()).unwrap();
        let sealed = spool.segments();
        drop(spool);
        let mut rng = Rng(seed);
        for segment in [sealed.first().unwrap(), sealed.last().unwrap()] {
            let name = &segment.file_name;
            let good = disk.bytes(name).unwrap();
            let whole = Segment::open(Arc::new(good.clone()), "x").unwrap();
            for (part_name, part) in parts(&whole, good.len()) {
                for how in ALL {
                    disk.tamper(name, Some(damage(&good, part.clone(), how, &mut rng)));
                    let found: Result<(), SpoolError> =
                        open_spool(&disk.restart(), 20_000, &ledger.floor())
                            .and_then(|(spool, _)| spool.verify(segment.no));
                    let error = found
                        .err()
                        .unwrap_or_else(|| panic!("{how:?} of {part_name}"));
                    assert!(error.to_string().contains(name), "{error}");
                }
            }
            disk.tamper(name, None);
            let error = open_spool(&disk.restart(), 20_000, &ledger.floor())
                .err()
                .unwrap();
            assert!(
                matches!(error, SpoolError::Gap { .. } | SpoolError::Behind { .. }),
                "{error}"
            );
            disk.tamper(name, Some(good));
        }
        open_spool(&disk.restart(), 20_000, &ledger.floor()).unwrap();
    });
}

#[test]
fn the_spools_own_file_may_be_lost() {
    let (disk, mut ledger) = killed(1);
    for bytes in [None, Some(vec![0; 8192]), Some(b"rubbish".to_vec())] {
        let disk = disk.restart();
        disk.tamper("spool.hsm", bytes);
        let (spool, recovered) = open_spool(&disk, 20_000, &ledger.floor()).unwrap();
        assert!(recovered.warnings[0].contains("spool.hsm"));
        compare(&read_all(&spool), &mut ledger);
        drop(spool);
        recover_and_go_on(&disk.restart(), &mut clone(&ledger), 20_000, 5);
    }
    // With it, and without all segments, nobody knows whose log this is.
    let empty = SimDisk::new();
    let error = open_spool(&empty, 1, &ledger.floor()).err().unwrap();
    assert!(matches!(error, SpoolError::NotASpool { .. }), "{error}");
    assert!(Spool::create(&empty, LOG, None).is_ok());
}

/// Records that are right by every hash, and make no sense.
#[test]
fn frames_that_lie_about_themselves_are_damage() {
    use tierfs::frame::{PackedFrame, Packer, RawFrame};
    let disk = SimDisk::new();
    let spool = new_spool(&disk, 1 << 20);
    let mut driver = Driver::new(&spool, 1);
    let (mut ledger, mut rng) = (Ledger::default(), Rng(0));
    driver.append_txns(&mut ledger, &mut rng).unwrap();
    let mut raw = RawFrame::new(FrameKind::Data);
    raw.push_data(
        tierfs::DataId {
            epoch: tierfs::Epoch(1),
            number: 1,
        },
        b"x",
    );
    let good = Packer::new(1).unwrap().pack(&raw).unwrap();
    let frame = pack_txns(
        &mut Packer::new(1).unwrap(),
        &[txn(driver.writer.next_lsn(), &mut rng)],
    );
    // A data frame with operations in it, one with another number of records, a commit too many.
    let lies = [
        PackedFrame {
            compressed: frame[0].compressed.clone(),
            body: frame[0].body,
            raw_len: frame[0].raw_len,
            ..good.clone()
        },
        PackedFrame {
            records: 2,
            ..good.clone()
        },
        PackedFrame {
            data: Vec::new(),
            ..good
        },
    ];
    assert!(driver.writer.append_data(&lies[2]).is_err());
    for lie in &lies[..2] {
        driver.writer.append_data(lie).unwrap();
        driver.writer.seal_now().unwrap();
        driver.sync(&mut ledger).unwrap();
    }
    for sealed in spool.segments() {
        let bytes = disk.bytes(&sealed.file_name).unwrap();
        let segment = Segment::open(Arc::new(bytes), "x").unwrap();
        let last = segment.index.frames.len() - 1;
        assert!(
            matches!(
                segment.read_records(last),
                Err(SegmentError::Corrupt { .. })
            ),
            "{:?}",
            segment.read_records(last)
        );
    }
    let records = Record::decode_all(&[0x82, 0x18, 99, 0xa0]);
    assert!(records.is_ok(), "an odd kind may be ignored");
    assert!(Record::decode_all(&[0x82, 0x18, 98, 0xa0]).is_err());
}
