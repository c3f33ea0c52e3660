//! The immutable flag of files (`chattr +i`), which nix has no call for.
//!
//! Where a filesystem has no such flag (NFS, LTFS, FAT) or the process may not set it, that is an
//! answer, not an error: write-once then rests on file modes and on this crate alone.
#![allow(unsafe_code)] // two ioctls

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc::{self, c_int};

/// `FS_IMMUTABLE_FL` of linux/fs.h.
const IMMUTABLE: c_int = 0x10;

/// The kernel reads and writes a C int here, although the request number says long. Servers of FUSE
/// filesystems may copy a whole long, so there is room for one.
type Flags = [c_int; 2];

nix::ioctl_read_bad!(get_flags, libc::FS_IOC_GETFLAGS, Flags);
nix::ioctl_write_ptr_bad!(set_flags, libc::FS_IOC_SETFLAGS, Flags);

/// Whether the kernel now keeps everybody from changing a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protection {
    Immutable,
    Mutable,
    /// Not on this filesystem, or not for this process.
    Unsupported,
}

/// The flag as it is.
pub(crate) fn protection(file: &File) -> io::Result<Protection> {
    Ok(match flags(file)? {
        None => Protection::Unsupported,
        Some(flags) if flags[0] & IMMUTABLE != 0 => Protection::Immutable,
        Some(_) => Protection::Mutable,
    })
}

/// Sets (`true`) or clears the flag.
pub(crate) fn set_immutable(file: &File, on: bool) -> io::Result<Protection> {
    let Some(before) = flags(file)? else {
        return Ok(Protection::Unsupported);
    };
    let bit = if on { IMMUTABLE } else { 0 };
    let after: Flags = [before[0] & !IMMUTABLE | bit, 0];
    if after != before {
        // SAFETY: the descriptor is open during the call, `after` is readable for a long.
        let result = unsafe { set_flags(file.as_raw_fd(), &raw const after) };
        if unsupported(result)?.is_none() {
            return Ok(Protection::Unsupported);
        }
    }
    Ok(if on {
        Protection::Immutable
    } else {
        Protection::Mutable
    })
}

fn flags(file: &File) -> io::Result<Option<Flags>> {
    let mut flags: Flags = [0; 2];
    // SAFETY: the descriptor is open during the call, `flags` is writable for a long.
    let result = unsafe { get_flags(file.as_raw_fd(), &raw mut flags) };
    Ok(unsupported(result)?.map(|()| [flags[0], 0]))
}

fn unsupported(result: nix::Result<c_int>) -> io::Result<Option<()>> {
    use nix::errno::Errno;
    match result {
        Ok(_) => Ok(Some(())),
        Err(
            Errno::EOPNOTSUPP
            | Errno::ENOTTY
            | Errno::EPERM
            | Errno::EACCES
            | Errno::EINVAL
            | Errno::ENOSYS,
        ) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flag_round_trip_where_there_is_one() {
        let file = tempfile::tempfile().unwrap();
        // Without CAP_LINUX_IMMUTABLE or on tmpfs there is nothing to see.
        if set_immutable(&file, true).unwrap() == Protection::Immutable {
            assert_eq!(protection(&file).unwrap(), Protection::Immutable);
            assert_eq!(set_immutable(&file, false).unwrap(), Protection::Mutable);
            assert_eq!(protection(&file).unwrap(), Protection::Mutable);
        }
    }

    #[test]
    fn a_filesystem_without_flags_is_no_error() {
        let file = File::open("/proc/self/status").unwrap();
        assert_eq!(set_immutable(&file, true).unwrap(), Protection::Unsupported);
    }
}
