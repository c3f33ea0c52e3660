//! The sweep: walks the whole tree and notes what differs from the catalog.
//!
//! It finds what raised no event: changes while the daemon was down, stores through mmap, chattr,
//! writes through loop devices, what an overflow dropped. It compares names, inode numbers, ctimes and
//! sizes, a directory at a time, and only notes hints; what really changed is found by examination,
//! so a sweep that races with renames can be wrong without harm. Each directory is opened by its
//! handle, so that one that moves meanwhile is still the one that is meant.

use std::collections::{HashSet, VecDeque};
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tierfs::FileId;
use tierfs::catalog::{self, Child, Reader};
use tierfs::record::Kind;
use tierfs::residency::{Residency, path_beside};

use crate::capture::facts::{kind_of, time_of};
use crate::capture::hints::{Beside, EntryKey, Key, Look, Noted};
use crate::control::model::Event;
use crate::control::when::When;
use crate::shared::Shared;
use crate::sys;
use crate::sys::dir::DirReader;
use crate::sys::handle::{Handle, Opened, handle_at, handle_of, open_by_handle};
use crate::sys::io;
use crate::sys::mount::PrivateMount;
use crate::sys::stat::{FileKind, Stat, stat_at, stat_of};

/// The walk pauses while more hints than this are open.
const OPEN_HINTS_MAX: usize = 20_000;
/// Children read from the catalog at a time.
const PAGE: usize = 1000;
/// How often a resting sweep looks whether directories are to be walked.
const ASKED_EVERY: Duration = Duration::from_millis(200);
/// Access times noted at a time.
const ATIMES: usize = 10_000;
/// The inode number of every subvolume's root directory.
const BTRFS_SUBVOLUME: u64 = 256;

/// Why a sweep could not be completed; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filesystem failed.
    #[error(transparent)]
    Sys(#[from] sys::Error),
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    /// It could not even begin.
    #[error("{0}")]
    NotBegun(String),
    /// The daemon is going down.
    #[error("the daemon stops")]
    Stopping,
}

/// What a sweep found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Entries looked at.
    pub entries: u64,
    /// Differences noted.
    pub found: u64,
    /// Directories and entries that could not be looked at.
    pub failed: u64,
    /// Why the first of them could not.
    pub failure: Option<String>,
}

/// One walk of the tree, and the walks that were asked for since.
pub struct Sweep {
    mount: Arc<PrivateMount>,
    shared: Arc<Shared>,
    reader: Reader,
    root: Handle,
    result: Swept,
    /// Directories walked that the log did not know then.
    visited: HashSet<Handle>,
    atimes: Atimes,
}

/// When files were read, which raises no event. Nothing but policies depends on it, so what fails here
/// is only warned of.
struct Atimes {
    /// The list of what is on this disk, where they are noted.
    list: PathBuf,
    seen: Vec<(FileId, i64)>,
}

impl Atimes {
    /// A file's access time tells something where it is later than the change that came before it.
    fn see(&mut self, child: &Child, stat: &Stat) {
        if stat.kind == FileKind::Regular && stat.atime.0 > stat.mtime.0 {
            self.seen.push((child.file, stat.atime.0));
        }
        if self.seen.len() >= ATIMES {
            self.note();
        }
    }

    fn note(&mut self) {
        let seen = std::mem::take(&mut self.seen);
        if seen.is_empty() {
            return;
        }
        let noted = Residency::open(&self.list).and_then(|mut list| list.set_atimes(&seen));
        if let Err(error) = noted {
            tracing::warn!(%error, "access times are not noted");
        }
    }

    /// Forgets files that are gone, once they are more than those that are there.
    fn tidy(&self, reader: &Reader) -> Result<(), catalog::Error> {
        if !self.list.exists() {
            return Ok(());
        }
        let mut list = Residency::open(&self.list)?;
        if list.count_atimes()? <= reader.queries().counts()?.files {
            return Ok(());
        }
        let mut after = None;
        loop {
            let page = list.atimes_of(after, ATIMES)?;
            let mut gone = Vec::new();
            for file in &page {
                if reader.queries().inode(*file)?.is_none() {
                    gone.push(*file);
                }
            }
            list.forget_atimes(&gone)?;
            match page.last() {
                Some(last) => after = Some(*last),
                None => return Ok(()),
            }
        }
    }
}

/// A directory that is still to be walked: its handle, and its id where the log knows it.
type Todo = (Handle, Option<FileId>);

/// A directory that is being walked.
struct Walked<'d> {
    fd: BorrowedFd<'d>,
    handle: &'d Handle,
    differences: Vec<Noted>,
}

