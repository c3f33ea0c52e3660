//! Recall when a copy is away, damaged, or has no room to go to; and when a crowd waits for it.
//!
//! Who opens a stub gets its bytes or an error that is named, never zeros; the stub stays whole; who does
//! not ask for it is not disturbed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::{Kind, must};
use hsm_tests::stubs::{assert_reads, is_marked, kib_on_disk, release, wait_whole};
use hsm_tests::sys::{IMMUTABLE_FL, change_flags};
use hsm_tests::system::{Setup, System};

const BYTES: usize = 300_001;

/// Everything is on the volumes and nothing of it in the spool, which a stop sees to soonest.
fn spool_empties(system: &mut System) {
    system.sync_all();
    system.restart();
    let _ = system.wait_for("the spool is empty", |status| {
        status["spool"]["segments"] == 0 && status["spool"]["open_segment"].is_null()
    });
}

/// The volumes of a pool out of reach, until this is given to [`bring_back`].
fn take_away(system: &System, pool: usize) -> Vec<(PathBuf, PathBuf)> {
    let moved = system.volumes(pool).into_iter().map(|volume| {
        let away = volume.with_extension("away");
        fs::rename(&volume, &away).expect("to take it away");
        (volume, away)
    });
    moved.collect()
}

fn bring_back(moved: Vec<(PathBuf, PathBuf)>) {
    for (volume, away) in moved {
        fs::rename(away, volume).expect("to bring it back");
    }
}

fn journal(system: &System) -> String {
    fs::read_to_string(system.home().at("hsmd.err")).unwrap_or_default()
}

/// Reads a file, which must fail; gives the error and how long it took.
fn fails(path: &Path) -> (i32, Duration) {
    let since = Instant::now();
    let error = fs::read(path)
        .map(drop)
        .expect_err("there is no copy of it");
    (error.raw_os_error().unwrap_or(0), since.elapsed())
}

fn no_copy_within_reach(kind: Kind) {
    let mut system = Setup::new(kind)
        .exposed()
        .with("recall_wait", "\"2s\"")
        .start();
    let (path, other) = (system.at("file"), system.at("other"));
    for (seed, path) in [&path, &other].into_iter().enumerate() {
        fs::write(path, noise(seed as u64, BYTES)).expect("written");
    }
    fs::write(system.at("whole"), b"whole").expect("written");
    spool_empties(&mut system);
    release(&system, &path);
    release(&system, &other);
    let moved = take_away(&system, 0);
    let volume = moved[0].0.display().to_string();
    thread::scope(|scope| {
        let opener = scope.spawn(|| fails(&path));
        // Meanwhile it says what it waits for, and others go on.
        let status = system.wait_for("the recall is named", |status| {
            status["notices"]
                .to_string()
                .contains(&path.display().to_string())
        });
        let said = status["notices"].to_string();
        assert!(said.contains(&volume), "{said}");
        assert_eq!(fs::read(system.at("whole")).expect("read"), b"whole");
        fs::write(system.at("new"), b"new").expect("written");
        let (errno, took) = opener.join().expect("it ends");
        assert_eq!(errno, libc::EIO, "{kind}");
        let limits = Duration::from_millis(1500)..Duration::from_secs(8);
        assert!(limits.contains(&took), "{kind}: after {took:?}");
    });
    let (errno, _) = fails(&other);
    assert_eq!(errno, libc::EIO, "{kind}");
    for path in [&path, &other] {
        assert!(is_marked(path), "{kind}: it stays a stub");
        assert!(kib_on_disk(path) <= 4, "{kind}: {}", kib_on_disk(path));
    }
    let said = journal(&system);
    assert!(said.contains(&path.display().to_string()), "{said}");
    assert!(said.contains("which is not here"), "{said}");
    // It comes while somebody waits.
    thread::scope(|scope| {
        let opener = scope.spawn(|| assert_reads(&path, &noise(0, BYTES), "came back"));
        thread::sleep(Duration::from_millis(700));
        bring_back(moved);
        opener.join().expect("right bytes");
    });
    assert_reads(&other, &noise(1, BYTES), "the next open");
    system.wait_for("nothing is amiss any more", |status| {
        !status["notices"].to_string().contains("recall")
    });
    system.check(&format!("{kind}: after the volume was away"));
}

