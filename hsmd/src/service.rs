//! The daemon as the control socket sees it: status, sync, where things are.
//!
//! Everything here answers from what the threads share and from read-only views; nothing here waits
//! for the committer but [`Core::sync`], which is asked to.

mod policy;

use std::fs;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use media::Volume;
use media::directory::{self, DirectoryVolume, Found};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use tierfs::catalog::{Reader, Readers};
use tierfs::disk::RealDisk;
use tierfs::spool::Spool;
use tierfs::{FileId, LogId, Lsn, Time};

use crate::board::{self, Board, PoolView, VolumeView};
use crate::capture::hints::{Beside, Hint, Key, Look};
use crate::committer::Asked;
use crate::config::Config;
use crate::control::model::{
    CatalogStatus, Event, EventCounts, Lag, LagFile, Located, Notice, Pending, PoolStatus,
    Progress, ReleasedStatus, SpoolStatus, State, Status, SweepStatus, SyncDone, SyncRequest,
    VerifyDone, VerifyProgress, VolumeState, VolumeStatus, Waiting,
};
use crate::control::when::When;
use crate::control::{Core, CoreError, Freed};
use crate::doubts::Doubts;
use crate::events::EventsHandle;
use crate::fetch::Copies;
use crate::flush;
use crate::policy::space::Space;
use crate::preflight::Report;
use crate::shared::Shared;
use crate::sys::handle::{Handle, handle_at, handle_of};
use crate::sys::io;
use crate::sys::mount::PrivateMount;
use crate::sys::stat::{stat_at, stat_of};
use crate::tier::worker::Tier;

/// How often a waiting call looks whether it was cancelled.
const TICK: Duration = Duration::from_millis(20);
/// Files named in the lag.
const WORST: usize = 5;
/// A file whose name the log does not know.
const UNKNOWN: &str = "?";
/// How long status waits for the kernel's queue to be read.
const PATIENCE: Duration = Duration::from_millis(50);

/// What the service answers from.
pub struct Service {
    config: Config,
    shared: Arc<Shared>,
    board: Arc<Board>,
    spool: Spool<RealDisk>,
    mount: Arc<PrivateMount>,
    prefix: Vec<u8>,
    fs_type: String,
    fs_uuid: String,
    log_id: LogId,
    events: EventsHandle,
    sweep: Sender<()>,
    asked: Sender<Asked>,
    tier: Option<Arc<Tier>>,
    space: Arc<Space>,
    doubts: Arc<Doubts>,
    /// For what is asked many times.
    readers: Readers,
    started: Time,
    begun: Instant,
    /// Names that the log had at the start.
    names: Option<u64>,
}

/// What [`Service::new`] takes.
pub struct ServiceParts {
    /// The configuration.
    pub config: Config,
    /// What all threads share.
    pub shared: Arc<Shared>,
    /// What is copied.
    pub board: Arc<Board>,
    /// The spool.
    pub spool: Spool<RealDisk>,
    /// The watched filesystem.
    pub mount: Arc<PrivateMount>,
    /// Where the public mount's root lies in the log's tree.
    pub prefix: Vec<u8>,
    /// The log.
    pub log_id: LogId,
    /// The event reader.
    pub events: EventsHandle,
    /// Asks for a sweep.
    pub sweep: Sender<()>,
    /// To the committer.
    pub asked: Sender<Asked>,
    /// Release and recall, where hsmd exposes the filesystem.
    pub tier: Option<Arc<Tier>>,
    /// What the watcher of the free space says.
    pub space: Arc<Space>,
    /// Who hears of damaged copies.
    pub doubts: Arc<Doubts>,
}

