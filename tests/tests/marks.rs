//! Marks that are not what they say: copied along with a file, of another log, of bytes that mean nothing.
//!
//! A file with data of its own loses such a mark and nothing else. Of one without data nobody knows what belongs
//! into it: it is suspect, reads fail, nothing of it is logged, and that is said until somebody has seen to it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::Kind;
use hsm_tests::stubs::{assert_reads, release, wait_whole};
use hsm_tests::sys;
use hsm_tests::system::{Setup, System};
use serde_json::Value;
use tierfs::LogId;
use tierfs::stub::StubMark;

const BYTES: usize = 300_001;
const FEW_MARKS: &[(&str, &str)] = &[("stub_marks_max", "0")];

fn start(kind: Kind, settings: &[(&str, &str)]) -> System {
    let mut setup = Setup::new(kind).exposed();
    for (key, value) in settings {
        setup = setup.with(key, value);
    }
    setup.start()
}

fn mark_of(path: &Path) -> Vec<u8> {
    let all = sys::xattrs(path).expect("its attributes");
    let mark = all.into_iter().find(|(name, _)| name == b"trusted.hsm");
    mark.expect("a mark").1
}

fn set_mark(path: &Path, value: &[u8]) {
    sys::set_xattr(path, c"trusted.hsm", value).expect("a mark");
}

/// A released file with these bytes.
fn stub(system: &System, name: &str, seed: u64) -> PathBuf {
    let path = system.at(name);
    fs::write(&path, noise(seed, BYTES)).expect("written");
    system.sync_all();
    release(system, &path);
    path
}

/// The transactions that gave a file content.
fn versions(system: &System, path: &Path) -> Vec<Value> {
    let path = path.to_str().expect("ASCII");
    let shown = system.tierctl(&["log", "list", "--json", path]).json();
    let all = shown["list"].as_array().cloned().unwrap_or_default();
    let content = |version: &Value| version["changes"].to_string().contains("\"content\"");
    all.into_iter()
        .filter(content)
        .map(|version| version["lsn"].clone())
        .collect()
}

fn a_mark_that_came_along_is_removed(kind: Kind, settings: &[(&str, &str)]) {
    let system = start(kind, settings);
    let stub = stub(&system, "stub", 1);
    let mark = mark_of(&stub);
    let [known, new, holes] = ["known", "new", "holes"].map(|name| system.at(name));
    fs::write(&known, noise(2, BYTES)).expect("written");
    system.sync_all();
    let logged = versions(&system, &known);
    set_mark(&known, &mark);
    assert_reads(&known, &noise(2, BYTES), "with a mark that came along");
    fs::write(&new, noise(3, BYTES)).expect("written");
    set_mark(&new, &mark);
    let file = File::create(&holes).expect("created");
    file.set_len(BYTES as u64).expect("extended");
    file.write_all_at(b"at its end", (BYTES - 10) as u64)
        .expect("written");
    drop(file);
    set_mark(&holes, &mark);
    system.sync_all();
    for path in [&known, &new, &holes] {
        wait_whole(path);
    }
    let context = format!("{kind}, {settings:?}");
    assert_reads(&known, &noise(2, BYTES), &context);
    assert_reads(&new, &noise(3, BYTES), &context);
    let sparse = [vec![0; BYTES - 10], b"at its end".to_vec()].concat();
    assert_reads(&holes, &sparse, &context);
    assert_eq!(
        versions(&system, &known),
        logged,
        "{context}: it is what it was"
    );
    assert_eq!(mark_of(&stub), mark, "{context}: the original is a stub");
    // What was examined can be released again, with a mark of its own.
    release(&system, &known);
    assert_ne!(mark_of(&known), mark);
    assert_reads(&known, &noise(2, BYTES), &context);
    assert_reads(&stub, &noise(1, BYTES), &context);
    system.check(&context);
}

#[test]
fn a_mark_that_came_along_is_removed_on_ext4() {
    a_mark_that_came_along_is_removed(Kind::Ext4, &[]);
}

#[test]
fn a_mark_that_came_along_is_removed_on_xfs() {
    a_mark_that_came_along_is_removed(Kind::Xfs, FEW_MARKS);
}

