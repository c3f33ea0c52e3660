//! The program under test, volumes for it, and damage.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use tierfs::ids::{FileId, SegmentNo, Time};
use tierfs::record::{Bits, Inode, Kind, Link, Op};

use super::adopt::adopt;
use super::log::{self, LogWriter, volume};
use super::tree::RandomTree;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_replay");

pub struct Bench {
    pub dir: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("replay-test-")
            .tempdir()
            .unwrap();
        Self { dir }
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A volume with a random tree, which is kept in `source`.
    pub fn volume_of_a_tree(&self, seed: u64, segment_bytes: u64) -> PathBuf {
        std::fs::create_dir(self.at("source")).unwrap();
        let mut tree = RandomTree::new(seed);
        tree.flags = "dSAia";
        tree.fill(&self.at("source"), 150);
        let mut log = LogWriter::new(&self.at("segments"));
        log.segment_bytes = segment_bytes;
        adopt(&mut log, &self.at("source"));
        log.seal();
        volume(&self.at("segments"), &self.at("vol1"), log.log_id);
        self.at("vol1")
    }

    pub fn copy_volume(&self, name: &str) -> PathBuf {
        volume(&self.at("segments"), &self.at(name), log::LOG);
        self.at(name)
    }
}

/// Objects of volumes are immutable, and so are files of some trees.
impl Drop for Bench {
    fn drop(&mut self) {
        let mut chattr = Command::new("chattr");
        let _ = chattr
            .args(["-R", "-f", "-i", "-a"])
            .arg(self.dir.path())
            .output();
    }
}

pub fn run(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let mut command = Command::new(PROGRAM);
    for argument in arguments {
        command.arg(argument);
    }
    command.output().unwrap()
}

pub fn status(output: &Output, expected: i32) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(expected), "{text}");
    text
}

pub fn json(output: &Output, expected: i32) -> Value {
    status(output, expected);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The file of a segment on a volume, made writable.
pub fn writable(volume: &Path, segment: u64) -> PathBuf {
    let path = volume.join(SegmentNo::new(segment).unwrap().object_name());
    let _ = Command::new("chattr").arg("-i").arg(&path).status();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    path
}

/// Flips bytes in the bodies of `frames` (numbers in the index) of a segment.
pub fn damage(
    volume: &Path,
    segment: u64,
    wanted: impl Fn(usize, &tierfs::segment::FrameEntry) -> bool,
) -> usize {
    let path = writable(volume, segment);
    let mut bytes = std::fs::read(&path).unwrap();
    let opened = tierfs::segment::Segment::open(std::sync::Arc::new(bytes.clone()), "x").unwrap();
    let mut count = 0;
    for (number, frame) in opened.index.frames.iter().enumerate() {
        if wanted(number, frame) {
            let at = usize::try_from(frame.end()).unwrap() - 5;
            bytes[at] ^= 0x10;
            count += 1;
        }
    }
    std::fs::write(&path, bytes).unwrap();
    count
}

pub fn is_data(frame: &tierfs::segment::FrameEntry) -> bool {
    frame.kind == tierfs::frame::FrameKind::Data
}

pub fn plain(kind: Kind, file: FileId) -> Inode {
    Inode {
        file,
        kind,
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: Time {
            seconds: 1_700_000_000,
            nanos: 123_456_789,
        },
        rdev: None,
        target: None,
        flags: Bits(0),
        unrestorable: Bits(0),
        ctime: None,
        btime: None,
    }
}

pub fn link(parent: FileId, name: &[u8], file: FileId) -> Op {
    Op::Link(Link {
        parent,
        name: name.to_vec(),
        file,
    })
}

/// A log whose first transaction is an empty root.
pub fn begun(bench: &Bench) -> LogWriter {
    let mut log = LogWriter::new(&bench.at("segments"));
    let root = log.file();
    log.commit(vec![
        LogWriter::filesystem(),
        Op::Inode(plain(Kind::Directory, root)),
    ]);
    log
}
