//! The tests of the tests: every change can be made on every filesystem, the comparison finds what
//! was planted, and calls a faithful copy equal.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;

use hsm_tests::changes;
use hsm_tests::compare::{Options, Tree, assert_equal, compare, differences, listing};
use hsm_tests::loopfs::{Kind, LoopFs, ROOMY_BYTES, must};
use hsm_tests::report::say;
use hsm_tests::sys;
use hsm_tests::workload::{Workload, seed};

/// All that `cp -a` keeps. It sets no chattr flags, makes holes of some zeros, and data of space that
/// is only allocated.
const AS_COPIED: Options = Options {
    lost_found: false,
    root: true,
    holes: false,
    flags: 0,
};

/// A faithful copy of what lies in one directory.
fn copy(from: &Path, to: &Path) {
    must(
        Command::new("cp")
            .args(["-a", "--reflink=never", "-T"])
            .args([from, to]),
    );
}

fn every_change_is_made_and_a_copy_is_equal(kind: Kind) {
    let (one, other) = (LoopFs::small(kind), LoopFs::small(kind));
    let all = changes::all(kind);
    changes::prepare(one.root(), &all);
    let before = Tree::read(one.root());
    changes::apply(one.root(), &all);
    changes::let_go();
    // One cannot see these afterwards.
    let unseen = [
        "overwrite_with_the_same",
        "rename_there_and_back",
        "unlink_what_was_just_made",
        "tmpfile_never_linked",
        "orphan_gets_a_name_again",
        "reflink_then_write",
        "preallocate_behind_end",
        "flag_journal_data",
    ];
    let changed = differences(&before, &Tree::read(one.root()));
    for change in &all {
        let at = format!("{}/", change.name);
        assert!(
            unseen.contains(&change.name)
                || changed
                    .iter()
                    .any(|d| d.path.starts_with(&at) || d.path == change.name),
            "{} changes nothing on {kind}",
            change.name
        );
    }
    assert_equal(
        &Tree::read(one.root()),
        &Tree::read(one.root()),
        "read twice",
    );
    // cp cannot go that deep.
    must(
        Command::new("rm")
            .arg("-rf")
            .arg(one.at("mkdir_deeper_than_path_max")),
    );
    let after = Tree::read_with(one.root(), AS_COPIED);
    copy(one.root(), other.root());
    assert_equal(&after, &Tree::read_with(other.root(), AS_COPIED), "a copy");
}

#[test]
fn every_change_is_made_and_a_copy_is_equal_on_ext4() {
    every_change_is_made_and_a_copy_is_equal(Kind::Ext4);
}

#[test]
fn every_change_is_made_and_a_copy_is_equal_on_xfs() {
    every_change_is_made_and_a_copy_is_equal(Kind::Xfs);
}

#[test]
fn every_change_is_made_and_a_copy_is_equal_on_btrfs() {
    every_change_is_made_and_a_copy_is_equal(Kind::Btrfs);
}

/// What the planted differences are planted in.
fn garden(root: &Path) -> io::Result<()> {
    fs::create_dir_all(root.join("dir/sub"))?;
    fs::write(root.join("file"), vec![7; 200_000])?;
    fs::write(root.join("zeros"), vec![0; 100_000])?;
    fs::write(root.join("a"), "a")?;
    fs::hard_link(root.join("a"), root.join("dir/link"))?;
    fs::write(root.join("b"), "a")?;
    symlink("file", root.join("symlink"))?;
    sys::set_xattr(&root.join("file"), c"user.note", b"x")?;
    sys::set_xattr(&root.join("file"), c"trusted.hsm", b"not looked at")?;
    must(
        Command::new("mknod")
            .arg(root.join("dev"))
            .args(["c", "1", "3"]),
    );
    File::create(root.join("sparse"))?.set_len(1 << 20)?;
    must(Command::new("sync").arg("-f").arg(root));
    Ok(())
}

