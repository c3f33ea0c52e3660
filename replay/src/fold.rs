//! The fold: the log's transactions up to a moment, and the places of data up to the log's end.
//!
//! One thread reads and decodes segments ahead, the caller's applies them to the catalog. A frame
//! that is damaged in one copy is read from the next; one that no copy has whole ends the fold where
//! transactions up to the moment are missing, and matters no more behind it. Nothing is printed.

use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use tierfs::Time;
use tierfs::catalog::{Catalog, DataPlace, Place, SegmentRow};
use tierfs::fold::{Transactions, places};
use tierfs::frame::FrameKind;
use tierfs::ids::{Hash, Lsn, SegmentNo};
use tierfs::record::{SegmentHeader, Txn};
use tierfs::segment::{Segment, Trailer};

use crate::error::Error;
use crate::moment::Moment;
use crate::report::{Collector, Lost, Stage};
use crate::sources::Sources;

/// Batches of transactions that are decoded ahead,
const AHEAD: usize = 8;
/// and how many operations are in one, but for those of its last transaction: an adoption has thousands
/// in each.
const BATCH_OPS: usize = 2048;

/// What is wanted of the segments beside their transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segments {
    /// Everything: the catalog's list of segments is filled, with their hashes, which are computed where
    /// no inventory has them. Rebuilding wants it.
    Note,
    /// The places of data.
    Skip,
    /// Nothing: the content stays where it is. Segments that hold no transactions may be missing.
    Names,
}

/// How far a fold came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folded {
    /// The last transaction that was applied.
    pub at: Option<Lsn>,
    /// The last transaction of the log.
    pub last: Option<Lsn>,
    /// The segments with transactions that were applied, in order.
    pub read: Vec<SegmentRead>,
}

/// What was needed of a segment to know its transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentRead {
    /// Which.
    pub segment: SegmentNo,
    /// Bytes of its header, of its frames without data, and of its index.
    pub bytes: u64,
}

/// What the reading thread gives.
enum Item {
    /// A segment begins.
    Segment(Box<Begun>),
    /// The next of its transactions.
    Txns(Vec<(Txn, Place)>),
    /// The rest of its transactions cannot be had: what every copy said.
    Damaged(String),
    /// No place has the segments before the next item.
    Missing,
    /// It cannot be read at all.
    Unreadable(Error),
}

struct Begun {
    segment: SegmentNo,
    name: String,
    header: SegmentHeader,
    trailer: Option<Trailer>,
    hash: Option<Hash>,
    bytes: u64,
    places: Vec<DataPlace>,
    metadata_bytes: u64,
    causes: Vec<String>,
}

/// Folds everything that `sources` have into `catalog`, which is empty: transactions up to `until`,
/// places of data to the log's end.
pub fn fold(
    sources: &Sources,
    catalog: &mut Catalog,
    until: Moment,
    segments: Segments,
    found: &Collector<'_>,
) -> Result<Folded, Error> {
    found
        .watch()
        .begin(Stage::Fold, Some(sources.segments().count() as u64));
    let reached = AtomicBool::new(false);
    let mut fold = Fold {
        sources,
        catalog,
        until,
        segments,
        found,
        reached: &reached,
        name: String::new(),
        before: None,
        at: None,
        read: Vec::new(),
        last: None,
        gaps: false,
        cut_off: false,
    };
    std::thread::scope(|threads| {
        let (to_fold, items) = bounded(AHEAD);
        let reached = &reached;
        threads.spawn(move || read_ahead(sources, segments, reached, &to_fold));
        let folded = fold.run(&items);
        // The reader ends when nobody takes what it reads.
        drop(items);
        folded
    })
}

/// Reads all segments in order.
fn read_ahead(sources: &Sources, note: Segments, reached: &AtomicBool, to_fold: &Sender<Item>) {
    let mut expected = SegmentNo::FIRST;
    for segment in sources.segments() {
        // Once for each gap, which may be as long as a damaged name says.
        if expected < segment && to_fold.send(Item::Missing).is_err() {
            return;
        }
        expected = segment.next();
        // Of what comes behind the moment, only where the log ends is of interest.
        let unneeded = note == Segments::Names && reached.load(Ordering::Relaxed);
        if unneeded && Some(segment) != sources.last() {
            continue;
        }
        if read_segment(sources, segment, note, reached, to_fold).is_none() {
            return;
        }
    }
}

