//! A momentary copy of a file by reflink, for what changes faster than it can be read.

#![allow(unsafe_code)] // FICLONE

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::Error;

nix::ioctl_write_int!(ficlone, 0x94, 9);

/// A nameless file on the same filesystem that shares all of `source`'s present extents; `None`
/// where the filesystem (ext4) or the file's attributes do not allow that. `dir` is any directory
/// of that filesystem; on btrfs one with the same copy-on-write attribute. It vanishes when it is
/// closed. The events that this raises carry this process's pid.
pub fn clone_file(source: BorrowedFd<'_>, dir: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Error> {
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    let copy = match openat(dir, ".", flags, Mode::S_IRUSR | Mode::S_IWUSR) {
        Ok(copy) => copy,
        // No nameless files here, or the directory is immutable, or removed.
        Err(
            nix::Error::EOPNOTSUPP
            | nix::Error::EISDIR
            | nix::Error::EPERM
            | nix::Error::ENOENT
            | nix::Error::EROFS,
        ) => return Ok(None),
        Err(e) => return Err(Error::on_fd("open O_TMPFILE", dir, e)),
    };
    let argument = u64::from(source.as_raw_fd().unsigned_abs());
    // SAFETY: FICLONE takes a descriptor's number and no pointer; both descriptors are live.
    match unsafe { ficlone(copy.as_raw_fd(), argument) } {
        Ok(_) => Ok(Some(copy)),
        Err(
            nix::Error::EOPNOTSUPP
            | nix::Error::ENOTTY
            | nix::Error::ENOSYS
            | nix::Error::EXDEV
            | nix::Error::EINVAL
            | nix::Error::EPERM
            | nix::Error::ETXTBSY,
        ) => Ok(None),
        Err(e) => Err(Error::on_fd("ioctl FICLONE", source, e)),
    }
}
