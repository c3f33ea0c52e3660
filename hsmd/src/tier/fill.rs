//! Filling one stub: its logged bytes into its holes, and nowhere else.

use std::iter::Peekable;
use std::os::fd::BorrowedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use tierfs::catalog::{self, ExtentRow, Reader, Readers};
use tierfs::stub::{Stage, StubMark};

use super::full::{self, Full};
use super::mtime::Mtime;
use super::recall::Filling;
use crate::capture::facts::time_of;
use crate::fetch::{Content, FetchError, Fetcher};
use crate::sys::seek;
use crate::sys::stat::stat_of;
use crate::sys::{Error, io, space};

/// Extents asked for at a time.
const EXTENTS: usize = 256;
/// Of a file of this size space is taken before the first byte comes.
const RESERVE_FROM: u64 = 1 << 20;
/// A file of this size is fetched by some threads and written by another.
const APART_FROM: u64 = 4 << 20;
/// As many: decompressing and comparing takes about twice as long as writing.
const FETCHERS: usize = 2;
/// What is written is compared by blocks of this size.
const BLOCK: usize = 4096;
/// Chunks on the way from each to the one that writes; each is at most a megabyte.
const UNDER_WAY: usize = 4;

/// Why a file cannot be filled. It is the stub that it was.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The bytes cannot be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The filesystem failed.
    #[error(transparent)]
    Sys(#[from] Error),
    /// There is no room for it.
    #[error(transparent)]
    Full(#[from] Full),
    /// The catalog cannot say what is logged of it.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    /// What is in it is not what was logged.
    #[error("{0}")]
    Suspect(String),
    /// What belongs into it is not known.
    #[error("{0}")]
    Unknown(String),
    /// They are in memory, and the disk does not have them though it took them.
    #[error(
        "its bytes did not reach the disk; they are written anew when nobody has it open: try again in a moment"
    )]
    Unwritten,
    /// Nobody wants it any more.
    #[error("the recall was cancelled")]
    Cancelled,
}

impl FillError {
    /// What a program that waits for the file gets to hear.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Full(full) => full.errno,
            _ => libc::EIO,
        }
    }

    /// Whether trying again later can help.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Fetch(FetchError::Away(_)) => true,
            Self::Sys(error) => matches!(
                error.errno(),
                Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN)
            ),
            _ => false,
        }
    }
}

/// Where the bytes come from.
pub struct Filler<'f> {
    /// Fetches them.
    pub fetcher: &'f Fetcher,
    /// Says what they are.
    pub catalog: &'f Readers,
    /// Hears how far it is, and says when to stop.
    pub filling: &'f Filling,
}

