//! The only place of the daemon that calls the kernel directly.
//!
//! Each submodule wraps one group of system calls behind checked types: descriptors are owned or
//! borrowed, never numbers; lengths that the kernel reports are checked before they are used; what
//! the kernel writes into a buffer is parsed, never cast. Nothing here decides anything: no policy,
//! no state beyond what the kernel itself holds, no retries other than of interrupted calls.
//!
//! All calls that name an entry take a directory descriptor and a name and never follow a symbolic
//! link, so that a path cannot be swapped under the daemon.

use std::fs;

use std::os::fd::{AsRawFd, BorrowedFd};

pub mod clone;
pub mod dir;
pub mod fanotify;
pub mod fiemap;
pub mod flags;
pub mod handle;
pub mod io;
pub mod lease;
pub mod link;
pub mod mount;
pub mod pagecache;
pub mod permission;
pub mod process;
pub mod quota;
pub mod schedule;
pub mod seek;
pub mod space;
pub mod stat;
pub mod superblock;
pub mod xattr;

#[cfg(test)]
pub(crate) mod testfs;
#[cfg(test)]
mod tests;

/// What can go wrong between the daemon and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("{call} on {object} failed: {source}{}", advice(.source))]
    Call {
        /// The system call, with the argument that tells its variant.
        call: &'static str,
        /// The path, or the descriptor's path, that it was tried on.
        object: String,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// The kernel handed over bytes that do not have the documented layout.
    #[error(
        "{what} is malformed at byte {offset}: {why}; treat it as lost and examine the filesystem again"
    )]
    Malformed {
        /// Which kind of buffer.
        what: &'static str,
        /// Where in the buffer.
        offset: usize,
        /// What is wrong there.
        why: &'static str,
    },
    /// The filesystem or kernel cannot do what is needed here.
    #[error("{object}: {what} is not possible: {why}")]
    Unsupported {
        /// The path or device.
        object: String,
        /// What was wanted.
        what: &'static str,
        /// The reason, and what to do.
        why: String,
    },
}

impl Error {
    /// A failed call on something that has a name.
    pub(crate) fn call(
        call: &'static str,
        object: impl Into<String>,
        source: impl Into<std::io::Error>,
    ) -> Self {
        Self::Call {
            call,
            object: object.into(),
            source: source.into(),
        }
    }

    /// A failed call on a descriptor; its path is looked up for the message.
    pub(crate) fn on_fd(
        call: &'static str,
        fd: BorrowedFd<'_>,
        source: impl Into<std::io::Error>,
    ) -> Self {
        let source = source.into();
        Self::call(call, describe(fd), source)
    }

    /// A failed call on an entry of a directory.
    pub(crate) fn on_entry(
        call: &'static str,
        dir: BorrowedFd<'_>,
        name: &[u8],
        source: impl Into<std::io::Error>,
    ) -> Self {
        let source = source.into();
        let object = if name.is_empty() {
            describe(dir)
        } else {
            format!("{}/{}", describe(dir), name.escape_ascii())
        };
        Self::call(call, object, source)
    }

    /// The errno of a failed call.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Call { source, .. } => source.raw_os_error(),
            Self::Malformed { .. } | Self::Unsupported { .. } => None,
        }
    }

    /// Whether this failure says that the named object is gone.
    pub fn is_gone(&self) -> bool {
        matches!(
            self.errno(),
            Some(libc::ENOENT | libc::ENOTDIR | libc::ESTALE)
        )
    }
}

/// What a person can do about the errors that have one usual cause.
fn advice(source: &std::io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            " (run as root with the capabilities of the shipped unit file)"
        }
        Some(libc::EMFILE) => " (raise LimitNOFILE=)",
        Some(libc::ENFILE) => " (raise the sysctl fs.file-max)",
        Some(libc::ENOSPC) => " (free space on that filesystem)",
        Some(libc::EIO) => " (the disk reports an error: see the kernel log)",
        Some(libc::EROFS) => " (the filesystem is mounted read-only)",
        Some(libc::ENOSYS) => " (this kernel lacks the call)",
        _ => "",
    }
}

/// The path of a descriptor, for messages only.
pub fn describe(fd: BorrowedFd<'_>) -> String {
    let number = fd.as_raw_fd();
    fs::read_link(format!("/proc/self/fd/{number}")).map_or_else(
        |_| format!("descriptor {number}"),
        |path| path.display().to_string(),
    )
}

/// The error that the last call left in `errno`.
fn last_error() -> std::io::Error {
    std::io::Error::last_os_error()
}

/// A file offset as the kernel's signed type.
fn to_off(value: u64, fd: BorrowedFd<'_>) -> Result<libc::off_t, Error> {
    libc::off_t::try_from(value).map_err(|_| {
        Error::on_fd(
            "offset beyond 2^63",
            fd,
            std::io::Error::from_raw_os_error(libc::EOVERFLOW),
        )
    })
}
