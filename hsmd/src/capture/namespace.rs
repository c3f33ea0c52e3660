//! From "look at this entry" to a valid tree.
//!
//! Each entry that a hint names is looked at as it is now. What differs from the catalog is closed
//! over: the directory above must be known; a directory that is found at a new place must have left
//! its old one; a file that lost its last name is followed to where it went, or is gone. Only when
//! the whole group fits together does it go into the transaction, else nothing of it does and the
//! hint is looked at again. So every LSN is a tree, and a rename is never a deletion.
//!
//! Deletion needs both: no name in the log any more, and an inode that its handle no longer finds
//! (or that has no links left).

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use tierfs::record::Kind;
use tierfs::{FileId, catalog};

use super::examine::{self, Outcome};
use super::facts::Facts;
use super::hints::EntryKey;
use super::tree::{Name, Tree};
use crate::sys;
use crate::sys::dir::DirReader;
use crate::sys::handle::{Handle, Opened, handle_at, handle_of, open_by_handle};
use crate::sys::io;
use crate::sys::mount::PrivateMount;
use crate::sys::stat::{FileKind, Stat, stat_of};

/// Directories kept open at most.
const DIRS_OPEN: usize = 256;
/// Entries looked at for one hint before it is put off: more than the longest chain of renames.
const STEPS: usize = 200_000;
/// The names of a file with more links than this are not compared with that number each time it
/// gets or loses one (10,000 links to one file would cost their square). Each is looked at for its own hint.
const LINKS_LISTED: u32 = 64;

/// Why an entry cannot be settled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filesystem failed.
    #[error(transparent)]
    Sys(#[from] sys::Error),
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
}

/// What came of an entry.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The tree holds it, and all that it needs.
    Settled,
    /// This regular file's content must be read first.
    Examine(Handle),
    /// Things move at this moment: look again soon.
    Later,
}

/// A group that cannot go in now.
enum Stop {
    Verdict(Verdict),
    Error(Error),
}

impl<E: Into<Error>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// Looks at the filesystem, for one thread.
pub struct Namespace {
    mount: Arc<PrivateMount>,
    root: Handle,
    dirs: HashMap<Handle, OwnedFd>,
    ids: HashMap<Handle, FileId>,
    watched_since: i64,
    seen: Seen,
}

/// What settling came across, beside the tree.
#[derive(Debug, Default)]
pub struct Seen {
    /// Directories that are new to the log but older than the watch: what lies in them raised no events.
    pub unwalked: Vec<Handle>,
    /// Files of the log that were found under another name.
    pub renamed: Vec<Handle>,
    /// Examinations that were made use of.
    pub used: Vec<Handle>,
}

/// What was found of an entry.
enum Looked {
    Names(Handle),
    Nothing,
    /// Its directory cannot be opened: it is gone, or cannot be read.
    NoDirectory,
}

/// Where a directory lies.
enum DirPlace {
    Root,
    At(EntryKey),
    Gone,
    /// It is there, but moves.
    Moves,
}

impl Namespace {
    /// Looks through `mount`, whose root directory is `root`.
    pub fn new(mount: Arc<PrivateMount>) -> Result<Self, sys::Error> {
        let root = handle_of(mount.root())?;
        Ok(Self {
            mount,
            root,
            dirs: HashMap::new(),
            ids: HashMap::new(),
            watched_since: i64::MAX,
            seen: Seen::default(),
        })
    }

    /// Everything that happened after this moment (unix seconds) raised an event.
    pub fn watched_since(&mut self, seconds: i64) {
        self.watched_since = seconds;
    }

    /// What was come across since the last call.
    pub fn take_seen(&mut self) -> Seen {
        std::mem::take(&mut self.seen)
    }

    /// The root directory's handle.
    pub fn root(&self) -> &Handle {
        &self.root
    }

    /// Forgets which files directories are: after a transaction that failed or deleted some.
    pub fn forget(&mut self) {
        self.ids.clear();
        self.dirs.clear();
    }

