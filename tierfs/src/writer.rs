//! Appending to the log: group commit, sealing, and the watermarks.
//!
//! [`Writer`] appends packed frames to the open segment and never waits for the disk's cache: what
//! was appended becomes durable by a [`SyncJob`], which another thread runs while appending goes on.
//! A segment that is full is ended by index and trailer at once, and the next one begun; its sync
//! and its final name are the next job's work.
//!
//! Guarantees: a transaction never spans segments; the durable watermark moves only over what was
//! synced, names included; a full disk leaves the writer where it was before the call
//! ([`WriterError::Full`], to be tried again), since space for index and trailer is reserved ahead;
//! any other failure of a write and every failure of a sync ends the writer for good, because
//! nobody can know what such a disk holds. Recovery finds out at the next start.

mod open;
mod sync;

use std::borrow::Borrow;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::cbor_map;
use crate::disk::{Disk, DiskFile, RealDisk};
use crate::frame::{FRAME_PREFIX_LEN, FrameError, FrameKind, PackedFrame, Packer};
use crate::ids::{Epoch, Hash, Lsn, SegmentNo, Time};
use crate::record::Predecessor;
use crate::spool::{Shared, SpoolOptions};

use open::OpenSegment;
use sync::Finish;
pub use sync::{SyncJob, Synced};

cbor_map! {
    /// The end of the log: what the next segment continues.
    Head {
        /// The last segment.
        0 => segment: SegmentNo,
        /// BLAKE3 of its file.
        2 => hash: Hash,
        /// Its writer.
        4 => epoch: Epoch,
        /// The LSN after the last commit.
        6 => next_lsn: Lsn,
    }
}

/// Why appending or syncing failed.
#[derive(Debug, thiserror::Error)]
pub enum WriterError {
    /// No space. Nothing was appended, nothing is lost; try again when there is space.
    #[error(
        "the spool {} is full: {need} more bytes are needed for the log{}; copy and remove segments (are all volumes there?), or give the spool more space",
        path.display(), source.as_ref().map_or_else(String::new, |error| format!(" ({error})"))
    )]
    Full {
        /// The spool.
        path: PathBuf,
        /// Bytes that the append needs.
        need: u64,
        /// What the system said; `None` where the spool's own limit (`bytes_max`) is reached.
        source: Option<io::Error>,
    },
    /// The disk failed. The writer is of no use any more.
    #[error(
        "{doing} {} failed: {source}; nothing more is logged, since nobody knows what the disk holds now. Check the disk, then restart hsmd: recovery finds the end of the log",
        path.display()
    )]
    Failed {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// An earlier failure ended the writer.
    #[error("the log's writer has stopped after this failure: {first}")]
    Poisoned {
        /// The first failure.
        first: String,
    },
    /// The frames do not continue the log: a fault of the caller. Nothing was appended.
    #[error(
        "frames that do not continue the log were refused: {what}; transaction {next} comes next"
    )]
    Order {
        /// What is wrong with them.
        what: &'static str,
        /// The next LSN.
        next: Lsn,
    },
    /// A frame or an index beyond the format's bounds. Nothing was appended.
    #[error("the log's format cannot hold this: {0}")]
    Format(#[from] FrameError),
}

/// Where a frame was put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placed {
    /// The segment.
    pub segment: SegmentNo,
    /// Offset of the frame in it.
    pub frame_offset: u64,
}

/// How far each stage of the log has come. LSNs are the last ones; bytes count from the writer's start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Watermarks {
    /// Last transaction handed to the system.
    pub written: Option<Lsn>,
    /// Last transaction that survives a power loss.
    pub durable: Option<Lsn>,
    /// Last transaction in a segment that is sealed and has its final name.
    pub sealed: Option<Lsn>,
    /// Bytes handed to the system.
    pub written_bytes: u64,
    /// Bytes that survive a power loss.
    pub durable_bytes: u64,
    /// Bytes in sealed segments.
    pub sealed_bytes: u64,
}

impl Watermarks {
    fn check(&self) {
        assert!(
            self.sealed <= self.durable && self.durable <= self.written,
            "watermarks out of order: {self:?}"
        );
        assert!(
            self.sealed_bytes <= self.durable_bytes && self.durable_bytes <= self.written_bytes,
            "watermarks out of order: {self:?}"
        );
    }
}

