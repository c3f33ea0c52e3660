//! A file's space and times as release and recall change them.

#![allow(unsafe_code)] // fallocate by mode, futimens with omitted times, fsetxattr, fremovexattr

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::stat::Time;
use super::{Error, last_error, to_off};

/// The mark's name for the kernel.
pub const STUB_XATTR: &CStr = c"trusted.hsm";
const CAPABILITY: &CStr = c"security.capability";
/// Blocks are given back beyond the end, too: XFS keeps some there for files that grow.
const BEYOND: u64 = 64 << 20;
/// The largest block of the supported filesystems.
const BLOCK: u64 = 64 << 10;

fn fallocate(
    fd: BorrowedFd<'_>,
    mode: libc::c_int,
    offset: u64,
    len: u64,
    call: &'static str,
) -> Result<(), Error> {
    let (offset, len) = (to_off(offset, fd)?, to_off(len, fd)?);
    loop {
        // SAFETY: the call takes numbers and a live descriptor, no pointer.
        if unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, len) } == 0 {
            return Ok(());
        }
        let source = last_error();
        if source.raw_os_error() != Some(libc::EINTR) {
            return Err(Error::on_fd(call, fd, source));
        }
    }
}

/// Gives all data of a file of `size` bytes back; the size stays.
pub fn punch_all(fd: BorrowedFd<'_>, size: u64) -> Result<(), Error> {
    let len = size.next_multiple_of(BLOCK).saturating_add(BEYOND);
    let len = len.min(i64::MAX.unsigned_abs() / 2);
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    fallocate(fd, mode, 0, len, "fallocate FALLOC_FL_PUNCH_HOLE")
}

/// Takes space for a range that is a hole; it reads as zeros, and still counts as a hole.
pub fn reserve(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), Error> {
    fallocate(fd, libc::FALLOC_FL_KEEP_SIZE, offset, len, "fallocate")
}

/// Bytes that are promised to writers on a btrfs and not on the disk yet, which statvfs(3) counts as free.
/// 0 where the kernel does not say.
pub fn unwritten_on_btrfs(uuid: &str) -> u64 {
    let dir = std::path::Path::new("/sys/fs/btrfs")
        .join(uuid)
        .join("allocation");
    let read = |kind: &str, what: &str| -> u64 {
        let text = std::fs::read_to_string(dir.join(kind).join(what));
        text.ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    };
    // Small ones have data and metadata together.
    let all =
        ["data", "mixed"].map(|kind| read(kind, "bytes_may_use") + read(kind, "bytes_reserved"));
    all.iter().sum()
}

/// Writes all of `bytes`.
pub fn write_at(fd: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> Result<(), Error> {
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        let at = offset.saturating_add(u64::try_from(done).unwrap_or(u64::MAX));
        match nix::sys::uio::pwrite(fd, rest, to_off(at, fd)?) {
            Ok(n) => done += n,
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(Error::on_fd("pwrite", fd, e)),
        }
    }
    Ok(())
}

/// Sets the modification time; the access time stays.
pub fn set_mtime(fd: BorrowedFd<'_>, mtime: Time) -> Result<(), Error> {
    let times = [
        libc::timespec {
            tv_sec: 0,
            tv_nsec: libc::UTIME_OMIT,
        },
        libc::timespec {
            tv_sec: mtime.0,
            tv_nsec: i64::from(mtime.1),
        },
    ];
    // SAFETY: two whole timespecs that outlive the call.
    if unsafe { libc::futimens(fd.as_raw_fd(), times.as_ptr()) } == 0 {
        Ok(())
    } else {
        Err(Error::on_fd("futimens", fd, last_error()))
    }
}

/// Gives a file a new change time, and changes nothing else.
pub fn touch_ctime(fd: BorrowedFd<'_>) -> Result<(), Error> {
    let mode = super::stat::stat_of(fd)?.mode;
    nix::sys::stat::fchmod(fd, nix::sys::stat::Mode::from_bits_retain(mode))
        .map_err(|error| Error::on_fd("fchmod", fd, error))
}

/// Sets the stub mark.
pub fn set_mark(fd: BorrowedFd<'_>, value: &[u8]) -> Result<(), Error> {
    set_xattr(fd, STUB_XATTR, value, "fsetxattr trusted.hsm")
}

fn set_xattr(
    fd: BorrowedFd<'_>,
    name: &CStr,
    value: &[u8],
    call: &'static str,
) -> Result<(), Error> {
    // SAFETY: a NUL-terminated name, and pointer and length of `value`; both outlive the call.
    let result = unsafe {
        libc::fsetxattr(
            fd.as_raw_fd(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Error::on_fd(call, fd, last_error()))
    }
}

/// What a program may do beyond its user (capabilities(7)); the kernel takes it away with every write and
/// every punch. `None`: nothing.
pub fn capability(fd: BorrowedFd<'_>) -> Result<Option<Vec<u8>>, Error> {
    super::xattr::read_one(fd, CAPABILITY)
}

/// Gives it back.
pub fn set_capability(fd: BorrowedFd<'_>, value: &[u8]) -> Result<(), Error> {
    set_xattr(fd, CAPABILITY, value, "fsetxattr security.capability")
}

/// Takes the stub mark away; none is fine.
pub fn remove_mark(fd: BorrowedFd<'_>) -> Result<(), Error> {
    // SAFETY: a NUL-terminated name that outlives the call.
    if unsafe { libc::fremovexattr(fd.as_raw_fd(), STUB_XATTR.as_ptr()) } == 0 {
        return Ok(());
    }
    match last_error() {
        source if source.raw_os_error() == Some(libc::ENODATA) => Ok(()),
        source => Err(Error::on_fd("fremovexattr trusted.hsm", fd, source)),
    }
}

/// Makes a file's data and attributes durable.
pub fn sync_file(fd: BorrowedFd<'_>) -> Result<(), Error> {
    nix::unistd::fsync(fd).map_err(|error| Error::on_fd("fsync", fd, error))
}