    /// An open directory; `None` where it is gone.
    fn dir(&mut self, dir: &Handle) -> Result<Option<BorrowedFd<'_>>, sys::Error> {
        if !self.dirs.contains_key(dir) {
            let Opened::Fd(fd) = open_by_handle(self.mount.root(), dir.as_ref(), io::READ_DIR)?
            else {
                return Ok(None);
            };
            if self.dirs.len() >= DIRS_OPEN {
                self.dirs.clear();
            }
            self.dirs.insert(dir.clone(), fd);
        }
        Ok(self.dirs.get(dir).map(AsFd::as_fd))
    }

    /// The inode that an entry names now.
    fn look(&mut self, entry: &EntryKey) -> Result<Looked, sys::Error> {
        let Some(dir) = self.dir(&entry.dir)? else {
            return Ok(Looked::NoDirectory);
        };
        let found = handle_at(dir, OsStr::from_bytes(&entry.name))?;
        Ok(found.map_or(Looked::Nothing, Looked::Names))
    }

    /// What a directory is at this moment, times above all; `None` where it is gone.
    pub fn stat(&mut self, dir: &Handle) -> Result<Option<Stat>, sys::Error> {
        let dir = self.dir(dir)?;
        dir.map(stat_of).transpose()
    }

    /// How many names an inode has; 0 where it is gone.
    fn links(&self, handle: &Handle) -> Result<u32, sys::Error> {
        match examine::hold(self.mount.root(), handle)? {
            Some(held) => Ok(stat_of(held.as_fd())?.nlink),
            None => Ok(0),
        }
    }

    fn id(&mut self, tree: &Tree<'_>, dir: &Handle) -> Result<Option<FileId>, catalog::Error> {
        if let Some(id) = self.ids.get(dir) {
            return Ok(Some(*id));
        }
        let id = tree.file_of(dir)?;
        // What only this transaction says may be taken back.
        if let Some(id) = id.filter(|id| !tree.is_new(*id) && !tree.is_bound(*id)) {
            if self.ids.len() >= 65_536 {
                self.ids.clear();
            }
            self.ids.insert(dir.clone(), id);
        }
        Ok(id)
    }

    /// Where a directory that its handle finds lies now.
    fn place_of(&self, dir: &Handle) -> Result<DirPlace, sys::Error> {
        if *dir == self.root {
            return Ok(DirPlace::Root);
        }
        let Opened::Fd(fd) = open_by_handle(self.mount.root(), dir.as_ref(), io::READ_DIR)? else {
            return Ok(DirPlace::Gone);
        };
        if stat_of(fd.as_fd())?.nlink == 0 {
            return Ok(DirPlace::Gone);
        }
        let Some(above) = io::open_at(fd.as_fd(), OsStr::new(".."), io::READ_DIR)? else {
            return Ok(DirPlace::Moves);
        };
        let place = |name| -> Result<DirPlace, sys::Error> {
            let dir = handle_of(above.as_fd())?;
            Ok(DirPlace::At(EntryKey { dir, name }))
        };
        let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        if let Some(name) = path.as_ref().ok().and_then(|path| path.file_name()) {
            return place(name.as_bytes().to_vec());
        }
        // The path is longer than the kernel can say.
        match name_in(above.as_fd(), dir)? {
            Some(name) => place(name),
            None if stat_of(fd.as_fd())?.nlink == 0 => Ok(DirPlace::Gone),
            None => Ok(DirPlace::Moves),
        }
    }

    /// Settles one entry in `tree`. `facts` are examinations of files that the log does not know
    /// yet. With `orphans`, a file that lives on without a name that can be found stays nameless.
    pub fn settle(
        &mut self,
        tree: &mut Tree<'_>,
        entry: &EntryKey,
        facts: &HashMap<Handle, Arc<Facts>>,
        orphans: bool,
    ) -> Result<Verdict, Error> {
        self.close(tree, facts, orphans, |group| {
            group.queue.push_back(entry.clone());
            Ok(())
        })
    }

    /// Settles what is left of a file whose inode is gone: all its names are looked at, and without
    /// one it is deleted.
    pub fn bury(
        &mut self,
        tree: &mut Tree<'_>,
        file: FileId,
        facts: &HashMap<Handle, Arc<Facts>>,
    ) -> Result<Verdict, Error> {
        self.close(tree, facts, true, |group| {
            group.lost.insert(file);
            Ok(())
        })
    }

    fn close<'c>(
        &mut self,
        tree: &mut Tree<'c>,
        facts: &HashMap<Handle, Arc<Facts>>,
        orphans: bool,
        begin: impl FnOnce(&mut Group<'_, 'c>) -> Result<(), Stop>,
    ) -> Result<Verdict, Error> {
        let mark = tree.mark();
        let mut group = Group {
            space: self,
            tree,
            facts,
            orphans,
            queue: VecDeque::new(),
            seen: BTreeSet::new(),
            lost: BTreeSet::new(),
            put_off: BTreeSet::new(),
            moved: Vec::new(),
            followed: BTreeSet::new(),
            found: Seen::default(),
        };
        let done = begin(&mut group).and_then(|()| group.close());
        let found = group.found;
        self.seen.used.extend(found.used);
        match done {
            Ok(()) => {
                self.seen.unwalked.extend(found.unwalked);
                self.seen.renamed.extend(found.renamed);
                Ok(Verdict::Settled)
            }
            Err(Stop::Verdict(verdict)) => {
                tree.rewind(mark);
                Ok(verdict)
            }
            Err(Stop::Error(error)) => {
                tree.rewind(mark);
                Err(error)
            }
        }
    }
}

