//! The watched filesystem is mounted elsewhere, too: a directory of it by a bind mount, all of it in a mount namespace
//! of its own. Who comes that way is guarded like anybody; and hsmd does not end while it can be reached so.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::{Kind, must};
use hsm_tests::stubs::{assert_reads, is_marked, refused, release, release_soon, wait_whole};
use hsm_tests::system::{Setup, System};
use hsm_tests::waiting::{passing_reader, still_waits, text};
use nix::sys::signal::Signal;

const BYTES: usize = 50_000;
const LIMIT: Duration = Duration::from_mins(1);

/// A program that ends with this.
struct Runs(Child);

impl Drop for Runs {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A mount namespace of its own, in which a program sleeps.
fn namespace(system: &System) -> Runs {
    // Not the mounts of tests that run beside this one: those could not be stopped.
    let script = "set -e\n\
        grep -o '/[^ ]*hsm-test[^ ]*' /proc/self/mounts | sort -u | while read -r place; do\n\
            [ \"$place\" = \"$0\" ] || umount -l \"$place\" || true\n\
        done\n\
        exec sleep 1000\n";
    let mut unshare = Command::new("unshare");
    unshare.args(["-m", "sh", "-c", script]).arg(system.root());
    unshare.stdin(Stdio::null()).stderr(Stdio::null());
    let runs = Runs(unshare.spawn().expect("unshare"));
    let comm = format!("/proc/{}/comm", runs.0.id());
    let end = Instant::now() + LIMIT;
    while fs::read_to_string(&comm).is_ok_and(|name| name.trim_end() != "sleep") {
        assert!(Instant::now() < end, "it never sleeps");
        thread::sleep(Duration::from_millis(5));
    }
    runs
}

/// A program in that namespace.
fn inside(namespace: &Runs, words: &[&str]) -> Command {
    let mut command = Command::new("nsenter");
    command
        .arg("-m")
        .arg("-t")
        .arg(namespace.0.id().to_string());
    command.args(words).stdin(Stdio::null());
    command
}

/// A system with files in a directory, and that directory bound to another place.
fn bound(kind: Kind) -> (System, PathBuf) {
    let system = Setup::new(kind).exposed().start();
    fs::create_dir(system.at("dir")).expect("a directory");
    for (seed, name) in (1..).zip(["stub", "whole", "later"]) {
        fs::write(system.at("dir").join(name), noise(seed, BYTES)).expect("written");
    }
    system.sync_all();
    release(&system, &system.at("dir/stub"));
    release(&system, &system.at("dir/later"));
    let elsewhere = system.home().dir("elsewhere");
    must(
        Command::new("mount")
            .arg("--bind")
            .arg(system.at("dir"))
            .arg(&elsewhere),
    );
    (system, elsewhere)
}

fn journal(system: &System) -> String {
    fs::read_to_string(system.home().at("hsmd.err")).unwrap_or_default()
}

/// Has the daemon stop, and waits until it says this of where the filesystem is mounted still.
fn begins_to_stop(system: &mut System, still: &str) {
    system.daemon().signal(Signal::SIGTERM);
    let expected = format!("it is mounted still {still}");
    let end = Instant::now() + LIMIT;
    while !journal(system).contains(&expected) {
        assert!(Instant::now() < end, "{expected:?}: {}", journal(system));
        thread::sleep(Duration::from_millis(20));
    }
    assert!(!system.at("dir").exists(), "it is unmounted");
    assert!(system.daemon().is_alive(), "somebody can reach it");
}

/// Reads nothing, but waits.
fn waits(mut child: Child, context: &str) {
    thread::sleep(Duration::from_millis(700));
    still_waits(&mut child, context);
    child.kill().expect("killed");
    let read = child.wait_with_output().expect("ended");
    assert!(
        read.stdout.is_empty(),
        "{context}: {} bytes",
        read.stdout.len()
    );
}

fn other_mounts(kind: Kind) {
    let (mut system, elsewhere) = bound(kind);
    let context = |what: &str| format!("{kind}: {what}");
    let namespace = namespace(&system);
    let (stub, whole) = (system.at("dir/stub"), system.at("dir/whole"));

    assert_reads(
        &elsewhere.join("stub"),
        &noise(1, BYTES),
        &context("by the bind mount"),
    );
    wait_whole(&stub);
    release_soon(&system, &stub);
    let cat = inside(&namespace, &["cat", text(&stub)])
        .output()
        .expect("cat");
    assert!(
        cat.stdout == noise(1, BYTES),
        "{}",
        context("in the namespace")
    );
    wait_whole(&stub);
    // Who has it open there uses it.
    let used = File::open(elsewhere.join("whole")).expect("opened");
    refused(&system, &whole, "it is open, mapped or being executed");
    drop(used);
    let mut sleep = inside(
        &namespace,
        &["sh", "-c", "exec sleep 1000 <$0", text(&whole)],
    );
    let sleep = Runs(sleep.spawn().expect("sleep"));
    let open = PathBuf::from(format!("/proc/{}/fd/0", sleep.0.id()));
    let end = Instant::now() + LIMIT;
    while fs::read_link(&open).is_ok_and(|link| link != whole) {
        assert!(Instant::now() < end, "it never opens the file");
        thread::sleep(Duration::from_millis(5));
    }
    refused(&system, &whole, "it is open, mapped or being executed");
    drop(sleep);
    release_soon(&system, &whole);
    release_soon(&system, &stub);
    // Only by its public name is a file known to tierctl.
    let named = elsewhere.join("whole");
    let ran = system.tierctl(&["release", text(&named)]);
    assert!(
        ran.code != 0 && ran.text().contains(text(system.root())),
        "{ran}"
    );
    // What is changed that way is logged.
    fs::write(elsewhere.join("new"), noise(4, BYTES)).expect("written");
    must(&mut inside(
        &namespace,
        &["touch", text(&system.at("dir/touched"))],
    ));
    system.check(&context("by other mounts"));
    for path in [&stub, &whole, &system.at("dir/later")] {
        release_soon(&system, path);
    }

    // While it can be reached elsewhere hsmd does not end, and nobody reads zeros there.
    begins_to_stop(&mut system, &format!("at {}", elsewhere.display()));
    let later = elsewhere.join("later");
    assert!(is_marked(&later), "{}", context("it was recalled"));
    waits(passing_reader(&later, 0), &context("by the bind mount"));
    must(Command::new("umount").arg(&elsewhere));
    let (daemon, sleeper) = (system.daemon().pid(), namespace.0.id());
    let expected = format!("in the mount namespace of sleep ({sleeper})");
    let end = Instant::now() + LIMIT;
    while !journal(&system).contains(&expected) {
        assert!(Instant::now() < end, "{expected:?}: {}", journal(&system));
        thread::sleep(Duration::from_millis(50));
    }
    let mut cat = inside(&namespace, &["cat", text(&stub)]);
    let cat = cat.stdout(Stdio::piped()).spawn().expect("cat");
    waits(cat, &context("in the namespace"));
    assert!(Path::new(&format!("/proc/{daemon}")).exists());
    drop(namespace);
    system.stop();
    system.start();
    assert_reads(&stub, &noise(1, BYTES), &context("after all that"));
    assert_reads(&whole, &noise(2, BYTES), &context("after all that"));
    system.check(&context("after all that"));
}

#[test]
fn who_comes_by_other_mounts_of_ext4_is_guarded() {
    other_mounts(Kind::Ext4);
}

#[test]
fn who_comes_by_other_mounts_of_xfs_is_guarded() {
    other_mounts(Kind::Xfs);
}

#[test]
fn who_comes_by_other_mounts_of_btrfs_is_guarded() {
    other_mounts(Kind::Btrfs);
}