/// A segment in its final form in the spool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SealedSegment {
    /// Its number.
    pub no: SegmentNo,
    /// BLAKE3 of its file.
    pub hash: Hash,
    /// Its size.
    pub bytes: u64,
    /// Its writer.
    pub epoch: Epoch,
    /// The LSN of the first commit in it, had it one.
    pub first_lsn: Lsn,
    /// The last commit in it; `None` where it has none.
    pub last_lsn: Option<Lsn>,
    /// Its name in the spool.
    pub file_name: String,
    /// When it was sealed.
    pub sealed_at: Time,
}

impl SealedSegment {
    /// The end of the log, were this the last segment.
    pub fn head(&self) -> Head {
        Head {
            segment: self.no,
            hash: self.hash,
            epoch: self.epoch,
            next_lsn: self.last_lsn.map_or(self.first_lsn, Lsn::next),
        }
    }

    /// As the catalog keeps it.
    pub fn row(&self) -> crate::catalog::SegmentRow {
        crate::catalog::SegmentRow {
            segment: self.no,
            hash: self.hash,
            bytes: self.bytes,
            epoch: self.epoch,
            first_lsn: self.first_lsn,
            last_lsn: self.last_lsn,
            sealed: self.sealed_at,
        }
    }
}

/// True where the system says that there is no space.
pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// Appends to the log of a [`crate::spool::Spool`]. There is one at a time.
pub struct Writer<D: Disk = RealDisk> {
    shared: Arc<Shared<D>>,
    epoch: Epoch,
    now: fn() -> Time,
    packer: Packer,
    /// The end of the log before this writer.
    predecessor: Option<Predecessor>,
    /// The last ended segment.
    head: Option<Head>,
    next_lsn: Lsn,
    open: Option<OpenSegment<D>>,
    /// Ended segments that no job has taken.
    finish: Vec<Finish<D>>,
    /// A file was created since the last job.
    names_changed: bool,
    /// A job is under way.
    in_flight: bool,
    watermarks: Watermarks,
    poisoned: Option<String>,
}

impl<D: Disk> Writer<D> {
    pub(crate) fn new(
        shared: Arc<Shared<D>>,
        head: Option<Head>,
        epoch: Epoch,
        now: fn() -> Time,
    ) -> Result<Self, FrameError> {
        let next_lsn = head.as_ref().map_or(Lsn::FIRST, |head| head.next_lsn);
        let last = next_lsn.prev();
        Ok(Self {
            packer: Packer::new(shared.options.level)?,
            predecessor: head.as_ref().map(|head| Predecessor {
                epoch: head.epoch,
                segment: head.segment,
                hash: head.hash,
            }),
            shared,
            epoch,
            now,
            head,
            next_lsn,
            open: None,
            finish: Vec::new(),
            names_changed: false,
            in_flight: false,
            watermarks: Watermarks {
                written: last,
                durable: last,
                sealed: last,
                ..Watermarks::default()
            },
            poisoned: None,
        })
    }

    /// The LSN that the next commit must have.
    pub fn next_lsn(&self) -> Lsn {
        self.next_lsn
    }

    /// This writer's number, which its data ids begin with.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// How far each stage has come.
    pub fn watermarks(&self) -> Watermarks {
        self.watermarks
    }

    /// Bytes in the open segment, 0 where there is none.
    pub fn open_bytes(&self) -> u64 {
        self.open.as_ref().map_or(0, |open| open.written)
    }

    /// When the open segment was begun; `None` where there is none.
    pub fn opened_at(&self) -> Option<Time> {
        self.open.as_ref().map(|open| open.reader.header.time)
    }

    /// True where something was appended or ended that no job has taken.
    pub fn is_dirty(&self) -> bool {
        !self.finish.is_empty()
            || self
                .open
                .as_ref()
                .is_some_and(|open| open.written > open.taken)
    }

    /// Appends a frame of data records.
    pub fn append_data(&mut self, frame: impl Borrow<PackedFrame>) -> Result<Placed, WriterError> {
        let frame = frame.borrow();
        if frame.kind != FrameKind::Data || frame.commits != 0 || frame.data.is_empty() {
            return Err(self.order("a frame of data was expected"));
        }
        let placed = self.append(std::slice::from_ref(frame), self.next_lsn)?;
        Ok(placed[0])
    }

