//! The guard answers everybody, whatever others do.

use std::fs::{self, File};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::loopfs::{Kind, must};
use hsm_tests::stubs::{assert_reads, release};
use hsm_tests::sys;
use hsm_tests::system::{Setup, System};
use hsm_tests::waiting::{bring_back, passing_reader, spool_empties, still_waits, take_away, text};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::Pid;

/// Files that nobody can open; more than the guard has readers at first.
const LEASED: usize = 20;
/// How long the kernel makes an opener wait for a lease.
const STALL: Duration = Duration::from_secs(45);

/// Any user can make the guard's reads stall, by leases on files of his own.
#[test]
fn leases_of_users_hold_nobody_else_up() {
    let system = Setup::new(Kind::Ext4).exposed().start();
    let stub = system.at("stub");
    fs::write(&stub, b"released bytes").expect("written");
    let leased: Vec<_> = (0..LEASED)
        .map(|number| system.at(format!("leased{number}")))
        .collect();
    for path in &leased {
        fs::write(path, b"released, too").expect("written");
    }
    system.sync_all();
    for path in leased.iter().chain([&stub]) {
        release(&system, path);
    }
    let files: Vec<File> = leased
        .iter()
        .map(|path| {
            // Recalled; while it is in use it keeps its mark, and whoever opens it is asked about.
            let file = File::open(path).expect("recalled");
            let end = Instant::now() + STALL;
            // The daemon looks at it now and then.
            while let Err(error) = sys::lease(&file) {
                assert!(Instant::now() < end, "no lease: {error}");
                thread::sleep(Duration::from_millis(5));
            }
            file
        })
        .collect();
    thread::scope(|scope| {
        for path in &leased {
            scope.spawn(move || drop(File::open(path).expect("opened in the end")));
        }
        thread::sleep(Duration::from_secs(1));
        let begun = Instant::now();
        assert_reads(&stub, b"released bytes", "while the guard's reads stall");
        let waited = begun.elapsed();
        drop(files);
        assert!(waited < STALL / 3, "it waited for leases: {waited:?}");
    });
}

/// All processes of the daemon are killed at once: the service manager holds the accesses.
fn all_is_killed_under_a_service_manager(kind: Kind) {
    let mut system = Setup::new(kind).exposed().managed().start();
    let paths: Vec<_> = (0..2)
        .map(|number| system.at(format!("file{number}")))
        .collect();
    for path in &paths {
        fs::write(path, b"released bytes").expect("written");
    }
    system.sync_all();
    for path in &paths {
        release(&system, path);
    }
    // Who uses the filesystem goes on using it.
    let user = File::open(system.root()).expect("the root");
    for path in &paths {
        let before = system.processes("guard");
        system.daemon().signal(Signal::SIGUSR1);
        while !system.processes("guard").is_empty() && system.processes("guard") == before {
            thread::sleep(Duration::from_millis(5));
        }
        assert_reads(path, b"released bytes", "with nothing of hsmd left");
        system.wait_until_it_answers();
    }
    fs::write(system.at("new"), b"written later").expect("written");
    system.check("killed under a service manager");
    drop(user);
    system.stop();
}

#[test]
fn a_service_manager_holds_accesses_while_nothing_of_hsmd_is_left_on_xfs() {
    all_is_killed_under_a_service_manager(Kind::Xfs);
}

#[test]
fn a_service_manager_holds_accesses_while_nothing_of_hsmd_is_left_on_btrfs() {
    all_is_killed_under_a_service_manager(Kind::Btrfs);
}

/// A program waits since before only stubs are asked about. The kernel keeps what it was asked about for as long,
/// and whoever opens another released file meanwhile must be asked about all the same.
#[test]
fn who_waits_since_the_start_lets_nobody_else_pass() {
    let mut system = Setup::new(Kind::Ext4).exposed().start();
    let paths = ["first", "second"].map(|name| system.at(name));
    for path in &paths {
        fs::write(path, text(path).repeat(500)).expect("written");
    }
    spool_empties(&mut system);
    for path in &paths {
        release(&system, path);
    }
    let away = take_away(&system, 0);
    system.stop();
    system.start_unready();
    let end = Instant::now() + STALL;
    while !paths[0].exists() {
        assert!(Instant::now() < end, "it is never mounted");
        thread::sleep(Duration::from_millis(1));
    }
    let mut first = passing_reader(&paths[0], 0);
    system.wait_until_it_answers();
    system.wait_for("only stubs are asked about", |status| {
        status["released"]["every_file"] == false
    });
    still_waits(&mut first, "who came first");
    let second = passing_reader(&paths[1], 0);
    thread::sleep(Duration::from_millis(500));
    bring_back(away);
    for (child, path) in [first, second].into_iter().zip(&paths) {
        let read = child.wait_with_output().expect("ended");
        assert!(read.status.success(), "{read:?}");
        assert!(
            read.stdout == text(path).repeat(500).as_bytes(),
            "{}: {} bytes, zeros: {}",
            path.display(),
            read.stdout.len(),
            read.stdout.iter().all(|byte| *byte == 0)
        );
    }
}

