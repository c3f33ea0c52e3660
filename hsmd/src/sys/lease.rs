//! Whether anybody could be writing to a file.
//!
//! A read lease is granted only while no descriptor is open for writing and no shared writable
//! mapping exists. It is given back at once: an opener that comes in between waits for
//! microseconds. The kernel tells a lease's holder by SIGIO, which kills by default:
//! [`ignore_sigio`] must have run first.

#![allow(unsafe_code)] // F_SETLEASE and the disposition of a signal have no checked wrapper

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::signal::{SigHandler, Signal, signal};

use super::stat::{Stat, stat_of};
use super::{Error, last_error};

/// Makes the process deaf to lease breaks. Call once at start.
pub fn ignore_sigio() -> Result<(), Error> {
    // SAFETY: ignoring a signal installs no handler, so nothing can run in a signal's context.
    unsafe { signal(Signal::SIGIO, SigHandler::SigIgn) }
        .map(drop)
        .map_err(|e| Error::call("signal SIGIO", "this process", e))
}

/// Whether at this moment nobody has the file open for writing or mapped shared-writable. `fd`
/// must be a regular file opened `O_RDONLY`. `false` also where a lease cannot be had at all.
pub fn nobody_writes(fd: BorrowedFd<'_>) -> Result<bool, Error> {
    if !set(fd, libc::F_RDLCK)? {
        return Ok(false);
    }
    set(fd, libc::F_UNLCK)
}

/// What the file is at a moment at which nobody has it open for writing or mapped shared-writable.
/// Whoever opens it for writing afterwards changes it after this. `None`: somebody has it open now.
pub fn stat_unwritten(fd: BorrowedFd<'_>) -> Result<Option<Stat>, Error> {
    if !set(fd, libc::F_RDLCK)? {
        return Ok(None);
    }
    let stat = stat_of(fd);
    set(fd, libc::F_UNLCK)?;
    stat.map(Some)
}

/// The file as it is while nobody has it open for writing: who wants to, waits until this is dropped.
#[derive(Debug)]
pub struct ReadLease<'f> {
    fd: BorrowedFd<'f>,
}

impl<'f> ReadLease<'f> {
    /// `None`: somebody has it open for writing. `fd` must be open `O_RDONLY`.
    pub fn take(fd: BorrowedFd<'f>) -> Result<Option<Self>, Error> {
        Ok(set(fd, libc::F_RDLCK)?.then(|| Self { fd }))
    }
}

impl Drop for ReadLease<'_> {
    fn drop(&mut self) {
        give_back(self.fd);
    }
}

/// The file as its only user: whoever opens it for anything waits until this is dropped, or until the
/// kernel loses patience (`/proc/sys/fs/lease-break-time`, 45 s), which [`WriteLease::holds`] tells.
#[derive(Debug)]
pub struct WriteLease<'f> {
    fd: BorrowedFd<'f>,
}

impl<'f> WriteLease<'f> {
    /// `None`: somebody has the file open or mapped, under whatever name, or is about to. `fd` must be
    /// the only descriptor of it.
    pub fn take(fd: BorrowedFd<'f>) -> Result<Option<Self>, Error> {
        Ok(set(fd, libc::F_WRLCK)?.then(|| Self { fd }))
    }

    /// Whether nobody waits for the file yet.
    pub fn holds(&self) -> bool {
        self.kind() == libc::F_WRLCK
    }

    /// Whether those who wait for the file wait still: nobody has changed it since the lease was taken.
    pub fn keeps_waiting(&self) -> bool {
        matches!(self.kind(), libc::F_WRLCK | libc::F_RDLCK)
    }

    fn kind(&self) -> libc::c_int {
        // SAFETY: F_GETLEASE takes no argument.
        unsafe { libc::fcntl(self.fd.as_raw_fd(), libc::F_GETLEASE) }
    }
}

impl Drop for WriteLease<'_> {
    fn drop(&mut self) {
        give_back(self.fd);
    }
}

fn give_back(fd: BorrowedFd<'_>) {
    if let Err(error) = set(fd, libc::F_UNLCK) {
        tracing::warn!(%error, "a lease cannot be given back; it ends when the file is closed");
    }
}

fn set(fd: BorrowedFd<'_>, kind: libc::c_int) -> Result<bool, Error> {
    loop {
        // SAFETY: F_SETLEASE takes an int and no pointer.
        let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, kind) };
        if result == 0 {
            return Ok(true);
        }
        let source = last_error();
        match source.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN) if kind != libc::F_UNLCK => return Ok(false),
            _ => return Err(Error::on_fd("fcntl F_SETLEASE", fd, source)),
        }
    }
}
