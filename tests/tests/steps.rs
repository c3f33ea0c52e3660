//! Every step of release and recall: the daemon is killed there, or the power fails there.
//!
//! The steps are those of the table in ARCHITECTURE.md, each before a certain call ([`hsm_tests::strace`]). A step
//! that is never reached fails the test.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use hsm_tests::loopfs::Kind;
use hsm_tests::report::say;
use hsm_tests::strace::{Trap, Whom, call, is_alive};
use hsm_tests::stubs::{
    assert_reads, is_marked, read_patiently, release, wait_for_marks, wait_whole,
};
use hsm_tests::sys;
use hsm_tests::system::{Setup, System};

/// A worker that has not come to a step after this time never does.
const LIMIT: Duration = Duration::from_secs(40);
/// Of a disk that is written from end to end before the test.
const DISK_BYTES: u64 = 320 << 20;

/// What is interrupted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Act {
    Release,
    Recall,
}

/// Before which call.
#[derive(Clone, Copy, Debug)]
struct Step {
    what: &'static str,
    act: Act,
    /// The thread's name; `None`: any thread.
    thread: Option<&'static str>,
    call: &'static str,
    /// Which of the thread's calls, from 1.
    nth: u32,
}

const fn release_step(what: &'static str, call: &'static str, nth: u32) -> Step {
    Step {
        what,
        act: Act::Release,
        thread: None,
        call,
        nth,
    }
}

const fn recall_step(
    what: &'static str,
    thread: &'static str,
    call: &'static str,
    nth: u32,
) -> Step {
    Step {
        what,
        act: Act::Recall,
        thread: Some(thread),
        call,
        nth,
    }
}

const STEPS: &[Step] = &[
    release_step("nothing is done", "syncfs", 1),
    release_step("the list has the file", "fsetxattr", 1),
    release_step("it has its mark", "syncfs", 2),
    release_step("the mark is durable", "fallocate", 1),
    release_step("it is punched", "utimensat", 1),
    release_step("its time is put back", "fsetxattr", 2),
    recall_step("nothing is done", "recall", "fsetxattr", 1),
    recall_step("the mark says moving", "recall", "fallocate", 1),
    recall_step("space is reserved", "recall", "pwrite64", 1),
    recall_step("some bytes are there", "recall", "pwrite64", 2),
    recall_step("all bytes are there", "recall", "utimensat", 1),
    recall_step("its time is put back", "recall", "fsetxattr", 2),
    recall_step("the mark says filled", "finish", "fsync", 1),
    recall_step("the bytes are durable", "finish", "fsetxattr", 1),
    recall_step("the mark says there", "finish", "fsync", 2),
    recall_step("it says so durably", "finish", "fremovexattr", 1),
    recall_step("the mark is gone", "finish", "fsetxattr", 2),
    recall_step("the disk has its generation", "finish", "syncfs", 1),
    recall_step("the generation is durable", "finish", "pwrite64", 1),
];

impl Step {
    /// On btrfs, where every file is asked about, recalled files are made durable with the whole filesystem.
    fn on(self, kind: Kind) -> Self {
        let (call, nth) = match (self.thread, self.call, self.nth) {
            (Some("finish"), "fsync", nth) if kind == Kind::Btrfs => ("syncfs", nth),
            (Some("finish"), "syncfs", nth) if kind == Kind::Btrfs => ("syncfs", nth + 2),
            (_, call, nth) => (call, nth),
        };
        Self { call, nth, ..self }
    }
}

/// Kills the worker when it comes to a step.
fn trap(step: Step, worker: i32) -> Trap {
    let whom = match step.thread {
        Some(name) => Whom::Thread(worker, name),
        None => Whom::All(worker),
    };
    Trap::set(whom, call(step.call, step.nth))
}

/// Waits for the worker's death.
fn reached(trap: Trap, worker: i32, context: &str) {
    let end = Instant::now() + LIMIT;
    let dies = trap.kills_before(worker, &|| Instant::now() >= end);
    assert!(dies, "{context}: the step is never reached");
}

/// How it ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// SIGKILL.
    Killed,
    /// The filesystem is cut off.
    Power,
    /// Its disk is.
    Disk,
}

