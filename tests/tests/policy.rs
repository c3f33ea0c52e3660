//! Searches, pins and policies with the real daemon: pins are log records, rules run when they are due,
//! reading is seen by a sweep.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::Kind;
use hsm_tests::program::{Ran, run};
use hsm_tests::system::{Setup, System};
use serde_json::Value;

fn found(system: &System, expression: &str) -> Vec<String> {
    let ran = system.tierctl(&["find", expression]).done();
    let strip = |line: &str| {
        let path = Path::new(line).strip_prefix(system.root());
        path.expect("below the mount").display().to_string()
    };
    let mut paths: Vec<String> = ran.stdout.lines().map(strip).collect();
    paths.sort();
    paths
}

fn write(system: &System, name: &str, bytes: usize) -> PathBuf {
    let path = system.at(name);
    fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
    fs::write(&path, noise(bytes as u64, bytes)).expect("a file");
    path
}

fn touch(path: &Path, when: &str) {
    let mut command = Command::new("touch");
    command.args(["-m", "-a", "-d", when]).arg(path);
    let _ = run(command).done();
}

fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(40);
    while !so() {
        assert!(Instant::now() < end, "never so: {what}");
        thread::sleep(Duration::from_millis(200));
    }
}

fn digest(system: &System) -> String {
    let answer = system
        .tierctl(&["--json", "catalog", "digest"])
        .done()
        .json();
    answer["digest"].as_str().expect("a digest").to_owned()
}

#[test]
fn pins_survive_the_loss_of_the_catalog() {
    let mut system = Setup::new(Kind::Ext4).start();
    for name in ["project/a", "project/deep/b", "other/c"] {
        write(&system, name, 10_000);
    }
    system.sync_all();
    let project = system.at("project");
    let project = project.to_str().expect("a name");
    let pinned = system.tierctl(&["pin", "--recursive", project]).done();
    assert!(
        pinned.stdout.starts_with("pinned 2 files (LSN "),
        "{pinned}"
    );
    // At once, and once only.
    assert_eq!(found(&system, "pinned"), ["project/a", "project/deep/b"]);
    let again = system.tierctl(&["pin", "-r", project]).done();
    assert!(
        again.stdout.starts_with("pinned 0 files; 2 were so before"),
        "{again}"
    );
    let lsn = system.tierctl(&[
        "--json",
        "unpin",
        system.at("project/a").to_str().expect("a name"),
    ]);
    let lsn = lsn.done().json()["lsn"].as_u64().expect("a transaction");
    let shown = system.tierctl(&["log", "show", &lsn.to_string()]).done();
    assert!(shown.stdout.contains("unpin"), "{shown}");
    fs::remove_file(system.at("other/c")).expect("removed");
    system.sync_all();
    let before = digest(&system);
    system.stop();
    for end in [
        "",
        "-wal",
        "-shm",
        ".residency",
        ".residency-wal",
        ".residency-shm",
    ] {
        let _ = fs::remove_file(format!("{}{end}", system.catalog().display()));
    }
    let _ = system.tierctl(&["catalog", "rebuild"]).done();
    system.start();
    system.sync_all();
    assert_eq!(digest(&system), before);
    assert_eq!(found(&system, "pinned"), ["project/deep/b"]);
    system.check("pins are of no concern to a replay");
}

/// Only what is in the log can be pinned: `--wait` sees to that, right after a change. It had returned when all
/// was durable, and the catalog, which is asked for the files, did not know them yet.
#[test]
fn new_files_are_pinned_as_soon_as_they_are_logged() {
    let system = Setup::new(Kind::Ext4).start();
    let list = system.home().at("list");
    for round in 0..10 {
        let names = [format!("new{round}"), format!("another{round}")];
        let paths = names.map(|name| write(&system, &name, 10_000));
        let text: Vec<_> = paths.iter().map(|path| path.to_string_lossy()).collect();
        fs::write(&list, text.join("\n")).expect("a list");
        let list = list.to_str().expect("a name");
        let pinned = system
            .tierctl(&["pin", "--wait", "--from-file", list])
            .done();
        assert!(pinned.stdout.starts_with("pinned 2 files"), "{pinned}");
        let before = digest(&system);
        let told = system
            .tierctl(&["unpin", "--dry-run", "--from-file", list])
            .done();
        assert_eq!(told.stdout, "would unpin 2 files\n");
        assert_eq!(found(&system, "pinned").len(), 2 * round + 2);
        assert_eq!(digest(&system), before);
    }
}

