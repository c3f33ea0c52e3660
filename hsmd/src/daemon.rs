//! The daemon: opens everything in order, runs the threads, and ends them in order.
//!
//! Nothing is changed before everything that could refuse has been asked: configuration, privileges,
//! filesystem, lock, log, catalog, whose disk this is. What is wrong is a [`Refusal`] with what to do.

mod open;

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fmt::Display;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use tierfs::catalog::{Catalog, VolumeRow};
use tierfs::disk::RealDisk;
use tierfs::record::{Op, Volume as VolumeRecord};
use tierfs::spool::Spool;
use tierfs::writer::{SealedSegment, SyncJob, Synced, WriterError};
use tierfs::{Lsn, Time};

use self::open::{Beginning, begin_with, check_volumes, open_log};
use crate::board::{Board, Due};
use crate::capture::worker::{self, JobQueue};
use crate::committer::{Asked, Committer, Parts};
use crate::config::Config;
use crate::control;
use crate::doubts::Doubts;
use crate::events::{EventReader, EventsHandle};
use crate::flush::Flusher;
use crate::policy::engine::Engine;
use crate::policy::space::Space;
use crate::policy::watch::{Parts as WatchParts, Watch};
use crate::preflight;
use crate::service::{Service, ServiceParts};
use crate::shared::Shared;
use crate::sweep;
use crate::sys::fanotify::Group;
use crate::sys::lease;
use crate::sys::mount::{Mount, PrivateMount, mount_of};
use crate::sys::pagecache::drop_cached;
use crate::tier;
use crate::tier::worker::{Ends, Inherited, Tier};

/// Bundles on their way to the committer; each holds at most a frame.
const BUNDLES: usize = 8;
/// Sealed segments that stay in the page cache for the flushers. The log is read once, by them: it must
/// not push the watched files out of the cache, nor take fresh memory for every byte that it writes.
const SEGMENTS_CACHED: usize = 2;

/// Why the daemon does not start, or had to end.
#[derive(Debug, thiserror::Error)]
#[error("{object}: {reason}; {advice}")]
pub struct Refusal {
    /// What it concerns.
    pub object: String,
    /// Why.
    pub reason: String,
    /// What to do.
    pub advice: String,
}

pub(crate) fn refuse(object: impl Display, reason: impl Display, advice: impl Display) -> Refusal {
    Refusal {
        object: object.to_string(),
        reason: reason.to_string(),
        advice: advice.to_string(),
    }
}

/// How the operator overrides a refusal.
#[derive(Clone, Copy, Debug, Default)]
pub struct Overrides {
    /// Go on with the log on a filesystem that is neither the known one nor marked by replay.
    pub adopt_filesystem: bool,
    /// Go on where the log ends with this transaction though more was durable.
    pub accept_loss_after: Option<u64>,
}

/// A daemon that is ready to run.
pub struct Daemon {
    config: Config,
    shared: Arc<Shared>,
    board: Arc<Board>,
    spool: Spool<RealDisk>,
    mount: Arc<PrivateMount>,
    threads: Vec<(&'static str, JoinHandle<Result<(), String>>)>,
    jobs: Arc<JobQueue>,
    tier: Option<Arc<Tier>>,
    events: EventsHandle,
    server: Option<control::server::Server>,
    catalog_synced: Receiver<Option<Lsn>>,
    committer: Option<JoinHandle<Result<(), String>>>,
}

impl Daemon {
    /// Opens everything and starts all threads.
    pub fn start(
        config: Config,
        overrides: Overrides,
        inherited: Option<Inherited>,
    ) -> Result<Self, Vec<Refusal>> {
        let report = preflight::check(&config).map_err(|refusals| {
            let refusal = |r: preflight::Refusal| refuse(r.object, r.reason, r.advice);
            refusals.into_iter().map(refusal).collect::<Vec<_>>()
        })?;
        for warning in &report.warnings {
            tracing::warn!("{}: {}; {}", warning.object, warning.reason, warning.advice);
        }
        Self::begin(config, overrides, &report, inherited).map_err(|refusal| vec![refusal])
    }

