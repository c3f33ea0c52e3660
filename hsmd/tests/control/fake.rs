//! A daemon that is made up: [`Core`] over a small log and a directory.

use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use hsmd::control::client::Client;
use hsmd::control::model::{
    CatalogStatus, Event, EventCounts, Lag, Located, Pending, PoolStatus, RefillStatus,
    ReleasedStatus, SpaceState, SpaceStatus, SpoolStatus, State, Status, SweepStatus, SyncDone,
    SyncRequest, VerifyDone, VerifyProgress, VolumeState, VolumeStatus,
};
use hsmd::control::server::{Access, Options, Server};
use hsmd::control::when::When;
use hsmd::control::{Core, CoreError};
use hsmd::sys::handle::handle_of;
use replay::sources::Sources;
use tempfile::TempDir;
use tierfs::FileId;
use tierfs::Time;
use tierfs::catalog::Reader;
use tierfs::files::{Files, View};

use crate::log::{self, MadeLog};

pub fn when(text: &str) -> When {
    text.parse().unwrap()
}

/// A status in which all is well.
pub fn all_well() -> Status {
    let now = when("2026-11-20T17:00:00Z");
    Status {
        version: "0.1.0".to_owned(),
        pid: 4242,
        log_id: log::LOG.to_string(),
        mount: "/data".to_owned(),
        fs_type: "ext4".to_owned(),
        fs_uuid: "6f1d3a0c-1f5e-4a3b-9a57-0a6f0a1b2c3d".to_owned(),
        state: State::Following,
        notices: Vec::new(),
        now,
        started: when("2026-11-20T13:50:00Z"),
        uptime_ms: 11_400_000,
        rpo_ms: 1000,
        written_lsn: Some(1042),
        durable_lsn: Some(1042),
        durable_time: Some(when("2026-11-20T16:59:58.25Z")),
        folded_lsn: Some(1042),
        copied_lsn: Some(1040),
        lag: Lag::default(),
        spool: SpoolStatus {
            path: "/var/lib/hsmd/spool".to_owned(),
            bytes: 13 << 20,
            bytes_max: 16 << 30,
            free_bytes: 71 << 30,
            segments: 0,
            open_segment: Some(18),
            open_segment_bytes: 13 << 20,
            full: false,
        },
        pools: vec![
            pool("a", "4f00aa11bb22cc33", "/archive/a1"),
            pool("b", "91827364a5b6c7d8", "/archive/b1"),
        ],
        sweep: SweepStatus {
            last_finished: Some(when("2026-11-20T16:20:00Z")),
            last_found: 3,
            found: 5,
            running: None,
            next: Some(when("2026-11-20T17:20:00Z")),
        },
        events: EventCounts {
            read: 123_456,
            overflows: 0,
        },
        examined_files: 78_605,
        logged_bytes: (3 << 30) / 2,
        fuzzy_files: 0,
        unrestorable_files: 0,
        released: Some(ReleasedStatus {
            files: 12_345,
            wanted: 2,
            waiting: 3,
            every_file: false,
        }),
        refill: Some(RefillStatus {
            files: 4321,
            rests: None,
        }),
        space: Some(SpaceStatus {
            state: SpaceState::Releasing,
            used_percent: 91,
            available_bytes: 92 << 30,
            rule: "make-room".to_owned(),
            high_watermark: 90,
            low_watermark: 80,
            headroom_bytes: 100 << 30,
            write_bytes_per_s: 40 << 20,
            write_bytes_per_s_max: 210 << 20,
            release_latency_ms: Some(640),
            release_bytes_per_s: Some(900 << 20),
            limit_bytes_per_s: Some(900 << 20),
            released_files: 1234,
            released_bytes: 17 << 30,
        }),
        catalog: CatalogStatus {
            path: "/var/lib/hsmd/catalog.db".to_owned(),
            bytes: 48 << 20,
            files: 78_600,
            files_bytes: (3 << 30) / 2,
            versions: 79_012,
            digest: None,
        },
        memory_bytes: 96 << 20,
    }
}

fn pool(name: &str, serial: &str, path: &str) -> PoolStatus {
    PoolStatus {
        name: name.to_owned(),
        copied_lsn: Some(1040),
        lacks_since: Some(when("2026-11-20T16:59:18Z")),
        lacks_segments: 0,
        lacks_bytes: 0,
        waiting: None,
        volumes: vec![VolumeStatus {
            serial: Some(serial.to_owned()),
            path: path.to_owned(),
            backend: "directory".to_owned(),
            state: VolumeState::Filling,
            segments: 17,
            bytes: 1_100 << 20,
            free_bytes: Some(900 << 30),
            last_verified: Some(when("2026-11-19T03:00:00Z")),
            damaged: 0,
        }],
    }
}

/// Events that a subscriber may be behind before it misses some.
const EVENTS_KEPT: usize = 100;

