//! The content of one file at one moment, as a stream. Every piece is checked before it is given.

use std::io::Write;
use std::sync::Arc;

use tierfs::FileId;
use tierfs::catalog::{DataLocation, ExtentRow, InodeRow, Queries};
use tierfs::ids::Lsn;
use tierfs::record::Kind;

use crate::content::slice_of;
use crate::copies::SegmentCopies;
use crate::error::Error;
use crate::sources::Sources;

/// Extents that are asked for at once.
const EXTENTS: usize = 64;
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Where frames come from: [`Sources`], or the daemon's spool and volumes.
pub trait Frames {
    /// The copies of a segment.
    fn copies(&self, segment: tierfs::SegmentNo) -> Result<Arc<SegmentCopies>, Error>;
}

impl Frames for Sources {
    fn copies(&self, segment: tierfs::SegmentNo) -> Result<Arc<SegmentCopies>, Error> {
        self.open_copies(segment)
    }
}

/// Writes the content that `file` had at the end of transaction `at` (`None`: now) to `out`, holes
/// as zeros; gives its size. Fails before the first byte that no copy has; with a file that does not
/// exist then, or is no regular file, before any.
pub fn read_file(
    frames: &dyn Frames,
    queries: Queries<'_>,
    file: FileId,
    at: Option<Lsn>,
    out: &mut dyn Write,
) -> Result<u64, Error> {
    let then = at.map(|lsn| queries.at(lsn)).transpose()?;
    let inode = match &then {
        Some(then) => then.inode(file)?,
        None => queries.inode(file)?,
    };
    let size = regular_size(file, inode.as_ref())?;
    let mut stream = Stream {
        frames,
        queries,
        file,
        out,
        position: 0,
        last: None,
    };
    loop {
        let from = stream.position;
        let extents = match &then {
            Some(then) => then.extents(file, from, EXTENTS)?,
            None => queries.extents(file, from, EXTENTS)?,
        };
        for extent in &extents {
            stream.extent(extent)?;
        }
        if extents.len() < EXTENTS {
            stream.zeros(size)?;
            return Ok(size);
        }
    }
}

fn regular_size(file: FileId, inode: Option<&InodeRow>) -> Result<u64, Error> {
    let Some(inode) = inode else {
        return Err(Error::Nothing(format!(
            "file {file} does not exist at that moment"
        )));
    };
    if inode.kind != Kind::Regular {
        return Err(Error::Nothing(format!(
            "file {file} is a {:?}, which has no content",
            inode.kind
        )));
    }
    Ok(inode.size)
}

struct Stream<'s> {
    frames: &'s dyn Frames,
    queries: Queries<'s>,
    file: FileId,
    out: &'s mut dyn Write,
    position: u64,
    /// The frame that was used last: neighbours in a file are mostly neighbours in the log.
    last: Option<(DataLocation, Vec<u8>)>,
}

impl Stream<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let file = self.file;
        self.out
            .write_all(bytes)
            .map_err(|source| Error::Output { file, source })?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn zeros(&mut self, end: u64) -> Result<(), Error> {
        while self.position < end {
            let left = usize::try_from(end - self.position).unwrap_or(ZEROS.len());
            self.put(&ZEROS[..left.min(ZEROS.len())])?;
        }
        Ok(())
    }

    fn extent(&mut self, extent: &ExtentRow) -> Result<(), Error> {
        self.zeros(extent.range.offset)?;
        let lost = |causes: Vec<String>| Error::AllCopies {
            what: format!(
                "{} bytes at {} of file {}",
                extent.range.len, extent.range.offset, self.file
            ),
            causes,
            folded: None,
        };
        let Some(place) = self.queries.data(extent.data)? else {
            return Err(lost(vec![format!(
                "no segment that was read holds data record {}",
                extent.data
            )]));
        };
        let same = self.last.take().filter(|(last, _)| {
            (last.segment, last.frame_offset) == (place.segment, place.frame_offset)
        });
        let checked = |raw: Vec<u8>| {
            let bytes = slice_of(&raw, place.raw_offset, place.len, extent);
            let bytes = bytes.ok_or("the index names a place beyond the frame's end")?;
            extent.check(bytes)?;
            Ok::<_, String>(raw)
        };
        let raw = if let Some(raw) = same.and_then(|(_, raw)| checked(raw).ok()) {
            raw
        } else {
            let copies = self.frames.copies(place.segment)?;
            let read = copies.frame_checked(place.frame_offset, checked);
            read.map_err(|cause| lost(vec![cause]))?.0
        };
        let bytes = slice_of(&raw, place.raw_offset, place.len, extent).unwrap_or_default();
        self.put(bytes)?;
        self.last = Some((place, raw));
        Ok(())
    }
}
