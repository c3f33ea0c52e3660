//! Workers: examine regular files, fill data frames with their new content, and compress them.
//!
//! Each worker fills a frame of its own. A result leaves together with, or after, the last frame
//! that its content lies in, so whoever appends what comes in the order in which it comes never
//! refers to data that is not in the log yet.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use tierfs::catalog::Reader;
use tierfs::frame::{FrameError, FrameKind, FrameMark, PackedFrame, Packer, RawFrame};
use tierfs::layout::{self, Range};
use tierfs::{DataId, Epoch, FileId, Hash, LogId, Lsn};

use super::content::{Base, DataSink};
use super::examine::{self, FileExam, Known, Outcome};
use super::facts::Certainty;
use super::hints::Look;
use crate::sys;
use crate::sys::handle::Handle;
use crate::sys::mount::PrivateMount;
use crate::sys::schedule::{self, Class, Thread};
use crate::tier::fill::FillError;
use crate::tier::worker::Tier;

/// Data ids are taken in blocks of this many, so that the chunks of a large file follow one another.
const ID_BLOCK: u64 = 4096;

/// A file to be examined.
#[derive(Debug)]
pub struct Job {
    /// Which inode: a regular file, or one that the log does not know.
    pub handle: Handle,
    /// Its id and what the log knows of it. The catalog's readers can see that version already.
    pub known: Option<(FileId, Known)>,
    /// How closely.
    pub look: Look,
}

/// What came of a [`Job`].
#[derive(Debug)]
pub struct Done {
    /// Which inode.
    pub handle: Handle,
    /// Its id, where the log knew it.
    pub file: Option<FileId>,
    /// How long it took.
    pub took: Duration,
    /// What was found, or why it could not be examined.
    pub outcome: Result<Outcome, WorkError>,
}

/// What a worker sends: a frame to be appended, then the results that it completes.
#[derive(Debug, Default)]
pub struct Bundle {
    /// Absent where the results need none.
    pub frame: Option<PackedFrame>,
    /// Results whose content is in the log once `frame` is.
    pub done: Vec<Done>,
}

/// Why a file could not be examined.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// The filesystem failed.
    #[error(transparent)]
    Sys(#[from] sys::Error),
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] tierfs::catalog::Error),
    /// A frame could not be made.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// It must be recalled first.
    #[error(
        "it is a released file that is not what the log has: it is recalled first (that needs `device` in the configuration)"
    )]
    Hollow,
    /// It is on the list of released files without a mark, and that cannot be seen to.
    #[error("whether it is a released file cannot be told: {0}")]
    Unmarked(#[from] FillError),
    /// The daemon is going down.
    #[error("the daemon stops")]
    Stopping,
}

/// The queue of jobs, shared by all workers.
#[derive(Default)]
pub struct JobQueue {
    state: Mutex<Queued>,
    wake: Condvar,
    workers: Mutex<Workers>,
}

/// The threads that take jobs, and how they compete with other programs.
struct Workers {
    threads: Vec<Thread>,
    class: Class,
}

impl Default for Workers {
    fn default() -> Self {
        Self {
            threads: Vec::new(),
            class: Class::Normal,
        }
    }
}

#[derive(Default)]
struct Queued {
    jobs: VecDeque<Job>,
    closed: bool,
    /// Workers that wait and that nobody has woken, or a few more: waking costs a system call each time.
    idle: usize,
}

impl JobQueue {
    /// Lets the workers compete with other programs, or take what these leave: whoever unpacks an
    /// archive is not to wait for its examination, as long as the log is not behind.
    pub fn schedule(&self, class: Class) {
        let mut workers = self.workers();
        if workers.class != class {
            workers.class = class;
            for thread in &workers.threads {
                put_into(*thread, class);
            }
        }
    }

    /// The calling thread takes jobs from here.
    fn enter(&self) {
        let mut workers = self.workers();
        workers.threads.push(schedule::this_thread());
        put_into(schedule::this_thread(), workers.class);
    }

    fn workers(&self) -> MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a job.
    pub fn push(&self, job: Job) {
        let mut state = self.state();
        state.jobs.push_back(job);
        if state.idle > 0 {
            state.idle -= 1;
            self.wake.notify_one();
        }
    }

    /// Lets the workers end once the queue is empty.
    pub fn close(&self) {
        let mut state = self.state();
        state.jobs.clear();
        state.closed = true;
        self.wake.notify_all();
    }

