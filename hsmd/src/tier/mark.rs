//! What a file's stub mark says, read from the file itself.
//!
//! Looking changes nothing: where the filesystem is frozen (`fsfreeze`), whoever changes it waits, perhaps for
//! long, and those who look have others waiting for them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use tierfs::LogId;
use tierfs::stub::{DiskMark, Stage, StubMark};

use crate::sys::handle::{Handle, Opened, handle_of, open_by_handle};
use crate::sys::seek::Content;
use crate::sys::space::{STUB_XATTR, remove_mark};
use crate::sys::stat::{FileKind, stat_of};
use crate::sys::{Error, io, seek, xattr};

/// What a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Marked {
    /// All its data is there. It may have a mark that came along with a copy of a file's attributes
    /// ([`tidy`]).
    Whole,
    /// Some or all of its data is only in the log.
    Stub(StubMark),
    /// It is a stub's like in a btrfs snapshot, and has of the data what the stub had. The mark is still
    /// that of the original.
    Snapshot(StubMark),
    /// It has a mark that is not its own and no data, or one that cannot be read: what it reads as is not what
    /// it is.
    Suspect(String),
}

/// Looks at the mark of a regular file. `None`: there is no such file.
pub fn find(
    root: BorrowedFd<'_>,
    handle: &Handle,
    log_id: LogId,
) -> Result<Option<(OwnedFd, Marked)>, Error> {
    let held = match open_by_handle(root, handle.as_ref(), io::HOLD)? {
        Opened::Fd(held) => held,
        Opened::Stale => return Ok(None),
    };
    if stat_of(held.as_fd())?.kind != FileKind::Regular {
        return Ok(None);
    }
    let Opened::Fd(fd) = open_by_handle(root, handle.as_ref(), io::READ)? else {
        return Ok(None);
    };
    let marked = look(fd.as_fd(), log_id)?;
    Ok(Some((fd, marked)))
}

/// Looks at the mark of an open file.
pub fn look(fd: BorrowedFd<'_>, log_id: LogId) -> Result<Marked, Error> {
    Ok(seen(fd, log_id)?.0)
}

/// Looks at the mark of an open file. One that came along with a copy of a file's attributes, on a file
/// that has data of its own, is removed.
pub fn tidy(fd: BorrowedFd<'_>, log_id: LogId) -> Result<Marked, Error> {
    let (marked, came_along) = seen(fd, log_id)?;
    if let Some(why) = came_along {
        tracing::info!(
            file = crate::sys::describe(fd),
            why,
            "a mark that came along is removed"
        );
        remove_mark(fd)?;
    }
    Ok(marked)
}

/// Where in the log the content of a stub is, near enough: the transaction of the version that a mark
/// names, its own or not. 0 where there is none.
pub fn place(fd: BorrowedFd<'_>) -> u64 {
    let value = xattr::read_one(fd, STUB_XATTR).ok().flatten();
    let mark = value.and_then(|value| StubMark::from_bytes(&value).ok());
    mark.map_or(0, |mark| mark.version.get())
}

/// What a file is, and why the mark that it has is not its own where it is whole.
fn seen(fd: BorrowedFd<'_>, log_id: LogId) -> Result<(Marked, Option<&'static str>), Error> {
    let Some(value) = xattr::read_one(fd, STUB_XATTR)? else {
        return Ok((Marked::Whole, None));
    };
    let own = handle_of(fd)?.to_bytes();
    let mark = match StubMark::from_bytes(&value) {
        // It may be this file's own, and then what data there is is not all.
        Err(error) => {
            let why = format!("its mark cannot be read: {error}");
            return Ok((Marked::Suspect(why), None));
        }
        Ok(mark) => mark,
    };
    if mark.handle == own && mark.log_id == log_id {
        return Ok((Marked::Stub(mark), None));
    }
    if mark.handle == own {
        let why = format!(
            "its content lies in another log, {}: rebuild the file from that one's volumes",
            mark.log_id
        );
        return Ok((Marked::Suspect(why), None));
    }
    if mark.log_id == log_id && mark.stage != Stage::There && is_snapshot(&mark.handle, &own) {
        return Ok((Marked::Snapshot(mark), None));
    }
    let why =
        "its mark belongs to another inode (it is a copy of a stub that was made without its data)";
    // A file that is all there but for its mark may consist of holes.
    let was_there = matches!(mark.stage, Stage::Filled | Stage::There);
    if was_there || has_data(fd)? {
        return Ok((Marked::Whole, Some(why)));
    }
    Ok((Marked::Suspect(why.to_owned()), None))
}
/// The mark of the filesystem whose root directory this is. One that cannot be read is none.
pub fn of_disk(root: BorrowedFd<'_>) -> Result<Option<DiskMark>, Error> {
    let value = xattr::read_one(root, STUB_XATTR)?;
    Ok(value.and_then(|value| DiskMark::from_bytes(&value).ok()))
}

/// Whether two handles are those of an inode and of its like in another subvolume of btrfs.
fn is_snapshot(mark: &[u8], own: &[u8]) -> bool {
    let of = |bytes: &[u8]| {
        let handle = Handle::from_bytes(bytes).ok()?;
        handle.as_ref().btrfs_root()?;
        // Object id and generation; the subvolume lies between.
        Some((bytes.get(4..12)?.to_vec(), bytes.get(20..24)?.to_vec()))
    };
    of(mark).is_some_and(|mark| of(own) == Some(mark))
}

/// Whether a file has any data (or cannot have: it is empty).
pub fn has_data(fd: BorrowedFd<'_>) -> Result<bool, Error> {
    let size = stat_of(fd)?.size;
    let first = seek::ranges(fd, size).next().transpose()?;
    Ok(first.is_none_or(|first| first.content == Content::Data || first.len < size))
}
