//! The guard and the worker when too much is asked of them: nobody reads zeros, nobody else waits, and all is
//! well afterwards.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::Kind;
use hsm_tests::strace::Tracer;
use hsm_tests::stubs::{is_for_later, is_marked};
use hsm_tests::sys;
use hsm_tests::system::{Setup, System};
use hsm_tests::waiting::{held_threads, threads_wait};
use nix::sys::signal::Signal;
use nix::unistd::gettid;

/// What is not answered by then never is.
const LIMIT: Duration = Duration::from_mins(2);
/// How long the kernel makes an opener wait for a lease.
const STALL: Duration = Duration::from_secs(45);
/// Bytes of each file of a crowd.
const BYTES: usize = 5000;

/// Released files, whose bytes are `noise` of their numbers.
fn released(system: &System, count: usize) -> Vec<PathBuf> {
    let dir = system.at("released");
    fs::create_dir(&dir).expect("a directory");
    let paths: Vec<_> = (0..count)
        .map(|number| dir.join(number.to_string()))
        .collect();
    for (number, path) in paths.iter().enumerate() {
        fs::write(path, noise(number as u64, BYTES)).expect("written");
    }
    system.sync_all();
    let ran = system.tierctl(&["release", "-r", dir.to_str().expect("ASCII")]);
    assert_eq!(ran.code, 0, "{ran}");
    assert!(paths.iter().all(|path| is_marked(path)), "{ran}");
    paths
}

/// A thread that reads a file, with little memory: there are many. It is not waited for where the test fails,
/// since then nobody answers it any more.
fn reads(path: &Path) -> thread::JoinHandle<io::Result<Vec<u8>>> {
    let path = path.to_owned();
    let small = thread::Builder::new().stack_size(64 << 10);
    small.spawn(move || fs::read(path)).expect("a thread")
}

/// Recalls a file and takes a lease on it. While it is in use it keeps its mark, and whoever opens it is asked
/// about.
fn take_lease(path: &Path) -> File {
    let file = File::open(path).expect("recalled");
    let end = Instant::now() + STALL;
    // The daemon looks at it now and then.
    while let Err(error) = sys::lease(&file) {
        assert!(Instant::now() < end, "no lease: {error}");
        thread::sleep(Duration::from_millis(5));
    }
    file
}

/// The guard is to be told of many at once, and the telling of one stalls.
#[test]
fn a_lease_holds_nobody_up_who_comes_at_the_same_time() {
    let system = Setup::new(Kind::Ext4).exposed().start();
    let paths = released(&system, 21);
    let file = take_lease(&paths[10]);
    system.stop_process("guard");
    // In this order.
    let mut openers = Vec::new();
    for path in &paths {
        openers.push(reads(path));
        threads_wait(openers.len());
    }
    let begun = Instant::now();
    system.signal_process("guard", Signal::SIGCONT);
    let last = openers.split_off(10);
    let mut last = last.into_iter();
    let stalled = last.next().expect("the opener of the leased file");
    for opener in openers.into_iter().chain(last) {
        answered(opener).expect("read");
    }
    let waited = begun.elapsed();
    drop(file);
    answered(stalled).expect("read in the end");
    assert!(waited < STALL / 3, "they waited for the lease: {waited:?}");
}

/// What came of an access, which must come to an end.
fn answered<T>(access: thread::JoinHandle<T>) -> T {
    let end = Instant::now() + LIMIT;
    while !access.is_finished() {
        assert!(Instant::now() < end, "an access is never answered");
        thread::sleep(Duration::from_millis(1));
    }
    access.join().expect("it does not panic")
}

/// Guard and worker have so much to tell each other that the links between them are full, both ways at once.
#[test]
fn a_crowd_that_no_link_takes_is_served_in_the_end() {
    const CROWD: usize = 700;
    let system = Setup::new(Kind::Ext4).exposed().start();
    let paths = released(&system, CROWD);
    fs::write(system.at("whole"), b"whole").expect("written");
    let (guard, worker) = (system.process("guard"), system.process("worker"));
    system.stop_process("worker");
    let crowd: Vec<_> = paths.iter().map(|path| reads(path)).collect();
    threads_wait(CROWD);
    assert_eq!(fs::read(system.at("whole")).expect("read"), b"whole");
    // What the worker answers now nobody hears.
    system.stop_process("guard");
    system.signal_process("worker", Signal::SIGCONT);
    thread::sleep(Duration::from_secs(1));
    assert_eq!(held_threads(), CROWD);
    system.signal_process("guard", Signal::SIGCONT);
    for (number, reader) in crowd.into_iter().enumerate() {
        let found = answered(reader).expect("no error");
        assert!(found == noise(number as u64, BYTES), "file {number}");
    }
    assert_eq!(system.process("guard"), guard);
    assert_eq!(system.process("worker"), worker);
}