/// The name of a directory in the one above it.
fn name_in(above: BorrowedFd<'_>, dir: &Handle) -> Result<Option<Vec<u8>>, sys::Error> {
    let mut found = None;
    DirReader::new().for_each(above, |entry| {
        let fits = entry.kind.is_none_or(|kind| kind == FileKind::Directory);
        if found.is_none() && fits && handle_at(above, entry.name)?.as_ref() == Some(dir) {
            found = Some(entry.name.as_bytes().to_vec());
        }
        Ok::<(), sys::Error>(())
    })?;
    Ok(found)
}

/// One entry and everything that must change with it.
struct Group<'g, 'c> {
    space: &'g mut Namespace,
    tree: &'g mut Tree<'c>,
    facts: &'g HashMap<Handle, Arc<Facts>>,
    orphans: bool,
    queue: VecDeque<EntryKey>,
    seen: BTreeSet<EntryKey>,
    lost: BTreeSet<FileId>,
    /// Gone, and named in directories whose own fate is open.
    put_off: BTreeSet<FileId>,
    moved: Vec<FileId>,
    /// Directories whose place was looked at because the way up from another did not end at the root.
    followed: BTreeSet<FileId>,
    found: Seen,
}

impl Group<'_, '_> {
    fn close(&mut self) -> Result<(), Stop> {
        let (mut steps, mut changed) = (0, None);
        loop {
            while let Some(entry) = self.queue.pop_front() {
                steps += 1;
                if steps > STEPS {
                    return Err(Stop::Verdict(Verdict::Later));
                }
                self.entry(&entry)?;
            }
            if let Some(file) = self.lost.pop_first() {
                self.fate(file)?;
                continue;
            }
            if self.put_off.is_empty() {
                if self.is_whole()? {
                    return Ok(());
                }
                continue;
            }
            // Once more, as long as that changes something.
            if changed.replace(self.tree.mark()) == Some(self.tree.mark()) {
                return Err(Stop::Verdict(Verdict::Later));
            }
            self.lost = std::mem::take(&mut self.put_off);
        }
    }

    /// Whether every directory that was moved has one name, and a way to the root. False: more was found
    /// to look at.
    fn is_whole(&mut self) -> Result<bool, Stop> {
        for dir in self.moved.clone() {
            if self.tree.is_deleted(dir) {
                continue;
            }
            let broken = self.tree.broken_above(dir)?.is_some();
            if broken && self.look_above(dir)? {
                return Ok(false);
            }
            if broken || self.tree.names_of(dir)?.len() > 1 {
                return Err(Stop::Verdict(Verdict::Later));
            }
        }
        Ok(true)
    }

    /// The way up from a directory does not lead to the root: one on it was moved, too, and nobody has
    /// told us yet. False where all of their places were looked at.
    fn look_above(&mut self, dir: FileId) -> Result<bool, Stop> {
        let (mut at, mut way) = (dir, BTreeSet::new());
        while at != FileId::ROOT && way.insert(at) {
            let Some((parent, _)) = self.tree.names_of(at)?.into_iter().next() else {
                break;
            };
            at = parent;
        }
        for file in way {
            if self.followed.insert(file)
                && let Some(handle) = self.tree.handle_of(file)?
                && let DirPlace::At(place) = self.space.place_of(&handle)?
                && !self.seen.contains(&place)
            {
                self.queue.push_back(place);
            }
        }
        Ok(!self.queue.is_empty())
    }

    /// Looks at an entry once more, if it was not looked at for this group.
    fn also(&mut self, entry: EntryKey) {
        if !self.seen.contains(&entry) {
            self.queue.push_back(entry);
        }
    }

