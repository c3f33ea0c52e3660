//! Who may ask what. These tests need root: they run tierctl as somebody else.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use hsmd::control::server::Access;
use serde_json::Value;

use crate::fake::{Daemon, Ran, run};

/// nobody, everywhere.
const UID: u32 = 65534;
/// A group that nobody is in.
const GROUP: u32 = 54_321;

/// tierctl where everybody may run it.
fn program(daemon: &Daemon) -> PathBuf {
    let path = daemon.dir.path().join("tierctl");
    if !path.exists() {
        fs::copy(env!("CARGO_BIN_EXE_tierctl"), &path).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    path
}

fn as_user(daemon: &Daemon, gid: u32, words: &[&str]) -> Ran {
    let mut command = Command::new(program(daemon));
    command
        .arg("--socket")
        .arg(&daemon.socket)
        .args(words)
        .uid(UID)
        .gid(gid)
        .current_dir("/");
    run(&mut command)
}

fn state_as_nobody(daemon: &Daemon, name: &str) -> Ran {
    let path = daemon.path(name);
    as_user(daemon, UID, &["state", "--json", path.to_str().unwrap()])
}

fn set_mode(daemon: &Daemon, name: &str, mode: u32) {
    fs::set_permissions(daemon.path(name), PermissionsExt::from_mode(mode)).unwrap();
}

#[test]
fn others_may_ask_for_the_state_of_what_they_may_read() {
    let daemon = Daemon::start();
    let answer = state_as_nobody(&daemon, "d/a.txt");
    assert_eq!(answer.code, 0, "{}", answer.err);
    let json: Value = serde_json::from_str(&answer.out).unwrap();
    assert_eq!(json["states"][0]["file"], 3);
    // A directory and the root of it all.
    for name in ["d", ""] {
        assert_eq!(state_as_nobody(&daemon, name).code, 0);
    }
}

#[test]
fn others_learn_nothing_of_what_they_may_not_read() {
    let daemon = Daemon::start();
    set_mode(&daemon, "d/a.txt", 0o600);
    let unreadable = state_as_nobody(&daemon, "d/a.txt");
    assert_eq!(unreadable.code, 2);
    assert!(
        unreadable.err.contains("is told nothing of") && unreadable.err.contains("control_group")
    );
    // What does not exist looks the same.
    let absent = state_as_nobody(&daemon, "d/b.txt");
    assert_eq!(unreadable.err.replace("a.txt", "b.txt"), absent.err);
    // Readable, but in a directory that is not open to them.
    set_mode(&daemon, "d/a.txt", 0o644);
    set_mode(&daemon, "d", 0o700);
    assert_eq!(state_as_nobody(&daemon, "d/a.txt").code, 2);
    // The path that led there is closed as well.
    set_mode(&daemon, "d", 0o755);
    let mount = daemon.core.mount.clone();
    fs::set_permissions(&mount, PermissionsExt::from_mode(0o700)).unwrap();
    assert_eq!(state_as_nobody(&daemon, "d/a.txt").code, 2);
    fs::set_permissions(&mount, PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(state_as_nobody(&daemon, "d/a.txt").code, 0);
}

#[test]
fn links_lead_others_nowhere() {
    let daemon = Daemon::start();
    set_mode(&daemon, "d", 0o700);
    symlink("d", daemon.path("open")).unwrap();
    symlink("d/a.txt", daemon.path("link")).unwrap();
    let through = daemon.path("open/a.txt");
    // As a raw client would ask: tierctl itself resolves links first, with its user's rights.
    for path in [through.to_str().unwrap(), "/etc/passwd"] {
        let answer = as_user(&daemon, UID, &["state", path]);
        assert_eq!(answer.code, 2, "{path}: {}", answer.out);
    }
    // The link itself is nobody's secret; the made-up log does not know it.
    assert_eq!(state_as_nobody(&daemon, "link").code, 1);
}

#[test]
fn others_may_do_nothing_else() {
    let daemon = Daemon::start();
    let path = daemon.path("d/a.txt");
    let path = path.to_str().unwrap();
    for words in [
        &["status"][..],
        &["sync"],
        &["log", "list", path],
        &["log", "cat", path],
        &["log", "show", "2"],
        &["volume", "list"],
        &["volume", "verify", "4f00aa11bb22cc33"],
        &["catalog", "digest"],
        &["events"],
        &["find", "1"],
        &["du", path],
        &["pin", path],
        &["unpin", path],
        &["policy", "run"],
        &["policy", "explain", path],
    ] {
        let answer = as_user(&daemon, UID, words);
        assert_eq!(answer.code, 2, "{words:?}: {}{}", answer.out, answer.err);
        assert!(
            answer.err.contains("may not call") && answer.err.contains("run tierctl as root"),
            "{}",
            answer.err
        );
        assert_eq!(answer.out, "");
    }
}

#[test]
fn the_control_group_may_do_everything() {
    let daemon = Daemon::with(Access::Group, Some(GROUP));
    let member = as_user(&daemon, GROUP, &["status"]);
    assert_eq!(member.code, 0, "{}", member.err);
    set_mode(&daemon, "d/a.txt", 0o600);
    let path = daemon.path("d/a.txt");
    assert_eq!(
        as_user(&daemon, GROUP, &["state", path.to_str().unwrap()]).code,
        0
    );
    // Where only the group may connect, the others are told why not.
    let other = as_user(&daemon, UID, &["status"]);
    assert_eq!(other.code, 2);
    assert!(
        other.err.contains("may not be opened") && other.err.contains("control_group"),
        "{}",
        other.err
    );
}
