//! Permission events of real filesystems: who is asked, who waits, and what ends that.

#![allow(unsafe_code)] // FS_IOC_SHUTDOWN

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use fanotify::low_level::{FAN_MARK_ADD, FAN_MARK_FILESYSTEM, FAN_MODIFY, fanotify_mark};

use crate::sys::permission::{Access, Answer, Asked, Attempt, BUFFER_BYTES, PermissionGroup};
use crate::sys::space;
use crate::sys::testfs::{KINDS, TestFs, open_dir, run};

/// What has not happened by then never does.
const LIMIT: Duration = Duration::from_secs(30);
/// What is not to happen has not by then.
const WHILE: Duration = Duration::from_millis(200);
const OPENING: Asked = Asked { pre_access: false };
/// Events that a group without a limit must hold more than.
const QUEUED_MAX: &str = "/proc/sys/fs/fanotify/max_queued_events";

/// A filesystem with a file, every access to which is asked about.
fn asked(kind: &'static str) -> (TestFs, PermissionGroup, PathBuf) {
    let fs = TestFs::new(kind);
    let path = fs.at("file");
    fs::write(&path, "content").unwrap();
    let group = PermissionGroup::new().unwrap();
    let root = open_dir(fs.root());
    group.mark_filesystem(root.as_fd(), OPENING).unwrap();
    (fs, group, path)
}

fn opener(path: &Path) -> JoinHandle<io::Result<File>> {
    let path = path.to_owned();
    thread::spawn(move || File::open(path))
}

