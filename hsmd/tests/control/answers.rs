//! What tierctl answers from a small log: states, versions, earlier content, transactions.

use std::fs;
use std::sync::atomic::Ordering;

use hsmd::control::model::VolumeState;
use serde_json::Value;

use crate::fake::{Daemon, Ran, run};
use crate::log::{FIRST, GONE, SECOND, SPARSE_AT, SPARSE_SIZE};

fn tierctl(daemon: &Daemon, words: &[&str]) -> Ran {
    run(&mut daemon.tierctl(words))
}

fn json(daemon: &Daemon, words: &[&str]) -> Value {
    let ran = tierctl(daemon, words);
    assert_eq!(ran.code, 0, "{words:?}: {}", ran.err);
    serde_json::from_str(&ran.out).unwrap()
}

fn path(daemon: &Daemon, name: &str) -> String {
    daemon.path(name).display().to_string()
}

#[test]
fn the_state_of_files() {
    let daemon = Daemon::start();
    let known = path(&daemon, "d/a.txt");
    let state = &json(&daemon, &["state", "--json", &known])["states"][0];
    // The pools have everything up to LSN 1040.
    assert_eq!(
        (state["state"].as_str(), state["lsn"].as_u64()),
        (Some("premigrated"), Some(3))
    );
    assert_eq!(state["size"], SECOND.len());
    assert_eq!(state["path"].as_str(), Some(known.as_str()));
    for pool in &mut daemon.core.status.lock().unwrap().pools {
        pool.copied_lsn = (pool.name == "a").then_some(3);
    }
    let ran = tierctl(&daemon, &["state", &known]);
    assert!(
        ran.out.contains("logged (in the spool, on 1 of 2 pools)"),
        "{}",
        ran.out
    );
    daemon.core.dirty.store(true, Ordering::SeqCst);
    let ran = tierctl(&daemon, &["state", &known]);
    assert_eq!(ran.code, 1);
    assert!(
        ran.out.contains(": dirty (") && ran.out.contains("waits to be examined"),
        "{}",
        ran.out
    );
    let new = path(&daemon, "new");
    let ran = tierctl(&daemon, &["state", &new]);
    assert_eq!(ran.code, 1);
    assert!(ran.out.contains(": untracked ("), "{}", ran.out);
}

#[test]
fn some_states_and_some_failures() {
    let daemon = Daemon::start();
    let known = path(&daemon, "d/a.txt");
    let ran = tierctl(&daemon, &["state", &known, "/elsewhere"]);
    assert_eq!(ran.code, 3);
    assert!(ran.out.contains("premigrated"));
    assert!(
        ran.err
            .contains("/elsewhere is not on the watched filesystem: give a path below"),
        "{}",
        ran.err
    );
    assert_eq!(tierctl(&daemon, &["state", "/elsewhere"]).code, 2);
    let ran = tierctl(&daemon, &["state", "--json", &known, "/elsewhere"]);
    let json: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(json["failures"][0]["path"], "/elsewhere");
}

#[test]
fn a_relative_path_and_links_on_the_way_are_resolved() {
    let daemon = Daemon::start();
    std::os::unix::fs::symlink(&daemon.core.mount, daemon.dir.path().join("link")).unwrap();
    let mut command = daemon.tierctl(&["state", "link/d/../d/a.txt"]);
    let ran = run(command.current_dir(daemon.dir.path()));
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.out.starts_with(&path(&daemon, "d/a.txt")),
        "{}",
        ran.out
    );
}

