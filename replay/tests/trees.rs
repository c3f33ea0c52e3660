//! Random trees on real filesystems: logged, replayed, compared by an independent walk.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::expect_used,
    clippy::format_push_string
)] // tests

mod support;

use replay::materialise::Options;
use replay::moment::Moment;
use replay::replay::{Replay, Request};
use replay::report::{Collector, Findings, Silent};
use std::path::Path;

use support::adopt::adopt;
use support::fs::Mounted;
use support::log::{LogWriter, volume};
use support::tree::{RandomTree, differences};

fn replay(from: &Path, to: &Path) -> Findings {
    let found = Collector::new(&Silent);
    let request = Request {
        from: vec![from.to_owned()],
        until: Moment::End,
        path: None,
        mode: replay::state::Mode::Whole,
        scratch: None,
    };
    let replay = Replay::prepare(&request, &found).unwrap();
    replay.materialise(to, Options::default(), &found).unwrap();
    let made = found.finish();
    let found = Collector::new(&Silent);
    replay.verify(to, &found).unwrap();
    let verified = found.finish();
    assert!(verified.losses.is_empty(), "{:#?}", verified.losses);
    made
}

fn round_trip(kind: &str, seed: u64, flags: &'static str) {
    let disk = Mounted::new(kind);
    let source = disk.root().join("source");
    let target = disk.root().join("target");
    std::fs::create_dir(&source).unwrap();
    let mut tree = RandomTree::new(seed);
    tree.flags = flags;
    tree.fill(&source, 300);
    // Until blocks are allocated, xfs tells holes from what it has reserved by its own whim.
    support::fs::run("sync", &["-f", support::fs::text(&source)]);
    let segments = disk.outside("segments");
    let mut log = LogWriter::new(&segments);
    adopt(&mut log, &source);
    log.seal();
    let archive = disk.outside("volume");
    volume(&segments, &archive, log.log_id);
    let found = replay(&archive, &target);
    assert!(found.losses.is_empty(), "{:#?}", found.losses);
    assert_eq!(differences(&source, &target), Vec::<String>::new());
}

#[test]
fn ext4_trees_come_back() {
    for seed in 0..4 {
        round_trip("ext4", seed, "dSAia");
    }
}

#[test]
fn xfs_trees_come_back() {
    for seed in 10..12 {
        round_trip("xfs", seed, "dSAia");
    }
}

#[test]
fn btrfs_trees_come_back() {
    for seed in 20..22 {
        round_trip("btrfs", seed, "dSAiac");
    }
}

#[test]
fn a_file_is_read_as_of_each_of_its_versions() {
    use replay::fold::{Segments, fold};
    use replay::read::read_file;
    use tierfs::catalog::{Catalog, History};

    let temp = tempfile::tempdir().unwrap();
    let mut log = LogWriter::new(temp.path());
    let root = log.file();
    let file = log.file();
    let inode = |file, kind| tierfs::record::Op::Inode(support::program::plain(kind, file));
    log.commit(vec![
        LogWriter::filesystem(),
        inode(root, tierfs::record::Kind::Directory),
        inode(file, tierfs::record::Kind::Regular),
    ]);
    let mut versions = vec![(log.next_lsn, Vec::new())];
    for (size, start, len) in [
        (10, 0, 10),
        (3_000_000, 100_000, 2_000_000),
        (500_000, 0, 0),
        (70_000, 65_536, 4464),
    ] {
        let bytes: Vec<u8> = (0..len)
            .map(|k: usize| u8::try_from(k % 251).unwrap())
            .collect();
        let parts: Vec<(u64, &[u8])> = if len > 0 {
            vec![(start as u64, &bytes)]
        } else {
            Vec::new()
        };
        let ops = log.content(file, size as u64, &parts);
        let lsn = log.commit(ops);
        let mut content = vec![0; size];
        content[start..start + len].copy_from_slice(&bytes);
        versions.push((lsn, content));
    }
    log.seal();
    versions[0].0 = tierfs::Lsn::FIRST;
    let sources = replay::Sources::open(&[temp.path().to_owned()]).unwrap();
    let mut catalog = Catalog::temporary(None, log.log_id, History::Keep).unwrap();
    let found = Collector::new(&Silent);
    fold(&sources, &mut catalog, Moment::End, Segments::Note, &found).unwrap();
    assert_eq!(
        catalog
            .queries()
            .segments(tierfs::SegmentNo::FIRST, 9)
            .unwrap()
            .len(),
        1
    );
    for (lsn, content) in &versions {
        let mut out = Vec::new();
        let size = read_file(&sources, catalog.queries(), file, Some(*lsn), &mut out).unwrap();
        assert!(out == *content && size == content.len() as u64, "at {lsn}");
    }
    let mut out = Vec::new();
    read_file(&sources, catalog.queries(), file, None, &mut out).unwrap();
    assert!(out == versions.last().unwrap().1);
    assert!(read_file(&sources, catalog.queries(), root, None, &mut out).is_err());
}
