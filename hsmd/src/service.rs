//! The daemon as the control socket sees it: status, sync, where things are.
//!
//! Everything here answers from what the threads share and from read-only views; nothing here waits
//! for the committer but [`Core::sync`], which is asked to.

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
use tierfs::catalog::Reader;
use tierfs::disk::RealDisk;
use tierfs::spool::Spool;
use tierfs::{FileId, LogId, Lsn, Time};

use crate::capture::hints::Key;
use crate::committer::Asked;
use crate::config::Config;
use crate::control::model::{
    CatalogStatus, Event, EventCounts, Lag, LagFile, Located, Notice, Pending, PoolStatus,
    Progress, Severity, SpoolStatus, State, Status, SweepStatus, SyncDone, SyncRequest, VerifyDone,
    VerifyProgress, VolumeState, VolumeStatus, Waiting, WaitingReason,
};
use crate::control::when::When;
use crate::control::{Core, CoreError};
use crate::events::EventsHandle;
use crate::flush::{Board, PoolView, VolumeView};
use crate::preflight::Report;
use crate::shared::Shared;
use crate::sys::handle::{Handle, handle_at, handle_of};
use crate::sys::io;
use crate::sys::mount::PrivateMount;
use crate::sys::stat::{stat_at, stat_of};

/// How often a waiting call looks whether it was cancelled.
const TICK: Duration = Duration::from_millis(20);
/// Files named in the lag.
const WORST: usize = 5;

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
    started: Time,
    begun: Instant,
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

fn ago(age: Duration) -> When {
    let now = Time::now();
    let age = i64::try_from(age.as_secs()).unwrap_or(0);
    Time {
        seconds: now.seconds.saturating_sub(age),
        ..now
    }
    .into()
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
        } = parts;
        Self {
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
            started: Time::now(),
            begun: Instant::now(),
        }
    }

    fn state(&self, notices: &[Notice]) -> State {
        if self.shared.stopping() {
            State::Stopping
        } else if notices
            .iter()
            .any(|notice| notice.severity == Severity::Error)
        {
            State::Degraded
        } else if self.shared.swept_at.load(Ordering::Relaxed) == 0 {
            State::Examining
        } else {
            State::Following
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
        let mut path = path.unwrap_or_else(|| b"?".to_vec());
        if let Key::Entry(entry) = key {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(&entry.name);
        }
        self.config
            .mount
            .join(String::from_utf8_lossy(&path).as_ref())
            .display()
            .to_string()
    }

    fn lag(&self, reader: Option<&Reader>) -> Lag {
        let (pending, oldest) = {
            let hints = self.shared.hints();
            let oldest = hints
                .oldest()
                .map(|(since, hint)| (since, hint.map(|hint| hint.key.clone())));
            (hints.open() as u64, oldest)
        };
        let worst = self
            .shared
            .slow_files()
            .into_iter()
            .take(WORST)
            .map(|(path, age_ms)| LagFile {
                path,
                age_ms,
                why: "it takes long to read".to_owned(),
                bytes: 0,
            });
        let running = self.shared.swept_at.load(Ordering::Relaxed) == 0;
        Lag {
            pending,
            oldest_age_ms: oldest.as_ref().map(|(since, _)| millis(since.elapsed())),
            oldest_path: oldest
                .and_then(|(_, key)| key)
                .map(|key| self.path_of_key(reader, &key)),
            worst: worst.collect(),
            examination: running.then(|| Progress {
                since: self.started.into(),
                done: self.shared.counters.examined.load(Ordering::Relaxed),
                total: None,
            }),
        }
    }

    fn sweep_status(&self) -> SweepStatus {
        let ended = self.shared.swept_at.load(Ordering::Relaxed);
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
                    since: self.started.into(),
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
        let mut notices: Vec<Notice> = self
            .shared
            .troubles()
            .iter()
            .map(|(_, trouble)| trouble.notice())
            .collect();
        notices.sort_by_key(|notice| std::cmp::Reverse(notice.severity));
        let full = self.shared.troubles().iter().any(|(key, _)| key == "spool");
        let progress = self.shared.progress();
        let pools: Vec<PoolView> = self.board.pools();
        let copied = pools.iter().map(|pool| pool.copied_lsn).min().unwrap_or(0);
        let counters = &self.shared.counters;
        let time_of = |lsn: u64| {
            let lsn = Lsn::new(lsn)?;
            reader?.queries().txn(lsn).ok()?.map(|row| When(row.time))
        };
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            log_id: self.log_id.to_string(),
            mount: self.config.mount.display().to_string(),
            fs_type: self.fs_type.clone(),
            fs_uuid: self.fs_uuid.clone(),
            state: self.state(&notices),
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
            lag: self.lag(reader),
            spool: self.spool_status(full),
            pools: pools
                .iter()
                .map(|pool| pool_status(pool, progress.durable, &time_of))
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
            unrestorable_files: self
                .shared
                .troubles()
                .iter()
                .filter(|(key, _)| key == "unreadable")
                .count() as u64,
            catalog: self.catalog_status(reader),
            memory_bytes: resident_bytes(),
        }
    }

    fn sync(&self, request: SyncRequest, cancelled: &AtomicBool) -> Result<SyncDone, CoreError> {
        let started = Instant::now();
        io::syncfs(self.mount.root()).map_err(|error| CoreError::Failed(error.to_string()))?;
        // What was there before the daemon began is found by its first sweep.
        self.wait_until(cancelled, || self.shared.sweeps.load(Ordering::Relaxed) > 0)?;
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
        Ok(SyncDone {
            lsn: lsn_of(lsn),
            waited_ms: millis(started.elapsed()),
        })
    }

    fn catalog(&self) -> Result<Reader, CoreError> {
        Ok(Reader::open(&self.config.catalog)?)
    }

    fn sources(&self) -> Result<Arc<replay::sources::Sources>, CoreError> {
        // What is in the open segment can be read once it is sealed.
        let lsn = self.shared.progress().written;
        self.shared.seal_wanted.store(true, Ordering::Relaxed);
        self.shared.wake();
        let never = AtomicBool::new(false);
        self.wait_until(&never, || {
            let sealed = self.spool.head().map_or(0, |head| head.next_lsn.get() - 1);
            sealed >= lsn
        })?;
        let mut places = vec![self.config.spool.clone()];
        places.extend(
            self.config
                .volumes()
                .filter(|path| path.join("VOLUME.json").exists())
                .map(Path::to_owned),
        );
        Ok(Arc::new(replay::sources::Sources::open(&places)?))
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
        let file = self
            .catalog()?
            .queries()
            .file_by_handle(&handle.to_bytes())?;
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
            since: ago(since.elapsed()),
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
        let mut faults: Vec<String> = inventory.faults.iter().map(ToString::to_string).collect();
        let mut at = VerifyProgress {
            objects_total: inventory.entries.len() as u64,
            bytes_total: inventory.entries.iter().map(|entry| entry.bytes).sum(),
            ..VerifyProgress::default()
        };
        let serial = volume.label().serial.to_string();
        for entry in &inventory.entries {
            let segment = tierfs::SegmentNo::from_object_name(entry.name.as_str());
            let mut copy = segment.map(|segment| crate::daemon::verified_copy(segment, &serial));
            if let Err(error) = volume.verify(&entry.name) {
                faults.push(error.to_string());
                if let Some(copy) = &mut copy {
                    "damaged".clone_into(&mut copy.state);
                }
            }
            if let Some(copy) = copy {
                let _ = self.asked.send(Asked::Copy(copy));
            }
            at.objects += 1;
            at.bytes += entry.bytes;
            if progress(at).is_break() {
                return Err(CoreError::Cancelled("the check of the volume"));
            }
        }
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

    fn stop(&self) {
        self.shared.stop();
    }
}

