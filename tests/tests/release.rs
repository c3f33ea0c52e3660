//! P3: whoever reads a released file gets its bytes or an error, whatever happens to the daemon.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::compare::{Tree, assert_equal};
use hsm_tests::loopfs::{Kind, must};
use hsm_tests::system::{Setup, System};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Bytes that do not compress, the same for the same seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// Blocks of the disk that a file has, but for those of its attributes.
fn kib_on_disk(path: &Path) -> u64 {
    fs::symlink_metadata(path).expect("the file").blocks() / 2
}

fn released(system: &System, paths: &[&Path]) {
    let mut words = vec!["release"];
    words.extend(paths.iter().map(|path| path.to_str().expect("ASCII")));
    let ran = system.tierctl(&words);
    assert_eq!(ran.code, 0, "{ran}");
    for path in paths {
        assert!(kib_on_disk(path) <= 4, "{} is on disk", path.display());
    }
}

fn exposed(kind: Kind) -> System {
    Setup::new(kind).exposed().start()
}

fn ctimes(root: &Path, files: &[PathBuf]) -> BTreeMap<PathBuf, (i64, i64, u64)> {
    files
        .iter()
        .map(|file| {
            let meta = fs::symlink_metadata(root.join(file)).expect("the file");
            (file.clone(), (meta.mtime(), meta.mtime_nsec(), meta.len()))
        })
        .collect()
}

fn comes_back(kind: Kind) {
    let system = exposed(kind);
    fs::create_dir_all(system.at("dir/below")).expect("a directory");
    let files = ["dir/small", "dir/below/large", "dir/text", "empty"].map(PathBuf::from);
    fs::write(system.at("dir/small"), b"few bytes").expect("written");
    fs::write(system.at("dir/below/large"), noise(1, 9_000_001)).expect("written");
    fs::write(system.at("dir/text"), "line\n".repeat(100_000)).expect("written");
    fs::write(system.at("empty"), b"").expect("written");
    fs::hard_link(system.at("dir/small"), system.at("link")).expect("linked");
    system.sync_all();
    let before = Tree::read(system.root());
    let times = ctimes(system.root(), &files);
    let lsn = system.sync(&[]);
    let root = system.root().to_str().expect("ASCII").to_owned();
    let ran = system.tierctl(&["release", "--recursive", &root]).done();
    assert!(ran.stdout.contains("4 files released"), "{ran}");
    assert_eq!(
        times,
        ctimes(system.root(), &files),
        "{kind}: times or sizes"
    );
    for file in &files {
        assert!(
            kib_on_disk(&system.at(file)) <= 4,
            "{} is on disk",
            file.display()
        );
    }
    let state = system.tierctl(&["state", system.at("link").to_str().expect("ASCII")]);
    assert!(state.stdout.contains("migrated"), "{state}");
    assert_equal(
        &before,
        &Tree::read(system.root()),
        &format!("{kind}: read after release"),
    );
    assert_eq!(
        times,
        ctimes(system.root(), &files),
        "{kind}: times or sizes after recall"
    );
    system.wait_for("no stub is left", |_| {
        let state = system.tierctl(&["state", system.at("dir/small").to_str().expect("ASCII")]);
        state.stdout.contains("premigrated")
    });
    system.sync_all();
    // Release and recall are no changes: no version came into the log by them.
    let shown = system
        .tierctl(&[
            "log",
            "list",
            "--json",
            system.at("dir/below/large").to_str().expect("ASCII"),
        ])
        .done();
    let versions = shown.json()["list"].as_array().map_or(0, Vec::len);
    assert_eq!(versions, 1, "{shown}\nbefore the release: LSN {lsn}");
    system.check(&format!("{kind}: after release and recall"));
    names_recall_nothing(&system, kind);
}