impl Walked<'_> {
    fn entry(&self, name: &[u8]) -> EntryKey {
        EntryKey {
            dir: self.handle.clone(),
            name: name.to_vec(),
        }
    }

    /// The log and the disk differ about a name.
    fn differs(&mut self, name: &[u8], beside: Beside) {
        let entry = Key::Entry(self.entry(name));
        self.differences.push((entry, Look::Content, beside));
    }
}

impl Sweep {
    /// Compares `mount` with the catalog.
    pub fn new(
        mount: Arc<PrivateMount>,
        shared: Arc<Shared>,
        catalog: &Path,
    ) -> Result<Self, Error> {
        let root = handle_of(mount.root())?;
        Ok(Self {
            mount,
            shared,
            reader: Reader::open(catalog)?,
            root,
            result: Swept::default(),
            visited: HashSet::new(),
            atimes: Atimes {
                list: path_beside(catalog),
                seen: Vec::new(),
            },
        })
    }

    /// Walks everything. Returns when the last difference has been noted (not yet examined).
    pub fn run(&mut self) -> Result<Swept, Error> {
        self.note_root(&stat_of(self.mount.root())?)?;
        let mut todo = vec![(self.root.clone(), Some(FileId::ROOT))];
        while let Some(next) = todo.pop() {
            self.step(next, &mut todo)?;
            self.walk_asked()?;
        }
        for file in self.reader.queries().orphans()? {
            self.orphan(file)?;
        }
        self.atimes.note();
        if let Err(error) = self.atimes.tidy(&self.reader) {
            tracing::warn!(%error, "access times of files that are gone are kept");
        }
        Ok(self.result.clone())
    }

    /// Walks what was asked for: directories that came to light beside the walk, having been moved
    /// from where it had not been yet to where it had, or being snapshots.
    pub fn walk_asked(&mut self) -> Result<(), Error> {
        while let Some(handle) = self.shared.next_walk() {
            let walked = if self.visited.insert(handle.clone()) {
                self.walk(&handle)
            } else {
                Ok(())
            };
            self.shared.walked();
            walked?;
        }
        Ok(())
    }

    fn walk(&mut self, dir: &Handle) -> Result<(), Error> {
        let id = self.reader.queries().file_by_handle(&dir.to_bytes())?;
        let mut todo = Vec::new();
        self.look(dir, id, &mut todo)?;
        while let Some(next) = todo.pop() {
            self.step(next, &mut todo)?;
        }
        Ok(())
    }

    fn step(&mut self, (handle, id): Todo, todo: &mut Vec<Todo>) -> Result<(), Error> {
        if id.is_none() && !self.visited.insert(handle.clone()) {
            return Ok(());
        }
        self.look(&handle, id, todo)
    }

    /// Looks at one directory. What cannot be looked at is counted and left out.
    fn look(
        &mut self,
        handle: &Handle,
        id: Option<FileId>,
        todo: &mut Vec<Todo>,
    ) -> Result<(), Error> {
        self.wait_for_room()?;
        match self.directory(handle, id, todo) {
            Err(Error::Sys(error)) => self.failed(&error),
            done => done?,
        }
        Ok(())
    }

    fn failed(&mut self, error: &sys::Error) {
        tracing::warn!(%error, "the sweep leaves something out");
        self.result.failed += 1;
        self.result.failure.get_or_insert_with(|| error.to_string());
    }

    fn wait_for_room(&self) -> Result<(), Error> {
        loop {
            if self.shared.stopping() {
                return Err(Error::Stopping);
            }
            if self.shared.hints().open() <= OPEN_HINTS_MAX {
                return Ok(());
            }
            self.shared.wait_for_progress(Duration::from_millis(20));
        }
    }

    /// What the catalog says of the root directory itself.
    fn note_root(&mut self, stat: &Stat) -> Result<(), Error> {
        let row = self.reader.queries().inode(FileId::ROOT)?;
        if row.is_none_or(|row| row.ctime != Some(time_of(stat.ctime))) {
            let root = Key::Inode(self.root.clone());
            self.found(vec![(root, Look::Content, Beside::Nothing)]);
        }
        Ok(())
    }

    fn found(&mut self, hints: Vec<Noted>) {
        let found = hints.len() as u64;
        self.result.found += found;
        let counter = &self.shared.counters.swept_found;
        counter.fetch_add(found, Ordering::Relaxed);
        self.shared.note(hints);
    }

    /// A file that the log knows without a name: is it gone, or examined under a new one?
    fn orphan(&mut self, file: FileId) -> Result<(), Error> {
        let row = self.reader.queries().inode(file)?;
        if let Some(handle) = row
            .and_then(|row| row.handle)
            .and_then(|bytes| Handle::from_bytes(&bytes).ok())
        {
            self.found(vec![(
                Key::Inode(handle),
                Look::Attributes,
                Beside::Nothing,
            )]);
        }
        Ok(())
    }

