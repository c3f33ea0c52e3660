//! What a directory's files must be.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CStr;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::sys;

/// Remembered of each file for the report.
const STORY: usize = 12;

/// A modification time.
type Time = (i64, i64);

/// A file.
#[derive(Default)]
pub(super) struct Inode {
    pub(super) bytes: Vec<u8>,
    pub(super) mode: u32,
    /// `None` where it was not seen since it changed.
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: BTreeMap<&'static CStr, Vec<u8>>,
    story: VecDeque<String>,
}

impl Inode {
    /// Something was done to it.
    pub(super) fn tell(&mut self, what: String) {
        if self.story.len() == STORY {
            self.story.pop_front();
        }
        self.story.push_back(what);
    }

    /// What was done to it last.
    pub(super) fn story(&self) -> String {
        let lines = self.story.iter().map(|line| format!("\n  {line}"));
        format!("it was, the latest last:{}", lines.collect::<String>())
    }

    pub(super) fn write(&mut self, bytes: &[u8], at: usize) {
        let end = at + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[at..end].copy_from_slice(bytes);
    }

    /// Zeros within its size.
    pub(super) fn punch(&mut self, at: usize, len: usize) {
        let end = (at + len).min(self.bytes.len());
        if at < end {
            self.bytes[at..end].fill(0);
        }
    }

    /// What was read from `at` on is right, where so many bytes were asked for.
    pub(super) fn expect_bytes(&self, at: usize, found: &[u8], asked: usize, context: &str) {
        let rest = self.bytes.get(at..).unwrap_or_default();
        let expected = &rest[..asked.min(rest.len())];
        if found == expected {
            return;
        }
        let differs = found.iter().zip(expected).position(|(a, b)| a != b);
        let from = differs.unwrap_or(0);
        let zeros = if found[from..].iter().all(|byte| *byte == 0) {
            ", from there on zeros"
        } else {
            ""
        };
        panic!(
            "{context}: {} bytes from {at} for {}, the first other one at {differs:?}{zeros}; {}",
            found.len(),
            expected.len(),
            self.story()
        );
    }

    /// What can be known without opening it.
    pub(super) fn expect_attributes(&self, path: &Path, meta: &Metadata, context: &str) {
        let found = (meta.size(), meta.mode() & 0o7777);
        let expected = (self.bytes.len() as u64, self.mode);
        assert_eq!(
            found,
            expected,
            "{context}: size and mode; {}",
            self.story()
        );
        let found = sys::xattrs(path).expect("its attributes");
        let found = found
            .into_iter()
            .filter(|(name, _)| name.starts_with(b"user."));
        let expected = self
            .xattrs
            .iter()
            .map(|(name, value)| (name.to_bytes().to_vec(), value.clone()));
        assert!(
            found.eq(expected),
            "{context}: attributes; {}",
            self.story()
        );
    }

    /// Of an open file: release and recall change it for a moment, while nobody has it open.
    pub(super) fn expect_mtime(&mut self, meta: &Metadata, context: &str) {
        let found = (meta.mtime(), meta.mtime_nsec());
        let expected = *self.mtime.get_or_insert(found);
        assert_eq!(
            found,
            expected,
            "{context}: modification time; {}",
            self.story()
        );
    }

    /// The time that a change of its bytes has left.
    pub(super) fn changed(&mut self, meta: &Metadata) {
        self.mtime = Some((meta.mtime(), meta.mtime_nsec()));
    }
}

/// A directory's names and what they are names of.
#[derive(Default)]
pub(super) struct Model {
    names: BTreeMap<String, usize>,
    inodes: BTreeMap<usize, Inode>,
    next: usize,
}

impl Model {
    pub(super) fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    pub(super) fn count(&self) -> usize {
        self.names.len()
    }

    pub(super) fn at(&mut self, name: &str) -> Option<(usize, &mut Inode)> {
        let id = *self.names.get(name)?;
        Some((id, self.inodes.get_mut(&id)?))
    }

    pub(super) fn inode(&mut self, id: usize) -> &mut Inode {
        self.inodes.get_mut(&id).expect("a file of the model")
    }

    /// A new file.
    pub(super) fn create(&mut self, name: String) -> &mut Inode {
        self.next += 1;
        self.names.insert(name, self.next);
        self.inodes.entry(self.next).or_default()
    }

    pub(super) fn link(&mut self, from: &str, to: String) {
        let id = self.names[from];
        self.names.insert(to, id);
    }

    pub(super) fn unlink(&mut self, name: &str) {
        self.names.remove(name);
    }

    /// Two names of one file stay two names.
    pub(super) fn rename(&mut self, from: &str, to: &str) {
        if self.names.get(from) != self.names.get(to)
            && let Some(id) = self.names.remove(from)
        {
            self.names.insert(to.to_owned(), id);
        }
    }

    pub(super) fn exchange(&mut self, one: &str, other: &str) {
        let (first, second) = (self.names[one], self.names[other]);
        self.names.insert(one.to_owned(), second);
        self.names.insert(other.to_owned(), first);
    }

    /// Two directories have changed places.
    pub(super) fn exchange_directories(&mut self, one: &str, other: &str) {
        let names = std::mem::take(&mut self.names);
        let moved = names.into_iter().map(|(name, id)| {
            let name = match name.split_once('/') {
                Some((dir, rest)) if dir == one => format!("{other}/{rest}"),
                Some((dir, rest)) if dir == other => format!("{one}/{rest}"),
                _ => name,
            };
            (name, id)
        });
        self.names = moved.collect();
    }

    /// Forgets files without a name, but for those that are open.
    pub(super) fn forget(&mut self, open: &[usize]) {
        let names = &self.names;
        self.inodes
            .retain(|id, _| open.contains(id) || names.values().any(|other| other == id));
    }

    /// What was done to each file last.
    pub(super) fn story(&self) -> String {
        let line = |(name, id): (&String, &usize)| {
            let story = self.inodes.get(id).map(Inode::story);
            format!("{name}: {}\n", story.unwrap_or_default())
        };
        self.names.iter().map(line).collect()
    }
}