/// What changes a stub's names and attributes brings no byte back, and is logged.
fn names_recall_nothing(system: &System, kind: Kind) {
    let (small, large) = (system.at("dir/small"), system.at("dir/below/large"));
    released(system, &[&small, &large]);
    fs::rename(system.at("link"), system.at("dir/renamed")).expect("renamed");
    fs::hard_link(&large, system.at("second")).expect("linked");
    fs::set_permissions(&large, fs::Permissions::from_mode(0o640)).expect("changed");
    std::os::unix::fs::chown(&large, Some(1234), Some(4321)).expect("changed");
    let mut touch = Command::new("touch");
    hsm_tests::loopfs::must(touch.args(["-d", "2001-02-03T04:05:06.789Z"]).arg(&small));
    system.sync_all();
    for path in [&small, &large] {
        assert!(
            kib_on_disk(path) <= 4,
            "{kind}: {} was recalled",
            path.display()
        );
    }
    let stub = fs::metadata(&small).expect("the stub");
    assert_eq!(
        (stub.mtime(), stub.mtime_nsec()),
        (981_173_106, 789_000_000)
    );
    fs::remove_file(system.at("dir/renamed")).expect("removed");
    system.check(&format!("{kind}: stubs renamed, linked, touched"));
    let read = fs::metadata(&small).expect("the file");
    assert_eq!(
        (read.mtime(), read.mtime_nsec()),
        (981_173_106, 789_000_000),
        "{kind}: after recall"
    );
}

fn states(system: &System, words: &[&str]) -> Vec<String> {
    let mut all = vec!["state", "--json"];
    all.extend(words);
    let states = system.tierctl(&all).json()["states"].clone();
    let states = states.as_array().expect("states").iter();
    states
        .map(|state| format!("{} {}", state["state"], state["pending"]))
        .collect()
}

/// A new name or attribute is in the log at once, and is no reason to call the file changed. Whether its content
/// is as logged is known when it was read again, which `--wait` sees to.
#[test]
fn what_got_another_name_a_moment_ago_is_released_with_wait() {
    let system = exposed(Kind::Ext4);
    let names = ["moved", "linked", "noted", "closed"];
    for (seed, name) in (1..).zip(names) {
        fs::write(system.at(name), noise(seed, 100_000)).expect("written");
    }
    system.sync_all();
    fs::rename(system.at("moved"), system.at("moved.2")).expect("renamed");
    fs::rename(system.at("moved.2"), system.at("moved")).expect("renamed");
    fs::hard_link(system.at("linked"), system.at("linked.2")).expect("linked");
    let mut note = Command::new("setfattr");
    hsm_tests::loopfs::must(
        note.args(["-n", "user.a", "-v", "b"])
            .arg(system.at("noted")),
    );
    fs::set_permissions(system.at("closed"), fs::Permissions::from_mode(0o600)).expect("changed");
    // No sweep, which would read them.
    system.sync(&["--to", "media"]);
    let paths: Vec<String> = names
        .map(|name| system.at(name).display().to_string())
        .to_vec();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    assert_eq!(states(&system, &paths), ["\"premigrated\" null"; 4]);
    let ran = system.tierctl(&[&["release"], &paths[..]].concat());
    assert_eq!(ran.code, 1, "{ran}");
    assert_eq!(
        ran.stderr.matches("release it with --wait").count(),
        4,
        "{ran}"
    );
    let ran = system
        .tierctl(&[&["release", "--wait"], &paths[..]].concat())
        .done();
    assert!(ran.stdout.starts_with("4 files released"), "{ran}");
    assert_eq!(
        states(&system, &paths)
            .iter()
            .filter(|state| state.starts_with("\"migrated\""))
            .count(),
        4
    );
    // While a recall is not finished the file is no changed one either.
    for (seed, name) in (1..).zip(names) {
        assert_eq!(
            fs::read(system.at(name)).expect("read"),
            noise(seed, 100_000)
        );
    }
    for state in states(&system, &paths) {
        assert!(
            state.starts_with("\"premigrated\"") || state.contains("waits to be examined"),
            "{state}"
        );
    }
    system.check("after release with --wait");
}