    /// Appends the frames of one or more whole transactions, into one segment.
    pub fn append_txns(
        &mut self,
        frames: impl AsRef<[PackedFrame]>,
    ) -> Result<Vec<Placed>, WriterError> {
        let frames = frames.as_ref();
        let mut next = self.next_lsn;
        for frame in frames {
            if frame.kind != FrameKind::Meta || !frame.data.is_empty() {
                return Err(self.order("a frame of operations was expected"));
            }
            if frame.first_lsn != (frame.commits > 0).then_some(next) {
                return Err(self.order("the LSNs are not dense"));
            }
            next = Lsn::new(next.get() + u64::from(frame.commits)).unwrap_or(next);
        }
        if frames.last().is_none_or(|frame| frame.commits == 0) {
            return Err(self.order("the last frame has no commit"));
        }
        self.append(frames, next)
    }

    fn append(
        &mut self,
        frames: &[PackedFrame],
        next_lsn: Lsn,
    ) -> Result<Vec<Placed>, WriterError> {
        self.check_poison()?;
        let need: u64 = frames
            .iter()
            .map(|frame| (FRAME_PREFIX_LEN + frame.compressed.len()) as u64)
            .sum();
        let limit = self.shared.options.segment_bytes;
        if self
            .open
            .as_ref()
            .is_some_and(|open| !open.fits(need, limit))
        {
            self.end_segment()?;
        }
        if self.shared.bytes_used().saturating_add(need) > self.shared.options.bytes_max {
            return Err(self.seal_when_full(self.full(need, None)));
        }
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.begin()?,
        };
        let before = open.written;
        let appended = open.append(frames, limit);
        let no = open.reader.header.segment;
        self.open = Some(open);
        match appended {
            Ok(offsets) => {
                self.next_lsn = next_lsn;
                self.advance_written(before);
                Ok(offsets
                    .into_iter()
                    .map(|frame_offset| Placed {
                        segment: no,
                        frame_offset,
                    })
                    .collect())
            }
            Err(error) => {
                let error = self.failed_append(error, need);
                Err(self.seal_when_full(error))
            }
        }
    }

    /// Only segments that are sealed can be copied and removed, so a full disk seals the open one.
    fn seal_when_full(&mut self, error: WriterError) -> WriterError {
        if !matches!(error, WriterError::Full { .. }) {
            return error;
        }
        match self.end_segment() {
            Ok(()) | Err(WriterError::Full { .. }) => error,
            Err(worse) => worse,
        }
    }

    fn advance_written(&mut self, before: u64) {
        let after = self.open.as_ref().map_or(before, |open| open.written);
        self.watermarks.written = self.next_lsn.prev();
        self.watermarks.written_bytes += after - before;
        self.watermarks.check();
    }

    /// Begins the next segment: its file, header, and first frame.
    fn begin(&mut self) -> Result<OpenSegment<D>, WriterError> {
        let no = self
            .head
            .as_ref()
            .map_or(SegmentNo::FIRST, |head| head.segment.next());
        let SpoolOptions {
            fs_uuid,
            ref fs_type,
            ref host,
            ..
        } = self.shared.options;
        let header = crate::record::SegmentHeader {
            version: crate::segment::FORMAT_VERSION,
            log_id: self.shared.log_id,
            epoch: self.epoch,
            segment: no,
            previous: self.head.as_ref().map(|head| head.hash),
            predecessor: self.predecessor.clone(),
            first_lsn: self.next_lsn,
            time: (self.now)(),
            fs_uuid,
            fs_type: fs_type.clone(),
            host: host.clone(),
        };
        match OpenSegment::begin(&self.shared.disk, header, &mut self.packer) {
            Ok(open) => {
                // Only the first segment of a writer names what it continues.
                self.predecessor = None;
                self.names_changed = true;
                self.shared.begun(no, open.reader.clone());
                self.watermarks.written_bytes += open.written;
                self.watermarks.check();
                Ok(open)
            }
            Err(error) => Err(self.failed_append(error, 0)),
        }
    }

    /// Ends the open segment, if it holds anything: index and trailer are written, and the next
    /// job gives it its final form.
    pub fn seal_now(&mut self) -> Result<(), WriterError> {
        self.check_poison()?;
        self.end_segment()
    }

    fn end_segment(&mut self) -> Result<(), WriterError> {
        let Some(mut open) = self.open.take_if(|open| open.holds_something()) else {
            return Ok(());
        };
        let before = open.written;
        match open.end((self.now)()) {
            Ok(sealed) => {
                self.watermarks.written_bytes += sealed.bytes - before;
                self.watermarks.check();
                self.head = Some(Head {
                    next_lsn: self.next_lsn,
                    ..sealed.head()
                });
                self.finish.push(Finish {
                    reader: open.reader,
                    sealed,
                });
                Ok(())
            }
            Err(error) => {
                self.open = Some(open);
                Err(self.failed_append(error, 0))
            }
        }
    }

    /// Everything appended since the last job, to be made durable; `None` where there is nothing
    /// new, or while a job is under way (its result was not given to [`Self::done`]).
    pub fn take_sync(&mut self) -> Option<SyncJob<D>> {
        if self.in_flight || !self.is_dirty() || self.poisoned.is_some() {
            return None;
        }
        self.in_flight = true;
        if let Some(open) = &mut self.open {
            open.taken = open.written;
        }
        Some(SyncJob {
            shared: self.shared.clone(),
            epoch: self.epoch,
            finish: std::mem::take(&mut self.finish),
            names_changed: std::mem::take(&mut self.names_changed),
            open: self
                .open
                .as_ref()
                .map(|open| (open.reader.clone(), open.written)),
            next_lsn: self.next_lsn,
            written_bytes: self.watermarks.written_bytes,
        })
    }

    /// Takes a job's result: moves the watermarks, or ends the writer for good.
    pub fn done(&mut self, result: Result<Synced, WriterError>) -> Result<Synced, WriterError> {
        self.in_flight = false;
        self.check_poison()?;
        let synced = match result {
            Ok(synced) => synced,
            Err(error) => {
                self.poisoned = Some(error.to_string());
                return Err(error);
            }
        };
        if let (Some(open), Some((no, bytes))) = (&mut self.open, synced.open)
            && open.reader.header.segment == no
        {
            open.durable = bytes;
        }
        for sealed in &synced.sealed {
            self.watermarks.sealed = sealed.last_lsn.or(self.watermarks.sealed);
            self.watermarks.sealed_bytes += sealed.bytes;
        }
        self.watermarks.durable = synced.durable;
        self.watermarks.durable_bytes = synced.written_bytes;
        self.watermarks.check();
        self.shared.sealed(&synced.sealed);
        Ok(synced)
    }

    fn check_poison(&self) -> Result<(), WriterError> {
        match &self.poisoned {
            None => Ok(()),
            Some(first) => Err(WriterError::Poisoned {
                first: first.clone(),
            }),
        }
    }

    fn order(&self, what: &'static str) -> WriterError {
        WriterError::Order {
            what,
            next: self.next_lsn,
        }
    }

    fn full(&self, need: u64, source: Option<io::Error>) -> WriterError {
        WriterError::Full {
            path: self.shared.disk.path().to_owned(),
            need,
            source,
        }
    }

    fn failed_append(&mut self, error: AppendError, need: u64) -> WriterError {
        match error {
            AppendError::Full { source, need: more } => self.full(need.max(more), Some(source)),
            AppendError::Format(error) => WriterError::Format(error),
            AppendError::Failed {
                name,
                doing,
                source,
            } => {
                let error = WriterError::Failed {
                    path: self.shared.disk.path().join(name),
                    doing,
                    source,
                };
                self.poisoned = Some(error.to_string());
                error
            }
        }
    }
}

