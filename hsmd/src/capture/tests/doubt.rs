//! What cannot be examined is never taken for gone, is named, and does not stay open for ever.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use tierfs::FileId;
use tierfs::disk::sim::Rng;
use tierfs::record::{Op, Unlink};

use super::compare::assert_same;
use super::rig::Rig;
use crate::capture::hints::{Beside, EntryKey, Key, Look, Noted};
use crate::sys::handle::{Handle, handle_at, handle_of};
use crate::sys::testfs::{KINDS, TestFs, open_dir, run};

fn settled(fs: TestFs) -> (Rig, Rng) {
    let (mut rig, mut rng) = (Rig::new(fs), Rng(1));
    rig.watched_from(tierfs::Time::now().seconds - 60);
    rig.sweep();
    rig.settle(&mut rng);
    assert_same(&rig);
    (rig, rng)
}

fn handle(rig: &Rig, path: &str) -> Handle {
    let root = open_dir(rig.fs.root());
    handle_at(root.as_fd(), path).unwrap().unwrap()
}

fn entry(dir: Handle, name: &str) -> Noted {
    let name = name.as_bytes().to_vec();
    (
        Key::Entry(EntryKey { dir, name }),
        Look::Content,
        Beside::Nothing,
    )
}

fn inode(handle: Handle) -> Noted {
    (Key::Inode(handle), Look::Content, Beside::Nothing)
}

/// Nothing of what was logged since says that something is gone.
fn assert_nothing_gone(rig: &Rig, since: usize) {
    for ops in &rig.log[since..] {
        assert!(
            !ops.contains("Unlink(") && !ops.contains("Delete("),
            "{ops}"
        );
    }
}

fn tree(fs: &TestFs) {
    fs::create_dir_all(fs.at("dir/below")).unwrap();
    fs::write(fs.at("dir/file"), "content").unwrap();
    fs::write(fs.at("dir/below/file"), "deeper").unwrap();
    fs::hard_link(fs.at("dir/file"), fs.at("dir/below/link")).unwrap();
}

#[test]
fn a_directory_that_cannot_be_read_is_not_gone() {
    for change in ["clri dir", "clri dir/file", "clri dir/below"] {
        let fs = TestFs::new("ext4");
        tree(&fs);
        let (rig, mut rng) = settled(fs);
        let root = handle_of(rig.mount.root()).unwrap();
        let (dir, below) = (handle(&rig, "dir"), handle(&rig, "dir/below"));
        let (file, deeper) = (handle(&rig, "dir/file"), handle(&rig, "dir/below/file"));
        let mut rig = rig.restarted(|fs| {
            run(
                "debugfs",
                &["-w", "-R", change, fs.image().to_str().unwrap()],
            );
        });
        rig.in_trouble = true;
        rig.shared.note([
            entry(root.clone(), "dir"),
            entry(dir.clone(), "file"),
            entry(dir.clone(), "below"),
            entry(below.clone(), "file"),
            entry(below.clone(), "link"),
            inode(root),
            inode(dir),
            inode(below),
            inode(file),
            inode(deeper),
        ]);
        rig.rest(&mut rng);
        assert_nothing_gone(&rig, 0);
        let troubles = rig.troubles();
        assert!(
            troubles
                .iter()
                .any(|why| why.contains("cannot be examined")),
            "{change}: {troubles:?}"
        );
        assert!(rig.sweep().failed > 0, "{change}");
        rig.rest(&mut rng);
        assert_nothing_gone(&rig, 0);
    }
}

nix::ioctl_read!(shutdown, b'X', 125, u32);

/// As after an error that a filesystem cannot go on with, or with its disk taken away.
#[test]
#[allow(unsafe_code)] // FS_IOC_SHUTDOWN
fn a_filesystem_that_was_shut_down_is_not_empty() {
    for kind in ["ext4", "xfs"] {
        let fs = TestFs::new(kind);
        tree(&fs);
        let (rig, mut rng) = settled(fs);
        let root = handle_of(rig.mount.root()).unwrap();
        let (dir, below) = (handle(&rig, "dir"), handle(&rig, "dir/below"));
        let (file, deeper) = (handle(&rig, "dir/file"), handle(&rig, "dir/below/file"));
        // With nothing of it in memory.
        let mut rig = rig.restarted(|_| {});
        rig.in_trouble = true;
        let top = File::open(rig.fs.root()).unwrap();
        let mut how = 2;
        // SAFETY: FS_IOC_SHUTDOWN reads the number that it is given a pointer to.
        unsafe { shutdown(top.as_raw_fd(), &raw mut how) }.unwrap();
        drop(top);
        rig.shared.note([
            entry(root.clone(), "dir"),
            entry(dir.clone(), "file"),
            entry(dir.clone(), "below"),
            entry(below.clone(), "file"),
            entry(below.clone(), "link"),
            inode(root),
            inode(dir),
            inode(below),
            inode(file),
            inode(deeper),
        ]);
        rig.rest(&mut rng);
        assert_nothing_gone(&rig, 0);
        let _ = rig.try_sweep();
        rig.rest(&mut rng);
        assert_nothing_gone(&rig, 0);
    }
}

