//! Content: each frame that holds something live is fetched once, in the order of the medium.
//!
//! The caller's thread asks the catalog what is needed and plans a job for each frame; one thread
//! reads the frames, in order; workers decompress, check every piece's hash, and write. A file whose
//! content lies in one record is made, filled, finished and closed by one worker in one go; others
//! are sparse files of their full size from their first piece on, and are finished by the worker that
//! writes the last one. Memory is bounded by the jobs in flight.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use tierfs::FileId;
use tierfs::catalog::{ExtentRow, LiveRow, Queries};
use tierfs::frame;
use tierfs::ids::SegmentNo;
use tierfs::layout::Range;

use crate::copies::{SegmentCopies, StoredFrame};
use crate::dirs::DirNames;
use crate::error::Error;
use crate::report::{Lost, Stage};
use crate::scope::Scope;
use crate::sources::Sources;
use crate::state::{Progress, State};
use crate::sync::Syncer;
use crate::target::{Head, Target};

/// Jobs that wait between two stages: at most 1 MiB of content each.
const QUEUE: usize = 8;
/// Large files whose descriptors are kept open.
const OPEN_FILES_MAX: usize = 128;
/// Stretches of large files that wait for the beginning of their writeback.
const WRITTEN: usize = 64;
/// Stretches that are being written back.
const BEGUN: usize = 32;

/// A file that several records fill.
struct Large {
    head: Head,
    /// Bytes of content that are neither written nor lost yet.
    remaining: AtomicU64,
    /// It was created.
    begun: AtomicBool,
    /// It could not be created: a loss that is reported.
    refused: AtomicBool,
    fd: Mutex<Option<Arc<OwnedFd>>>,
}

enum To {
    /// The record is the file's whole content.
    Whole(Box<Head>),
    /// Part of a larger one.
    Piece(Arc<Large>),
}

impl To {
    fn head(&self) -> &Head {
        match self {
            Self::Whole(head) => head,
            Self::Piece(large) => &large.head,
        }
    }
}

/// A stretch of a record, and where it goes.
struct Part {
    raw_offset: u32,
    data_len: u32,
    extent: ExtentRow,
    to: To,
}

impl Part {
    /// Its bytes in the decompressed frame, checked.
    fn bytes<'r>(&self, raw: &'r [u8]) -> Result<&'r [u8], String> {
        let bytes = slice_of(raw, self.raw_offset, self.data_len, &self.extent);
        let bytes = bytes.ok_or("the index names a place beyond the frame's end")?;
        self.extent.check(bytes)?;
        Ok(bytes)
    }
}

/// The bytes of an extent in a decompressed frame.
pub(crate) fn slice_of<'r>(
    raw: &'r [u8],
    raw_offset: u32,
    data_len: u32,
    extent: &ExtentRow,
) -> Option<&'r [u8]> {
    let record = raw.get(raw_offset as usize..)?.get(..data_len as usize)?;
    extent.slice_of(record)
}

/// A frame to be fetched.
struct Job {
    number: u64,
    copies: Arc<SegmentCopies>,
    offset: u64,
    parts: Vec<Part>,
}

struct Loaded {
    job: Job,
    stored: Result<StoredFrame, String>,
}

/// A stretch of a file that was written.
type Stretch = (Arc<OwnedFd>, Range);

/// What all threads share.
struct Shared<'a, 'f> {
    written: Sender<Stretch>,
    target: &'a Target<'f>,
    syncer: &'a Syncer,
    open: Mutex<VecDeque<Weak<Large>>>,
    failed: AtomicBool,
    /// All content is written.
    ended: AtomicBool,
    failure: Mutex<Option<Error>>,
    bytes: AtomicU64,
    files: AtomicU64,
}

/// What the content stage did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Written {
    /// Files finished.
    pub files: u64,
    /// Frames fetched.
    pub frames: u64,
    /// Bytes of content written.
    pub bytes: u64,
}

