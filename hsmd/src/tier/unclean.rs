//! Files whose last writes may not show in their times: the power failed, or the disk went.
//!
//! `fdatasync` makes bytes durable that were written over older ones, and not the change time that goes with them; that
//! follows seconds later. A loss of power in between leaves a file with new bytes at the times that the log knows, and
//! no event of it was heard. So once a mount did not end well, what was last changed before that is compared with the log
//! before it is released: what differs would be lost.

use std::fs;
use std::os::fd::BorrowedFd;
use std::path::Path;

use tierfs::FileId;
use tierfs::catalog::{self, InodeRow, Reader};

use crate::shared::Shared;
use crate::sys::{Error, io, stat};

/// Extents asked for at a time.
const EXTENTS: usize = 256;

/// Names this mount of the filesystem, among all there ever were on this machine.
pub fn mount_now(place: &Path) -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    // Before Linux 6.8 only another boot is noticed.
    let number = stat::mount_number(place).unwrap_or(0);
    format!("{} {number}", boot.trim_end())
}

/// What came of comparing a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// All bytes are those of the log.
    Same,
    /// Some are not.
    Differs,
    /// The daemon is going down.
    Stopped,
}

/// Whether a change time says that the content is the one that was logged.
pub fn is_doubted(row: &InodeRow, since: Option<i64>) -> bool {
    since.is_some_and(|since| row.ctime.is_none_or(|ctime| ctime.seconds <= since))
}

/// Compares all logged bytes of a file's newest version with the file.
pub fn compare(
    fd: BorrowedFd<'_>,
    file: FileId,
    reader: &Reader,
    shared: &Shared,
) -> Result<Compared, CompareError> {
    let (mut from, mut bytes) = (0, Vec::new());
    loop {
        let page = reader.snapshot(|queries| queries.extents(file, from, EXTENTS))?;
        for extent in &page {
            if shared.stopping() {
                return Ok(Compared::Stopped);
            }
            bytes.resize(usize::try_from(extent.range.len).unwrap_or(0), 0);
            let read = io::read_at(fd, &mut bytes, extent.range.offset)?;
            if read != bytes.len() || extent.check(&bytes).is_err() {
                return Ok(Compared::Differs);
            }
        }
        match page.last() {
            Some(last) if page.len() == EXTENTS => from = last.range.end(),
            _ => return Ok(Compared::Same),
        }
    }
}

/// Why a file cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The filesystem failed.
    #[error(transparent)]
    Sys(#[from] Error),
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
}