#[test]
fn what_is_found_is_true() {
    let system = Setup::new(Kind::Xfs).start();
    let old = write(&system, "video/old.mkv", 300_000);
    write(&system, "video/new.mkv", 200_000);
    write(&system, "small", 10);
    touch(&old, "2020-01-02T03:04:05Z");
    fs::hard_link(&old, system.at("video/zz")).expect("a link");
    system.sync_all();
    assert_eq!(
        found(&system, "path glob 'video/*' and age(mtime) > days(365)"),
        ["video/old.mkv"]
    );
    assert_eq!(
        found(&system, "size >= kib(100)"),
        ["video/new.mkv", "video/old.mkv"]
    );
    assert_eq!(
        found(&system, "links = 2 and user = 'root' and group = 'root'"),
        ["video/old.mkv"]
    );
    eventually("all is on the pool", || {
        found(&system, "state = 'premigrated'").len() == 3
    });
    // Who has no full rights learns nothing.
    let mut other = Command::new("setpriv");
    other.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    other.arg(hsm_tests::program::locate("tierctl"));
    other.arg("--socket").arg(system.home().at("hsmd.sock"));
    other.args(["find", "1"]);
    let refused = run(other);
    assert_eq!(
        (refused.code, refused.stdout.as_str()),
        (2, ""),
        "{refused}"
    );
    assert!(refused.stderr.contains("control_group"), "{refused}");
    // As bytes, holes apart.
    let sparse = fs::File::create(system.at("video/sparse")).expect("a file");
    sparse.set_len(1 << 30).expect("long");
    system.sync_all();
    let usage = system.tierctl(&["--json", "du", system.at("video").to_str().expect("a name")]);
    let usage = usage.done().json();
    let usage = &usage["usage"][0];
    assert_eq!(usage["logical_bytes"], (1_u64 << 30) + 500_000, "{usage}");
    assert_eq!(usage["resident_bytes"], 500_000, "{usage}");
    assert_eq!(usage["files"], 3, "{usage}");
}

#[test]
fn reading_is_seen_by_a_sweep() {
    let system = Setup::new(Kind::Ext4).start();
    let (read, unread) = (
        write(&system, "read", 10_000),
        write(&system, "unread", 10_000),
    );
    for path in [&read, &unread] {
        touch(path, "2020-01-02T03:04:05Z");
    }
    system.sync_all();
    assert_eq!(found(&system, "age(atime) > days(30)"), ["read", "unread"]);
    // relatime: an access time that is not later than the modification time is brought forward.
    let _ = fs::read(&read).expect("read");
    system.sync_all();
    assert_eq!(found(&system, "age(atime) > days(30)"), ["unread"]);
    assert_eq!(found(&system, "age(mtime) > days(30)"), ["read", "unread"]);
}

fn key(rule: &str) -> String {
    format!("rule-ran/{rule}")
}

fn sql(system: &System, statement: &str) -> String {
    let mut command = Command::new("sqlite3");
    command
        .args(["-cmd", ".timeout 5000"])
        .arg(system.catalog())
        .arg(statement);
    run(command).done().stdout.trim().to_owned()
}

fn found_in_catalog(system: &System, key: &str) -> i64 {
    let found = sql(
        system,
        &format!("SELECT hex(value) FROM local_meta WHERE key = '{key}'"),
    );
    i64::from_str_radix(&found, 16).unwrap_or(0)
}

/// When a rule ran last, or was seen first; waits until that is noted.
fn last_run(system: &System, rule: &str) -> i64 {
    eventually("it is noted when the rule ran", || {
        found_in_catalog(system, &key(rule)) != 0
    });
    found_in_catalog(system, &key(rule))
}

