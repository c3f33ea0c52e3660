//! Which files the kernel asks about: every file, or the stubs alone.
//!
//! A mark on the whole filesystem is safe without knowing anything, and makes every opening of every
//! file cost a question. Marks on the inodes of the stubs cost other files nothing, but need a list that
//! is known to hold every stub. So the filesystem's mark comes first, always; it goes when every stub on
//! a complete list has a mark of its own, and comes back before there are more stubs than `max`.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use tierfs::catalog::{self, Reader};
use tierfs::residency::{Residency, Stub};
use tierfs::stub::Stage;
use tierfs::{FileId, LogId};

use super::mark::{self, Marked};
use crate::shared::{Shared, lock};
use crate::sys::handle::{Handle, Opened, open_by_handle};
use crate::sys::mount::PrivateMount;
use crate::sys::permission::{Asked, PermissionGroup};
use crate::sys::{self, io, space};

/// Stubs read from the list, and added to it, at a time.
const PAGE: usize = 1000;

/// Why the marks could not be set.
#[derive(Debug, thiserror::Error)]
pub enum ResidentsError {
    /// The filesystem failed.
    #[error(transparent)]
    Sys(#[from] sys::Error),
    /// Catalog or list failed.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    /// The log has files whose inodes are not known, or gone: there may be stubs that nobody has seen.
    #[error("not every file that the log has is known on this disk yet")]
    NotYet,
    /// Stubs whose inodes cannot be had, and that nobody is known to have deleted: the first, and how many.
    #[error("file {0} and {n} others are released, and their inodes cannot be read, as if they were deleted: check the filesystem (fsck) if this stays", n = .1 - 1)]
    Missing(FileId, usize),
    /// The daemon is going down.
    #[error("the daemon stops")]
    Stopping,
}

/// What a file on the list is.
enum Listed {
    Stub,
    /// A crash interrupted its release or recall.
    Moving(Handle),
    /// It is deleted, the log says so, too.
    Gone,
    /// Its inode cannot be had, and the log has it still: who knows whether it is deleted.
    Missing,
}

#[derive(Debug)]
struct Mode {
    /// The mark on the whole filesystem is set.
    filesystem: bool,
    /// Inodes that have marks, as far as it is known.
    marks: u64,
    /// The list is being gone through: what is released meanwhile gets a mark in any case.
    settling: bool,
}

/// See the module.
pub struct Residents {
    group: PermissionGroup,
    asked: Asked,
    mount: Arc<PrivateMount>,
    max: u64,
    /// Snapshots make new inodes with the marks of others (btrfs), which raise no event: the mark on the
    /// filesystem stays.
    snapshots: bool,
    mode: Mutex<Mode>,
}

impl Residents {
    /// Sets the mark on the filesystem, if it is not there, and leaves the private mount alone.
    pub fn new(
        group: PermissionGroup,
        wanted: Asked,
        mount: Arc<PrivateMount>,
        max: u64,
        snapshots: bool,
    ) -> Result<Self, sys::Error> {
        let asked = group.mark_filesystem(mount.root(), wanted)?;
        group.ignore_mount(mount.root(), asked)?;
        Ok(Self {
            group,
            asked,
            mount,
            max,
            snapshots,
            mode: Mutex::new(Mode {
                filesystem: true,
                marks: 0,
                settling: false,
            }),
        })
    }

    /// What is asked.
    pub fn asked(&self) -> Asked {
        self.asked
    }

    /// Whether every file is asked about, and how many stubs have marks.
    pub fn mode(&self) -> (bool, u64) {
        let mode = lock(&self.mode);
        (mode.filesystem, mode.marks)
    }

