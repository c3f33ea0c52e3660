//! The one thread that owns log and catalog: everything that becomes a transaction passes here.
//!
//! Each turn takes what the workers finished and the hints that are due, makes one transaction of
//! what fits together, checks it by folding it into the catalog (uncommitted), appends it to the
//! log, and hands the log's unsynced part to the syncer. The catalog is committed only when all that
//! was appended is durable, so that its readers, and a restart, never see more than the log has.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, select_biased};
use tierfs::catalog::{self, Catalog, CopyRow, DataPlace, Place};
use tierfs::disk::RealDisk;
use tierfs::frame::{FrameError, MetaFrames, PackedFrame, Packer};
use tierfs::record::{Kind, Op, Pin, Txn};
use tierfs::spool::Spool;
use tierfs::writer::{Placed, SealedSegment, SyncJob, Synced, Writer, WriterError};
use tierfs::{FileId, Lsn, SegmentNo, Time};

use crate::capture::examiner::{self, Examiner, Now};
use crate::capture::hints::Hint;
use crate::capture::worker::{Bundle, Done, JobQueue};
use crate::control::model::Event;
use crate::control::when::When;
use crate::shared::Shared;
use crate::sys;
use crate::sys::mount::PrivateMount;
use crate::sys::schedule::Class;
use crate::tier::worker::Tier;

/// Hints taken in one turn.
const HINTS_PER_TURN: usize = 1000;
/// How long due hints gather, unless there are that many: each turn is a transaction.
const GATHER: Duration = Duration::from_millis(5);
/// How often it is asked whether the workers are behind while they work.
const BEHIND_LOOK: Duration = Duration::from_millis(100);
/// Examinations under way at most.
const JOBS_MAX: usize = 2000;
/// The catalog is committed at least this often while changes never pause.
const CATALOG_COMMIT: Duration = Duration::from_secs(5);
/// The catalog's file is synced at most this often.
const CATALOG_FLUSH: Duration = Duration::from_secs(15);
/// After the start what is copied already leaves the spool sooner.
const FIRST_FLUSH: Duration = Duration::from_secs(1);
/// A sync that only serves throughput waits this long for more to sync.
const SYNC_PAUSE: Duration = Duration::from_millis(50);
/// With less room than this, the catalog is committed before each transaction.
const TIGHT: u64 = 64 * 1024 * 1024;
/// Paths named in one notice.
const PATHS_TOLD: usize = 100;

