//! Random operations, release and recall at once, while worker and guard are killed, or the power fails:
//! what is in the files is known all the time from a model of them ([`hsm_tests::shadow`]), and at the end
//! everything comes back from the media as it is on the disk.
//!
//! `HSM_SEED` brings a run back, `HSM_ROUNDS` makes more rounds.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::{Kind, ROOMY_BYTES};
use hsm_tests::program::{Running, locate};
use hsm_tests::report::say;
use hsm_tests::shadow::{self, Shadow};
use hsm_tests::stubs::{assert_reads, is_marked};
use hsm_tests::sys;
use hsm_tests::system::{Setup, System};
use hsm_tests::workload::{Workload, rounds, seed};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Of a disk that is written from end to end before the test.
const DISK_BYTES: u64 = 1 << 30;
/// Files that nobody changes.
const KNOWN: u64 = 40;
/// Threads that change what they have a model of, and others that change anything.
const SHADOWS: u64 = 4;
const OTHERS: u64 = 2;
/// The latter pause after each operation.
const PAUSE: Duration = Duration::from_millis(2);
/// What each thread with a model changes before all is killed.
const CHANGES: u64 = 12;
/// How long one round disturbs.
const ROUND: Duration = Duration::from_secs(4);

fn pause(random: &mut StdRng, at_most_ms: u64) {
    thread::sleep(Duration::from_millis(random.random_range(0..=at_most_ms)));
}

fn known(system: &System, number: u64) -> PathBuf {
    system.at(format!("known/{number}"))
}

fn content(number: u64) -> Vec<u8> {
    // From one byte to two megabytes.
    let len = 1_usize << (number % 22);
    noise(number, len + usize::try_from(number).unwrap_or(0))
}

fn setup(kind: Kind) -> Setup {
    Setup::new(kind)
        .bytes(ROOMY_BYTES)
        .exposed()
        .with("segment_bytes", "\"1MiB\"")
}

/// With the files that nobody changes, all files on the volumes, and those of the model released.
fn start(setup: Setup, asked_by_path: bool, seed: u64) -> (System, Shadow) {
    hsm_tests::compare::ignore_holes();
    let system = setup.start();
    fs::create_dir(system.at("known")).expect("a directory");
    for number in 0..KNOWN {
        fs::write(known(&system, number), content(number)).expect("written");
    }
    let mut shadow = Shadow::new(system.root(), seed, SHADOWS, asked_by_path);
    shadow.fill();
    system.sync_all();
    let path = system.at(shadow::DIRECTORY);
    let _ = system.tierctl(&["release", "-r", path.to_str().expect("ASCII")]);
    (system, shadow)
}

fn known_reads_right(system: &System, context: &str) {
    for number in 0..KNOWN {
        assert_reads(&known(system, number), &content(number), context);
    }
}

/// Releases and recalls the whole tree, or a part of it, again and again.
fn move_data(system: &System, seed: u64, over: &AtomicBool) -> u64 {
    let mut random = StdRng::seed_from_u64(seed);
    let mut released = 0;
    while !over.load(Ordering::Relaxed) {
        let part = ["", "known", "d0", shadow::DIRECTORY][random.random_range(0..4)];
        let path = system.at(part);
        if !path.is_dir() {
            continue;
        }
        let path = path.to_str().expect("ASCII");
        let words: &[&str] = match random.random_range(0..5) {
            0 => &["recall", "-r", path],
            1 => &["recall", "-r", "--wait", path],
            2 => &["release", "-r", "--wait", path],
            _ => &["release", "-r", path],
        };
        // Whatever becomes of it: the worker may just be dead.
        let ran = system.tierctl(words);
        let first = ran.stdout.split(' ').next().unwrap_or_default();
        if words[0] == "release" {
            released += first.parse().unwrap_or(0);
        }
        pause(&mut random, 100);
    }
    released
}

/// Releases what the shadow's threads have changed, as soon as it can be.
fn release_changed(system: &System, over: &AtomicBool) {
    let path = system.at(shadow::DIRECTORY);
    let path = path.to_str().expect("ASCII");
    while !over.load(Ordering::Relaxed) {
        let _ = system.tierctl(&["sync", "--to", "media"]);
        let _ = system.tierctl(&["release", "-r", path]);
    }
}