impl Filler<'_> {
    /// Fills `fd`, which is open for reading and writing on the private mount. Gives the bytes written.
    /// Nothing is durable yet.
    pub fn fill(&self, fd: BorrowedFd<'_>, mark: &StubMark) -> Result<u64, FillError> {
        let end = stat_of(fd)?.size.min(mark.size);
        let empty = seek::ranges(fd, end)
            .next()
            .transpose()?
            .is_none_or(|first| first.content == seek::Content::Hole && first.len == end);
        let wanted = self.wanted(fd, mark, end)?;
        full::check(fd, wanted)?;
        let (mut mtime, moving) =
            begin(fd, mark).map_err(|error| full::of(fd, wanted, error.into()))?;
        let filled = full::held(fd, wanted, || self.fill_to(fd, mark, end, &mut mtime));
        let mut rests = false;
        if filled.is_err() && empty {
            // No half-filled file takes space that others need.
            let size = mark.size;
            match mtime.over(fd, || space::punch_all(fd, size)) {
                Ok(()) => rests = true,
                Err(error) => {
                    tracing::warn!(%error, "what was recalled of a file stays, though the rest could not be");
                }
            }
        }
        if let Some(value) = &moving.capability {
            space::set_capability(fd, value)?;
        }
        let done = StubMark {
            mtime: time_of(mtime.restore(fd)?),
            stage: if rests { Stage::Rests } else { Stage::Filled },
            capability: None,
            ..moving
        };
        if rests || filled.is_ok() {
            space::set_mark(fd, &done.to_bytes())?;
        }
        filled
    }

    /// Writes all logged bytes once more, past the page cache but for the end of the last block: `direct` is open
    /// with `O_DIRECT` for writing. Who reads the file meanwhile notices nothing. (After a failed write-back ext4
    /// takes the pages of memory for written, and writing to them again leaves its extents as they were.)
    pub fn write_again(
        &self,
        fd: BorrowedFd<'_>,
        direct: BorrowedFd<'_>,
        mark: &StubMark,
    ) -> Result<(), FillError> {
        let end = stat_of(fd)?.size.min(mark.size);
        let (mut mtime, moving) = begin(fd, mark)?;
        let mut direct = io::Direct::new(direct);
        self.catalog.with(|reader| {
            check_version(reader, mark)?;
            for_each_extent(reader, mark, end, |extent| {
                let bytes = self.fetch(reader, mark, extent)?;
                let offset = extent.range.offset;
                let bytes = clip(&bytes, offset, end.min(stat_of(fd)?.size));
                let (blocks, rest) = bytes.split_at(io::Direct::whole_blocks(offset, bytes.len()));
                mtime.over(fd, || direct.write(offset, blocks))?;
                mtime.over(fd, || {
                    space::write_at(fd, rest, offset + blocks.len() as u64)
                })?;
                self.filling.moves();
                Ok(())
            })
        })?;
        if let Some(value) = &moving.capability {
            space::set_capability(fd, value)?;
        }
        let done = StubMark {
            mtime: time_of(mtime.restore(fd)?),
            stage: Stage::Filled,
            capability: None,
            ..moving
        };
        Ok(space::set_mark(fd, &done.to_bytes())?)
    }

    /// Whether all logged bytes are on the disk, which `fd` reads past the page cache. The file may be in use:
    /// nothing is written.
    pub fn is_filled(&self, fd: BorrowedFd<'_>, mark: &StubMark) -> Result<bool, FillError> {
        let end = stat_of(fd)?.size.min(mark.size);
        let mut same = true;
        let mut direct = io::Direct::new(fd);
        self.catalog.with(|reader| {
            check_version(reader, mark)?;
            for_each_extent(reader, mark, end, |extent| {
                self.filling.moves();
                same = same && self.is_as_logged(&mut direct, reader, mark, extent, end)?;
                Ok(())
            })
        })?;
        Ok(same)
    }

    /// Whether the disk has an extent's bytes as far as `end`. Their hashes are in the catalog: no medium is asked,
    /// unless the file was cut within the extent.
    fn is_as_logged(
        &self,
        direct: &mut io::Direct<'_>,
        reader: &Reader,
        mark: &StubMark,
        extent: &ExtentRow,
        end: u64,
    ) -> Result<bool, FillError> {
        let range = extent.range;
        if range.end() <= end {
            let len = usize::try_from(range.len).unwrap_or(usize::MAX);
            return Ok(extent.check(direct.read(range.offset, len)?).is_ok());
        }
        let wanted = self.fetch(reader, mark, extent)?;
        let wanted = clip(&wanted, range.offset, end);
        Ok(direct.read(range.offset, wanted.len())? == wanted)
    }

    /// How much of the disk the file's bytes will take at most.
    fn wanted(&self, fd: BorrowedFd<'_>, mark: &StubMark, end: u64) -> Result<u64, FillError> {
        let there = stat_of(fd)?.blocks.saturating_mul(512);
        let mut logged = end;
        // A large file may have large holes.
        if end >= RESERVE_FROM && there < end {
            logged = 0;
            self.catalog.with(|reader| {
                for_each_extent(reader, mark, end, |extent| {
                    logged += extent.range.len;
                    Ok(())
                })
            })?;
        }
        Ok(logged.saturating_sub(there))
    }

    fn fill_to(
        &self,
        fd: BorrowedFd<'_>,
        mark: &StubMark,
        end: u64,
        mtime: &mut Mtime,
    ) -> Result<u64, FillError> {
        let catalog = self.catalog;
        catalog.with(|reader| {
            check_version(reader, mark)?;
            if end >= RESERVE_FROM {
                reserve(reader, fd, mark, end, mtime)?;
            }
            Ok::<(), FillError>(())
        })?;
        let mut writer = HoleWriter {
            fd,
            mark,
            holes: seek::ranges(fd, end).peekable(),
            mtime,
            written: 0,
            filling: self.filling,
        };
        if end < APART_FROM {
            catalog.with(|reader| {
                for_each_extent(reader, mark, end, |extent| {
                    let bytes = self.fetch(reader, mark, extent)?;
                    let offset = extent.range.offset;
                    writer.write(offset, clip(&bytes, offset, end))
                })
            })?;
            return Ok(writer.written);
        }
        let (outs, chunks): (Vec<_>, Vec<_>) =
            (0..FETCHERS).map(|_| sync_channel(UNDER_WAY)).unzip();
        std::thread::scope(|scope| {
            let fetching: Vec<_> = outs
                .into_iter()
                .enumerate()
                .map(|(turn, out)| scope.spawn(move || self.fetch_turns(mark, end, turn, &out)))
                .collect();
            let mut done = write_all(&mut writer, &chunks, end);
            // Else they would wait for room.
            drop(chunks);
            for thread in fetching {
                let fetched = thread.join().unwrap_or_else(|_| {
                    Err(FillError::Suspect("fetching its bytes panicked".to_owned()))
                });
                done = done.and(fetched);
            }
            done
        })?;
        Ok(writer.written)
    }

    /// Fetches every so many of the extents.
    fn fetch_turns(
        &self,
        mark: &StubMark,
        end: u64,
        turn: usize,
        out: &SyncSender<(u64, Content)>,
    ) -> Result<(), FillError> {
        let (mut number, mut wanted) = (0, true);
        self.catalog.with(|reader| {
            for_each_extent(reader, mark, end, |extent| {
                let mine = number % FETCHERS == turn;
                number += 1;
                if mine && wanted {
                    let bytes = self.fetch(reader, mark, extent)?;
                    // Nobody takes it where writing has failed.
                    wanted = out.send((extent.range.offset, bytes)).is_ok();
                }
                Ok(())
            })
        })
    }

    fn fetch(
        &self,
        reader: &Reader,
        mark: &StubMark,
        extent: &ExtentRow,
    ) -> Result<Content, FillError> {
        if self.filling.stops() {
            return Err(FillError::Cancelled);
        }
        Ok(self.fetcher.extent(reader.queries(), mark.file, extent)?)
    }
}

