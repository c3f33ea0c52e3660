//! Segments of every format version, as they were written then: every later version reads them.
//!
//! `HSM_GOLDEN=write` writes the files of a new version, and never over existing ones.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tierfs::catalog::{Catalog, History};
use tierfs::disk::sim::SimDisk;
use tierfs::fold::{Before, Transactions, fold_segment};
use tierfs::record::Record;
use tierfs::segment::Segment;
use tierfs::spool::Spool;
use tierfs::{Hash, Lsn};

use crate::independent::{extract, reader};
use crate::scenario;
use crate::support::LOG;

const SEGMENTS: [&str; 3] = [
    "0000000001.hsm.zst",
    "0000000002.hsm.zst",
    "0000000003.hsm.zst",
];
const TEXTS: [&str; 4] = ["content.txt", "records.txt", "tree-4.txt", "tree.txt"];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn segments(dir: &Path) -> Vec<PathBuf> {
    SEGMENTS.iter().map(|name| dir.join(name)).collect()
}

fn open(path: &Path) -> Segment {
    Segment::open(
        Arc::new(File::open(path).unwrap()),
        path.display().to_string(),
    )
    .unwrap()
}

/// Every record, a line each; long byte strings as their hashes.
fn records(paths: &[PathBuf]) -> String {
    let mut text = String::new();
    for path in paths {
        let segment = open(path);
        writeln!(text, "{:?}", segment.trailer.unwrap().last_lsn).unwrap();
        for number in 0..segment.index.frames.len() {
            for record in segment.read_records(number).unwrap() {
                match record {
                    Record::Data(data) => writeln!(
                        text,
                        "Data {} {} {}",
                        data.id,
                        data.bytes.len(),
                        Hash::of(&data.bytes)
                    ),
                    Record::Op(tierfs::record::Op::Xattrs(xattrs)) => {
                        let list = xattrs.list.iter().map(|(name, value)| {
                            format!("{}={}", name.escape_ascii(), Hash::of(value))
                        });
                        let list: Vec<_> = list.collect();
                        writeln!(text, "Xattrs {} {list:?} {}", xattrs.file, xattrs.more)
                    }
                    record => writeln!(text, "{record:?}"),
                }
                .unwrap();
            }
        }
    }
    text
}

/// The content of every regular file, by path.
fn content(files: &BTreeMap<String, Vec<u8>>) -> String {
    files.iter().fold(String::new(), |mut text, (path, bytes)| {
        writeln!(text, "{} {} {path}", Hash::of(bytes), bytes.len()).unwrap();
        text
    })
}

fn texts(paths: &[PathBuf]) -> [String; 4] {
    [
        content(&extract(paths, None)),
        records(paths),
        reader("list", Some(4), paths),
        reader("list", None, paths),
    ]
}

fn write_spool(dir: &Path) {
    let (spool, disk, _) = scenario::write();
    write_segments(&spool, &disk, dir);
}

fn write_segments(spool: &Spool<SimDisk>, disk: &SimDisk, dir: &Path) {
    for segment in spool.segments() {
        let bytes = disk.bytes(&segment.file_name).unwrap();
        fs::write(dir.join(segment.file_name), bytes).unwrap();
    }
}

fn list(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = names
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Reads the files of one version, or of what was added to one; writes them first where that is asked for.
fn check(name: &str, segments: &[&str], write: impl Fn(&Path)) {
    let dir = golden().join(name);
    let paths: Vec<PathBuf> = segments.iter().map(|name| dir.join(name)).collect();
    if std::env::var("HSM_GOLDEN").is_ok_and(|word| word == "write") && !dir.exists() {
        fs::create_dir_all(&dir).unwrap();
        write(&dir);
        for (name, text) in TEXTS.iter().zip(texts(&paths)) {
            fs::write(dir.join(name), text).unwrap();
        }
    }
    let known = segments.iter().chain(&TEXTS);
    let mut known: Vec<String> = known.map(|name| (*name).to_owned()).collect();
    known.sort();
    assert_eq!(list(&dir), known, "golden files that no test reads");
    for (name, text) in TEXTS.iter().zip(texts(&paths)) {
        assert_eq!(text, fs::read_to_string(dir.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn every_version_is_read() {
    check("v1", &SEGMENTS, write_spool);
    // Records of kind 30 (Pin) came later.
    check("v1-pin", &SEGMENTS[..1], |dir| {
        let (spool, disk) = scenario::write_pins();
        write_segments(&spool, &disk, dir);
    });
    let known = ["v1", "v1-pin"];
    assert_eq!(list(&golden()), known, "a version that no test reads");
}

#[test]
fn golden_pins_fold() {
    let path = golden().join("v1-pin").join(SEGMENTS[0]);
    let mut catalog = Catalog::temporary(None, LOG, History::Keep).unwrap();
    fold_segment(&mut catalog, &open(&path), None, Before::Hash(None)).unwrap();
    let pinned = |lsn: Option<u64>| -> Vec<u64> {
        let queries = catalog.queries();
        let is_pinned = |file| match lsn.and_then(Lsn::new) {
            Some(lsn) => queries.at(lsn).unwrap().is_pinned(file).unwrap(),
            None => queries.is_pinned(file).unwrap(),
        };
        (1..=4)
            .filter(|number| is_pinned(scenario::file(*number)))
            .collect()
    };
    assert_eq!(pinned(Some(1)), []);
    assert_eq!(pinned(Some(2)), [2, 3, 4]);
    assert_eq!(pinned(Some(3)), [2, 4]);
    assert_eq!(pinned(Some(4)), [2]);
    assert_eq!(pinned(None), [2]);
}

/// What is written today has the same records as what was written then.
#[test]
fn todays_writer_writes_the_same_records() {
    let dir = tempfile::tempdir().unwrap();
    write_spool(dir.path());
    let expected = fs::read_to_string(golden().join("v1/records.txt")).unwrap();
    // The third segment's header names the hash of the second, which depends on zstd's version.
    let same = |text: &str| {
        text.lines()
            .filter(|line| !line.starts_with("Segment(SegmentHeader"))
            .collect::<Vec<_>>()
            .join("\n")
    };
    assert_eq!(same(&records(&segments(dir.path()))), same(&expected));
}

#[test]
fn golden_segments_fold_to_any_moment() {
    let (_, _, versions) = scenario::write();
    let paths = segments(&golden().join("v1"));
    let mut last = 0;
    for path in &paths {
        for next in Transactions::new(&open(path)) {
            last += 1;
            assert_eq!(next.unwrap().0.lsn.get(), last);
        }
    }
    for until in 1..=last {
        let mut catalog = Catalog::temporary(None, LOG, History::Drop).unwrap();
        let mut before = None;
        for path in &paths {
            let until = Lsn::new(until);
            fold_segment(&mut catalog, &open(path), until, Before::Hash(before)).unwrap();
            before = Some(Hash::of(&fs::read(path).unwrap()));
        }
        assert_eq!(catalog.folded().map(Lsn::get), Some(until));
        for (file, all) in &versions {
            let version = all.iter().rev().find(|version| version.lsn <= until);
            let row = catalog.queries().inode(scenario::file(*file)).unwrap();
            if let Some(version) = version {
                assert_eq!(row.unwrap().size, version.bytes.len() as u64);
            }
        }
    }
}