    // The one place where all threads and their channels are wired: cut up, it would only be harder to follow.
    #[allow(clippy::too_many_lines)]
    fn begin(
        config: Config,
        overrides: Overrides,
        report: &preflight::Report,
        inherited: Option<Inherited>,
    ) -> Result<Self, Refusal> {
        let failed = |error: crate::sys::Error| {
            refuse(
                config.mount.display(),
                error,
                "check the mount and the kernel's messages (dmesg)",
            )
        };
        lease::ignore_sigio().map_err(failed)?;
        raise_open_files();
        let mount = mount_of(&config.mount).map_err(failed)?;
        let private = Arc::new(PrivateMount::open(&mount).map_err(failed)?);
        let (spool, mut catalog) = open_log(&config, report, overrides)?;
        check_volumes(&config, catalog.log_id())?;
        let Beginning { first, taken_over } =
            begin_with(&config, &mut catalog, &private, report, overrides)?;

        let (shared, board) = shared_state(&config, &spool, &catalog)?;
        shared.set_public(&config.mount, mount_prefix(&mount));
        let writer = spool
            .writer()
            .map_err(|error| refuse(config.spool.display(), error, "see hsm(7)"))?;
        let epoch = writer.epoch();

        // Marked before anything is looked at: what changes from here on raises an event.
        let (events, inherited) = inherited.map(Inherited::split).unzip();
        let group = watch(&private, events).map_err(failed)?;
        let space = Arc::new(Space::default());
        let (asked_out, asked) = unbounded();
        let doubts = Doubts::new(shared.clone(), board.clone(), asked_out.clone());
        let doubts = Arc::new(doubts);
        let tier = start_tier(
            inherited,
            &config,
            &shared,
            &board,
            &private,
            &group,
            report,
            catalog.log_id(),
            &space,
            &doubts,
        )?;
        shared
            .watched_since
            .store(Time::now().seconds, Ordering::Relaxed);

        let (sweep_ask, sweep_asked) = bounded(1);
        let (reader, events) =
            EventReader::new(group, shared.clone(), sweep_ask.clone()).map_err(failed)?;
        let (bundles_out, bundles) = bounded(BUNDLES);
        let (sync_out, sync_in) = bounded(1);
        let (synced_out, synced) = bounded(1);
        let (sealed_out, sealed) = unbounded();
        let (catalog_synced_out, catalog_synced) = unbounded();
        let jobs = Arc::new(JobQueue::default());
        let known = known_places(&catalog, &config).map_err(|error| {
            refuse(
                config.catalog.display(),
                error,
                "run `tierctl catalog rebuild`",
            )
        })?;
        let log_id = catalog.log_id();
        shared.taken_over.store(taken_over, Ordering::Relaxed);
        if !first.is_empty() {
            let _ = asked_out.send(Asked::Ops(first));
        }
        let committer = Committer::new(Parts {
            shared: shared.clone(),
            catalog,
            writer,
            mount: private.clone(),
            jobs: jobs.clone(),
            bundles,
            syncer: sync_out,
            synced,
            sealed: sealed_out,
            asked,
            level: config.compression_level,
            segment_age: config.segment_age,
            catalog_synced: catalog_synced_out,
            spool: spool.clone(),
            spool_bytes_max: config.spool_bytes_max,
            spool_path: config.spool.clone(),
            tier: tier.clone(),
        })
        .map_err(|error| refuse("the daemon", error, "see the message"))?;

        let mut run = Threads {
            shared: shared.clone(),
            list: Vec::new(),
        };
        run.start_syncer(sync_in, synced_out);
        run.start_workers(&worker::Context {
            mount: private.clone(),
            catalog: config.catalog.clone(),
            epoch,
            numbers: Arc::new(AtomicU64::new(1)),
            level: config.compression_level,
            jobs: jobs.clone(),
            out: bundles_out,
            log_id,
            tier: tier.clone(),
        });
        run.start("events", move || {
            reader.run().map_err(|error| error.to_string())
        });
        let committer = run.spawn("committer", move || {
            committer.run().map_err(|error| error.to_string())
        });
        run.start_sweep(&config, private.clone(), sweep_asked);
        run.start_flushers(&config, &board, sealed, log_id, &known, &asked_out);
        let checks = doubts.clone();
        run.start("doubts", move || {
            checks.run();
            Ok(())
        });
        if let Some(tier) = &tier {
            run.start_tier(tier);
        }
        let threads = run.list;
        let parts = ServiceParts {
            config: config.clone(),
            shared: shared.clone(),
            board: board.clone(),
            spool: spool.clone(),
            mount: private.clone(),
            prefix: mount_prefix(&mount),
            log_id,
            events: events.clone(),
            sweep: sweep_ask,
            asked: asked_out,
            tier: tier.clone(),
            space: space.clone(),
            doubts,
        };
        let service = Arc::new(Service::new(parts, report));
        let mut more = Threads {
            shared: shared.clone(),
            list: threads,
        };
        more.start_policies(&config, &service, &space);
        let threads = more.list;
        let server = start_server(&config, service)?;
        shared.wake();
        if let Some(tier) = &tier {
            tier.ready().map_err(failed)?;
        }
        Ok(Self {
            config,
            tier,
            shared,
            board,
            spool,
            mount: private,
            threads,
            jobs,
            events,
            server: Some(server),
            catalog_synced,
            committer: Some(committer),
        })
    }

