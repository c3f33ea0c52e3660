//! `replay --stubs`: all names are there, the content stays in the log, and nothing takes zeros for it.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::expect_used,
    clippy::format_push_string
)] // tests

mod support;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use replay::sys::{self, Inode};
use support::adopt::adopt;
use support::fs::{self, Mounted};
use support::log::{LogWriter, volume};
use support::program::{PROGRAM, damage, is_data, json, link, plain, run, status};
use support::tree::{RandomTree, differences};
use tierfs::ids::{FileId, Lsn};
use tierfs::record::{Kind, Op};
use tierfs::stub::StubMark;

/// The disk that a log is of, and that log.
struct Logged {
    disk: Mounted,
    log: LogWriter,
}

impl Logged {
    fn source(&self) -> PathBuf {
        self.disk.root().join("source")
    }

    fn volume(&self) -> PathBuf {
        self.disk.outside("volume")
    }
}

/// A tree on a filesystem of this kind, and a volume with its log.
fn logged(kind: &str, make: impl Fn(&Path)) -> Logged {
    let disk = Mounted::new(kind);
    let source = disk.root().join("source");
    std::fs::create_dir(&source).unwrap();
    make(&source);
    fs::run("sync", &["-f", fs::text(&source)]);
    let mut log = LogWriter::new(&disk.outside("segments"));
    log.segment_bytes = 4 << 20;
    adopt(&mut log, &source);
    log.seal();
    volume(
        &disk.outside("segments"),
        &disk.outside("volume"),
        log.log_id,
    );
    Logged { disk, log }
}

fn random(seed: u64, flags: &'static str) -> impl Fn(&Path) {
    move |source| {
        let mut tree = RandomTree::new(seed);
        tree.flags = flags;
        tree.fill(source, 250);
        std::fs::write(source.join("frozen"), "cannot be changed").unwrap();
        fs::run("chattr", &["+i", fs::text(&source.join("frozen"))]);
    }
}

/// The same with files of which nothing but holes can be read in a test.
fn with_large_ones(seed: u64, flags: &'static str) -> impl Fn(&Path) {
    move |source| {
        random(seed, flags)(source);
        let sparse = std::fs::File::create(source.join("beyond 4 GiB")).unwrap();
        sparse.set_len(6 << 30).unwrap();
        sparse.write_all_at(b"at the end", (6 << 30) - 10).unwrap();
        std::fs::File::create(source.join("hollow"))
            .unwrap()
            .set_len(5 << 30)
            .unwrap();
        std::fs::hard_link(source.join("beyond 4 GiB"), source.join("its other name")).unwrap();
    }
}

fn mark_of(path: &Path) -> Option<StubMark> {
    let dir = sys::open_root(path.parent().unwrap()).unwrap();
    let node = sys::open_path(&dir, path.file_name().unwrap().as_bytes()).unwrap();
    let (_, mark) = Inode::Named(node.as_fd()).xattrs_and_mark().unwrap();
    mark.map(|bytes| StubMark::from_bytes(&bytes).unwrap())
}

/// The handle as fanotify would give it, asked for by the path.
fn handle_of(path: &Path) -> Vec<u8> {
    let dir = sys::open_root(path.parent().unwrap()).unwrap();
    sys::handle(sys::open_path(&dir, path.file_name().unwrap().as_bytes()).unwrap()).unwrap()
}

fn has_data(path: &Path) -> bool {
    let file = std::fs::File::open(path).unwrap();
    sys::seek_data(&file, 0).unwrap().is_some()
}

/// Every entry below a directory but `lost+found`.
fn entries(root: &Path) -> Vec<PathBuf> {
    let out = fs::run("find", &[fs::text(root), "-mindepth", "1", "-print0"]);
    let all = out.split('\0').filter(|path| !path.is_empty());
    let own = all.filter(|path| !path[root.as_os_str().len()..].starts_with("/lost+found"));
    own.map(PathBuf::from).collect()
}