#[test]
fn versions_of_a_path() {
    let daemon = Daemon::start();
    let versions = json(
        &daemon,
        &["log", "list", "--json", &path(&daemon, "d/a.txt")],
    );
    let list = versions["list"].as_array().unwrap();
    let of = |at: usize| {
        (
            list[at]["lsn"].as_u64().unwrap(),
            list[at]["size"].as_u64().unwrap(),
        )
    };
    assert_eq!(list.len(), 2);
    assert_eq!(of(0), (2, FIRST.len() as u64));
    assert_eq!(of(1), (3, SECOND.len() as u64));
    assert_eq!(list[0]["changes"][0], "created");
    assert_eq!(list[1]["changes"], serde_json::json!(["content"]));
    // Deleted, and asked for by its path all the same.
    let versions = json(
        &daemon,
        &["log", "list", "--json", &path(&daemon, "gone.txt")],
    );
    let last = versions["list"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (last["lsn"].as_u64(), last["size"].as_u64()),
        (Some(5), None)
    );
    assert_eq!(last["changes"], serde_json::json!(["deleted"]));
    let ran = tierctl(&daemon, &["log", "list", &path(&daemon, "never")]);
    assert_eq!(ran.code, 1);
    assert!(
        ran.err.contains("the log has never had a file at"),
        "{}",
        ran.err
    );
}

#[test]
fn content_of_every_moment() {
    let daemon = Daemon::start();
    let cat = |name: &str, more: &[&str]| {
        let path = path(&daemon, name);
        let mut words = vec!["log", "cat", &path];
        words.extend(more);
        daemon.tierctl(&words).output().unwrap()
    };
    assert_eq!(cat("d/a.txt", &[]).stdout, SECOND);
    assert_eq!(cat("d/a.txt", &["--at", "2"]).stdout, FIRST);
    assert_eq!(cat("d/a.txt", &["--at", "3"]).stdout, SECOND);
    // Transaction n is of 1,790,000,000 s and n minutes.
    assert_eq!(
        cat("d/a.txt", &["--at", "2026-09-21T14:15:30Z"]).stdout,
        FIRST
    );
    // Deleted, and in the open segment.
    assert_eq!(cat("gone.txt", &["--at", "4"]).stdout, GONE);
    let sparse = cat("sparse", &[]).stdout;
    assert_eq!(sparse.len() as u64, SPARSE_SIZE);
    let start = usize::try_from(SPARSE_AT).unwrap();
    for (at, byte) in sparse.iter().enumerate() {
        let inside = (start..start + 64 * 1024).contains(&at);
        assert_eq!(*byte, if inside { 0x55 } else { 0 }, "at {at}");
    }
}

#[test]
fn content_that_there_is_not() {
    let daemon = Daemon::start();
    for (name, more, says) in [
        (
            "gone.txt",
            &[][..],
            "the last one before was there until transaction 4: give --at 4",
        ),
        (
            "gone.txt",
            &["--at", "2"],
            "the first one came with transaction 4",
        ),
        ("never", &[], "the log has never had a file at"),
        ("d", &[], "was a directory at transaction 6"),
        (
            "d/a.txt",
            &["--at", "2001-01-01T00:00:00Z"],
            "the log begins after",
        ),
    ] {
        let path = path(&daemon, name);
        let mut words = vec!["log", "cat", &path];
        words.extend(more);
        let ran = tierctl(&daemon, &words);
        assert_eq!(ran.code, 1, "{name}: {}", ran.err);
        assert!(ran.err.contains(says), "{name}: {}", ran.err);
        assert_eq!(ran.out, "");
    }
    let ran = tierctl(
        &daemon,
        &["log", "cat", &path(&daemon, "sparse"), "--at", "77"],
    );
    assert_eq!(ran.code, 1, "{}", ran.err);
    let ran = tierctl(
        &daemon,
        &["log", "cat", &path(&daemon, "sparse"), "--at", "noon"],
    );
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("2026-11-20T17:00:00Z"), "{}", ran.err);
}