    /// Runs until something stops it; gives what went wrong.
    pub fn run(mut self) -> Result<(), Refusal> {
        let mut safe = 0;
        while !self.shared.stopping() {
            self.shared.wait_for_progress(Duration::from_secs(1));
            safe = self
                .catalog_synced
                .try_iter()
                .flatten()
                .map(Lsn::get)
                .max()
                .unwrap_or(safe)
                .max(safe);
            self.clean_spool(safe);
            if self.committer.as_ref().is_some_and(JoinHandle::is_finished) {
                self.shared.stop();
            }
        }
        self.end()
    }

    /// Removes segments from the spool that every pool has, oldest first.
    fn clean_spool(&self, safe: u64) {
        let dispensable = self.board.dispensable(safe);
        for segment in self.spool.segments() {
            if !dispensable.contains(&segment.no) {
                break;
            }
            match self.spool.remove(segment.no) {
                Ok(()) => self.board.left_spool(segment.no),
                Err(error) => {
                    tracing::warn!(%error, "a segment that every pool has cannot leave the spool");
                    break;
                }
            }
        }
    }

    fn end(&mut self) -> Result<(), Refusal> {
        tracing::info!("stops");
        if let Some(server) = self.server.take() {
            server.stop();
        }
        self.events.ring();
        let committed = self.committer.take().map(JoinHandle::join);
        self.jobs.close();
        if let Some(tier) = &self.tier {
            tier.close();
        }
        for (name, thread) in self.threads.drain(..) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(name, error, "a thread ended with an error"),
                Err(_) => tracing::error!(name, "a thread panicked"),
            }
        }
        if let (Some(tier), Some(Ok(Ok(())))) = (&self.tier, &committed) {
            tier.end(&self.config.mount);
        }
        let _ = &self.mount;
        let advice = "look at the messages before; what is durable in the spool is safe, restart hsmd when the cause is removed";
        match committed {
            Some(Ok(Err(error))) => Err(refuse(self.config.spool.display(), error, advice)),
            Some(Err(_)) => Err(refuse("the committer", "it panicked", advice)),
            _ => Ok(()),
        }
    }

    /// What stops the daemon from another thread.
    pub fn stopper(&self) -> Arc<Shared> {
        self.shared.clone()
    }
}

/// What the threads share, at the log's end.
fn shared_state(
    config: &Config,
    spool: &Spool<RealDisk>,
    catalog: &Catalog,
) -> Result<(Arc<Shared>, Arc<Board>), Refusal> {
    let shared = Arc::new(Shared::new(settle_time(config.rpo)));
    let folded = catalog.folded().map_or(0, Lsn::get);
    shared.advance(|progress| {
        progress.written = folded;
        progress.durable = folded;
        progress.folded = folded;
    });
    let board = Board::open(shared.clone(), config, catalog.queries(), &spool.segments());
    let board = board.map_err(|error| {
        refuse(
            config.catalog.display(),
            error,
            "run `tierctl catalog rebuild`",
        )
    })?;
    Ok((shared, Arc::new(board)))
}

// Everything that it is made of comes from its one caller.
#[allow(clippy::too_many_arguments)]
fn start_tier(
    inherited: Option<Ends>,
    config: &Config,
    shared: &Arc<Shared>,
    board: &Arc<Board>,
    mount: &Arc<PrivateMount>,
    events: &Group,
    report: &preflight::Report,
    log_id: tierfs::LogId,
    space: &Arc<Space>,
    doubts: &Arc<Doubts>,
) -> Result<Option<Arc<Tier>>, Refusal> {
    let Some(inherited) = inherited else {
        open::refuse_stubs(config, mount, &report.fs_uuid)?;
        return Ok(None);
    };
    let parts = tier::worker::Parts {
        config,
        shared: shared.clone(),
        board: board.clone(),
        mount: mount.clone(),
        events,
        log_id,
        fs_uuid: report.fs_uuid,
        fs_type: &report.fs_type,
        space: space.clone(),
        doubts: doubts.clone(),
    };
    Tier::new(inherited, parts)
        .map(|tier| Some(Arc::new(tier)))
        .map_err(|error| {
            refuse(
                config.mount.display(),
                error,
                "see the kernel's messages (dmesg)",
            )
        })
}