pub struct Fake {
    pub status: Mutex<Status>,
    pub mount: PathBuf,
    pub log: MadeLog,
    /// Sync waits for this; it is told when it was cancelled.
    pub sync_done: AtomicBool,
    pub sync_cancelled: AtomicBool,
    pub syncs: AtomicU64,
    pub verify_endless: AtomicBool,
    pub verify_cancelled: AtomicBool,
    pub stopped: AtomicBool,
    pub dirty: AtomicBool,
    /// Neither spool nor volumes have a sealed segment.
    pub nothing_sealed: AtomicBool,
    pub policy: PathBuf,
    /// What policies and pins had done: action and file.
    pub acted: Mutex<Vec<(String, u64)>>,
    /// Files on which every action fails.
    pub fails_on: Mutex<Vec<u64>>,
    /// Per cent of the filesystem in use; each released file takes some off.
    pub used: AtomicU64,
    subscribers: Mutex<Vec<(Sender<Event>, u64)>>,
}

impl Fake {
    /// Tells all subscribers, as the daemon does: nobody is waited for.
    pub fn emit(&self, event: &Event) {
        for (to, missed) in self.subscribers.lock().unwrap().iter_mut() {
            if *missed > 0 && to.try_send(Event::Missed { count: *missed }).is_ok() {
                *missed = 0;
            }
            if *missed > 0 || to.try_send(event.clone()).is_err() {
                *missed += 1;
            }
        }
    }

    pub fn missed(&self) -> u64 {
        self.subscribers
            .lock()
            .unwrap()
            .iter()
            .map(|(_, missed)| *missed)
            .sum()
    }
}

impl Core for Fake {
    fn status(&self) -> Status {
        self.status.lock().unwrap().clone()
    }