/// `None` where nobody listens any more.
fn read_segment(
    sources: &Sources,
    number: SegmentNo,
    note: Segments,
    reached: &AtomicBool,
    to_fold: &Sender<Item>,
) -> Option<()> {
    let (segment, causes) = match sources.open_segment(number) {
        Ok(opened) => opened,
        Err(error) => return to_fold.send(Item::Unreadable(error)).ok(),
    };
    let known = sources.known_hash(number).map(|(hash, _)| hash);
    let hash = match (known, note) {
        (None, Segments::Note) => match sources.hash(number) {
            Ok(hash) => Some(hash),
            Err(error) => return to_fold.send(Item::Unreadable(error)).ok(),
        },
        (known, _) => known,
    };
    let places = match note {
        Segments::Names => Vec::new(),
        Segments::Note | Segments::Skip => segment.index.frames.iter().flat_map(places).collect(),
    };
    let bytes = sources.copies(number).first().map_or(0, |copy| copy.bytes);
    let begun = Begun {
        segment: number,
        name: segment.name().to_owned(),
        header: segment.header.clone(),
        trailer: segment.trailer,
        hash,
        metadata_bytes: metadata_bytes(&segment, bytes),
        bytes,
        places,
        causes,
    };
    to_fold.send(Item::Segment(Box::new(begun))).ok()?;
    if reached.load(Ordering::Relaxed) {
        return Some(());
    }
    let (mut batch, mut ops) = (Vec::new(), 0);
    for next in Transactions::new(&segment) {
        match next {
            Ok((txn, place)) => {
                ops += txn.ops.len();
                batch.push((txn, place));
            }
            Err(error) => {
                to_fold.send(Item::Txns(batch)).ok()?;
                return to_fold.send(Item::Damaged(error.to_string())).ok();
            }
        }
        if ops >= BATCH_OPS {
            ops = 0;
            to_fold.send(Item::Txns(std::mem::take(&mut batch))).ok()?;
            if reached.load(Ordering::Relaxed) {
                return Some(());
            }
        }
    }
    to_fold.send(Item::Txns(batch)).ok()
}

/// What a segment of `bytes` holds beside data.
fn metadata_bytes(segment: &Segment, bytes: u64) -> u64 {
    let frames = &segment.index.frames;
    let begin = frames.first().map_or(0, |frame| frame.offset);
    let meta = frames.iter().filter(|frame| frame.kind == FrameKind::Meta);
    let end = segment
        .trailer
        .map_or(0, |trailer| bytes.saturating_sub(trailer.index_offset));
    begin + meta.map(|frame| frame.end() - frame.offset).sum::<u64>() + end
}

struct Fold<'f, 'w> {
    sources: &'f Sources,
    catalog: &'f mut Catalog,
    until: Moment,
    segments: Segments,
    found: &'f Collector<'w>,
    /// The moment is reached: transactions do not matter any more.
    reached: &'f AtomicBool,
    /// The segment that was begun last,
    before: Option<SegmentNo>,
    /// what was read of it, until that is noted, and what it is called.
    at: Option<SegmentRead>,
    name: String,
    read: Vec<SegmentRead>,
    last: Option<Lsn>,
    /// Segments that no place has were passed over.
    gaps: bool,
    /// The segment that was read last has no whole index and trailer.
    cut_off: bool,
}

impl Fold<'_, '_> {
    fn run(&mut self, items: &Receiver<Item>) -> Result<Folded, Error> {
        for item in items {
            if self.found.watch().stop() {
                return Err(Error::Interrupted);
            }
            match item {
                Item::Missing => self.missing()?,
                Item::Unreadable(error) => self.unreadable(error)?,
                Item::Segment(begun) => self.begin(*begun)?,
                Item::Txns(txns) => self.apply(&txns)?,
                Item::Damaged(_) if self.reached() => {}
                Item::Damaged(cause) => return Err(self.damaged(cause)),
            }
        }
        if self.gaps {
            let list = crate::error::missing_list(&self.sources.missing());
            self.found
                .warning(&format!("{list} on none of the places given"));
        }
        if self.cut_off && !self.reached() {
            let why = format!("{} has no whole end on any of the places given", self.name);
            self.found.loss(Vec::new(), Lost::Tail { why });
        }
        self.catalog.commit()?;
        let at = self.catalog.folded();
        if let Moment::Lsn(asked) = self.until
            && at.is_none_or(|at| at < asked)
        {
            return Err(Error::NotYet {
                asked: format!("transaction {asked}"),
                last: self.last.max(at),
            });
        }
        Ok(Folded {
            at,
            last: self.last.max(at),
            read: std::mem::take(&mut self.read),
        })
    }

    fn reached(&self) -> bool {
        self.reached.load(Ordering::Relaxed)
    }

    fn missing(&mut self) -> Result<(), Error> {
        // Where names are all that is wanted, the next segment tells whether transactions are missing.
        if !self.reached() && self.segments != Segments::Names {
            return Err(self.missing_before(None));
        }
        self.gaps = true;
        Ok(())
    }

