//! Handles, stat, and directories.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, symlink};

use crate::sys::Error;
use crate::sys::dir::DirReader;
use crate::sys::handle::{Handle, Opened, handle_at, handle_of, open_by_handle};
use crate::sys::io::{HOLD, READ, READ_DIR, open_at, read_exact_at, read_link, read_link_at};
use crate::sys::stat::{FileKind, stat_at, stat_of};
use crate::sys::testfs::{KINDS, TestFs, open_dir, run};

fn expect_open(opened: Opened) -> std::os::fd::OwnedFd {
    match opened {
        Opened::Fd(fd) => fd,
        Opened::Stale => panic!("stale"),
    }
}

#[test]
fn handles_survive_renames_and_remounts_and_go_stale() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        fs::write(fs.at("file"), "content").unwrap();
        symlink("tar\u{e9}get", fs.at("link")).unwrap();
        let root = open_dir(fs.root());
        let handle = handle_at(root.as_fd(), "file").unwrap().unwrap();
        let link = handle_at(root.as_fd(), "link").unwrap().unwrap();
        assert_ne!(handle, link);
        assert_eq!(
            handle_of(File::open(fs.at("file")).unwrap().as_fd()).unwrap(),
            handle
        );
        assert!(handle_at(root.as_fd(), "absent").unwrap().is_none());
        assert!(handle_at(root.as_fd(), "file/below").unwrap().is_none());
        assert_eq!(handle.as_ref().btrfs_root(), (kind == "btrfs").then_some(5));
        fs::rename(fs.at("file"), fs.at("renamed")).unwrap();
        drop(root);
        fs.remount();
        let handle = Handle::from_bytes(&handle.to_bytes()).unwrap();
        {
            let private = fs.private();
            let fd = expect_open(open_by_handle(private.root(), handle.as_ref(), READ).unwrap());
            let mut content = [0; 7];
            read_exact_at(fd.as_fd(), &mut content, 0).unwrap();
            assert_eq!(&content, b"content");
            assert!(read_exact_at(fd.as_fd(), &mut content, 1).is_err());
            let held = expect_open(open_by_handle(private.root(), link.as_ref(), HOLD).unwrap());
            assert_eq!(read_link(held.as_fd()).unwrap().unwrap(), "tar\u{e9}get");
            assert_eq!(stat_of(held.as_fd()).unwrap().kind, FileKind::Symlink);
            assert_eq!(handle_of(held.as_fd()).unwrap(), link);
            drop(fd);
            fs::remove_file(fs.at("renamed")).unwrap();
            let gone = open_by_handle(private.root(), handle.as_ref(), READ).unwrap();
            assert!(matches!(gone, Opened::Stale), "{kind}");
            // The inode may be used again; the handle must not open the new file.
            for i in 0..20 {
                fs::write(fs.at(format!("new{i}")), "other").unwrap();
            }
            let gone = open_by_handle(private.root(), handle.as_ref(), READ).unwrap();
            assert!(matches!(gone, Opened::Stale), "{kind}");
        }
    }
}

/// What mke2fs makes has no generation, and ext4 lets such a handle open whatever has the number now.
#[test]
fn a_handle_without_a_generation_opens_nothing_else() {
    let fs = TestFs::new("ext4");
    let root = open_dir(fs.root());
    let handle = handle_at(root.as_fd(), "lost+found").unwrap().unwrap();
    let private = fs.private();
    let open = || open_by_handle(private.root(), handle.as_ref(), HOLD).unwrap();
    drop(expect_open(open()));
    fs::remove_dir(fs.at("lost+found")).unwrap();
    assert!(matches!(open(), Opened::Stale));
    let mut reused = false;
    for i in 0..50 {
        let path = fs.at(format!("new{i}"));
        fs::write(&path, "not a directory").unwrap();
        reused |= fs::metadata(&path).unwrap().ino() == 11;
        assert!(matches!(open(), Opened::Stale), "{i}");
        let as_directory = open_by_handle(private.root(), handle.as_ref(), READ_DIR);
        assert!(matches!(as_directory.unwrap(), Opened::Stale), "{i}");
    }
    assert!(reused, "the inode number was not used again");
}