    /// The next job, at once.
    pub(super) fn try_pop(&self) -> Option<Job> {
        self.state().jobs.pop_front()
    }

    /// The next job; `None` where the queue is closed.
    fn pop(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state.idle += 1;
            state = self
                .wake
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn state(&self) -> MutexGuard<'_, Queued> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Courtesy only: nothing depends on it.
fn put_into(thread: Thread, class: Class) {
    if let Err(error) = schedule::set_class(thread, class) {
        tracing::debug!(%error, "a worker's scheduling class stays as it is");
    }
}

/// What all workers share.
#[derive(Clone)]
pub struct Context {
    /// The watched filesystem.
    pub mount: Arc<PrivateMount>,
    /// For the pieces of versions in the log.
    pub catalog: PathBuf,
    /// This writer's epoch.
    pub epoch: Epoch,
    /// The next free data number of the epoch.
    pub numbers: Arc<AtomicU64>,
    /// zstd's.
    pub level: i32,
    /// Jobs come from here.
    pub jobs: Arc<JobQueue>,
    /// Bundles go there.
    pub out: Sender<Bundle>,
    /// The log.
    pub log_id: LogId,
    /// Recalls stubs that differ from the log.
    pub tier: Option<Arc<Tier>>,
}

/// Runs one worker until the queue is closed.
pub fn run(context: Context) -> Result<(), WorkError> {
    let jobs = context.jobs.clone();
    jobs.enter();
    let mut worker = Worker::new(context)?;
    while let Some(job) = jobs.pop() {
        let mut next = Some(job);
        while let Some(job) = next {
            if worker.examine(job).is_err() {
                return Ok(());
            }
            next = jobs.try_pop();
        }
        if worker.flush().is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// Examines jobs one after the other.
pub(super) struct Worker {
    mount: Arc<PrivateMount>,
    catalog: PathBuf,
    reader: Option<Reader>,
    frames: Frames,
    log_id: LogId,
    tier: Option<Arc<Tier>>,
}

impl Worker {
    pub(super) fn new(context: Context) -> Result<Self, WorkError> {
        let frames = Frames {
            raw: RawFrame::new(FrameKind::Data),
            packer: Packer::new(context.level)?,
            last: None,
            epoch: context.epoch,
            numbers: context.numbers,
            next: 0,
            end: 0,
            done: Vec::new(),
            out: context.out,
        };
        Ok(Self {
            mount: context.mount,
            catalog: context.catalog,
            reader: None,
            frames,
            log_id: context.log_id,
            tier: context.tier,
        })
    }

    /// Sends what was found so far.
    pub(super) fn flush(&mut self) -> Result<(), WorkError> {
        self.frames.flush()
    }

    /// Fails only where nobody takes results any more.
    pub(super) fn examine(&mut self, job: Job) -> Result<(), WorkError> {
        let started = Instant::now();
        let outcome = self
            .outcome(&job)
            .and_then(|outcome| self.whole_first(&job, outcome));
        if matches!(outcome, Err(WorkError::Stopping)) {
            return Err(WorkError::Stopping);
        }
        self.frames.done.push(Done {
            file: job.known.map(|(file, _)| file),
            handle: job.handle,
            took: started.elapsed(),
            outcome,
        });
        Ok(())
    }

    /// A stub that is not what the log has is recalled, and then examined again.
    fn whole_first(&self, job: &Job, mut outcome: Outcome) -> Result<Outcome, WorkError> {
        if let (Outcome::Facts(facts), Some(tier)) = (&mut outcome, &self.tier)
            && facts.certainty == Certainty::Unread
            && facts.unreadable.is_none()
            && !facts.hollow
            && tier.vouches(&job.handle, facts.stat.ctime)
        {
            facts.certainty = Certainty::Sure;
        }
        if let (Outcome::Facts(facts), Some(tier)) = (&outcome, &self.tier) {
            let file = job.known.map(|(file, _)| file);
            tier.examined(&job.handle, file, facts.unreadable.is_some());
        }
        let hollow = matches!(&outcome, Outcome::Facts(facts) if facts.hollow);
        if hollow {
            if let Some(tier) = &self.tier {
                tier.make_whole(&job.handle);
            }
            if self.tier.is_none() || job.known.is_none() {
                return Err(WorkError::Hollow);
            }
        }
        Ok(outcome)
    }

    fn outcome(&mut self, job: &Job) -> Result<Outcome, WorkError> {
        if job.known.is_none() && !examine::has_content(self.mount.root(), &job.handle)? {
            return Ok(examine::attributes(self.mount.root(), &job.handle)?);
        }
        if let Some(tier) = self.tier.as_ref().filter(|_| job.known.is_some())
            && !tier.regain_mark(&job.handle)?
        {
            return Err(WorkError::Hollow);
        }
        if self.reader.is_none() && job.known.is_some_and(|(_, known)| known.content.is_some()) {
            self.reader = Some(Reader::open(&self.catalog)?);
        }
        let Self {
            mount,
            reader,
            frames,
            log_id,
            ..
        } = self;
        let exam = FileExam {
            mount: mount.root(),
            handle: &job.handle,
            known: job.known.map(|(_, known)| known),
            look: job.look,
            sink: frames,
            log_id: *log_id,
        };
        let base = reader.as_ref().zip(job.known.map(|(file, _)| file));
        exam.run(&mut |_: Lsn| -> Result<Base<'_>, WorkError> {
            Ok(match base {
                Some((reader, file)) => Box::new(Pieces {
                    reader,
                    file,
                    from: 0,
                    page: VecDeque::new(),
                    end: false,
                }),
                None => Box::new(std::iter::empty()),
            })
        })
    }
}

/// The pieces of the current version of a file, a page of extents at a time.
struct Pieces<'r> {
    reader: &'r Reader,
    file: FileId,
    from: u64,
    page: VecDeque<(Range, Hash)>,
    end: bool,
}

impl Pieces<'_> {
    const EXTENTS: usize = 256;

    fn fill(&mut self) -> Result<(), tierfs::catalog::Error> {
        let rows = self
            .reader
            .queries()
            .extents(self.file, self.from, Self::EXTENTS)?;
        self.end = rows.len() < Self::EXTENTS;
        for row in rows {
            self.from = row.range.end();
            self.page.extend(layout::pieces(row.range).zip(row.hashes));
        }
        Ok(())
    }
}

impl Iterator for Pieces<'_> {
    type Item = (Range, Hash);