/// What is planted, and what the comparison says of it.
type Plant = (fn(&Path) -> io::Result<()>, &'static str);

const PLANTS: &[Plant] = &[
    (
        |d| fs::remove_file(d.join("file")),
        "file: file, is missing",
    ),
    (
        |d| fs::write(d.join("dir/more"), ""),
        "dir/more: file, should not be there",
    ),
    (
        |d| {
            let file = OpenOptions::new().write(true).open(d.join("file"))?;
            file.write_all_at(&[8], 150_000)
        },
        "file: bytes differ in 1 blocks of 64 KiB, the first at 131072",
    ),
    (
        |d| {
            OpenOptions::new()
                .append(true)
                .open(d.join("file"))?
                .write_all(b"7")
        },
        "file: size 200000 / 200001",
    ),
    (
        |d| {
            let file = OpenOptions::new().write(true).open(d.join("zeros"))?;
            file.set_len(0)?;
            file.set_len(100_000)
        },
        "zeros: data (not holes) at [0, 100000) of 1 / -",
    ),
    (
        |d| {
            OpenOptions::new()
                .write(true)
                .open(d.join("sparse"))?
                .write_all_at(&[0], 70_000)
        },
        "sparse: data (not holes) at - / [69632, 73728) of 1",
    ),
    (
        |d| fs::set_permissions(d.join("dir/sub"), fs::Permissions::from_mode(0o700)),
        "dir/sub: mode 0755 / 0700",
    ),
    (
        |d| fs::set_permissions(d, fs::Permissions::from_mode(0o777)),
        ".: mode 0755 / 0777",
    ),
    (
        |d| chown(d.join("dir"), Some(3), Some(4)),
        "dir: owner 0:0 / 3:4",
    ),
    (
        |d| {
            must(
                Command::new("touch")
                    .arg("-h")
                    .args(["-d", "@5.000000001"])
                    .arg(d.join("symlink")),
            );
            Ok(())
        },
        "symlink: mtime",
    ),
    (
        |d| {
            must(
                Command::new("touch")
                    .args(["-d", "@5.000000001"])
                    .arg(d.join("dir/sub")),
            );
            Ok(())
        },
        "/ 5.000000001",
    ),
    (
        |d| {
            fs::remove_file(d.join("symlink"))?;
            symlink("file2", d.join("symlink"))
        },
        "symlink: link target file / file2",
    ),
    (
        |d| {
            fs::remove_file(d.join("dev"))?;
            must(
                Command::new("mknod")
                    .arg(d.join("dev"))
                    .args(["c", "1", "5"]),
            );
            Ok(())
        },
        "dev: device number 0x103 / 0x105",
    ),
    (
        |d| {
            fs::remove_file(d.join("dev"))?;
            must(
                Command::new("mknod")
                    .arg(d.join("dev"))
                    .args(["b", "1", "3"]),
            );
            Ok(())
        },
        "dev: type character device / block device",
    ),
    (
        |d| {
            fs::remove_file(d.join("dir/link"))?;
            must(
                Command::new("cp")
                    .arg("-p")
                    .arg(d.join("a"))
                    .arg(d.join("dir/link")),
            );
            Ok(())
        },
        "dir/link: hard link of a / dir/link",
    ),
    (
        |d| {
            fs::remove_file(d.join("b"))?;
            fs::hard_link(d.join("a"), d.join("b"))
        },
        "b: hard link of b / a",
    ),
    (
        |d| sys::set_xattr(&d.join("file"), c"user.note", b"y"),
        "file: xattr user.note: 1 bytes \"x\" / 1 bytes \"y\"",
    ),
    (
        |d| sys::set_xattr(&d.join("symlink"), c"trusted.new", b""),
        "symlink: xattr trusted.new should not be there",
    ),
    (
        |d| sys::remove_xattr(&d.join("file"), c"user.note"),
        "file: xattr user.note is missing",
    ),
    (
        |d| sys::change_flags(&File::open(d.join("dir"))?, sys::NODUMP_FL, 0),
        "dir: chattr flags 0x0 / 0x40",
    ),
];

fn planted_differences_are_found(kind: Kind) {
    let fs = LoopFs::small(kind);
    for (number, (plant, expected)) in PLANTS.iter().enumerate() {
        let (one, other) = (
            fs.at(format!("one{number}")),
            fs.at(format!("other{number}")),
        );
        fs::create_dir(&one).expect("a directory");
        garden(&one).expect("a garden");
        copy(&one, &other);
        sys::set_xattr(&other.join("file"), c"trusted.hsm", b"another mark").expect("a mark");
        let found = compare(&one, &other);
        assert!(found.is_empty(), "before {expected:?}: {}", listing(&found));
        plant(&other).expect("planted");
        let found = compare(&one, &other);
        assert!(
            found.iter().any(|d| d.to_string().contains(expected)),
            "{expected:?} is not found on {kind}: {}",
            listing(&found)
        );
    }
}

#[test]
fn planted_differences_are_found_on_ext4() {
    planted_differences_are_found(Kind::Ext4);
}

#[test]
fn planted_differences_are_found_on_xfs() {
    planted_differences_are_found(Kind::Xfs);
}

#[test]
fn planted_differences_are_found_on_btrfs() {
    planted_differences_are_found(Kind::Btrfs);
}

#[test]
fn a_subtree_is_compared_on_its_own() {
    let fs = LoopFs::small(Kind::Ext4);
    garden(fs.root()).expect("a garden");
    let part = Tree::read(fs.root()).below("dir");
    assert_equal(&part, &Tree::read(&fs.at("dir")), "a subtree");
}

fn every_operation_of_the_workload_succeeds_and_a_copy_is_equal(kind: Kind) {
    let (one, other) = (
        LoopFs::new(kind, ROOMY_BYTES),
        LoopFs::new(kind, ROOMY_BYTES),
    );
    let counts = Workload::start(one.root(), seed(), 4, 4000).finish();
    say(format_args!("{counts:?}"));
    for (name, count) in counts {
        let impossible = name == "clone" && kind == Kind::Ext4
            || ["collapse_range", "insert_range"].contains(&name) && kind == Kind::Btrfs;
        assert!(count > 0 || impossible, "{name} never succeeds on {kind}");
    }
    let tree = Tree::read_with(one.root(), AS_COPIED);
    say(format_args!("{} names", tree.len()));
    assert!(tree.len() > 100);
    copy(one.root(), other.root());
    assert_equal(&tree, &Tree::read_with(other.root(), AS_COPIED), "a copy");
    assert_equal(
        &Tree::read(one.root()),
        &Tree::read(one.root()),
        "read twice",
    );
}

#[test]
fn every_operation_of_the_workload_succeeds_on_ext4() {
    every_operation_of_the_workload_succeeds_and_a_copy_is_equal(Kind::Ext4);
}

#[test]
fn every_operation_of_the_workload_succeeds_on_xfs() {
    every_operation_of_the_workload_succeeds_and_a_copy_is_equal(Kind::Xfs);
}

#[test]
fn every_operation_of_the_workload_succeeds_on_btrfs() {
    every_operation_of_the_workload_succeeds_and_a_copy_is_equal(Kind::Btrfs);
}
