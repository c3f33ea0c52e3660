//! What `tierctl status`, `volume list` and `events` say is true: also after a restart, for a pool
//! that comes late, and when a volume is damaged.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::compare::{Tree, assert_equal};
use hsm_tests::loopfs::{Kind, must};
use hsm_tests::program::{Running, locate};
use hsm_tests::system::{Setup, System};
use serde_json::Value;

fn write_some(system: &System, from: u64, count: u64) {
    for n in from..from + count {
        fs::write(system.at(format!("file{n}")), noise(n, 1 << 20)).expect("a file");
    }
}

fn copied(status: &Value, pool: usize) -> u64 {
    status["pools"][pool]["copied_lsn"].as_u64().unwrap_or(0)
}

/// Everything is copied, and has left the spool.
fn spool_empties(system: &System) {
    system.sync_all();
    let _ = system.wait_for("the spool is empty", |status| {
        status["spool"]["segments"] == 0 && status["spool"]["open_segment"].is_null()
    });
}

fn says(system: &System) -> String {
    system.tierctl(&["status"]).done().stdout
}

#[test]
fn a_restart_is_no_safety_before_all_that_it_found_is_in_the_log() {
    const FILES: u64 = 3000;
    let mut system = Setup::new(Kind::Ext4).start();
    system.sync_all();
    let before = system.status()["catalog"]["files"].as_u64().unwrap_or(0);
    system.stop();
    for n in 0..FILES {
        fs::write(system.at(format!("new{n}")), noise(n, 8 << 10)).expect("a file");
    }
    system.start();
    let end = Instant::now() + Duration::from_mins(1);
    loop {
        let status = system.status();
        if status["state"] == "examining" {
            assert!(Instant::now() < end, "it never ends: {status:#}");
            assert!(
                says(&system).starts_with("CATCHING UP") || system.status()["state"] != "examining"
            );
            continue;
        }
        assert_eq!(status["state"], "following", "{status:#}");
        // Of an answer that says so everything before the start is durable.
        let durable = status["durable_lsn"].as_u64();
        let status = system.wait_for("the catalog is as far", |status| {
            status["folded_lsn"].as_u64() >= durable
        });
        let files = status["catalog"]["files"].as_u64().unwrap_or(0);
        assert!(files >= before + FILES, "{files} of {}", before + FILES);
        break;
    }
}

/// Copies that left the spool are known after a restart, and a pool that comes late gets them.
#[test]
fn an_empty_spool_and_a_pool_that_comes_late() {
    let mut system = Setup::new(Kind::Ext4).start();
    write_some(&system, 0, 10);
    spool_empties(&system);
    let lsn = system.status()["durable_lsn"].as_u64().expect("an LSN");
    system.restart();
    // Nothing new, and nothing to copy.
    assert!(system.sync(&["--to", "media"]) >= lsn);
    assert!(copied(&system.status(), 0) >= lsn);
    assert!(says(&system).starts_with("SAFE: "), "{}", says(&system));

    // Content in no segment that the spool has.
    let path = system.at("file3");
    let cat = system.tierctl(&["log", "cat", path.to_str().expect("ASCII")]);
    assert_eq!(cat.code, 0, "{}", cat.stderr);

    system.stop();
    let late = system.home().dir("late");
    system.set_volumes(1, vec![late]);
    system.start();
    let status = system.wait_for("the new pool has all of it", |status| {
        copied(status, 1) >= lsn
    });
    assert_eq!(
        status["pools"][0]["volumes"][0]["segments"], status["pools"][1]["volumes"][0]["segments"],
        "{status:#}"
    );
    system.sync_all();
    let fresh = system.fresh();
    let _ = system
        .replay_from(&system.volumes(1), fresh.root(), &[])
        .done();
    assert_equal(
        &Tree::read(system.root()),
        &Tree::read(fresh.root()),
        "from the pool that came late",
    );
}

/// Flips a byte in the middle of a file that is immutable.
fn damage(file: &Path) {
    must(Command::new("chattr").arg("-i").arg(file));
    must(Command::new("chmod").arg("u+w").arg(file));
    let opened = fs::OpenOptions::new().read(true).write(true).open(file);
    let opened = opened.expect("a segment");
    let at = opened.metadata().expect("its size").len() / 2;
    let mut byte = [0];
    opened.read_exact_at(&mut byte, at).expect("to read");
    opened.write_all_at(&[!byte[0]], at).expect("to write");
}

fn segment_on(volume: &Path, number: u64) -> PathBuf {
    volume.join(format!("segments/000000/{number:010}.hsm.zst"))
}