    fn next(&mut self) -> Option<(Range, Hash)> {
        if self.page.is_empty() && !self.end {
            // Without the base everything is new: more is logged than needed, nothing is lost.
            if let Err(error) = self.fill() {
                tracing::warn!(file = %self.file, %error, "the catalog cannot say what is logged of a file");
                self.end = true;
            }
        }
        self.page.pop_front()
    }
}

/// A worker's open data frame and what waits for it.
struct Frames {
    raw: RawFrame,
    packer: Packer,
    last: Option<FrameMark>,
    epoch: Epoch,
    numbers: Arc<AtomicU64>,
    next: u64,
    end: u64,
    done: Vec<Done>,
    out: Sender<Bundle>,
}

impl Frames {
    fn id(&mut self) -> DataId {
        if self.next == self.end {
            self.next = self.numbers.fetch_add(ID_BLOCK, Ordering::Relaxed);
            self.end = self.next + ID_BLOCK;
        }
        self.next += 1;
        DataId {
            epoch: self.epoch,
            number: self.next - 1,
        }
    }

    /// Sends the frame, and all results so far.
    fn flush(&mut self) -> Result<(), WorkError> {
        let frame = if self.raw.is_empty() {
            None
        } else {
            Some(self.packer.pack(&self.raw)?)
        };
        self.raw.clear();
        self.last = None;
        if frame.is_none() && self.done.is_empty() {
            return Ok(());
        }
        let bundle = Bundle {
            frame,
            done: std::mem::take(&mut self.done),
        };
        self.out.send(bundle).map_err(|_| WorkError::Stopping)
    }
}

impl DataSink for Frames {
    type Error = WorkError;

    fn begin(&mut self, len: usize) -> Result<(DataId, &mut [u8]), WorkError> {
        if !self.raw.fits_data(len) {
            self.flush()?;
        }
        let id = self.id();
        self.last = Some(self.raw.mark());
        Ok((id, self.raw.begin_data(id, len)))
    }

    fn cancel(&mut self) {
        if let Some(mark) = self.last.take() {
            self.raw.rewind(mark);
        }
    }
}