fn lsn_of(value: u64) -> Option<u64> {
    Some(value).filter(|value| *value > 0)
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

fn from_unix(seconds: u64) -> Option<When> {
    let seconds = i64::try_from(seconds).ok().filter(|seconds| *seconds > 0)?;
    Some(Time { seconds, nanos: 0 }.into())
}

impl Service {
    /// Answers for a daemon on the filesystem of `report`.
    pub fn new(parts: ServiceParts, report: &Report) -> Self {
        let ServiceParts {
            config,
            shared,
            board,
            spool,
            mount,
            prefix,
            log_id,
            events,
            sweep,
            asked,
            tier,
            space,
            doubts,
        } = parts;
        let names = Reader::open(&config.catalog)
            .and_then(|reader| reader.queries().counts())
            .map(|counts| counts.dentries);
        Self {
            names: names.ok().filter(|names| *names > 0),
            readers: Readers::new(config.catalog.clone()),
            config,
            shared,
            board,
            spool,
            mount,
            prefix,
            fs_type: report.fs_type.clone(),
            fs_uuid: crate::daemon::uuid_text(&report.fs_uuid),
            log_id,
            events,
            sweep,
            asked,
            tier,
            space,
            doubts,
            started: Time::now(),
            begun: Instant::now(),
        }
    }

    /// The path that a hint names, as far as it can be told.
    fn path_of_key(&self, reader: Option<&Reader>, key: &Key) -> String {
        let handle = match key {
            Key::Entry(entry) => &entry.dir,
            Key::Inode(handle) => handle,
        };
        let path = reader.and_then(|reader| {
            let file = reader.queries().file_by_handle(&handle.to_bytes()).ok()??;
            reader.queries().path_of(file).ok()?
        });
        let Some(mut path) = path else {
            return match key {
                Key::Entry(entry) => format!("?/{}", String::from_utf8_lossy(&entry.name)),
                Key::Inode(_) => UNKNOWN.to_owned(),
            };
        };
        if let Key::Entry(entry) = key {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(&entry.name);
        }
        self.shared
            .on_mount(&path)
            .unwrap_or_else(|| String::from_utf8_lossy(&path).into_owned())
    }

    /// How long the kernel's queue has not been read; `None` where it was just now.
    fn unread(&self) -> Option<Duration> {
        let read = self.events.drain_within(PATIENCE);
        (!read).then(|| self.shared.events_behind().unwrap_or(PATIENCE))
    }

    fn lag_file(&self, reader: Option<&Reader>, hint: &Hint) -> LagFile {
        let size = || {
            let Key::Inode(handle) = &hint.key else {
                return None;
            };
            let queries = reader?.queries();
            let file = queries.file_by_handle(&handle.to_bytes()).ok()??;
            queries.inode(file).ok()?.map(|row| row.size)
        };
        // Of a file that the log does not know yet its name may be.
        let known = self.path_of_key(reader, &hint.key);
        let path = match &hint.beside {
            Beside::Name(entry) if known == UNKNOWN => {
                self.path_of_key(reader, &Key::Entry(entry.clone()))
            }
            _ => known,
        };
        LagFile {
            path,
            age_ms: millis(hint.since.elapsed()),
            why: match hint.tries {
                0 => "it was changed and waits to be examined".to_owned(),
                tries => format!("it could not be examined yet, tried {tries} times"),
            },
            bytes: size().unwrap_or(0),
        }
    }

    fn lag(&self, reader: Option<&Reader>, state: State) -> Lag {
        // The queue first, and the watermark before the hints: what moves on meanwhile counts as old.
        let unread = self.unread();
        let durable = self.shared.progress().durable;
        let (pending, oldest, longest) = {
            let hints = self.shared.hints();
            let oldest = hints
                .oldest()
                .map(|(since, hint)| (since, hint.map(|hint| hint.key.clone())));
            let longest: Vec<Hint> = hints.longest(WORST).cloned().collect();
            (hints.open() as u64, oldest, longest)
        };
        let noted = oldest.as_ref().map(|(since, _)| since.elapsed());
        let undurable = self.shared.age_beyond(durable);
        let age = [noted, unread, undurable].into_iter().flatten().max();
        let mut worst: Vec<LagFile> = longest
            .iter()
            .filter(|hint| hint.since.elapsed() > self.config.rpo)
            .map(|hint| self.lag_file(reader, hint))
            .collect();
        // A new file is waited for by its name and by its inode.
        worst.dedup_by(|later, earlier| later.path == earlier.path);
        let from = self.shared.swept_from.load(Ordering::Relaxed);
        Lag {
            pending,
            oldest_age_ms: age.map(millis),
            oldest_path: oldest
                .and_then(|(_, key)| key)
                .map(|key| self.path_of_key(reader, &key)),
            worst,
            examination: (state == State::Examining).then(|| Progress {
                since: from_unix(from).unwrap_or(self.started.into()),
                done: self.shared.counters.swept_entries.load(Ordering::Relaxed),
                total: self.names,
            }),
        }
    }

    fn sweep_status(&self) -> SweepStatus {
        let ended = self.shared.swept_at.load(Ordering::Relaxed);
        let from = self.shared.swept_from.load(Ordering::Relaxed);
        let counters = &self.shared.counters;
        let interval = self.config.sweep_interval.as_secs();
        SweepStatus {
            last_finished: from_unix(ended),
            last_found: self.shared.last_found.load(Ordering::Relaxed),
            found: counters.swept_found.load(Ordering::Relaxed),
            running: self
                .shared
                .sweeping
                .load(Ordering::Relaxed)
                .then(|| Progress {
                    since: from_unix(from).unwrap_or(self.started.into()),
                    done: counters.swept_entries.load(Ordering::Relaxed),
                    total: None,
                }),
            next: from_unix(ended).and_then(|_| from_unix(ended + interval)),
        }
    }

    fn spool_status(&self, full: bool) -> SpoolStatus {
        let segments = self.spool.segments();
        let sealed: u64 = segments.iter().map(|segment| segment.bytes).sum();
        let bytes = self.spool.bytes_used();
        let open = bytes.saturating_sub(sealed);
        SpoolStatus {
            path: self.config.spool.display().to_string(),
            bytes,
            bytes_max: self.config.spool_bytes_max,
            free_bytes: self.spool.bytes_free().unwrap_or(0),
            segments: segments.len() as u64,
            open_segment: (open > 0)
                .then(|| self.spool.head().map_or(1, |head| head.segment.get() + 1)),
            open_segment_bytes: open,
            full,
        }
    }

    fn catalog_status(&self, reader: Option<&Reader>) -> CatalogStatus {
        let counts = reader.and_then(|reader| reader.queries().counts().ok());
        CatalogStatus {
            path: self.config.catalog.display().to_string(),
            bytes: fs::metadata(&self.config.catalog).map_or(0, |meta| meta.len()),
            files: counts.as_ref().map_or(0, |counts| counts.files),
            files_bytes: counts.as_ref().map_or(0, |counts| counts.bytes),
            versions: counts.as_ref().map_or(0, |counts| counts.versions),
            digest: None,
        }
    }

    /// Waits until `done`, or somebody gives up.
    fn wait_until(
        &self,
        cancelled: &AtomicBool,
        mut done: impl FnMut() -> bool,
    ) -> Result<(), CoreError> {
        while !done() {
            if cancelled.load(Ordering::Relaxed) {
                return Err(CoreError::Cancelled("the sync"));
            }
            if self.shared.stopping() {
                return Err(CoreError::Unavailable(
                    "the daemon stops: ask again when it runs".to_owned(),
                ));
            }
            self.shared.wait_for_progress(TICK);
        }
        Ok(())
    }

    /// Everything noted up to now is examined and durable; gives the last transaction.
    fn settle(&self, cancelled: &AtomicBool) -> Result<u64, CoreError> {
        if !self.events.drain() {
            return Err(CoreError::Unavailable(
                "the daemon stops: ask again when it runs".to_owned(),
            ));
        }
        // What no event tells of, from before the daemon began or because the kernel dropped some, is
        // found by a sweep.
        let asked = self.shared.examinations_asked();
        self.wait_until(cancelled, || self.shared.examinations_swept() >= asked)?;
        // What was found may lead to directories that must be walked, and that to more hints.
        loop {
            let upto = self.shared.hints().last_seq();
            self.shared.urgent.fetch_max(upto, Ordering::Relaxed);
            self.shared.wake();
            self.wait_until(cancelled, || self.shared.hints().settled(upto))?;
            if self.shared.walks.load(Ordering::Relaxed) == 0 {
                break;
            }
            let walks = &self.shared.walks;
            self.wait_until(cancelled, || walks.load(Ordering::Relaxed) == 0)?;
        }
        let lsn = self.shared.progress().written;
        self.wait_until(cancelled, || self.shared.progress().durable >= lsn)?;
        Ok(lsn)
    }

    /// A whole sweep that begins now, to its end.
    fn sweep_now(&self, cancelled: &AtomicBool) -> Result<(), CoreError> {
        // One that runs already may have passed what was changed just now.
        for _ in 0..2 {
            let before = self.shared.sweeps.load(Ordering::Relaxed);
            let running = self.shared.sweeping.load(Ordering::Relaxed);
            let _ = self.sweep.try_send(());
            self.wait_until(cancelled, || {
                self.shared.sweeps.load(Ordering::Relaxed) > before
            })?;
            if !running {
                break;
            }
        }
        Ok(())
    }

    fn open_volume(&self, serial_or_path: &str) -> Result<(PathBuf, DirectoryVolume), CoreError> {
        for path in self.config.volumes() {
            if let Ok(Found::Labelled(volume)) = directory::probe(path)
                && (volume.label().serial.as_str() == serial_or_path
                    || path == Path::new(serial_or_path))
            {
                return Ok((path.to_owned(), volume));
            }
        }
        Err(CoreError::NotFound(format!(
            "no volume {serial_or_path} is at any configured place: `tierctl volume list` names those that are"
        )))
    }
}

impl Core for Service {
    fn status(&self) -> Status {
        let reader = Reader::open(&self.config.catalog).ok();
        let reader = reader.as_ref();
        // What may only become true meanwhile is asked first: never more is said to be safe than is.
        let pools: Vec<PoolView> = self.board.pools();
        let state = self.shared.state();
        let lag = self.lag(reader, state);
        let troubles = self.shared.troubles();
        let mut notices: Vec<Notice> = troubles
            .iter()
            .map(|(_, trouble)| trouble.notice())
            .collect();
        notices.sort_by_key(|notice| std::cmp::Reverse(notice.severity));
        let full = troubles.iter().any(|(key, _)| key == "spool");
        let progress = self.shared.progress();
        let copied = pools.iter().map(|pool| pool.copied_lsn).min().unwrap_or(0);
        let counters = &self.shared.counters;
        let time_of = |lsn: u64| {
            let lsn = Lsn::new(lsn)?;
            reader?.queries().txn(lsn).ok()?.map(|row| When(row.time))
        };
        let lacks_since = |pool: &PoolView| {
            let changed = self.shared.age_beyond(pool.copied_lsn).map(When::ago);
            let logged = time_of(pool.copied_lsn + 1);
            changed.into_iter().chain(logged).min()
        };
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            log_id: self.log_id.to_string(),
            mount: self.config.mount.display().to_string(),
            fs_type: self.fs_type.clone(),
            fs_uuid: self.fs_uuid.clone(),
            state,
            notices,
            now: When::now(),
            started: self.started.into(),
            uptime_ms: millis(self.begun.elapsed()),
            rpo_ms: millis(self.config.rpo),
            written_lsn: lsn_of(progress.written),
            durable_lsn: lsn_of(progress.durable),
            durable_time: time_of(progress.durable.min(progress.folded)),
            folded_lsn: lsn_of(progress.folded),
            copied_lsn: lsn_of(copied),
            lag,
            spool: self.spool_status(full),
            pools: pools
                .iter()
                .map(|pool| pool_status(pool, progress.durable, &lacks_since))
                .collect(),
            sweep: self.sweep_status(),
            events: EventCounts {
                read: counters.events.load(Ordering::Relaxed),
                overflows: counters.overflows.load(Ordering::Relaxed),
            },
            examined_files: counters.examined.load(Ordering::Relaxed),
            logged_bytes: counters.bytes_logged.load(Ordering::Relaxed),
            fuzzy_files: reader
                .and_then(|reader| reader.queries().fuzzy_count().ok())
                .unwrap_or(0),
            unrestorable_files: reader
                .and_then(|reader| reader.queries().unrestorable_count().ok())
                .unwrap_or(0),
            released: self.tier.as_ref().map(|tier| {
                let counts = tier.counts();
                ReleasedStatus {
                    files: counts.stubs,
                    wanted: counts.wanted,
                    waiting: counts.waiting,
                    every_file: counts.everything,
                }
            }),
            refill: self.tier.as_ref().and_then(|tier| tier.refill()),
            space: self.space.status(),
            catalog: self.catalog_status(reader),
            memory_bytes: resident_bytes(),
        }
    }

    fn sync(&self, request: SyncRequest, cancelled: &AtomicBool) -> Result<SyncDone, CoreError> {
        let started = Instant::now();
        io::syncfs(self.mount.root()).map_err(|error| CoreError::Failed(error.to_string()))?;
        let mut lsn = self.settle(cancelled)?;
        if request.sweep {
            // The sweep compares with what the catalog's readers see.
            self.wait_until(cancelled, || self.shared.progress().folded >= lsn)?;
            self.sweep_now(cancelled)?;
            lsn = self.settle(cancelled)?;
        }
        if request.media {
            self.shared.seal_wanted.store(true, Ordering::Relaxed);
            self.shared.wake();
            self.wait_until(cancelled, || self.board.copied(lsn))?;
        }
        // Whoever asks next, for a state, a pin or a release, must find what was waited for.
        let seen = self.shared.progress().seen;
        self.wait_until(cancelled, || {
            let now = self.shared.progress();
            now.folded >= lsn && now.seen_folded >= seen
        })?;
        Ok(SyncDone {
            lsn: lsn_of(lsn),
            waited_ms: millis(started.elapsed()),
        })
    }

    fn catalog(&self) -> Result<Reader, CoreError> {
        Ok(Reader::open(&self.config.catalog)?)
    }

    fn sources(&self) -> Result<Arc<replay::sources::Sources>, CoreError> {
        let volumes: Vec<PathBuf> = self.config.volumes().map(Path::to_owned).collect();
        let sources = crate::fetch::sources(&self.config.spool, &volumes, self.log_id)?;
        Ok(Arc::new(sources))
    }

    fn copies(&self) -> Arc<dyn Copies> {
        self.doubts.clone()
    }

    fn subscribe(&self) -> Receiver<Event> {
        self.shared.subscribe()
    }

    fn resolve(&self, path: &Path) -> Result<Located, CoreError> {
        let outside = || CoreError::NotWatched {
            path: path.to_owned(),
            mount: self.config.mount.clone(),
        };
        let failed = |error: crate::sys::Error| CoreError::NotFound(error.to_string());
        let below = path
            .strip_prefix(&self.config.mount)
            .map_err(|_| outside())?;
        let (handle, stat) = match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) if !below.as_os_str().is_empty() => {
                let dir = open(
                    parent,
                    OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
                    Mode::empty(),
                )
                .map_err(|error| CoreError::NotFound(format!("{}: {error}", parent.display())))?;
                let found = handle_at(dir.as_fd(), name)
                    .map_err(failed)?
                    .zip(stat_at(dir.as_fd(), name).map_err(failed)?);
                found.ok_or_else(|| {
                    CoreError::NotFound(format!("there is no file {}", path.display()))
                })?
            }
            _ => (
                handle_of(self.mount.root()).map_err(failed)?,
                stat_of(self.mount.root()).map_err(failed)?,
            ),
        };
        let bytes = handle.to_bytes();
        let file = self
            .readers
            .with(|reader| reader.queries().file_by_handle(&bytes))?;
        let mut in_log = self.prefix.clone();
        if !below.as_os_str().is_empty() {
            if !in_log.is_empty() {
                in_log.push(b'/');
            }
            in_log.extend(below.as_os_str().as_bytes());
        }
        Ok(Located {
            file: file.map(FileId::get),
            handle: handle.to_bytes(),
            path: in_log,
            ctime: Some(crate::capture::facts::time_of(stat.ctime)),
        })
    }

    fn is_examined(&self, file: FileId, handle: &Handle, ctime: tierfs::Time) -> bool {
        let vouches = |tier: &Arc<Tier>| tier.vouches(handle, (ctime.seconds, ctime.nanos));
        self.shared.unread.knows(file, ctime) || self.tier.as_ref().is_some_and(vouches)
    }

    fn look_closely(&self, files: &[FileId]) -> Result<(), CoreError> {
        let catalog = self.catalog()?;
        for file in files {
            let row = catalog.queries().inode(*file)?;
            let handle = row.and_then(|row| Handle::from_bytes(&row.handle?).ok());
            let key = handle.map(Key::Inode);
            self.shared
                .note(key.map(|key| (key, Look::Content, Beside::Nothing)));
        }
        Ok(())
    }

    fn pending(&self, file: u64) -> Option<Pending> {
        let row = self
            .catalog()
            .ok()?
            .queries()
            .inode(FileId::new(file)?)
            .ok()??;
        let handle = Handle::from_bytes(&row.handle?).ok()?;
        let since = self
            .shared
            .hints()
            .waiting(&Key::Inode(handle))
            .map(|hint| hint.since)?;
        Some(Pending {
            since: When::ago(since.elapsed()),
            why: "it was changed and waits to be examined".to_owned(),
        })
    }

    fn verify_volume(
        &self,
        serial_or_path: &str,
        progress: &mut dyn FnMut(VerifyProgress) -> ControlFlow<()>,
    ) -> Result<VerifyDone, CoreError> {
        let failed = |error: media::Error| CoreError::Failed(error.to_string());
        let (path, volume) = self.open_volume(serial_or_path)?;
        let inventory = volume.inventory().map_err(failed)?;
        let begun = tierfs::Time::now();
        let mut faults: Vec<String> = inventory.faults.iter().map(ToString::to_string).collect();
        let mut at = VerifyProgress {
            objects_total: inventory.entries.len() as u64,
            bytes_total: inventory.entries.iter().map(|entry| entry.bytes).sum(),
            ..VerifyProgress::default()
        };
        let serial = volume.label().serial.to_string();
        for no in inventory.faults.iter().filter_map(flush::damaged) {
            let copy = self.board.verified(&serial, no, board::Found::Damaged);
            let _ = self.asked.send(Asked::Copy(copy));
        }
        for entry in &inventory.entries {
            let verified = volume.verify(&entry.name);
            let found = match &verified {
                Ok(_) => board::Found::Good,
                // The volume is gone: that says nothing of what is on it.
                Err(error) if error.is_absent() => {
                    return Err(CoreError::Failed(error.to_string()));
                }
                Err(_) if volume.open(&entry.name).is_err() => board::Found::Gone,
                Err(_) => board::Found::Damaged,
            };
            if let Err(error) = verified {
                faults.push(error.to_string());
            }
            if let Some(no) = tierfs::SegmentNo::from_object_name(entry.name.as_str()) {
                let copy = self.board.verified(&serial, no, found);
                let _ = self.asked.send(Asked::Copy(copy));
            }
            at.objects += 1;
            at.bytes += entry.bytes;
            if progress(at).is_break() {
                return Err(CoreError::Cancelled("the check of the volume"));
            }
        }
        self.board.checked(&serial, begun);
        self.shared.wake();
        Ok(VerifyDone {
            serial,
            pool: volume.label().pool.clone(),
            path: path.display().to_string(),
            objects: at.objects,
            bytes: at.bytes,
            faults,
        })
    }

    fn catalog_digest(&self) -> Result<(Option<u64>, String), CoreError> {
        let reader = self.catalog()?;
        reader.snapshot(|queries| {
            let folded = queries.folded()?.map(|(lsn, _)| lsn.get());
            Ok((folded, queries.digest()?.to_string()))
        })
    }

    fn files(&self) -> Result<tierfs::files::Files, CoreError> {
        self.open_files()
    }

    fn sums(&self) -> Result<tierfs::files::usage::Usage, CoreError> {
        self.open_sums()
    }

    fn policy_file(&self) -> Option<PathBuf> {
        self.config.policies.clone()
    }

    fn note_rule(&self, name: &str, at: i64) {
        self.remember_rule(name, at);
    }

    fn rule_ran(&self, name: &str) -> Option<i64> {
        self.remembered_rule(name)
    }

    fn usage(&self) -> Result<policies::decide::Usage, CoreError> {
        self.filesystem_usage()
    }

    fn pin(&self, files: &[FileId], pinned: bool) -> Result<(Option<u64>, u64), CoreError> {
        self.log_pins(files, pinned)
    }

    fn act(
        &self,
        action: policies::Action,
        files: &[FileId],
        cancelled: &Arc<AtomicBool>,
    ) -> Result<Vec<(FileId, String)>, CoreError> {
        self.act_on(action, files, cancelled)
    }

    fn release(&self, files: &[FileId]) -> Result<Freed, CoreError> {
        self.release_files(files)
    }

    fn stop(&self) {
        self.shared.stop();
    }

    fn mount(&self) -> PathBuf {
        self.config.mount.clone()
    }

    fn tier(&self) -> Result<Arc<Tier>, CoreError> {
        self.tier.clone().ok_or_else(|| {
            CoreError::Unavailable(
                "hsmd does not mount this filesystem itself, so that files can be logged but not released: set `device` in its configuration, see hsmd.toml(5)".to_owned(),
            )
        })
    }
}