/// Reads what is known, in random order; right bytes, or EBUSY where the guard was killed.
fn read_known(system: &System, seed: u64, over: &AtomicBool) {
    let mut random = StdRng::seed_from_u64(seed);
    while !over.load(Ordering::Relaxed) {
        let number = random.random_range(0..KNOWN);
        let path = known(system, number);
        assert_reads(&path, &content(number), "while it is disturbed");
        pause(&mut random, 20);
    }
}

fn kill_somebody(system: &System, random: &mut StdRng) -> &'static str {
    match random.random_range(0..5) {
        0 | 1 => {
            system.kill_process("worker");
            "worker"
        }
        2 | 3 => {
            system.kill_process("guard");
            "guard"
        }
        _ => {
            for pid in ["guard", "worker"]
                .iter()
                .flat_map(|role| system.processes(role))
            {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            system.kill_process("guard");
            "both"
        }
    }
}

/// Waits until the daemon answers again.
fn answers(system: &System) {
    let end = Instant::now() + Duration::from_mins(1);
    loop {
        let ran = system.tierctl(&["status"]);
        if ran.code < 2 {
            return;
        }
        assert!(Instant::now() < end, "it never answers again: {ran}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn disturbed(kind: Kind, kills: bool, settings: &[(&str, &str)]) {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let mut setup = setup(kind);
    for (key, value) in settings {
        setup = setup.with(key, value);
    }
    let asked_by_path = !settings.contains(&("pre_access", "false"));
    let (system, mut shadow) = start(setup, asked_by_path, random.random());
    for round in 0..rounds(1) {
        let context = format!("{kind}, {settings:?}, round {round}, HSM_SEED={seed}");
        let workload = Workload::start_slowly(system.root(), random.random(), OTHERS, PAUSE);
        let (over, killed) = (AtomicBool::new(false), AtomicU64::new(0));
        let seeds: [u64; 4] = random.random();
        thread::scope(|scope| {
            let (system, over) = (&system, &over);
            let shadow = &mut shadow;
            let changed = scope.spawn(move || shadow.work(u64::MAX, over));
            let mover = scope.spawn(move || move_data(system, seeds[0], over));
            scope.spawn(move || release_changed(system, over));
            scope.spawn(move || read_known(system, seeds[2], over));
            let end = Instant::now() + ROUND;
            let mut random = StdRng::seed_from_u64(seeds[3]);
            while Instant::now() < end {
                pause(&mut random, 900);
                if kills {
                    let who = kill_somebody(system, &mut random);
                    say(format_args!("{context}: killed {who}"));
                    killed.fetch_add(1, Ordering::Relaxed);
                }
            }
            answers(system);
            over.store(true, Ordering::Relaxed);
            let released = mover.join().expect("released");
            say(format_args!("{context}: {released} files released"));
            let changed = changed.join().expect("right bytes all the time");
            say(format_args!("{context}: beside the model {changed}"));
            assert!(
                kills || changed.count_with_stubs() > 0,
                "{context}: nothing was ever released"
            );
            // With kills most requests fail; that is no proof of anything.
            assert!(
                kills || released > 0,
                "{context}: nothing was ever released"
            );
        });
        let counts = workload.stop();
        say(format_args!(
            "{context}: {} operations, {} kills",
            counts.values().sum::<u64>(),
            killed.load(Ordering::Relaxed)
        ));
        known_reads_right(&system, &context);
        shadow.compare(system.root(), &context);
        let replayed = system.checked(&context);
        shadow.compare(replayed.root(), &format!("{context}, replayed"));
    }
}

macro_rules! disturbed {
    ($($name:ident: $kind:ident, $kills:expr, $settings:expr;)*) => {
        $(
            #[test]
            fn $name() {
                disturbed(Kind::$kind, $kills, $settings);
            }
        )*
    };
}

disturbed! {
    random_release_and_recall_on_ext4: Ext4, false, &[];
    random_release_and_recall_on_xfs: Xfs, false, &[];
    random_release_and_recall_on_btrfs: Btrfs, false, &[];
    random_release_and_recall_under_kills_on_ext4: Ext4, true, &[];
    random_release_and_recall_under_kills_on_xfs: Xfs, true, &[];
    random_release_and_recall_under_kills_on_btrfs: Btrfs, true, &[];
    every_file_is_asked_about_under_kills: Ext4, true, &[("stub_marks_max", "0")];
    few_stubs_have_marks_under_kills: Ext4, true, &[("stub_marks_max", "10")];
    only_opening_is_asked_about_under_kills: Ext4, true, &[("pre_access", "false")];
}

/// What fails while data is on its way.
#[derive(Clone, Copy)]
enum Failure {
    /// Keeper, guard and worker are killed at once.
    Killed,
    /// The filesystem loses what it had not written.
    Power,
    /// Its disk loses what it had not flushed.
    Disk,
}

fn fails_under_way(kind: Kind, failure: Failure) {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let setup = setup(kind);
    let setup = match failure {
        Failure::Disk => setup.bytes(DISK_BYTES).on_failing_disk(),
        Failure::Killed | Failure::Power => setup,
    };
    let (mut system, mut shadow) = start(setup, true, random.random());
    for round in 0..rounds(4) {
        let context = format!("{kind}, round {round}, HSM_SEED={seed}");
        Workload::start(system.root(), random.random(), 3, 300).finish();
        let changed = shadow.work(CHANGES, &AtomicBool::new(false));
        say(format_args!("{context}: beside the model {changed}"));
        shadow.let_go();
        if matches!(failure, Failure::Power) {
            let root = File::open(system.root()).expect("the root");
            nix::unistd::syncfs(&root).expect("synced");
        }
        if random.random_bool(0.7) {
            system.sync_all();
        }
        let root = system.root().to_str().expect("ASCII").to_owned();
        let words: &[&[&str]] = match random.random_range(0..3) {
            0 => &[&["release", "-r"]],
            1 => &[&["release", "-r"], &["recall", "-r"]],
            _ => &[&["recall", "-r"], &["release", "-r"], &["release", "-r"]],
        };
        // Now and then what is released is so when it begins.
        if random.random_bool(0.5) {
            let _ = system.tierctl(&["release", "-r", &root]);
        }
        let mut asked = Vec::new();
        for (number, words) in words.iter().enumerate() {
            let mut command = Command::new(locate("tierctl"));
            command
                .arg("--config")
                .arg(system.config())
                .args(*words)
                .arg(&root);
            let name = format!("answers/{round}-{number}");
            asked.push(Running::start(command, system.home().path(), &name));
            pause(&mut random, 60);
        }
        pause(&mut random, 250);
        if kind == Kind::Btrfs && random.random_bool(0.5) {
            // As it does by itself now and then: what is on its way is not part of it.
            let root = File::open(system.root()).expect("the root");
            sys::commit_btrfs(&root).expect("committed");
        }
        match failure {
            Failure::Killed => system.kill_all(),
            Failure::Power | Failure::Disk => system.power_fails(),
        }
        for mut running in asked {
            running.kill();
        }
        match failure {
            Failure::Killed => system.start(),
            Failure::Power | Failure::Disk => system.power_returns(),
        }
        let stubs = (0..KNOWN)
            .filter(|number| is_marked(&known(&system, *number)))
            .count();
        say(format_args!("{context}: {stubs} of {KNOWN} have marks"));
        known_reads_right(&system, &context);
        shadow.compare(system.root(), &context);
        if round % 2 == 1 {
            let replayed = system.checked(&context);
            shadow.compare(replayed.root(), &format!("{context}, replayed"));
        }
    }
}

#[test]
fn all_is_killed_while_data_moves_on_ext4() {
    fails_under_way(Kind::Ext4, Failure::Killed);
}

#[test]
fn all_is_killed_while_data_moves_on_xfs() {
    fails_under_way(Kind::Xfs, Failure::Killed);
}

#[test]
fn all_is_killed_while_data_moves_on_btrfs() {
    fails_under_way(Kind::Btrfs, Failure::Killed);
}

#[test]
fn the_power_fails_while_data_moves_on_ext4() {
    fails_under_way(Kind::Ext4, Failure::Power);
}

#[test]
fn the_power_fails_while_data_moves_on_xfs() {
    fails_under_way(Kind::Xfs, Failure::Power);
}

#[test]
fn the_power_fails_while_data_moves_on_btrfs() {
    fails_under_way(Kind::Btrfs, Failure::Disk);
}

#[test]
fn the_disk_loses_power_while_data_moves_on_ext4() {
    fails_under_way(Kind::Ext4, Failure::Disk);
}
