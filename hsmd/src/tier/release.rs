//! Release: giving back the space of files that lie on every required copy.
//!
//! In two passes over a batch. First each file gets its mark, under a write lease, which only a file
//! that nobody has open or mapped grants: from here on it counts as a stub whose bytes happen to be
//! there. One sync makes all marks durable. Then each is punched, under a lease again, if it is still what
//! it was. Whatever goes wrong in between takes the mark back, and a crash leaves marked files with all
//! their bytes, which the next recall finds whole.
//!
//! One descriptor serves a file from the check to the punch: nothing that takes its name meanwhile is
//! touched.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use tierfs::catalog::{self, InodeRow, Queries, Reader};
use tierfs::record::{Bits, Kind};
use tierfs::residency::{Residency, Stub};
use tierfs::stub::{Stage, StubMark};
use tierfs::{FileId, LogId, SegmentNo, Time};

use super::mark::{self, Marked};
use super::mtime::Mtime;
use super::residents::Residents;
use super::unclean::{self, CompareError, Compared};
use super::{Busy, Held, Vouched};
use crate::board::Board;
use crate::capture::facts::time_of;
use crate::capture::hints::{Beside, Key, Look};
use crate::shared::{Shared, lock};
use crate::sys::handle::{Handle, Opened, open_by_handle};
use crate::sys::lease::WriteLease;
use crate::sys::mount::PrivateMount;
use crate::sys::stat::{self, stat_of};
use crate::sys::{Error, io, space};

/// Files of one batch: they share the syncs, and each keeps a descriptor open.
pub const BATCH: usize = 1000;
/// Parts of a batch that are worked on at the same time; each holds one lease, so that there are fewer than
/// readers of the guard.
const PARTS: usize = 2;
/// A batch of fewer files is not worth a thread.
const PARTS_FROM: usize = 32;
/// Extents asked for at a time.
const EXTENTS: usize = 4096;

/// Why a file is not released. It is what it was.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// The log does not know it, or it is gone.
    #[error("the log does not know it as a file that is there")]
    Unknown,
    /// It is no regular file, or has no data.
    #[error("it has no data to give back")]
    Nothing,
    /// It is a stub.
    #[error("it is released already")]
    Already,
    /// Not now.
    #[error(
        "it, its name or its attributes were changed, and its content was not compared with the log since: wait for two minutes, or release it with --wait"
    )]
    Dirty,
    /// It was read while it changed.
    #[error(
        "its logged version is fuzzy (it changed while it was read): it can be released when it has come to rest"
    )]
    Fuzzy,
    /// The log does not have all of it.
    #[error(
        "the log does not have all of it: it is encrypted, sealed by verity, or could not be read"
    )]
    Unrestorable,
    /// Somebody uses it.
    #[error("it is open, mapped or being executed")]
    InUse,
    /// Another release or recall works on it.
    #[error("it is being recalled or released")]
    Busy,
    /// It must not be changed.
    #[error("it is immutable, append-only or of a kind that cannot be opened for writing ({0})")]
    Sealed(Error),
    /// Nothing can be written there.
    #[error(
        "its filesystem is read-only: see the kernel's messages (dmesg) for why, and mount it writable again"
    )]
    ReadOnly,
    /// The filesystem failed, for all files at once.
    #[error("its filesystem cannot be written to: {0}")]
    Disk(String),
    /// A required copy is missing.
    #[error("{0}")]
    NotCopied(String),
    /// It is pinned.
    #[error("it is pinned: `tierctl unpin` lets it be released")]
    Pinned,
    /// The filesystem failed.
    #[error(transparent)]
    Sys(#[from] Error),
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
}

impl Refused {
    /// Whether something is wrong; else the file is in a state in which it has to stay.
    pub fn is_fault(&self) -> bool {
        match self {
            // XFS does not punch where the owner's quota is used up to the last block.
            Self::Sys(error) => error.errno() != Some(libc::EDQUOT),
            Self::NotCopied(_) | Self::Catalog(_) | Self::ReadOnly | Self::Disk(_) => true,
            _ => false,
        }
    }
}

/// A file's space is given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Released {
    /// Bytes of the disk that are free now; less than its size where extents are shared, or it was sparse.
    pub freed: u64,
}

/// Why a file was not punched, or not to the end.
enum Unpunched {
    /// It has all its bytes.
    Whole(Refused),
    /// The kernel failed after the punch had begun.
    Perhaps(Error),
}

