//! The tools of the P3 matrix on plain files: all give the right bytes, and none takes a hole for them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use hsm_tests::loopfs::{Kind, LoopFs};
use hsm_tests::report::say;
use hsm_tests::tools::{Outcome, Tool, tools};

fn make_executable(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("a mode");
}

/// Applies each tool that works here to a file that `prepare` made of its content.
fn each(kind: Kind, prepare: impl Fn(&Path, &[u8]), wanted: impl Fn(&Tool, &Outcome) -> bool) {
    let fs = LoopFs::small(kind);
    let (same, elsewhere) = (fs.at("scratch"), fs.beside("elsewhere"));
    // Overlays show a directory, and nothing of the scratch space may lie in it.
    let files = fs.at("files");
    for dir in [&same, &files] {
        fs::create_dir(dir).expect("a directory");
    }
    let (mut failed, all) = (Vec::new(), tools());
    let these = all.iter().filter(|tool| tool.works_on(kind));
    for (number, tool) in these.enumerate() {
        let source = files.join(format!("file {number}"));
        let content = tool.content();
        prepare(&source, &content);
        make_executable(&source);
        let outcome = tool.try_on(&source, content, &same, &elsewhere);
        if !wanted(tool, &outcome) {
            failed.push(format!("{}: {outcome:?}", tool.name));
        }
        for dir in [&same, &elsewhere] {
            let left = fs::read_dir(dir).expect("a listing").count();
            assert_eq!(left, 0, "{} leaves something behind", tool.name);
        }
        if source.exists() {
            fs::remove_file(&source).expect("to remove the file");
        }
    }
    say(format_args!("{} tools on {kind}", all.len()));
    assert!(failed.is_empty(), "{kind}:\n{}", failed.join("\n"));
}

fn right(kind: Kind) {
    let write = |path: &Path, content: &[u8]| fs::write(path, content).expect("a file");
    each(kind, write, |_, outcome| *outcome == Outcome::Right);
}

#[test]
fn every_tool_gives_the_right_bytes_on_ext4() {
    right(Kind::Ext4);
}

#[test]
fn every_tool_gives_the_right_bytes_on_xfs() {
    right(Kind::Xfs);
}

#[test]
fn every_tool_gives_the_right_bytes_on_btrfs() {
    right(Kind::Btrfs);
}

/// What a stub is where nobody recalls it: the matrix must tell.
fn zeros(kind: Kind) {
    let hole = |path: &Path, content: &[u8]| {
        let file = fs::File::create(path).expect("a file");
        file.set_len(content.len() as u64).expect("its size");
    };
    each(kind, hole, |tool, outcome| match outcome {
        Outcome::Right => tool.is_blind(),
        Outcome::Wrong(_) => true,
        // No program runs that is zeros; all others say nothing, which is why zeros are so bad.
        Outcome::Failed(_) => tool.name.starts_with("exec"),
    });
}

#[test]
fn zeros_are_told_from_content_on_ext4() {
    zeros(Kind::Ext4);
}

#[test]
fn zeros_are_told_from_content_on_btrfs() {
    zeros(Kind::Btrfs);
}

#[test]
fn names_are_the_tools_own() {
    let mut names: Vec<&str> = tools().iter().map(|tool| tool.name).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}