    fn directory(
        &mut self,
        handle: &Handle,
        id: Option<FileId>,
        todo: &mut Vec<Todo>,
    ) -> Result<(), Error> {
        let Opened::Fd(fd) = open_by_handle(self.mount.root(), handle.as_ref(), io::READ_DIR)?
        else {
            return Ok(());
        };
        let mut names = Vec::new();
        let mut reader = DirReader::new();
        reader.for_each(fd.as_fd(), |entry| {
            names.push(entry.name.as_bytes().to_vec());
            Ok::<(), sys::Error>(())
        })?;
        names.sort_unstable();
        let mut walked = Walked {
            fd: fd.as_fd(),
            handle,
            differences: Vec::new(),
        };
        let mut known = Children::new(id);
        for name in names {
            self.result.entries += 1;
            while let Some(gone) = known.next_if(&self.reader, |child| child.name < name)? {
                walked.differs(&gone.name, Beside::Nothing);
            }
            let child = known.next_if(&self.reader, |child| child.name == name)?;
            match self.entry(&mut walked, &name, child, todo) {
                Err(Error::Sys(error)) => self.failed(&error),
                done => done?,
            }
            if walked.differences.len() >= 1000 {
                self.found(std::mem::take(&mut walked.differences));
                self.wait_for_room()?;
            }
        }
        while let Some(gone) = known.next_if(&self.reader, |_| true)? {
            walked.differs(&gone.name, Beside::Nothing);
        }
        self.found(walked.differences);
        self.shared
            .counters
            .swept_entries
            .store(self.result.entries, Ordering::Relaxed);
        Ok(())
    }

    fn entry(
        &mut self,
        walked: &mut Walked<'_>,
        name: &[u8],
        child: Option<Child>,
        todo: &mut Vec<Todo>,
    ) -> Result<(), Error> {
        let os_name = OsStr::from_bytes(name);
        let Some(stat) = stat_at(walked.fd, os_name)? else {
            if child.is_some() {
                walked.differs(name, Beside::Nothing);
            }
            return Ok(());
        };
        let same = |child: &&Child| child.ino == Some(stat.ino) && child.kind == kind_of(stat.kind);
        let unchanged = child
            .as_ref()
            .filter(same)
            .is_some_and(|child| is_unchanged(child, &stat));
        if let Some(child) = child.as_ref().filter(same) {
            self.atimes.see(child, &stat);
        }
        if unchanged && stat.kind != FileKind::Directory {
            return Ok(());
        }
        let Some(handle) = handle_at(walked.fd, os_name)? else {
            return Ok(());
        };
        if stat.kind == FileKind::Directory {
            return self.subdirectory(walked, name, (handle, &stat), child, todo);
        }
        if child.as_ref().is_some_and(|child| same(&child)) {
            let beside = Beside::Name(walked.entry(name));
            let inode = Key::Inode(handle);
            walked.differences.push((inode, Look::Content, beside));
        } else if stat.kind == FileKind::Regular
            && stat.size > 0
            && child.is_none()
            && !self.shared.taken_over.load(Ordering::Relaxed)
        {
            walked.differs(name, Beside::Inode(handle));
        } else {
            walked.differs(name, Beside::Nothing);
        }
        Ok(())
    }

    /// A directory is walked later; its entry is looked at before, so that a new one is known then.
    fn subdirectory(
        &mut self,
        walked: &mut Walked<'_>,
        name: &[u8],
        (handle, stat): (Handle, &Stat),
        child: Option<Child>,
        todo: &mut Vec<Todo>,
    ) -> Result<(), Error> {
        if handle == self.root {
            return Ok(());
        }
        let child = child.filter(|child| child.kind == Kind::Directory);
        if handle.as_ref().is_btrfs_placeholder() {
            // An empty directory that cannot be opened; known by its name, or not yet.
            if child.is_none_or(|child| child.ino.is_some()) {
                walked.differs(name, Beside::Nothing);
            }
            return Ok(());
        }
        let queries = self.reader.queries();
        let mut bound = child.as_ref().filter(|child| child.ino == Some(stat.ino));
        if let Some(child) = bound
            && stat.ino == BTRFS_SUBVOLUME
            && handle.as_ref().btrfs_root().is_some()
        {
            // All subvolumes have this number, and a snapshot has the times of its original.
            let row = queries.inode(child.file)?;
            bound = bound.filter(|_| row.is_some_and(|row| row.handle == Some(handle.to_bytes())));
        }
        // Else one that was moved here, or one of another disk that is not bound yet.
        let unbound = child.as_ref().filter(|child| child.ino.is_none());
        let id = match bound.or(unbound) {
            Some(child) => Some(child.file),
            None => queries.file_by_handle(&handle.to_bytes())?,
        };
        match bound {
            None => walked.differs(name, Beside::Nothing),
            Some(child) if !is_unchanged(child, stat) => {
                let inode = Key::Inode(handle.clone());
                let beside = Beside::Name(walked.entry(name));
                walked.differences.push((inode, Look::Content, beside));
            }
            Some(_) => {}
        }
        todo.push((handle, id));
        Ok(())
    }
}

