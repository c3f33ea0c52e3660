//! The log is read without any code of ours: by `zstd`, by Python's cbor2, by a reader that was
//! written from hsm-log(5) alone.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tierfs::disk::RealDisk;
use tierfs::disk::sim::Rng;
use tierfs::spool::Spool;

use crate::support::*;
use crate::{scenario, support};

/// A Python that has cbor2.
fn python() -> PathBuf {
    let given = std::env::var_os("HSM_PYTHON").map(PathBuf::from);
    let usual = ["python3", "/usr/bin/python3"].map(PathBuf::from);
    given
        .into_iter()
        .chain(usual)
        .find(|python| {
            Command::new(python)
                .args(["-c", "import cbor2"])
                .output()
                .is_ok_and(|output| output.status.success())
        })
        .expect("no python3 with cbor2 was found: run tests/setup.sh test, or set HSM_PYTHON")
}

fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; run tests/setup.sh test"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn command(verb: &str, until: Option<u64>) -> Command {
    let mut command = Command::new(python());
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader.py"));
    command.arg(verb);
    if let Some(until) = until {
        command.args(["--until", &until.to_string()]);
    }
    command
}

/// What the independent reader prints.
pub fn reader(verb: &str, until: Option<u64>, segments: &[PathBuf]) -> String {
    run(command(verb, until).args(segments))
}

/// What the independent reader extracts: content by path.
pub fn extract(segments: &[PathBuf], until: Option<u64>) -> BTreeMap<String, Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    run(command("extract", until).arg(dir.path()).args(segments));
    let mut files = BTreeMap::new();
    let mut left = vec![dir.path().to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else {
                let name = path.strip_prefix(dir.path()).unwrap().as_os_str();
                let name = name.as_bytes().escape_ascii().to_string();
                files.insert(name, fs::read(path).unwrap());
            }
        }
    }
    files
}

#[test]
fn zstd_and_cbor2_read_random_logs() {
    let dir = tempfile::tempdir().unwrap();
    let disk = RealDisk::open(dir.path()).unwrap();
    Spool::create(&disk, LOG, None).unwrap();
    let mut ledger = Ledger::default();
    let mut rng = Rng(11);
    let (spool, _) = open_spool(&disk, 400_000, &ledger.floor()).unwrap();
    let mut driver = Driver::new(&spool, 9);
    for _ in 0..80 {
        driver.step(&mut ledger, &mut rng).unwrap();
    }
    driver.writer.seal_now().unwrap();
    driver.sync(&mut ledger).unwrap();
    let content = read_all(&spool);
    compare(&content, &mut ledger);
    let mut counts = BTreeMap::<String, usize>::new();
    for segment in spool.segments() {
        let path = dir.path().join(&segment.file_name);
        run(Command::new("zstd").arg("-t").arg(&path));
        for line in reader("records", None, &[path]).lines() {
            let kind = line.split(' ').next().unwrap();
            *counts.entry(kind.to_owned()).or_default() += 1;
        }
    }
    let ops: usize = ledger.txns.iter().map(|txn| txn.ops.len()).sum();
    assert_eq!(counts["0"], spool.segments().len());
    assert_eq!(counts["2"], ledger.data.len());
    assert_eq!(counts["4"], ledger.txns.len());
    assert_eq!(
        counts.values().sum::<usize>() - counts["0"] - counts["2"] - counts["4"],
        ops
    );
}

#[test]
fn a_reader_from_the_manual_alone_restores_every_version() {
    let (spool, disk, versions) = scenario::write();
    let dir = tempfile::tempdir().unwrap();
    let mut paths = Vec::new();
    for segment in spool.segments() {
        let path = dir.path().join(&segment.file_name);
        fs::write(&path, disk.bytes(&segment.file_name).unwrap()).unwrap();
        run(Command::new("zstd").arg("-t").arg(&path));
        paths.push(path);
    }
    let content = support::read_all(&spool);
    let last = content.txns.len() as u64;
    for until in [2, 4, 5, last] {
        let list = reader("list", Some(until), &paths);
        let files = extract(&paths, Some(until));
        for (file, all) in &versions {
            let Some(version) = all.iter().rev().find(|version| version.lsn <= until) else {
                continue;
            };
            let line = list
                .lines()
                .find(|line| line.starts_with(&format!("{file} ")))
                .unwrap_or_else(|| panic!("file {file} is not in\n{list}"));
            let path = line.split(' ').nth(6).unwrap().trim_start_matches('/');
            let name = files.keys().find(|name| name.starts_with(path)).unwrap();
            let bytes = &files[name];
            assert!(*bytes == version.bytes, "{name} as of {until}");
        }
        assert_eq!(
            OsStr::new(list.lines().next().unwrap().split(' ').nth(6).unwrap()),
            "/"
        );
    }
}
