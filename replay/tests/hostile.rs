//! Hostile logs and targets, logs that do not belong together, killed replays.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::expect_used,
    clippy::format_push_string
)] // tests

mod support;

use std::process::Command;

use support::log::{LogWriter, volume};
use support::program::{Bench, PROGRAM, begun, link, plain, run, status};
use support::tree::differences;
use tierfs::ids::{FileId, LogId, Time};
use tierfs::record::{Bits, Device, Inode, Kind, Op, Xattrs};

#[test]
fn what_does_not_belong_together_is_refused_by_name() {
    let bench = Bench::new();
    let vol1 = bench.volume_of_a_tree(6, 2 << 20);
    // Another log.
    let mut other = LogWriter::new(&bench.at("other"));
    other.seal();
    volume(&bench.at("other"), &bench.at("foreign"), LogId([9; 16]));
    let text = status(
        &run(&[&"--from", &vol1, &"--from", &bench.at("foreign"), &"--list"]),
        2,
    );
    assert!(text.contains("foreign") && text.contains("0909"), "{text}");
    // A fork: the same number by another writer.
    let mut fork = LogWriter::with_epoch(&bench.at("fork"), 1234);
    let root = fork.file();
    fork.commit(vec![
        LogWriter::filesystem(),
        Op::Inode(plain(Kind::Directory, root)),
    ]);
    fork.seal();
    volume(&bench.at("fork"), &bench.at("forked"), support::log::LOG);
    let text = status(
        &run(&[&"--from", &vol1, &"--from", &bench.at("forked"), &"--list"]),
        2,
    );
    assert!(
        text.contains("forked") && text.contains("segment 1"),
        "{text}"
    );
    let text = status(
        &run(&[&"--from", &vol1, &"--from", &bench.at("fork"), &"--list"]),
        2,
    );
    assert!(text.contains("fork"), "{text}");
    // A segment that was exchanged: the chain says so.
    let mut forked = LogWriter::new(&bench.at("mixed"));
    forked.seal();
    std::fs::copy(
        bench.at("mixed/0000000001.hsm.zst"),
        bench.at("segments/0000000001.hsm.zst"),
    )
    .unwrap();
    let mixed = bench.copy_volume("mixed-volume");
    let text = status(&run(&[&"--from", &mixed, &"--list"]), 2);
    assert!(text.contains("chain"), "{text}");
    for path in ["nowhere", "source"] {
        status(&run(&[&"--from", &bench.at(path), &"--list"]), 2);
    }
}

#[test]
fn targets_that_hold_something_are_refused_and_left_alone() {
    let bench = Bench::new();
    let vol = bench.volume_of_a_tree(7, 2 << 20);
    let to = bench.at("to");
    std::fs::create_dir(&to).unwrap();
    std::fs::write(to.join("mine"), b"x").unwrap();
    let text = status(&run(&[&"--from", &vol, &"--to", &to]), 2);
    assert!(text.contains("mine"), "{text}");
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 1);
    status(
        &run(&[&"--from", &vol, &"--to", &bench.at("no/such/parent")]),
        2,
    );
    status(
        &run(&[&"--from", &vol, &"--to", &vol.join("VOLUME.json")]),
        2,
    );
}

