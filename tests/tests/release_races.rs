//! Releases race whoever opens, reads and replaces the files: at every moment each reads as it should.
//!
//! Some moments are too short to be hit by chance: there strace holds the worker up before or after the calls
//! between which they lie.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::Kind;
use hsm_tests::program::Ran;
use hsm_tests::report::say;
use hsm_tests::strace::Tracer;
use hsm_tests::stubs::{assert_reads, is_marked, kib_on_disk, release_soon, wait_whole};
use hsm_tests::system::Setup;
use hsm_tests::waiting::{Ends, text};
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

/// What has not happened by then never does.
const LIMIT: Duration = Duration::from_mins(1);
const BYTES: usize = 5000;
/// How long strace holds a call up.
const DELAY: &str = "delay_enter=250000";

/// How many files were released, as tierctl says.
fn released(ran: &Ran) -> usize {
    assert!(matches!(ran.code, 0 | 1 | 3), "{ran}");
    let first = ran.stdout.split(' ').next().unwrap_or_default();
    first.parse().unwrap_or(0)
}

/// What wrong bytes are.
fn told(found: &[u8]) -> &'static str {
    if found.iter().all(|byte| *byte == 0) {
        "zeros, or nothing"
    } else {
        "other bytes"
    }
}

// ---- openers ----------------------------------------------------------------------------------------

const FILES: usize = 300;
const READERS: usize = 4;
const RACE: Duration = Duration::from_secs(4);

fn openers_race_releases(kind: Kind, settings: &[(&str, &str)]) {
    let mut setup = Setup::new(kind).exposed();
    for (key, value) in settings {
        setup = setup.with(key, value);
    }
    let system = setup.start();
    let dir = system.at("dir");
    fs::create_dir(&dir).expect("a directory");
    let paths: Vec<PathBuf> = (0..FILES).map(|n| dir.join(n.to_string())).collect();
    let contents: Vec<Vec<u8>> = (0..FILES).map(|n| noise(n as u64, BYTES)).collect();
    for (path, content) in paths.iter().zip(&contents) {
        fs::write(path, content).expect("written");
    }
    system.sync_all();
    let (over, opened) = (AtomicBool::new(false), AtomicUsize::new(0));
    let released = thread::scope(|scope| {
        let ends = Ends(&over);
        for reader in 0..READERS {
            let (paths, contents, over, opened) = (&paths, &contents, &over, &opened);
            scope.spawn(move || {
                let mut number = reader * 7;
                while !over.load(Ordering::Relaxed) {
                    number = (number + 89) % FILES;
                    let found = fs::read(&paths[number]).expect("read");
                    assert!(found == contents[number], "file {number}: {}", told(&found));
                    opened.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let begun = Instant::now();
        let (mut all, mut before) = (0, 0);
        while begun.elapsed() < RACE || all < FILES {
            assert!(begun.elapsed() < LIMIT, "only {all} files were released");
            let ran = system.tierctl(&["release", "-r", text(&dir)]);
            all += released(&ran);
            // Whoever found other bytes has ended.
            let now = opened.load(Ordering::Relaxed);
            assert!(now > before, "nobody reads any more");
            before = now;
        }
        drop(ends);
        all
    });
    let opened = opened.into_inner();
    say(format_args!("{kind}: {released} releases, {opened} opened"));
    assert!(opened > 2000, "only {opened} were opened");
    for (path, content) in paths.iter().zip(&contents) {
        assert_reads(path, content, "afterwards");
    }
}

#[test]
fn who_opens_while_it_is_released_never_reads_zeros() {
    openers_race_releases(Kind::Xfs, &[]);
}

#[test]
fn who_opens_where_every_file_is_asked_about_never_reads_zeros() {
    openers_race_releases(Kind::Ext4, &[("stub_marks_max", "0")]);
}

/// Where every file is asked about, whole ones are ignored when they have been opened once. Such an opener comes
/// when release has begun with the file, and is gone before it looks whether somebody is there.
#[test]
fn who_has_a_file_ignored_while_it_is_released_hides_nothing() {
    let setup = Setup::new(Kind::Ext4).with("stub_marks_max", "0");
    let system = setup.exposed().start();
    let (path, other) = (system.at("file"), system.at("other"));
    let content = noise(1, BYTES);
    for path in [&path, &other] {
        fs::write(path, &content).expect("written");
    }
    system.sync_all();
    // From here on every file is asked about.
    release_soon(&system, &other);
    let mut done = 0;
    let end = Instant::now() + LIMIT;
    while done < 3 {
        assert!(Instant::now() < end, "released {done} times");
        // Whether it has a mark already.
        let tracer = Tracer::on(system.process("worker"), "fgetxattr", DELAY);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let ends = Ends(&over);
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    assert!(fs::read(&path).expect("read") == content, "other bytes");
                    thread::sleep(Duration::from_millis(30));
                }
            });
            let ran = system.tierctl(&["release", text(&path)]);
            done += released(&ran);
            thread::sleep(Duration::from_millis(100));
            drop(ends);
        });
        drop(tracer);
        assert_reads(&path, &content, "afterwards");
        wait_whole(&path);
        system.sync_all();
    }
}