/// The hints of a tree that never comes to rest are given up, named, and the next sweep finds all of it.
#[test]
fn what_never_comes_to_rest_is_left_to_the_sweep() {
    let fs = TestFs::new("ext4");
    let (mut rig, mut rng) = settled(fs);
    let root = handle_of(rig.mount.root()).unwrap();
    let row = rig.catalog.queries().inode(FileId::ROOT).unwrap().unwrap();
    let bind = |handle: &Handle| {
        vec![crate::capture::facts::bind(
            FileId::ROOT,
            handle,
            row.ino.unwrap(),
        )]
    };
    // The log knows another root directory: whatever is found in this one has no place.
    let other = Handle::from_bytes(&[1, 0, 0, 0, 99, 0, 0, 0, 9, 9, 9, 9]).unwrap();
    rig.append(bind(&other));
    rig.crash();
    rig.in_trouble = true;
    fs::write(rig.fs.at("file"), "content").unwrap();
    rig.rest(&mut rng);
    let troubles = rig.troubles();
    assert!(
        troubles
            .iter()
            .any(|why| why.starts_with("unexamined") && why.contains("the entry")),
        "{troubles:?}"
    );
    rig.append(bind(&root));
    rig.crash();
    rig.sweep();
    rig.settle(&mut rng);
    assert_same(&rig);
}

/// Only the inode's own hint is left of what happened.
#[test]
fn a_file_whose_inode_is_gone_is_buried_with_all_its_names() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        tree(&fs);
        fs::create_dir(fs.at("empty")).unwrap();
        fs::create_dir_all(fs.at("full/of/dirs")).unwrap();
        let (mut rig, mut rng) = settled(fs);
        let hints =
            ["dir/file", "empty", "full", "dir/below/file"].map(|path| inode(handle(&rig, path)));
        fs::remove_file(rig.fs.at("dir/file")).unwrap();
        fs::remove_file(rig.fs.at("dir/below/link")).unwrap();
        // Its name is another's by now.
        fs::write(rig.fs.at("dir/below/link"), "another").unwrap();
        fs::remove_dir(rig.fs.at("empty")).unwrap();
        // What lay in it lives on.
        fs::rename(rig.fs.at("full/of"), rig.fs.at("of")).unwrap();
        fs::remove_dir(rig.fs.at("full")).unwrap();
        fs::remove_file(rig.fs.at("dir/below/file")).unwrap();
        rig.lose_events();
        rig.shared.note(hints);
        rig.rest(&mut rng);
        let queries = rig.catalog.queries();
        for gone in ["dir/file", "empty", "full", "dir/below/file"] {
            assert_eq!(
                queries.resolve(gone.as_bytes()).unwrap(),
                None,
                "{kind}: {gone}"
            );
        }
        for there in ["dir/below/link", "of/dirs"] {
            assert!(
                queries.resolve(there.as_bytes()).unwrap().is_some(),
                "{kind}: {there}"
            );
        }
        rig.settle(&mut rng);
        assert_same(&rig);
    }
}

/// A file that lost its last name while it was open, and then its inode, with nobody to tell.
#[test]
fn a_nameless_file_is_buried_by_the_sweep() {
    let fs = TestFs::new("xfs");
    tree(&fs);
    let (mut rig, mut rng) = settled(fs);
    let file = rig
        .catalog
        .queries()
        .resolve(b"dir/below/file")
        .unwrap()
        .unwrap();
    let below = rig
        .catalog
        .queries()
        .resolve(b"dir/below")
        .unwrap()
        .unwrap();
    rig.append(vec![Op::Unlink(Unlink {
        parent: below,
        name: b"file".to_vec(),
    })]);
    fs::remove_file(rig.fs.at("dir/below/file")).unwrap();
    rig.lose_events();
    rig.sweep();
    rig.settle(&mut rng);
    assert_eq!(rig.catalog.queries().inode(file).unwrap(), None);
    assert_same(&rig);
}