/// A group that hears of every change of the filesystem from now on.
fn watch(mount: &PrivateMount, inherited: Option<OwnedFd>) -> Result<Group, crate::sys::Error> {
    let group = match inherited {
        Some(group) => Group::from_fd(group),
        None => Group::new_notification()?,
    };
    group.mark_filesystem(mount.root())?;
    Ok(group)
}

struct Threads {
    shared: Arc<Shared>,
    list: Vec<(&'static str, JoinHandle<Result<(), String>>)>,
}

impl Threads {
    fn start_syncer(
        &mut self,
        jobs: Receiver<SyncJob<RealDisk>>,
        done: Sender<Result<Synced, WriterError>>,
    ) {
        self.start("syncer", move || {
            for job in jobs {
                if done.send(job.run()).is_err() {
                    break;
                }
            }
            Ok(())
        });
    }

    fn start_workers(&mut self, context: &worker::Context) {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        for _ in 0..cores.clamp(2, 16) {
            let context = context.clone();
            self.start("worker", move || {
                worker::run(context).map_err(|error| error.to_string())
            });
        }
    }

    fn start_tier(&mut self, tier: &Arc<Tier>) {
        for (name, body) in tier.bodies() {
            self.start(name, move || {
                body();
                Ok(())
            });
        }
        let tier = tier.clone();
        // Ends with the process: it waits for the guard.
        drop(self.spawn("accesses", move || {
            tier.take_accesses();
            Ok(())
        }));
    }

    fn start_sweep(&mut self, config: &Config, mount: Arc<PrivateMount>, asked: Receiver<()>) {
        let (shared, catalog, interval) = (
            self.shared.clone(),
            config.catalog.clone(),
            config.sweep_interval,
        );
        self.start("sweep", move || {
            sweep::run(&mount, &shared, &catalog, &asked, interval);
            Ok(())
        });
    }

    fn start_flushers(
        &mut self,
        config: &Config,
        board: &Arc<Board>,
        sealed: Receiver<SealedSegment>,
        log_id: tierfs::LogId,
        known: &BTreeMap<PathBuf, String>,
        asked: &Sender<Asked>,
    ) {
        let (due, spool) = (board.clone(), config.spool.clone());
        self.start("sealed", move || {
            let mut cached = VecDeque::new();
            for segment in sealed {
                due.add(Due::from(&segment));
                cached.push_back(spool.join(&segment.file_name));
                if cached.len() > SEGMENTS_CACHED
                    && let Some(path) = cached.pop_front()
                {
                    let_cache_go(&path);
                }
            }
            Ok(())
        });
        for pool in &config.pools {
            let flusher = Flusher {
                shared: self.shared.clone(),
                board: board.clone(),
                spool: config.spool.clone(),
                pool: pool.name.clone(),
                volumes: pool.volumes.clone(),
                log_id,
                known: known.clone(),
                manuals: manuals(),
                asked: asked.clone(),
            };
            self.start("flusher", move || {
                flusher.run();
                Ok(())
            });
        }
    }

    fn start_policies(&mut self, config: &Config, service: &Arc<Service>, space: &Arc<Space>) {
        // Without a policy they are dropped, and whoever asks for room hears that there is none.
        let requests = space.requests();
        let (Some(file), Some(requests)) = (&config.policies, requests) else {
            return;
        };
        let cancelled = Arc::new(AtomicBool::new(false));
        let engine = Engine::new(service.clone(), self.shared.clone(), file.clone());
        let ends = cancelled.clone();
        self.start("policies", move || {
            engine.run(&ends);
            Ok(())
        });
        let watch = Watch::new(WatchParts {
            core: service.clone(),
            shared: self.shared.clone(),
            file: file.clone(),
            space: space.clone(),
            requests,
            cancelled,
        });
        self.start("space", move || {
            watch.run();
            Ok(())
        });
    }

    fn spawn(
        &self,
        name: &'static str,
        body: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> JoinHandle<Result<(), String>> {
        let shared = self.shared.clone();
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let ended = Ended(shared);
                let result = body();
                if let Err(error) = &result {
                    tracing::error!(name, error, "a thread of the daemon ends");
                } else {
                    ended.well();
                }
                result
            })
            .unwrap_or_else(|error| panic!("cannot start the thread {name}: {error}"))
    }

