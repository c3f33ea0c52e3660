//! The daemon's private view, and what identifies a filesystem.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;

use crate::sys::dir::DirReader;
use crate::sys::io::{READ, open_at};
use crate::sys::mount::{PrivateMount, fs_uuid, mount_of, mounts};
use crate::sys::stat::{stat_at, stat_of};
use crate::sys::superblock;
use crate::sys::testfs::{KINDS, TestFs, run};

fn uuid_text(uuid: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(uuid))
}

#[test]
fn the_uuid_is_that_of_blkid_both_ways() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        let wanted = run("blkid", &["-p", "-s", "UUID", "-o", "value", &fs.device()]);
        let wanted = wanted.trim().replace('-', "");
        let root = File::open(fs.root()).unwrap();
        let uuid = fs_uuid(&fs.mount(), root.as_fd()).unwrap();
        assert_eq!(uuid_text(uuid), wanted, "{kind}");
        let block = superblock::read(Path::new(&fs.device())).unwrap().unwrap();
        assert_eq!(uuid_text(block.uuid), wanted, "{kind}");
        assert_eq!(block.ext4_inode_bytes, (kind == "ext4").then_some(256));
        assert_eq!(fs.mount().device().unwrap(), Path::new(&fs.device()));
        assert_eq!(fs.mount().fs_type, kind);
        assert!(!fs.mount().read_only());
    }
    let old = TestFs::with_options("ext4", &["-I", "128"]);
    let block = superblock::read(&old.image()).unwrap().unwrap();
    assert_eq!(block.ext4_inode_bytes, Some(128));
    assert_eq!(superblock::read(Path::new("/dev/null")).unwrap(), None);
}

#[test]
fn the_private_mount_sees_under_other_mounts_and_keeps_atime() {
    for kind in KINDS {
        let mut fs = TestFs::new(kind);
        fs::create_dir(fs.at("covered")).unwrap();
        fs::write(fs.at("covered/hidden"), "here").unwrap();
        run(
            "touch",
            &[
                "-a",
                "-d",
                "2001-01-01",
                fs.at("covered/hidden").to_str().unwrap(),
            ],
        );
        let covered = fs.at("covered");
        fs.mount_also(&["-t", "tmpfs", "none"], &covered);
        assert!(!fs.at("covered/hidden").exists());
        let private = fs.private();
        let dir = open_at(private.root(), "covered", libc::O_RDONLY)
            .unwrap()
            .unwrap();
        let hidden = open_at(dir.as_fd(), "hidden", READ).unwrap().unwrap();
        let before = stat_of(hidden.as_fd()).unwrap();
        let mut file = File::from(
            open_at(dir.as_fd(), "hidden", libc::O_RDONLY)
                .unwrap()
                .unwrap(),
        );
        std::io::copy(&mut file, &mut std::io::sink()).unwrap();
        assert_eq!(
            stat_of(hidden.as_fd()).unwrap().atime,
            before.atime,
            "{kind}"
        );
        // Nobody else sees it.
        let seen = mounts().unwrap();
        assert_eq!(
            seen.iter().filter(|m| m.dev == fs.mount().dev).count(),
            1,
            "{kind}"
        );
        assert!(stat_at(private.tree(), "covered").unwrap().is_some());
    }
}

#[test]
fn btrfs_is_seen_whole_through_a_subvolume() {
    let mut fs = TestFs::new("btrfs");
    let sub = fs.at("sub");
    run("btrfs", &["subvolume", "create", sub.to_str().unwrap()]);
    fs::write(sub.join("inside"), "x").unwrap();
    fs::write(fs.at("outside"), "x").unwrap();
    let device = fs.device();
    let at = fs.outside().join("submount");
    fs.mount_also(&["-o", "subvol=sub", &device], &at);
    let mount = mount_of(&at).unwrap();
    assert_eq!(mount.root, Path::new("/sub"));
    let private = PrivateMount::open(&mount).unwrap();
    assert!(stat_at(private.root(), "outside").unwrap().is_some());
    assert!(stat_at(private.root(), "sub/inside").unwrap().is_some());
    assert_eq!(
        fs_uuid(&mount, private.root()).unwrap(),
        fs_uuid(&fs.mount(), File::open(fs.root()).unwrap().as_fd()).unwrap()
    );
}

#[test]
fn read_only_filesystems_have_a_private_mount_too() {
    for kind in KINDS {
        let fs = TestFs::new(kind);
        fs::write(fs.at("file"), "x").unwrap();
        run("mount", &["-o", "remount,ro", fs.root().to_str().unwrap()]);
        assert!(fs.mount().read_only());
        let private = fs.private();
        let mut names = 0;
        let count = |_: crate::sys::dir::Entry<'_>| {
            names += 1;
            Ok::<_, crate::sys::Error>(())
        };
        DirReader::new().for_each(private.root(), count).unwrap();
        assert!(names >= 1, "{kind}");
    }
}

#[test]
fn a_part_of_a_filesystem_is_refused() {
    let mut fs = TestFs::new("xfs");
    fs::create_dir(fs.at("part")).unwrap();
    let (part, at) = (fs.at("part"), fs.outside().join("bind"));
    fs.mount_also(&["--bind", part.to_str().unwrap()], &at);
    let message = PrivateMount::open(&mount_of(&at).unwrap())
        .unwrap_err()
        .to_string();
    assert!(message.contains("only the directory /part"), "{message}");
    assert!(mount_of(&fs.at("absent")).is_err());
}