/// Compares a tree of stubs with the tree that was logged, by means of its own; gives how many there are.
fn assert_stubs(source: &Path, to: &Path) -> usize {
    let names = |root: &Path| -> Vec<PathBuf> {
        let mut names: Vec<PathBuf> = entries(root)
            .iter()
            .map(|path| path.strip_prefix(root).unwrap().to_owned())
            .collect();
        names.sort();
        names
    };
    assert_eq!(names(source), names(to));
    let (mut stubs, mut inodes) = (0, BTreeMap::new());
    for name in names(source) {
        let (old, new) = (source.join(&name), to.join(&name));
        let name = name.display();
        let (was, is) = (
            old.symlink_metadata().unwrap(),
            new.symlink_metadata().unwrap(),
        );
        let told = |meta: &std::fs::Metadata| {
            let size = if meta.is_dir() { 0 } else { meta.len() };
            let links = if meta.is_dir() { 0 } else { meta.nlink() };
            let time = (meta.mtime(), meta.mtime_nsec());
            (meta.mode(), meta.uid(), meta.gid(), size, links, time)
        };
        assert_eq!(told(&was), told(&is), "{name}");
        assert_eq!(
            *inodes.entry(was.ino()).or_insert(is.ino()),
            is.ino(),
            "{name} is the same file as its other names"
        );
        if !was.is_file() {
            assert_eq!(mark_of(&new), None, "{name}");
            continue;
        }
        assert_eq!(
            fs::run("lsattr", &["-d", fs::text(&old)]).split(' ').next(),
            fs::run("lsattr", &["-d", fs::text(&new)]).split(' ').next(),
            "{name}"
        );
        let mark = mark_of(&new);
        assert!(!has_data(&new), "{name}: nothing was fetched");
        assert_eq!(mark.is_some(), has_data(&old), "{name}");
        if let Some(mark) = mark {
            stubs += 1;
            assert_eq!(mark.log_id, support::log::LOG);
            assert_eq!(mark.handle, handle_of(&new), "{name}");
            assert_eq!(mark.size, was.len());
            assert_eq!(
                (mark.mtime.seconds, i64::from(mark.mtime.nanos)),
                (was.mtime(), was.mtime_nsec())
            );
        }
    }
    stubs
}

fn every_file_is_a_stub(kind: &str, seed: u64, flags: &'static str) {
    let old = logged(kind, with_large_ones(seed, flags));
    let fresh = Mounted::new(kind);
    let (from, to) = (old.volume(), fresh.root());
    let listed = json(
        &run(&[&"--from", &from, &"--list", &"--stubs", &"--json"]),
        0,
    );
    let place = &listed["places"][0];
    assert_eq!(place["content_bytes"], 0, "{listed}");
    let (meta, all) = (&place["metadata_bytes"], &place["segment_bytes"]);
    assert!(
        meta.as_u64() > Some(0) && meta.as_u64() < all.as_u64(),
        "{listed}"
    );
    let made = json(
        &run(&[&"--from", &from, &"--to", &to, &"--stubs", &"--json"]),
        0,
    );
    assert_eq!(made["losses_total"], 0, "{made}");
    assert_eq!((&made["frames"], &made["bytes"]), (&0.into(), &0.into()));
    assert!(made["before_use"].as_str().unwrap().contains("device"));
    let names = assert_stubs(&old.source(), &to);
    // A file with several names is one stub.
    let stubs: std::collections::BTreeSet<u64> = entries(&to)
        .iter()
        .filter(|path| mark_of(path).is_some())
        .map(|path| path.symlink_metadata().unwrap().ino())
        .collect();
    assert!(stubs.len() < names);
    assert_eq!(made["stubs"], stubs.len(), "{made}");
    let verified = json(
        &run(&[&"--from", &from, &"--to", &to, &"--verify", &"--json"]),
        0,
    );
    assert_eq!(verified["released"], names, "{verified}");
    assert_eq!(verified["bytes"], 0, "no zeros were read: {verified}");
}