    /// Makes sure that whoever opens this file is asked about, from now on. Before its release.
    pub fn protect(&self, file: BorrowedFd<'_>) -> Result<(), sys::Error> {
        let mut mode = lock(&self.mode);
        if !mode.filesystem && mode.marks >= self.max {
            self.group.mark_filesystem(self.mount.root(), self.asked)?;
            mode.filesystem = true;
            tracing::info!(
                stubs = mode.marks,
                "more stubs than stub_marks_max: every file is asked about now"
            );
        }
        if !mode.filesystem || mode.settling || mode.marks < self.max {
            self.group.mark_inode(file, self.asked)?;
            mode.marks += 1;
        }
        drop(mode);
        self.unignore(file)
    }

    /// Makes sure that the file is not ignored where every file is asked about.
    pub fn unignore(&self, file: BorrowedFd<'_>) -> Result<(), sys::Error> {
        self.group.unignore_inode(file, self.asked)
    }

    /// The file is whole, and has no mark any more.
    pub fn unprotect(&self, file: BorrowedFd<'_>) -> Result<(), sys::Error> {
        self.group.unmark_inode(file, self.asked)?;
        self.is_gone();
        Ok(())
    }

    /// An inode that had a mark has none any more, or is deleted.
    pub fn is_gone(&self) {
        let mut mode = lock(&self.mode);
        mode.marks = mode.marks.saturating_sub(1);
    }

    /// Whether the list is known to hold every stub of the disk as it is.
    pub fn is_complete(
        &self,
        residency: &Mutex<Residency>,
        fs_uuid: &[u8; 16],
    ) -> Result<bool, ResidentsError> {
        let mark = mark::of_disk(self.mount.root())?;
        Ok(lock(residency).is_complete(fs_uuid, mark.as_ref())?)
    }

    /// Gives every stub a mark of its own, and takes the filesystem's away. Where the list is not known
    /// to be complete, every file that the catalog knows is looked at first; the caller makes sure that
    /// it knows all. `moving` gets the stubs whose release or recall was interrupted, also where this fails.
    pub fn settle(
        &self,
        shared: &Shared,
        residency: &Mutex<Residency>,
        catalog: &Path,
        log_id: LogId,
        fs_uuid: &[u8; 16],
        moving: &mut Vec<Handle>,
    ) -> Result<(), ResidentsError> {
        {
            let mut mode = lock(&self.mode);
            (mode.settling, mode.marks) = (true, 0);
        }
        let settled = self.settle_all(shared, residency, catalog, log_id, fs_uuid, moving);
        lock(&self.mode).settling = false;
        settled
    }

    fn settle_all(
        &self,
        shared: &Shared,
        residency: &Mutex<Residency>,
        catalog: &Path,
        log_id: LogId,
        fs_uuid: &[u8; 16],
        moving: &mut Vec<Handle>,
    ) -> Result<(), ResidentsError> {
        if !self.is_complete(residency, fs_uuid)? {
            self.census(shared, residency, catalog, log_id)?;
            let mark = lock(residency).next_generation()?;
            space::set_mark(self.mount.root(), &mark.to_bytes())?;
            io::syncfs(self.mount.root())?;
            lock(residency).set_complete(fs_uuid, &mark)?;
        }
        let count = lock(residency).count()?;
        let too_many = count > self.max;
        let (mut after, mut missing) = (None, Vec::new());
        let reader = Reader::open(catalog)?;
        loop {
            let page = lock(residency).page(after, PAGE)?;
            for stub in &page {
                stopping(shared)?;
                match self.mark(stub, log_id, &reader, !too_many)? {
                    Listed::Moving(handle) => moving.push(handle),
                    Listed::Gone => lock(residency).note_unmarked(stub.clone()),
                    Listed::Missing => missing.push(stub.file),
                    Listed::Stub => {}
                }
            }
            match page.last() {
                Some(last) => after = Some(last.file),
                None => break,
            }
        }
        if let Some(first) = missing.first() {
            // Deleted while nobody watched, and not examined yet; or unreadable.
            return Err(ResidentsError::Missing(*first, missing.len()));
        }
        let mut mode = lock(&self.mode);
        if too_many {
            tracing::info!(
                stubs = count,
                "more stubs than stub_marks_max: every file is asked about"
            );
            return Ok(());
        }
        if self.snapshots {
            tracing::info!(
                stubs = mode.marks,
                "a snapshot may hold stubs that nobody knows: every file is asked about"
            );
            return Ok(());
        }
        // What was released meanwhile has its mark by `protect`.
        self.group
            .unmark_filesystem(self.mount.root(), self.asked)?;
        mode.filesystem = false;
        tracing::info!(stubs = mode.marks, "only stubs are asked about now");
        Ok(())
    }

