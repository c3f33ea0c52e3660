//! Who waits for released files: over an upgrade, up to so many of each user; and what a user may ask for.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::Kind;
use hsm_tests::stubs::{assert_reads, is_marked, release};
use hsm_tests::system::{Setup, System};
use hsm_tests::waiting::{
    NOBODY, as_nobody, bring_back, files, held_programs, open_to_all, passing_reader, queue,
    spool_empties, still_waits, sum, take_away, text, wait_for_queue,
};
use nix::sys::signal::Signal;

const LIMIT: Duration = Duration::from_mins(1);
/// Neither root nor nobody.
const SOMEBODY: u32 = 54_321;
/// Of one user.
const WAITERS_MAX: usize = 3;
/// Larger than what `cat` reads at once.
const BYTES: usize = 300_001;

fn setup() -> Setup {
    Setup::new(Kind::Ext4)
        .exposed()
        .with("recall_wait", "\"10m\"")
}

fn bytes_of(number: usize) -> Vec<u8> {
    noise(number as u64, BYTES)
}

/// Released files that everybody may read, whose only copy is on a volume.
fn released(system: &mut System, count: usize) -> Vec<PathBuf> {
    open_to_all(system.root());
    open_to_all(&system.home().at("hsmd.sock"));
    let paths: Vec<_> = (0..count)
        .map(|number| system.at(format!("file{number}")))
        .collect();
    for (number, path) in paths.iter().enumerate() {
        fs::write(path, bytes_of(number)).expect("written");
    }
    spool_empties(system);
    for path in &paths {
        release(system, path);
    }
    paths
}

fn gets(child: Child, expected: &[u8], whose: &str) {
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{whose}: {said}");
    assert!(output.stdout == expected, "{whose} got other bytes");
}

fn programs_wait(system: &System, count: u64) {
    wait_for_queue(system, "all wait", |queue| sum(queue, "programs") == count);
}

/// The file that a process runs, as an inode.
fn program_of(pid: i32) -> u64 {
    fs::metadata(format!("/proc/{pid}/exe"))
        .expect("a process")
        .ino()
}

/// An upgrade as `systemctl reload` does it: another program does the work, and nobody notices.
#[test]
fn who_waits_goes_on_waiting_over_an_upgrade() {
    let mut system = setup().installed().start();
    let paths = released(&mut system, 2);
    let away = take_away(&system, 0);
    let mut before = passing_reader(&paths[0], NOBODY);
    programs_wait(&system, 1);
    let (guard, worker) = (system.process("guard"), system.process("worker"));
    let old = program_of(worker);
    assert_eq!(program_of(guard), old);
    system.install();
    system.daemon().signal(Signal::SIGHUP);
    let end = Instant::now() + LIMIT;
    while matches!(system.processes("worker")[..], [] | [_, _, ..])
        || system.process("worker") == worker
    {
        assert!(Instant::now() < end, "the worker is not another one");
        thread::sleep(Duration::from_millis(5));
    }
    // Who comes while the new one starts waits, too.
    let during = passing_reader(&paths[1], NOBODY);
    system.wait_until_it_answers();
    programs_wait(&system, 2);
    still_waits(&mut before, "who came before");
    assert_ne!(program_of(system.process("worker")), old, "upgraded");
    assert_eq!(system.process("guard"), guard, "the guard lives on");
    assert_eq!(program_of(guard), old);
    bring_back(away);
    gets(before, &bytes_of(0), "who came before");
    gets(during, &bytes_of(1), "who came meanwhile");
    system.check("after an upgrade");
    system.stop();
}

/// A service manager takes a daemon that a signal ended for one that is done, and starts no other.
#[test]
fn a_reload_ends_no_daemon_without_a_guard() {
    let mut system = Setup::new(Kind::Ext4).start();
    let pid = system.status()["pid"].clone();
    for _ in 0..2 {
        system.daemon().signal(Signal::SIGHUP);
    }
    fs::write(system.at("file"), b"written later").expect("written");
    system.sync_all();
    assert_eq!(system.status()["pid"], pid);
    system.stop();
}