/// What cannot be asked for is named, and the others do not suffer for it.
#[test]
fn one_path_that_is_wrong_spoils_no_other() {
    let system = exposed(Kind::Ext4);
    fs::create_dir_all(system.at("dir/closed")).expect("a directory");
    for name in ["one", "two", "dir/three", "dir/closed/four"] {
        fs::write(system.at(name), noise(1, 100_000)).expect("written");
    }
    fs::set_permissions(system.at("dir/closed"), fs::Permissions::from_mode(0o700))
        .expect("changed");
    system.sync_all();
    let at = |name: &str| system.at(name).display().to_string();
    let (one, two, dir, none) = (at("one"), at("two"), at("dir"), at("none"));
    let list = system.home().at("list");
    fs::write(&list, format!("{two}\n{none}\n")).expect("written");
    let named = [
        one.as_str(),
        &dir,
        "--from-file",
        list.to_str().expect("ASCII"),
    ];
    for (verb, done) in [
        ("migrate", "2 files are on every pool"),
        ("release", "2 files released"),
        ("recall", "2 files asked for"),
    ] {
        let ran = system.tierctl(&[&[verb], &named[..]].concat());
        assert_eq!(ran.code, 3, "{ran}");
        assert!(ran.stdout.contains(done), "{ran}");
        assert!(
            ran.stderr.contains(&format!("{none}: ")) && ran.stderr.contains("give --recursive"),
            "{ran}"
        );
        let ran = system.tierctl(&[verb, &none]);
        assert!(ran.code == 2 && ran.stderr.contains(&none), "{ran}");
        let ran = system.tierctl(&[verb, "--json", &none, &one]);
        assert!(ran.stdout.contains(&none), "{ran}");
        assert!(ran.json()["files"].as_u64().is_some(), "{ran}");
    }
    // A user gets what he may have.
    let all = system
        .tierctl(&["release", "--wait", "--recursive", &dir])
        .done();
    assert!(all.stdout.starts_with("2 files released"), "{all}");
    let mut asked = Command::new("setpriv");
    let user = system.tierctl_command(&["recall", "--wait", "--recursive", &dir]);
    asked.args(["--reuid=1000", "--regid=1000", "--clear-groups"]);
    let ran = hsm_tests::program::run({
        asked.arg(user.get_program()).args(user.get_args());
        asked
    });
    assert_eq!(ran.code, 3, "{ran}");
    assert!(ran.stdout.starts_with("1 file recalled"), "{ran}");
    assert!(
        ran.stderr
            .contains("dir/closed: not done: it cannot be listed"),
        "{ran}"
    );
}

/// What a write takes away (capabilities, set-id bits) is there again after punch and recall.
fn attributes_survive(kind: Kind) {
    let system = exposed(kind);
    let file = system.at("program");
    fs::write(&file, noise(3, 200_000)).expect("written");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o6755)).expect("a mode");
    // cap_net_raw=ep
    let capability = "0x0100000200200000000000000000000000000000";
    for (name, value) in [
        ("security.capability", capability),
        ("user.note", "0x616263"),
        ("trusted.other", "0x00"),
    ] {
        let mut set = Command::new("setfattr");
        hsm_tests::loopfs::must(set.args(["-n", name, "-v", value]).arg(&file));
    }
    system.sync_all();
    // Chattr only now: an immutable file is not released.
    let before = Tree::read(system.root());
    released(&system, &[&file]);
    hsm_tests::loopfs::must(Command::new("chattr").arg("+i").arg(&file));
    let sealed = fs::metadata(&file).expect("the stub");
    assert_eq!(sealed.mode() & 0o7777, 0o6755, "{kind}: after release");
    assert_eq!(fs::read(&file).expect("read"), noise(3, 200_000), "{kind}");
    let flags = hsm_tests::loopfs::must(Command::new("lsattr").arg(&file));
    assert!(
        flags
            .split(' ')
            .next()
            .is_some_and(|flags| flags.contains('i')),
        "{kind}: {flags}"
    );
    hsm_tests::loopfs::must(Command::new("chattr").arg("-i").arg(&file));
    assert_equal(
        &before,
        &Tree::read(system.root()),
        &format!("{kind}: after recall"),
    );
    system.check(&format!("{kind}: attributes"));
}