/// What stands in a snapshot for a subvolume: an empty directory whose handle is not its own.
#[test]
fn placeholders_of_subvolumes_come_and_go() {
    let fs = TestFs::new("btrfs");
    let at = |fs: &TestFs, path: &str| fs.at(path).to_str().unwrap().to_owned();
    let btrfs = |verb: &str, paths: &[&str]| {
        let mut all = vec!["subvolume", verb];
        all.extend(paths);
        run("btrfs", &all);
    };
    btrfs("create", &[&at(&fs, "one")]);
    for inner in ["one/inner", "one/second"] {
        btrfs("create", &[&at(&fs, inner)]);
        fs::write(fs.at(inner).join("file"), inner).unwrap();
    }
    let (mut rig, mut rng) = settled(fs);
    let fs_at = |rig: &Rig, path: &str| at(&rig.fs, path);
    btrfs("snapshot", &[&fs_at(&rig, "one"), &fs_at(&rig, "snap")]);
    rig.lose_events();
    rig.sweep();
    rig.settle(&mut rng);
    assert_same(&rig);
    let inner = rig
        .catalog
        .queries()
        .resolve(b"snap/inner")
        .unwrap()
        .unwrap();
    let row = rig.catalog.queries().inode(inner).unwrap().unwrap();
    assert_eq!(row.handle, None, "known by its name only");
    // One goes, another becomes a directory; told by events.
    fs::remove_dir(rig.fs.at("snap/inner")).unwrap();
    fs::remove_dir(rig.fs.at("snap/second")).unwrap();
    fs::create_dir(rig.fs.at("snap/second")).unwrap();
    fs::write(rig.fs.at("snap/second/file"), "of the snapshot").unwrap();
    rig.rest(&mut rng);
    assert_same(&rig);
    // A directory becomes one: the snapshot is made anew in its place, and no event says so.
    btrfs("delete", &[&fs_at(&rig, "snap")]);
    btrfs("snapshot", &[&fs_at(&rig, "one"), &fs_at(&rig, "snap")]);
    rig.lose_events();
    rig.sweep();
    rig.settle(&mut rng);
    assert_same(&rig);
    btrfs("delete", &[&fs_at(&rig, "snap")]);
    rig.lose_events();
    rig.sweep();
    rig.settle(&mut rng);
    assert_same(&rig);
}

/// A change of attributes is examined first, and the daemon is killed before it hears of a write that
/// came with it and left size and modification time as they were.
#[test]
fn a_write_behind_a_change_of_attributes_survives_a_crash() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        fs::write(fs.at("file"), "before").unwrap();
        let (mut rig, mut rng) = settled(fs);
        let file = File::options().write(true).open(rig.fs.at("file")).unwrap();
        let mtime = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(b"behind", 0).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o600))
            .unwrap();
        file.set_modified(mtime).unwrap();
        drop(file);
        let (key, _, beside) = inode(handle(&rig, "file"));
        rig.lose_events();
        rig.shared.note([(key, Look::Attributes, beside)]);
        rig.rest(&mut rng);
        rig.crash();
        rig.sweep();
        rig.settle(&mut rng);
        assert_same(&rig);
    }
}

/// Else every sweep would read all files whose attributes were changed once.
#[test]
fn a_change_of_attributes_alone_is_trusted_in_the_end() {
    let fs = TestFs::new("ext4");
    fs::write(fs.at("file"), "content").unwrap();
    let (mut rig, mut rng) = settled(fs);
    rig.confirm_at_once();
    fs::set_permissions(rig.fs.at("file"), fs::Permissions::from_mode(0o600)).unwrap();
    rig.rest(&mut rng);
    rig.rest(&mut rng);
    assert_eq!(rig.sweep().found, 0);
    let ctime = fs::metadata(rig.fs.at("file")).unwrap().ctime_nsec();
    let file = rig.catalog.queries().resolve(b"file").unwrap().unwrap();
    let row = rig.catalog.queries().inode(file).unwrap().unwrap();
    assert_eq!(row.ctime.map(|time| i64::from(time.nanos)), Some(ctime));
}

/// Of two moves that turn a directory and its parent around, only the second is told: it would close a
/// circle, so the place of the other one is looked at as well, and nothing waits for the sweep.
#[test]
fn a_circle_is_opened_by_the_move_that_nobody_told() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        fs::create_dir_all(fs.at("a/b/c")).unwrap();
        fs::write(fs.at("a/b/c/file"), "content").unwrap();
        let (mut rig, mut rng) = settled(fs);
        fs::rename(rig.fs.at("a/b"), rig.fs.at("b")).unwrap();
        fs::rename(rig.fs.at("a"), rig.fs.at("b/c/a")).unwrap();
        rig.lose_events();
        let above = handle(&rig, "b/c");
        rig.shared.note([entry(above, "a")]);
        // Fails where the hint is given up.
        rig.rest(&mut rng);
        assert_same(&rig);
    }
}
