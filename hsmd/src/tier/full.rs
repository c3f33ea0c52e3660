//! Whether there is room for a file's bytes, and whose room that would be.
//!
//! The kernel decides, as it would for the file's owner: his quota holds ([`crate::sys::quota`]). What ext4
//! keeps for root is not touched, either: a recall is nobody's emergency. The room is looked at before
//! the first byte, so that a file that does not fit stays what it was: XFS refuses to punch out what was written
//! of it once the owner's quota is used up to the last block.

use std::os::fd::BorrowedFd;

use nix::sys::statfs::{BTRFS_SUPER_MAGIC, fstatfs};
use nix::sys::statvfs::fstatvfs;

use super::fill::FillError;
use crate::sys::stat::stat_of;
use crate::sys::{Error, quota};

/// A file's bytes have no room.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.text())]
pub struct Full {
    /// `ENOSPC`, or `EDQUOT`.
    pub errno: i32,
    /// So much is wanted.
    pub wanted: u64,
    /// So much seems to be free.
    available: u64,
    /// The file's owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Why no room could be made.
    why: Option<String>,
}

impl Full {
    fn new(fd: BorrowedFd<'_>, errno: i32, wanted: u64) -> Result<Self, Error> {
        let stat = stat_of(fd)?;
        Ok(Self {
            errno,
            wanted,
            available: available(fd)?,
            uid: stat.uid,
            gid: stat.gid,
            why: None,
        })
    }

    /// How much room there must be for another try; `None` where more of it does not help, since the
    /// filesystem has enough and something else limits the file. What btrfs calls free is not all to be had.
    pub fn more(&self, fd: BorrowedFd<'_>) -> Option<u64> {
        if self.available < self.wanted {
            return Some(self.wanted);
        }
        let fs = fstatfs(fd).ok()?;
        let vague = fs.filesystem_type() == BTRFS_SUPER_MAGIC;
        vague.then(|| self.available.saturating_add(self.wanted))
    }

    /// With the reason why no room could be made.
    #[must_use]
    pub fn because(self, why: String) -> Self {
        Self {
            why: Some(why),
            ..self
        }
    }

    fn text(&self) -> String {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let why = self
            .why
            .as_ref()
            .map_or(String::new(), |why| format!("; {why}"));
        if self.errno == libc::EDQUOT {
            return format!(
                "its {} MiB are more than the quota of its owner (user {}, group {}) has left{why}",
                mib(self.wanted),
                self.uid,
                self.gid
            );
        }
        format!(
            "there is no room for its {} MiB, {} MiB of the filesystem are free{why}",
            mib(self.wanted),
            mib(self.available)
        )
    }
}

/// What others than root can still write.
fn available(fd: BorrowedFd<'_>) -> Result<u64, Error> {
    let stat = fstatvfs(fd).map_err(|error| Error::on_fd("fstatvfs", fd, error))?;
    Ok(stat.blocks_available().saturating_mul(stat.fragment_size()))
}

/// Whether so many bytes of a file have room on its filesystem.
pub fn check(fd: BorrowedFd<'_>, wanted: u64) -> Result<(), FillError> {
    if wanted == 0 {
        return Ok(());
    }
    if available(fd)? < wanted {
        return Err(Full::new(fd, libc::ENOSPC, wanted)?.into());
    }
    let stat = stat_of(fd)?;
    if quota::left(fd, stat.uid, stat.gid).is_some_and(|left| left < wanted) {
        return Err(Full::new(fd, libc::EDQUOT, wanted)?.into());
    }
    Ok(())
}

/// Writes to a file as its owner may, and tells what of an error is that there is no room.
pub fn held<T>(
    fd: BorrowedFd<'_>,
    wanted: u64,
    action: impl FnOnce() -> Result<T, FillError>,
) -> Result<T, FillError> {
    quota::held_to(action)?.map_err(|error| of(fd, wanted, error))
}

/// What of an error is that there is no room.
pub fn of(fd: BorrowedFd<'_>, wanted: u64, error: FillError) -> FillError {
    let errno = match &error {
        FillError::Sys(error) => error.errno(),
        _ => None,
    };
    match errno {
        Some(errno @ (libc::ENOSPC | libc::EDQUOT)) => {
            Full::new(fd, errno, wanted).map_or(error, FillError::Full)
        }
        _ => error,
    }
}