/// The work of the content stage.
pub struct Content<'a, 'f> {
    /// The log.
    pub sources: &'a Sources,
    /// The catalog, folded to the target moment.
    pub queries: Queries<'a>,
    /// What is wanted.
    pub scope: &'a Scope,
    /// Where it goes.
    pub target: &'a Target<'f>,
    /// How many workers.
    pub workers: usize,
    /// How often what is written is synced.
    pub sync_interval: Duration,
}

impl Content<'_, '_> {
    /// Fetches and writes all content; `state` follows what is synced.
    pub fn run(&self, dirs: &mut DirNames, state: &mut State) -> Result<Written, Error> {
        let root = self.target.dirs.root().clone();
        let resumed = state.progress;
        let syncer = Syncer::new(self.sync_interval);
        let (written, to_write_back) = bounded::<Stretch>(WRITTEN);
        let shared = Shared {
            written,
            target: self.target,
            syncer: &syncer,
            open: Mutex::default(),
            failed: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            failure: Mutex::default(),
            bytes: AtomicU64::new(0),
            files: AtomicU64::new(0),
        };
        let (to_read, jobs) = bounded::<Job>(QUEUE);
        let (to_write, loaded) = bounded::<Loaded>(QUEUE);
        let planned = std::thread::scope(|threads| {
            let shared = &shared;
            threads.spawn(move || read_frames(&jobs, &to_write));
            threads.spawn(|| write_back(&to_write_back, &shared.ended));
            let mut workers = Vec::new();
            for _ in 0..self.workers.max(1) {
                let loaded = loaded.clone();
                workers.push(threads.spawn(move || shared.work(&loaded)));
            }
            drop(loaded);
            let found = self.target.found();
            let syncing = threads.spawn(|| syncer.run(&root, state, found));
            let mut planner = Planner {
                content: self,
                dirs,
                shared,
                resumed,
                large: HashMap::new(),
                next: 0,
                jobs: to_read,
            };
            let planned = planner.plan();
            let rest = std::mem::take(&mut planner.large);
            let frames = planner.next;
            drop(planner);
            let worked = workers.into_iter().all(|worker| worker.join().is_ok());
            let ended = shared.end(rest);
            shared.ended.store(true, Ordering::Relaxed);
            syncer.end();
            let synced = syncing.join().unwrap_or(Err(Error::Worker));
            planned.and(ended).and(synced)?;
            if worked {
                Ok(frames)
            } else {
                Err(Error::Worker)
            }
        });
        // What a worker says is the cause of what the planner met.
        if let Some(error) = lock(&shared.failure).take() {
            return Err(error);
        }
        Ok(Written {
            files: shared.files.load(Ordering::Relaxed),
            frames: planned?,
            bytes: shared.bytes.load(Ordering::Relaxed),
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What a panicking thread left there is replaced or dropped, never trusted for content.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The reader: keeps the order of the medium.
fn read_frames(jobs: &Receiver<Job>, to_write: &Sender<Loaded>) {
    for job in jobs {
        let stored = job.copies.frame(job.offset);
        if to_write.send(Loaded { job, stored }).is_err() {
            return;
        }
    }
}

/// Has the kernel begin writing while the rest is being fetched, so that the sync at the end is short,
/// and give back the memory of what is written: what large files need is not taken from everybody else.
fn write_back(written: &Receiver<Stretch>, ended: &AtomicBool) {
    let mut begun: VecDeque<Stretch> = VecDeque::new();
    while !ended.load(Ordering::Relaxed) {
        let Ok((fd, range)) = written.recv_timeout(Duration::from_millis(50)) else {
            continue;
        };
        crate::sys::start_writeback(&*fd, range.offset, range.len);
        begun.push_back((fd, range));
        if begun.len() > BEGUN
            && let Some((fd, range)) = begun.pop_front()
        {
            crate::sys::end_writeback(&*fd, range.offset, range.len);
        }
    }
}

struct Planner<'p, 'a, 'f> {
    content: &'p Content<'a, 'f>,
    dirs: &'p mut DirNames,
    shared: &'p Shared<'p, 'f>,
    resumed: Progress,
    /// Files of several records that were begun, until all of their rows were planned.
    large: HashMap<FileId, (Arc<Large>, u64)>,
    next: u64,
    jobs: Sender<Job>,
}

impl Planner<'_, '_, '_> {
    fn plan(&mut self) -> Result<(), Error> {
        let live = self.content.queries.live(self.content.scope.file())?;
        for file in live.missing(1 << 24)? {
            self.plan_missing(file)?;
        }
        let segments = live.segments()?;
        tracing::debug!(segments = segments.len(), "what is needed is known");
        let bytes = segments.iter().map(|needed| needed.bytes).sum();
        let watch = self.shared.target.found().watch();
        watch.begin(Stage::Content, Some(bytes));
        for needed in segments {
            let Some(segment) = needed.segment else {
                continue;
            };
            let copies = self.content.sources.open_copies(segment)?;
            let mut parts: Vec<Part> = Vec::new();
            let mut offset = 0;
            for row in live.rows(segment)? {
                let row = row?;
                if row.frame_offset != offset {
                    self.send(&copies, segment, offset, std::mem::take(&mut parts))?;
                    offset = row.frame_offset;
                }
                parts.extend(self.part(segment, row)?);
            }
            self.send(&copies, segment, offset, parts)?;
        }
        Ok(())
    }

    /// Where a row's bytes go; `None` where they are not wanted, or were written by an earlier run.
    fn part(&mut self, segment: SegmentNo, row: LiveRow) -> Result<Option<Part>, Error> {
        let done = self.resumed.holds(segment, row.frame_offset);
        let len = row.extent.range.len;
        if !self.large.contains_key(&row.file) {
            let content = self.content;
            let Some(head) = Head::load(content.queries, self.dirs, content.scope, row.file)?
            else {
                return Ok(None);
            };
            if row.extent.range.offset == 0 && len == head.inode.size {
                let to = To::Whole(Box::new(head));
                return Ok((!done).then(|| part(row, to)));
            }
            self.begin_large(head, 0)?;
        }
        let Some((large, planned)) = self.large.get_mut(&row.file) else {
            return Ok(None);
        };
        let large = large.clone();
        *planned = planned.saturating_sub(len);
        if *planned == 0 {
            self.large.remove(&row.file);
        }
        if done {
            large.begun.store(true, Ordering::Relaxed);
            large.remaining.fetch_sub(len, Ordering::AcqRel);
            return Ok(None);
        }
        Ok(Some(part(row, To::Piece(large))))
    }

    /// Begins a file of several records, `lost` bytes of which nobody has.
    fn begin_large(&mut self, head: Head, lost: u64) -> Result<(), Error> {
        let file = head.inode.file;
        let bytes = self
            .content
            .queries
            .content_bytes(file)?
            .saturating_sub(lost);
        let large = Arc::new(Large {
            head,
            remaining: AtomicU64::new(bytes),
            begun: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            fd: Mutex::default(),
        });
        self.large.insert(file, (large, bytes));
        Ok(())
    }

    /// A file that needs data which no source has.
    fn plan_missing(&mut self, file: FileId) -> Result<(), Error> {
        const EXTENTS: usize = 64;
        let queries = self.content.queries;
        let Some(head) = Head::load(queries, self.dirs, self.content.scope, file)? else {
            return Ok(());
        };
        let (mut from, mut lost) = (0, 0);
        loop {
            let extents = queries.extents(file, from, EXTENTS)?;
            for extent in &extents {
                from = extent.range.end();
                if queries.data(extent.data)?.is_none() {
                    lost += extent.range.len;
                    let what = Lost::Bytes {
                        offset: extent.range.offset,
                        len: extent.range.len,
                        why: format!(
                            "no segment of the places given holds data record {}",
                            extent.data
                        ),
                    };
                    self.shared.target.found().loss(head.path(), what);
                }
            }
            if extents.len() < EXTENTS {
                break;
            }
        }
        self.begin_large(head, lost)
    }

    fn send(
        &mut self,
        copies: &Arc<SegmentCopies>,
        segment: SegmentNo,
        offset: u64,
        parts: Vec<Part>,
    ) -> Result<(), Error> {
        if parts.is_empty() {
            return Ok(());
        }
        if self.shared.target.found().watch().stop() {
            return Err(Error::Interrupted);
        }
        if self.shared.failed.load(Ordering::Relaxed) {
            return Err(Error::Worker);
        }
        let number = self.next;
        self.next += 1;
        let at = Progress::Content(segment.get(), offset);
        self.shared.syncer.planned(number, at);
        let job = Job {
            number,
            copies: copies.clone(),
            offset,
            parts,
        };
        // The reader ends early only after a worker has.
        self.jobs.send(job).map_err(|_| Error::Worker)
    }
}

fn part(row: LiveRow, to: To) -> Part {
    Part {
        raw_offset: row.raw_offset,
        data_len: row.data_len,
        extent: row.extent,
        to,
    }
}

impl Shared<'_, '_> {
    fn work(&self, loaded: &Receiver<Loaded>) {
        for loaded in loaded {
            // After a failure the queue is emptied, so that nobody waits.
            if self.failed.load(Ordering::Relaxed) {
                continue;
            }
            let number = loaded.job.number;
            match self.frame(loaded) {
                Ok(bytes) => {
                    self.bytes.fetch_add(bytes, Ordering::Relaxed);
                    self.target.found().watch().advance(bytes);
                    self.syncer.done(number);
                }
                Err(error) => {
                    self.failed.store(true, Ordering::Relaxed);
                    lock(&self.failure).get_or_insert(error);
                    // Ends here: the channels close, and so the planner ends, too.
                    return;
                }
            }
        }
    }

    /// Writes what a frame holds; gives the bytes of content.
    fn frame(&self, loaded: Loaded) -> Result<u64, Error> {
        let Loaded { job, stored } = loaded;
        let bytes = job.parts.iter().map(|part| part.extent.range.len).sum();
        let first = stored.and_then(|stored| {
            let raw = frame::decompress(&stored.compressed, stored.header.raw_len as usize)
                .map_err(|error| error.to_string())?;
            check_parts(&raw, &job.parts).map(|()| raw)
        });
        if let Ok(raw) = first {
            for part in job.parts {
                self.write(part, &raw)?;
            }
            return Ok(bytes);
        }
        let whole = job.copies.frame_checked(job.offset, |raw| {
            check_parts(&raw, &job.parts).map(|()| raw)
        });
        if let Ok((raw, causes)) = whole {
            for cause in causes {
                self.target
                    .found()
                    .warning(&format!("{cause}; another copy was used"));
            }
            for part in job.parts {
                self.write(part, &raw)?;
            }
            return Ok(bytes);
        }
        for part in job.parts {
            let alone = job
                .copies
                .frame_checked(job.offset, |raw| part.bytes(&raw).map(|_| ()).map(|()| raw));
            match alone {
                Ok((raw, _)) => self.write(part, &raw)?,
                Err(why) => self.lose(part, why)?,
            }
        }
        Ok(bytes)
    }

    /// Writes a part of a frame that was checked.
    fn write(&self, part: Part, raw: &[u8]) -> Result<(), Error> {
        let bytes = slice_of(raw, part.raw_offset, part.data_len, &part.extent).unwrap_or_default();
        match part.to {
            To::Whole(head) => {
                if let Some(fd) = self.target.create(&head)? {
                    self.target.write(&head, &fd, bytes, 0)?;
                    self.finish(&head, &fd)?;
                }
                Ok(())
            }
            To::Piece(large) => {
                if let Some(fd) = self.open_large(&large)? {
                    let range = part.extent.range;
                    self.target.write(&large.head, &fd, bytes, range.offset)?;
                    // Advice: where the disk is behind already, nobody waits to tell it.
                    let _ = self.written.try_send((fd.clone(), range));
                }
                self.account(&large, part.extent.range.len)
            }
        }
    }

    /// No copy has these bytes: the file gets a hole there.
    fn lose(&self, part: Part, why: String) -> Result<(), Error> {
        let what = Lost::Bytes {
            offset: part.extent.range.offset,
            len: part.extent.range.len,
            why,
        };
        self.target.found().loss(part.to.head().path(), what);
        match part.to {
            To::Whole(head) => {
                if let Some(fd) = self.target.create(&head)?
                    && self.target.resize(&head, &fd)?
                {
                    self.finish(&head, &fd)?;
                }
                Ok(())
            }
            To::Piece(large) => self.account(&large, part.extent.range.len),
        }
    }

    fn finish(&self, head: &Head, fd: &OwnedFd) -> Result<(), Error> {
        self.files.fetch_add(1, Ordering::Relaxed);
        self.target.finish(head, fd)
    }

    /// `len` bytes more are written or lost; the last ones finish the file.
    fn account(&self, large: &Arc<Large>, len: u64) -> Result<(), Error> {
        if large.remaining.fetch_sub(len, Ordering::AcqRel) > len {
            return Ok(());
        }
        self.finish_large(large)
    }

    fn finish_large(&self, large: &Arc<Large>) -> Result<(), Error> {
        if let Some(fd) = self.open_large(large)? {
            self.finish(&large.head, &fd)?;
        }
        lock(&large.fd).take();
        Ok(())
    }

    /// The file's descriptor; the first to ask creates it. `None` where it could not be created.
    fn open_large(&self, large: &Arc<Large>) -> Result<Option<Arc<OwnedFd>>, Error> {
        let mut open = lock(&large.fd);
        if large.refused.load(Ordering::Relaxed) {
            return Ok(None);
        }
        if let Some(fd) = &*open {
            return Ok(Some(fd.clone()));
        }
        let fd = if large.begun.load(Ordering::Relaxed) {
            self.target.reopen(&large.head)?
        } else {
            match self.target.create(&large.head)? {
                Some(fd) => self.target.resize(&large.head, &fd)?.then_some(fd),
                None => None,
            }
        };
        let Some(fd) = fd.map(Arc::new) else {
            large.refused.store(true, Ordering::Relaxed);
            return Ok(None);
        };
        large.begun.store(true, Ordering::Relaxed);
        *open = Some(fd.clone());
        drop(open);
        self.remember(large);
        Ok(Some(fd))
    }

    /// Closes the file that was opened first where too many are open.
    fn remember(&self, large: &Arc<Large>) {
        let oldest = {
            let mut open = lock(&self.open);
            open.push_back(Arc::downgrade(large));
            if open.len() > OPEN_FILES_MAX {
                open.pop_front()
            } else {
                None
            }
        };
        if let Some(oldest) = oldest.and_then(|weak| weak.upgrade()) {
            lock(&oldest.fd).take();
        }
    }

    /// Finishes what no job finished: files whose last bytes nobody has.
    fn end(&self, rest: HashMap<FileId, (Arc<Large>, u64)>) -> Result<(), Error> {
        if self.failed.load(Ordering::Relaxed) {
            return Ok(());
        }
        rest.into_values()
            .filter(|(large, _)| large.remaining.load(Ordering::Acquire) == 0)
            .try_for_each(|(large, _)| self.finish_large(&large))
    }
}

fn check_parts(raw: &[u8], parts: &[Part]) -> Result<(), String> {
    parts
        .iter()
        .try_for_each(|part| part.bytes(raw).map(|_| ()))
}
