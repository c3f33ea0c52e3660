//! Which parts of a file are allocated but never written (FIEMAP, Documentation/filesystems/fiemap.rst).
//!
//! Such space reads as zeros and comes back as a hole. `SEEK_DATA` cannot tell it from data while clean
//! pages of it are cached, so the answer would depend on who has read the file lately.

#![allow(unsafe_code)] // FS_IOC_FIEMAP has no checked wrapper

use std::os::fd::{AsRawFd, BorrowedFd};

use super::Error;

/// Extents asked for at a time.
const BATCH: usize = 64;
/// Unwritten ranges remembered for one file; what lies beyond counts as data.
const RANGES_MAX: usize = 65_536;
const FLAG_SYNC: u32 = 0x1;
const EXTENT_LAST: u32 = 0x1;
const EXTENT_DELALLOC: u32 = 0x4;
const EXTENT_UNWRITTEN: u32 = 0x800;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Request {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [RawExtent; BATCH],
}

const _: () = assert!(size_of::<RawExtent>() == 56 && size_of::<Request>() == 32 + 56 * BATCH);
/// `_IOWR('f', 11, struct fiemap)`, whose size does not count the extents.
const FS_IOC_FIEMAP: libc::c_ulong = 0xC020_660B;

/// What is known of a file's allocation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Allocation {
    /// Ranges (offset, end) that are allocated but not written, ascending and joined.
    pub unwritten: Vec<(u64, u64)>,
    /// Some space is only reserved: it counts as data, and part of it may turn out to be none.
    pub reserved: bool,
}

/// How the first `size` bytes are allocated; nothing where the filesystem cannot say. Where some of it
/// was never written, or with `flush`, the file is flushed first: what is dirty is data, and
/// what is only reserved (XFS reserves more than is written) is decided about.
pub fn allocation(fd: BorrowedFd<'_>, size: u64, flush: bool) -> Result<Allocation, Error> {
    if !flush {
        let found = scan(fd, size, 0)?;
        if found.unwritten.is_empty() {
            return Ok(found);
        }
    }
    scan(fd, size, FLAG_SYNC)
}

fn scan(fd: BorrowedFd<'_>, size: u64, flags: u32) -> Result<Allocation, Error> {
    let (mut found, mut start) = (Allocation::default(), 0);
    while start < size && found.unwritten.len() < RANGES_MAX {
        let mut request = Request {
            start,
            length: size - start,
            flags,
            mapped: 0,
            count: 64,
            reserved: 0,
            extents: [RawExtent::default(); BATCH],
        };
        // SAFETY: the request has the layout of struct fiemap with room for `count` extents, and outlives
        // the call.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FIEMAP, &raw mut request) };
        if result < 0 {
            let error = super::last_error();
            return match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL) => Ok(Allocation::default()),
                _ => Err(Error::on_fd("ioctl FS_IOC_FIEMAP", fd, error)),
            };
        }
        let mapped = usize::try_from(request.mapped).unwrap_or(0).min(BATCH);
        let Some(last) = request.extents[..mapped].last() else {
            break;
        };
        for extent in &request.extents[..mapped] {
            let end = extent.logical.saturating_add(extent.length).min(size);
            found.reserved |= extent.flags & EXTENT_DELALLOC != 0;
            if extent.flags & EXTENT_UNWRITTEN == 0 || extent.logical >= end {
                continue;
            }
            match found.unwritten.last_mut() {
                Some(before) if before.1 >= extent.logical => before.1 = end.max(before.1),
                _ => found.unwritten.push((extent.logical, end)),
            }
        }
        let next = last.logical.saturating_add(last.length);
        if last.flags & EXTENT_LAST != 0 || next <= start {
            break;
        }
        start = next;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use super::super::testfs::{KINDS, TestFs};
    use super::*;

    #[test]
    fn preallocated_space_is_found_and_what_is_written_in_it_is_data() {
        for kind in KINDS {
            let fs = TestFs::new(kind);
            let file = std::fs::File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(fs.at("file"))
                .unwrap();
            nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, 1 << 20).unwrap();
            file.write_all_at(&[7; 8192], 65_536).unwrap();
            let found = allocation(file.as_fd(), 1 << 20, false).unwrap().unwritten;
            assert_eq!(found, [(0, 65_536), (73_728, 1 << 20)], "{kind}");
        }
    }
}