/// What a recalled file in use is compared with after a restart of the worker are the catalog's hashes.
#[test]
fn a_file_that_is_all_there_needs_no_volume() {
    let mut system = Setup::new(Kind::Ext4)
        .exposed()
        .with("recall_wait", "\"1s\"")
        .start();
    let path = system.at("file");
    let bytes = noise(7, BYTES + 777);
    fs::write(&path, &bytes).expect("written");
    spool_empties(&mut system);
    release(&system, &path);
    let user = fs::File::open(&path).expect("recalled");
    assert!(is_marked(&path), "it is in use, and was finished");
    let moved = take_away(&system, 0);
    system.kill_process("worker");
    assert_eq!(fs::read(&path).expect("no volume is needed"), bytes);
    drop(user);
    wait_whole(&path);
    bring_back(moved);
    system.check("a file in use over a restart while its volume is away");
}

#[test]
fn who_waits_for_a_volume_waits_so_long_on_ext4() {
    no_copy_within_reach(Kind::Ext4);
}

#[test]
fn who_waits_for_a_volume_waits_so_long_on_xfs() {
    no_copy_within_reach(Kind::Xfs);
}

#[test]
fn who_waits_for_a_volume_waits_so_long_on_btrfs() {
    no_copy_within_reach(Kind::Btrfs);
}

/// The volume goes in the very moment after its place was looked up: the opener waits for it like any.
#[test]
fn a_volume_that_just_went_is_waited_for() {
    let mut system = Setup::new(Kind::Ext4).exposed().start();
    let (path, other) = (system.at("file"), system.at("other"));
    for (seed, path) in [&path, &other].into_iter().enumerate() {
        fs::write(path, noise(seed as u64, 3_000_000)).expect("written");
    }
    spool_empties(&mut system);
    release(&system, &path);
    release(&system, &other);
    assert_reads(&other, &noise(1, 3_000_000), "while the volume is there");
    let moved = take_away(&system, 0);
    thread::scope(|scope| {
        let opener = scope.spawn(|| assert_reads(&path, &noise(0, 3_000_000), "came back"));
        thread::sleep(Duration::from_millis(1500));
        bring_back(moved);
        opener.join().expect("right bytes");
    });
}

/// The sealed segments of a volume.
fn segments(volume: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(volume).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(segments(&path));
        } else if path.to_string_lossy().ends_with(".hsm.zst") {
            found.push(path);
        }
    }
    found
}

/// Flips a bit of each 256 KiB of every segment of a volume.
fn damage(volume: &Path) {
    for path in segments(volume) {
        let file = File::open(&path).expect("a segment");
        change_flags(&file, 0, IMMUTABLE_FL).expect("chattr -i");
        must(Command::new("chmod").arg("u+w").arg(&path));
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .expect("a segment");
        let len = file.metadata().expect("its size").len();
        for at in (1000..len).step_by(256 << 10) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("read");
            file.write_all_at(&[byte[0] ^ 4], at).expect("written");
        }
    }
}

#[test]
fn a_damaged_copy_is_replaced_by_the_other_pools() {
    let mut system = Setup::new(Kind::Ext4).exposed().pools(2).start();
    let files: Vec<PathBuf> = (0..6).map(|n| system.at(format!("f{n}"))).collect();
    for (seed, path) in files.iter().enumerate() {
        fs::write(path, noise(seed as u64, 1_500_000)).expect("written");
    }
    spool_empties(&mut system);
    for path in &files {
        release(&system, path);
    }
    damage(&system.volumes(0)[0]);
    for (seed, path) in files.iter().enumerate() {
        assert_reads(path, &noise(seed as u64, 1_500_000), "one copy is damaged");
    }
    // It is no copy any more, and that is said.
    let volume = system.volumes(0)[0].display().to_string();
    system.wait_for("the damage is known", |status| {
        let notices = status["notices"].to_string();
        notices.contains("damaged") && notices.contains(&volume)
    });
    let said = journal(&system);
    assert!(said.contains("a copy is damaged"), "{said}");
    wait_whole(&files[0]);
    system.sync(&[]);
    hsm_tests::stubs::refused(&system, &files[0], "pool");
}

