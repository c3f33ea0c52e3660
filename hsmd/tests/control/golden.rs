//! What people read, word by word: the text for each situation stands in golden/.
//!
//! `HSM_UPDATE=1` writes the files again; read the difference before committing it.

use std::path::PathBuf;
use std::process::Command;

use hsmd::control::model::{
    LagFile, Notice, Progress, Severity, State, Status, VolumeState, Waiting, WaitingReason,
};
use hsmd::tierctl::status::{Word, render, verdict};

use crate::fake::{Daemon, all_well, run, when};

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/control/golden")
}

/// Compares with a file, or writes it.
fn golden(name: &str, text: &str) {
    let file = directory().join(name);
    if std::env::var_os("HSM_UPDATE").is_some() {
        std::fs::write(&file, text).unwrap();
    }
    let wanted = std::fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(
        text,
        wanted,
        "{} is not what tierctl prints; HSM_UPDATE=1 writes it again",
        file.display()
    );
}

fn check(name: &str, word: Word, status: &Status) {
    assert_eq!(verdict(status).word, word, "{}", verdict(status).line);
    golden(name, &render(status));
}

#[test]
fn all_is_well() {
    check("all-well.txt", Word::Safe, &all_well());
    let mut status = all_well();
    for pool in &mut status.pools {
        pool.copied_lsn = Some(1042);
        pool.lacks_since = None;
    }
    assert_eq!(
        verdict(&status).line,
        "SAFE: everything changed up to 1 s ago is on 2 of 2 pools"
    );
}

#[test]
fn catching_up_with_a_first_examination() {
    let mut status = all_well();
    status.state = State::Examining;
    status.durable_lsn = Some(311);
    status.copied_lsn = None;
    for pool in &mut status.pools {
        pool.copied_lsn = None;
        pool.volumes[0].last_verified = None;
    }
    status.lag.pending = 60_211;
    status.lag.oldest_age_ms = Some(42_000);
    status.lag.examination = Some(Progress {
        since: when("2026-11-20T16:59:18Z"),
        done: 18_394,
        total: Some(78_605),
    });
    check("examining.txt", Word::CatchingUp, &status);
}

#[test]
fn catching_up_with_many_changes() {
    let mut status = all_well();
    status.lag.pending = 1234;
    status.lag.oldest_age_ms = Some(42_000);
    status.lag.oldest_path = Some("/data/vm/disk.img".to_owned());
    status.lag.worst = vec![LagFile {
        path: "/data/vm/disk.img".to_owned(),
        age_ms: 42_000,
        why: "it changes all the time".to_owned(),
        bytes: 2 << 30,
    }];
    status.fuzzy_files = 1;
    check("catching-up.txt", Word::CatchingUp, &status);
}

#[test]
fn catching_up_with_copies() {
    let mut status = all_well();
    status.pools[1].lacks_segments = 12;
    status.pools[1].lacks_bytes = 768 << 20;
    check("copying.txt", Word::CatchingUp, &status);
}

fn without_volume() -> Status {
    let mut status = all_well();
    let pool = &mut status.pools[1];
    pool.copied_lsn = Some(700);
    pool.lacks_since = Some(when("2026-11-20T14:00:00Z"));
    pool.lacks_segments = 6;
    pool.lacks_bytes = 384 << 20;
    pool.waiting = Some(Waiting {
        reason: WaitingReason::Absent,
        serial: pool.volumes[0].serial.clone(),
        path: "/archive/b1".to_owned(),
        since: when("2026-11-20T14:00:00Z"),
        why: "there is no directory".to_owned(),
    });
    pool.volumes[0].state = VolumeState::Absent;
    pool.volumes[0].free_bytes = None;
    status.copied_lsn = Some(700);
    status.spool.segments = 6;
    status.spool.bytes = 397 << 20;
    status
}

#[test]
fn a_volume_is_missing() {
    let status = without_volume();
    assert_eq!(
        verdict(&status).line,
        "NOT SAFE YET: pool b waits for volume 91827364a5b6c7d8 (expected at /archive/b1) and lacks changes of the last 3 h: mount it there, copying goes on by itself"
    );
    check("volume-missing.txt", Word::NotSafe, &status);
}

/// Nothing is to be copied to it, so all is safe; but who wants a released file had better know.
#[test]
fn a_volume_is_away_while_files_are_released() {
    let mut status = all_well();
    status.pools[1].volumes[0].state = VolumeState::Absent;
    assert_eq!(verdict(&status).word, Word::Safe);
    let away = "  note: volume 91827364a5b6c7d8 of pool b is away: released files whose content is on no other volume that is here wait until it is at /archive/b1 again\n";
    assert!(render(&status).contains(away), "{}", render(&status));
    status.released = None;
    assert!(!render(&status).contains("is away"));
}

#[test]
fn the_spool_is_full() {
    let mut status = without_volume();
    status.spool.bytes = status.spool.bytes_max;
    status.spool.full = true;
    status.state = State::Degraded;
    status.lag.pending = 12;
    status.lag.oldest_age_ms = Some(7_200_000);
    status.notices = vec![Notice {
        severity: Severity::Error,
        what: "the spool /var/lib/hsmd/spool".to_owned(),
        why: "it has grown to spool_bytes_max, changes wait on the disk".to_owned(),
        advice: "mount the volume that a pool waits for, or raise spool_bytes_max".to_owned(),
        since: Some(when("2026-11-20T15:00:00Z")),
    }];
    check("spool-full.txt", Word::NotSafe, &status);
}

