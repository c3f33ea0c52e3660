//! The table of promise P1: every kind of change that the log must bring back.
//!
//! A [`Change`] has two halves, each given a directory of its own: `prepare` makes what is there
//! before, `apply` changes it. Tests run the halves around whatever they try (adoption, a running
//! daemon, a killed one) and compare afterwards.

mod content;
mod metadata;
mod names;
mod special;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::loopfs::Kind;

/// One half of a change; the path is the change's own directory.
pub type Step = fn(&Path) -> io::Result<()>;

/// A kind of change.
#[derive(Clone, Copy)]
pub struct Change {
    /// Names its directory and its line in the report.
    pub name: &'static str,
    /// Makes what is there before.
    pub prepare: Step,
    /// Changes it.
    pub apply: Step,
    /// Whether the kernel tells of it; if not, only a sweep finds it.
    pub raises_event: bool,
    only: Option<&'static [Kind]>,
}

impl Change {
    const fn new(name: &'static str, prepare: Step, apply: Step) -> Self {
        Self {
            name,
            prepare,
            apply,
            raises_event: true,
            only: None,
        }
    }

    /// No event tells of it.
    const fn silent(mut self) -> Self {
        self.raises_event = false;
        self
    }

    /// Can only be done on these filesystems.
    const fn only(mut self, kinds: &'static [Kind]) -> Self {
        self.only = Some(kinds);
        self
    }

    fn is_possible_on(&self, kind: Kind) -> bool {
        self.only.is_none_or(|kinds| kinds.contains(&kind))
    }
}

/// All changes that can be made on a filesystem. `HSM_ONLY` picks those whose name contains it.
pub fn all(kind: Kind) -> Vec<Change> {
    let only = std::env::var("HSM_ONLY").unwrap_or_default();
    [
        content::CHANGES,
        names::CHANGES,
        metadata::CHANGES,
        special::CHANGES,
    ]
    .concat()
    .into_iter()
    .filter(|change| change.is_possible_on(kind) && change.name.contains(&only))
    .collect()
}

/// Makes every change's directory and what it wants to find there.
pub fn prepare(root: &Path, changes: &[Change]) {
    for change in changes {
        let dir = root.join(change.name);
        fs::create_dir(&dir)
            .and_then(|()| (change.prepare)(&dir))
            .unwrap_or_else(|e| panic!("preparing {}: {e}", change.name));
    }
}

/// Makes the changes.
pub fn apply(root: &Path, changes: &[Change]) {
    for change in changes {
        (change.apply)(&root.join(change.name))
            .unwrap_or_else(|e| panic!("applying {}: {e}", change.name));
    }
}

/// Descriptors and mappings that changes leave open, until the process ends.
static HELD: Mutex<Vec<Box<dyn Send>>> = Mutex::new(Vec::new());

fn hold(thing: impl Send + 'static) {
    HELD.lock()
        .expect("no panic while held")
        .push(Box::new(thing));
}

/// Closes what the changes left open.
pub fn let_go() {
    HELD.lock().expect("no panic while held").clear();
}

// ---- what the tables are written with ------------------------------------------------------------

const EXT4: &[Kind] = &[Kind::Ext4];
const BTRFS: &[Kind] = &[Kind::Btrfs];
const EXT4_XFS: &[Kind] = &[Kind::Ext4, Kind::Xfs];
const XFS_BTRFS: &[Kind] = &[Kind::Xfs, Kind::Btrfs];

#[allow(clippy::unnecessary_wraps)] // a Step
fn nothing(_: &Path) -> io::Result<()> {
    Ok(())
}

/// Bytes that do not compress; the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// A file of noise.
fn noisy(dir: &Path, name: &str, len: usize) -> io::Result<()> {
    fs::write(dir.join(name), noise(len as u64, len))
}

/// A file of 300,000 bytes of noise.
fn one_file(dir: &Path) -> io::Result<()> {
    noisy(dir, "file", 300_000)
}

/// A small file, an empty directory.
fn small_things(dir: &Path) -> io::Result<()> {
    fs::write(dir.join("file"), "a small file\n")?;
    fs::create_dir(dir.join("dir"))
}

fn edit(dir: &Path, name: &str) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(dir.join(name))
}

fn overwrite(dir: &Path, name: &str, offset: u64, bytes: &[u8]) -> io::Result<()> {
    edit(dir, name)?.write_all_at(bytes, offset)
}

/// Runs a program that must succeed in a directory.
fn run(dir: &Path, program: &str, arguments: &[&str]) -> io::Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(dir)
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    )))
}
