//! Damaged media: healed from another copy, or named.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::expect_used,
    clippy::format_push_string
)] // tests

mod support;

use std::os::unix::fs::MetadataExt;

use support::log::volume;
use support::program::{Bench, begun, damage, is_data, json, link, plain, run, status, writable};
use support::tree::differences;
use tierfs::ids::FileId;
use tierfs::record::{Kind, Op};

#[test]
fn damage_is_healed_from_the_other_volume_frame_by_frame() {
    let bench = Bench::new();
    let vol1 = bench.volume_of_a_tree(4, 2 << 20);
    let vol2 = bench.copy_volume("vol2");
    // Every second frame, of transactions and of data, in turn on each volume.
    let last = json(&run(&[&"--from", &vol1, &"--list", &"--json"]), 0)["places"][0]["segments"]
        .as_u64()
        .unwrap();
    for segment in 1..=last {
        damage(&vol1, segment, |number, _| number % 2 == 0);
        damage(&vol2, segment, |number, _| number % 2 == 1);
    }
    let to = bench.at("to");
    let made = json(
        &run(&[&"--from", &vol1, &"--from", &vol2, &"--to", &to, &"--json"]),
        0,
    );
    assert_eq!(differences(&bench.at("source"), &to), Vec::<String>::new());
    assert!(!made["warnings"].as_array().unwrap().is_empty());
}

#[test]
fn a_damaged_index_is_made_again_by_reading_the_segment() {
    let bench = Bench::new();
    let vol = bench.volume_of_a_tree(5, 2 << 20);
    let path = writable(&vol, 1);
    let mut bytes = std::fs::read(&path).unwrap();
    let len = bytes.len();
    bytes[len - 200] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let to = bench.at("to");
    let text = status(&run(&[&"--from", &vol, &"--to", &to]), 0);
    assert!(text.contains("index"), "{text}");
    assert_eq!(differences(&bench.at("source"), &to), Vec::<String>::new());
    // Cut off: everything in front of the cut is still used, the rest is named.
    std::fs::write(&path, &bytes[..len / 2]).unwrap();
    let text = status(&run(&[&"--from", &vol, &"--to", &bench.at("cut")]), 2);
    assert!(text.contains("--until"), "{text}");
}

#[test]
fn bytes_that_no_volume_has_are_named_and_the_rest_is_restored() {
    let bench = Bench::new();
    let mut log = begun(&bench);
    let mut files = Vec::new();
    for number in 0..40_usize {
        let file = log.file();
        let bytes = vec![u8::try_from(number).unwrap(); 1 + number * 90_000];
        let mut ops = vec![Op::Inode(plain(Kind::Regular, file))];
        ops.extend(log.content(file, bytes.len() as u64, &[(0, &bytes)]));
        ops.push(link(FileId::ROOT, number.to_string().as_bytes(), file));
        log.commit(ops);
        files.push(bytes);
    }
    log.seal();
    let data: Vec<usize> = {
        let bytes = std::fs::read(bench.at("segments").join("0000000001.hsm.zst")).unwrap();
        let segment = tierfs::segment::Segment::open(std::sync::Arc::new(bytes), "x").unwrap();
        let frames = segment.index.frames.iter().enumerate();
        frames
            .filter(|(_, frame)| is_data(frame))
            .map(|(number, _)| number)
            .collect()
    };
    volume(&bench.at("segments"), &bench.at("vol1"), log.log_id);
    let vol2 = bench.copy_volume("vol2");
    for vol in [bench.at("vol1"), vol2.clone()] {
        assert_eq!(
            damage(&vol, 1, |number, _| number == data[0] || number == data[20]),
            2
        );
    }
    let to = bench.at("to");
    let made = json(
        &run(&[
            &"--from",
            &bench.at("vol1"),
            &"--from",
            &vol2,
            &"--to",
            &to,
            &"--json",
        ]),
        3,
    );
    let losses = made["losses"].as_array().unwrap();
    assert!(!losses.is_empty());
    for (number, bytes) in files.iter().enumerate() {
        let name = &number.to_string();
        let mut there = std::fs::read(to.join(number.to_string())).unwrap();
        assert_eq!(there.len(), bytes.len());
        for loss in losses.iter().filter(|loss| loss["path"] == *name) {
            let at = usize::try_from(loss["offset"].as_u64().unwrap()).unwrap();
            let len = usize::try_from(loss["len"].as_u64().unwrap()).unwrap();
            assert!(there[at..at + len].iter().all(|byte| *byte == 0));
            there[at..at + len].copy_from_slice(&bytes[at..at + len]);
        }
        assert!(there == *bytes, "{number}");
        assert_eq!(
            std::fs::metadata(to.join(number.to_string()))
                .unwrap()
                .mtime(),
            1_700_000_000
        );
    }
    let text = status(
        &run(&[&"--from", &bench.at("vol1"), &"--to", &bench.at("again")]),
        3,
    );
    assert!(
        text.contains("lost") && text.contains("0000000001.hsm.zst"),
        "{text}"
    );
}

#[test]
fn a_moment_before_the_damage_can_still_be_restored() {
    let bench = Bench::new();
    let mut log = begun(&bench);
    log.segment_bytes = 1;
    for number in 0..6 {
        let file = log.file();
        let name = format!("f{number}");
        log.commit(vec![
            Op::Inode(plain(Kind::Regular, file)),
            link(FileId::ROOT, name.as_bytes(), file),
        ]);
    }
    volume(&bench.at("segments"), &bench.at("vol1"), log.log_id);
    damage(&bench.at("vol1"), 4, |_, _| true);
    let text = status(
        &run(&[&"--from", &bench.at("vol1"), &"--to", &bench.at("to")]),
        2,
    );
    assert!(text.contains("--until 4"), "{text}");
    status(
        &run(&[
            &"--from",
            &bench.at("vol1"),
            &"--to",
            &bench.at("to"),
            &"--until",
            &"4",
        ]),
        0,
    );
    // A segment that is missing is named, and so is what can be had without it.
    let path = writable(&bench.at("vol1"), 3);
    std::fs::remove_file(path).unwrap();
    let text = status(
        &run(&[&"--from", &bench.at("vol1"), &"--to", &bench.at("to3")]),
        2,
    );
    assert!(text.contains('3') && text.contains("--until 3"), "{text}");
}

#[test]
fn data_that_was_written_again_elsewhere_is_found_at_every_moment() {
    let bench = Bench::new();
    let mut log = begun(&bench);
    let file = log.file();
    let mut ops = vec![Op::Inode(plain(Kind::Regular, file))];
    let content = log.content(file, 7, &[(0, b"content")]);
    let tierfs::record::Op::Extents(extents) = &content[0] else {
        panic!()
    };
    let tierfs::record::Extent::Data { first, .. } = extents.list[0] else {
        panic!()
    };
    ops.extend(content.clone());
    ops.push(link(FileId::ROOT, b"f", file));
    let lsn = log.commit(ops);
    log.seal();
    log.again(first, b"content");
    log.seal();
    volume(&bench.at("segments"), &bench.at("vol1"), log.log_id);
    damage(&bench.at("vol1"), 1, |_, frame| is_data(frame));
    let to = bench.at("to");
    status(
        &run(&[
            &"--from",
            &bench.at("vol1"),
            &"--to",
            &to,
            &"--until",
            &lsn.to_string(),
        ]),
        0,
    );
    assert_eq!(std::fs::read(to.join("f")).unwrap(), b"content");
}
