//! The program itself: exit statuses, JSON, moments, subtrees.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::expect_used,
    clippy::format_push_string
)] // tests

mod support;

use support::program::{Bench, begun, json, link, plain, run, status};
use support::tree::differences;
use tierfs::ids::FileId;
use tierfs::record::{Delete, Kind, Op, Pin, Unlink};

#[test]
fn a_tree_comes_back_is_verified_and_listed() {
    let bench = Bench::new();
    let vol = bench.volume_of_a_tree(1, 4 << 20);
    let to = bench.at("to");
    let listed = json(&run(&[&"--from", &vol, &"--list", &"--json"]), 0);
    assert!(
        listed["places"][0]["segments"].as_u64().unwrap() > 2,
        "{listed}"
    );
    assert!(listed["places"][0]["content_bytes"].as_u64().unwrap() > 0);
    assert!(!to.exists());
    let made = json(&run(&[&"--from", &vol, &"--to", &to, &"--json"]), 0);
    assert_eq!(made["losses_total"], 0, "{made}");
    assert_eq!(differences(&bench.at("source"), &to), Vec::<String>::new());
    assert!(!to.join(".hsm-replay").exists());
    status(&run(&[&"--from", &vol, &"--to", &to, &"--verify"]), 0);
    // The same from the directory of segments, without inventory.
    let from = bench.at("segments");
    status(&run(&[&"--from", &from, &"--to", &bench.at("two")]), 0);
    assert_eq!(differences(&to, &bench.at("two")), Vec::<String>::new());
}

#[test]
fn verifying_names_each_difference_and_exits_1() {
    let bench = Bench::new();
    let mut log = begun(&bench);
    for name in ["a", "b", "c", "d"] {
        let file = log.file();
        let mut ops = vec![Op::Inode(plain(Kind::Regular, file))];
        ops.extend(log.content(file, 100_000, &[(0, &vec![9; 70_000])]));
        ops.push(link(FileId::ROOT, name.as_bytes(), file));
        log.commit(ops);
    }
    log.seal();
    let (from, to) = (bench.at("segments"), bench.at("to"));
    status(&run(&[&"--from", &from, &"--to", &to]), 0);
    let mtime = std::fs::metadata(&to).unwrap().modified().unwrap();
    std::fs::remove_file(to.join("a")).unwrap();
    let touch = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let path = to.join(name);
        let mtime = std::fs::metadata(&path).unwrap().modified().unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        change(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        std::fs::File::open(&path)
            .unwrap()
            .set_modified(mtime)
            .unwrap();
    };
    touch("b", &|bytes| bytes[69_999] = 8);
    touch("c", &|bytes| bytes[80_000] = 1);
    std::fs::write(to.join("new"), b"").unwrap();
    std::fs::File::open(&to)
        .unwrap()
        .set_modified(mtime)
        .unwrap();
    let found = json(
        &run(&[&"--from", &from, &"--to", &to, &"--verify", &"--json"]),
        1,
    );
    let mut paths: Vec<&str> = found["differences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|loss| loss["path"].as_str().unwrap())
        .collect();
    paths.sort_unstable();
    assert_eq!(paths, ["a", "b", "c", "new"], "{found}");
}

#[test]
fn every_moment_of_a_history_comes_back() {
    let bench = Bench::new();
    let mut log = begun(&bench);
    let mut expected: Vec<Vec<(String, Vec<u8>)>> = vec![vec![]];
    let dir = log.file();
    log.commit(vec![
        Op::Inode(plain(Kind::Directory, dir)),
        link(FileId::ROOT, b"d", dir),
    ]);
    expected.push(vec![]);
    let file = log.file();
    for (round, size) in [(1_u8, 10_usize), (2, 200_000), (3, 0), (4, 70_000)] {
        let bytes = vec![round; size];
        let mut ops = Vec::new();
        if round == 1 {
            ops.extend([Op::Inode(plain(Kind::Regular, file)), link(dir, b"f", file)]);
        }
        let parts: Vec<(u64, &[u8])> = if size > 0 { vec![(0, &bytes)] } else { vec![] };
        ops.extend(log.content(file, size as u64, &parts));
        // Pins are of no concern to a replay.
        let pinned = round % 2 == 1;
        ops.push(Op::Pin(Pin { file, pinned }));
        log.commit(ops);
        expected.push(vec![("d/f".to_owned(), bytes)]);
    }
    log.commit(vec![
        Op::Unlink(Unlink {
            parent: dir,
            name: b"f".to_vec(),
        }),
        link(FileId::ROOT, b"g", file),
    ]);
    expected.push(vec![("g".to_owned(), vec![4; 70_000])]);
    log.commit(vec![
        Op::Unlink(Unlink {
            parent: FileId::ROOT,
            name: b"g".to_vec(),
        }),
        Op::Delete(Delete { file }),
    ]);
    expected.push(vec![]);
    log.seal();
    for (number, files) in expected.iter().enumerate() {
        let (lsn, to) = ((number + 1).to_string(), bench.at(&format!("to{number}")));
        status(
            &run(&[
                &"--from",
                &bench.at("segments"),
                &"--to",
                &to,
                &"--until",
                &lsn,
            ]),
            0,
        );
        for name in ["d/f", "g"] {
            let there = std::fs::read(to.join(name)).ok();
            let wanted = files
                .iter()
                .find(|(path, _)| path == name)
                .map(|(_, bytes)| bytes.clone());
            assert_eq!(there, wanted, "{name} at {lsn}");
        }
        // The same by its time: transaction k was made at 1,000,000 + k seconds.
        let time = format!("1970-01-12T13:46:{:02}.5Z", 40 + number + 1);
        let by_time = run(&[
            &"--from",
            &bench.at("segments"),
            &"--list",
            &"--json",
            &"--until",
            &time,
        ]);
        assert_eq!(json(&by_time, 0)["at"], number + 1);
    }
    let beyond = run(&[
        &"--from",
        &bench.at("segments"),
        &"--list",
        &"--until",
        &"99",
    ]);
    assert!(status(&beyond, 2).contains("transaction 99"));
    let before = run(&[
        &"--from",
        &bench.at("segments"),
        &"--list",
        &"--until",
        &"1960-01-01",
    ]);
    status(&before, 2);
}

#[test]
fn a_subtree_keeps_its_path_and_fetches_only_its_frames() {
    let bench = Bench::new();
    let vol = bench.volume_of_a_tree(3, 1 << 20);
    let whole = bench.at("whole");
    let all = json(&run(&[&"--from", &vol, &"--to", &whole, &"--json"]), 0);
    let mut tried = 0;
    for entry in std::fs::read_dir(&whole).unwrap() {
        let name = entry.unwrap().file_name();
        let to = bench.at(&format!("part{tried}"));
        let part = json(
            &run(&[&"--from", &vol, &"--to", &to, &"--path", &name, &"--json"]),
            0,
        );
        assert!(part["frames"].as_u64() <= all["frames"].as_u64());
        let names: Vec<_> = std::fs::read_dir(&to)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, std::slice::from_ref(&name));
        status(
            &run(&[&"--from", &vol, &"--to", &to, &"--path", &name, &"--verify"]),
            0,
        );
        tried += 1;
        if tried == 12 {
            break;
        }
    }
    let nothing = run(&[
        &"--from",
        &vol,
        &"--to",
        &bench.at("x"),
        &"--path",
        &"no/such",
    ]);
    assert!(status(&nothing, 2).contains("no/such"));
}