#[test]
fn damaged_content_is_never_given() {
    let daemon = Daemon::start();
    let segment = daemon.core.log.spool.join("0000000001.hsm.zst");
    let mut bytes = fs::read(&segment).unwrap();
    // Short text that occurs once is not compressed.
    let word = b"which is longer";
    let at = bytes
        .windows(word.len())
        .position(|window| window == word)
        .unwrap();
    bytes[at] ^= 0xff;
    let mut perms = fs::metadata(&segment).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut perms, 0o644);
    fs::set_permissions(&segment, perms).unwrap();
    fs::write(&segment, bytes).unwrap();
    let ran = tierctl(&daemon, &["log", "cat", &path(&daemon, "d/a.txt")]);
    assert_eq!(ran.code, 2);
    assert_eq!(ran.out, "");
    assert!(
        ran.err.contains("is incomplete: 0 of") && ran.err.contains("cannot be read"),
        "{}",
        ran.err
    );
}

#[test]
fn what_transactions_did() {
    let daemon = Daemon::start();
    let first = json(&daemon, &["log", "show", "1", "--json"]);
    assert_eq!(first["operations_total"], 4);
    // In the open segment, behind others.
    let ran = tierctl(&daemon, &["log", "show", "5"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.out.contains("unlink     1/gone.txt") && ran.out.contains("delete     file 4"),
        "{}",
        ran.out
    );
    let third = json(&daemon, &["log", "show", "3", "--json"]);
    let kinds: Vec<_> = third["operations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|op| op["kind"].clone())
        .collect();
    assert_eq!(kinds, ["extents", "content"]);
    let ran = tierctl(&daemon, &["log", "show", "7"]);
    assert_eq!(ran.code, 1);
    assert!(
        ran.err
            .contains("there is no transaction 7: the log has 1 to 6"),
        "{}",
        ran.err
    );
}

#[test]
fn volumes_and_sync() {
    let daemon = Daemon::start();
    daemon.core.sync_done.store(true, Ordering::SeqCst);
    let ran = tierctl(&daemon, &["sync", "--to", "media"]);
    assert_eq!(
        ran.out,
        "everything that was changed before is on every pool, up to LSN 1042 (waited 2 s)\n"
    );
    assert_eq!(
        json(&daemon, &["sync", "--json"]),
        serde_json::json!({ "lsn": 1042, "waited_ms": 250 })
    );
    daemon.core.status.lock().unwrap().pools[1].volumes[0].state = VolumeState::Absent;
    let list = json(&daemon, &["volume", "list", "--json"]);
    assert_eq!(list[1]["pool"], "b");
    assert_eq!(list[1]["state"], "absent");
    let ran = tierctl(&daemon, &["volume", "show", "91827364a5b6c7d8"]);
    assert!(
        ran.out.contains("volume of pool b") && ran.out.contains("absent"),
        "{}",
        ran.out
    );
    let ran = tierctl(&daemon, &["volume", "show", "0000000000000000"]);
    assert_eq!(ran.code, 1);
    let ran = tierctl(&daemon, &["volume", "verify", "4f00aa11bb22cc33"]);
    assert_eq!(ran.code, 0);
    assert!(
        ran.out
            .contains("17 objects (1 GiB) read back, all as when they were written"),
        "{}",
        ran.out
    );
    assert_eq!(
        tierctl(&daemon, &["volume", "verify", "0000000000000000"]).code,
        2
    );
}

#[test]
fn a_reader_that_stops_is_no_error() {
    let daemon = Daemon::start();
    let mut command = daemon.tierctl(&["log", "cat", &path(&daemon, "sparse")]);
    let mut child = command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_log_that_has_only_its_open_segment_can_be_read() {
    let daemon = Daemon::start();
    daemon.core.nothing_sealed.store(true, Ordering::SeqCst);
    let gone = path(&daemon, "gone.txt");
    let ran = tierctl(&daemon, &["log", "cat", &gone, "--at", "4"]);
    assert_eq!(ran.out.as_bytes(), GONE, "{}", ran.err);
    assert_eq!(tierctl(&daemon, &["log", "show", "4"]).code, 0);
    let known = path(&daemon, "d/a.txt");
    for words in [&["log", "cat", &known][..], &["log", "show", "2"]] {
        let ran = tierctl(&daemon, words);
        assert_eq!(ran.code, 2);
        assert!(ran.err.contains("no segment is sealed yet"), "{}", ran.err);
    }
}