/// How an operation on the open segment fails.
pub(crate) enum AppendError {
    /// No space; the file is as it was before.
    Full { source: io::Error, need: u64 },
    /// Nobody knows what the file holds.
    Failed {
        name: String,
        doing: &'static str,
        source: io::Error,
    },
    /// Beyond the format's bounds; nothing was written.
    Format(FrameError),
}

impl From<FrameError> for AppendError {
    fn from(error: FrameError) -> Self {
        Self::Format(error)
    }
}

/// What readers of an unsealed segment share with its writer.
pub(crate) struct Unsealed<D: Disk> {
    pub(crate) file: Arc<D::File>,
    pub(crate) name: String,
    pub(crate) header: crate::record::SegmentHeader,
    pub(crate) frames: std::sync::Mutex<Vec<crate::segment::FrameEntry>>,
    pub(crate) bytes: std::sync::atomic::AtomicU64,
}

impl<D: Disk> Unsealed<D> {
    fn fail(&self, doing: &'static str) -> impl FnOnce(io::Error) -> AppendError {
        let name = self.name.clone();
        move |source| AppendError::Failed {
            name,
            doing,
            source,
        }
    }

    /// After a write that met a full disk: takes back what it did.
    fn take_back(&self, len: u64, need: u64, source: io::Error) -> AppendError {
        match self.file.truncate(len) {
            Ok(()) => AppendError::Full { source, need },
            Err(error) => self.fail("cutting off a torn write in")(error),
        }
    }
}