/// What lies on a medium that does not answer holds up nobody who wants something else, and who wants it waits
/// so long and no longer.
#[test]
fn a_medium_that_does_not_answer_holds_up_nobody_else() {
    let mut system = Setup::new(Kind::Ext4)
        .exposed()
        .with("recall_wait", "\"6s\"")
        .with("recall_threads", "1")
        .start();
    let (path, other) = (system.at("file"), system.at("other"));
    fs::write(&path, noise(1, BYTES)).expect("written");
    spool_empties(&mut system);
    let hang: Vec<PathBuf> = segments(&system.volumes(0)[0]);
    fs::write(&other, noise(2, BYTES)).expect("written");
    spool_empties(&mut system);
    release(&system, &path);
    release(&system, &other);
    let [worker] = system.processes("worker")[..] else {
        panic!("one worker");
    };
    let mut strace = Command::new("strace");
    strace.args(["-f", "-o", "/dev/null", "-p", &worker.to_string()]);
    for segment in &hang {
        strace.arg("-P").arg(segment);
    }
    strace.args([
        "-e",
        "trace=pread64",
        "-e",
        "inject=pread64:delay_enter=25s",
    ]);
    let mut strace = strace.stderr(Stdio::null()).spawn().expect("strace");
    thread::sleep(Duration::from_secs(1));
    thread::scope(|scope| {
        let opener = scope.spawn(|| fails(&path));
        thread::sleep(Duration::from_secs(1));
        let since = Instant::now();
        assert_reads(&other, &noise(2, BYTES), "on another medium");
        assert!(since.elapsed() < Duration::from_secs(10), "it was held up");
        let (errno, took) = opener.join().expect("it ends");
        assert_eq!(errno, libc::EIO);
        let limits = Duration::from_secs(5)..Duration::from_secs(15);
        assert!(limits.contains(&took), "after {took:?}");
    });
    assert!(is_marked(&path), "it stays a stub");
    must(Command::new("kill").args(["-INT", &strace.id().to_string()]));
    let _ = strace.wait();
    assert_reads(&path, &noise(1, BYTES), "it answers again");
    system.check("after a medium did not answer");
}

#[test]
fn what_is_damaged_everywhere_is_an_error_that_names_it() {
    let mut system = Setup::new(Kind::Ext4).exposed().pools(2).start();
    let path = system.at("file");
    fs::write(&path, noise(1, 3_000_000)).expect("written");
    fs::write(system.at("whole"), b"whole").expect("written");
    spool_empties(&mut system);
    release(&system, &path);
    for pool in 0..2 {
        damage(&system.volumes(pool)[0]);
    }
    let (errno, took) = fails(&path);
    assert_eq!(errno, libc::EIO);
    assert!(took < Duration::from_secs(10), "after {took:?}");
    assert!(
        is_marked(&path) && kib_on_disk(&path) <= 4,
        "{}",
        kib_on_disk(&path)
    );
    let notices = system.status()["notices"].to_string();
    assert!(notices.contains(path.to_str().expect("ASCII")), "{notices}");
    assert!(
        notices.contains(".hsm.zst"),
        "it names the segment: {notices}"
    );
    assert_eq!(fs::read(system.at("whole")).expect("read"), b"whole");
    let ran = system.tierctl(&["recall", "--wait", path.to_str().expect("ASCII")]);
    assert!(ran.code != 0, "{ran}");
    // Nobody is told that such a file comes back, or that one on the disk alone is in the log.
    let whole = system.at("whole");
    let asked = [
        "state",
        "--json",
        path.to_str().expect("ASCII"),
        whole.to_str().expect("ASCII"),
    ];
    let _ = system.wait_for("damage is known", |_| {
        let ran = system.tierctl(&asked);
        let states = ran.json()["states"].clone();
        ran.code == 1
            && states[0]["state"] == "lost"
            && states[0]["nowhere_bytes"] == 3_000_000
            && states[0]["pending"].is_null()
            && states[1]["state"] == "logged"
            && states[1]["nowhere_bytes"] == 5
    });
    // What is lost is not logged as something else: neither as zeros nor as gone.
    system.sync(&["--sweep"]);
    let lsn = system.status()["durable_lsn"].clone();
    system.sync(&["--sweep"]);
    assert_eq!(lsn, system.status()["durable_lsn"], "it comes to rest");
    let shown = system
        .tierctl(&["log", "list", "--json", path.to_str().expect("ASCII")])
        .done();
    let versions = shown.json()["list"].as_array().map_or(0, Vec::len);
    assert_eq!(versions, 1, "{shown}");
}

/// Fills a filesystem to the last block.
fn fill_up(path: &Path) {
    let Ok(file) = File::create(path) else {
        return;
    };
    let (mut at, mut step) = (0, 1 << 20);
    while step >= 512 {
        match file.write_at(&noise(at, step), at) {
            Ok(written) => at += written as u64,
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => step /= 2,
            Err(error) => panic!("{error}"),
        }
    }
    let _ = file.sync_all();
}