    /// Segments that no place has: all of them, or those directly before `end`.
    fn missing_before(&self, end: Option<SegmentNo>) -> Error {
        let mut segments = self.sources.missing();
        if let Some(end) = end {
            segments.retain(|segment| *segment < end && Some(*segment) > self.before);
        }
        let places = self.sources.places().iter();
        Error::Missing {
            segments,
            places: places.map(ToString::to_string).collect(),
            folded: self.catalog.folded(),
        }
    }

    fn unreadable(&mut self, error: Error) -> Result<(), Error> {
        match error {
            Error::AllCopies { what, causes, .. } if !self.reached() => Err(Error::AllCopies {
                what,
                causes,
                folded: self.catalog.folded(),
            }),
            Error::AllCopies { .. } => {
                self.found.warning(&error.to_string());
                Ok(())
            }
            error => Err(error),
        }
    }

    fn damaged(&self, cause: String) -> Error {
        Error::AllCopies {
            what: format!("the transactions in {}", self.name),
            causes: vec![cause],
            folded: self.catalog.folded(),
        }
    }

    fn begin(&mut self, begun: Begun) -> Result<(), Error> {
        for cause in &begun.causes {
            self.found.warning(cause);
        }
        self.check_chain(&begun)?;
        self.check_gap(&begun)?;
        self.cut_off = begun.trailer.is_none();
        self.last = self
            .last
            .max(begun.trailer.and_then(|trailer| trailer.last_lsn));
        self.catalog.apply_data(begun.segment, &begun.places)?;
        if self.segments == Segments::Note {
            self.note(&begun)?;
        }
        self.name = begun.name;
        self.before = Some(begun.segment);
        self.at = Some(SegmentRead {
            segment: begun.segment,
            bytes: begun.metadata_bytes,
        });
        self.found.watch().advance(1);
        Ok(())
    }

    fn note(&mut self, begun: &Begun) -> Result<(), Error> {
        let (Some(hash), Some(trailer)) = (begun.hash, begun.trailer) else {
            return Ok(());
        };
        self.catalog.add_segment(&SegmentRow {
            segment: begun.segment,
            hash,
            bytes: begun.bytes,
            epoch: begun.header.epoch,
            first_lsn: begun.header.first_lsn,
            last_lsn: trailer.last_lsn,
            sealed: Time {
                seconds: i64::try_from(trailer.sealed_at).unwrap_or(i64::MAX),
                nanos: 0,
            },
        })?;
        Ok(())
    }

    /// Transactions that were in frames that no copy has whole.
    fn check_gap(&self, begun: &Begun) -> Result<(), Error> {
        let needed = Lsn::after(self.catalog.folded());
        if self.reached() || begun.header.first_lsn <= needed {
            return Ok(());
        }
        if begun.segment > self.before.map_or(SegmentNo::FIRST, SegmentNo::next) {
            return Err(self.missing_before(Some(begun.segment)));
        }
        Err(Error::Log {
            name: begun.name.clone(),
            why: format!(
                "it begins with transaction {}, but no segment before it has transaction {needed} whole",
                begun.header.first_lsn
            ),
            folded: self.catalog.folded(),
        })
    }

    /// Each segment names the hash of the one before.
    fn check_chain(&self, begun: &Begun) -> Result<(), Error> {
        let before = begun.segment.prev();
        let log = |why: &str| Error::Log {
            name: begun.name.clone(),
            why: why.to_owned(),
            folded: self.catalog.folded(),
        };
        let (before, named) = match (before, begun.header.previous) {
            (None, None) => return Ok(()),
            (None, Some(_)) => return Err(log("it is the first segment, but names one before it")),
            (Some(_), None) => return Err(log("it names no segment before it")),
            (Some(before), Some(named)) => (before, named),
        };
        if let Some((found, place)) = self.sources.known_hash(before)
            && found != named
        {
            return Err(Error::Chain {
                name: begun.name.clone(),
                named,
                segment: before,
                found,
                place: place.to_string(),
            });
        }
        Ok(())
    }

    /// Applies those up to the moment.
    fn apply(&mut self, txns: &[(Txn, Place)]) -> Result<(), Error> {
        for (txn, place) in txns {
            let beyond = matches!(self.until, Moment::Time(time) if txn.time > time);
            if self.reached() || beyond {
                self.reached.store(true, Ordering::Relaxed);
                return Ok(());
            }
            self.catalog.apply(txn, *place)?;
            // Noted with the first of its transactions.
            self.read.extend(self.at.take());
            if self.until == Moment::Lsn(txn.lsn) {
                self.reached.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}