/// The mark says that bytes are on their way; so it can be told which time is the file's own.
fn begin(fd: BorrowedFd<'_>, mark: &StubMark) -> Result<(Mtime, StubMark), Error> {
    let mtime = if mark.stage == Stage::Moving {
        Mtime::regain(fd, (mark.mtime.seconds, mark.mtime.nanos))?
    } else {
        Mtime::keep(fd)?
    };
    let moving = StubMark {
        mtime: time_of(mtime.wanted()),
        stage: Stage::Moving,
        capability: space::capability(fd)?.or_else(|| mark.capability.clone()),
        ..mark.clone()
    };
    if moving != *mark {
        space::set_mark(fd, &moving.to_bytes())?;
    }
    Ok((mtime, moving))
}

/// Takes one chunk from each in turn, until one has no more, or failed.
fn write_all(
    writer: &mut HoleWriter<'_, '_>,
    chunks: &[Receiver<(u64, Content)>],
    end: u64,
) -> Result<(), FillError> {
    for from in chunks.iter().cycle() {
        let Ok((offset, bytes)) = from.recv() else {
            break;
        };
        writer.write(offset, clip(&bytes, offset, end))?;
    }
    Ok(())
}

/// What of the bytes at `offset` lies before `end`.
fn clip(bytes: &[u8], offset: u64, end: u64) -> &[u8] {
    let wanted = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
    bytes.get(..wanted).unwrap_or(bytes)
}

/// The log has the version that the mark names.
fn check_version(reader: &Reader, mark: &StubMark) -> Result<(), FillError> {
    let row = reader.snapshot(|queries| queries.at(mark.version)?.inode(mark.file))?;
    match row {
        Some(row) if row.size == mark.size && row.content_lsn == Some(mark.version) => Ok(()),
        _ => Err(FillError::Suspect(format!(
            "its mark names file {} as of transaction {}, with {} bytes, and the log has no such version",
            mark.file, mark.version, mark.size
        ))),
    }
}

/// All logged extents that begin before `end`. The catalog is asked for a page at a time: a recall may
/// take hours, and nothing is held meanwhile.
fn for_each_extent(
    reader: &Reader,
    mark: &StubMark,
    end: u64,
    mut each: impl FnMut(&ExtentRow) -> Result<(), FillError>,
) -> Result<(), FillError> {
    let mut from = 0;
    loop {
        let page = reader.snapshot(|queries| -> Result<_, catalog::Error> {
            queries.at(mark.version)?.extents(mark.file, from, EXTENTS)
        })?;
        for extent in page.iter().take_while(|extent| extent.range.offset < end) {
            each(extent)?;
        }
        match page.last() {
            Some(last) if page.len() == EXTENTS && last.range.end() < end => {
                from = last.range.end();
            }
            _ => return Ok(()),
        }
    }
}