// ---- leases -----------------------------------------------------------------------------------------

/// Whether somebody has a write lease on a file, and nobody waits for it yet.
fn is_leased(path: &Path) -> bool {
    let meta = fs::metadata(path).expect("the file");
    let (major, minor) = (libc::major(meta.dev()), libc::minor(meta.dev()));
    let inode = format!(" {major:02x}:{minor:02x}:{} ", meta.ino());
    let locks = fs::read_to_string("/proc/locks").expect("locks");
    let mut lines = locks.lines();
    let is_ours = ["LEASE", "ACTIVE", "WRITE", &inode];
    lines.any(|line| is_ours.iter().all(|word| line.contains(word)))
}

fn wait_for_lease(path: &Path, leased: bool) {
    let end = Instant::now() + LIMIT;
    while is_leased(path) != leased {
        assert!(Instant::now() < end, "leased: never {leased}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Somebody opens a file while release has a lease on it, the first or the second time: the lease is being broken
/// from then on, and would be gone after a time though release never let go of it. So release lets go of the
/// file.
#[test]
fn who_comes_while_release_has_its_lease_keeps_the_file() {
    let system = Setup::new(Kind::Ext4).exposed().start();
    let worker = system.process("worker");
    let content = noise(1, 300_000);
    let paths = ["first", "second"].map(|name| system.at(name));
    for path in &paths {
        fs::write(path, &content).expect("written");
    }
    system.sync_all();
    for (pass, path) in paths.iter().enumerate() {
        let tracer = Tracer::on(worker, "statx,syncfs", DELAY);
        let (ran, file) = thread::scope(|scope| {
            let release = scope.spawn(|| system.tierctl(&["release", text(path)]));
            wait_for_lease(path, true);
            for _ in 0..pass {
                assert!(!is_marked(path), "it is marked under the first lease only");
                wait_for_lease(path, false);
                assert!(is_marked(path), "it has its mark");
                wait_for_lease(path, true);
            }
            // Waits for the lease.
            let file = File::open(path).expect("opened");
            (release.join().expect("it ends"), file)
        });
        drop(tracer);
        let ran = ran.with_code(1);
        assert!(ran.text().contains("it is open"), "pass {pass}: {ran}");
        assert!(kib_on_disk(path) >= 292, "it was punched");
        drop(file);
        assert_reads(path, &content, "who came meanwhile");
        wait_whole(path);
    }
    assert_eq!(system.process("worker"), worker, "a signal ended it");
    for path in &paths {
        release_soon(&system, path);
        assert_reads(path, &content, "afterwards");
    }
}

/// Somebody opens a file when release has seen that nobody is there, and before it is punched: he waits for the
/// lease, and is asked about all the same.
#[test]
fn who_comes_right_before_the_punch_waits_for_the_recall() {
    let system = Setup::new(Kind::Ext4).exposed().start();
    let path = system.at("file");
    let content = noise(1, 300_000);
    fs::write(&path, &content).expect("written");
    system.sync_all();
    for _ in 0..3 {
        let tracer = Tracer::on(system.process("worker"), "fallocate", DELAY);
        thread::scope(|scope| {
            let release = scope.spawn(|| system.tierctl(&["release", text(&path)]));
            let mut since = None;
            // The first lease is short.
            while since.is_none_or(|since: Instant| since.elapsed() < Duration::from_millis(60)) {
                since = is_leased(&path).then(|| since.unwrap_or_else(Instant::now));
                assert!(!release.is_finished(), "released too soon");
            }
            let found = fs::read(&path).expect("read");
            assert!(found == content, "{}", told(&found));
            let ran = release.join().expect("it ends");
            assert_eq!(released(&ran), 1, "{ran}");
        });
        drop(tracer);
        wait_whole(&path);
        system.sync_all();
    }
}

// ---- editors ----------------------------------------------------------------------------------------

/// Something else comes to have the name of a file that is being released, between the looks at the file and the
/// punch: what was looked at is punched, not what has its name.
fn replaced_while_it_is_released(replace: impl Fn(&Path, &Path) -> PathBuf, releases: bool) {
    let system = Setup::new(Kind::Ext4).exposed().start();
    let (dir, new) = (system.at("dir"), system.at("new"));
    let content = |round: u64| noise(round, 100_000);
    for dir in [&dir, &new] {
        fs::create_dir(dir).expect("a directory");
    }
    let path = dir.join("file");
    fs::write(&path, content(0)).expect("written");
    let (mut round, mut hits) = (0, 0);
    while hits < 3 {
        assert!(round < 20, "{hits} times at the right moment");
        system.sync_all();
        fs::write(new.join("file"), content(round + 1)).expect("written");
        let tracer = Tracer::on(system.process("worker"), "syncfs", DELAY);
        let (ran, kept) = thread::scope(|scope| {
            let release = scope.spawn(|| system.tierctl(&["release", text(&path)]));
            let end = Instant::now() + LIMIT;
            while !is_marked(&path) && !release.is_finished() {
                assert!(Instant::now() < end, "it never has its mark");
                thread::sleep(Duration::from_millis(1));
            }
            let kept = replace(&dir, &new);
            (release.join().expect("it ends"), kept)
        });
        drop(tracer);
        // Where the machine is slow it may come too late.
        hits += u32::from(released(&ran) == usize::from(releases));
        assert!(!is_marked(&path), "what is new is marked");
        assert!(kib_on_disk(&path) >= 96, "what is new is punched");
        assert!(
            fs::read(&path).expect("read") == content(round + 1),
            "round {round}"
        );
        assert_reads(&kept, &content(round), "what was there before");
        fs::remove_file(&kept).expect("removed");
        round += 1;
    }
    system.check("what was replaced");
}

/// An editor saves a new file over the name. That changes the old one, too, and it is not released.
#[test]
fn what_is_saved_over_a_file_while_it_is_released_stays_whole() {
    let replace = |dir: &Path, new: &Path| {
        let kept = dir.with_file_name("kept");
        fs::hard_link(dir.join("file"), &kept).expect("linked");
        fs::rename(new.join("file"), dir.join("file")).expect("saved");
        kept
    };
    replaced_while_it_is_released(replace, false);
}

/// Its directory is exchanged for another: nothing of the file itself changes.
#[test]
fn what_lies_in_a_new_directory_while_another_is_released_stays_whole() {
    let replace = |dir: &Path, new: &Path| {
        let flags = RenameFlags::RENAME_EXCHANGE;
        renameat2(AT_FDCWD, dir, AT_FDCWD, new, flags).expect("exchanged");
        new.join("file")
    };
    replaced_while_it_is_released(replace, true);
}