#[test]
fn attributes_survive_release_and_recall_on_ext4() {
    attributes_survive(Kind::Ext4);
}

#[test]
fn attributes_survive_release_and_recall_on_xfs() {
    attributes_survive(Kind::Xfs);
}

#[test]
fn attributes_survive_release_and_recall_on_btrfs() {
    attributes_survive(Kind::Btrfs);
}

#[test]
fn a_released_file_comes_back_on_ext4() {
    comes_back(Kind::Ext4);
}

#[test]
fn a_released_file_comes_back_on_xfs() {
    comes_back(Kind::Xfs);
}

#[test]
fn a_released_file_comes_back_on_btrfs() {
    comes_back(Kind::Btrfs);
}

/// Reads files in threads while `disturb` does its worst; each must give its bytes, or an error.
fn read_under(system: &System, files: u64, bytes: usize, disturb: impl Fn(&System, u64)) -> u64 {
    for number in 0..files {
        fs::write(system.at(format!("f{number}")), noise(number, bytes)).expect("written");
    }
    system.sync_all();
    let root = system.root().to_str().expect("ASCII").to_owned();
    let mut errors = 0;
    for round in 0..3 {
        let ran = system.tierctl(&["release", "--recursive", &root]);
        assert!(matches!(ran.code, 0 | 3), "round {round}: {ran}");
        thread::scope(|scope| {
            let readers: Vec<_> = (0..files)
                .map(|number| {
                    scope.spawn(move || {
                        let read = fs::read(system.at(format!("f{number}")));
                        match read {
                            Ok(found) => {
                                assert!(found == noise(number, bytes), "f{number} is wrong");
                                0
                            }
                            Err(_) => 1,
                        }
                    })
                })
                .collect();
            thread::sleep(Duration::from_millis(20 * (round + 1)));
            disturb(system, round);
            for reader in readers {
                errors += reader.join().expect("right bytes");
            }
        });
        // Whatever happened, it is right afterwards.
        for number in 0..files {
            let found = patiently(&system.at(format!("f{number}")));
            assert!(found == noise(number, bytes), "f{number} is wrong");
        }
        settle(system, files);
    }
    errors
}

/// The bytes of a file; a program that came while the guard was changed may have to try again.
fn patiently(path: &Path) -> Vec<u8> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        match fs::read(path) {
            Ok(bytes) => return bytes,
            Err(error)
                if error.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < end =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
}

/// Waits until no file has its mark any more, and the daemon answers.
fn settle(system: &System, files: u64) {
    let end = Instant::now() + Duration::from_mins(1);
    for number in 0..files {
        let path = system.at(format!("f{number}"));
        let path = path.to_str().expect("ASCII");
        loop {
            let ran = system.tierctl(&["state", path]);
            if !ran.stdout.contains(": migrated")
                && !ran.stdout.contains(": partial")
                && ran.code < 2
            {
                break;
            }
            assert!(Instant::now() < end, "f{number} keeps its mark: {ran}");
            thread::sleep(Duration::from_millis(50));
        }
    }
    // Its content is read once more where a crash left that open: else it is not released again.
    system.sync_all();
}

fn worker_killed(kind: Kind) {
    let system = exposed(kind);
    let errors = read_under(&system, 12, 3_000_000, |system, _| {
        system.kill_process("worker");
    });
    assert_eq!(errors, 0, "{kind}: a killed worker fails nobody");
}

#[test]
fn readers_wait_for_the_next_worker_on_ext4() {
    worker_killed(Kind::Ext4);
}