/// Takes the space of all logged ranges, neighbours at once.
fn reserve(
    reader: &Reader,
    fd: BorrowedFd<'_>,
    mark: &StubMark,
    end: u64,
    mtime: &mut Mtime,
) -> Result<(), FillError> {
    let mut run: Option<(u64, u64)> = None;
    let mut take = |run: Option<(u64, u64)>| match run {
        Some((from, to)) => mtime.over(fd, || space::reserve(fd, from, to.min(end) - from)),
        None => Ok(()),
    };
    for_each_extent(reader, mark, end, |extent| {
        let (from, to) = (extent.range.offset, extent.range.end());
        match &mut run {
            Some((_, last)) if *last == from => *last = to,
            _ => take(run.replace((from, to)))?,
        }
        Ok(())
    })?;
    take(run)?;
    Ok(())
}

/// Writes into holes, in ascending order; what is there already must be what would be written. Nothing is written
/// beyond the file's end as it is at that moment: somebody may cut it by its path meanwhile, of which the kernel
/// does not ask everywhere (before Linux 6.14, in overlayfs, by NFS).
struct HoleWriter<'f, 'm> {
    fd: BorrowedFd<'f>,
    mark: &'m StubMark,
    /// As the file was before the first write: what is written changes only what was passed.
    holes: Peekable<seek::Ranges<'f>>,
    mtime: &'m mut Mtime,
    written: u64,
    filling: &'f Filling,
}

impl HoleWriter<'_, '_> {
    fn write(&mut self, mut offset: u64, mut bytes: &[u8]) -> Result<(), FillError> {
        if self.filling.stops() {
            return Err(FillError::Cancelled);
        }
        loop {
            bytes = clip(bytes, offset, stat_of(self.fd)?.size);
            if bytes.is_empty() {
                return Ok(());
            }
            let Some(range) = self.range_at(offset)? else {
                return Ok(());
            };
            let here = usize::try_from(range.offset + range.len - offset).unwrap_or(usize::MAX);
            let (part, rest) = bytes.split_at(here.min(bytes.len()));
            match range.content {
                seek::Content::Hole => {
                    let fd = self.fd;
                    self.mtime.over(fd, || space::write_at(fd, part, offset))?;
                    self.written += part.len() as u64;
                    self.filling.note(self.written);
                }
                seek::Content::Data => self.compare(part, offset)?,
            }
            offset += part.len() as u64;
            bytes = rest;
        }
    }

    /// The range that an offset lies in.
    fn range_at(&mut self, offset: u64) -> Result<Option<seek::Range>, FillError> {
        loop {
            match self.holes.peek() {
                Some(Ok(range)) if range.offset + range.len > offset => return Ok(Some(*range)),
                Some(Ok(_)) => drop(self.holes.next()),
                Some(Err(_)) => {
                    self.holes.next().transpose()?;
                }
                None => return Ok(None),
            }
        }
    }

    /// A write of ours that was killed may leave zeros behind its end which count as data, up to where the
    /// kernel keeps the file's pages together. They are filled; false: something else is there.
    fn complete(&mut self, wanted: &[u8], found: &[u8], offset: u64) -> Result<bool, FillError> {
        let mut missing = Vec::new();
        let blocks = wanted.chunks(BLOCK).zip(found.chunks(BLOCK)).enumerate();
        for (number, (wanted, found)) in blocks {
            let Some(from) = wanted.iter().zip(found).position(|(a, b)| a != b) else {
                continue;
            };
            let (Some(rest), Some(there)) = (wanted.get(from..), found.get(from..)) else {
                return Ok(false);
            };
            if there.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            missing.push((offset + (number * BLOCK + from) as u64, rest));
        }
        let fd = self.fd;
        for (at, rest) in missing {
            self.mtime.over(fd, || space::write_at(fd, rest, at))?;
            self.written += rest.len() as u64;
        }
        Ok(true)
    }

    fn compare(&mut self, wanted: &[u8], offset: u64) -> Result<(), FillError> {
        let mut found = vec![0; wanted.len()];
        io::read_exact_at(self.fd, &mut found, offset)?;
        let unfinished = self.mark.stage != Stage::Rests;
        if found == wanted || (unfinished && self.complete(wanted, &found, offset)?) {
            if unfinished {
                // Memory has it. Whether the disk does, somebody else may have been told.
                let fd = self.fd;
                self.mtime
                    .over(fd, || space::write_at(fd, wanted, offset))?;
            }
            return Ok(());
        }
        Err(FillError::Suspect(format!(
            "it holds bytes at {offset} that are not those of transaction {}: something wrote to it while hsmd did not guard it",
            self.mark.version
        )))
    }
}