impl From<Error> for Unpunched {
    fn from(error: Error) -> Self {
        Self::Perhaps(error)
    }
}

/// What release works with.
pub struct Release {
    /// Hints.
    pub shared: Arc<Shared>,
    /// Which segment is on which copy.
    pub board: Arc<Board>,
    /// The filesystem, without events.
    pub mount: Arc<PrivateMount>,
    /// The kernel's marks.
    pub residents: Arc<Residents>,
    /// The list of stubs.
    pub residency: Arc<Mutex<Residency>>,
    /// Inodes that are worked on.
    pub busy: Arc<Busy>,
    /// Files that are as they were logged.
    pub vouched: Arc<Vouched>,
    /// Files whose release was interrupted: they are to be recalled.
    pub interrupted: Mutex<Vec<Handle>>,
    /// The catalog's file.
    pub catalog: PathBuf,
    /// The log.
    pub log_id: LogId,
    /// What was changed last before this is compared with the log; see [`unclean`].
    pub unclean_since: Option<i64>,
}

/// A file that has its mark and all its bytes.
struct Candidate<'r> {
    file: FileId,
    handle: Handle,
    fd: OwnedFd,
    mark: StubMark,
    /// With the mark.
    ctime: stat::Time,
    _held: Held<'r>,
}

/// What a file needs to be a candidate.
struct Wanted {
    row: InodeRow,
    handle: Handle,
    mark: StubMark,
}

/// Does something to some parts of a batch at the same time.
fn in_parts<T: Send, R: Send>(mut items: Vec<T>, act: impl Fn(Vec<T>) -> R + Sync) -> Vec<R> {
    let parts = if items.len() < PARTS_FROM { 1 } else { PARTS };
    let size = items.len().div_ceil(parts);
    std::thread::scope(|scope| {
        let (act, mut running) = (&act, Vec::new());
        while items.len() > size {
            let part = items.split_off(items.len() - size);
            running.push(scope.spawn(move || act(part)));
        }
        let mut done = vec![act(items)];
        for thread in running {
            done.push(
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            );
        }
        done
    })
}

/// The same to each file of it.
fn each_in_parts<T: Send, R: Send>(items: Vec<T>, act: impl Fn(T) -> R + Sync) -> Vec<R> {
    let part = |part: Vec<T>| part.into_iter().map(&act).collect::<Vec<R>>();
    in_parts(items, part).into_iter().flatten().collect()
}

/// What the log says of a file.
type Found = (FileId, Result<Wanted, Refused>);

/// Which segments lie on every pool, as far as it was asked.
type Copied = HashMap<SegmentNo, Result<(), String>>;

impl Release {
    /// Releases files; tells of each what came of it, in no particular order. At most [`BATCH`] files.
    pub fn batch(
        &self,
        files: &[FileId],
        each: &mut dyn FnMut(FileId, Result<Released, Refused>),
    ) -> Result<(), catalog::Error> {
        let mut wanted = Vec::new();
        for part in in_parts(files.to_vec(), |part| self.want(&part)) {
            for (file, found) in part? {
                match found {
                    Ok(found) => wanted.push(found),
                    Err(refused) => each(file, Err(refused)),
                }
            }
        }
        if wanted.is_empty() {
            return Ok(());
        }
        // What the log read may lie in the page cache only. A power loss could keep the mark and lose that:
        // then older bytes would lie under a mark that names newer ones, and nobody could tell why.
        if let Err(error) = io::syncfs(self.mount.root()) {
            tracing::warn!(%error, "nothing is released");
            for wanted in wanted {
                each(wanted.row.file, Err(cannot_write(&error)));
            }
            return Ok(());
        }
        // Durable before the first mark is set: a list that is complete stays so. The disk's new generation is durable
        // before the first byte goes: a list from a backup that lacks these is known not to be complete.
        let stubs: Vec<Stub> = wanted
            .iter()
            .map(|wanted| Stub {
                file: wanted.row.file,
                handle: wanted.mark.handle.clone(),
            })
            .collect();
        let generation = lock(&self.residency).add(&stubs, Time::now().seconds)?;
        if let Err(error) = space::set_mark(self.mount.root(), &generation.to_bytes()) {
            tracing::warn!(%error, "nothing is released");
            for wanted in wanted {
                each(wanted.row.file, Err(cannot_write(&error)));
            }
            return Ok(());
        }
        let set = |wanted: Wanted| (wanted.row.file, self.set_mark(wanted));
        let mut marked = Vec::new();
        for (file, candidate) in each_in_parts(wanted, set) {
            match candidate {
                Ok(candidate) => marked.push(candidate),
                Err(refused) => each(file, Err(refused)),
            }
        }
        if marked.is_empty() {
            return Ok(());
        }
        if let Err(error) = io::syncfs(self.mount.root()) {
            tracing::warn!(%error, "nothing is released");
            for candidate in marked {
                self.take_back(&candidate);
                self.tell_of(&candidate.handle);
                each(candidate.file, Err(cannot_write(&error)));
            }
            return Ok(());
        }
        for (file, result) in each_in_parts(marked, |candidate| self.give_back(candidate)) {
            each(file, result);
        }
        Ok(())
    }