    fn start(
        &mut self,
        name: &'static str,
        body: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) {
        let thread = self.spawn(name, body);
        self.list.push((name, thread));
    }
}

/// Stops the daemon when a thread fails or panics: a daemon without one of its threads is none.
struct Ended(Arc<Shared>);

impl Ended {
    fn well(self) {
        std::mem::forget(self);
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn settle_time(rpo: Duration) -> Duration {
    (rpo / 5).clamp(Duration::from_millis(20), Duration::from_millis(200))
}

/// Raises the number of descriptors that there can be, as far as it goes.
pub(crate) fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    // The kernel's own limit; root may go up to it.
    let wanted = hard.max(524_288);
    let _ = [wanted, hard]
        .into_iter()
        .find(|limit| setrlimit(Resource::RLIMIT_NOFILE, *limit, *limit).is_ok());
}

fn mount_prefix(mount: &Mount) -> Vec<u8> {
    use std::os::unix::ffi::OsStrExt;
    let root = mount.root.as_os_str().as_bytes();
    root.strip_prefix(b"/").unwrap_or(root).to_vec()
}

/// The manual that every volume carries.
fn manuals() -> Vec<(&'static str, &'static str)> {
    vec![
        (
            "hsm-log.5.txt",
            include_str!("../../man/text/hsm-log.5.txt"),
        ),
        (
            "hsm-volume.5.txt",
            include_str!("../../man/text/hsm-volume.5.txt"),
        ),
    ]
}

fn start_server(
    config: &Config,
    service: Arc<Service>,
) -> Result<control::server::Server, Refusal> {
    let socket = &config.socket;
    if let Some(dir) = socket.parent() {
        fs::create_dir_all(dir).map_err(|error| {
            refuse(
                dir.display(),
                error,
                "make this directory, or change `socket`",
            )
        })?;
    }
    let group = match &config.control_group {
        Some(name) => Some(control::peer::group_id(name).map_err(|error| {
            refuse(
                "control_group",
                error,
                "name a group that exists, or leave `control_group` out",
            )
        })?),
        None => None,
    };
    let options = control::server::Options {
        socket: socket.clone(),
        group,
        access: control::server::Access::default(),
    };
    control::server::Server::start(options, service)
        .map_err(|error| refuse(socket.display(), error, "see the message"))
}

/// Gives back the memory in which the kernel keeps a segment's bytes. Whoever copies it later reads it
/// from the disk.
fn let_cache_go(path: &Path) {
    // It may have left the spool already; and nothing but memory is lost where this fails.
    if let Ok(file) = fs::File::open(path) {
        let _ = drop_cached(file.as_fd(), 0, 0);
    }
}

/// Serials of the volumes that were last seen at the configured places, as the log knows them.
fn known_places(
    catalog: &Catalog,
    config: &Config,
) -> Result<BTreeMap<PathBuf, String>, tierfs::catalog::Error> {
    let mut rows = catalog.queries().volumes()?;
    rows.sort_by_key(|row| row.lsn);
    let mut known = BTreeMap::new();
    for VolumeRow { volume, .. } in rows {
        let place = volume
            .place
            .map(|place| PathBuf::from(OsString::from_vec(place)));
        if let Some(path) = place.filter(|place| config.volumes().any(|path| path == place)) {
            known.insert(path, volume.serial);
        }
    }
    Ok(known)
}

/// What a volume's joining a pool is in the log.
pub fn volume_op(serial: String, pool: String, place: &Path) -> Op {
    Op::Volume(VolumeRecord {
        serial,
        pool,
        backend: "directory".to_owned(),
        state: "filling".to_owned(),
        place: Some(place.as_os_str().as_bytes().to_vec()),
    })
}

/// A UUID as blkid prints it.
pub fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex = tierfs::LogId(*uuid).to_string();
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_on_volumes_is_that_of_the_manual_pages() {
        let pages = [
            include_str!("../../man/hsm-log.5"),
            include_str!("../../man/hsm-volume.5"),
        ];
        for ((name, text), page) in manuals().iter().zip(pages) {
            let heads: Vec<&str> = page
                .lines()
                .filter_map(|line| line.strip_prefix(".Sh "))
                .collect();
            assert!(heads.len() > 3, "{name}");
            for head in heads {
                assert!(
                    text.contains(head.trim_matches('"')),
                    "{name} lacks {head}: run `make man-text`"
                );
            }
        }
    }
}