impl End {
    fn setup(self, kind: Kind) -> Setup {
        let setup = Setup::new(kind).exposed().with("recall_threads", "1");
        match self {
            Self::Disk => setup.bytes(DISK_BYTES).on_failing_disk(),
            Self::Killed | Self::Power => setup,
        }
    }
}

fn interrupted(system: &mut System, number: usize, step: Step, end: End) {
    let context = format!("{end:?}, {:?}: {} ({step:?})", step.act, step.what);
    say(format_args!("{context}"));
    let path = system.at(format!("file{number}"));
    // Three chunks, of which some pieces are alike.
    let bytes: Vec<u8> = (0u32..700_000)
        .flat_map(|at| (at / 3 + u32::try_from(number).unwrap_or(0)).to_le_bytes())
        .collect();
    fs::write(&path, &bytes).expect("written");
    let mtime = SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000_000_123);
    let file = File::options().write(true).open(&path).expect("opened");
    file.set_modified(mtime).expect("set");
    drop(file);
    system.sync_all();
    if step.act == Act::Recall {
        release(system, &path);
    }
    let workers = system.processes("worker");
    let [worker] = workers[..] else {
        panic!("{context}: workers {workers:?}");
    };
    let trap = trap(step, worker);
    match end {
        End::Killed => {
            thread::scope(|scope| {
                let (system, path, bytes) = (&*system, &path, &bytes);
                scope.spawn(move || match step.act {
                    // The daemon dies under it.
                    Act::Release => {
                        drop(system.tierctl(&["release", path.to_str().expect("ASCII")]));
                    }
                    Act::Recall => assert!(&read_patiently(path) == bytes, "who waited"),
                });
                reached(trap, worker, &context);
            });
            system.wait_until_it_answers();
        }
        End::Power | End::Disk => {
            let mut command = match step.act {
                Act::Release => system.tierctl_command(&["release"]),
                Act::Recall => Command::new("cat"),
            };
            command.stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = command.arg(&path).spawn().expect("started");
            reached(trap, worker, &context);
            if system.fs().kind() == Kind::Btrfs {
                // Else it would be as it was at the last sync, whatever the step.
                let root = File::open(system.root()).expect("the root");
                sys::commit_btrfs(&root).expect("committed");
            }
            system.power_fails();
            let _ = child.wait();
            system.power_returns();
        }
    }
    wait_for_marks(system);
    assert_reads(&path, &bytes, &context);
    let found = fs::metadata(&path).and_then(|meta| meta.modified());
    assert_eq!(found.expect("its time"), mtime, "{context}");
    wait_whole(&path);
    assert!(!is_marked(&path), "{context}");
}

/// The calls of an immutable stub's recall: it is interrupted before each that the thread makes.
const SEALED: [(&str, &str); 8] = [
    ("recall", "ioctl"),
    ("recall", "fsetxattr"),
    ("recall", "pwrite64"),
    ("finish", "ioctl"),
    ("finish", "fsetxattr"),
    ("finish", "fremovexattr"),
    ("finish", "fsync"),
    ("finish", "pwrite64"),
];
/// No thread makes more of one kind.
const CALLS_MAX: usize = 12;

fn is_immutable(path: &Path) -> bool {
    let file = File::open(path).expect("opened");
    sys::flags(&file).expect("its flags") & sys::IMMUTABLE_FL != 0
}