#[test]
fn every_file_with_data_is_a_stub_of_its_own_inode_on_ext4() {
    every_file_is_a_stub("ext4", 1, "dSAia");
}

#[test]
fn every_file_with_data_is_a_stub_of_its_own_inode_on_xfs() {
    every_file_is_a_stub("xfs", 2, "dSAia");
}

#[test]
fn every_file_with_data_is_a_stub_of_its_own_inode_on_btrfs() {
    every_file_is_a_stub("btrfs", 3, "dSAiac");
}

#[test]
fn no_frame_of_data_is_read_and_no_segment_of_data_only_is_asked_for() {
    let old = logged("ext4", |source| {
        for number in 0..4_u8 {
            let mut bytes = vec![number; 12 << 20];
            let mut seeded: rand::rngs::StdRng = rand::SeedableRng::seed_from_u64(number.into());
            rand::Rng::fill_bytes(&mut seeded, &mut bytes);
            std::fs::write(source.join(number.to_string()), bytes).unwrap();
        }
    });
    let (from, fresh) = (old.volume(), Mounted::new("ext4"));
    let (mut damaged, mut only_data) = (0, Vec::new());
    for (segment, _) in &old.log.sealed {
        damaged += damage(&from, segment.get(), |_, frame| is_data(frame));
        let path = from.join(segment.object_name());
        let bytes = std::sync::Arc::new(std::fs::read(&path).unwrap());
        let opened = tierfs::segment::Segment::open(bytes, "x").unwrap();
        if opened.trailer.unwrap().last_lsn.is_none() {
            only_data.push(*segment);
        }
    }
    assert!(damaged > 40 && only_data.len() > 2, "{only_data:?}");
    let arguments: [&dyn AsRef<std::ffi::OsStr>; 6] = [
        &"--from",
        &from,
        &"--to",
        &fresh.root(),
        &"--stubs",
        &"--json",
    ];
    let made = json(&run(&arguments), 0);
    assert_eq!(made["losses_total"], 0, "{made}");
    assert_eq!(assert_stubs(&old.source(), &fresh.root()), 4);

    // The volumes that hold nothing but data are far away.
    let partial = old.disk.outside("partial");
    std::fs::create_dir(&partial).unwrap();
    for (segment, _) in &old.log.sealed {
        if !only_data.contains(segment) {
            std::fs::copy(
                old.disk.outside("segments").join(segment.file_name()),
                partial.join(segment.file_name()),
            )
            .unwrap();
        }
    }
    let listed = json(
        &run(&[&"--from", &partial, &"--list", &"--stubs", &"--json"]),
        0,
    );
    assert_eq!(
        listed["missing_segments"].as_array().unwrap().len(),
        only_data.len()
    );
    let fresh = Mounted::new("ext4");
    let to = fresh.root();
    status(&run(&[&"--from", &partial, &"--to", &to, &"--stubs"]), 0);
    assert_eq!(assert_stubs(&old.source(), &to), 4);
    // Content cannot be had that way, and a segment with transactions is asked for.
    let refused = run(&[&"--from", &partial, &"--list"]);
    assert!(status(&refused, 2).contains("needed and on none"));
    let with_names = old.log.sealed.iter().map(|(segment, _)| *segment);
    let needed = with_names
        .filter(|segment| !only_data.contains(segment))
        .nth(1)
        .unwrap();
    std::fs::remove_file(partial.join(needed.file_name())).unwrap();
    let refused = status(&run(&[&"--from", &partial, &"--list", &"--stubs"]), 2);
    assert!(refused.contains("needed and on none"), "{refused}");
}