#[test]
fn a_mark_that_came_along_is_removed_on_btrfs() {
    a_mark_that_came_along_is_removed(Kind::Btrfs, &[]);
}

// ---- files that nobody knows -----------------------------------------------------------------------

/// Opening it fails, in whatever way, and so does cutting it by its path.
fn gives_nothing(path: &Path, context: &str) {
    let here = format!("{context}: {}", path.display());
    let tries: [fn(&Path) -> io::Result<()>; 3] = [
        |path| fs::read(path).map(drop),
        |path| File::options().write(true).open(path).map(drop),
        |path| Ok(nix::unistd::truncate(path, 1)?),
    ];
    for (number, attempt) in tries.iter().enumerate() {
        let error = attempt(path).expect_err(&here);
        let errno = error.raw_os_error();
        assert_eq!(errno, Some(libc::EIO), "{here}, try {number}: {error}");
    }
}

/// What the status says of suspect files.
fn notice(status: &Value) -> String {
    let all = status["notices"].as_array().expect("notices");
    let texts: Vec<String> = all.iter().map(ToString::to_string).collect();
    texts
        .into_iter()
        .find(|text| text.contains("suspect"))
        .unwrap_or_default()
}

/// Waits until so many files are told to be suspect, these among those that can be found.
fn told(system: &System, paths: &[&Path], context: &str) {
    let expected = match paths.len() {
        0 => String::new(),
        1 => "1 file is suspect".to_owned(),
        count => format!("{count} files are suspect"),
    };
    let status = system.wait_for(&format!("{context}: {expected:?} is told"), |status| {
        let notice = notice(status);
        // Files leave the list of stubs seconds after they have lost their marks.
        let found = system.tierctl(&["find", "state = 'suspect'"]).stdout;
        notice.contains(&expected)
            && notice.is_empty() == paths.is_empty()
            && found.lines().count() == paths.len()
    });
    let text = system.tierctl(&["status"]).text();
    assert!(text.contains(&expected), "{context}: {text}");
    assert_eq!(status["released"]["wanted"], 0, "{context}: {status:#}");
    let found = system.tierctl(&["find", "state = 'suspect'"]).text();
    for path in paths {
        let path = path.to_str().expect("ASCII");
        assert!(found.contains(path), "{context}: {found}");
        let state = system.tierctl(&["state", path]).with_code(1);
        assert!(state.stdout.contains(": suspect ("), "{context}: {state}");
        assert!(state.stdout.contains("hsm(7)"), "{context}: {state}");
    }
}