/// Recalls an immutable stub. False where that ends without such a call.
fn interrupted_sealed(
    system: &mut System,
    path: &Path,
    (thread, call): (&'static str, &'static str),
    nth: u32,
    end: End,
) -> bool {
    let step = recall_step("an immutable file", thread, call, nth);
    let context = format!("{end:?}, immutable: {thread}, {call} {nth}");
    let workers = system.processes("worker");
    let [worker] = workers[..] else {
        panic!("{context}: workers {workers:?}");
    };
    let trap = trap(step, worker);
    let mut reads = Command::new("cat");
    reads.stdout(Stdio::null()).stderr(Stdio::null());
    let mut reads = reads.arg(path).spawn().expect("started");
    let limit = Instant::now() + LIMIT;
    let dies = trap.kills_before(worker, &|| {
        assert!(Instant::now() < limit, "{context}: it is never recalled");
        // The last calls come after the mark is gone.
        let whole = !is_marked(path);
        thread::sleep(Duration::from_millis(if whole { 300 } else { 0 }));
        whole && is_alive(worker)
    });
    match end {
        End::Killed => {
            let read = reads.wait().expect("ended");
            // Who waits while the guard lives gets his bytes.
            assert!(read.success(), "{context}");
            system.wait_until_it_answers();
        }
        End::Power | End::Disk => {
            system.power_fails();
            let _ = reads.wait();
            system.power_returns();
        }
    }
    wait_for_marks(system);
    assert_reads(path, &sealed_bytes(path), &context);
    wait_whole(path);
    let soon = Instant::now() + Duration::from_secs(10);
    while !is_immutable(path) {
        assert!(Instant::now() < soon, "{context}: it can be changed now");
        thread::sleep(Duration::from_millis(20));
    }
    dies
}

fn sealed_bytes(path: &Path) -> Vec<u8> {
    path.to_string_lossy().into_owned().repeat(700).into_bytes()
}

fn change_seal(path: &Path, set: u32, clear: u32) {
    let file = File::open(path).expect("opened");
    sys::change_flags(&file, set, clear).expect("chattr");
}

/// Immutable stubs: `replay --stubs` makes such.
fn sealed_at_every_step(kind: Kind, end: End) {
    let mut system = end.setup(kind).start();
    let paths: Vec<_> = (0..SEALED.len() * CALLS_MAX)
        .map(|number| system.at(format!("file{number}")))
        .collect();
    for path in &paths {
        fs::write(path, sealed_bytes(path)).expect("written");
    }
    system.sync_all();
    for path in &paths {
        release(&system, path);
    }
    system.stop();
    system.fs().mount();
    for path in &paths {
        change_seal(path, sys::IMMUTABLE_FL, 0);
    }
    system.fs().unmount();
    system.start();
    let mut unused = paths.iter();
    for (thread, call) in SEALED {
        let mut reached = 0;
        for nth in 1.. {
            let path = unused.next().expect("files enough");
            if !interrupted_sealed(&mut system, path, (thread, call), nth, end) {
                break;
            }
            reached = nth;
        }
        say(format_args!(
            "{end:?}: {thread} makes {reached} calls {call}"
        ));
        assert!(reached > 0, "{thread} makes no call {call}");
    }
    for path in &paths {
        assert_reads(path, &sealed_bytes(path), "at the end");
        change_seal(path, 0, sys::IMMUTABLE_FL);
    }
    system.check(&format!("{kind}: {end:?} at every step, immutable"));
}

#[test]
fn killed_at_every_step_of_an_immutable_file_on_ext4() {
    sealed_at_every_step(Kind::Ext4, End::Killed);
}

#[test]
fn the_power_fails_at_every_step_of_an_immutable_file_on_xfs() {
    sealed_at_every_step(Kind::Xfs, End::Power);
}

fn at_every_step(kind: Kind, end: End) {
    let mut system = end.setup(kind).start();
    for (number, step) in STEPS.iter().enumerate() {
        interrupted(&mut system, number, step.on(kind), end);
    }
    system.check(&format!("{kind}: {end:?} at every step"));
    // The list of stubs has what it must have.
    for number in (0..STEPS.len()).step_by(2) {
        release(&system, &system.at(format!("file{number}")));
    }
    system.kill_all();
    system.start();
    system.check(&format!("{kind}: {end:?} at every step, and released"));
}

#[test]
fn killed_at_every_step_on_ext4() {
    at_every_step(Kind::Ext4, End::Killed);
}

#[test]
fn killed_at_every_step_on_xfs() {
    at_every_step(Kind::Xfs, End::Killed);
}

#[test]
fn the_power_fails_at_every_step_on_ext4() {
    at_every_step(Kind::Ext4, End::Power);
}

#[test]
fn the_power_fails_at_every_step_on_xfs() {
    at_every_step(Kind::Xfs, End::Power);
}

#[test]
fn the_power_fails_at_every_step_on_btrfs() {
    at_every_step(Kind::Btrfs, End::Disk);
}
