//! Reading directories by descriptor, in large pieces.
//!
//! One reader (and its buffer) serves any number of directories. Entries come in the order of the
//! filesystem, "." and ".." are left out. A directory that changes while it is read gives each
//! entry that was there all the time exactly once; no more is promised by POSIX, nor here.

#![allow(unsafe_code)] // getdents64 has no wrapper in libc crates

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use super::stat::FileKind;
use super::{Error, last_error};

/// Offset of the name in `struct linux_dirent64`.
const NAME: usize = 19;
const RECLEN: std::ops::Range<usize> = 16..18;
const TYPE: usize = 18;
/// The longest name that any supported filesystem has.
pub const NAME_MAX: usize = 255;
/// Small enough to stay in the cache of the processor, large enough for about 2,000 entries.
const BUFFER_BYTES: usize = 64 * 1024;

/// A buffer to read directories into.
pub struct DirReader {
    buf: Box<[u8]>,
}

impl Default for DirReader {
    fn default() -> Self {
        Self::new()
    }
}

impl DirReader {
    /// With the usual buffer.
    pub fn new() -> Self {
        Self {
            buf: vec![0; BUFFER_BYTES].into_boxed_slice(),
        }
    }

    /// The next piece of the directory, from where `dir`'s offset stands. `None`: the end. A
    /// directory that was removed ends at once.
    pub fn read(&mut self, dir: BorrowedFd<'_>) -> Result<Option<Entries<'_>>, Error> {
        let length = loop {
            // SAFETY: the pointer and length are those of `buf`, which outlives the call.
            let n = unsafe {
                libc::syscall(
                    libc::SYS_getdents64,
                    dir.as_raw_fd(),
                    self.buf.as_mut_ptr(),
                    self.buf.len(),
                )
            };
            if let Ok(n) = usize::try_from(n) {
                break n;
            }
            let source = last_error();
            match source.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::ENOENT) => return Ok(None),
                _ => return Err(Error::on_fd("getdents64", dir, source)),
            }
        };
        if length == 0 {
            return Ok(None);
        }
        match self.buf.get(..length) {
            Some(buf) => Ok(Some(Entries { buf, offset: 0 })),
            None => Err(malformed(length, "more bytes than there was room for")),
        }
    }

    /// Calls `each` for all entries of `dir`, from its beginning.
    pub fn for_each<E: From<Error>>(
        &mut self,
        dir: BorrowedFd<'_>,
        mut each: impl FnMut(Entry<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        nix::unistd::lseek(dir, 0, nix::unistd::Whence::SeekSet)
            .map_err(|e| Error::on_fd("lseek", dir, e))?;
        while let Some(entries) = self.read(dir)? {
            for entry in entries {
                each(entry?)?;
            }
        }
        Ok(())
    }
}

/// One name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'b> {
    /// Any bytes but NUL and slash.
    pub name: &'b OsStr,
    /// Where the filesystem says it.
    pub kind: Option<FileKind>,
    /// The inode's number; at a mount point that of the covered directory, and for a btrfs
    /// subvolume the subvolume's id, which statx does not say.
    pub ino: u64,
}

/// The entries of one piece. After an error it ends.
pub struct Entries<'b> {
    buf: &'b [u8],
    offset: usize,
}

impl<'b> Entries<'b> {
    /// Parses the bytes that getdents64 left.
    pub fn parse(buf: &'b [u8]) -> Self {
        Self { buf, offset: 0 }
    }

    fn decode(&self) -> Result<(Entry<'b>, usize), Error> {
        let rest = self.buf.get(self.offset..).unwrap_or_default();
        let bad = |why| malformed(self.offset, why);
        let head = rest
            .first_chunk::<NAME>()
            .ok_or_else(|| bad("shorter than an entry's header"))?;
        let ino = u64::from_ne_bytes(*head.first_chunk().unwrap_or(&[0; 8]));
        let length = usize::from(u16::from_ne_bytes([
            head[RECLEN.start],
            head[RECLEN.start + 1],
        ]));
        let name = rest
            .get(NAME..length)
            .ok_or_else(|| bad("an entry's length does not fit"))?;
        let end = name
            .iter()
            .position(|&b| b == 0)
            .ok_or_else(|| bad("a name has no end"))?;
        let name = &name[..end];
        if name.is_empty() || name.len() > NAME_MAX || name.contains(&b'/') {
            return Err(bad("a name is empty, too long or has a slash"));
        }
        let entry = Entry {
            name: OsStr::from_bytes(name),
            kind: FileKind::from_dirent(head[TYPE]),
            ino,
        };
        Ok((entry, length))
    }
}

fn malformed(offset: usize, why: &'static str) -> Error {
    Error::Malformed {
        what: "a directory's list of entries",
        offset,
        why,
    }
}

impl<'b> Iterator for Entries<'b> {
    type Item = Result<Entry<'b>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.offset < self.buf.len() {
            match self.decode() {
                Ok((entry, length)) => {
                    self.offset += length;
                    if !matches!(entry.name.as_bytes(), b"." | b"..") {
                        return Some(Ok(entry));
                    }
                }
                Err(e) => {
                    self.offset = self.buf.len();
                    return Some(Err(e));
                }
            }
        }
        None
    }
}
