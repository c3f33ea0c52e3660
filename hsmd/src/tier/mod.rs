//! Release and recall: cold data leaves the disk, and comes back when somebody opens it.
//!
//! Three processes: the *keeper* ([`keeper`]) exposes the filesystem and holds a duplicate of the
//! permission group; the *guard* ([`guard`]) reads the group, lets everybody pass who opens a whole file,
//! and hands the others to the *worker*, which is the daemon itself ([`crate::daemon`]) with
//! [`worker::Tier`] inside. While any of them lives nobody reads zeros: an access waits as long as nobody answers it.
//!
//! What a stub is stands on the disk, in its mark ([`tierfs::stub`], [`mark`]). A file gets the mark
//! before a byte of it goes, and loses it after the last one is back and durable.

pub mod exposure;
pub mod fill;
mod full;
pub mod guard;
pub mod keeper;
pub mod mark;
mod mtime;
mod others;
pub mod recall;
pub mod refill;
pub mod regain;
pub mod release;
pub mod residents;
mod store;
pub mod suspects;
pub mod unclean;
pub mod worker;

use std::collections::{HashMap, HashSet};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tierfs::FileId;

use crate::shared::lock;
use crate::sys::handle::Handle;
use crate::sys::stat;

/// Files whose bytes are those that were logged, at the change time that they have by our own doing:
/// their examination need not read them.
#[derive(Default)]
pub struct Vouched {
    files: Mutex<HashMap<Handle, stat::Time>>,
}

impl Vouched {
    /// More are forgotten, and read again some time.
    const MAX: usize = 100_000;

    /// A file is as it was logged, and has this change time.
    pub fn note(&self, handle: &Handle, ctime: stat::Time) {
        let mut files = lock(&self.files);
        if files.len() >= Self::MAX {
            files.clear();
        }
        files.insert(handle.clone(), ctime);
    }

    /// Whether a file with this change time is as it was logged.
    pub fn knows(&self, handle: &Handle, ctime: stat::Time) -> bool {
        lock(&self.files).get(handle) == Some(&ctime)
    }
}

/// Files that were recalled not long ago: they are released again only when nothing else is left, however
/// cold the catalog believes them to be.
#[derive(Default)]
pub struct Recalled {
    files: Mutex<HashMap<FileId, Instant>>,
}

impl Recalled {
    /// Afterwards it is like any other file.
    const LONG_AGO: Duration = Duration::from_mins(10);
    /// More are forgotten.
    const MAX: usize = 200_000;

    /// A file was recalled just now.
    pub fn note(&self, file: FileId) {
        let mut files = lock(&self.files);
        if files.len() >= Self::MAX {
            files.retain(|_, when| when.elapsed() < Self::LONG_AGO);
        }
        if files.len() < Self::MAX {
            files.insert(file, Instant::now());
        }
    }

    /// Whether any file was recalled within this time.
    pub fn any_within(&self, time: Duration) -> bool {
        let files = lock(&self.files);
        files.values().any(|when| when.elapsed() < time)
    }

    /// When it was recalled, if that is not long ago.
    pub fn when(&self, file: FileId) -> Option<Instant> {
        let when = lock(&self.files).get(&file).copied();
        when.filter(|when| when.elapsed() < Self::LONG_AGO)
    }
}

/// Inodes that release or recall works on: one at a time for each.
#[derive(Default)]
pub struct Busy {
    inodes: Mutex<HashSet<Handle>>,
    freed: Condvar,
}

/// Holds an inode until it is dropped.
pub struct Held<'b> {
    busy: &'b Busy,
    handle: Handle,
}

impl Busy {
    /// Waits until nobody works on the inode.
    pub fn hold(&self, handle: &Handle) -> Held<'_> {
        let mut inodes = lock(&self.inodes);
        while !inodes.insert(handle.clone()) {
            inodes = self
                .freed
                .wait(inodes)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Held {
            busy: self,
            handle: handle.clone(),
        }
    }

    /// `None`: somebody works on it.
    pub fn try_hold(&self, handle: &Handle) -> Option<Held<'_>> {
        lock(&self.inodes).insert(handle.clone()).then(|| Held {
            busy: self,
            handle: handle.clone(),
        })
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        lock(&self.busy.inodes).remove(&self.handle);
        self.busy.freed.notify_all();
    }
}
