//! Where a file has data and where it has holes.

use std::os::fd::BorrowedFd;

use nix::unistd::{Whence, lseek};

use super::{Error, to_off};

/// What a range of a file consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes that must be read. May still be zeros.
    Data,
    /// Nothing is stored; it reads as zeros.
    Hole,
}

/// A part of a file; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// What it holds.
    pub content: Content,
}

/// The ranges of `[0, size)` in order, without gaps. `size` is the caller's: what lies beyond the
/// file's present end is a hole. Moves the descriptor's own offset. Ends after an error.
///
/// A file that changes meanwhile gives some mixture; the caller checks ctime for that.
pub fn ranges(fd: BorrowedFd<'_>, size: u64) -> Ranges<'_> {
    Ranges {
        fd,
        size,
        offset: 0,
        pending: None,
    }
}

/// See [`ranges`].
pub struct Ranges<'f> {
    fd: BorrowedFd<'f>,
    size: u64,
    offset: u64,
    pending: Option<Range>,
}

impl Ranges<'_> {
    /// Where data (or a hole) begins at or after `from`, at most at `size`.
    fn boundary(&self, whence: Whence, from: u64) -> Result<u64, Error> {
        match lseek(self.fd, to_off(from, self.fd)?, whence) {
            Ok(found) => Ok(u64::try_from(found).unwrap_or(from).clamp(from, self.size)),
            Err(nix::Error::ENXIO) => Ok(self.size),
            // No such knowledge here: all is data.
            Err(nix::Error::EINVAL | nix::Error::EOPNOTSUPP) => Ok(match whence {
                Whence::SeekHole => self.size,
                _ => from,
            }),
            Err(e) => Err(Error::on_fd("lseek SEEK_DATA/SEEK_HOLE", self.fd, e)),
        }
    }

    fn advance(&mut self) -> Result<Range, Error> {
        let range = |from: u64, to: u64, content| Range {
            offset: from,
            len: to - from,
            content,
        };
        let data = self.boundary(Whence::SeekData, self.offset)?;
        if data == self.size {
            return Ok(range(self.offset, self.size, Content::Hole));
        }
        // A hole at `data` itself means that the file was changed in between: take it as data.
        let end = match self.boundary(Whence::SeekHole, data)? {
            end if end == data => self.size,
            end => end,
        };
        let found = range(data, end, Content::Data);
        if data == self.offset {
            return Ok(found);
        }
        self.pending = Some(found);
        Ok(range(self.offset, data, Content::Hole))
    }
}

impl Iterator for Ranges<'_> {
    type Item = Result<Range, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.offset >= self.size {
            return None;
        }
        let next = match self.pending.take() {
            Some(range) => Ok(range),
            None => self.advance(),
        };
        match &next {
            Ok(range) => self.offset = range.offset + range.len,
            Err(_) => self.offset = self.size,
        }
        Some(next)
    }
}
