//! Searches, pins and policies: the whole way from tierctl to the daemon and back.
//!
//! The made-up log has /d/a.txt (file 3) and /sparse (file 5); /gone.txt was deleted.

use std::process::Command;
use std::sync::atomic::Ordering;

use serde_json::Value;

use crate::fake::{Daemon, Ran, run};
use crate::log::{SECOND, SPARSE_SIZE};

fn lines(ran: &Ran) -> Vec<Value> {
    ran.out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect()
}

fn find(daemon: &Daemon, expression: &str) -> Ran {
    run(&mut daemon.tierctl(&["find", expression]))
}

#[test]
fn find_prints_paths_and_columns() {
    let daemon = Daemon::start();
    let mount = daemon.core.mount.display().to_string();
    let all = find(&daemon, "1");
    assert_eq!(
        (all.code, all.out),
        (0, format!("{mount}/d/a.txt\n{mount}/sparse\n"))
    );
    let one = run(&mut daemon.tierctl(&["find", "-0", "path glob 'd/*'"]));
    assert_eq!((one.code, one.out), (0, format!("{mount}/d/a.txt\0")));
    let none = find(&daemon, "size > tib(1)");
    assert_eq!((none.code, none.out.as_str()), (0, ""));
    let rows =
        run(&mut daemon.tierctl(&["--json", "find", "name = 'a.txt' and state = 'premigrated'"]));
    let rows = lines(&rows);
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0]["path"], format!("{mount}/d/a.txt"));
    assert_eq!(rows[0]["size"], SECOND.len());
    assert_eq!(
        (&rows[0]["file"], &rows[0]["pinned"]),
        (&Value::from(3), &Value::from(false))
    );
}

#[test]
fn what_is_wrong_with_an_expression_is_told() {
    let daemon = Daemon::start();
    for (expression, words) in [
        (
            "sise > 3",
            [
                "no such column: sise (at character 1: \"sise > 3\")",
                "the columns are file",
            ],
        ),
        (
            "size > (3",
            [
                "a parenthesis is not closed (at character 8: \"(3\")",
                "add the closing one",
            ],
        ),
        (
            "file in (select 1)",
            ["select begins a query", "hsm-policy(5)"],
        ),
        (
            "file in inode",
            ["may not use the table inode", "hsm-policy(5)"],
        ),
        (
            "mib('x') > 1",
            ["mib() wants a number", "write an expression"],
        ),
    ] {
        let ran = find(&daemon, expression);
        assert_eq!(ran.code, 2, "{expression}: {}", ran.err);
        for word in words {
            assert!(ran.err.contains(word), "{expression}: {}", ran.err);
        }
    }
}

#[test]
fn many_files_come_in_parts() {
    let daemon = Daemon::start();
    let conn = rusqlite::Connection::open(&daemon.core.log.catalog).unwrap();
    conn.execute_batch(
        "WITH RECURSIVE n(i) AS (VALUES (100) UNION ALL SELECT i + 1 FROM n WHERE i < 3599)
         INSERT INTO inode SELECT i, 1, 0, 420, 0, 0, 7, 1, 0, 1, 0, NULL, NULL, NULL, NULL, 0, 0, 1, NULL, 0, NULL, NULL FROM n;
         INSERT INTO dentry SELECT 1, CAST('n' || file AS BLOB), file, 1 FROM inode WHERE file BETWEEN 100 AND 3598",
    )
    .unwrap();
    let ran = find(&daemon, "size = 7");
    assert_eq!(ran.out.lines().count(), 3499, "{}", ran.err);
    assert!(
        ran.err.contains("1 file more without a path"),
        "{}",
        ran.err
    );
    let rows = run(&mut daemon.tierctl(&["--json", "find", "size = 7"]));
    let rows = lines(&rows);
    assert_eq!(rows.len(), 3500);
    assert_eq!(
        (&rows[3499]["file"], &rows[3499]["path"]),
        (&Value::from(3599), &Value::Null)
    );
}

#[test]
fn du_adds_up() {
    let daemon = Daemon::start();
    let mount = daemon.core.mount.display().to_string();
    let usage = run(&mut daemon.tierctl(&["--json", "du", &mount]));
    let usage: Value = serde_json::from_str(&usage.out).unwrap();
    let list = usage["usage"].as_array().unwrap();
    assert_eq!(list.len(), 2);
    assert_eq!(list[0]["path"], format!("{mount}/d"));
    assert_eq!(list[0]["logical_bytes"], SECOND.len());
    assert_eq!(list[1]["path"], mount);
    assert_eq!(list[1]["logical_bytes"], SECOND.len() as u64 + SPARSE_SIZE);
    assert_eq!(
        list[1]["resident_bytes"],
        SECOND.len() as u64 + tierfs::layout::BLOCK
    );
    assert_eq!(list[1]["released_bytes"], 0);
    let sum = run(&mut daemon.tierctl(&["du", "-s", &mount, &format!("{mount}/sparse")]));
    assert_eq!(sum.code, 0, "{}", sum.err);
    assert_eq!(sum.out.lines().count(), 3, "{}", sum.out);
    assert!(sum.out.trim_start().starts_with("SIZE"), "{}", sum.out);
    let new = run(&mut daemon.tierctl(&["du", &format!("{mount}/new")]));
    assert_eq!(new.code, 2);
    assert!(new.err.contains("not in the log yet"), "{}", new.err);
}