#[test]
fn rules_run_when_they_are_due() {
    let home = hsm_tests::home::Home::new();
    let policy = home.at("policy.toml");
    let rules = r#"
ignore = ["*.tmp"]
[[rule]]
name = "project-stays"
action = "pin"
condition = "path glob 'project/*'"
high = 3
"#;
    fs::write(&policy, rules).expect("a policy");
    let mut system = Setup::new(Kind::Ext4)
        .with("policies", &format!("{:?}", policy.display().to_string()))
        .start();
    write(&system, "project/a", 1000);
    write(&system, "project/b.tmp", 1000);
    system.sync_all();
    // A fault is told, with its place, and nothing runs.
    let status = system.wait_for("the fault is told", |status| {
        status["notices"]
            .to_string()
            .contains("policy.toml:7: high: unknown field")
    });
    assert!(
        status["notices"].to_string().contains("no rule runs"),
        "{status:#}"
    );
    let mended = rules.replace("high = 3", "daily = \"00:00\"");
    fs::write(&policy, &mended).expect("a policy");
    let _ = system.wait_for("the fault is mended", |status| {
        !status["notices"].to_string().contains("policy.toml")
    });
    let file = system.at("project/a");
    let file = file.to_str().expect("a name");
    let why = system.tierctl(&["policy", "explain", file]).done();
    assert!(
        why.stdout.contains("rule project-stays would pin it"),
        "{why}"
    );
    let ran = system.tierctl(&["policy", "run", "project-stays"]).done();
    assert!(
        ran.stdout.starts_with("rule project-stays: pinned 1 file"),
        "{ran}"
    );
    assert_eq!(found(&system, "pinned"), ["project/a"]);
    // When it was seen first is remembered, and when it ran: what was due while nothing ran is made up for.
    let seen = last_run(&system, "project-stays");
    let every = rules.replace("high = 3", "every = \"20m\"");
    fs::write(&policy, every).expect("a policy");
    write(&system, "project/late", 1000);
    system.sync_all();
    system.stop();
    assert_eq!(found_in_catalog(&system, &key("project-stays")), seen);
    let long_ago = seen - 3600;
    sql(
        &system,
        &format!(
            "UPDATE local_meta SET value = x'{long_ago:016x}' WHERE key = '{}'",
            key("project-stays")
        ),
    );
    system.start();
    eventually("the rule makes up for it", || {
        found(&system, "pinned").len() == 2
    });
    eventually("that is remembered", || {
        last_run(&system, "project-stays") >= seen
    });
    let notices: Value = system.status()["notices"].clone();
    assert!(
        !notices.to_string().contains("project-stays"),
        "{notices:#}"
    );
}

/// Files on disk, by the blocks that they have.
fn on_disk(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::symlink_metadata(path).expect("the file").blocks() > 64
}

#[test]
fn what_is_pinned_is_not_released() {
    let system = Setup::new(Kind::Ext4).exposed().start();
    let (kept, free) = (
        write(&system, "kept", 1 << 20),
        write(&system, "free", 1 << 20),
    );
    system.sync_all();
    let (kept_name, free_name) = (kept.to_str().expect("ASCII"), free.to_str().expect("ASCII"));
    let _ = system.tierctl(&["pin", kept_name]).done();
    let state = system.tierctl(&["state", kept_name]).done();
    assert!(
        state
            .stdout
            .lines()
            .next()
            .is_some_and(|line| line.ends_with(", pinned")),
        "{state}"
    );
    let ran = system.tierctl(&["release", kept_name, free_name]);
    assert!(ran.code == 3 || ran.code == 1, "{ran}");
    assert!(ran.text().contains("it is pinned"), "{ran}");
    assert!(on_disk(&kept) && !on_disk(&free));
    assert_eq!(found(&system, "state = 'migrated'"), ["free"]);
    let usage = system.tierctl(&["--json", "du", "-s", system.root().to_str().expect("ASCII")]);
    let usage = usage.done().json();
    assert_eq!(usage["usage"][0]["released_bytes"], 1 << 20, "{usage}");
    assert_eq!(usage["usage"][0]["stubs"], 1, "{usage}");
    let _ = system.tierctl(&["unpin", kept_name]).done();
    let _ = system.tierctl(&["release", kept_name]).done();
    assert!(!on_disk(&kept));
}

