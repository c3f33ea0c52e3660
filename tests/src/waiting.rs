//! Programs of several users that wait for released files whose volume is away, and who asks about that.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::program::{Ran, locate, run};
use crate::system::System;

/// nobody, everywhere.
pub const NOBODY: u32 = 65534;
/// A queue that is not as wanted by then never is.
const LIMIT: Duration = Duration::from_mins(1);

/// Everything is on the volumes and nothing of it in the spool, which a stop sees to soonest.
pub fn spool_empties(system: &mut System) {
    system.sync_all();
    system.restart();
    let _ = system.wait_for("the spool is empty", |status| {
        status["spool"]["segments"] == 0 && status["spool"]["open_segment"].is_null()
    });
}

/// The volume of a pool out of reach, until this is given to [`bring_back`].
pub fn take_away(system: &System, pool: usize) -> (PathBuf, PathBuf) {
    let volume = system.volumes(pool)[0].clone();
    let away = volume.with_extension("away");
    fs::rename(&volume, &away).expect("to take it away");
    (volume, away)
}

/// Ends [`take_away`].
pub fn bring_back((volume, away): (PathBuf, PathBuf)) {
    fs::rename(away, volume).expect("to bring it back");
}

/// Lets everybody come to a place: the directories of tests are their owner's only.
pub fn open_to_all(path: &Path) {
    for dir in path.ancestors() {
        let _ = fs::set_permissions(dir, PermissionsExt::from_mode(0o755));
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("hsm-test.") {
            return;
        }
    }
}

/// A path of a test as text.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("ASCII")
}

/// A program that reads a file, as a user; it waits in open(2).
pub fn reader(path: &Path, uid: u32) -> Child {
    cat(path, uid, Stdio::null())
}

/// The same, which passes on what it reads: ask for that by `wait_with_output`.
pub fn passing_reader(path: &Path, uid: u32) -> Child {
    cat(path, uid, Stdio::piped())
}

fn cat(path: &Path, uid: u32, stdout: Stdio) -> Child {
    Command::new("cat")
        .arg(path)
        .uid(uid)
        .gid(uid)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(Stdio::piped())
        .spawn()
        .expect("cat")
}

/// Programs that this test started, directly or not, and that wait for an answer about an access now. Asks the
/// kernel, not the daemon.
pub fn held_programs() -> Vec<u32> {
    let mut parents = HashMap::new();
    let mut held = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let stat = fs::read_to_string(process.path().join("stat")).unwrap_or_default();
        // PID (NAME) STATE PARENT ...; a name may have parentheses.
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| {
            let word = rest.split(' ').nth(1)?;
            word.parse::<u32>().ok()
        });
        parents.insert(pid, parent.unwrap_or(0));
        let place = fs::read_to_string(process.path().join("wchan")).unwrap_or_default();
        if place.contains("fanotify") {
            held.push(pid);
        }
    }
    let own = std::process::id();
    let is_ours = |pid: &u32| {
        let mut pid = *pid;
        while pid > 1 && pid != own {
            pid = parents.get(&pid).copied().unwrap_or(0);
        }
        pid == own
    };
    held.retain(is_ours);
    held
}

/// Threads of this test that wait for an answer about an access now.
pub fn held_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten();
    let waits = |task: &fs::DirEntry| {
        let place = fs::read_to_string(task.path().join("wchan"));
        place.is_ok_and(|place| place.contains("fanotify"))
    };
    tasks.flatten().filter(waits).count()
}

/// Waits until so many threads of this test wait for an answer.
pub fn threads_wait(count: usize) {
    let end = Instant::now() + LIMIT;
    while held_threads() < count {
        let held = held_threads();
        assert!(Instant::now() < end, "only {held} of {count} wait");
        thread::sleep(Duration::from_millis(5));
    }
}

/// It has not ended.
pub fn still_waits(child: &mut Child, whose: &str) {
    let ended = child.try_wait().expect("to look at it");
    assert!(ended.is_none(), "{whose} does not wait any more: {ended:?}");
}

/// tierctl as a user who may not do everything.
pub fn as_nobody(system: &System, words: &[&str]) -> Ran {
    let program = system.home().at("tierctl");
    if !program.exists() {
        fs::copy(locate("tierctl"), &program).expect("a copy of tierctl");
        open_to_all(&program);
    }
    let mut command = Command::new(program);
    command
        .arg("--socket")
        .arg(system.home().at("hsmd.sock"))
        .args(words)
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir("/");
    run(command)
}

/// What recall has to do.
pub fn queue(system: &System) -> Value {
    system.tierctl(&["queue", "list", "--json"]).done().json()
}

/// Waits until it is as wanted.
pub fn wait_for_queue(system: &System, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + LIMIT;
    loop {
        let queue = queue(system);
        if wanted(&queue) {
            return queue;
        }
        assert!(Instant::now() < end, "{what}: never so: {queue:#}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The files in a queue.
pub fn files(queue: &Value) -> &[Value] {
    queue["files"].as_array().map_or(&[], Vec::as_slice)
}

/// One of them; null if it is not in the queue.
pub fn file<'q>(queue: &'q Value, path: &Path) -> &'q Value {
    let mut found = files(queue)
        .iter()
        .filter(|file| file["path"] == text(path));
    found.next().unwrap_or(&Value::Null)
}

/// The sum of a count over all files: "programs", "requests".
pub fn sum(queue: &Value, key: &str) -> u64 {
    let counts = files(queue).iter().map(|file| file[key].as_u64());
    counts.map(|count| count.unwrap_or(0)).sum()
}

/// Ends the others, also where the test fails.
pub struct Ends<'a>(pub &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
