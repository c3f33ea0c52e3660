//! Walking the frames of a segment from the front: for the open segment, and for damaged ones.
//!
//! A scan never trusts an index. It gives every frame whose header and body are whole, says why it
//! stopped, and can look for the next whole frame behind a damage.

use std::fmt;
use std::sync::Arc;

use crate::frame::{self, DataEntry, FRAME_MAGIC, FRAME_PREFIX_LEN, FrameHeader, SKIPPABLE_HEAD};
use crate::ids::Hash;
use crate::record::{Record, SegmentHeader};
use crate::segment::{FrameEntry, INDEX_MAGIC, ReadAt, SegmentError, Source, decode_with_places};

/// A frame that a scan found whole.
#[derive(Clone, Debug)]
pub struct Found {
    /// As the index would name it, its data records included.
    pub entry: FrameEntry,
    /// As it stands in the file.
    pub header: FrameHeader,
    /// Its hash, which the next header names.
    pub hash: Hash,
    /// The records.
    pub records: Vec<Record>,
}

/// What a scan met.
#[derive(Debug)]
pub enum Step {
    /// A frame, whole and next in the chain.
    Frame(Box<Found>),
    /// No such frame begins here.
    Stop(Stop),
}

/// Why a scan stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// At the end of the file.
    End,
    /// At an index: the end of the frames of a sealed segment.
    Sealed,
    /// At bytes that are no valid frame; why.
    Invalid(String),
}

/// Walks the frames of a segment from the front.
pub struct Scan {
    pub(crate) name: String,
    source: Arc<dyn ReadAt>,
    len: u64,
    /// What the segment's header says.
    pub header: SegmentHeader,
    /// Where the next frame is expected.
    pub offset: u64,
    /// Its number, where the chain is unbroken.
    pub number: u32,
    /// What its header must name as the one before; `None` after a gap.
    pub chain: Option<Hash>,
}

impl Scan {
    /// Reads the segment's header.
    pub fn open(source: Arc<dyn ReadAt>, name: impl Into<String>) -> Result<Self, SegmentError> {
        let name = name.into();
        let from = Source {
            name: &name,
            bytes: &*source,
        };
        let (header, hash, offset) = from.header()?;
        let len = from.len()?;
        Ok(Self {
            name,
            source,
            len,
            header,
            offset,
            number: 0,
            chain: Some(hash),
        })
    }

    /// Reads the frame at the present offset, and steps behind it where it is whole.
    pub fn next_frame(&mut self) -> Result<Step, SegmentError> {
        let step = self.look(self.offset, self.chain)?;
        if let Step::Frame(found) = &step {
            self.offset = found.entry.end();
            self.number = found.header.number.saturating_add(1);
            self.chain = Some(found.hash);
        }
        Ok(step)
    }

    /// After [`Stop::Invalid`]: finds the next whole frame of this writer and segment behind the
    /// present offset, and steps in front of it. False where there is none.
    pub fn resync(&mut self) -> Result<bool, SegmentError> {
        const WINDOW: u64 = 1024 * 1024;
        let from = Source {
            name: &self.name,
            bytes: &*self.source,
        };
        let magic = FRAME_MAGIC.to_le_bytes();
        // Headers that are right and name long bodies that are wrong are the work of an enemy; he
        // does not get more than this out of it.
        let mut budget = self.len.saturating_mul(16).saturating_add(64 * WINDOW);
        let mut start = self.offset + 1;
        while start + (FRAME_PREFIX_LEN as u64) <= self.len {
            let len = WINDOW.min(self.len - start);
            let bytes = from.read(start, usize::try_from(len).unwrap_or(0))?;
            for at in bytes
                .windows(4)
                .enumerate()
                .filter_map(|(at, window)| (window == magic).then_some(at))
            {
                let offset = start + at as u64;
                match self.look(offset, None)? {
                    Step::Frame(_) => {
                        self.offset = offset;
                        self.chain = None;
                        return Ok(true);
                    }
                    Step::Stop(_) => budget = budget.saturating_sub(self.looked_at(offset)?),
                }
                if budget == 0 {
                    return Err(from.corrupt(
                        offset,
                        "it has too many headers of frames that are not there",
                    ));
                }
            }
            // The windows overlap, so that a magic number across their border is seen.
            start += (len - 3).max(1);
        }
        Ok(false)
    }

    /// How many bytes it took to find that there is no frame.
    fn looked_at(&self, offset: u64) -> Result<u64, SegmentError> {
        let from = Source {
            name: &self.name,
            bytes: &*self.source,
        };
        let left = self.len.saturating_sub(offset);
        if left < FRAME_PREFIX_LEN as u64 {
            return Ok(left);
        }
        let header = FrameHeader::decode(&from.array(offset)?);
        let body = header.map_or(0, |(header, _)| u64::from(header.compressed_len));
        Ok(FRAME_PREFIX_LEN as u64 + body.min(left))
    }

    fn look(&self, offset: u64, chain: Option<Hash>) -> Result<Step, SegmentError> {
        let from = Source {
            name: &self.name,
            bytes: &*self.source,
        };
        let stop = |what: &dyn fmt::Display| Ok(Step::Stop(Stop::Invalid(what.to_string())));
        let left = self.len.saturating_sub(offset);
        if left == 0 {
            return Ok(Step::Stop(Stop::End));
        }
        if left >= SKIPPABLE_HEAD as u64 && from.array::<4>(offset)? == INDEX_MAGIC.to_le_bytes() {
            return Ok(Step::Stop(Stop::Sealed));
        }
        if left < FRAME_PREFIX_LEN as u64 {
            return stop(&"the file ends within a frame header");
        }
        let (header, hash) = match FrameHeader::decode(&from.array(offset)?) {
            Ok(decoded) => decoded,
            Err(error) => return stop(&error),
        };
        if (header.epoch, header.segment) != (self.header.epoch, self.header.segment) {
            return stop(&"the frame belongs to another segment or writer");
        }
        if chain.is_some_and(|chain| chain != header.previous || header.number != self.number) {
            return stop(&"the frame does not continue the chain of headers");
        }
        if left - (FRAME_PREFIX_LEN as u64) < u64::from(header.compressed_len) {
            return stop(&"the file ends within a frame");
        }
        let body = from.read(
            offset + FRAME_PREFIX_LEN as u64,
            header.compressed_len as usize,
        )?;
        let records = match frame::unpack(&header, &body) {
            Ok(raw) => decode_with_places(&raw),
            Err(error) => return stop(&error),
        };
        let found = match records {
            Ok((records, data)) => found(offset, header, hash, records, data),
            Err(error) => return stop(&error),
        };
        match found.entry.check(&found.records) {
            Ok(()) => Ok(Step::Frame(Box::new(found))),
            Err(error) => stop(&error),
        }
    }
}

fn found(
    offset: u64,
    header: FrameHeader,
    hash: Hash,
    records: Vec<Record>,
    data: Vec<DataEntry>,
) -> Found {
    let entry = FrameEntry {
        offset,
        kind: header.kind,
        compressed_len: header.compressed_len,
        raw_len: header.raw_len,
        first_lsn: header.first_lsn,
        commits: header.commits,
        records: header.records,
        data,
    };
    Found {
        entry,
        header,
        hash,
        records,
    }
}
