//! Every step of keeper and guard, and of the worker's start: the process is killed there.
//!
//! Nobody reads zeros meanwhile: programs read stubs all the time, and get the right bytes or an error. The
//! filesystem is not to be reached while nobody holds the permission group. What is started next goes on.
//! A step is before a call ([`hsm_tests::strace`]); one that is never reached fails the test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::guarded::{assert_guarded, is_exposed};
use hsm_tests::loopfs::Kind;
use hsm_tests::program::{locate, run_within};
use hsm_tests::report::say;
use hsm_tests::strace::{Call, Trap, Whom, call};
use hsm_tests::stubs::assert_reads;
use hsm_tests::system::{Setup, System};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What takes longer never comes.
const LIMIT: Duration = Duration::from_secs(40);

fn bytes_of(path: &Path) -> Vec<u8> {
    let name = path.file_name().expect("a name").to_string_lossy();
    name.into_owned().repeat(900).into_bytes()
}

/// A running daemon, and so many stubs.
fn with_stubs(setup: Setup, count: usize) -> (System, Vec<PathBuf>) {
    let system = setup.start();
    let paths: Vec<PathBuf> = (0..count)
        .map(|number| system.at(format!("file{number}")))
        .collect();
    for path in &paths {
        fs::write(path, bytes_of(path)).expect("written");
    }
    system.sync_all();
    let mut words = vec!["release"];
    words.extend(paths.iter().map(|path| path.to_str().expect("ASCII")));
    let _ = system.tierctl(&words).done();
    (system, paths)
}

/// Somebody who reads a stub.
struct Reads(Receiver<Result<Vec<u8>, std::io::Error>>, PathBuf);

impl Reads {
    /// Begins; where it fails, it tries again if it is patient.
    fn start(path: &Path, patient: bool) -> Self {
        let (tell, told) = channel();
        let end = Instant::now() + LIMIT;
        let read = path.to_owned();
        // Nobody waits for it: it may hang, and the test is to say so.
        thread::spawn(move || {
            let mut found = fs::read(&read);
            while found.is_err() && patient && Instant::now() < end {
                thread::sleep(Duration::from_millis(2));
                found = fs::read(&read);
            }
            tell.send(found)
        });
        Self(told, path.to_owned())
    }

    /// Ends with the file's bytes; errors before are no matter where it is patient.
    fn right(self, context: &str) {
        let Self(told, path) = self;
        let shown = path.display();
        match told.recv_timeout(LIMIT) {
            Ok(Ok(found)) => assert!(found == bytes_of(&path), "{context}: {shown}: wrong bytes"),
            Ok(Err(error)) => panic!("{context}: {shown}: {error}"),
            Err(error) => panic!("{context}: {shown}: who opens it waits for ever: {error}"),
        }
    }
}

fn one(system: &System, role: &str) -> i32 {
    let end = Instant::now() + LIMIT;
    loop {
        if let [pid] = system.processes(role)[..] {
            return pid;
        }
        assert!(Instant::now() < end, "no {role} alone");
        thread::sleep(Duration::from_millis(2));
    }
}

/// The keeper's calls until the filesystem is exposed, and one after that.
const START: [Call; 9] = [
    call("fanotify_init", 1),
    call("fanotify_init", 2),
    call("fsopen", 1),
    call("fsconfig", 2),
    call("fsmount", 1),
    call("fanotify_mark", 1),
    call("move_mount", 1),
    call("clone3", 1),
    call("clone3", 1),
];

#[test]
fn the_keeper_is_killed_at_every_step_of_its_start() {
    let (mut system, paths) = with_stubs(Setup::new(Kind::Ext4).exposed(), 1);
    system.stop();
    for step in START {
        let context = format!("start, {step:?}");
        system.trap_next_start(step);
        system.start_unready();
        let ended = system.daemon().wait(LIMIT).expect("the step is reached");
        assert_eq!(ended.code, 137, "{context}: {ended}");
        system.kill9();
        // The last thing before the guard has the group, too: as if all of hsmd had been killed.
        let only_holder = step.name == "clone3";
        assert_eq!(is_exposed(system.root()), only_holder, "{context}");
    }
    system.start();
    assert_reads(&paths[0], &bytes_of(&paths[0]), "after all");
    system.check("the keeper is killed while it starts");
}

/// The next daemon after one of which something may be left; what of it, is none of its business.
fn start_after(system: &mut System, context: &str) {
    let left = system.processes("worker");
    system.start_unready();
    let end = Instant::now() + LIMIT;
    loop {
        // The one before may answer still.
        let workers = system.processes("worker");
        if workers.iter().any(|pid| !left.contains(pid)) {
            break;
        }
        if let Some(ran) = system.daemon().wait(Duration::from_millis(10)) {
            panic!("{context}: {ran}");
        }
        assert!(Instant::now() < end, "{context}: it does not start");
        assert_guarded(system.root(), context);
    }
    system.wait_until_it_answers();
}