/// Why the committer ends; the daemon ends with it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The log cannot be written.
    #[error("{0}")]
    Writer(#[from] WriterError),
    /// The catalog cannot be read or written.
    #[error("{0}")]
    Catalog(#[from] catalog::Error),
    /// A transaction cannot be encoded.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// The filesystem cannot be looked at.
    #[error("{0}")]
    Sys(#[from] sys::Error),
    /// The workers or the syncer ended.
    #[error("the daemon cannot go on: {0} ended unexpectedly")]
    Thread(&'static str),
}

impl From<examiner::Error> for Error {
    fn from(error: examiner::Error) -> Self {
        match error {
            examiner::Error::Catalog(error) => Self::Catalog(error),
        }
    }
}

/// Who is told of a transaction, and how much of it was theirs.
type Told = (Sender<(Option<Lsn>, u64)>, u64);

/// What other threads want in log or catalog.
#[derive(Debug)]
pub enum Asked {
    /// Operations, logged as they are.
    Ops(Vec<Op>),
    /// A volume was found at a place where the log does not know it.
    Volume {
        /// Its serial.
        serial: String,
        /// Its pool.
        pool: String,
        /// Where it is.
        path: PathBuf,
    },
    /// A segment's copy was written, found or verified.
    Copy(CopyRow),
    /// A value that concerns this machine only, see [`tierfs::catalog::Catalog::set_meta`].
    Local {
        /// Its name.
        key: String,
        /// The value.
        value: Vec<u8>,
    },
    /// Files are pinned, or not any more. Told when it is appended: the transaction, and how many of them
    /// it changed. Those that are gone meanwhile, or so already, are left out.
    Pins {
        /// The files.
        files: Vec<FileId>,
        /// Which of the two.
        pinned: bool,
        /// Who asked.
        told: Sender<(Option<Lsn>, u64)>,
    },
}

/// What the committer is made of.
pub struct Parts {
    /// What all threads share.
    pub shared: Arc<Shared>,
    /// Folded to the log's end.
    pub catalog: Catalog,
    /// At the log's end.
    pub writer: Writer<RealDisk>,
    /// The watched filesystem.
    pub mount: Arc<PrivateMount>,
    /// To the workers.
    pub jobs: Arc<JobQueue>,
    /// From the workers.
    pub bundles: Receiver<Bundle>,
    /// To the syncer.
    pub syncer: Sender<SyncJob<RealDisk>>,
    /// From the syncer.
    pub synced: Receiver<Result<Synced, WriterError>>,
    /// Sealed segments, as they become durable.
    pub sealed: Sender<SealedSegment>,
    /// What other threads want in log or catalog.
    pub asked: Receiver<Asked>,
    /// zstd's.
    pub level: i32,
    /// An open segment is sealed after this time.
    pub segment_age: Duration,
    /// Where the catalog's highest durable LSN is told: segments up to there may leave the spool.
    pub catalog_synced: Sender<Option<Lsn>>,
    /// Its room.
    pub spool: Spool<RealDisk>,
    /// The most bytes that it may hold.
    pub spool_bytes_max: u64,
    /// Where it is, for messages.
    pub spool_path: PathBuf,
    /// Hears of deleted files, which may be stubs.
    pub tier: Option<Arc<Tier>>,
}

/// See the module.
pub struct Committer {
    parts: Parts,
    examiner: Examiner,
    packer: Packer,
    syncing: bool,
    dirty: bool,
    last_sync: Instant,
    last_commit: Instant,
    folded: Option<Lsn>,
    last_time: Time,
    one_by_one: usize,
    untold: Vec<Vec<u8>>,
    untold_count: usize,
    local: bool,
    next_flush: Instant,
    flushed: Option<Lsn>,
    next_take: Instant,
}

impl Committer {
    /// Takes over log and catalog.
    pub fn new(parts: Parts) -> Result<Self, Error> {
        let now = Instant::now();
        Ok(Self {
            examiner: Examiner::new(parts.mount.clone(), parts.jobs.clone())?,
            packer: Packer::new(parts.level)?,
            syncing: false,
            dirty: false,
            last_sync: now.checked_sub(SYNC_PAUSE).unwrap_or(now),
            last_commit: now,
            folded: parts.catalog.folded(),
            last_time: parts.catalog.last_time().unwrap_or_default(),
            one_by_one: 0,
            untold: Vec::new(),
            untold_count: 0,
            local: false,
            next_flush: now + FIRST_FLUSH,
            flushed: None,
            next_take: now,
            parts,
        })
    }

    /// The thread's body: until the daemon stops, and everything appended is durable.
    pub fn run(mut self) -> Result<(), Error> {
        while !self.parts.shared.stopping() {
            self.turn()?;
        }
        self.settle_log()?;
        self.parts.catalog.sync()?;
        Ok(())
    }

    fn turn(&mut self) -> Result<(), Error> {
        let mut bundles = Vec::new();
        self.wait(&mut bundles)?;
        bundles.extend(self.parts.bundles.try_iter().take(16));
        let mut done = Vec::new();
        for bundle in bundles {
            if let Some(frame) = bundle.frame {
                self.append_data(&frame)?;
            }
            done.extend(bundle.done);
        }
        let hints = self.take_hints();
        let (asked, told) = self.asked()?;
        if !asked.is_empty() && !self.commit(asked)? {
            return Err(Error::Thread(
                "the first transaction was refused and the daemon",
            ));
        }
        let lsn = Lsn::new(self.parts.shared.progress().written);
        for (told, changed) in told {
            // Who asked may have given up.
            let _ = told.send((lsn.filter(|_| changed > 0), changed));
        }
        self.batch(done, hints)?;
        let class = if self.parts.shared.is_behind() {
            Class::Normal
        } else {
            Class::Idle
        };
        self.parts.jobs.schedule(class);
        self.seal_if_due()?;
        self.sync_if_due()?;
        self.commit_catalog_if_due()?;
        self.flush_catalog_if_due()?;
        self.parts
            .shared
            .examining
            .store(self.examiner.under_way(), Ordering::Relaxed);
        Ok(())
    }

    /// Waits for something to do.
    fn wait(&mut self, bundles: &mut Vec<Bundle>) -> Result<(), Error> {
        let patience = self.patience();
        select_biased! {
            recv(self.parts.synced) -> result => {
                let result = result.map_err(|_| Error::Thread("the syncer"))?;
                self.on_synced(result)?;
            }
            recv(self.parts.bundles) -> bundle => bundles.push(bundle.map_err(|_| Error::Thread("all workers"))?),
            recv(self.parts.shared.woken()) -> _ => {}
            default(patience) => {}
        }
        Ok(())
    }

    /// How long there is nothing to do but what comes in.
    fn patience(&self) -> Duration {
        let now = Instant::now();
        let hint = if self.examiner.under_way() < JOBS_MAX {
            let urgent = self.parts.shared.urgent.load(Ordering::Relaxed);
            let due = self.parts.shared.hints().next_due(urgent);
            due.map(|due| due.max(self.next_take))
        } else {
            None
        };
        let sync = (self.dirty && !self.syncing).then(|| self.last_sync + SYNC_PAUSE);
        let seal = self
            .open_for()
            .map(|age| now + self.parts.segment_age.saturating_sub(age));
        let commit = self
            .uncommitted()
            .then(|| self.last_commit + CATALOG_COMMIT);
        let flush = (self.flushed != self.folded && !self.uncommitted()).then_some(self.next_flush);
        // Workers that get no processor raise no event.
        let behind = (self.examiner.under_way() > 0).then(|| now + BEHIND_LOOK);
        let next = [hint, sync, seal, commit, flush, behind]
            .into_iter()
            .flatten()
            .min();
        next.map_or(Duration::from_secs(30), |at| {
            at.saturating_duration_since(now)
        })
    }

    /// What other threads want logged, and who is to be told then. What concerns this
    /// machine only goes straight into the catalog's local tables.
    fn asked(&mut self) -> Result<(Vec<Op>, Vec<Told>), Error> {
        let (mut ops, mut all_told) = (Vec::new(), Vec::new());
        while let Ok(asked) = self.parts.asked.try_recv() {
            match asked {
                Asked::Ops(more) => ops.extend(more),
                Asked::Copy(copy) => self.parts.catalog.set_copy(&copy)?,
                Asked::Local { key, value } => self.parts.catalog.set_meta(&key, Some(&value))?,
                Asked::Volume { serial, pool, path } => {
                    ops.push(crate::daemon::volume_op(serial, pool, &path));
                }
                Asked::Pins {
                    files,
                    pinned,
                    told,
                } => {
                    let changed = self.pins(files, pinned, &mut ops)?;
                    all_told.push((told, changed));
                    // The next may undo these: it must see them.
                    self.parts.shared.wake();
                    self.local = true;
                    break;
                }
            }
            self.local = true;
        }
        Ok((ops, all_told))
    }

    /// The pins that change something, once for each file; gives how many.
    fn pins(&self, files: Vec<FileId>, pinned: bool, ops: &mut Vec<Op>) -> Result<u64, Error> {
        let (queries, mut changed) = (self.parts.catalog.queries(), 0);
        for file in files.into_iter().collect::<BTreeSet<_>>() {
            let regular = queries
                .inode(file)?
                .is_some_and(|row| row.kind == Kind::Regular);
            if regular && queries.is_pinned(file)? != pinned {
                ops.push(Op::Pin(Pin { file, pinned }));
                changed += 1;
            }
        }
        Ok(changed)
    }

    fn take_hints(&mut self) -> Vec<Hint> {
        let now = Instant::now();
        if now < self.next_take {
            return Vec::new();
        }
        let room = JOBS_MAX.saturating_sub(self.examiner.under_way());
        let urgent = self.parts.shared.urgent.load(Ordering::Relaxed);
        let max = if self.one_by_one > 0 {
            1
        } else {
            HINTS_PER_TURN.min(room)
        };
        let taken = self.parts.shared.hints().take_due(now, max, urgent);
        if taken.len() < max {
            self.next_take = now + GATHER;
        }
        taken
    }

    // ---- the log -------------------------------------------------------------------------------

    /// Retries while the spool is full: nothing is dropped, and the status says so.
    /// `unlogged`: the catalog already holds what is about to be appended, and cannot be committed now.
    fn append<T>(
        &mut self,
        unlogged: bool,
        mut act: impl FnMut(&mut Writer<RealDisk>) -> Result<T, WriterError>,
    ) -> Result<T, Error> {
        loop {
            match act(&mut self.parts.writer) {
                Ok(value) => {
                    self.parts.shared.well("spool");
                    return Ok(value);
                }
                Err(error @ WriterError::Full { .. }) => {
                    self.parts.shared.trouble(
                        "spool",
                        true,
                        "the log cannot grow: the spool is full",
                        error.to_string(),
                        format!(
                            "make room on the filesystem of {}, or bring back the volumes that its segments wait for; \
                             what changes meanwhile is found and logged then",
                            self.parts.spool_path.display()
                        ),
                    );
                    if self.parts.shared.stopping() {
                        return Err(error.into());
                    }
                    // Syncing and sealing go on: they are what makes room.
                    self.sync_now()?;
                    if !unlogged {
                        self.let_segments_go()?;
                    }
                    std::thread::sleep(Duration::from_millis(500));
                    while let Ok(result) = self.parts.synced.try_recv() {
                        self.on_synced(result)?;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn append_data(&mut self, frame: &PackedFrame) -> Result<(), Error> {
        let bytes = frame.compressed.len() as u64;
        let data = frame.data.clone();
        let placed = self.append(false, |writer| writer.append_data(frame))?;
        let places: Vec<DataPlace> = data
            .iter()
            .map(|entry| DataPlace {
                id: entry.id,
                frame_offset: placed.frame_offset,
                raw_offset: entry.raw_offset,
                len: entry.len,
            })
            .collect();
        self.parts.catalog.apply_data(placed.segment, &places)?;
        self.appended(bytes);
        Ok(())
    }

    fn appended(&mut self, bytes: u64) {
        self.dirty = true;
        self.parts
            .shared
            .counters
            .bytes_logged
            .fetch_add(bytes, Ordering::Relaxed);
    }

    /// Checks a transaction by folding it, then appends it. False where the catalog refuses it.
    fn commit(&mut self, ops: Vec<Op>) -> Result<bool, Error> {
        if self.is_tight() {
            // Nothing but this transaction must then wait in the catalog for room in the log.
            self.let_segments_go()?;
        }
        let wall = Time::now();
        let txn = Txn {
            lsn: self.parts.writer.next_lsn(),
            time: self.last_time.max(wall),
            wall,
            ops,
        };
        let nowhere = Place {
            segment: SegmentNo::FIRST,
            frame_offset: 0,
        };
        if let Err(error) = self.parts.catalog.apply(&txn, nowhere) {
            if !matches!(error, catalog::Error::Refused { .. }) {
                return Err(error.into());
            }
            tracing::debug!(%error, ops = ?txn.ops, "refused");
            self.parts.shared.refused(Some(&error));
            return Ok(false);
        }
        let mut meta = MetaFrames::default();
        meta.push_txn(&txn)?;
        let frames = meta
            .finish()
            .iter()
            .map(|raw| self.packer.pack(raw))
            .collect::<Result<Vec<_>, FrameError>>()?;
        let bytes = frames
            .iter()
            .map(|frame| frame.compressed.len() as u64)
            .sum();
        let placed: Vec<Placed> = self.append(true, |writer| writer.append_txns(&frames))?;
        if let Some(last) = placed.last() {
            let place = Place {
                segment: last.segment,
                frame_offset: last.frame_offset,
            };
            self.parts.catalog.set_place(txn.lsn, place)?;
        }
        self.parts.shared.refused(None);
        self.last_time = txn.time;
        self.appended(bytes);
        self.parts
            .shared
            .advance(|progress| progress.written = txn.lsn.get());
        if self.parts.shared.heard() {
            self.remember_paths(&txn)?;
        }
        if let Some(tier) = &self.parts.tier {
            let deleted = txn.ops.iter().filter_map(|op| match op {
                Op::Delete(delete) => Some(delete.file),
                _ => None,
            });
            tier.note_deleted(deleted);
        }
        Ok(true)
    }

    /// Paths for the notice that tells that they are durable.
    fn remember_paths(&mut self, txn: &Txn) -> Result<(), Error> {
        let files: BTreeSet<FileId> = txn.ops.iter().filter_map(subject).collect();
        self.untold_count += files.len();
        for file in files {
            if self.untold.len() >= PATHS_TOLD {
                break;
            }
            self.untold
                .extend(self.parts.catalog.queries().path_of(file)?);
        }
        Ok(())
    }

    /// How long the open segment has been open; `None` where there is none.
    fn open_for(&self) -> Option<Duration> {
        let opened = self.parts.writer.opened_at()?;
        let seconds = Time::now().seconds.saturating_sub(opened.seconds);
        Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
    }

    fn seal_if_due(&mut self) -> Result<(), Error> {
        let open_for = self.open_for();
        let wanted = self.parts.shared.seal_wanted.swap(false, Ordering::Relaxed);
        if open_for.is_some_and(|age| wanted || age >= self.parts.segment_age) {
            self.append(false, Writer::seal_now)?;
            self.dirty = true;
        }
        Ok(())
    }

    fn sync_if_due(&mut self) -> Result<(), Error> {
        let idle = self.examiner.under_way() == 0 && self.parts.bundles.is_empty();
        if self.dirty && !self.syncing && (idle || self.last_sync.elapsed() >= SYNC_PAUSE) {
            self.sync_now()?;
        }
        Ok(())
    }

    fn sync_now(&mut self) -> Result<(), Error> {
        if self.syncing || !self.dirty {
            return Ok(());
        }
        self.dirty = false;
        if let Some(job) = self.parts.writer.take_sync() {
            self.syncing = true;
            self.last_sync = Instant::now();
            self.parts
                .syncer
                .send(job)
                .map_err(|_| Error::Thread("the syncer"))?;
        }
        Ok(())
    }

    fn on_synced(&mut self, result: Result<Synced, WriterError>) -> Result<(), Error> {
        self.syncing = false;
        let synced = self.parts.writer.done(result)?;
        for segment in &synced.sealed {
            self.parts.catalog.add_segment(&segment.row())?;
            self.local = true;
            self.parts.shared.tell(&Event::Sealed {
                time: When::now(),
                segment: segment.no.get(),
                bytes: segment.bytes,
                lsn: segment.last_lsn.map(Lsn::get),
            });
            // Only a daemon that ends has no flushers.
            let _ = self.parts.sealed.send(segment.clone());
        }
        if let Some(durable) = synced.durable {
            self.parts
                .shared
                .advance(|progress| progress.durable = durable.get());
            if self.untold_count > 0 {
                let paths = std::mem::take(&mut self.untold);
                self.parts.shared.tell(&Event::Durable {
                    time: When::now(),
                    lsn: durable.get(),
                    paths: paths
                        .iter()
                        .filter_map(|path| self.parts.shared.on_mount(path))
                        .collect(),
                    paths_total: std::mem::take(&mut self.untold_count) as u64,
                });
            }
        }
        Ok(())
    }

    /// Waits until everything appended is durable, and commits the catalog.
    fn settle_log(&mut self) -> Result<(), Error> {
        while self.syncing || self.dirty {
            self.sync_now()?;
            if self.syncing {
                let result = self
                    .parts
                    .synced
                    .recv()
                    .map_err(|_| Error::Thread("the syncer"))?;
                self.on_synced(result)?;
            }
        }
        self.commit_catalog()
    }

    fn uncommitted(&self) -> bool {
        self.local || self.parts.catalog.folded() != self.folded
    }

    fn commit_catalog_if_due(&mut self) -> Result<(), Error> {
        if !self.uncommitted() {
            return Ok(());
        }
        if !self.dirty && !self.syncing {
            self.commit_catalog()
        } else if self.last_commit.elapsed() >= CATALOG_COMMIT {
            self.settle_log()
        } else {
            Ok(())
        }
    }

    fn commit_catalog(&mut self) -> Result<(), Error> {
        self.parts.catalog.commit()?;
        self.local = false;
        self.last_commit = Instant::now();
        self.folded = self.parts.catalog.folded();
        let folded = self.folded.map_or(0, Lsn::get);
        self.parts.shared.advance(|progress| {
            progress.folded = folded;
            progress.seen_folded = progress.seen;
        });
        Ok(())
    }

    /// Now and then the catalog's file is synced, so that segments may leave the spool.
    fn flush_catalog_if_due(&mut self) -> Result<(), Error> {
        let due = self.flushed != self.folded && Instant::now() >= self.next_flush;
        if due && !self.uncommitted() {
            self.flush_catalog()?;
        }
        Ok(())
    }

    fn flush_catalog(&mut self) -> Result<(), Error> {
        self.next_flush = Instant::now() + CATALOG_FLUSH;
        self.flushed = self.folded;
        let _ = self.parts.catalog_synced.send(self.parts.catalog.sync()?);
        Ok(())
    }

    /// Commits and syncs the catalog now, so that every copied segment may leave the spool.
    fn let_segments_go(&mut self) -> Result<(), Error> {
        self.settle_log()?;
        if self.flushed != self.folded {
            self.flush_catalog()?;
        }
        Ok(())
    }

    /// True where the next appends may find the spool full.
    fn is_tight(&self) -> bool {
        let spool = &self.parts.spool;
        let free = spool.bytes_free().unwrap_or(u64::MAX);
        free.min(
            self.parts
                .spool_bytes_max
                .saturating_sub(spool.bytes_used()),
        ) < TIGHT
    }

    /// Makes a transaction of everything that can be settled now.
    fn batch(&mut self, done: Vec<Done>, hints: Vec<Hint>) -> Result<(), Error> {
        self.one_by_one = self.one_by_one.saturating_sub(1);
        let mut now = Now {
            shared: &self.parts.shared,
            catalog: &mut self.parts.catalog,
            folded: self.folded,
        };
        let mut turn = self.examiner.turn(&mut now, done, hints)?;
        let ops = std::mem::take(&mut turn.ops);
        if turn.seen {
            self.local = true;
            self.parts.shared.advance(|progress| progress.seen += 1);
        }
        let taken = ops.is_empty() || self.commit(ops)?;
        if !taken {
            self.one_by_one = turn.settled() * 2 + 1;
        }
        self.examiner.close(&self.parts.shared, turn, taken);
        Ok(())
    }
}

/// The file that an operation is about, for people.
fn subject(op: &Op) -> Option<FileId> {
    match op {
        Op::Inode(inode) => Some(inode.file),
        Op::Content(content) => Some(content.file),
        Op::Link(link) => Some(link.file),
        Op::Unlink(unlink) => Some(unlink.parent),
        _ => None,
    }
}
