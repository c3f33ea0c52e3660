//! What files are read and refused, and the examples.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use policies::Statement;
use tierfs::catalog::Catalog;
use tierfs::files::{Files, Limits, Select, View};
use tierfs::residency::{Residency, Stub, path_beside};
use tierfs::{FileId, LogId};

use super::{LoadError, load, parse};

fn examples() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies/examples");
    let mut list: Vec<PathBuf> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    list.sort();
    list
}

#[test]
fn the_examples_are_sound() {
    let examples = examples();
    assert_eq!(examples.len(), 4, "{examples:?}");
    for example in examples {
        let policy = load(&example).unwrap_or_else(|error| panic!("{error}"));
        assert!(!policy.rules.is_empty());
    }
}

#[test]
fn the_example_of_the_manual_is_sound() {
    let manual = include_str!("../../../man/hsm-policy.5");
    let example = manual.split_once(".Sh EXAMPLES").unwrap().1;
    let example = example.split_once("indent\n").unwrap().1;
    let example = example.split_once(".Ed").unwrap().0;
    assert_eq!(parse("man", example).unwrap().rules.len(), 2);
}

#[test]
fn names_that_the_view_does_not_know_are_told() {
    let text = "[[rule]]\nname = \"a\"\naction = \"pin\"\ncondition = \"size > mb(1)\"\n";
    assert_eq!(
        parse("p.toml", text)
            .unwrap_err()
            .to_string()
            .split(';')
            .next()
            .unwrap(),
        "p.toml:4: rule a: condition: no such function: mb (at character 8: \"mb(1)\")"
    );
    let text = text
        .replace("size > mb(1)", "1")
        .replace("\"pin\"", "\"pin\"\nweight = \"sise\"");
    let error = parse("p.toml", &text).unwrap_err();
    assert!(matches!(error, LoadError::Wrong(_)));
    assert!(
        error
            .to_string()
            .starts_with("p.toml:4: rule a: weight: no such column: sise"),
        "{error}"
    );
}

#[test]
fn a_file_that_cannot_be_read_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("p.toml");
    let error = load(&file).unwrap_err().to_string();
    assert!(
        error.contains("p.toml: the policy cannot be read: No such file"),
        "{error}"
    );
    std::fs::write(&file, vec![b' '; (1 << 20) + 1]).unwrap();
    let error = load(&file).unwrap_err().to_string();
    assert!(error.contains("at most 1 MiB"), "{error}");
}

const DAY: i64 = 86_400;

/// Files by their paths, sizes and ages (days since they were written, and since they were read).
const FILES: [(&str, i64, i64, i64); 9] = [
    ("library/old.mkv", 4 << 30, 200, 100),
    ("library/watched.mkv", 4 << 30, 200, 2),
    ("library/new.mkv", 4 << 30, 20, 20),
    ("library/.thumbnails/old.png", 60 << 20, 200, 100),
    ("projects/apollo/model.bin", 200 << 20, 60, 60),
    ("projects/apollo/small.txt", 2000, 60, 60),
    ("projects/other/data.bin", 300 << 20, 60, 60),
    ("scratch.tmp", 1 << 30, 60, 60),
    ("fresh.bin", 1 << 30, 0, 0),
];

/// A catalog of [`FILES`], the model of apollo released.
fn made_up(path: &Path, now: i64) {
    drop(Catalog::create(path, LogId([7; 16])).unwrap());
    let conn = rusqlite::Connection::open(path).unwrap();
    let mut dirs = std::collections::HashMap::from([(String::new(), 1_i64)]);
    for (file, (name, size, written, read)) in (100_i64..).zip(FILES) {
        let mut parent = String::new();
        let parts: Vec<&str> = name.split('/').collect();
        for part in &parts[..parts.len() - 1] {
            let above = dirs[&parent];
            let below = format!("{parent}/{part}");
            let next = i64::try_from(dirs.len()).unwrap() + 1;
            let dir = *dirs.entry(below.clone()).or_insert(next);
            if dir == next {
                let row = (above, part.as_bytes(), dir);
                conn.execute("INSERT INTO dentry VALUES (?1, ?2, ?3, 1)", row)
                    .unwrap();
            }
            parent = below;
        }
        let last = parts[parts.len() - 1].as_bytes();
        conn.execute(
            "INSERT INTO dentry VALUES (?1, ?2, ?3, 1)",
            (dirs[&parent], last, file),
        )
        .unwrap();
        conn.execute(
            "INSERT INTO inode VALUES (?1, 1, 0, 420, 0, 0, ?2, ?3, 0, ?3, 0, NULL, NULL, NULL, NULL, 0, 0, 1,
             NULL, 0, NULL, NULL)",
            (file, size, now - written * DAY - 60),
        )
        .unwrap();
        let mut list = Residency::open(&path_beside(path)).unwrap();
        let id = FileId::new(file.unsigned_abs()).unwrap();
        list.set_atimes(&[(id, now - read * DAY - 60)]).unwrap();
        if name.ends_with("model.bin") {
            let handle = vec![1];
            list.add(&[Stub { file: id, handle }], now).unwrap();
        }
    }
}

/// What each rule of an example is about, best first.
fn about(policy: &policies::Policy, path: &Path, now: i64) -> Vec<(String, Vec<&'static str>)> {
    let view = View {
        prefix: Vec::new(),
        copied: tierfs::Lsn::new(1),
        now,
    };
    let mut files = Files::open(path, &view).unwrap();
    let of_rule = |rule: &policies::Rule| {
        let statement = Statement::of(policy, rule);
        let params = super::values(&statement.params);
        let select = Select {
            condition: &statement.condition,
            weight: statement.weight.as_deref(),
            params: &params,
        };
        let mut names = Vec::new();
        files
            .select(&select, &Limits::default(), &mut |hit| {
                let at = usize::try_from(hit.file.get() - 100).unwrap();
                names.push(FILES[at].0);
                ControlFlow::Continue(())
            })
            .unwrap();
        (rule.name.clone(), names)
    };
    policy.rules.iter().map(of_rule).collect()
}

#[test]
fn the_examples_are_about_what_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let (path, now) = (dir.path().join("catalog.db"), 1_700_000_000);
    made_up(&path, now);
    let expected: [&[(&str, &[&str])]; 4] = [
        &[(
            "cold-large",
            &["library/old.mkv", "projects/other/data.bin"],
        )],
        &[("old-recordings", &["library/old.mkv"])],
        &[
            (
                "apollo-stays",
                &["projects/apollo/model.bin", "projects/apollo/small.txt"],
            ),
            ("apollo-comes-back", &["projects/apollo/model.bin"]),
        ],
        &[
            (
                "make-room",
                &[
                    "library/old.mkv",
                    "library/new.mkv",
                    "scratch.tmp",
                    "projects/other/data.bin",
                    "library/watched.mkv",
                    "library/.thumbnails/old.png",
                ],
            ),
            (
                "make-room-in-need",
                &[
                    "library/old.mkv",
                    "library/new.mkv",
                    "scratch.tmp",
                    "projects/other/data.bin",
                    "library/watched.mkv",
                    "library/.thumbnails/old.png",
                    "fresh.bin",
                ],
            ),
        ],
    ];
    for (example, expected) in examples().iter().zip(expected) {
        let found = about(&load(example).unwrap(), &path, now);
        let found: Vec<(&str, &[&str])> = found
            .iter()
            .map(|(name, files)| (&name[..], &files[..]))
            .collect();
        assert_eq!(found, expected, "{}", example.display());
    }
}
