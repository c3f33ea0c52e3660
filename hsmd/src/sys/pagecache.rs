//! Leaving the page cache as it was.
//!
//! Archiving reads everything once; without care that would push out what users work with. Before
//! a file is read, [`CacheState::of`] notes which parts of it are cached; after it,
//! [`CacheState::restore`] drops the others. Where the kernel cannot say (before 6.5: mincore is
//! asked instead; a filesystem without a cache), nothing is dropped.

#![allow(unsafe_code)] // cachestat, mmap and mincore

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::{Error, last_error, to_off};

/// How finely a partly cached file is looked at.
const CHUNK_BYTES: u64 = 1 << 20;
/// cachestat(2), the same number on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// The machine's page size.
fn page_bytes() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(|| {
        // SAFETY: sysconf takes a number and reads nothing of ours.
        let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(bytes)
            .ok()
            .filter(|b| b.is_power_of_two())
            .unwrap_or(4096)
    })
}

/// Set once the kernel has said that it lacks cachestat.
static NO_CACHESTAT: AtomicBool = AtomicBool::new(false);

/// Which parts of a file were in the page cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheState {
    /// Nothing was: all may be dropped.
    Cold,
    /// Everything was, or nobody knows: nothing is dropped.
    Warm,
    /// Whether each MiB was in the cache at all.
    Mixed(Vec<bool>),
}

impl CacheState {
    /// Of the first `size` bytes of a file that is open for reading.
    pub fn of(fd: BorrowedFd<'_>, size: u64) -> Self {
        if size == 0 {
            return Self::Warm;
        }
        let pages = size.div_ceil(page_bytes());
        match cached_pages(fd, 0, size) {
            Ok(Some(0)) => Self::Cold,
            Ok(Some(cached)) if cached < pages => Self::chunks(fd, size),
            Ok(_) | Err(_) => Self::Warm,
        }
    }

    fn chunks(fd: BorrowedFd<'_>, size: u64) -> Self {
        let warm = |chunk: u64| {
            let offset = chunk * CHUNK_BYTES;
            let len = CHUNK_BYTES.min(size - offset);
            !matches!(cached_pages(fd, offset, len), Ok(Some(0)))
        };
        Self::Mixed((0..size.div_ceil(CHUNK_BYTES)).map(warm).collect())
    }

    /// Drops what was not cached before. Pages that are dirty or mapped stay.
    pub fn restore(&self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        match self {
            Self::Warm => Ok(()),
            Self::Cold => drop_cached(fd, 0, 0),
            Self::Mixed(warm) => {
                let mut offset = 0;
                for run in warm.chunk_by(|a, b| a == b) {
                    let len = u64::try_from(run.len())
                        .unwrap_or(0)
                        .saturating_mul(CHUNK_BYTES);
                    if run.first() == Some(&false) {
                        drop_cached(fd, offset, len)?;
                    }
                    offset += len;
                }
                Ok(())
            }
        }
    }
}

/// Drops the clean, unmapped pages of a range from the cache. `len` 0: to the end.
pub fn drop_cached(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), Error> {
    let (offset, len) = (to_off(offset, fd)?, to_off(len, fd)?);
    posix_fadvise(fd, offset, len, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        .map_err(|e| Error::on_fd("posix_fadvise DONTNEED", fd, e))
}

/// How many pages of a range (not empty) are in the cache. `None`: the kernel cannot say.
pub fn cached_pages(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Option<u64>, Error> {
    if !NO_CACHESTAT.load(Ordering::Relaxed) {
        match cachestat(fd, offset, len) {
            Err(e) if e.errno() == Some(libc::ENOSYS) => {
                NO_CACHESTAT.store(true, Ordering::Relaxed);
            }
            Err(e) if e.errno() == Some(libc::EOPNOTSUPP) => return Ok(None),
            answer => return answer.map(Some),
        }
    }
    mincore(fd, offset, len)
}

/// The kernel's `struct cachestat_range`.
#[repr(C)]
struct Extent {
    off: u64,
    len: u64,
}

fn cachestat(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<u64, Error> {
    let range = Extent { off: offset, len };
    // cached, dirty, under writeback, evicted, recently evicted
    let mut counts = [0_u64; 5];
    // SAFETY: `range` and `counts` have the layout and size of the kernel's structures and outlive
    // the call; the last argument is the flags, which must be 0.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            fd.as_raw_fd(),
            &raw const range,
            counts.as_mut_ptr(),
            0_u32,
        )
    };
    if result != 0 {
        return Err(Error::on_fd("cachestat", fd, last_error()));
    }
    Ok(counts[0])
}

/// The way of kernels before 6.5: map the range and ask page by page.
pub(super) fn mincore(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<Option<u64>, Error> {
    let from = offset - offset % page_bytes();
    let Ok(length) = usize::try_from(len.saturating_add(offset - from)) else {
        return Ok(None);
    };
    let failed = |call| Error::on_fd(call, fd, last_error());
    let start = to_off(from, fd)?;
    // SAFETY: a new mapping at an address of the kernel's choice, of a live descriptor; it is
    // never read through, so a file that shrinks cannot fault.
    let map = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_NONE,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            start,
        )
    };
    if map == libc::MAP_FAILED {
        return Err(failed("mmap"));
    }
    let page = usize::try_from(page_bytes()).unwrap_or(4096);
    let mut pages = vec![0_u8; length.div_ceil(page)];
    // SAFETY: the range is the mapping just made, and `pages` has a byte for each of its pages.
    let result = unsafe { libc::mincore(map, length, pages.as_mut_ptr()) };
    let error = (result != 0).then(|| failed("mincore"));
    // SAFETY: unmaps exactly the mapping made above, to which no reference exists.
    unsafe { libc::munmap(map, length) };
    if let Some(error) = error {
        return Err(error);
    }
    let cached = pages.iter().filter(|&&state| state & 1 != 0).count();
    Ok(u64::try_from(cached).ok())
}
