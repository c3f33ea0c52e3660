//! Transactions out of segments, and into the catalog.
//!
//! [`Transactions`] reads the frames of operations of one segment (never those of data) and gives
//! whole transactions, checked: kinds, counts, LSNs, the repeated header. [`fold_segment`] brings
//! a segment into a [`Catalog`]: where its data lies, always; its transactions, up to a target.

use std::collections::VecDeque;

use crate::catalog::{self, Catalog, DataPlace, Place};
use crate::frame::FrameKind;
use crate::ids::{Hash, LogId, Lsn};
use crate::record::{Commit, Op, Record, SegmentHeader, Txn};
use crate::segment::{FrameEntry, Segment, SegmentError};

/// Puts transactions together, frame by frame.
#[derive(Debug)]
pub(crate) struct Assembly {
    next: Lsn,
    ops: Vec<Op>,
}

impl Assembly {
    /// `next` is the LSN of the first commit to come.
    pub(crate) fn new(next: Lsn) -> Self {
        Self {
            next,
            ops: Vec::new(),
        }
    }

    /// The LSN of the next commit.
    pub(crate) fn next_lsn(&self) -> Lsn {
        self.next
    }

    /// True where no transaction is begun and not yet committed.
    pub(crate) fn is_clean(&self) -> bool {
        self.ops.is_empty()
    }

    /// Takes the records of the next frame, which are those that its header names; `header` where it
    /// is the first of its segment. Gives the transactions that end in it, or says what is wrong.
    pub(crate) fn push(
        &mut self,
        records: Vec<Record>,
        header: Option<&SegmentHeader>,
    ) -> Result<Vec<Txn>, String> {
        let mut records = records.into_iter();
        if let Some(header) = header {
            match records.next() {
                Some(Record::Segment(repeated)) if repeated == *header => {}
                _ => return Err("the first record does not repeat the segment header".to_owned()),
            }
        }
        let mut txns = Vec::new();
        for record in records {
            match record {
                Record::Op(op) => self.ops.push(op),
                Record::Commit(commit) => txns.push(self.commit(&commit)?),
                Record::Data(_) if !self.is_clean() => {
                    return Err("data stands between the operations of a transaction".to_owned());
                }
                Record::Segment(_) => {
                    return Err("a segment header stands between other records".to_owned());
                }
                Record::Data(_) | Record::Unknown(_) => {}
            }
        }
        Ok(txns)
    }

    fn commit(&mut self, commit: &Commit) -> Result<Txn, String> {
        if commit.lsn != self.next {
            return Err(format!(
                "transaction {} comes where {} is expected",
                commit.lsn, self.next
            ));
        }
        if commit.ops != self.ops.len() as u64 {
            return Err(format!(
                "transaction {} has {} operations, its commit says {}",
                commit.lsn,
                self.ops.len(),
                commit.ops
            ));
        }
        self.next = self.next.next();
        Ok(Txn {
            lsn: commit.lsn,
            time: commit.time,
            wall: commit.wall,
            ops: std::mem::take(&mut self.ops),
        })
    }
}

/// The transactions of a segment, in order. Ends after the first error.
///
/// A transaction never spans segments: operations without a commit at the end of a sealed segment
/// are damage, at that of a salvaged or open one they are dropped.
pub struct Transactions<'s> {
    segment: &'s Segment,
    assembly: Assembly,
    frame: usize,
    ready: VecDeque<(Txn, Place)>,
    ended: bool,
}

impl<'s> Transactions<'s> {
    /// The transactions of `segment`.
    pub fn new(segment: &'s Segment) -> Self {
        Self {
            segment,
            assembly: Assembly::new(segment.header.first_lsn),
            frame: 0,
            ready: VecDeque::new(),
            ended: false,
        }
    }

    fn read_frame(&mut self, number: usize) -> Result<(), SegmentError> {
        let entry = &self.segment.index.frames[number];
        let records = self.segment.read_records(number)?;
        let first = entry.offset == self.segment.frames_at;
        let header = first.then_some(&self.segment.header);
        let txns = self
            .assembly
            .push(records, header)
            .map_err(|what| self.segment.corrupt(entry.offset, what))?;
        let place = Place {
            segment: self.segment.header.segment,
            frame_offset: entry.offset,
        };
        self.ready.extend(txns.into_iter().map(|txn| (txn, place)));
        Ok(())
    }

    /// What can be said only at the end of a sealed segment.
    fn check_end(&self) -> Result<(), SegmentError> {
        let Some(trailer) = &self.segment.trailer else {
            return Ok(());
        };
        let at = trailer.index_offset;
        if !self.assembly.is_clean() {
            return Err(self
                .segment
                .corrupt(at, "its last transaction has no commit"));
        }
        let last = self.assembly.next_lsn().prev();
        let (first_lsn, last) = (
            self.segment.header.first_lsn,
            last.filter(|last| *last >= self.segment.header.first_lsn),
        );
        if (trailer.first_lsn, trailer.last_lsn) != (last.map(|_| first_lsn), last) {
            return Err(self
                .segment
                .corrupt(at, "its transactions are not those that the trailer names"));
        }
        Ok(())
    }
}