/// The keeper's calls when it is told to stop, and whether the filesystem is exposed then still.
const STOP: [(Call, bool); 4] = [
    (call("wait4", 1), true),
    (call("umount2", 1), true),
    (call("kill", 1), false),
    (call("exit_group", 1), false),
];

#[test]
fn the_keeper_is_killed_at_every_step_of_its_end() {
    let (mut system, paths) = with_stubs(Setup::new(Kind::Ext4).exposed(), STOP.len());
    for ((step, exposed), path) in STOP.into_iter().zip(&paths) {
        let context = format!("stop, {step:?}");
        say(format_args!("{context}"));
        let keeper = system.daemon().pid().as_raw();
        let trap = Trap::set(Whom::First(keeper), step);
        system.daemon().signal(Signal::SIGTERM);
        let end = Instant::now() + LIMIT;
        let over = || Instant::now() >= end;
        assert!(trap.kills_before(keeper, &over), "{context}: never reached");
        assert_guarded(system.root(), &context);
        assert_eq!(is_exposed(system.root()), exposed, "{context}");
        if exposed {
            assert_reads(path, &bytes_of(path), &context);
        }
        system.kill9();
        start_after(&mut system, &context);
        assert_reads(path, &bytes_of(path), &context);
    }
    system.check("the keeper is killed while it stops");
}

/// A second hsmd for the same filesystem takes nothing away from the first; one whose predecessor's keeper
/// was killed says who uses the filesystem.
#[test]
fn who_comes_beside_a_guard_is_refused() {
    let (mut system, paths) = with_stubs(Setup::new(Kind::Xfs).exposed(), 3);
    let second = |system: &System| {
        let mut command = Command::new(locate("hsmd"));
        command.arg("--config").arg(system.config());
        run_within(command, LIMIT)
    };
    let ran = second(&system).refuses(&["runs already", "stop that one first"]);
    let keeper = system.daemon().pid();
    assert!(ran.stderr.contains(&keeper.to_string()), "{ran}");
    assert_reads(&paths[0], &bytes_of(&paths[0]), "beside a second one");
    kill(keeper, Signal::SIGKILL).expect("killed");
    system.kill9();
    let user = fs::File::open(system.root()).expect("the root");
    let _ = second(&system).refuses(&["whose keeper was killed", "in use by steps_of", "unmount"]);
    assert_guarded(system.root(), "in use");
    assert_reads(&paths[1], &bytes_of(&paths[1]), "without a keeper");
    drop(user);
    start_after(&mut system, "without a keeper");
    assert_reads(&paths[2], &bytes_of(&paths[2]), "with another one");
    system.stop();
}

/// From the moment when the filesystem is exposed a service manager holds the accesses.
#[test]
fn a_service_manager_guards_what_a_killed_keeper_has_exposed() {
    // One stub stays one, or there would be nothing to guard.
    let (mut system, paths) = with_stubs(Setup::new(Kind::Ext4).exposed().managed(), 5);
    system.stop();
    // It has given one of the two groups away, both; and the filesystem is exposed.
    let steps = [call("sendmsg", 2), call("move_mount", 1), call("clone3", 1)];
    for (step, path) in steps.into_iter().zip(&paths) {
        let context = format!("{step:?}");
        system.trap_next_start(step);
        system.start_unready();
        // Whether anybody holds the group cannot be seen as long as it is on its way to the manager.
        Reads::start(path, true).right(&context);
        assert_guarded(system.root(), &context);
        assert!(!system.home().at("notify.trap").exists(), "{context}");
        system.wait_until_it_answers();
        system.stop();
    }
    system.start();
    // The keeper alone, and what it leaves behind is killed before the next one.
    let (keeper, guard) = (one(&system, "keeper"), one(&system, "guard"));
    kill(Pid::from_raw(keeper), Signal::SIGKILL).expect("killed");
    Reads::start(&paths[3], true).right("the keeper alone is killed");
    while one(&system, "guard") == guard {
        assert_guarded(system.root(), "the keeper alone is killed");
    }
    system.wait_until_it_answers();
    system.check("killed under a service manager");
    system.stop();
}

/// What the guard does.
#[derive(Clone, Copy, Debug)]
enum Doing {
    /// It begins; the one before was killed.
    Begins,
    /// It serves somebody who opens a stub.
    Serves,
    /// It starts a worker; the one before was killed.
    StartsAWorker,
}