#[test]
fn killed_replays_are_continued_to_an_equal_tree() {
    let bench = Bench::new();
    let vol = bench.volume_of_a_tree(8, 1 << 20);
    let to = bench.at("to");
    let mut rng = 12_345_u64;
    let mut killed = 0;
    for _ in 0..200 {
        let mut child = Command::new(PROGRAM)
            .args(
                [
                    &"--sync-ms" as &dyn AsRef<std::ffi::OsStr>,
                    &"1",
                    &"--from",
                    &vol,
                    &"--to",
                    &to,
                ]
                .map(AsRef::as_ref),
            )
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        rng = rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(std::time::Duration::from_millis((rng >> 33) % 250));
        child.kill().unwrap();
        let ended = child.wait().unwrap();
        if ended.success() {
            break;
        }
        if killed > 0 && ended.code() == Some(2) && !to.join(".hsm-replay").exists() {
            // The one before was killed when nothing was left to do but the last sync.
            break;
        }
        assert_eq!(ended.code(), None, "it ended by itself with an error");
        killed += 1;
        if to.join(".hsm-replay/state.json").exists() {
            let other = run(&[&"--from", &vol, &"--to", &to, &"--until", &"3"]);
            assert!(status(&other, 2).contains("unfinished"));
        }
        if killed == 25 {
            break;
        }
    }
    let continued = run(&[&"--from", &vol, &"--to", &to]);
    if to.join(".hsm-replay").exists() || continued.status.code() == Some(0) {
        status(&continued, 0);
    }
    assert_eq!(differences(&bench.at("source"), &to), Vec::<String>::new());
}

/// Values that no real file has, as far as the records' own checks let them through.
#[allow(clippy::too_many_lines)] // a list
fn hostile_log(bench: &Bench) {
    let mut log = begun(bench);
    // A link where a directory of the same name is expected: the fold refuses a second name; what is
    // left is a link and a directory beside it, and files below both.
    let mut add = |name: &[u8], inode: Inode| {
        let file = inode.file;
        log.commit(vec![Op::Inode(inode), link(FileId::ROOT, name, file)]);
    };
    let mut next = 2;
    let mut file = || {
        next += 1;
        FileId::new(next).unwrap()
    };
    add(
        b"etc",
        Inode {
            target: Some(b"/etc".to_vec()),
            ..plain(Kind::Symlink, file())
        },
    );
    add(
        b"empty-link",
        Inode {
            target: Some(Vec::new()),
            ..plain(Kind::Symlink, file())
        },
    );
    add(
        b"long-link",
        Inode {
            target: Some(vec![b'a'; 70_000]),
            ..plain(Kind::Symlink, file())
        },
    );
    add(
        b"device",
        Inode {
            rdev: Some(Device {
                major: u32::MAX,
                minor: u32::MAX,
            }),
            ..plain(Kind::CharDevice, file())
        },
    );
    add(b"no-device", plain(Kind::BlockDevice, file()));
    add(
        b"bad-time",
        Inode {
            mtime: Time {
                seconds: i64::MAX,
                nanos: 999_999_999,
            },
            ..plain(Kind::Fifo, file())
        },
    );
    add(
        b"bad-owner",
        Inode {
            uid: u32::MAX,
            gid: u32::MAX,
            ..plain(Kind::Fifo, file())
        },
    );
    add(
        b"bad-mode",
        Inode {
            mode: u32::MAX,
            ..plain(Kind::Fifo, file())
        },
    );
    add(
        b"flags",
        Inode {
            flags: Bits(u32::MAX),
            ..plain(Kind::Regular, file())
        },
    );
    let stub = file();
    log.commit(vec![
        Op::Inode(plain(Kind::Regular, stub)),
        Op::Xattrs(Xattrs {
            file: stub,
            list: vec![
                (b"trusted.hsm".to_vec(), b"stub".to_vec()),
                (b"user.\xff".to_vec(), vec![1; 60_000]),
                (b"x".to_vec(), vec![]),
            ],
            more: false,
        }),
        link(FileId::ROOT, b"stub", stub),
    ]);
    let huge = file();
    let mut ops = vec![Op::Inode(plain(Kind::Regular, huge))];
    let end = (i64::MAX as u64) - 10;
    ops.extend(log.content(huge, i64::MAX as u64, &[(end, b"end")]));
    ops.push(link(FileId::ROOT, b"huge", huge));
    log.commit(ops);
    log.seal();
}