    /// What the log says of files.
    fn want(&self, files: &[FileId]) -> Result<Vec<Found>, catalog::Error> {
        let (reader, mut copied) = (Reader::open(&self.catalog)?, Copied::new());
        let look = |file: &FileId| {
            let found = reader.snapshot(|queries| self.wanted(queries, *file, &mut copied));
            let found = found.and_then(|wanted| {
                self.compare(&reader, &wanted)?;
                Ok(wanted)
            });
            (*file, found)
        };
        Ok(files.iter().map(look).collect())
    }

    /// Compares a file with the log whose times say nothing, since the power may have failed after a write to it.
    fn compare(&self, reader: &Reader, wanted: &Wanted) -> Result<(), Refused> {
        if !unclean::is_doubted(&wanted.row, self.unclean_since) {
            return Ok(());
        }
        let Opened::Fd(fd) = open_by_handle(self.mount.root(), wanted.handle.as_ref(), io::READ)?
        else {
            return Err(Refused::Unknown);
        };
        let fd = fd.as_fd();
        if mark::look(fd, self.log_id)? != Marked::Whole {
            return Err(Refused::Already);
        }
        match unclean::compare(fd, wanted.row.file, reader, &self.shared) {
            Ok(Compared::Same) => return Ok(()),
            Ok(Compared::Stopped) => return Err(Refused::Busy),
            Err(CompareError::Sys(error)) => return Err(error.into()),
            Err(CompareError::Catalog(error)) => return Err(error.into()),
            Ok(Compared::Differs) => {}
        }
        tracing::warn!(
            file = crate::sys::describe(fd),
            "it was changed before the power failed or the disk went, and its times do not say so: it is read for the log"
        );
        // Its change time is a new one then, which is what has it read.
        space::touch_ctime(fd)?;
        let key = Key::Inode(wanted.handle.clone());
        self.shared.note([(key, Look::Content, Beside::Nothing)]);
        Err(Refused::Dirty)
    }

    /// The second pass, and what follows from it.
    fn give_back(&self, candidate: Candidate<'_>) -> (FileId, Result<Released, Refused>) {
        let result = match self.punch(&candidate) {
            Ok(released) => Ok(released),
            Err(Unpunched::Whole(refused)) => {
                self.take_back(&candidate);
                Err(refused)
            }
            // Some of its data may be gone: it keeps its mark, and gets its data back.
            Err(Unpunched::Perhaps(error)) => {
                tracing::warn!(%error, "a release was interrupted, the file is recalled");
                lock(&self.interrupted).push(candidate.handle.clone());
                Err(error.into())
            }
        };
        // Its change time is a new one, by our own doing.
        let (file, handle) = (candidate.file, candidate.handle.clone());
        drop(candidate);
        self.tell_of(&handle);
        (file, result)
    }

    /// Whether a file could be released, as far as the log says; gives its size.
    pub fn could(&self, file: FileId) -> Result<u64, Refused> {
        let reader = Reader::open(&self.catalog)?;
        let wanted = reader.snapshot(|queries| self.wanted(queries, file, &mut Copied::new()))?;
        Ok(wanted.row.size)
    }

