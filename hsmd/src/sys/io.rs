//! Opening, reading and flushing by descriptor.
//!
//! Everything that is opened here for reading leaves atime alone, never follows a symbolic link in
//! the last component, and never waits: not for the other end of a fifo, and not for somebody's
//! lease.

#![allow(unsafe_code)] // sync_file_range has no checked wrapper

use std::ffi::OsString;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::NixPath;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;

use super::{Error, last_error, to_off};

pub use super::pagecache::CacheState;

/// Flags to read a regular file with, by name or by handle.
pub const READ: libc::c_int =
    libc::O_RDONLY | libc::O_NOATIME | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
/// Flags to list a directory with.
pub const READ_DIR: libc::c_int = READ | libc::O_DIRECTORY;
/// Flags to hold any inode without opening it: for stat, handles, xattrs and links.
pub const HOLD: libc::c_int = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;

/// Reads and writes a file that is open with `O_DIRECT`.
pub struct Direct<'f> {
    fd: BorrowedFd<'f>,
    room: Vec<u8>,
}

impl<'f> Direct<'f> {
    /// The largest block of any disk that can be mounted.
    const BLOCK: u64 = 4096;

    /// For a file.
    pub fn new(fd: BorrowedFd<'f>) -> Self {
        let room = Vec::new();
        Self { fd, room }
    }

    /// What of so many bytes at `offset` can be written.
    pub fn whole_blocks(offset: u64, len: usize) -> usize {
        let block = usize::try_from(Self::BLOCK).unwrap_or(1);
        if offset.is_multiple_of(Self::BLOCK) {
            len - len % block
        } else {
            0
        }
    }

    /// A place in memory for so many bytes, where a disk may look for them.
    fn room(&mut self, len: usize) -> &mut [u8] {
        let block = usize::try_from(Self::BLOCK).unwrap_or(1);
        self.room.resize(len + block, 0);
        let skip = self.room.as_ptr().align_offset(block).min(block);
        &mut self.room[skip..skip + len]
    }

    /// Writes whole blocks.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let fd = self.fd;
        let room = self.room(bytes.len());
        room.copy_from_slice(bytes);
        let mut done = 0;
        while done < bytes.len() {
            let at = to_off(offset + done as u64, fd)?;
            match nix::sys::uio::pwrite(fd, &room[done..], at) {
                Ok(0) => return Err(Error::on_fd("pwrite", fd, nix::Error::EIO)),
                Ok(more) => done += more,
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(Error::on_fd("pwrite", fd, error)),
            }
        }
        Ok(())
    }

    /// So many bytes at `offset`, or fewer at the file's end.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<&[u8], Error> {
        let block = usize::try_from(Self::BLOCK).unwrap_or(1);
        let before = usize::try_from(offset % Self::BLOCK).unwrap_or(0);
        let from = offset - offset % Self::BLOCK;
        let whole = (before + len).next_multiple_of(block);
        let fd = self.fd;
        let into = self.room(whole);
        let mut got = 0;
        while got < before + len {
            let at = to_off(from + got as u64, fd)?;
            match nix::sys::uio::pread(fd, &mut into[got..], at) {
                Ok(0) => break,
                Ok(more) => got += more,
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(Error::on_fd("pread", fd, error)),
            }
            // The next block begins at one: what ends within one is the file's end.
            if got % block != 0 {
                break;
            }
        }
        let end = (before + len).min(got);
        Ok(into.get(before..end).unwrap_or_default())
    }
}

/// Opens an entry of a directory. `None`: there is none, or it is not of the kind that `flags`
/// ask for (a link under `O_NOFOLLOW`, a file under `O_DIRECTORY`).
pub fn open_at<P>(
    dir: BorrowedFd<'_>,
    name: &P,
    flags: libc::c_int,
) -> Result<Option<OwnedFd>, Error>
where
    P: ?Sized + NixPath,
{
    let flags = OFlag::from_bits_retain(flags | libc::O_CLOEXEC);
    loop {
        match openat(dir, name, flags, Mode::empty()) {
            Ok(fd) => return Ok(Some(fd)),
            Err(nix::Error::EINTR) => {}
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::ELOOP) => return Ok(None),
            Err(e) => return Err(on_name("openat", dir, name, e)),
        }
    }
}

/// The target of a symbolic link. `None`: there is no such entry, or it is no link.
pub fn read_link_at<P>(dir: BorrowedFd<'_>, name: &P) -> Result<Option<OsString>, Error>
where
    P: ?Sized + NixPath,
{
    match readlinkat(dir, name) {
        Ok(target) => Ok(Some(target)),
        Err(nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::EINVAL) => Ok(None),
        Err(e) => Err(on_name("readlinkat", dir, name, e)),
    }
}

/// The target of the symbolic link that `link` holds ([`HOLD`]). `None`: it is no link.
pub fn read_link(link: BorrowedFd<'_>) -> Result<Option<OsString>, Error> {
    read_link_at(link, c"")
}

/// Reads at `offset` until `buf` is full or the file ends; gives the number of bytes read.
pub fn read_at(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<usize, Error> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = offset.saturating_add(u64::try_from(done).unwrap_or(u64::MAX));
        match nix::sys::uio::pread(fd, rest, to_off(at, fd)?) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(nix::Error::EINTR) => {}
            Err(e) => return Err(Error::on_fd("pread", fd, e)),
        }
    }
    Ok(done)
}

/// Reads all of `buf` at `offset`. A file that ends before is an error (EIO).
pub fn read_exact_at(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> Result<(), Error> {
    if read_at(fd, buf, offset)? == buf.len() {
        return Ok(());
    }
    let source = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
    Err(Error::on_fd("pread", fd, source))
}

/// Writes the filesystem of `fd` back to its device and waits for it.
pub fn syncfs(fd: BorrowedFd<'_>) -> Result<(), Error> {
    nix::unistd::syncfs(fd).map_err(|e| Error::on_fd("syncfs", fd, e))
}

/// Writes a range's dirty pages back and waits for them, so that stores through mappings that hid
/// behind a dirty page show in ctime from here on. Says nothing about durability. `len` 0: to the
/// end.
pub fn flush_range(fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), Error> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let (offset, len) = (to_off(offset, fd)?, to_off(len, fd)?);
    // btrfs writes what it compresses in two steps: the first pass only starts the second, and
    // another pass waits for that. Elsewhere the second pass finds nothing to do.
    for _ in 0..2 {
        // SAFETY: the call takes numbers and a live descriptor, no pointer.
        while unsafe { libc::sync_file_range(fd.as_raw_fd(), offset, len, flags) } != 0 {
            let source = last_error();
            if source.raw_os_error() != Some(libc::EINTR) {
                return Err(Error::on_fd("sync_file_range", fd, source));
            }
        }
    }
    Ok(())
}

fn on_name<P>(call: &'static str, dir: BorrowedFd<'_>, name: &P, source: nix::Error) -> Error
where
    P: ?Sized + NixPath,
{
    let mut shown = Vec::new();
    let _ = name.with_nix_path(|c| shown.extend_from_slice(c.to_bytes()));
    Error::on_entry(call, dir, &shown, source)
}