    fn entry(&mut self, entry: &EntryKey) -> Result<(), Stop> {
        let Some(parent) = self.parent(entry)? else {
            return Ok(());
        };
        self.seen.insert(entry.clone());
        let was = self.tree.lookup(parent, &entry.name)?;
        let handle = match self.space.look(entry)? {
            Looked::Names(handle) => handle,
            Looked::NoDirectory => return self.without_directory(parent),
            Looked::Nothing => {
                if let Some(was) = was {
                    self.tree.set_name(parent, &entry.name, Some(was), None);
                    self.lost.insert(was);
                }
                return Ok(());
            }
        };
        if handle.as_ref().is_btrfs_placeholder() {
            return self.placeholder(entry, parent, was);
        }
        if parent == FileId::ROOT && handle == self.space.root {
            return Ok(());
        }
        let now = match self.tree.file_of(&handle)? {
            Some(now) => now,
            None => match self.unknown(&handle, was)? {
                Some(now) => now,
                None => return Ok(()),
            },
        };
        if was == Some(now) {
            return Ok(());
        }
        self.tree.set_name(parent, &entry.name, was, Some(now));
        self.lost.extend(was);
        self.other_names(now, &handle)
    }

    /// A directory's handle finds nothing. That alone does not prove that it is gone, and its entries with
    /// it (what cannot be read answers the same): its name must be gone, too.
    fn without_directory(&mut self, dir: FileId) -> Result<(), Stop> {
        let names = self.tree.names_of(dir)?;
        self.look_at_names(names)?;
        self.lost.insert(dir);
        Ok(())
    }

    /// The directory's file id. `None`: the directory is gone, and its entries with it.
    fn parent(&mut self, entry: &EntryKey) -> Result<Option<FileId>, Stop> {
        if let Some(parent) = self.space.id(self.tree, &entry.dir)? {
            return Ok((!self.tree.is_deleted(parent)).then_some(parent));
        }
        match self.space.place_of(&entry.dir)? {
            DirPlace::Gone => Ok(None),
            DirPlace::Root | DirPlace::Moves => Err(Stop::Verdict(Verdict::Later)),
            DirPlace::At(above) => {
                if self.seen.contains(&above) {
                    return Err(Stop::Verdict(Verdict::Later));
                }
                self.queue.push_front(entry.clone());
                self.queue.push_front(above);
                Ok(None)
            }
        }
    }

    /// A file that the log does not know: adds it, where everything about it is known.
    fn unknown(&mut self, handle: &Handle, was: Option<FileId>) -> Result<Option<FileId>, Stop> {
        if let Some(was) = was
            && self.tree.handle_of(was)?.is_none()
            && self.adopt(handle, was)?
        {
            return Ok(Some(was));
        }
        if let Some(facts) = self.facts.get(handle) {
            self.found.used.push(handle.clone());
            return Ok(Some(self.new_file(handle, facts.clone())));
        }
        // Most are regular files: their turn comes when a worker has read them.
        if examine::has_content(self.space.mount.root(), handle)? {
            return Err(Stop::Verdict(Verdict::Examine(handle.clone())));
        }
        match examine::attributes(self.space.mount.root(), handle)? {
            // It has just gone; what took its place raises an event of its own.
            Outcome::Gone => Err(Stop::Verdict(Verdict::Later)),
            Outcome::Facts(facts)
                if facts.stat.kind == FileKind::Regular && facts.stat.size > 0 =>
            {
                Err(Stop::Verdict(Verdict::Examine(handle.clone())))
            }
            Outcome::Facts(facts) => Ok(Some(self.new_file(handle, Arc::from(facts)))),
        }
    }

    fn new_file(&mut self, handle: &Handle, facts: Arc<Facts>) -> FileId {
        let born = facts.stat.btime.map_or(i64::MIN, |time| time.0);
        if facts.stat.kind == FileKind::Directory && born <= self.space.watched_since {
            self.found.unwalked.push(handle.clone());
        }
        self.tree.add(Some(handle.clone()), facts)
    }

    /// On a disk that replay built: the file that the log has under this name, if it is of the kind
    /// that is found here.
    fn adopt(&mut self, handle: &Handle, was: FileId) -> Result<bool, Stop> {
        let Some(held) = examine::hold(self.space.mount.root(), handle)? else {
            return Err(Stop::Verdict(Verdict::Later));
        };
        let stat = stat_of(held.as_fd())?;
        if self.tree.kind_of(was)? != Some(super::facts::kind_of(stat.kind)) {
            return Ok(false);
        }
        self.tree.bind(was, handle.clone(), stat.ino);
        Ok(true)
    }