fn pool_status(
    pool: &PoolView,
    durable: u64,
    lacks_since: &dyn Fn(&PoolView) -> Option<When>,
) -> PoolStatus {
    let waiting = pool.waits.as_ref().map(|waits| Waiting {
        reason: waits.reason,
        serial: waits.serial.clone(),
        path: waits.path.display().to_string(),
        since: pool.since.unwrap_or_else(Time::now).into(),
        why: waits.why.clone(),
    });
    PoolStatus {
        name: pool.name.clone(),
        copied_lsn: lsn_of(pool.copied_lsn),
        lacks_since: (pool.copied_lsn < durable)
            .then(|| lacks_since(pool))
            .flatten(),
        lacks_segments: pool.lacks.0,
        lacks_bytes: pool.lacks.1,
        waiting,
        volumes: pool.volumes.iter().map(volume_status).collect(),
    }
}

fn volume_status(volume: &VolumeView) -> VolumeStatus {
    VolumeStatus {
        serial: volume.serial.clone(),
        path: volume.path.display().to_string(),
        backend: "directory".to_owned(),
        state: volume.state,
        segments: volume.segments,
        bytes: volume.bytes,
        free_bytes: volume.free.filter(|_| volume.state != VolumeState::Absent),
        last_verified: volume.verified.map(When),
        damaged: volume.damaged,
    }
}

fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| {
        line.trim()
            .trim_end_matches("kB")
            .trim()
            .parse::<u64>()
            .ok()
    })
    .map_or(0, |kib| kib * 1024)
}