#[test]
fn a_full_ext4_is_emptied_to_the_low_watermark() {
    is_emptied(Kind::Ext4);
}

#[test]
fn a_full_xfs_is_emptied_to_the_low_watermark() {
    is_emptied(Kind::Xfs);
}

#[test]
fn a_full_btrfs_is_emptied_to_the_low_watermark() {
    is_emptied(Kind::Btrfs);
}

fn is_emptied(kind: Kind) {
    let home = hsm_tests::home::Home::new();
    let policy = home.at("policy.toml");
    // What was written first is the coldest.
    let rules = r#"
[[rule]]
name = "room"
action = "release"
condition = "path glob 'big/*'"
weight = "age(mtime)"
high_watermark = 40
low_watermark = 30

[[rule]]
name = "back"
action = "recall"
condition = "path glob 'big/*'"
max_files = 2
"#;
    let system = Setup::new(kind)
        .exposed()
        .with("policies", &format!("{:?}", policy.display().to_string()))
        .start();
    fs::write(&policy, rules).expect("a policy");
    let in_use = || {
        let stat = nix::sys::statvfs::statvfs(system.root()).expect("statvfs");
        let used = stat.blocks() - stat.blocks_free();
        used * 100 / (used + stat.blocks_available())
    };
    let used = || {
        // What btrfs has not allocated yet does not count as used.
        let mut sync = Command::new("sync");
        sync.arg("-f").arg(system.root());
        let _ = run(sync).done();
        in_use()
    };
    let mut files = Vec::new();
    let mut content = std::collections::BTreeMap::new();
    while used() < 38 {
        let path = write(
            &system,
            &format!("big/{:03}", files.len()),
            (8 << 20) + files.len(),
        );
        let hours = 500 - files.len();
        touch(&path, &format!("{hours} hours ago"));
        content.insert(path.clone(), fs::read(&path).expect("read"));
        files.push(path);
    }
    system.sync_all();
    assert!(
        files.iter().all(|path| on_disk(path)),
        "below the high watermark"
    );
    // The watcher sees the mark passed within a blink: what is written from then on stays.
    while in_use() < 42 && on_disk(&files[0]) {
        let path = write(
            &system,
            &format!("big/{:03}", files.len()),
            (8 << 20) + files.len(),
        );
        content.insert(path.clone(), fs::read(&path).expect("read"));
        files.push(path);
    }
    system.sync_all();
    eventually("the low watermark is reached", || in_use() <= 34);
    // And not much further: what is given back is seen at once.
    thread::sleep(Duration::from_secs(3));
    assert!(used() >= 25, "{} % are left", used());
    let stubs = files.iter().filter(|path| !on_disk(path)).count();
    assert!(
        stubs > 0 && stubs < files.len(),
        "{stubs} of {}",
        files.len()
    );
    assert!(
        files[..stubs].iter().all(|path| !on_disk(path)),
        "the coldest go first"
    );
    // And back, as far as the rule goes; the bytes are what they were.
    let ran = system.tierctl(&["policy", "run", "back"]).done();
    assert!(
        ran.stdout.starts_with("rule back: recalled 2 files"),
        "{ran}"
    );
    for (path, bytes) in &content {
        assert!(
            fs::read(path).expect("read") == *bytes,
            "{}",
            path.display()
        );
    }
}