/// The next access.
fn next(group: &PermissionGroup) -> Access {
    let mut buf = [0; BUFFER_BYTES];
    let end = Instant::now() + LIMIT;
    loop {
        let mut accesses = group.read(&mut buf).unwrap();
        assert!(accesses.len() <= 1, "{accesses:?}");
        if let Some(access) = accesses.pop() {
            return access;
        }
        assert!(Instant::now() < end, "nobody asks");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Ends without being asked about.
fn passes(group: &PermissionGroup, opener: JoinHandle<io::Result<File>>) -> io::Result<File> {
    let mut buf = [0; BUFFER_BYTES];
    let end = Instant::now() + LIMIT;
    while !opener.is_finished() {
        assert!(
            group.read(&mut buf).unwrap().is_empty(),
            "it is asked about"
        );
        assert!(Instant::now() < end, "it waits");
        thread::sleep(Duration::from_millis(1));
    }
    opener.join().unwrap()
}

/// The group's lines about an inode, as the kernel tells them.
fn marks(group: &PermissionGroup) -> Vec<String> {
    let info = format!("/proc/self/fdinfo/{}", group.as_fd().as_raw_fd());
    let info = fs::read_to_string(info).unwrap();
    let inodes = info.lines().filter(|line| line.contains("fanotify ino:"));
    inodes.map(str::to_owned).collect()
}

/// More events than a limited queue takes: with such a one the next opener would just go on.
#[test]
fn a_long_queue_lets_nobody_pass() {
    let fs = TestFs::new("ext4");
    let path = fs.at("file");
    fs::write(&path, "content").unwrap();
    let group = PermissionGroup::new().unwrap();
    let most: usize = fs::read_to_string(QUEUED_MAX)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let root = open_dir(fs.root());
    // What only tells of changes fills the queue just as well, and nobody waits for it.
    let told = FAN_MARK_ADD | FAN_MARK_FILESYSTEM;
    fanotify_mark(
        group.as_fd().as_raw_fd(),
        told,
        FAN_MODIFY,
        root.as_fd().as_raw_fd(),
        ".",
    )
    .unwrap();
    fs::create_dir(fs.at("many")).unwrap();
    for number in 0..most + 10 {
        let file = File::create(fs.at(format!("many/{number}"))).unwrap();
        file.write_all_at(b"x", 0).unwrap();
    }
    let file = File::open(&path).unwrap();
    group.mark_inode(file.as_fd(), OPENING).unwrap();
    let opener = opener(&path);
    thread::sleep(WHILE);
    assert!(!opener.is_finished(), "it was not asked about");
    let mut buf = [0; BUFFER_BYTES];
    let (mut seen, mut asked) = (0, 0);
    while asked == 0 {
        let accesses = group.read(&mut buf).unwrap();
        assert!(!accesses.is_empty(), "only {seen} events");
        for access in accesses {
            seen += 1;
            if access.attempt == Attempt::Open {
                asked += 1;
                group.answer(access, Answer::Allow).unwrap();
            }
        }
    }
    assert!(seen > most, "{seen} events do not fill a queue of {most}");
    opener.join().unwrap().unwrap();
}

/// Whatever errno recall gives, the opener fails at once: an answer that the kernel does not take would
/// leave him waiting.
#[test]
fn every_errno_is_an_answer() {
    let (_fs, group, path) = asked("ext4");
    for errno in -1..=140 {
        let opener = opener(&path);
        let access = next(&group);
        group.answer(access, Answer::Deny(errno)).unwrap();
        let end = Instant::now() + LIMIT;
        while !opener.is_finished() {
            assert!(
                Instant::now() < end,
                "errno {errno} leaves the opener waiting"
            );
            thread::sleep(Duration::from_micros(100));
        }
        let found = opener.join().unwrap().unwrap_err().raw_os_error();
        let taken = [
            libc::EPERM,
            libc::EIO,
            libc::EAGAIN,
            libc::EBUSY,
            libc::ETXTBSY,
            libc::ENOSPC,
            libc::EDQUOT,
        ];
        let wanted = if taken.contains(&errno) {
            errno
        } else {
            libc::EIO
        };
        assert_eq!(found, Some(wanted), "errno {errno}");
    }
}

nix::ioctl_read!(shutdown, b'X', 125, u32);

/// A single access that the kernel cannot tell of (it opens the file for us, and the disk is gone) is no
/// failure of the group: the next one is told of.
#[test]
fn an_access_that_cannot_be_told_of_is_the_only_one() {
    let (broken, group, gone) = asked("xfs");
    let other = TestFs::new("ext4");
    fs::write(other.at("file"), "content").unwrap();
    let root = open_dir(other.root());
    group.mark_filesystem(root.as_fd(), OPENING).unwrap();
    let top = File::open(broken.root()).unwrap();
    let lost = opener(&gone);
    thread::sleep(WHILE);
    let mut how = 2;
    // SAFETY: FS_IOC_SHUTDOWN reads the number that it is given a pointer to.
    unsafe { shutdown(top.as_raw_fd(), &raw mut how) }.unwrap();
    let waiting = opener(&other.at("file"));
    thread::sleep(WHILE);
    let access = next(&group);
    group.answer(access, Answer::Allow).unwrap();
    waiting.join().unwrap().unwrap();
    assert!(lost.join().unwrap().is_err(), "it was let go on");
}

/// By a mount or a snapshot that cannot be written to people read all the same: the descriptor that the kernel
/// makes for us is for reading.
#[test]
fn what_cannot_be_written_to_is_told_of() {
    for kind in KINDS {
        let (mut fs, group, _) = asked(kind);
        let at = fs.outside().join("bind");
        let root = fs.root().to_owned();
        fs.mount_also(&["--bind", root.to_str().unwrap()], &at);
        run("mount", &["-o", "remount,ro,bind", at.to_str().unwrap()]);
        let mut paths = vec![at.join("file")];
        if kind == "btrfs" {
            let (from, to) = (root.to_str().unwrap(), root.join("frozen"));
            let snapshot = ["subvolume", "snapshot", "-r", from, to.to_str().unwrap()];
            run("btrfs", &snapshot);
            paths.push(to.join("file"));
        }
        for path in paths {
            let opener = opener(&path);
            let access = next(&group);
            let written = File::from(access.fd.try_clone().unwrap()).write_at(b"x", 0);
            assert!(written.is_err(), "{kind}: it can be written to");
            group.answer(access, Answer::Allow).unwrap();
            let file = opener.join().unwrap().unwrap();
            let mut found = [0; 7];
            file.read_exact_at(&mut found, 0).unwrap();
            assert_eq!(&found, b"content", "{kind}");
        }
    }
}

/// An ignored file stays so whatever is done to it, also where somebody has it open for writing: so it is
/// taken back before a file is released, or it would be zeros for ever.
#[test]
fn what_is_ignored_stays_so_until_it_is_taken_back() {
    for kind in KINDS {
        let (_fs, group, path) = asked(kind);
        let writing = {
            let path = path.clone();
            let opener =
                thread::spawn(move || OpenOptions::new().write(true).read(true).open(path));
            let access = next(&group);
            group.ignore_inode(access.fd.as_fd(), OPENING).unwrap();
            group.answer(access, Answer::Allow).unwrap();
            opener.join().unwrap().unwrap()
        };
        group.ignore_inode(writing.as_fd(), OPENING).unwrap();
        assert_eq!(marks(&group).len(), 1, "{kind}: {:?}", marks(&group));
        drop(passes(&group, opener(&path)).unwrap());
        writing.write_all_at(b"changed", 0).unwrap();
        drop(passes(&group, opener(&path)).unwrap());
        space::punch_all(writing.as_fd(), 7).unwrap();
        drop(passes(&group, opener(&path)).unwrap());
        group.unignore_inode(writing.as_fd(), OPENING).unwrap();
        // Once more is fine.
        group.unignore_inode(writing.as_fd(), OPENING).unwrap();
        assert_eq!(marks(&group), Vec::<String>::new(), "{kind}");
        let opener = opener(&path);
        let access = next(&group);
        group.answer(access, Answer::Deny(libc::EIO)).unwrap();
        assert!(opener.join().unwrap().is_err(), "{kind}");
    }
}

/// Who was told of to a process that is gone hears EBUSY from the next one, before that reads anything: its
/// numbers are the same.
#[test]
fn what_a_dead_process_read_is_answered_before_the_next_one_reads() {
    let (_fs, group, path) = asked("ext4");
    let read = opener(&path);
    // Its descriptor goes with the process; the answer is owed still.
    drop(next(&group));
    let next_one = PermissionGroup::from_fd(group.as_fd().try_clone_to_owned().unwrap());
    let unread = opener(&path);
    thread::sleep(WHILE);
    assert!(!read.is_finished() && !unread.is_finished());
    assert_eq!(next_one.sweep(), 1);
    let error = read.join().unwrap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    let access = next(&next_one);
    next_one.answer(access, Answer::Allow).unwrap();
    unread.join().unwrap().unwrap();
}
