//! Suspect files: they have a mark, and nobody knows what belongs into them ([`Marked::Suspect`]).
//!
//! They must read as an error, not as the zeros that lie on the disk. So whoever opens one is asked about: they
//! are on the list of stubs as soon as the log knows them, and thus after a restart, too. A notice tells of
//! them until they are deleted, or somebody has taken their marks off.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tierfs::catalog::{self, Reader, Readers};
use tierfs::residency::{Residency, Stub};
use tierfs::{FileId, LogId, Time};

use super::fill::FillError;
use super::mark::{self, Marked};
use super::residents::Residents;
use super::{Busy, regain};
use crate::capture::hints::{Beside, Key, Look};
use crate::shared::{Shared, lock};
use crate::sys;
use crate::sys::handle::Handle;
use crate::sys::mount::PrivateMount;

/// The notice.
const SUSPECT: &str = "suspect";

/// What this works with.
pub struct Parts {
    /// Hints, notices.
    pub shared: Arc<Shared>,
    /// The filesystem, without events.
    pub mount: Arc<PrivateMount>,
    /// The kernel's marks.
    pub residents: Arc<Residents>,
    /// The list of stubs.
    pub residency: Arc<Mutex<Residency>>,
    /// Inodes that are worked on.
    pub busy: Arc<Busy>,
    /// Names.
    pub catalog: Readers,
    /// The log.
    pub log_id: LogId,
}

/// See the module.
pub struct Suspects {
    parts: Parts,
    /// Some are on the list.
    any: AtomicBool,
    /// The file that the notice names.
    named: AtomicU64,
    /// Those that the log does not know yet, and that are guarded already.
    new: Mutex<HashSet<Handle>>,
}

/// Why a suspect could not be dealt with.
#[derive(Debug, thiserror::Error)]
enum SuspectError {
    #[error(transparent)]
    Sys(#[from] sys::Error),
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    #[error(transparent)]
    Fill(#[from] FillError),
}

impl Suspects {
    /// Those of the list; see [`Self::tell`].
    pub fn new(parts: Parts) -> Self {
        Self {
            parts,
            any: AtomicBool::new(false),
            named: AtomicU64::new(0),
            new: Mutex::default(),
        }
    }

    /// A file was examined; `unreadable`: it is perhaps suspect. True: it is so no more, and leaves the list.
    pub fn examined(&self, handle: &Handle, file: Option<FileId>, unreadable: bool) -> bool {
        if !unreadable && !self.any.load(Ordering::Relaxed) {
            return false;
        }
        self.settle(handle, file).unwrap_or_else(|error| {
            tracing::error!(%error, "a file whose content is not known may be read, as zeros");
            false
        })
    }

    fn settle(&self, handle: &Handle, file: Option<FileId>) -> Result<bool, SuspectError> {
        let listed = match file {
            Some(file) => lock(&self.parts.residency).get_suspect(file)?,
            None => None,
        };
        let Parts { mount, busy, .. } = &self.parts;
        // A release or recall that works on it knows better.
        let Some(_held) = busy.try_hold(handle) else {
            return Ok(false);
        };
        let found = mark::find(mount.root(), handle, self.parts.log_id)?;
        match (found, listed) {
            (Some((fd, Marked::Suspect(_))), None) => self.guard(fd.as_fd(), handle, file)?,
            // It may have another name.
            (Some((_, Marked::Suspect(_))), Some(stub)) if self.is_named(stub.file) => self.tell(),
            (Some((fd, Marked::Whole)), Some(stub)) => {
                return self.without_mark(fd.as_fd(), handle, stub);
            }
            (Some((_, Marked::Stub(_))), Some(stub)) => {
                lock(&self.parts.residency).pass_over(&[stub.file], Time::now().seconds)?;
                self.tell();
            }
            _ => {}
        }
        Ok(false)
    }

    /// Somebody took its mark off. It is whole, or a stub whose mark was overwritten, which gets it again.
    fn without_mark(
        &self,
        fd: BorrowedFd<'_>,
        handle: &Handle,
        stub: Stub,
    ) -> Result<bool, SuspectError> {
        let Parts {
            residency,
            residents,
            catalog,
            log_id,
            ..
        } = &self.parts;
        let regain = |reader: &Reader| regain::regain(fd, handle, *log_id, residency, reader);
        if catalog.with(regain)?.is_some() {
            lock(residency).pass_over(&[stub.file], Time::now().seconds)?;
            self.tell();
            return Ok(false);
        }
        let mut list = lock(residency);
        // Unless a release has just put it there again.
        if list.get_suspect(stub.file)?.is_some() {
            list.note_unmarked(stub);
        }
        drop(list);
        residents.unprotect(fd)?;
        self.tell();
        Ok(true)
    }

    fn is_named(&self, file: FileId) -> bool {
        self.named.load(Ordering::Relaxed) == file.get()
    }

    /// Whoever opens it is asked about from now on.
    fn guard(
        &self,
        fd: BorrowedFd<'_>,
        handle: &Handle,
        file: Option<FileId>,
    ) -> Result<(), SuspectError> {
        if lock(&self.new).insert(handle.clone()) {
            self.parts.residents.protect(fd)?;
        }
        let Some(file) = file else {
            // Once more when the log knows it.
            let key = Key::Inode(handle.clone());
            let hint = (key, Look::Attributes, Beside::Nothing);
            self.parts.shared.note([hint]);
            return Ok(());
        };
        let stub = Stub {
            file,
            handle: handle.to_bytes(),
        };
        lock(&self.parts.residency).add_suspects(&[stub])?;
        lock(&self.new).remove(handle);
        self.tell();
        Ok(())
    }

    /// Tells how many there are, and names one.
    pub fn tell(&self) {
        let (first, count) = match lock(&self.parts.residency).suspects() {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, "how many files are suspect is not known");
                return;
            }
        };
        self.any.store(count > 0, Ordering::Relaxed);
        let Some(stub) = first else {
            self.parts.shared.well(SUSPECT);
            return;
        };
        self.named.store(stub.file.get(), Ordering::Relaxed);
        let files = if count == 1 {
            "1 file is".to_owned()
        } else {
            format!("{count} files are")
        };
        self.parts.shared.trouble(
            SUSPECT,
            false,
            format!("{files} suspect: what belongs into them is not known, they cannot be read, and nothing of them is logged"),
            format!("{}: {}", self.name_of(&stub), self.why(&stub)),
            "`tierctl find \"state = 'suspect'\"` names all; delete what is only a copy, or take the mark off a file that you know to be all there (setfattr -x trusted.hsm FILE), see hsm(7), STATES",
        );
    }

    /// Those that were deleted are told of no more.
    pub fn tell_if_any(&self) {
        if self.any.load(Ordering::Relaxed) {
            self.tell();
        }
    }

    fn why(&self, stub: &Stub) -> String {
        let root = self.parts.mount.root();
        let handle = Handle::from_bytes(&stub.handle).ok();
        let found = handle.map(|handle| mark::find(root, &handle, self.parts.log_id));
        match found {
            Some(Ok(Some((_, Marked::Suspect(why))))) => why,
            Some(Err(error)) => error.to_string(),
            _ => "it has changed since it was looked at".to_owned(),
        }
    }

    fn name_of(&self, stub: &Stub) -> String {
        let catalog = &self.parts.catalog;
        let path = catalog.with(|reader| reader.queries().path_of(stub.file));
        let path = path.ok().flatten();
        let path = path.and_then(|path| self.parts.shared.on_mount(&path));
        path.unwrap_or_else(|| format!("file {}", stub.file))
    }
}