fn no_room(kind: Kind) {
    let system = Setup::new(kind).exposed().start();
    let (small, large) = (system.at("small"), system.at("large"));
    fs::write(&small, noise(1, 900_000)).expect("written");
    fs::write(&large, noise(2, 60_000_000)).expect("written");
    system.sync_all();
    release(&system, &small);
    release(&system, &large);
    for round in 0..2 {
        // A pause lets the daemon give back what it reserved.
        fill_up(&system.at(format!("filler{round}")));
        system.sync(&[]);
        fill_up(&system.at(format!("filler{round} again")));
    }
    for path in [&large, &small] {
        let (errno, took) = fails(path);
        assert_eq!(errno, libc::ENOSPC, "{kind}: {}", path.display());
        assert!(took < Duration::from_secs(10), "{kind}: after {took:?}");
        assert!(is_marked(path), "{kind}: it stays a stub");
        assert!(kib_on_disk(path) <= 4, "{kind}: {} KiB", kib_on_disk(path));
    }
    let notices = system.status()["notices"].to_string();
    assert!(notices.contains("2 released files"), "{kind}: {notices}");
    for round in 0..2 {
        for name in [format!("filler{round}"), format!("filler{round} again")] {
            let _ = fs::remove_file(system.at(name));
        }
    }
    // btrfs gives deleted space back with the next transaction.
    system.sync(&[]);
    assert_reads(&small, &noise(1, 900_000), "there is room");
    assert_reads(&large, &noise(2, 60_000_000), "there is room");
    system.check(&format!("{kind}: after a full disk"));
}

#[test]
fn a_full_disk_leaves_the_stub_whole_on_ext4() {
    no_room(Kind::Ext4);
}

#[test]
fn a_full_disk_leaves_the_stub_whole_on_xfs() {
    no_room(Kind::Xfs);
}

#[test]
fn a_full_disk_leaves_the_stub_whole_on_btrfs() {
    no_room(Kind::Btrfs);
}

// ---- a crowd ----------------------------------------------------------------------------------------

fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// A program that compares a file with what it should be; it waits in open(2).
fn reader(path: &Path, expected: &Path) -> Child {
    Command::new("cmp")
        .arg("-s")
        .arg(path)
        .arg(expected)
        .stdin(Stdio::null())
        .spawn()
        .expect("cmp")
}

#[test]
fn a_crowd_waits_and_some_of_it_is_killed() {
    const FILES: usize = 100;
    const CROWD: usize = 1000;
    let mut system = Setup::new(Kind::Ext4).exposed().start();
    let expected = system.home().dir("expected");
    let mut paths = Vec::new();
    for number in 0..FILES {
        let (path, copy) = (
            system.at(format!("f{number}")),
            expected.join(number.to_string()),
        );
        fs::write(&path, noise(number as u64, 20_000)).expect("written");
        fs::write(&copy, noise(number as u64, 20_000)).expect("written");
        paths.push((path, copy));
    }
    spool_empties(&mut system);
    let root = system.root().to_str().expect("ASCII").to_owned();
    let _ = system.tierctl(&["release", "-r", &root]).done();
    assert!(is_marked(&paths[0].0) && is_marked(&paths[FILES - 1].0));
    fs::write(system.at("whole"), b"whole").expect("written");
    let guard = system.processes("guard")[0];
    let worker = system.processes("worker")[0];
    let before = descriptors(guard);
    let moved = take_away(&system, 0);
    let mut crowd: Vec<Child> = (0..CROWD)
        .map(|number| {
            let (path, copy) = &paths[number % FILES];
            reader(path, copy)
        })
        .collect();
    system.wait_for("all wait", |_| descriptors(guard) >= before + CROWD);
    // Others are not disturbed.
    let since = Instant::now();
    fs::write(system.at("whole"), b"whole still").expect("written");
    assert_eq!(fs::read(system.at("whole")).expect("read"), b"whole still");
    let took = since.elapsed();
    assert!(took < Duration::from_secs(3), "after {took:?}");
    system.sync(&[]);
    // Every third is killed while it waits.
    let mut killed = Vec::new();
    for number in (0..CROWD).step_by(3) {
        crowd[number].kill().expect("killed");
        let status = crowd[number].wait().expect("gone");
        assert!(status.code().is_none(), "it did not wait: {status}");
        killed.push(number);
    }
    bring_back(moved);
    for (number, child) in crowd.iter_mut().enumerate() {
        if killed.binary_search(&number).is_err() {
            let status = child.wait().expect("it ends");
            assert!(status.success(), "opener {number}: {status}");
        }
    }
    for (path, _) in &paths {
        wait_whole(path);
    }
    let end = Instant::now() + Duration::from_secs(20);
    while descriptors(guard) > before {
        assert!(
            Instant::now() < end,
            "the guard has {} descriptors, had {before}",
            descriptors(guard)
        );
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(
        system.processes("guard"),
        vec![guard],
        "it is the same guard"
    );
    assert_eq!(
        system.processes("worker"),
        vec![worker],
        "it is the same worker"
    );
    system.check("after the crowd");
}