fn nobody_knows_what_belongs_into_them(kind: Kind, settings: &[(&str, &str)]) {
    let mut system = start(kind, settings);
    let context = format!("{kind}, {settings:?}");
    let whole = system.at("whole");
    fs::write(&whole, noise(9, BYTES)).expect("written");
    let original = stub(&system, "original", 1);
    let (foreign, unclear) = (stub(&system, "foreign", 2), stub(&system, "unclear", 3));
    let mark = mark_of(&original);
    // As `cp --attributes-only` and `truncate` make it, or a copy of the disk by one that skips holes.
    let copied = system.at("copied");
    let file = File::create(&copied).expect("created");
    file.set_len(BYTES as u64).expect("extended");
    set_mark(&copied, &mark);
    drop(file);
    let of_another_log = StubMark {
        log_id: LogId([7; 16]),
        ..StubMark::from_bytes(&mark_of(&foreign)).expect("a mark")
    };
    set_mark(&foreign, &of_another_log.to_bytes());
    set_mark(&unclear, b"anything");
    set_mark(&whole, b"anything");
    let logged = [&foreign, &unclear, &whole].map(|path| versions(&system, path));
    system.sync_all();
    let all = [&copied, &foreign, &unclear, &whole].map(PathBuf::as_path);
    told(&system, &all, &context);
    for (number, path) in all.iter().enumerate() {
        gives_nothing(path, &context);
        let why = [
            "another inode",
            "another log",
            "cannot be read",
            "cannot be read",
        ][number];
        let state = system.tierctl(&["state", path.to_str().expect("ASCII")]);
        assert!(state.stdout.contains(why), "{context}: {state}");
    }
    assert_reads(&original, &noise(1, BYTES), &context);

    // Nothing of it is logged, and the log comes to rest.
    system.sync_all();
    let lsn = system.sync_all();
    assert_eq!(system.sync_all(), lsn, "{context}: it comes to rest");
    assert_eq!(
        [&foreign, &unclear, &whole].map(|path| versions(&system, path)),
        logged,
        "{context}"
    );
    let cat = system.tierctl(&["log", "cat", copied.to_str().expect("ASCII")]);
    assert!(cat.stdout.is_empty(), "{context}: {cat}");

    // Neither the next worker nor the next daemon gives anything, before it has examined all nor after.
    system.kill_process("worker");
    for path in &all {
        gives_nothing(path, &format!("{context}, the next worker"));
    }
    system.wait_until_it_answers();
    told(&system, &all, &format!("{context}, the next worker"));
    system.restart();
    for path in &all {
        gives_nothing(path, &format!("{context}, the next daemon"));
    }
    if kind != Kind::Btrfs && settings.is_empty() {
        system.wait_for("only stubs are asked about", |status| {
            status["released"]["every_file"] == false
        });
    }
    for path in &all {
        gives_nothing(path, &format!("{context}, the next daemon at rest"));
    }
    told(&system, &all, &format!("{context}, the next daemon"));
    they_go(&system, &context);
}

/// Suspect files are renamed, replaced, set right and deleted.
fn they_go(system: &System, context: &str) {
    let [copied, foreign, unclear, whole] =
        ["copied", "foreign", "unclear", "whole"].map(|name| system.at(name));
    let renamed = system.at("renamed");
    fs::rename(&copied, &renamed).expect("renamed");
    system.sync_all();
    // What is replayed has the names and what was logged before, and says what it lacks.
    let fresh = system.fresh();
    let ran = system.replay_from(&system.volumes(0), fresh.root(), &[]);
    let ran = ran.with_code(3);
    let logged = [
        ("unclear", noise(3, BYTES)),
        ("whole", noise(9, BYTES)),
        ("renamed", Vec::new()),
    ];
    for (path, bytes) in logged {
        assert!(ran.text().contains(path), "{context}: {ran}");
        assert_reads(&fresh.at(path), &bytes, context);
    }
    drop(fresh);
    // Who knows that it is all there says so; and a stub of this log gets its own mark again.
    for path in [&whole, &unclear] {
        sys::remove_xattr(path, c"trusted.hsm").expect("removed");
    }
    let new = system.at("new");
    fs::write(&new, noise(5, BYTES)).expect("written");
    fs::rename(&new, &foreign).expect("replaced");
    system.sync_all();
    assert_reads(&foreign, &noise(5, BYTES), context);
    assert_reads(&whole, &noise(9, BYTES), context);
    assert_reads(&unclear, &noise(3, BYTES), context);
    told(system, &[&renamed], context);
    gives_nothing(&renamed, context);
    let named = notice(&system.status());
    assert!(!named.contains("copied"), "{context}: {named}");
    fs::remove_file(&renamed).expect("removed");
    system.sync_all();
    told(system, &[], context);
    let status = system.wait_for("nothing is amiss", |status| {
        status["notices"].as_array().is_some_and(Vec::is_empty)
    });
    assert_eq!(status["state"], "following", "{context}");
    release(system, &whole);
    assert_reads(&whole, &noise(9, BYTES), context);
    system.check(context);
}

#[test]
fn nobody_knows_what_belongs_into_them_on_ext4() {
    nobody_knows_what_belongs_into_them(Kind::Ext4, &[]);
}

#[test]
fn nobody_knows_what_belongs_into_them_on_xfs() {
    nobody_knows_what_belongs_into_them(Kind::Xfs, FEW_MARKS);
}

#[test]
fn nobody_knows_what_belongs_into_them_on_btrfs() {
    nobody_knows_what_belongs_into_them(Kind::Btrfs, &[]);
}