/// A log with three versions of one file.
fn three_versions(segments: &Path) -> (LogWriter, [Lsn; 3]) {
    let mut log = LogWriter::new(segments);
    let root = log.file();
    log.commit(vec![
        LogWriter::filesystem(),
        Op::Inode(plain(Kind::Directory, root)),
    ]);
    let file = log.file();
    let mut first = vec![
        Op::Inode(plain(Kind::Regular, file)),
        link(FileId::ROOT, b"file", file),
    ];
    let lsns = [1_u8, 2, 3].map(|round| {
        let bytes = vec![round; usize::from(round) * 100_000];
        let mut ops = std::mem::take(&mut first);
        ops.extend(log.content(file, bytes.len() as u64, &[(0, &bytes)]));
        log.commit(ops)
    });
    let mut inode = plain(Kind::Regular, file);
    inode.mode = 0o600;
    log.commit(vec![Op::Inode(inode)]);
    log.seal();
    (log, lsns)
}

#[test]
fn until_gives_the_stub_of_that_version() {
    let fresh = Mounted::sized("ext4", 64 << 20);
    let from = fresh.outside("segments");
    let (_, lsns) = three_versions(&from);
    let to = fresh.root();
    for (lsn, size) in lsns.into_iter().zip([100_000, 200_000, 300_000]) {
        let until = lsn.to_string();
        status(
            &run(&[
                &"--from", &from, &"--to", &to, &"--stubs", &"--until", &until,
            ]),
            0,
        );
        let mark = mark_of(&to.join("file")).unwrap();
        assert_eq!((mark.version, mark.size), (lsn, size));
        assert_eq!(to.join("file").metadata().unwrap().len(), size);
        status(
            &run(&[
                &"--from",
                &from,
                &"--to",
                &to,
                &"--verify",
                &"--until",
                &until,
            ]),
            0,
        );
        if lsn != lsns[2] {
            // A stub of another version is a difference, told without reading it.
            let other = json(
                &run(&[&"--from", &from, &"--to", &to, &"--verify", &"--json"]),
                1,
            );
            let text = other.to_string();
            assert!(text.contains("stub that does not match"), "{text}");
            assert!(text.contains("version of transaction"), "{text}");
            assert!(!text.contains("content differs"), "{text}");
        }
        std::fs::remove_file(to.join("file")).unwrap();
    }
    // The attributes that changed since are those of the end, the version is not theirs.
    status(&run(&[&"--from", &from, &"--to", &to, &"--stubs"]), 0);
    assert_eq!(mark_of(&to.join("file")).unwrap().version, lsns[2]);
    assert_eq!(to.join("file").metadata().unwrap().mode() & 0o7777, 0o600);
}

#[test]
fn verifying_names_each_wrong_mark() {
    let fresh = Mounted::sized("ext4", 64 << 20);
    let from = fresh.outside("segments");
    let mut log = LogWriter::new(&from);
    let root = log.file();
    let mut ops = vec![
        LogWriter::filesystem(),
        Op::Inode(plain(Kind::Directory, root)),
    ];
    for name in ["good", "copied", "torn", "cut", "dated", "empty"] {
        let file = log.file();
        ops.extend([
            Op::Inode(plain(Kind::Regular, file)),
            link(FileId::ROOT, name.as_bytes(), file),
        ]);
        if name != "empty" {
            ops.extend(log.content(file, 70_000, &[(0, &vec![7; 70_000])]));
        }
    }
    log.commit(ops);
    log.seal();
    let to = fresh.root();
    let verify = |code: i32| {
        let arguments: [&dyn AsRef<std::ffi::OsStr>; 6] =
            [&"--from", &from, &"--to", &to, &"--verify", &"--json"];
        json(&run(&arguments), code)
    };
    status(&run(&[&"--from", &from, &"--to", &to, &"--stubs"]), 0);
    assert_eq!(verify(0)["released"], 5);
    let text = status(&run(&[&"--from", &from, &"--to", &to, &"--verify"]), 0);
    assert!(text.contains("5 files are released"), "{text}");

    let good = mark_of(&to.join("good")).unwrap().to_bytes();
    let set = |name: &str, bytes: &[u8]| {
        let file = std::fs::File::open(to.join(name)).unwrap();
        let inode = Inode::Open(file.as_fd());
        inode.set_xattr(b"trusted.hsm", bytes).unwrap();
    };
    set("copied", &good);
    set("torn", b"\xff no mark");
    set("empty", &good);
    set(".", &good);
    let cut = std::fs::File::options()
        .write(true)
        .open(to.join("cut"))
        .unwrap();
    cut.set_len(100).unwrap();
    for name in ["cut", "dated"] {
        let file = std::fs::File::open(to.join(name)).unwrap();
        let mut time = plain(Kind::Regular, FileId::ROOT).mtime;
        time.seconds += i64::from(name == "dated");
        sys::set_mtime(&file, time).unwrap();
    }
    let found = verify(1);
    let told: BTreeMap<&str, &str> = found["differences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|loss| {
            (
                loss["path"].as_str().unwrap(),
                loss["why"].as_str().unwrap(),
            )
        })
        .collect();
    let names: Vec<&str> = told.keys().copied().collect();
    assert_eq!(names, ["", "copied", "cut", "dated", "empty", "torn"]);
    assert!(told["copied"].contains("another inode"), "{found}");
    assert!(told["torn"].contains("cannot be read"), "{found}");
    assert!(told["cut"].contains("100 bytes long"), "{found}");
    assert!(told["dated"].contains("mtime"), "{found}");
    assert!(told["empty"].contains("no content"), "{found}");
    assert!(told[""].contains("no regular file"), "{found}");
    // Its mark is right, its time is not: it is a stub for all that.
    assert_eq!(found["released"], 2, "{found}");
    assert_eq!(found["bytes"], 0, "nothing was read: {found}");
}

