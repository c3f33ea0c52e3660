//! Marks that somebody took off: a stub without its mark would read as zeros, and be logged as such.
//!
//! Any program of root may do that, and knows nothing of it: `rsync -aX` to a released file takes away the attributes
//! that the source does not have, by the file's path, without opening it. So a file that is on the list of
//! stubs, is all hole, and has the size and time of a version with data gets its mark again: before it is opened
//! (the guard hands over what has no data), and before its content is read for the log.

use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use tierfs::LogId;
use tierfs::catalog::{self, Reader};
use tierfs::record::{Bits, Kind};
use tierfs::residency::{Residency, Stub};
use tierfs::stub::{Stage, StubMark};

use super::fill::FillError;
use crate::capture::facts::time_of;
use crate::shared::lock;
use crate::sys::handle::Handle;
use crate::sys::stat::{FileKind, stat_of};
use crate::sys::{Error, seek, space};

/// Whether a file has a size, and no data at all. Of what has as many blocks as bytes nothing more is asked.
pub fn is_hollow(fd: BorrowedFd<'_>) -> Result<bool, Error> {
    let stat = stat_of(fd)?;
    if stat.kind != FileKind::Regular || stat.size == 0 || stat.blocks >= stat.size.div_ceil(512) {
        return Ok(false);
    }
    let first = seek::ranges(fd, stat.size).next().transpose()?;
    Ok(first.is_some_and(|first| first.content == seek::Content::Hole && first.len == stat.size))
}

/// Gives a stub its mark again. `None`: it is none. The caller holds the inode, and has found it without a mark.
pub fn regain(
    fd: BorrowedFd<'_>,
    handle: &Handle,
    log_id: LogId,
    list: &Mutex<Residency>,
    catalog: &Reader,
) -> Result<Option<StubMark>, FillError> {
    if !is_hollow(fd)? {
        return Ok(None);
    }
    let key = handle.to_bytes();
    let known = catalog.snapshot(|queries| -> Result<_, catalog::Error> {
        let Some(file) = queries.file_by_handle(&key)? else {
            return Ok(None);
        };
        let has_data = !queries.extents(file, 0, 1)?.is_empty();
        Ok(queries.inode(file)?.filter(|_| has_data))
    })?;
    let stat = stat_of(fd)?;
    let Some(row) = known.filter(|row| {
        row.kind == Kind::Regular && row.size == stat.size && row.mtime == time_of(stat.mtime)
    }) else {
        return Ok(None);
    };
    let stub = Stub {
        file: row.file,
        handle: key,
    };
    let (Some(version), true) = (row.content_lsn, lock(list).has(&stub)?) else {
        return Ok(None);
    };
    let mark = StubMark {
        log_id,
        file: stub.file,
        version,
        size: row.size,
        mtime: row.mtime,
        handle: stub.handle,
        stage: Stage::Rests,
        seals: Bits(0),
        capability: None,
    };
    space::set_mark(fd, &mark.to_bytes())?;
    tracing::warn!(
        file = crate::sys::describe(fd),
        "somebody took the mark of a released file off (trusted.hsm); it has it again"
    );
    Ok(Some(mark))
}