    /// What the log says of a file: can it be released at all?
    fn wanted(
        &self,
        queries: Queries<'_>,
        file: FileId,
        copied: &mut Copied,
    ) -> Result<Wanted, Refused> {
        let row = queries.inode(file)?.ok_or(Refused::Unknown)?;
        let (Some(version), Kind::Regular, 1..) = (row.content_lsn, row.kind, row.size) else {
            return Err(Refused::Nothing);
        };
        if queries.is_pinned(file)? {
            return Err(Refused::Pinned);
        }
        if row.fuzzy {
            return Err(Refused::Fuzzy);
        }
        if row.unrestorable.0 != 0 {
            return Err(Refused::Unrestorable);
        }
        let handle = row.handle.clone().ok_or(Refused::Unknown)?;
        let mark = StubMark {
            log_id: self.log_id,
            file,
            version,
            size: row.size,
            mtime: row.mtime,
            handle,
            stage: Stage::Moving,
            seals: Bits(0),
            capability: None,
        };
        let handle = Handle::from_bytes(&mark.handle).map_err(|_| Refused::Unknown)?;
        self.check_copies(queries, &row, copied)?;
        Ok(Wanted { row, handle, mark })
    }

    fn check_copies(
        &self,
        queries: Queries<'_>,
        row: &InodeRow,
        copied: &mut Copied,
    ) -> Result<(), Refused> {
        let mut check = |segment: SegmentNo| {
            let known = copied
                .entry(segment)
                .or_insert_with(|| self.board.verified_everywhere(segment));
            known.clone().map_err(Refused::NotCopied)
        };
        for lsn in [Some(row.lsn), row.content_lsn].into_iter().flatten() {
            if let Some(txn) = queries.txn(lsn)? {
                check(txn.place.segment)?;
            }
        }
        let mut from = 0;
        loop {
            let extents = queries.extents(row.file, from, EXTENTS)?;
            for extent in &extents {
                let place = queries.data(extent.data)?.ok_or_else(|| {
                    Refused::NotCopied(format!("no segment has its data record {}", extent.data))
                })?;
                check(place.segment)?;
            }
            match extents.last() {
                Some(last) if extents.len() == EXTENTS => from = last.range.end(),
                _ => return Ok(()),
            }
        }
    }