#[test]
fn damage_is_told_stays_told_and_is_mended_on_another_volume() {
    let mut system = Setup::new(Kind::Ext4).pools(2).start();
    write_some(&system, 0, 10);
    spool_empties(&system);
    let status = system.status();
    let of_volume = |status: &Value, key: &str| status["pools"][0]["volumes"][0][key].clone();
    assert!(
        of_volume(&status, "last_verified").is_string(),
        "{status:#}"
    );
    assert_eq!(of_volume(&status, "damaged"), 0);
    assert!(says(&system).starts_with("SAFE: "), "{}", says(&system));

    let volume = system.volumes(0)[0].clone();
    damage(&segment_on(&volume, 1));
    let path = volume.to_str().expect("ASCII").to_owned();
    let _ = system.tierctl(&["volume", "verify", &path]).with_code(1);
    for restarted in [false, true] {
        if restarted {
            system.restart();
            system.sync(&[]);
        }
        let status = system.wait_for("the pool waits", |status| {
            status["pools"][0]["waiting"].is_object()
        });
        assert_eq!(of_volume(&status, "damaged"), 1, "{restarted}: {status:#}");
        let text = says(&system);
        assert!(text.starts_with("NOT SAFE YET: pool pool0"), "{text}");
        assert!(text.contains("add an empty directory"), "{text}");
        assert!(text.contains("1 damaged"), "{text}");
        let list = system.tierctl(&["volume", "list"]).done().stdout;
        assert!(list.contains("1 segment is damaged"), "{list}");
    }
    // What is new need not wait for it.
    write_some(&system, 20, 5);
    let lsn = system.sync(&[]);
    let _ = system.wait_for("the other pool goes on", |status| {
        copied(status, 1) >= lsn || { status["pools"][0]["lacks_segments"] == 1 }
    });

    system.stop();
    let second = system.home().dir("pool0/vol1");
    system.set_volumes(0, vec![volume.clone(), second.clone()]);
    system.start();
    system.sync_all();
    assert!(
        segment_on(&second, 1).exists(),
        "copied from the other pool"
    );
    let text = says(&system);
    assert!(text.starts_with("SAFE: "), "{text}");
    assert!(
        text.contains("warning: ") && text.contains("replace this disk"),
        "{text}"
    );
    let fresh = system.fresh();
    let _ = system
        .replay_from(&system.volumes(0), fresh.root(), &[])
        .done();
    assert_equal(
        &Tree::read(system.root()),
        &Tree::read(fresh.root()),
        "from the pool that was damaged",
    );
}

#[test]
fn a_volume_that_is_taken_away_is_not_said_to_be_there() {
    let system = Setup::new(Kind::Ext4).start();
    system.sync_all();
    let volume = system.volumes(0)[0].clone();
    fs::rename(&volume, volume.with_extension("away")).expect("to take it away");
    let _ = system.wait_for("it is absent", |status| {
        status["pools"][0]["volumes"][0]["state"] == "absent"
    });
}

#[test]
fn a_version_just_written_is_read_without_sealing_its_segment() {
    let system = Setup::new(Kind::Ext4).with("segment_age", "\"1h\"").start();
    let path = system.at("notes");
    let path = path.to_str().expect("ASCII").to_owned();
    let segment = |system: &System| system.status()["spool"]["open_segment"].as_u64();
    fs::write(&path, "one").expect("a file");
    system.sync(&[]);
    let first = segment(&system).expect("an open segment");
    for text in ["two", "three", "four"] {
        fs::write(&path, text).expect("a file");
        let lsn = system.sync(&[]);
        let _ = system.wait_for("the catalog is as far", |status| {
            status["folded_lsn"].as_u64() >= Some(lsn)
        });
        let cat = system.tierctl(&["log", "cat", &path]).done();
        assert_eq!(cat.stdout, text);
        let show = system.tierctl(&["log", "show", &lsn.to_string()]).done();
        assert!(show.stdout.contains("content"), "{show}");
    }
    assert_eq!(segment(&system), Some(first));
}

#[test]
fn events_name_files_as_they_are_on_the_mount() {
    let system = Setup::new(Kind::Ext4).start();
    system.sync(&[]);
    let mut command = Command::new(locate("tierctl"));
    command.arg("--config").arg(system.config());
    command.args(["events", "--json"]);
    let mut events = Running::start(command, system.home().path(), "events");
    let path = system.at("dir/file");
    fs::create_dir(system.at("dir")).expect("a directory");
    let end = Instant::now() + Duration::from_secs(30);
    let wanted = path.to_str().expect("ASCII");
    let said = || fs::read_to_string(system.home().at("events.out")).unwrap_or_default();
    let is_wanted = |line: &str| {
        let event: Value = serde_json::from_str(line).unwrap_or_default();
        let paths = event["paths"].as_array().cloned().unwrap_or_default();
        event["event"] == "durable" && paths.iter().any(|path| path == wanted)
    };
    let mut n = 0;
    while !said().lines().any(is_wanted) {
        assert!(Instant::now() < end, "{}", said());
        n += 1;
        fs::write(&path, n.to_string()).expect("a file");
        std::thread::sleep(Duration::from_millis(300));
    }
    let _ = events.kill();
    for line in said().lines().filter(|line| line.contains("durable")) {
        let event: Value = serde_json::from_str(line).expect("JSON");
        for path in event["paths"].as_array().cloned().unwrap_or_default() {
            let path = path.as_str().unwrap_or_default().to_owned();
            assert!(Path::new(&path).starts_with(system.root()), "{path:?}");
        }
    }
}