fn pool_status(pool: &PoolView, durable: u64, time_of: &dyn Fn(u64) -> Option<When>) -> PoolStatus {
    let waiting = pool.waits.as_ref().map(|why| {
        let full = pool.volumes.iter().all(|volume| volume.state == "full");
        let absent = pool.volumes.iter().find(|volume| volume.state == "absent");
        let named = absent.or(pool.volumes.last());
        Waiting {
            reason: match (full, absent) {
                (true, _) => WaitingReason::Full,
                (_, Some(_)) => WaitingReason::Absent,
                _ => WaitingReason::Failed,
            },
            serial: named.and_then(|volume| volume.serial.clone()),
            path: named.map_or(String::new(), |volume| volume.path.display().to_string()),
            since: pool.since.unwrap_or_else(Time::now).into(),
            why: named
                .and_then(|volume| volume.why.clone())
                .unwrap_or_else(|| why.clone()),
        }
    });
    PoolStatus {
        name: pool.name.clone(),
        copied_lsn: lsn_of(pool.copied_lsn),
        lacks_since: if pool.copied_lsn < durable {
            time_of(pool.copied_lsn + 1)
        } else {
            None
        },
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
        state: match volume.state {
            "filling" => VolumeState::Filling,
            "full" => VolumeState::Full,
            "foreign" => VolumeState::Foreign,
            "damaged" => VolumeState::Damaged,
            "empty" => VolumeState::Scratch,
            _ => VolumeState::Absent,
        },
        segments: volume.segments,
        bytes: volume.bytes,
        free_bytes: volume.free,
        last_verified: None,
        damaged: 0,
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