    /// What stands in a btrfs snapshot for a subvolume of the original: an empty directory whose
    /// handle is that of all such directories and cannot be opened. The log knows it by its name.
    fn placeholder(
        &mut self,
        entry: &EntryKey,
        parent: FileId,
        was: Option<FileId>,
    ) -> Result<(), Stop> {
        if let Some(was) = was
            && self.tree.handle_of(was)?.is_none()
            && self.tree.kind_of(was)? == Some(Kind::Directory)
            && self.tree.children(was)?.is_empty()
        {
            return Ok(());
        }
        let later = Err(Stop::Verdict(Verdict::Later));
        let Some(dir) = self.space.dir(&entry.dir)? else {
            return later;
        };
        let Some(held) = io::open_at(dir, OsStr::from_bytes(&entry.name), io::HOLD)? else {
            return later;
        };
        let facts = examine::held_only(held.as_fd(), stat_of(held.as_fd())?)?;
        let file = self.tree.add(None, Arc::new(facts));
        self.tree.set_name(parent, &entry.name, was, Some(file));
        self.lost.extend(was);
        Ok(())
    }

    /// Looks at all entries that the log has for a file.
    fn look_at_names(&mut self, names: BTreeSet<Name>) -> Result<(), Stop> {
        for (parent, name) in names {
            if let Some(dir) = self.tree.handle_of(parent)? {
                self.also(EntryKey { dir, name });
            }
        }
        Ok(())
    }

    /// A file has got a name: which of its others does it still have?
    fn other_names(&mut self, file: FileId, handle: &Handle) -> Result<(), Stop> {
        let directory = self.tree.kind_of(file)? == Some(Kind::Directory);
        if !self.tree.is_new(file) {
            self.found.renamed.push(handle.clone());
            if directory {
                self.moved.push(file);
            }
        }
        let names = self.tree.names_of(file)?;
        if names.len() < 2 {
            return Ok(());
        }
        if directory {
            self.moved.push(file);
            return self.look_at_names(names);
        }
        match self.space.links(handle)? {
            0 => Err(Stop::Verdict(Verdict::Later)),
            links if links > LINKS_LISTED || names.len() as u64 <= u64::from(links) => Ok(()),
            _ => self.look_at_names(names),
        }
    }

    /// A file lost a name. If it was the last: where is it now?
    fn fate(&mut self, file: FileId) -> Result<(), Stop> {
        if self.tree.is_deleted(file) {
            return Ok(());
        }
        if file == FileId::ROOT {
            // The filesystem cannot be read: it was shut down, or its disk is away.
            return Err(Stop::Verdict(Verdict::Later));
        }
        let Some(handle) = self.tree.handle_of(file)? else {
            // Of another disk, and not on this one; or a placeholder.
            let named = !self.tree.names_of(file)?.is_empty();
            return if named { Ok(()) } else { self.gone(file) };
        };
        let links = self.space.links(&handle)?;
        if links > LINKS_LISTED && self.tree.kind_of(file)? != Some(Kind::Directory) {
            return Ok(());
        }
        let names = self.tree.names_of(file)?;
        match (links, names.is_empty()) {
            (0, true) => self.gone(file),
            (0, false) => self.dead(file, names),
            (_, false) => Ok(()),
            (_, true) => self.nameless(file, &handle),
        }
    }

    /// A file is gone that the log still has names for: they are gone, or name something else.
    fn dead(&mut self, file: FileId, names: BTreeSet<Name>) -> Result<(), Stop> {
        self.look_at_names(names)?;
        // Where all were looked at, one of them named it a moment ago, or the directory is gone, too.
        let undecided = self.queue.is_empty();
        let next = if undecided {
            &mut self.put_off
        } else {
            &mut self.lost
        };
        next.insert(file);
        Ok(())
    }

    /// A file lives on without a name that the log knows.
    fn nameless(&mut self, file: FileId, handle: &Handle) -> Result<(), Stop> {
        if self.tree.kind_of(file)? == Some(Kind::Directory) {
            return match self.space.place_of(handle)? {
                DirPlace::At(place) if !self.seen.contains(&place) => {
                    self.queue.push_back(place);
                    self.lost.insert(file);
                    Ok(())
                }
                _ => Err(Stop::Verdict(Verdict::Later)),
            };
        }
        // It has a name that nobody has told us yet. Wait for it; a sweep finds it at the latest.
        if self.orphans {
            Ok(())
        } else {
            Err(Stop::Verdict(Verdict::Later))
        }
    }

    /// A file is gone for good, and a directory's entries with it.
    fn gone(&mut self, file: FileId) -> Result<(), Stop> {
        self.tree.delete(file);
        if self.tree.kind_of(file)? == Some(Kind::Directory) {
            for (name, child) in self.tree.children(file)? {
                self.tree.set_name(file, &name, Some(child), None);
                self.lost.insert(child);
            }
        }
        Ok(())
    }
}