    fn sync(&self, request: SyncRequest, cancelled: &AtomicBool) -> Result<SyncDone, CoreError> {
        self.syncs.fetch_add(1, Ordering::SeqCst);
        while !self.sync_done.load(Ordering::SeqCst) {
            if cancelled.load(Ordering::SeqCst) {
                self.sync_cancelled.store(true, Ordering::SeqCst);
                return Err(CoreError::Cancelled("the sync"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let waited_ms = if request.media { 2500 } else { 250 };
        Ok(SyncDone {
            lsn: Some(1042),
            waited_ms,
        })
    }

    fn catalog(&self) -> Result<Reader, CoreError> {
        Ok(Reader::open(&self.log.catalog)?)
    }

    fn sources(&self) -> Result<Arc<Sources>, CoreError> {
        if self.nothing_sealed.load(Ordering::SeqCst) {
            return Err(CoreError::Unavailable(
                "no segment is sealed yet".to_owned(),
            ));
        }
        Ok(Arc::new(Sources::open(std::slice::from_ref(
            &self.log.spool,
        ))?))
    }

    fn subscribe(&self) -> Receiver<Event> {
        let (to, from) = bounded(EVENTS_KEPT);
        self.subscribers.lock().unwrap().push((to, 0));
        from
    }

    fn resolve(&self, path: &Path) -> Result<Located, CoreError> {
        let below = path
            .strip_prefix(&self.mount)
            .map_err(|_| CoreError::NotWatched {
                path: path.to_owned(),
                mount: self.mount.clone(),
            })?;
        let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_NOFOLLOW;
        let opened = nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty())
            .map_err(|error| CoreError::NotFound(format!("{}: {error}", path.display())))?;
        let name = below.as_os_str().as_bytes().to_vec();
        let file = self.catalog()?.queries().resolve(&name)?;
        Ok(Located {
            file: file.map(tierfs::FileId::get),
            handle: handle_of(opened.as_fd()).unwrap().to_bytes(),
            path: name,
            ctime: None,
        })
    }

    fn pending(&self, _file: u64) -> Option<Pending> {
        self.dirty.load(Ordering::SeqCst).then(|| Pending {
            since: when("2026-11-20T16:59:59Z"),
            why: "it was changed and waits to be examined".to_owned(),
        })
    }

    fn verify_volume(
        &self,
        serial_or_path: &str,
        progress: &mut dyn FnMut(VerifyProgress) -> ControlFlow<()>,
    ) -> Result<VerifyDone, CoreError> {
        if serial_or_path != "4f00aa11bb22cc33" {
            return Err(CoreError::NotFound(format!(
                "no pool has a volume {serial_or_path}"
            )));
        }
        let mut now = VerifyProgress {
            objects_total: 17,
            ..VerifyProgress::default()
        };
        while now.objects < 17 || self.verify_endless.load(Ordering::SeqCst) {
            now.objects += 1;
            if progress(now).is_break() {
                self.verify_cancelled.store(true, Ordering::SeqCst);
                return Err(CoreError::Cancelled("the check of the volume"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(VerifyDone {
            serial: serial_or_path.to_owned(),
            pool: "a".to_owned(),
            path: "/archive/a1".to_owned(),
            objects: 17,
            bytes: 1 << 30,
            faults: Vec::new(),
        })
    }

    fn catalog_digest(&self) -> Result<(Option<u64>, String), CoreError> {
        self.catalog()?.snapshot(|queries| {
            let lsn = queries.folded()?.map(|(lsn, _)| lsn.get());
            Ok((lsn, queries.digest()?.to_string()))
        })
    }

    fn mount(&self) -> PathBuf {
        self.mount.clone()
    }

    fn files(&self) -> Result<Files, CoreError> {
        let view = View {
            prefix: Vec::new(),
            copied: tierfs::Lsn::new(1_000_000),
            now: Time::now().seconds,
        };
        Ok(Files::open(&self.log.catalog, &view)?)
    }

    fn sums(&self) -> Result<tierfs::files::usage::Usage, CoreError> {
        Ok(tierfs::files::usage::Usage::open(&self.log.catalog)?)
    }

    fn policy_file(&self) -> Option<PathBuf> {
        self.policy.exists().then(|| self.policy.clone())
    }

    fn usage(&self) -> Result<policies::decide::Usage, CoreError> {
        Ok(policies::decide::Usage {
            used: self.used.load(Ordering::SeqCst),
            available: 100 - self.used.load(Ordering::SeqCst),
        })
    }

    fn pin(&self, files: &[FileId], pinned: bool) -> Result<(Option<u64>, u64), CoreError> {
        let word = if pinned { "pin" } else { "unpin" };
        let new = files.iter().map(|file| (word.to_owned(), file.get()));
        self.acted.lock().unwrap().extend(new);
        Ok((Some(1043), files.len() as u64))
    }

    fn act(
        &self,
        action: policies::Action,
        files: &[FileId],
        _cancelled: &Arc<AtomicBool>,
    ) -> Result<Vec<(FileId, String)>, CoreError> {
        if action == policies::Action::Recall {
            return Err(CoreError::Unavailable("no recall here".to_owned()));
        }
        let new = files
            .iter()
            .map(|file| (action.word().to_owned(), file.get()));
        self.acted.lock().unwrap().extend(new);
        if action == policies::Action::Release {
            let each = 10 * files.len() as u64;
            self.used.fetch_sub(each, Ordering::SeqCst);
        }
        let fails = self.fails_on.lock().unwrap();
        let failed = files.iter().filter(|file| fails.contains(&file.get()));
        Ok(failed
            .map(|file| (*file, "it is in use".to_owned()))
            .collect())
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.subscribers.lock().unwrap().clear();
    }
}

/// The made-up daemon behind a real socket, in a directory that everybody may enter.
pub struct Daemon {
    pub core: Arc<Fake>,
    pub server: Option<Server>,
    pub socket: PathBuf,
    pub dir: TempDir,
}

impl Daemon {
    pub fn start() -> Self {
        Self::with(Access::Everyone, None)
    }

    pub fn with(access: Access, group: Option<u32>) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("hsmd-control-")
            .tempdir()
            .unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let mount = dir.path().join("data");
        std::fs::create_dir_all(mount.join("d")).unwrap();
        std::fs::write(mount.join("d/a.txt"), log::SECOND).unwrap();
        std::fs::write(mount.join("sparse"), "").unwrap();
        std::fs::write(mount.join("new"), "").unwrap();
        let made = log::make(dir.path());
        let mut status = all_well();
        status.mount = mount.display().to_string();
        status.spool.path = made.spool.display().to_string();
        let core = Arc::new(Fake {
            status: Mutex::new(status),
            mount,
            log: made,
            sync_done: AtomicBool::new(false),
            sync_cancelled: AtomicBool::new(false),
            syncs: AtomicU64::new(0),
            verify_endless: AtomicBool::new(false),
            verify_cancelled: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
            nothing_sealed: AtomicBool::new(false),
            policy: dir.path().join("policy.toml"),
            acted: Mutex::default(),
            fails_on: Mutex::default(),
            used: AtomicU64::new(95),
            subscribers: Mutex::default(),
        });
        let socket = dir.path().join("control.sock");
        let options = Options {
            socket: socket.clone(),
            group,
            access,
        };
        let server = Some(Server::start(options, core.clone()).unwrap());
        Self {
            core,
            server,
            socket,
            dir,
        }
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.core.mount.join(name)
    }

    /// tierctl with these arguments.
    pub fn tierctl(&self, words: &[&str]) -> std::process::Command {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_tierctl"));
        command.arg("--socket").arg(&self.socket).args(words);
        command
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.core.sync_done.store(true, Ordering::SeqCst);
        self.core.verify_endless.store(false, Ordering::SeqCst);
        if let Some(server) = self.server.take() {
            server.stop();
        }
    }
}

/// What a program printed, and how it ended.
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

pub fn run(command: &mut std::process::Command) -> Ran {
    let output = command.output().unwrap();
    Ran {
        code: output.status.code().unwrap(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

pub fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !so() {
        assert!(Instant::now() < end, "never so: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn at(seconds: i64) -> When {
    When(Time { seconds, nanos: 0 })
}