/// The first number that a process could give to a descriptor of its own.
fn first_free(pid: i32) -> u64 {
    let all = fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
    let numbers: Vec<u64> = all
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    (0..=numbers.len() as u64)
        .find(|number| !numbers.contains(number))
        .expect("one")
}

/// Reads all files at once, while something happens: each gives its bytes, or an error that says to come again.
/// Gives how many do.
fn press(paths: &[PathBuf], times: usize, meanwhile: impl FnOnce()) -> (usize, usize) {
    let numbers = (0..paths.len() * times).map(|number| number % paths.len());
    let crowd: Vec<_> = numbers
        .map(|number| (number, reads(&paths[number])))
        .collect();
    meanwhile();
    let (mut right, mut later) = (0, 0);
    for (number, reader) in crowd {
        match answered(reader) {
            Ok(found) => {
                assert!(found == noise(number as u64, BYTES), "file {number}");
                right += 1;
            }
            Err(error) => {
                assert!(is_for_later(&error), "file {number}: {error}");
                later += 1;
            }
        }
    }
    (right, later)
}

/// Others than those who wait make, write and read files.
fn others_go_on(system: &System) {
    for number in 0..50 {
        let path = system.at(format!("whole{number}"));
        fs::write(&path, b"whole").expect("nobody else is disturbed");
        assert_eq!(fs::read(&path).expect("read"), b"whole");
    }
}

/// A guard that has no descriptor left cannot be told of an access, and the program gets EPERM: so it takes no
/// more than it can hold.
#[test]
fn a_guard_with_few_descriptors_keeps_some_for_others() {
    /// The permission group has one that is above 512.
    const FEW: u64 = 560;
    // Every file is asked about.
    let setup = Setup::new(Kind::Ext4).with("stub_marks_max", "0");
    let system = setup.exposed().start();
    let paths = released(&system, 60);
    let guard = system.process("guard");
    system.stop_process("worker");
    let old = sys::limit_descriptors(guard, FEW).expect("limited");
    let (right, later) = press(&paths, 15, || {
        threads_wait(200);
        thread::sleep(Duration::from_millis(500));
        others_go_on(&system);
        system.signal_process("worker", Signal::SIGCONT);
    });
    assert!(right >= 200 && later >= 300, "{right} right, {later} later");
    // There is room for another worker, too.
    system.kill_process("worker");
    system.wait_until_it_answers();
    sys::limit_descriptors(guard, old).expect("as before");
    assert_eq!(press(&paths, 1, || {}), (60, 0));
    assert_eq!(system.process("guard"), guard, "it is the same guard");
    system.check("after a lack of descriptors");
}

/// A worker that has no descriptor left opens nothing: who waits goes on waiting, and loses nothing.
#[test]
fn a_worker_without_descriptors_lets_programs_wait() {
    let system = Setup::new(Kind::Ext4).exposed().start();
    let paths = released(&system, 60);
    let worker = system.process("worker");
    let old = sys::limit_descriptors(worker, first_free(worker) + 2).expect("limited");
    let (right, later) = press(&paths, 3, || {
        thread::sleep(Duration::from_secs(1));
        others_go_on(&system);
        for worker in system.processes("worker") {
            let _ = sys::limit_descriptors(worker, old);
        }
    });
    assert_eq!((right, later), (180, 0));
    system.wait_until_it_answers();
    system.check("after a lack of descriptors");
}

/// Interrupts a thread that waits for an answer, again and again, until it has one.
fn signalled<T: Send + 'static>(
    act: impl FnOnce() -> T + Send + 'static,
    let_go: impl FnOnce(),
) -> T {
    let (tell, hear) = mpsc::channel();
    let waits = thread::spawn(move || {
        tell.send(gettid()).expect("its number is wanted");
        act()
    });
    let thread = hear.recv().expect("its number");
    threads_wait(1);
    let disturb = |times: u32| {
        for _ in 0..times {
            for signal in [Signal::SIGUSR1, Signal::SIGALRM] {
                // It may have ended.
                let _ = sys::signal_thread(thread, signal);
            }
            thread::sleep(Duration::from_millis(1));
        }
    };
    disturb(300);
    assert!(!waits.is_finished(), "a signal ends the wait");
    assert_eq!(held_threads(), 1);
    let_go();
    let end = Instant::now() + LIMIT;
    while !waits.is_finished() && Instant::now() < end {
        disturb(1);
    }
    answered(waits)
}

