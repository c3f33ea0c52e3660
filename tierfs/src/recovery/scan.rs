//! Reading a segment that was never sealed: how far it is whole, and what lies behind.

use std::sync::Arc;

use crate::fold::Assembly;
use crate::ids::Lsn;
use crate::record::SegmentHeader;
use crate::scan::{Scan, Step, Stop};
use crate::segment::{FrameEntry, ReadAt, Segment, SegmentError};

/// What is in an unsealed segment.
pub(crate) struct Examined {
    /// `None` where it is torn.
    pub(crate) header: Option<SegmentHeader>,
    /// Bytes of the file.
    pub(crate) len: u64,
    /// The end of the last whole frame that continues the log.
    pub(crate) valid_end: u64,
    /// Why the log does not go on there.
    pub(crate) why: String,
    /// The frames up to `cut`.
    pub(crate) frames: Vec<FrameEntry>,
    /// The end of the last frame after which no transaction is half: so far everything is kept.
    pub(crate) cut: u64,
    /// The last commit before `cut`.
    pub(crate) last_lsn: Option<Lsn>,
    /// Index and trailer are there and right: it only lacks its name.
    pub(crate) complete: bool,
    /// Whole frames of the same writer behind `valid_end`.
    pub(crate) following: u64,
    /// The most bytes of the file that any frame in it says were durable.
    pub(crate) durable: u64,
}

impl Examined {
    /// How many bytes of the file are kept.
    pub(crate) fn kept(&self) -> u64 {
        if self.complete { self.len } else { self.cut }
    }

    /// The LSN after the last one that survives; `before` where there is none.
    pub(crate) fn next_lsn(&self, before: Lsn) -> Lsn {
        self.last_lsn.map_or(before, Lsn::next)
    }
}

/// Reads all of the file. `next` is the LSN that its first commit must have.
///
/// Damage is no error here, but failing disks and newer versions are.
pub(crate) fn examine<F: ReadAt + 'static>(
    file: &Arc<F>,
    name: &str,
    next: Lsn,
) -> Result<Examined, SegmentError> {
    let source: Arc<dyn ReadAt> = file.clone();
    let len = file.len().map_err(|source| SegmentError::Io {
        name: name.to_owned(),
        source,
    })?;
    let mut examined = Examined {
        header: None,
        len,
        valid_end: 0,
        why: String::new(),
        frames: Vec::new(),
        cut: 0,
        last_lsn: None,
        complete: false,
        following: 0,
        durable: 0,
    };
    let mut scan = match Scan::open(source.clone(), name) {
        Ok(scan) => scan,
        Err(SegmentError::Corrupt { what, .. }) => {
            examined.why = what;
            return Ok(examined);
        }
        Err(error) => return Err(error),
    };
    examined.header = Some(scan.header.clone());
    (examined.valid_end, examined.cut) = (scan.offset, scan.offset);
    let whole = walk(&mut scan, &mut examined, next)?;
    let (end, kept) = (examined.valid_end, examined.cut);
    while scan.resync()? {
        while let Step::Frame(found) = scan.next_frame()? {
            examined.following += 1;
            examined.durable = examined.durable.max(found.header.durable);
        }
    }
    examined.complete = whole
        && end == kept
        && match Segment::open(source, name) {
            Ok(segment) => segment.index.frames == examined.frames,
            Err(error @ (SegmentError::Io { .. } | SegmentError::NewerVersion { .. })) => {
                return Err(error);
            }
            Err(_) => false,
        };
    Ok(examined)
}

/// The frames from the front, as far as they continue the log. True where an index ends them.
fn walk(scan: &mut Scan, examined: &mut Examined, next: Lsn) -> Result<bool, SegmentError> {
    let mut assembly = Assembly::new(next);
    let mut pending = Vec::new();
    let mut last = None;
    loop {
        let found = match scan.next_frame()? {
            Step::Frame(found) => found,
            Step::Stop(stop) => {
                let at_index = stop == Stop::Sealed;
                examined.why = match stop {
                    Stop::End => "the file ends there".to_owned(),
                    Stop::Sealed => "its index is not whole".to_owned(),
                    Stop::Invalid(why) => why,
                };
                return Ok(at_index);
            }
        };
        examined.durable = examined.durable.max(found.header.durable);
        let first = examined.frames.is_empty() && pending.is_empty();
        let header = first.then_some(&scan.header);
        match assembly.push(found.records, header) {
            Ok(txns) => last = txns.last().map(|txn| txn.lsn).or(last),
            // A frame with right hashes and wrong content: not ours to repair.
            Err(why) => {
                scan.offset = found.entry.offset;
                examined.why = why;
                return Ok(false);
            }
        }
        examined.valid_end = found.entry.end();
        pending.push(found.entry);
        if assembly.is_clean() {
            examined.frames.append(&mut pending);
            examined.cut = examined.valid_end;
            examined.last_lsn = last;
        }
    }
}