    /// The first pass.
    fn set_mark(&self, wanted: Wanted) -> Result<Candidate<'_>, Refused> {
        let Wanted {
            row,
            handle,
            mut mark,
        } = wanted;
        let held = self.busy.try_hold(&handle).ok_or(Refused::Busy)?;
        let flags = libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NOATIME | libc::O_NONBLOCK;
        let fd = match open_by_handle(self.mount.root(), handle.as_ref(), flags) {
            Ok(Opened::Fd(fd)) => fd,
            // It stays on the list until the next start.
            Ok(Opened::Stale) => return Err(Refused::Unknown),
            Err(error) => {
                if let Opened::Fd(fd) =
                    open_by_handle(self.mount.root(), handle.as_ref(), io::READ)?
                    && mark::look(fd.as_fd(), self.log_id)? == Marked::Whole
                {
                    lock(&self.residency).note_unmarked(Stub {
                        file: row.file,
                        handle: handle.to_bytes(),
                    });
                }
                return Err(cannot_open(error));
            }
        };
        mark.capability = space::capability(fd.as_fd())?;
        // Before the lease: who opens the file from here on is asked about, and refuses the lease.
        self.residents.protect(fd.as_fd())?;
        match self.mark_leased(fd.as_fd(), &handle, &row, &mark) {
            Ok(ctime) => Ok(Candidate {
                file: row.file,
                handle,
                fd,
                mark,
                ctime,
                _held: held,
            }),
            Err(refused) => {
                self.leave(row.file, &handle, fd.as_fd());
                Err(refused)
            }
        }
    }

    /// A file that does not become a stub. One that is a stub all the same, because its mark could not be
    /// taken back or was there before, stays protected.
    /// The caller holds the inode.
    fn leave(&self, file: FileId, handle: &Handle, fd: BorrowedFd<'_>) {
        let left = match mark::look(fd, self.log_id) {
            Ok(Marked::Whole) => {
                lock(&self.residency).note_unmarked(Stub {
                    file,
                    handle: handle.to_bytes(),
                });
                self.residents.unprotect(fd)
            }
            Ok(Marked::Stub(mark)) if mark.stage != Stage::Rests => {
                lock(&self.interrupted).push(handle.clone());
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = left {
            tracing::warn!(%error, "a file that is no stub is asked about");
        }
    }

    fn mark_leased(
        &self,
        fd: BorrowedFd<'_>,
        handle: &Handle,
        row: &InodeRow,
        mark: &StubMark,
    ) -> Result<stat::Time, Refused> {
        match mark::look(fd, self.log_id)? {
            Marked::Whole => {}
            Marked::Stub(mark) if mark.stage != Stage::Rests => return Err(Refused::Busy),
            _ => return Err(Refused::Already),
        }
        let lease = WriteLease::take(fd)?.ok_or(Refused::InUse)?;
        let stat = stat_of(fd)?;
        let logged = row.ctime == Some(time_of(stat.ctime))
            && row.mtime == time_of(stat.mtime)
            && row.size == stat.size;
        if !logged {
            return Err(Refused::Dirty);
        }
        space::set_mark(fd, &mark.to_bytes())?;
        // Whoever looked at the file before the lease may have had it ignored since `protect`; under the
        // lease nobody has it open, and later ones see the mark.
        let found = self.residents.unignore(fd).and_then(|()| stat_of(fd));
        let refused = match found {
            Ok(stat) if lease.holds() => return Ok(stat.ctime),
            Ok(_) => Refused::InUse,
            Err(error) => error.into(),
        };
        self.unmark(fd, handle, &lease)?;
        Err(refused)
    }

    /// Takes the mark back of a file that is as it was logged, while who wants to change it waits for the lease. It
    /// has a new change time by our own doing, which nobody else tells of, and can be released again with it.
    fn unmark(
        &self,
        fd: BorrowedFd<'_>,
        handle: &Handle,
        lease: &WriteLease<'_>,
    ) -> Result<(), Error> {
        space::remove_mark(fd)?;
        let ctime = stat_of(fd)?.ctime;
        if lease.keeps_waiting() {
            self.vouched.note(handle, ctime);
        }
        self.tell_of(handle);
        Ok(())
    }

    /// Has the file's new change time looked at.
    fn tell_of(&self, handle: &Handle) {
        let key = Key::Inode(handle.clone());
        self.shared.note([(key, Look::Attributes, Beside::Nothing)]);
    }

    /// The second pass: from the lease to the punch nothing waits for anything.
    fn punch(&self, candidate: &Candidate<'_>) -> Result<Released, Unpunched> {
        let fd = candidate.fd.as_fd();
        let look = || -> Result<_, Refused> {
            let lease = WriteLease::take(fd)?.ok_or(Refused::InUse)?;
            let before = stat_of(fd)?;
            if (before.ctime, before.size) != (candidate.ctime, candidate.mark.size) {
                return Err(Refused::Dirty);
            }
            let mtime = Mtime::keep(fd)?;
            if !lease.holds() {
                self.unmark(fd, &candidate.handle, &lease)?;
                return Err(Refused::InUse);
            }
            Ok((lease, before.blocks, mtime))
        };
        let (lease, before, mut mtime) = look().map_err(Unpunched::Whole)?;
        mtime.over(fd, || space::punch_all(fd, candidate.mark.size))?;
        if let Some(value) = &candidate.mark.capability {
            space::set_capability(fd, value)?;
        }
        let rests = StubMark {
            mtime: time_of(mtime.restore(fd)?),
            stage: Stage::Rests,
            capability: None,
            ..candidate.mark.clone()
        };
        space::set_mark(fd, &rests.to_bytes())?;
        drop(lease);
        let after = stat_of(fd)?;
        Ok(Released {
            freed: before.saturating_sub(after.blocks) * 512,
        })
    }

    /// The file is whole, and stays so.
    fn take_back(&self, candidate: &Candidate<'_>) {
        let fd = candidate.fd.as_fd();
        if let Err(error) = space::remove_mark(fd) {
            // It is a stub with all its bytes then.
            tracing::warn!(%error, "a file that was not released keeps its mark");
        }
        self.leave(candidate.file, &candidate.handle, fd);
    }
}

/// Why no file of a batch is released.
fn cannot_write(error: &Error) -> Refused {
    match error.errno() {
        Some(libc::EROFS) => Refused::ReadOnly,
        _ => Refused::Disk(error.to_string()),
    }
}

fn cannot_open(error: Error) -> Refused {
    match error.errno() {
        Some(libc::ETXTBSY | libc::EAGAIN) => Refused::InUse,
        Some(libc::EROFS) => Refused::ReadOnly,
        Some(libc::EPERM | libc::EACCES) => Refused::Sealed(error),
        _ => Refused::Sys(error),
    }
}