/// The entries that the log has of a directory, in the order of their names, a page at a time.
struct Children {
    dir: Option<FileId>,
    page: VecDeque<Child>,
    after: Option<Vec<u8>>,
}

impl Children {
    fn new(dir: Option<FileId>) -> Self {
        Self {
            dir,
            page: VecDeque::new(),
            after: None,
        }
    }

    /// The next one, if there is one and it is `wanted`.
    fn next_if(
        &mut self,
        reader: &Reader,
        wanted: impl FnOnce(&Child) -> bool,
    ) -> Result<Option<Child>, catalog::Error> {
        if let (Some(dir), true) = (self.dir, self.page.is_empty()) {
            let page = reader
                .queries()
                .children(dir, self.after.as_deref(), PAGE)?;
            if page.len() < PAGE {
                self.dir = None;
            }
            self.after = page.last().map(|child| child.name.clone());
            self.page = page.into();
        }
        Ok(self.page.pop_front_if(|child| wanted(child)))
    }
}

fn is_unchanged(child: &Child, stat: &Stat) -> bool {
    child.ctime == Some(time_of(stat.ctime))
        && (child.kind != Kind::Regular || child.size == stat.size)
}

/// Runs sweeps: at once, when asked, and at an interval, until the daemon stops.
pub fn run(
    mount: &Arc<PrivateMount>,
    shared: &Arc<Shared>,
    catalog: &Path,
    asked: &crossbeam_channel::Receiver<()>,
    interval: Duration,
) {
    while !shared.stopping() {
        let _ = asked.try_recv();
        let covers = shared.sweep_begins();
        shared.swept_from.store(unix_now(), Ordering::Relaxed);
        shared.counters.swept_entries.store(0, Ordering::Relaxed);
        shared.sweeping.store(true, Ordering::Relaxed);
        shared.tell(&Event::Sweep {
            time: When::now(),
            finished: false,
            files: 0,
            found: 0,
        });
        let mut sweep = Sweep::new(mount.clone(), shared.clone(), catalog);
        let result = match &mut sweep {
            Ok(sweep) => sweep.run(),
            Err(error) => Err(Error::NotBegun(error.to_string())),
        };
        let patience = match result {
            Ok(swept) => {
                shared.sweep_ends(covers);
                ended(shared, &swept);
                interval
            }
            Err(Error::Stopping) => return,
            Err(error) => {
                shared.trouble(
                    "sweep",
                    true,
                    "a sweep could not be completed",
                    error.to_string(),
                    "it is tried again every 10 s; look for I/O errors in dmesg",
                );
                Duration::from_secs(10)
            }
        };
        shared.sweeping.store(false, Ordering::Relaxed);
        shared.nudge();
        wait(shared, asked, patience, sweep.as_mut().ok());
    }
}

/// A sweep has been everywhere.
fn ended(shared: &Shared, swept: &Swept) {
    match &swept.failure {
        None => shared.well("sweep"),
        Some(why) => shared.trouble(
            "sweep",
            true,
            format!("a sweep left out {} directories or entries", swept.failed),
            why.clone(),
            "look for I/O errors in dmesg, check the filesystem; the next sweep tries them again",
        ),
    }
    shared.swept_at.store(unix_now(), Ordering::Relaxed);
    shared.sweeps.fetch_add(1, Ordering::Relaxed);
    let counter = &shared.counters.swept_entries;
    counter.store(swept.entries, Ordering::Relaxed);
    shared.tell(&Event::Sweep {
        time: When::now(),
        finished: true,
        files: swept.entries,
        found: swept.found,
    });
    shared.last_found.store(swept.found, Ordering::Relaxed);
    tracing::info!(entries = swept.entries, found = swept.found, "swept");
}

/// Waits until the next sweep is due, and walks what is asked for meanwhile.
fn wait(
    shared: &Shared,
    asked: &crossbeam_channel::Receiver<()>,
    patience: Duration,
    mut sweep: Option<&mut Sweep>,
) {
    let until = Instant::now() + patience;
    let mut asked_now = false;
    while !shared.stopping() && !asked_now {
        if let Some(sweep) = sweep.as_mut() {
            match sweep.walk_asked() {
                Ok(()) | Err(Error::Stopping) => {}
                Err(error) => {
                    tracing::warn!(%error, "a directory cannot be walked; a sweep begins");
                    return;
                }
            }
        }
        shared.tell_state();
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        asked_now = asked.recv_timeout(left.min(ASKED_EVERY)).is_ok();
    }
}

fn unix_now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