/// Who waits in open(2) or read(2) has handlers of signals run, and gets all bytes all the same.
#[test]
fn handled_signals_shorten_no_wait() {
    let system = Setup::new(Kind::Ext4).exposed().start();
    let paths = released(&system, 2);
    let go_on = || system.signal_process("worker", Signal::SIGCONT);
    for (number, restart) in [false, true].into_iter().enumerate() {
        let path = paths[number].clone();
        for signal in [Signal::SIGUSR1, Signal::SIGALRM] {
            sys::handle(signal, restart).expect("a handler");
        }
        system.stop_process("worker");
        let mut file = signalled(move || sys::open_once(&path), go_on).expect("opened");
        // While it is in use it keeps its mark, and reading it is asked about.
        assert!(is_marked(&paths[number]), "it was finished");
        system.stop_process("worker");
        let read = move || {
            let mut found = vec![0; BYTES + 1];
            file.read(&mut found).map(|got| (got, found))
        };
        let (got, found) = signalled(read, go_on).expect("read");
        assert_eq!(got, BYTES, "restart: {restart}");
        assert!(found[..BYTES] == noise(number as u64, BYTES), "other bytes");
    }
}

/// What the kernel says of the fanotify groups that a process has.
fn groups(pid: i32) -> Vec<(u32, i32)> {
    let infos = fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("its descriptors");
    let number = |word: &str| u32::from_str_radix(word, 16).expect("a number");
    let mut found = Vec::new();
    for info in infos.flatten() {
        let text = fs::read_to_string(info.path()).unwrap_or_default();
        for line in text.lines() {
            let Some(line) = line.strip_prefix("fanotify flags:") else {
                continue;
            };
            let (flags, event_flags) = line.split_once(" event-flags:").expect("two words");
            let event_flags = number(event_flags).cast_signed();
            found.push((number(flags), event_flags));
        }
    }
    found
}

/// A queue with a limit lets programs go on when it is full, a descriptor for writing cannot be made on what is
/// read-only, and a signal about a lease would end whoever has it.
#[test]
fn what_runs_has_the_groups_and_signals_that_it_needs() {
    const PRE_CONTENT: u32 = 0x8;
    const UNLIMITED_QUEUE: u32 = 0x10;
    const UNLIMITED_MARKS: u32 = 0x20;
    let system = Setup::new(Kind::Ext4).exposed().start();
    for role in ["guard", "worker"] {
        let pid = system.process(role);
        let groups = groups(pid);
        let asks = groups.iter().filter(|(flags, _)| flags & PRE_CONTENT != 0);
        assert!(asks.count() >= 1 && groups.len() >= 2, "{role}: {groups:?}");
        for (flags, event_flags) in groups {
            let wanted = UNLIMITED_QUEUE | UNLIMITED_MARKS;
            assert_eq!(flags & wanted, wanted, "{role}: {flags:#x}");
            assert_eq!(event_flags & libc::O_ACCMODE, libc::O_RDONLY, "{role}");
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        let ignored = u64::from_str_radix(ignored.expect("signals").trim(), 16).expect("bits");
        assert!(ignored & 1 << (libc::SIGIO - 1) != 0, "{role}: {ignored:x}");
    }
}

/// Kills the guard when it has been told of one more access, and has not answered it: the access is to be tried
/// again.
fn nobody_answers<T: Send + 'static>(
    system: &System,
    act: impl FnOnce() -> io::Result<T> + Send + 'static,
) {
    let guard = system.process("guard");
    // It looks at the file's mark before it answers.
    let tracer = Tracer::on(guard, "fgetxattr", "signal=KILL:when=1");
    let result = answered(thread::spawn(act));
    let error = result.err().expect("nobody answered it");
    assert!(is_for_later(&error), "{error}");
    drop(tracer);
    assert_ne!(system.process("guard"), guard);
    system.wait_until_it_answers();
}

/// Where every file is asked about, a new one is there before anybody is asked: a guard that is killed leaves it
/// empty. What was there before is not cut.
#[test]
fn a_new_file_that_nobody_let_open_is_empty_and_can_be_written() {
    let setup = Setup::new(Kind::Ext4).with("stub_marks_max", "0");
    let system = setup.exposed().start();
    let (new, exclusive, old) = (system.at("new"), system.at("exclusive"), system.at("old"));
    // What is made before every file is asked about is not known to be whole.
    system.wait_for("only stubs are asked about", |status| {
        status["released"]["every_file"] == false
    });
    fs::write(&old, b"bytes that stay").expect("written");
    let stub = released(&system, 1).remove(0);
    let path = new.clone();
    nobody_answers(&system, move || fs::write(path, b"bytes"));
    let path = exclusive.clone();
    nobody_answers(&system, move || File::create_new(path));
    let path = old.clone();
    nobody_answers(&system, move || fs::write(path, b""));
    let path = stub.clone();
    nobody_answers(&system, move || File::create(path));
    for path in [&new, &exclusive] {
        assert_eq!(fs::read(path).expect("it is there"), b"");
    }
    assert_eq!(fs::read(&old).expect("read"), b"bytes that stay");
    assert!(
        fs::read(&stub).expect("read") == noise(0, BYTES),
        "the stub"
    );
    system.check("with empty files");
    for path in [&new, &exclusive] {
        let file = File::create(path).expect("the same once more");
        file.write_all_at(b"written at last", 0).expect("written");
    }
    system.check("with what is written at last");
}