    /// Looks at a stub, and gives it its mark where that is wanted.
    fn mark(
        &self,
        stub: &Stub,
        log_id: LogId,
        catalog: &Reader,
        ask: bool,
    ) -> Result<Listed, ResidentsError> {
        let Ok(handle) = Handle::from_bytes(&stub.handle) else {
            return Ok(Listed::Gone);
        };
        match open_by_handle(self.mount.root(), handle.as_ref(), io::READ)? {
            Opened::Fd(fd) => {
                if ask {
                    let mut mode = lock(&self.mode);
                    self.group.mark_inode(fd.as_fd(), self.asked)?;
                    mode.marks += 1;
                }
                Ok(match mark::look(fd.as_fd(), log_id)? {
                    Marked::Stub(mark) if mark.stage != Stage::Rests => Listed::Moving(handle),
                    // A release that runs just now has put it on the list, and not marked it yet.
                    _ => Listed::Stub,
                })
            }
            Opened::Stale => {
                let known = catalog.queries().inode(stub.file)?;
                let known = known.is_some_and(|row| row.handle.as_ref() == Some(&stub.handle));
                Ok(if known { Listed::Missing } else { Listed::Gone })
            }
        }
    }

    /// Looks at every file that the catalog knows.
    fn census(
        &self,
        shared: &Shared,
        residency: &Mutex<Residency>,
        catalog: &Path,
        log_id: LogId,
    ) -> Result<(), ResidentsError> {
        tracing::info!("the list of stubs is not known to be complete: every file is looked at");
        let reader = Reader::open(catalog)?;
        let (mut found, mut suspects) = (Vec::new(), Vec::new());
        let add = |found: &mut Vec<Stub>, suspects: &mut Vec<Stub>| -> Result<(), ResidentsError> {
            let mut list = lock(residency);
            list.add_found(found)?;
            list.add_suspects(suspects)?;
            found.clear();
            suspects.clear();
            Ok(())
        };
        reader.queries().for_each_content(|file, handle| {
            stopping(shared)?;
            let handle = handle.ok_or(ResidentsError::NotYet)?;
            let into = match self.look(handle, log_id)? {
                Marked::Whole => return Ok(()),
                Marked::Suspect(_) => &mut suspects,
                Marked::Stub(_) | Marked::Snapshot(_) => &mut found,
            };
            let handle = handle.to_vec();
            into.push(Stub { file, handle });
            if found.len() + suspects.len() >= PAGE {
                add(&mut found, &mut suspects)?;
            }
            Ok::<(), ResidentsError>(())
        })?;
        add(&mut found, &mut suspects)
    }

    fn look(&self, handle: &[u8], log_id: LogId) -> Result<Marked, ResidentsError> {
        let handle = Handle::from_bytes(handle).map_err(|_| ResidentsError::NotYet)?;
        match open_by_handle(self.mount.root(), handle.as_ref(), io::READ)? {
            Opened::Fd(fd) => Ok(mark::look(fd.as_fd(), log_id)?),
            // Deleted a moment ago, or of another disk than the log says: who knows what has its name.
            Opened::Stale => Err(ResidentsError::NotYet),
        }
    }
}

fn stopping(shared: &Shared) -> Result<(), ResidentsError> {
    if shared.stopping() {
        Err(ResidentsError::Stopping)
    } else {
        Ok(())
    }
}