impl Iterator for Transactions<'_> {
    type Item = Result<(Txn, Place), SegmentError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(ready) = self.ready.pop_front() {
                return Some(Ok(ready));
            }
            if self.ended {
                return None;
            }
            let frames = &self.segment.index.frames;
            let step = match frames.get(self.frame) {
                None => {
                    self.ended = true;
                    self.check_end()
                }
                Some(entry) if entry.kind == FrameKind::Meta => self.read_frame(self.frame),
                Some(_) => Ok(()),
            };
            self.frame += 1;
            if let Err(error) = step {
                self.ended = true;
                return Some(Err(error));
            }
        }
    }
}

/// Why a segment was not folded.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// The segment cannot be read.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The catalog refuses, or fails.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    /// Another log's segment.
    #[error(
        "{name} belongs to the log {found}, the catalog to {expected}: it is not folded; look where the file comes from"
    )]
    WrongLog {
        /// The segment.
        name: String,
        /// Whose it is.
        found: LogId,
        /// The catalog's log.
        expected: LogId,
    },
    /// The chain of hashes is broken.
    #[error("{name} continues a segment with another hash ({}) than the one before it has ({}): one of the two was changed or replaced; read both from another copy", or_none(*claimed), or_none(*actual))]
    Chain {
        /// The segment.
        name: String,
        /// What its header names.
        claimed: Option<Hash>,
        /// The hash of the segment before.
        actual: Option<Hash>,
    },
    /// Transactions between the catalog's last one and the segment's first one are missing.
    #[error(
        "{name} begins with transaction {first}, the catalog needs {needed} first: fold the segments before it"
    )]
    Gap {
        /// The segment.
        name: String,
        /// Its first.
        first: Lsn,
        /// The catalog's next.
        needed: Lsn,
    },
}

fn or_none(hash: Option<Hash>) -> String {
    hash.map_or_else(|| "none".to_owned(), |hash| hash.to_string())
}

/// What the segment before a folded one is known to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Before {
    /// Not known: the chain is not checked here.
    Unknown,
    /// It has this hash; `None` before the first segment of the log.
    Hash(Option<Hash>),
}

/// What folding a segment did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Folded {
    /// Transactions that were applied.
    pub transactions: u64,
    /// Data records whose places were noted.
    pub data: u64,
}

/// Where the data records of a frame lie.
pub fn places(frame: &FrameEntry) -> impl Iterator<Item = DataPlace> {
    let frame_offset = frame.offset;
    frame.data.iter().map(move |entry| DataPlace {
        id: entry.id,
        frame_offset,
        raw_offset: entry.raw_offset,
        len: entry.len,
    })
}

/// Folds a segment: notes where its data lies (all of it, whatever the target), then applies its
/// transactions that come after the catalog's last one and not after `until`. Frames are not read
/// where the catalog has all their transactions. The caller commits.
pub fn fold_segment(
    catalog: &mut Catalog,
    segment: &Segment,
    until: Option<Lsn>,
    before: Before,
) -> Result<Folded, FoldError> {
    let header = &segment.header;
    if header.log_id != catalog.log_id() {
        return Err(FoldError::WrongLog {
            name: segment.name().to_owned(),
            found: header.log_id,
            expected: catalog.log_id(),
        });
    }
    if let Before::Hash(actual) = before
        && actual != header.previous
    {
        return Err(FoldError::Chain {
            name: segment.name().to_owned(),
            claimed: header.previous,
            actual,
        });
    }
    let mut folded = Folded::default();
    for frame in &segment.index.frames {
        let places: Vec<_> = places(frame).collect();
        catalog.apply_data(header.segment, &places)?;
        folded.data += places.len() as u64;
    }
    if !needed(catalog, segment, until) {
        return Ok(folded);
    }
    if let Some(gap) = gap(catalog, segment) {
        return Err(gap);
    }
    for next in Transactions::new(segment) {
        let (txn, place) = next?;
        if until.is_some_and(|until| txn.lsn > until) {
            break;
        }
        if catalog.folded() < Some(txn.lsn) {
            catalog.apply(&txn, place)?;
            folded.transactions += 1;
        }
    }
    Ok(folded)
}

/// Whether the segment may have transactions that the catalog lacks and wants.
fn needed(catalog: &Catalog, segment: &Segment, until: Option<Lsn>) -> bool {
    let first = segment.header.first_lsn;
    if until.is_some_and(|until| first > until) {
        return false;
    }
    segment
        .trailer
        .is_none_or(|trailer| trailer.last_lsn > catalog.folded())
}

fn gap(catalog: &Catalog, segment: &Segment) -> Option<FoldError> {
    let needed = Lsn::after(catalog.folded());
    let first = segment.header.first_lsn;
    (first > needed).then(|| FoldError::Gap {
        name: segment.name().to_owned(),
        first,
        needed,
    })
}