#[test]
fn a_user_has_so_many_programs_that_wait() {
    let most = WAITERS_MAX.to_string();
    let mut system = setup().with("recall_waiters_max", &most).start();
    let paths = released(&mut system, WAITERS_MAX + 1);
    let away = take_away(&system, 0);
    let mut waiters: Vec<(Child, usize)> = (0..WAITERS_MAX)
        .map(|number| (passing_reader(&paths[number], NOBODY), number))
        .collect();
    programs_wait(&system, 3);
    let mut held = held_programs();
    held.sort_unstable();
    let mut started: Vec<u32> = waiters.iter().map(|(child, _)| child.id()).collect();
    started.sort_unstable();
    assert_eq!(held, started, "what the kernel says of who waits");
    // Of the same file, and of another one.
    for number in [0, WAITERS_MAX] {
        let since = Instant::now();
        let more = passing_reader(&paths[number], NOBODY)
            .wait_with_output()
            .expect("it ends");
        let said = String::from_utf8_lossy(&more.stderr);
        assert!(said.contains("Resource temporarily unavailable"), "{said}");
        assert_eq!((more.status.code(), more.stdout.len()), (Some(1), 0));
        assert!(since.elapsed() < LIMIT / 4, "at once");
    }
    for uid in [SOMEBODY, 0] {
        waiters.push((passing_reader(&paths[WAITERS_MAX], uid), WAITERS_MAX));
    }
    programs_wait(&system, 5);
    for (child, number) in &mut waiters {
        still_waits(child, &format!("who reads file {number}"));
    }
    bring_back(away);
    for (child, number) in waiters {
        gets(
            child,
            &bytes_of(number),
            &format!("who reads file {number}"),
        );
    }
    // Nobody waits any more: he may again.
    release_and_read_as_nobody(&system, &paths[0]);
}

fn release_and_read_as_nobody(system: &System, path: &Path) {
    hsm_tests::stubs::release_soon(system, path);
    gets(passing_reader(path, NOBODY), &bytes_of(0), "nobody, again");
}

#[test]
fn a_user_recalls_what_he_can_read_and_nothing_else() {
    let mut system = setup().start();
    let hidden = system.at("hidden");
    fs::create_dir(&hidden).expect("a directory");
    let resident = system.at("resident");
    fs::write(&resident, b"never released").expect("written");
    let deep = hidden.join("file");
    fs::write(&deep, bytes_of(9)).expect("written");
    let paths = released(&mut system, 3);
    release(&system, &deep);
    let [open, asked, secret] = &paths[..] else {
        panic!("three files");
    };
    for (path, mode) in [(&hidden, 0o700), (secret, 0o600), (&resident, 0o600)] {
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod");
    }
    system.sync(&[]);

    let done = as_nobody(&system, &["recall", "--wait", text(open)]).done();
    assert!(done.stdout.starts_with("1 file recalled"), "{done}");
    let plan = as_nobody(&system, &["recall", "--dry-run", text(asked)]).done();
    assert!(
        plan.stdout.starts_with("1 file would be recalled"),
        "{plan}"
    );
    assert!(is_marked(asked), "it was dry");

    // What he cannot read he learns nothing of: released, on disk and absent are one.
    let absent = system.at("absent");
    let nowhere = hidden.join("nowhere");
    for words in [&["recall", "--wait"][..], &["recall", "--dry-run"]] {
        let said_of = |path: &Path| {
            let ran = as_nobody(&system, &[words, &[text(path)]].concat());
            let code = ran.code;
            assert!(code != 0, "{ran}");
            // Where he cannot even look, tierctl itself says so.
            let all = ran.text().replace(text(path), "PATH");
            (code, all)
        };
        let refused = said_of(secret);
        assert!(refused.1.contains("PATH"), "{}", refused.1);
        assert!(!refused.1.contains("released"), "{}", refused.1);
        assert_eq!(said_of(&resident), refused, "{words:?}");
        assert_eq!(said_of(&deep), said_of(&nowhere), "{words:?}");
        let gone = said_of(&absent);
        assert!(gone.0 != 0 && !gone.1.contains("released"), "{}", gone.1);
    }
    for path in [secret, &deep] {
        assert!(is_marked(path), "{} was recalled", path.display());
    }
    assert_eq!(files(&queue(&system)).len(), 0, "nothing is wanted");

    // What changes where data lies is not for users, of no file.
    for words in [
        &["release", text(open)][..],
        &["release", "--dry-run", text(open)],
        &["release", "--wait", text(open)],
        &["migrate", text(open)],
        &["migrate", "--dry-run", text(open)],
        &["pin", text(open)],
        &["pin", "--dry-run", text(open)],
        &["unpin", text(open)],
        &["policy", "run"],
        &["policy", "run", "--dry-run"],
        &["policy", "explain", text(open)],
    ] {
        let ran = as_nobody(&system, words).with_code(2);
        assert!(ran.stderr.contains("may not call"), "{words:?}: {ran}");
        assert_eq!(ran.stdout, "", "{words:?}");
    }
    assert!(!is_marked(open), "it was released");
    for (number, path) in paths.iter().enumerate() {
        assert_reads(path, &bytes_of(number), "in the end");
    }
    assert_reads(&deep, &bytes_of(9), "in the end");
}
