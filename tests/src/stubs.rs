//! Release and recall as tests ask for them: what is on the disk of a file, and why it is not released.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::loopfs::Kind;
use crate::program::Ran;
use crate::sys;
use crate::system::System;

/// A program that waits longer hangs.
const LIMIT: Duration = Duration::from_mins(1);

/// Blocks of the disk that a file has, but for those of its attributes.
pub fn kib_on_disk(path: &Path) -> u64 {
    fs::symlink_metadata(path).expect("the file").blocks() / 2
}

/// Whether a file has the stub mark. Opens nothing.
pub fn is_marked(path: &Path) -> bool {
    let all = sys::xattrs(path).expect("its attributes");
    all.iter().any(|(name, _)| name == b"trusted.hsm")
}

/// Only stubs are asked about: what is not on the list reads as it lies on the disk. On btrfs every file is
/// asked about, always.
pub fn wait_for_marks(system: &System) {
    if system.fs().kind() != Kind::Btrfs {
        system.wait_for("only stubs are asked about", |status| {
            status["released"]["every_file"] == false
        });
    }
}

fn ask(system: &System, verb: &str, path: &Path) -> Ran {
    system.tierctl(&[verb, path.to_str().expect("ASCII")])
}

/// Releases a file, which must work.
pub fn release(system: &System, path: &Path) {
    let ran = ask(system, "release", path);
    assert_eq!(ran.code, 0, "{ran}");
    assert!(ran.stdout.starts_with("1 file released"), "{ran}");
    let kib = kib_on_disk(path);
    assert!(kib <= 4, "{}: {kib} KiB on disk", path.display());
    assert!(is_marked(path), "{} has no mark", path.display());
}

/// Tries to release a file, which must be refused with these words, and stays what it is.
pub fn refused(system: &System, path: &Path, why: &str) {
    let ran = ask(system, "release", path);
    assert_eq!(ran.code, 1, "should be refused ({why}): {ran}");
    assert!(ran.text().contains(why), "should say {why:?}: {ran}");
    assert!(!is_marked(path), "{} has a mark", path.display());
}

/// Releases a file as soon as nothing speaks against it any more.
pub fn release_soon(system: &System, path: &Path) {
    let end = Instant::now() + LIMIT;
    loop {
        let ran = ask(system, "release", path);
        if ran.code == 0 && is_marked(path) {
            return;
        }
        assert!(Instant::now() < end, "it is never released: {ran}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// What programs get that waited for a guard which is gone, or came while there is none that can have an answer.
pub const LATER: [i32; 2] = [libc::EAGAIN, libc::EBUSY];

/// Whether a program that failed so may try again.
pub fn is_for_later(error: &std::io::Error) -> bool {
    error
        .raw_os_error()
        .is_some_and(|errno| LATER.contains(&errno))
}

/// The bytes of a file. Who came while the guard was changed tries again.
pub fn read_patiently(path: &Path) -> Vec<u8> {
    let end = Instant::now() + LIMIT;
    loop {
        match fs::read(path) {
            Ok(bytes) => return bytes,
            Err(error) if is_for_later(&error) && Instant::now() < end => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
}

/// Asserts that a file reads as it should, without showing megabytes where it does not.
pub fn assert_reads(path: &Path, expected: &[u8], context: &str) {
    let found = read_patiently(path);
    if found == expected {
        return;
    }
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    let zeros = if found.iter().all(|byte| *byte == 0) {
        ", all of them zeros"
    } else {
        ""
    };
    panic!(
        "{context}: {}: {} bytes for {}, the first other one at {differs:?}{zeros}",
        path.display(),
        found.len(),
        expected.len()
    );
}

/// Waits until a file has no mark.
pub fn wait_whole(path: &Path) {
    let end = Instant::now() + LIMIT;
    while is_marked(path) {
        assert!(Instant::now() < end, "{} keeps its mark", path.display());
        thread::sleep(Duration::from_millis(20));
    }
}