#[test]
fn readers_wait_for_the_next_worker_on_xfs() {
    worker_killed(Kind::Xfs);
}

#[test]
fn readers_wait_for_the_next_worker_on_btrfs() {
    worker_killed(Kind::Btrfs);
}

fn guard_killed(kind: Kind) {
    let system = exposed(kind);
    read_under(&system, 12, 3_000_000, |system, _| {
        system.kill_process("guard");
    });
}

#[test]
fn nobody_reads_zeros_when_the_guard_is_killed_on_ext4() {
    guard_killed(Kind::Ext4);
}

#[test]
fn nobody_reads_zeros_when_the_guard_is_killed_on_xfs() {
    guard_killed(Kind::Xfs);
}

#[test]
fn nobody_reads_zeros_when_the_guard_is_killed_on_btrfs() {
    guard_killed(Kind::Btrfs);
}

/// A thousand of these paths do not fit into one request.
#[test]
fn files_with_long_paths_are_released_too() {
    let system = exposed(Kind::Ext4);
    let deep: PathBuf = std::iter::repeat_n("d".repeat(250), 12).collect();
    let dir = system.at("long").join(deep);
    fs::create_dir_all(&dir).expect("made");
    for number in 0..400 {
        fs::write(dir.join(format!("file-{number}")), "x".repeat(5000)).expect("written");
    }
    system.sync_all();
    let top = system.at("long");
    let ran = system.tierctl(&["release", "-r", top.to_str().expect("ASCII")]);
    assert_eq!(ran.code, 0, "{ran}");
    assert!(ran.stdout.contains("400 files released"), "{ran}");
}

/// Inodes that the kernel does not ask about, where it asks about every other.
fn ignored(system: &mut System) -> usize {
    let infos = format!("/proc/{}/fdinfo", system.daemon().pid());
    fs::read_dir(infos)
        .expect("descriptors")
        .flatten()
        .filter_map(|info| fs::read_to_string(info.path()).ok())
        .map(|info| {
            let inodes = info
                .lines()
                .filter(|line| line.starts_with("fanotify ino:"));
            inodes
                .filter(|line| !line.contains("ignored_mask:0 "))
                .count()
        })
        .sum()
}

/// Where every file is asked about, whole ones are ignored after the first time: until they are released.
#[test]
fn a_file_that_was_ignored_is_asked_about_again_when_it_is_released() {
    let mut system = Setup::new(Kind::Ext4)
        .exposed()
        .with("stub_marks_max", "0")
        .start();
    let file = system.at("file");
    for round in 0..4 {
        fs::write(&file, noise(round, 50_000)).expect("written");
        system.sync_all();
        for _ in 0..3 {
            assert_eq!(fs::read(&file).expect("read"), noise(round, 50_000));
        }
        // From the first release on there are more stubs than can have marks, and the guard knows it.
        let patience = Instant::now() + Duration::from_secs(20);
        while round > 0 && ignored(&mut system) == 0 {
            assert!(Instant::now() < patience, "{round}");
            fs::read(&file).expect("read");
        }
        released(&system, &[&file]);
        // Not by the first access after it, nor by a later one.
        for _ in 0..3 {
            assert_eq!(
                fs::read(&file).expect("read"),
                noise(round, 50_000),
                "{round}"
            );
        }
    }
}