/// Kills all of hsmd; the service manager starts nothing before [`go_on`].
fn kill_and_pause(system: &mut System) {
    fs::write(system.home().at("notify.pause"), "").expect("written");
    system.daemon().signal(Signal::SIGUSR1);
    while ["keeper", "guard", "worker"]
        .iter()
        .any(|role| !system.processes(role).is_empty())
    {
        thread::sleep(Duration::from_millis(5));
    }
}

fn go_on(system: &System) {
    fs::remove_file(system.home().at("notify.pause")).expect("removed");
}

/// What a service manager holds is worth nothing for a filesystem that was mounted by hand meanwhile.
#[test]
fn what_was_mounted_by_hand_meanwhile_is_not_taken_over() {
    let mut system = Setup::new(Kind::Btrfs).exposed().managed().start();
    let path = system.at("file");
    fs::write(&path, b"released bytes").expect("written");
    system.sync_all();
    release(&system, &path);
    kill_and_pause(&mut system);
    system.fs().unmount();
    let device = system.device().expect("a device").to_owned();
    must(Command::new("mount").arg(&device).arg(system.root()));
    let open = File::open(&path).expect("nobody asks");
    go_on(&system);
    let ran = system.daemon().wait(Duration::from_secs(30));
    let _ = ran
        .expect("it gives up")
        .refuses(&["mounted there already, without hsmd", "may have read zeros"]);
    system.kill9();
    drop(open);
    // Where nobody uses it, it is mounted anew.
    system.start();
    kill_and_pause(&mut system);
    system.fs().unmount();
    must(Command::new("mount").arg(&device).arg(system.root()));
    go_on(&system);
    system.wait_until_it_answers();
    assert_reads(&path, b"released bytes", "mounted anew");
    system.stop();
}

/// Without a single stub nothing is asked about, and the filesystem is watched all the same.
#[test]
fn a_filesystem_without_stubs_is_taken_over() {
    let mut system = Setup::new(Kind::Ext4).exposed().managed().start();
    fs::write(system.at("file"), b"bytes").expect("written");
    system.sync_all();
    // Then nobody has opened a file while all were asked about.
    system.restart();
    system.wait_for("only stubs are asked about", |status| {
        status["released"]["every_file"] == false
    });
    // It cannot be mounted anew.
    let user = File::open(system.at("file")).expect("opened");
    kill_and_pause(&mut system);
    go_on(&system);
    system.wait_until_it_answers();
    drop(user);
    let path = system.at("file");
    release(&system, &path);
    assert_reads(&path, b"bytes", "taken over without stubs");
    system.stop();
}

/// On a frozen filesystem nothing can be changed, a mark that came along with a copy neither. Who opens such a copy
/// waits; nobody else does who can be served without a change.
#[test]
fn on_a_frozen_filesystem_nobody_waits_for_another_ones_mark() {
    let setup = Setup::new(Kind::Xfs).exposed();
    // Every file is asked about.
    let system = setup.with("stub_marks_max", "0").start();
    let [recalled, copy] = ["recalled", "copy"].map(|name| system.at(name));
    fs::write(&recalled, text(&recalled)).expect("written");
    system.sync_all();
    release(&system, &recalled);
    let marks = sys::xattrs(&recalled).expect("its attributes");
    let (_, mark) = marks.into_iter().next().expect("a mark");
    // While it is in use it keeps its mark.
    let user = File::open(&recalled).expect("recalled");
    let worker = Pid::from_raw(system.processes("worker")[0]);
    kill(worker, Signal::SIGSTOP).expect("stopped");
    // Empty, and never opened before: what was opened and found whole is not asked about any more.
    mknod(&copy, SFlag::S_IFREG, Mode::S_IRUSR, 0).expect("a file");
    sys::set_xattr(&copy, c"trusted.hsm", &mark).expect("a mark");
    let frozen = sys::Frozen::new(File::open(system.root()).expect("the root"));
    let frozen = frozen.expect("frozen");
    kill(worker, Signal::SIGCONT).expect("goes on");
    let mut waits = passing_reader(&copy, 0);
    thread::sleep(Duration::from_millis(500));
    still_waits(&mut waits, "who opens the copy");
    let begun = Instant::now();
    let mut reads = passing_reader(&recalled, 0);
    while reads.try_wait().expect("asked").is_none() {
        let waited = begun.elapsed();
        assert!(waited < STALL / 3, "who opens another file waits, too");
        thread::sleep(Duration::from_millis(10));
    }
    drop(frozen);
    for (child, expected) in [(reads, text(&recalled)), (waits, "")] {
        let read = child.wait_with_output().expect("ended");
        assert!(read.status.success(), "{read:?}");
        assert!(read.stdout == expected.as_bytes(), "{read:?}");
    }
    drop(user);
    system.check("frozen");
}