/// Flips bits all over the segments of a volume.
fn damage(volume: &Path) {
    let mut command = Command::new("find");
    command.arg(volume).args(["-name", "*.hsm.zst"]);
    for segment in run(command).done().stdout.lines() {
        for words in [["chattr", "-i"], ["chmod", "u+w"]] {
            let mut command = Command::new(words[0]);
            let _ = run({
                command.arg(words[1]).arg(segment);
                command
            })
            .done();
        }
        let mut bytes = fs::read(segment).expect("a segment");
        for at in (1000..bytes.len()).step_by(64 << 10) {
            bytes[at] ^= 4;
        }
        fs::write(segment, bytes).expect("damaged");
    }
}

/// What makes most files of a rule fail is a fault of the system: trying the rest only makes noise.
#[test]
fn a_rule_gives_up_where_most_of_its_files_fail() {
    const FILES: u64 = 700;
    let home = hsm_tests::home::Home::new();
    let policy = home.at("policy.toml");
    let rules = r#"
[[rule]]
name = "back"
action = "recall"
condition = "path glob 'many/*'"
every = "20m"
"#;
    fs::write(&policy, rules).expect("a policy");
    let mut system = Setup::new(Kind::Ext4)
        .exposed()
        .with("policies", &format!("{:?}", policy.display().to_string()))
        .start();
    let dir = system.at("many");
    fs::create_dir(&dir).expect("a directory");
    for number in 0..FILES {
        fs::write(dir.join(number.to_string()), noise(number, 3000)).expect("a file");
    }
    hsm_tests::waiting::spool_empties(&mut system);
    let many = dir.to_str().expect("ASCII");
    let _ = system.tierctl(&["release", "-r", many]).done();
    let _ = last_run(&system, "back");
    damage(&system.volumes(0)[0]);

    // By hand: it ends after its first files, names some of them with the cause, and says so by its status.
    let failed = |ran: &Ran| -> u64 {
        let (before, _) = ran.stdout.split_once(" files failed").expect("failures");
        let (_, count) = before.rsplit_once(' ').expect("a count");
        count.parse().expect("a count")
    };
    let ran = system.tierctl(&["policy", "run", "back"]).with_code(3);
    let tried = failed(&ran);
    assert!((20..FILES / 2).contains(&tried), "{ran}");
    assert!(ran.stdout.contains(", so many that it gave up"), "{ran}");
    let named = ran.stderr.lines().filter(|line| line.contains(many));
    assert!((1..30).contains(&named.count()), "{ran}");
    assert!(ran.stderr.contains(".hsm.zst"), "it says why: {ran}");

    // By its clock: the same, and the status says why.
    system.stop();
    let key = key("back");
    let long_ago = found_in_catalog(&system, &key) - 3600;
    let sent_back = format!("UPDATE local_meta SET value = x'{long_ago:016x}' WHERE key = '{key}'");
    sql(&system, &sent_back);
    system.start();
    let status = system.wait_for("it gave up", |status| {
        let notices = status["notices"].to_string();
        notices.contains("rule back failed") && notices.contains("gave up")
    });
    let notices = status["notices"].as_array().expect("notices").clone();
    let notice = notices
        .iter()
        .find(|notice| notice.to_string().contains("rule back"));
    let notice = notice.expect("the notice").to_string();
    assert!(notice.contains("more than 10 % failed"), "{notice}");
    assert!(notice.contains(".hsm.zst"), "it says why: {notice}");
    let text = system.tierctl(&["status"]).text();
    assert!(text.contains("more than 10 % failed"), "{text}");
    // It rests.
    let journal = || fs::read_to_string(system.home().at("hsmd.err")).unwrap_or_default();
    let tries = |text: &str| text.matches("a rule failed on a file").count();
    let before = tries(&journal());
    assert!((1..30).contains(&before), "{before} lines");
    thread::sleep(Duration::from_secs(3));
    assert_eq!(tries(&journal()), before);

    // Who wants all of them to be tried says so.
    let all = rules.replacen("[[rule]]", "failures_max_percent = 100\n[[rule]]", 1);
    fs::write(&policy, all).expect("a policy");
    let ran = system.tierctl(&["policy", "run", "back"]).with_code(3);
    assert!(!ran.stdout.contains("gave up"), "{ran}");
    assert!(failed(&ran) > tried, "{ran}");
}