#[test]
fn pins_are_set_and_taken_back() {
    let daemon = Daemon::start();
    let (file, dir) = (daemon.path("d/a.txt"), daemon.path("d"));
    let (file, dir) = (file.to_str().unwrap(), dir.to_str().unwrap());
    let pinned = run(&mut daemon.tierctl(&["pin", file]));
    assert_eq!(
        (pinned.code, pinned.out.as_str()),
        (0, "pinned 1 file (LSN 1043, durable)\n")
    );
    let refused = run(&mut daemon.tierctl(&["pin", dir]));
    assert_eq!(refused.code, 2);
    assert!(
        refused.err.contains("is a directory: with --recursive"),
        "{}",
        refused.err
    );
    let partly =
        run(&mut daemon.tierctl(&["unpin", "-r", dir, daemon.path("new").to_str().unwrap()]));
    assert_eq!(partly.code, 3);
    assert!(partly.out.starts_with("unpinned 1 file"), "{}", partly.out);
    assert!(partly.err.contains("not in the log yet"), "{}", partly.err);
    let acted = daemon.core.acted.lock().unwrap().clone();
    assert_eq!(acted, [("pin".to_owned(), 3), ("unpin".to_owned(), 3)]);
}

#[test]
fn pins_are_only_told_of_and_taken_from_lists() {
    let daemon = Daemon::start();
    daemon.core.sync_done.store(true, Ordering::SeqCst);
    let list = daemon.path("../list");
    let names = ["d/a.txt", "sparse", "d/a.txt"].map(|name| daemon.path(name));
    let acted = || std::mem::take(&mut *daemon.core.acted.lock().unwrap());
    for end in ["\n", "\0"] {
        let text = names.iter().map(|name| format!("{}{end}", name.display()));
        std::fs::write(&list, text.collect::<String>()).unwrap();
        let from_list = |words: &[&str]| {
            let mut command = daemon.tierctl(words);
            run(command.arg("--from-file").arg(&list))
        };
        let told = from_list(&["pin", "--dry-run", "--wait"]);
        assert_eq!(
            (told.code, &told.out[..], told.err),
            (0, "would pin 2 files\n", String::new())
        );
        let told = from_list(&["unpin", "--dry-run"]);
        assert_eq!(
            (told.code, &told.out[..]),
            (0, "would unpin 0 files; 2 were so before\n")
        );
        assert_eq!(acted(), []);
        let done = from_list(&["pin", "--wait"]);
        assert_eq!(
            (done.code, &done.out[..]),
            (0, "pinned 2 files (LSN 1043, durable)\n")
        );
        assert_eq!(acted(), [3, 5].map(|file| ("pin".to_owned(), file)));
    }
    assert_eq!(daemon.core.syncs.load(Ordering::SeqCst), 2, "not when dry");
    let neither = run(&mut daemon.tierctl(&["pin", "--wait"]));
    assert_eq!(neither.code, 2, "{}", neither.out);
}

const POLICY: &str = r#"
ignore = ["*.tmp"]

[[rule]]
name = "all"
action = "release"
condition = "size > 0 and path is not null"
weight = "size"
every = "1h"

[[rule]]
name = "room"
action = "release"
condition = "name = 'a.txt'"
high_watermark = 99
low_watermark = 50

[[rule]]
name = "back"
action = "recall"
condition = "1"
"#;