/// Kills the program as soon as it has made, or changed, what is at `path`; false where it came to its end.
fn killed(mut child: Child, path: &Path) -> bool {
    let look = || {
        let meta = path.symlink_metadata().ok()?;
        Some((meta.ino(), meta.ctime(), meta.ctime_nsec()))
    };
    let before = look();
    let running = loop {
        if look() != before {
            break true;
        }
        if child.try_wait().unwrap().is_some() {
            break false;
        }
    };
    child.kill().unwrap();
    child.wait().unwrap();
    running
}

fn begin(from: &Path, to: &Path, more: &[&str]) -> Child {
    let mut command = Command::new(PROGRAM);
    command
        .arg("--from")
        .arg(from)
        .arg("--to")
        .arg(to)
        .args(more);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

fn interrupted(kind: &str, seed: usize) {
    let old = logged(kind, random(seed as u64, "dSAia"));
    let (from, source) = (old.volume(), old.source());
    let whole = ["--sync-ms", "1"];
    let mut names: Vec<PathBuf> = entries(&source)
        .iter()
        .filter(|path| path.is_file())
        .map(|path| path.strip_prefix(&source).unwrap().to_owned())
        .collect();
    // Content comes in the order of the log, which is theirs.
    names.sort();
    // What was begun, and as what it is ended.
    for (begun, ended) in [(true, true), (true, false), (false, true), (false, false)] {
        let fresh = Mounted::new(kind);
        let to = fresh.root();
        let more: &[&str] = if begun { &["--stubs"] } else { &whole };
        let mut kills = 0;
        for number in 1..=4 {
            let name = &names[number * names.len() / 8];
            kills += u32::from(killed(begin(&from, &to, more), &to.join(name)));
        }
        let complete = !to.join(".hsm-replay").exists();
        eprintln!("{kind}: killed {kills} times, complete {complete}, {begun} to {ended}");
        assert!(kills > 0, "{kind}, {begun} to {ended}");
        if complete {
            // Killed at its very last step.
            continue;
        }
        let more: &[&str] = if ended { &["--stubs"] } else { &whole };
        let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"--from", &from, &"--to", &to];
        arguments.extend(more.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
        let said = status(&run(&arguments), 0);
        assert_eq!(
            said.contains("an earlier run with"),
            begun != ended,
            "a change of mode is told: {said}"
        );
        if ended {
            assert_stubs(&source, &to);
        } else {
            assert_eq!(differences(&source, &to), Vec::<String>::new());
            assert!(entries(&to).iter().all(|path| mark_of(path).is_none()));
        }
        let verified = json(
            &run(&[&"--from", &from, &"--to", &to, &"--verify", &"--json"]),
            0,
        );
        assert_eq!(verified["released"].as_u64() > Some(0), ended, "{verified}");
    }
}

#[test]
fn killed_and_continued_in_either_mode_on_ext4() {
    interrupted("ext4", 11);
}

#[test]
fn killed_and_continued_in_either_mode_on_xfs() {
    interrupted("xfs", 12);
}

#[test]
fn killed_and_continued_in_either_mode_on_btrfs() {
    interrupted("btrfs", 13);
}

/// What a directory that has its attributes would pass on must not reach what is made in it afterwards.
fn finished_directories(kind: &str, flags: &str) {
    let old = logged(kind, |source| {
        for name in ["group", "acl", "flags"] {
            std::fs::create_dir(source.join(name)).unwrap();
            std::fs::write(source.join(name).join("file"), name).unwrap();
        }
        let at = |name: &str| fs::text(&source.join(name)).to_owned();
        fs::run("chgrp", &["7", &at("group")]);
        fs::run("chmod", &["2775", &at("group")]);
        fs::run("setfacl", &["-d", "-m", "u:99:rw", &at("acl")]);
        fs::run("chattr", &[flags, &at("flags")]);
    });
    let (from, source) = (old.volume(), old.source());
    for begun in [true, false] {
        let fresh = Mounted::new(kind);
        let to = fresh.root();
        let words = |stubs: bool| if stubs { "--stubs" } else { "--sync-ms=30000" };
        let made = json(
            &run(&[&"--from", &from, &"--to", &to, &words(begun), &"--json"]),
            0,
        );
        // Killed before its last step.
        std::fs::create_dir(to.join(".hsm-replay")).unwrap();
        let mut state = serde_json::json!({
            "format": 1, "log_id": made["log_id"], "at": made["at"], "path": null,
            "progress": "Directories",
        });
        if begun {
            state["mode"] = "Stubs".into();
        }
        std::fs::write(to.join(".hsm-replay/state.json"), state.to_string()).unwrap();
        let said = status(&run(&[&"--from", &from, &"--to", &to, &words(!begun)]), 0);
        assert!(said.contains("an earlier run with"), "{said}");
        if begun {
            assert_eq!(differences(&source, &to), Vec::<String>::new());
        } else {
            assert_eq!(assert_stubs(&source, &to), 3);
        }
        status(&run(&[&"--from", &from, &"--to", &to, &"--verify"]), 0);
    }
}

#[test]
fn finished_directories_pass_nothing_on_when_the_mode_changes_on_ext4() {
    finished_directories("ext4", "+dA");
}

#[test]
fn finished_directories_pass_nothing_on_when_the_mode_changes_on_btrfs() {
    finished_directories("btrfs", "+c");
}

/// A run that ended with an error is continued in the other mode: nothing of chance is in this one.
#[test]
fn a_full_disk_is_left_in_one_mode_and_continued_in_the_other() {
    let small = Mounted::sized("ext4", 48 << 20);
    let from = small.outside("segments");
    let mut log = LogWriter::new(&from);
    let root = log.file();
    log.commit(vec![
        LogWriter::filesystem(),
        Op::Inode(plain(Kind::Directory, root)),
    ]);
    for number in 0..80_u8 {
        let file = log.file();
        let bytes = vec![number; 1 << 20];
        let mut ops = vec![
            Op::Inode(plain(Kind::Regular, file)),
            link(FileId::ROOT, number.to_string().as_bytes(), file),
        ];
        ops.extend(log.content(file, bytes.len() as u64, &[(0, &bytes)]));
        log.commit(ops);
    }
    log.seal();
    let to = small.root();
    let full = status(&run(&[&"--from", &from, &"--to", &to]), 2);
    assert!(full.contains("make room"), "{full}");
    std::fs::remove_file(to.join("0")).unwrap();
    let other = status(&run(&[&"--from", &from, &"--to", &to, &"--stubs"]), 0);
    assert!(other.contains("replaced by stubs"), "{other}");
    assert!((0..80).all(|number| {
        let path = to.join(number.to_string());
        mark_of(&path).is_some() && !has_data(&path)
    }));
}

#[test]
fn what_is_no_place_for_stubs_is_refused_untouched() {
    let disk = Mounted::sized("ext4", 64 << 20);
    let from = disk.outside("segments");
    three_versions(&from);
    let refused = |to: &Path, more: &[&str], why: &str| {
        let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> =
            vec![&"--from", &from, &"--to", &to, &"--stubs"];
        arguments.extend(more.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
        let said = status(&run(&arguments), 2);
        assert!(said.contains(why), "{why}: {said}");
    };
    refused(&disk.root(), &["--path", "file"], "hsmd takes over whole");
    refused(&disk.root(), &["--verify"], "cannot be used with");
    let inside = disk.root().join("inside");
    refused(&inside, &[], "no such directory");
    assert!(!inside.exists());
    std::fs::create_dir(&inside).unwrap();
    refused(&inside, &[], "not its root");

    let over = |name: &str, arguments: &[&str]| {
        let at = disk.outside(name);
        std::fs::create_dir(&at).unwrap();
        fs::run("mount", &[arguments, &[fs::text(&at)]].concat());
        Over(at)
    };
    let bind = over("bind", &["--bind", fs::text(&inside)]);
    refused(&bind.0, &[], "only /inside");
    let tmpfs = over("tmpfs", &["-t", "tmpfs", "none"]);
    refused(&tmpfs.0, &[], "it is tmpfs");
    for name in ["upper", "work"] {
        std::fs::create_dir(tmpfs.0.join(name)).unwrap();
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        disk.root().display(),
        tmpfs.0.join("upper").display(),
        tmpfs.0.join("work").display()
    );
    let overlay = over("overlay", &["-t", "overlay", "none", "-o", &options]);
    refused(&overlay.0, &[], "it is overlay");
    drop((overlay, bind));
    std::fs::remove_dir(&inside).unwrap();

    let image = disk.outside("old-image");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(32 << 20)
        .unwrap();
    fs::run("mkfs.ext4", &["-F", "-q", "-I", "128", fs::text(&image)]);
    let old = over("old", &["-o", "loop", fs::text(&image)]);
    refused(&old.0, &[], "mkfs.ext4 -I 256");
    fs::run("mount", &["-o", "remount,ro", fs::text(&disk.root())]);
    refused(&disk.root(), &[], "mount it writable");
    fs::run("mount", &["-o", "remount,rw", fs::text(&disk.root())]);
    assert_eq!(entries(&disk.root()), Vec::<PathBuf>::new());

    // Who is not root can write there, but not set the mark.
    std::os::unix::fs::chown(disk.root(), Some(65_534), Some(65_534)).unwrap();
    for path in [disk.root(), from.clone()] {
        let open = |at: &Path| {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(at, mode).unwrap();
        };
        open(&path);
        open(path.parent().unwrap());
    }
    let program = disk.outside("replay-of-nobody");
    std::fs::copy(PROGRAM, &program).unwrap();
    let output = Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            fs::text(&program),
        ])
        .args([
            "--from",
            fs::text(&from),
            "--to",
            fs::text(&disk.root()),
            "--stubs",
        ])
        .args(["--scratch", "/tmp"])
        .output()
        .unwrap();
    let said = status(&output, 2);
    assert!(said.contains("run replay as root"), "{said}");
    assert_eq!(entries(&disk.root()), Vec::<PathBuf>::new());
}

/// A further mount, taken away when it is dropped.
struct Over(PathBuf);

impl Drop for Over {
    fn drop(&mut self) {
        let flags = nix::mount::MntFlags::MNT_DETACH;
        if let Err(error) = nix::mount::umount2(&self.0, flags) {
            eprintln!("{} stays mounted: {error}", self.0.display());
        }
    }
}