#[test]
fn stored_handles_are_checked() {
    for bad in [&b""[..], b"abc", b"abcd", &[0; 133]] {
        let error = Handle::from_bytes(bad).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }));
    }
    let long = Handle::from_bytes(&[9; 132]).unwrap();
    assert_eq!(long.bytes().len(), 128);
    let set: HashSet<_> = [long.clone(), Handle::from_bytes(&long.to_bytes()).unwrap()].into();
    assert_eq!(set.len(), 1);
    assert!(size_of::<Handle>() <= 40);
}

#[test]
fn stat_says_what_std_says() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        let root = open_dir(fs.root());
        fs::write(fs.at("file"), vec![1; 10_000]).unwrap();
        fs::hard_link(fs.at("file"), fs.at("second")).unwrap();
        symlink("file", fs.at("link")).unwrap();
        run("mkfifo", &[fs.at("fifo").to_str().unwrap()]);
        run(
            "mknod",
            &[fs.at("dev").to_str().unwrap(), "c", "5", "70000"],
        );
        run("chmod", &["4751", fs.at("file").to_str().unwrap()]);
        run(
            "touch",
            &[
                "-m",
                "-d",
                "1901-02-03 04:05:06.123456789Z",
                fs.at("second").to_str().unwrap(),
            ],
        );
        for (name, wanted) in [
            ("file", FileKind::Regular),
            ("link", FileKind::Symlink),
            ("fifo", FileKind::Fifo),
            ("dev", FileKind::CharDevice),
            (".", FileKind::Directory),
        ] {
            let stat = stat_at(root.as_fd(), name).unwrap().unwrap();
            let std = fs::symlink_metadata(fs.at(name)).unwrap();
            assert_eq!(stat.kind, wanted);
            assert_eq!(stat.mode, std.mode() & 0o7777, "{kind} {name}");
            assert_eq!((stat.uid, stat.gid), (std.uid(), std.gid()));
            assert_eq!(
                (u64::from(stat.nlink), stat.size),
                (std.nlink(), std.size())
            );
            assert_eq!((stat.ino, stat.blocks), (std.ino(), std.blocks()));
            let nanos = |value: u32| i64::from(value);
            assert_eq!(
                (stat.mtime.0, nanos(stat.mtime.1)),
                (std.mtime(), std.mtime_nsec())
            );
            assert_eq!(
                (stat.ctime.0, nanos(stat.ctime.1)),
                (std.ctime(), std.ctime_nsec())
            );
            assert_eq!(
                (stat.atime.0, nanos(stat.atime.1)),
                (std.atime(), std.atime_nsec())
            );
            assert!(stat.btime.is_some() && stat.mount_id.is_some(), "{kind}");
        }
        let dev = stat_at(root.as_fd(), "dev").unwrap().unwrap();
        assert_eq!(dev.rdev, (5, 70000));
        assert!(stat_at(root.as_fd(), "absent").unwrap().is_none());
        run("chattr", &["+i", fs.at("file").to_str().unwrap()]);
        let stat = stat_at(root.as_fd(), "file").unwrap().unwrap();
        assert!(stat.attributes.immutable() && !stat.attributes.encrypted());
        run("chattr", &["-i", fs.at("file").to_str().unwrap()]);
        assert!(stat_of(root.as_fd()).unwrap().attributes.mount_root());
    }
}