#[test]
fn stubs_outlive_a_restart_and_stopping_waits_for_users() {
    let mut system = exposed(Kind::Ext4);
    fs::write(system.at("kept"), noise(5, 100_000)).expect("written");
    system.sync_all();
    released(&system, &[&system.at("kept")]);
    let root = system.root().to_owned();
    // Somebody stands in a directory of it: it is not unmounted under him, and goes on working.
    let mut user = Command::new("sleep")
        .arg("1000")
        .current_dir(&root)
        .spawn()
        .expect("sleep");
    // As a terminal's Ctrl-C and `killall` do it: guard and worker go on until nobody uses the filesystem.
    let workers = system.processes("worker");
    for pid in system.processes("guard").into_iter().chain(workers.clone()) {
        kill(Pid::from_raw(pid), Signal::SIGTERM).expect("told");
    }
    system.daemon().signal(Signal::SIGTERM);
    thread::sleep(Duration::from_millis(700));
    assert_eq!(system.processes("worker"), workers);
    assert_eq!(
        fs::read(system.at("kept")).expect("read while it stops"),
        noise(5, 100_000)
    );
    user.kill().expect("killed");
    user.wait().expect("gone");
    system.stop();
    assert!(!root.join("kept").exists(), "it is unmounted");
    system.start();
    system.wait_for("premigrated", |_| {
        let state = system.tierctl(&["state", system.at("kept").to_str().expect("ASCII")]);
        state.stdout.contains("premigrated")
    });
    released(&system, &[&system.at("kept")]);
    system.stop();
    system.start();
    assert_eq!(
        fs::read(root.join("kept")).expect("read"),
        noise(5, 100_000)
    );
}

/// The public place has a second mount over the first one.
#[test]
fn stopping_takes_all_mounts_away_that_are_at_its_place() {
    let mut system = exposed(Kind::Ext4);
    let root = system.root().to_str().expect("ASCII").to_owned();
    must(Command::new("mount").args(["--bind", &root, &root]));
    system.stop();
    let mounts = hsm_tests::home::mounts_below(system.root()).expect("mounts");
    assert!(mounts.is_empty(), "{mounts:?}");
}

#[test]
fn what_was_left_behind_is_taken_away_before_it_is_exposed_again() {
    let mut system = exposed(Kind::Ext4);
    fs::write(system.at("kept"), noise(6, 300_000)).expect("written");
    fs::write(system.at("whole"), noise(7, 100_000)).expect("written");
    system.sync_all();
    released(&system, &[&system.at("kept")]);
    system.kill_all();
    // Nobody guards it now. In use, it is not exposed again.
    let mut user = Command::new("sleep")
        .arg("1000")
        .current_dir(system.root())
        .spawn()
        .expect("sleep");
    let refused = system.try_start().expect_err("refused");
    assert!(
        refused.code == 2 && refused.stderr.contains("in use by sleep"),
        "{refused}"
    );
    user.kill().expect("killed");
    user.wait().expect("gone");
    // What no process can be named for goes soon, most of the time: a guard that was killed has it still.
    let mut losetup = Command::new("losetup");
    losetup.args(["--find", "--show"]).arg(system.at("whole"));
    let device = hsm_tests::loopfs::must(&mut losetup);
    system.start_unready();
    thread::sleep(Duration::from_secs(1));
    let mut losetup = Command::new("losetup");
    hsm_tests::loopfs::must(losetup.arg("-d").arg(device.trim_end()));
    system.wait_until_it_answers();
    assert_eq!(
        fs::read(system.at("kept")).expect("read"),
        noise(6, 300_000)
    );
}

#[test]
fn a_filesystem_that_is_mounted_elsewhere_is_refused() {
    let mut system = Setup::new(Kind::Ext4).exposed().build();
    let device = system.config_text(&[]);
    let device = device
        .lines()
        .find_map(|line| line.strip_prefix("device = "))
        .expect("a device");
    let elsewhere = system.home().dir("elsewhere");
    let mut mount = Command::new("mount");
    mount.arg(device.trim_matches('"')).arg(&elsewhere);
    hsm_tests::loopfs::must(&mut mount);
    let refused = system.try_start().expect_err("refused");
    hsm_tests::loopfs::must(Command::new("umount").arg(&elsewhere));
    assert!(
        refused.code == 2 && refused.stderr.contains("it is mounted at"),
        "{refused}"
    );
    assert!(refused.stderr.contains("/etc/fstab"), "{refused}");
    system.start();
}