#[test]
fn hostile_logs_write_nothing_outside_and_never_crash() {
    let bench = Bench::new();
    hostile_log(&bench);
    let to = bench.at("to");
    let output = run(&[&"--from", &bench.at("segments"), &"--to", &to]);
    let code = output.status.code();
    assert!(
        matches!(code, Some(2 | 3)),
        "{code:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    if to.join("stub").exists() {
        let list = support::fs::run(
            "getfattr",
            &["-d", "-m", "-", support::fs::text(&to.join("stub"))],
        );
        assert!(!list.contains("trusted.hsm"), "{list}");
    }
    let names: Vec<_> = std::fs::read_dir(bench.dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(
        names
            .iter()
            .all(|name| ["segments", "to"].contains(&name.to_str().unwrap())),
        "{names:?}"
    );
    let _ = Command::new("chattr")
        .args(["-R", "-i", "-a"])
        .arg(&to)
        .output();
}

#[test]
fn a_full_disk_ends_the_replay_which_goes_on_when_there_is_room() {
    let bench = Bench::new();
    let mut log = begun(&bench);
    for number in 0..60_u8 {
        let file = log.file();
        // Nothing that compresses, and larger together than the disk.
        let bytes: Vec<u8> = (0..1_000_000_u32)
            .flat_map(|k| {
                blake3::hash(&[k.to_le_bytes(), [number; 4]].concat()).as_bytes()[..1].to_vec()
            })
            .collect();
        let mut ops = vec![Op::Inode(plain(Kind::Regular, file))];
        ops.extend(log.content(file, bytes.len() as u64, &[(0, &bytes)]));
        ops.push(link(FileId::ROOT, format!("f{number}").as_bytes(), file));
        log.commit(ops);
    }
    log.seal();
    let disk = support::fs::Mounted::sized("ext4", 110 << 20);
    let (ballast, to) = (disk.root().join("ballast"), disk.root().join("to"));
    support::fs::run("fallocate", &["-l", "60M", support::fs::text(&ballast)]);
    let from = bench.at("segments");
    let full = run(&[&"--sync-ms", &"1", &"--from", &from, &"--to", &to]);
    let text = status(&full, 2);
    assert!(
        text.contains("No space") && text.contains("again to continue"),
        "{text}"
    );
    assert!(to.join(".hsm-replay").exists());
    std::fs::remove_file(ballast).unwrap();
    let text = status(&run(&[&"--from", &from, &"--to", &to]), 0);
    assert!(text.contains("continued"), "{text}");
    status(&run(&[&"--from", &from, &"--to", &to, &"--verify"]), 0);
}

#[test]
fn a_link_where_an_unfinished_replay_had_a_directory_is_not_followed() {
    let bench = Bench::new();
    let mut log = begun(&bench);
    let dir = log.file();
    log.commit(vec![
        Op::Inode(plain(Kind::Directory, dir)),
        link(FileId::ROOT, b"d", dir),
    ]);
    for number in 0..50 {
        let file = log.file();
        let mut ops = vec![Op::Inode(plain(Kind::Regular, file))];
        ops.extend(log.content(file, 5, &[(0, b"bytes")]));
        ops.push(link(dir, format!("f{number}").as_bytes(), file));
        log.commit(ops);
    }
    log.seal();
    let (to, outside) = (bench.at("to"), bench.at("outside"));
    std::fs::create_dir(&outside).unwrap();
    std::fs::create_dir_all(to.join(".hsm-replay")).unwrap();
    std::os::unix::fs::symlink(&outside, to.join("d")).unwrap();
    let state = format!(
        r#"{{"format":1,"log_id":"{}","at":{},"path":null,"progress":{{"Content":[0,0]}}}}"#,
        log.log_id, 52
    );
    std::fs::write(to.join(".hsm-replay/state.json"), state).unwrap();
    let output = run(&[&"--from", &bench.at("segments"), &"--to", &to]);
    assert_ne!(output.status.code(), Some(0));
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
}
