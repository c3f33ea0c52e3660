//! What the crates may use of each other, as ARCHITECTURE.md says, and what is documented as absent.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const OWN: [&str; 5] = ["tierfs", "media", "policies", "replay", "hsmd"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The crates of this workspace that a crate uses, its tests aside.
fn uses(name: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join(name).join("Cargo.toml")).expect("a manifest");
    let dependencies = text.split("[dependencies]").nth(1).unwrap_or_default();
    let dependencies = dependencies.split("\n[").next().unwrap_or_default();
    let names = dependencies
        .lines()
        .filter_map(|line| line.split(['.', ' ', '=']).next());
    names
        .filter(|name| OWN.contains(name))
        .map(str::to_owned)
        .collect()
}

#[test]
fn crates_use_what_they_may() {
    let table: [(&str, &[&str]); 5] = [
        ("tierfs", &[]),
        ("media", &[]),
        ("policies", &[]),
        ("replay", &["media", "tierfs"]),
        ("hsmd", &["media", "policies", "replay", "tierfs"]),
    ];
    for (name, may) in table {
        let may: BTreeSet<String> = may.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(uses(name), may, "{name}");
    }
}

fn sources(dir: &Path, list: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, list);
        } else if path.extension().is_some_and(|end| end == "rs") {
            list.push(path);
        }
    }
}

#[test]
fn policies_do_no_input_or_output_and_know_no_clock() {
    let mut list = Vec::new();
    sources(&root().join("policies/src"), &mut list);
    assert!(list.len() > 4, "{list:?}");
    for path in list {
        let text = fs::read_to_string(&path).expect("a source");
        for word in [
            "std::fs",
            "std::net",
            "std::io",
            "std::process",
            "std::env",
            "SystemTime",
            "Instant",
        ] {
            assert!(!text.contains(word), "{} has {word}", path.display());
        }
    }
}

/// No file is longer than 800 lines.
#[test]
fn files_are_short() {
    let mut list = Vec::new();
    for name in OWN.iter().chain(&["tests"]) {
        sources(&root().join(name), &mut list);
    }
    for path in list {
        let text = fs::read_to_string(&path).expect("a source");
        let lines = text.lines().count();
        assert!(lines <= 800, "{}: {lines} lines", path.display());
    }
}