#[test]
fn a_policy_is_run_and_explained() {
    let daemon = Daemon::start();
    let none = run(&mut daemon.tierctl(&["policy", "run"]));
    assert_eq!(none.code, 2);
    assert!(
        none.err.contains("there is no policy: write one"),
        "{}",
        none.err
    );
    std::fs::write(&daemon.core.policy, POLICY).unwrap();
    let dry = run(&mut daemon.tierctl(&["policy", "run", "--dry-run"]));
    assert_eq!(dry.code, 0, "{}", dry.err);
    let text: Vec<&str> = dry.out.lines().collect();
    assert!(
        text[0].starts_with("would release") && text[0].ends_with("/sparse"),
        "{}",
        dry.out
    );
    assert!(text[1].ends_with("/d/a.txt"), "{}", dry.out);
    assert!(
        text[2].starts_with("rule all: would release 2 files"),
        "{}",
        dry.out
    );
    assert!(
        text[3].contains(
            "rule room: would release 0 files, 0 B (the filesystem is 95 % full, less than 99 %"
        ),
        "{}",
        dry.out
    );
    assert!(
        text[4].starts_with("rule back: would recall 0 files"),
        "{}",
        dry.out
    );
    assert!(daemon.core.acted.lock().unwrap().is_empty());

    // By its name a rule frees down to its low watermark.
    let named = run(&mut daemon.tierctl(&["policy", "run", "room"]));
    assert_eq!(named.code, 0, "{}", named.err);
    assert!(
        named.out.starts_with("rule room: released 1 file"),
        "{}",
        named.out
    );
    daemon.core.fails_on.lock().unwrap().push(5);
    let partly = run(&mut daemon.tierctl(&["--json", "policy", "run", "all"]));
    assert_eq!(partly.code, 3, "{}", partly.err);
    assert!(
        partly.err.contains("/sparse: it is in use"),
        "{}",
        partly.err
    );
    let rows = lines(&partly);
    assert_eq!(
        (&rows[0]["error"], &rows[1]["error"]),
        (&Value::from("it is in use"), &Value::Null)
    );
    assert_eq!(
        (&rows[2]["files"], &rows[2]["failed"]),
        (&Value::from(2), &Value::from(1))
    );
    let acted = daemon.core.acted.lock().unwrap().clone();
    assert_eq!(
        acted,
        [
            ("release".to_owned(), 3),
            ("release".to_owned(), 5),
            ("release".to_owned(), 3)
        ]
    );
    let unknown = run(&mut daemon.tierctl(&["policy", "run", "other"]));
    assert_eq!(unknown.code, 2);
    assert!(
        unknown
            .err
            .contains("has no rule other: its rules are all, room, back"),
        "{}",
        unknown.err
    );

    let file = daemon.path("d/a.txt");
    let why = run(&mut daemon.tierctl(&["policy", "explain", file.to_str().unwrap()]));
    assert_eq!(why.code, 0, "{}", why.err);
    for line in [
        "rule all would release it",
        "  yes  state = 'premigrated'   (state is premigrated)",
        "  yes  path is not null   (path is d/a.txt)",
        "  yes  not in ignore (*.tmp)   (path is d/a.txt)",
        "rule back is not about it",
        "  no   state = 'migrated'   (state is premigrated)",
    ] {
        assert!(
            why.out.contains(&format!("{line}\n")),
            "{line}: {}",
            why.out
        );
    }
}

#[test]
fn a_rule_that_cannot_run_is_told() {
    let daemon = Daemon::start();
    std::fs::write(&daemon.core.policy, POLICY).unwrap();
    let conn = rusqlite::Connection::open(tierfs::residency::path_beside(&daemon.core.log.catalog));
    drop(conn);
    let mut list = tierfs::residency::Residency::open(&tierfs::residency::path_beside(
        &daemon.core.log.catalog,
    ))
    .unwrap();
    let stub = tierfs::residency::Stub {
        file: tierfs::FileId::new(3).unwrap(),
        handle: vec![1],
    };
    list.add(&[stub], 1).unwrap();
    let ran = run(&mut daemon.tierctl(&["policy", "run", "back"]));
    assert_eq!(ran.code, 2);
    assert_eq!(ran.out, "rule back: could not run\n");
    assert!(ran.err.contains("rule back: no recall here"), "{}", ran.err);
}

#[test]
fn a_policy_is_checked_without_a_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p.toml");
    let check = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tierctl"));
        run(command.args(["policy", "check"]).arg(&file))
    };
    assert_eq!(check().code, 2);
    std::fs::write(&file, POLICY).unwrap();
    let good = check();
    assert_eq!(good.code, 0, "{}", good.err);
    assert!(
        good.out.ends_with("p.toml: 3 rules, sound\n"),
        "{}",
        good.out
    );
    std::fs::write(
        &file,
        POLICY.replace("weight = \"size\"", "weight = \"sice\""),
    )
    .unwrap();
    let bad = check();
    assert_eq!(bad.code, 1);
    assert!(
        bad.err
            .contains("p.toml:8: rule all: weight: no such column: sice"),
        "{}",
        bad.err
    );
}

/// A file's size promises more than what is freed when it goes: holes, shared extents.
#[test]
fn a_rule_looks_again_whether_the_low_watermark_is_reached() {
    let daemon = Daemon::start();
    let rule = "[[rule]]\nname = \"room\"\naction = \"release\"\ncondition = \"1\"\nweight = \"size\"\n\
                high_watermark = 90\nlow_watermark = 50\n";
    let releases = |rule: &str| {
        daemon
            .core
            .used
            .store(95, std::sync::atomic::Ordering::SeqCst);
        daemon.core.acted.lock().unwrap().clear();
        std::fs::write(&daemon.core.policy, rule).unwrap();
        let ran = run(&mut daemon.tierctl(&["policy", "run"]));
        assert_eq!(ran.code, 0, "{}", ran.err);
        let acted = daemon.core.acted.lock().unwrap();
        acted.iter().map(|(_, file)| *file).collect::<Vec<_>>()
    };
    assert_eq!(releases(rule), [5, 3]);
    assert_eq!(releases(&format!("{rule}max_files = 1\n")), [5]);
    assert_eq!(releases(&rule.replace("50", "89")), [5]);
}