const GUARD: [(&str, Doing, Call); 13] = [
    ("it begins", Doing::Begins, call("mlockall", 1)),
    ("it sweeps", Doing::Begins, call("write", 700)),
    ("it reads the group", Doing::Serves, call("read", 1)),
    ("it looks at the file", Doing::Serves, call("fgetxattr", 1)),
    (
        "it asks whose program it is",
        Doing::Serves,
        call("statx", 1),
    ),
    (
        "it hands the access over",
        Doing::Serves,
        call("sendmsg", 1),
    ),
    ("it hears", Doing::Serves, call("recvmsg", 1)),
    ("it answers", Doing::Serves, call("write", 1)),
    (
        "it makes a link",
        Doing::StartsAWorker,
        call("socketpair", 1),
    ),
    (
        "it starts a worker",
        Doing::StartsAWorker,
        call("clone3", 1),
    ),
    (
        "it hears of all files",
        Doing::StartsAWorker,
        call("recvmsg", 2),
    ),
    (
        "it hears of readiness",
        Doing::StartsAWorker,
        call("recvmsg", 3),
    ),
    (
        "it hands it over again",
        Doing::StartsAWorker,
        call("sendmsg", 1),
    ),
];

fn guard_killed(kind: Kind) {
    let (mut system, paths) = with_stubs(Setup::new(kind).exposed(), GUARD.len());
    for ((what, doing, step), path) in GUARD.into_iter().zip(&paths) {
        let context = format!("{kind}: {what}, {step:?}");
        say(format_args!("{context}"));
        let (keeper, guard) = (system.daemon().pid().as_raw(), one(&system, "guard"));
        let worker = one(&system, "worker");
        let trap = match doing {
            // With the next one.
            Doing::Begins => Trap::set(Whom::All(keeper), step),
            Doing::Serves => Trap::set(Whom::All(guard), step),
            Doing::StartsAWorker => Trap::set(Whom::First(guard), step),
        };
        let reads = Reads::start(path, true);
        let victim = match doing {
            Doing::Begins => {
                kill(Pid::from_raw(guard), Signal::SIGKILL).expect("killed");
                next(&system, "guard", guard)
            }
            Doing::StartsAWorker => {
                kill(Pid::from_raw(worker), Signal::SIGKILL).expect("killed");
                guard
            }
            Doing::Serves => guard,
        };
        let end = Instant::now() + LIMIT;
        let dies = trap.kills_before(victim, &|| {
            assert_guarded(system.root(), &context);
            Instant::now() >= end
        });
        assert!(dies, "{context}: never reached");
        assert_guarded(system.root(), &context);
        reads.right(&context);
        system.wait_until_it_answers();
    }
    system.check(&format!("{kind}: the guard is killed at every step"));
}

/// Another process with this role than that one.
fn next(system: &System, role: &str, last: i32) -> i32 {
    let end = Instant::now() + LIMIT;
    loop {
        let found = system.processes(role);
        if let Some(pid) = found.into_iter().find(|pid| *pid != last) {
            return pid;
        }
        assert!(Instant::now() < end, "no other {role}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_guard_is_killed_at_every_step_on_ext4() {
    guard_killed(Kind::Ext4);
}

/// The calls of a worker until it is ready, and one of those that give each stub its mark.
const WORKER: [(&str, Call); 7] = [
    ("it mounts the filesystem privately", call("open_tree", 1)),
    ("it opens the log", call("flock", 1)),
    ("it watches", call("fanotify_mark", 1)),
    ("every file is asked about", call("fanotify_mark", 3)),
    ("it says what is asked", call("sendmsg", 1)),
    ("it says that it is ready", call("sendmsg", 2)),
    ("some stubs have marks", call("fanotify_mark", 6)),
];

#[test]
fn the_worker_is_killed_at_every_step_of_its_start() {
    let (system, paths) = with_stubs(Setup::new(Kind::Ext4).exposed(), 20);
    let (guard, mut worker) = (one(&system, "guard"), one(&system, "worker"));
    for ((what, step), path) in WORKER.into_iter().zip(&paths) {
        let context = format!("{what}, {step:?}");
        say(format_args!("{context}"));
        let trap = Trap::set(Whom::All(guard), step);
        kill(Pid::from_raw(worker), Signal::SIGKILL).expect("killed");
        // Nothing is handed over before it is ready.
        let victim = next(&system, "worker", worker);
        // Waits all the time, and gets no error: the guard lives.
        let reads = Reads::start(path, false);
        let end = Instant::now() + LIMIT;
        let dies = trap.kills_before(victim, &|| Instant::now() >= end);
        assert!(dies, "{context}: never reached");
        worker = next(&system, "worker", victim);
        reads.right(&context);
        assert_eq!(one(&system, "guard"), guard, "{context}");
        assert_guarded(system.root(), &context);
        system.wait_until_it_answers();
    }
    system.check("the worker is killed while it starts");
}