#[test]
fn the_disk_of_the_spool_is_full() {
    let mut status = all_well();
    status.spool.full = true;
    status.spool.free_bytes = 12 << 10;
    status.state = State::Degraded;
    status.lag.oldest_age_ms = Some(300_000);
    assert_eq!(
        verdict(&status).line,
        "NOT SAFE YET: the spool is full (its disk has 12 KiB left): what was changed in the last 5 min is not logged, only the watched disk has it; make room on the disk of /var/lib/hsmd/spool"
    );
}

#[test]
fn what_is_not_durable_yet_waits_though_no_file_does() {
    let mut status = all_well();
    status.lag.oldest_age_ms = Some(42_000);
    assert_eq!(
        verdict(&status).line,
        "CATCHING UP: changes wait to be logged, the oldest for 42 s"
    );
    assert!(render(&status).contains("waiting   changes wait to be logged, the oldest for 42 s"));
}

/// A segment of pool b is damaged, and the pool has no other copy of it.
fn with_damage() -> Status {
    let mut status = all_well();
    let pool = &mut status.pools[1];
    pool.copied_lsn = Some(700);
    pool.lacks_since = Some(when("2026-11-20T14:00:00Z"));
    pool.lacks_segments = 1;
    pool.lacks_bytes = 64 << 20;
    pool.volumes[0].damaged = 1;
    let serial = pool.volumes[0].serial.clone();
    pool.waiting = Some(Waiting {
        reason: WaitingReason::Failed,
        serial,
        path: "/archive/b1".to_owned(),
        since: when("2026-11-20T16:00:00Z"),
        why: "its copy of segment 12 is damaged, and the pool has no other volume to copy it to: \
              add an empty directory on another disk to the pool's volumes and restart hsmd"
            .to_owned(),
    });
    status.copied_lsn = Some(700);
    status.state = State::Degraded;
    status.notices = vec![Notice {
        severity: Severity::Error,
        what: "volume 91827364a5b6c7d8 of pool b at /archive/b1 is damaged".to_owned(),
        why: "segment 12 cannot be read back as written".to_owned(),
        advice: "add an empty directory on another disk to the volumes of pool b in the configuration and restart hsmd: \
                 what is damaged is copied there again from the spool or another pool; then replace this disk"
            .to_owned(),
        since: Some(when("2026-11-20T16:00:00Z")),
    }];
    status
}

#[test]
fn a_volume_is_damaged() {
    check("volume-damaged.txt", Word::NotSafe, &with_damage());
    let daemon = Daemon::start();
    *daemon.core.status.lock().unwrap() = with_damage();
    golden(
        "volume-list.txt",
        &run(&mut daemon.tierctl(&["volume", "list"])).out,
    );
}

#[test]
fn a_disk_fails_and_a_name_is_hostile() {
    let mut status = all_well();
    status.state = State::Degraded;
    status.mount = "/data/\u{1b}[2J\u{202e}".to_owned();
    status.notices = vec![Notice {
        severity: Severity::Error,
        what: "writing to the spool".to_owned(),
        why: "Input/output error".to_owned(),
        advice: "replace the disk of /var/lib/hsmd/spool and restart hsmd".to_owned(),
        since: None,
    }];
    let text = render(&status);
    assert!(!text.contains('\u{1b}') && !text.contains('\u{202e}'));
    assert_eq!(
        text.lines().next().unwrap(),
        "NOT SAFE YET: writing to the spool: replace the disk of /var/lib/hsmd/spool and restart hsmd"
    );
}

#[test]
fn through_the_socket_it_reads_the_same() {
    let daemon = Daemon::start();
    *daemon.core.status.lock().unwrap() = all_well();
    let ran = run(&mut daemon.tierctl(&["status", "--check"]));
    assert_eq!(ran.code, 0);
    golden("all-well.txt", &ran.out);
    *daemon.core.status.lock().unwrap() = without_volume();
    let ran = run(&mut daemon.tierctl(&["status"]));
    assert_eq!(ran.code, 0);
    golden("volume-missing.txt", &ran.out);
    assert_eq!(run(&mut daemon.tierctl(&["status", "--check"])).code, 1);
    let ran = run(&mut daemon.tierctl(&["status", "--json"]));
    let back: Status = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(back, without_volume());
    golden("status.json", &ran.out);
}

#[test]
fn the_daemon_is_down() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let tierctl = |words: &[&str]| {
        let ran = run(Command::new(env!("CARGO_BIN_EXE_tierctl")).args(words));
        assert_eq!((ran.code, ran.out.as_str()), (2, ""));
        ran.err.replace(dir.path().to_str().unwrap(), "DIR")
    };
    let down = tierctl(&["--socket", socket.to_str().unwrap(), "status"]);
    golden("down.txt", &down);
    let config = dir.path().join("hsmd.toml");
    let path = dir.path().display();
    std::fs::write(
        &config,
        format!("mount = \"{path}/m\"\nspool = \"{path}/sp\"\ncatalog = \"{path}/c.db\"\nsocket = \"{path}/s\"\n[[pool]]\nname = \"a\"\nvolumes = [\"{path}/v\"]\n"),
    )
    .unwrap();
    let down = tierctl(&["--config", config.to_str().unwrap(), "status"]);
    golden("down-config.txt", &down);
    let absent = dir.path().join("absent.toml");
    let down = tierctl(&["--config", absent.to_str().unwrap(), "status"]);
    golden("no-config.txt", &down);
}

#[test]
fn every_golden_file_is_used() {
    let mut names: Vec<_> = std::fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    let known = [
        "all-well.txt",
        "catching-up.txt",
        "copying.txt",
        "down-config.txt",
        "down.txt",
        "examining.txt",
        "no-config.txt",
        "spool-full.txt",
        "status.json",
        "volume-damaged.txt",
        "volume-list.txt",
        "volume-missing.txt",
    ];
    assert_eq!(names, known);
}