#[test]
fn directories_are_read_whole() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        let mut wanted = BTreeSet::new();
        for i in 0..3000 {
            let mut name = format!("{i:04}-").into_bytes();
            name.extend(std::iter::repeat_n(b'\xe4', i % 251));
            File::create(fs.at(OsStr::from_bytes(&name))).unwrap();
            wanted.insert(name);
        }
        fs::create_dir(fs.at("sub")).unwrap();
        wanted.insert(b"sub".to_vec());
        let root = open_dir(fs.root());
        let mut reader = DirReader::new();
        for _ in 0..2 {
            let mut found = BTreeSet::new();
            reader
                .for_each(root.as_fd(), |entry| {
                    let stat = stat_at(root.as_fd(), entry.name)?.unwrap();
                    assert_eq!(stat.ino, entry.ino);
                    assert_eq!(Some(stat.kind), entry.kind);
                    assert!(found.insert(entry.name.as_bytes().to_vec()));
                    Ok::<_, Error>(())
                })
                .unwrap();
            found.remove(&b"lost+found"[..]);
            assert_eq!(found, wanted, "{kind}");
        }
        let sub = open_at(root.as_fd(), "sub", READ_DIR).unwrap().unwrap();
        fs::remove_dir(fs.at("sub")).unwrap();
        assert!(
            reader.read(sub.as_fd()).unwrap().is_none(),
            "a removed one is empty"
        );
        let file = File::open(fs.at("0000-")).unwrap();
        let message = reader.read(file.as_fd()).err().unwrap().to_string();
        assert!(message.contains("0000-"), "{message}");
    }
}

#[test]
fn opening_by_name_follows_nothing_and_waits_for_nothing() {
    let fs = TestFs::new("ext4");
    let root = open_dir(fs.root());
    symlink("/etc/passwd", fs.at("link")).unwrap();
    run("mkfifo", &[fs.at("fifo").to_str().unwrap()]);
    assert!(open_at(root.as_fd(), "link", READ).unwrap().is_none());
    assert!(open_at(root.as_fd(), "absent", READ).unwrap().is_none());
    assert!(open_at(root.as_fd(), "fifo", READ_DIR).unwrap().is_none());
    assert!(
        open_at(root.as_fd(), "fifo", READ).unwrap().is_some(),
        "without a writer"
    );
    assert_eq!(
        read_link_at(root.as_fd(), "link").unwrap().unwrap(),
        "/etc/passwd"
    );
    assert!(read_link_at(root.as_fd(), "fifo").unwrap().is_none());
}

/// What btrfs does in corners; the examination relies on it.
#[test]
fn btrfs_subvolumes_have_handles_of_their_own() {
    let fs = TestFs::new("btrfs");
    let text = |name: &str| fs.at(name).to_str().unwrap().to_owned();
    run("btrfs", &["subvolume", "create", &text("sub")]);
    run("btrfs", &["subvolume", "create", &text("sub/inner")]);
    fs::write(fs.at("sub/file"), "x").unwrap();
    run(
        "btrfs",
        &["subvolume", "snapshot", &text("sub"), &text("snap")],
    );
    let private = fs.private();
    let root = private.root();
    let of = |dir: &str, name: &str| {
        let dir = open_at(root, dir, READ_DIR).unwrap().unwrap();
        handle_at(dir.as_fd(), name).unwrap().unwrap()
    };
    let (original, copy) = (of("sub", "file"), of("snap", "file"));
    assert_ne!(original, copy);
    assert_ne!(original.as_ref().btrfs_root(), copy.as_ref().btrfs_root());
    for (handle, kind) in [
        (of(".", "snap"), FileKind::Directory),
        (copy, FileKind::Regular),
    ] {
        let fd = expect_open(open_by_handle(root, handle.as_ref(), HOLD).unwrap());
        assert_eq!(stat_of(fd.as_fd()).unwrap().kind, kind);
        assert_eq!(handle_of(fd.as_fd()).unwrap(), handle);
    }
    // A nested subvolume leaves a placeholder in the snapshot: an empty directory.
    let inner = of("snap", "inner");
    assert!(inner.as_ref().is_btrfs_placeholder());
    assert!(!of("sub", "inner").as_ref().is_btrfs_placeholder());
    let opened = open_by_handle(root, inner.as_ref(), HOLD).unwrap();
    assert!(matches!(opened, Opened::Stale), "though it is there");
}
