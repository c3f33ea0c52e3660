//! Capture between a real filesystem and a real catalog, with everything between them in the test's
//! hands: when events arrive and which, when a worker begins and when its result comes, when the
//! catalog is committed, when the daemon dies.

#![allow(unsafe_code)] // setting an extended attribute

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, unbounded};
use tierfs::catalog::{Catalog, Place};
use tierfs::disk::sim::Rng;
use tierfs::record::{Filesystem, Kind, Op, Txn};
use tierfs::{Epoch, FileId, LogId, Lsn, SegmentNo, Time};

use crate::capture::examine::{self, Outcome};
use crate::capture::examiner::{Examiner, Now};
use crate::capture::hints::{Hint, Noted};
use crate::capture::worker::{Bundle, Context, Done, Job, JobQueue, Worker};
use crate::shared::Shared;
use crate::sweep::{Sweep, Swept};
use crate::sys::fanotify::{BUFFER_BYTES, Group};
use crate::sys::handle::{Handle, handle_of};
use crate::sys::mount::PrivateMount;
use crate::sys::stat::stat_of;
use crate::sys::testfs::TestFs;

const EPOCH: Epoch = Epoch(1);
/// Farther than anything is put off.
const LATER: Duration = Duration::from_hours(1);
/// Turns at rest; what is still open then never ends.
const TURNS_MAX: u32 = 2000;

/// See the module.
pub(super) struct Rig {
    pub(super) catalog: Catalog,
    pub(super) shared: Arc<Shared>,
    pub(super) mount: Arc<PrivateMount>,
    /// Events that were raised and not told.
    pub(super) events: Vec<Noted>,
    /// That something cannot be examined does not end the test.
    pub(super) in_trouble: bool,
    /// Transactions that were taken, as text, newest last.
    pub(super) log: Vec<String>,
    group: Group,
    buf: Vec<u8>,
    examiner: Examiner,
    queue: Arc<JobQueue>,
    jobs: Vec<Job>,
    worker: Worker,
    bundles: Receiver<Bundle>,
    done: Vec<Bundle>,
    sweep: Sweep,
    path: PathBuf,
    numbers: Arc<AtomicU64>,
    folded: Option<Lsn>,
    // Unmounted last.
    pub(super) fs: TestFs,
}

impl Rig {
    /// Watches a filesystem; what is on it was there before.
    pub(super) fn new(fs: TestFs) -> Self {
        let path = fs.outside().join("catalog");
        let mut catalog = Catalog::create(&path, LogId([7; 16])).unwrap();
        apply(&mut catalog, first_ops(&fs)).unwrap();
        catalog.commit().unwrap();
        Self::go_on(fs, catalog)
    }

    /// The daemon is stopped, and goes on when the filesystem was unmounted, changed, and mounted again.
    pub(super) fn restarted(mut self, change: impl FnOnce(&TestFs)) -> Self {
        self.commit();
        let Self {
            fs,
            catalog,
            mount,
            group,
            examiner,
            worker,
            sweep,
            ..
        } = self;
        // Else it stays in memory as it was.
        drop((mount, group, examiner, worker, sweep));
        fs.remount_changed(|| change(&fs));
        Self::go_on(fs, catalog)
    }

    fn go_on(fs: TestFs, catalog: Catalog) -> Self {
        let _ = crate::sys::lease::ignore_sigio();
        let mount = Arc::new(fs.private());
        let group = Group::new_notification().unwrap();
        group.mark_filesystem(mount.root()).unwrap();
        let path = catalog.path().to_owned();
        // Data ids are never used again.
        let first = catalog.folded().map_or(0, Lsn::get) << 20;
        let numbers = Arc::new(AtomicU64::new(first));
        let (shared, queue) = (Arc::new(Shared::new(Duration::ZERO)), Arc::default());
        let (worker, bundles) = worker_of(&mount, &path, &numbers);
        Self {
            folded: catalog.folded(),
            examiner: Examiner::new(mount.clone(), Arc::clone(&queue)).unwrap(),
            sweep: Sweep::new(mount.clone(), shared.clone(), &path).unwrap(),
            catalog,
            shared,
            events: Vec::new(),
            log: Vec::new(),
            in_trouble: false,
            group,
            buf: vec![0; BUFFER_BYTES],
            queue,
            jobs: Vec::new(),
            worker,
            bundles,
            done: Vec::new(),
            path,
            numbers,
            mount,
            fs,
        }
    }

    /// Everything from now on raises an event that is told.
    pub(super) fn watched_from(&self, seconds: i64) {
        self.shared.watched_since.store(seconds, Ordering::Relaxed);
    }

    // ---- one step each -------------------------------------------------------------------------

    /// Takes the kernel's events; they are not told yet.
    pub(super) fn read_events(&mut self) {
        while let Some(events) = self.group.read(&mut self.buf).unwrap() {
            for event in events {
                let event = event.unwrap();
                assert!(!event.mask.overflow());
                crate::events::note(&event, &mut self.events);
            }
        }
    }

    /// Tells of `count` events, any of them, some of them twice.
    pub(super) fn tell(&mut self, rng: &mut Rng, count: usize) {
        for _ in 0..count.min(self.events.len()) {
            let at = below(rng, self.events.len());
            let noted = if rng.below(8) == 0 {
                self.events[at].clone()
            } else {
                self.events.swap_remove(at)
            };
            self.shared.note([noted]);
        }
    }

    /// Loses all events that were not told, as an overflow does. A sweep must follow.
    pub(super) fn lose_events(&mut self) {
        self.read_events();
        self.events.clear();
        self.watched_from(Time::now().seconds);
    }

    /// Lets a worker examine `count` files, any of those that are asked for. The results wait.
    pub(super) fn work(&mut self, rng: &mut Rng, count: usize) {
        self.jobs
            .extend(std::iter::from_fn(|| self.queue.try_pop()));
        for _ in 0..count.min(self.jobs.len()) {
            let job = self.jobs.swap_remove(below(rng, self.jobs.len()));
            self.worker.examine(job).unwrap();
            if rng.below(2) == 0 {
                self.worker.flush().unwrap();
            }
        }
        self.worker.flush().unwrap();
        self.done.extend(self.bundles.try_iter());
    }

    /// As [`Self::turn`], but what is put off waits as long as it should.
    pub(super) fn turn_in_time(&mut self, hints: usize) {
        let done: Vec<Done> = self.done.drain(..).flat_map(|b| b.done).collect();
        let hints = self.shared.hints().take_due(Instant::now(), hints, 0);
        self.batch(done, hints);
    }

    /// One turn of the committer with up to `hints` hints and `results` of what was waiting.
    pub(super) fn turn(&mut self, hints: usize, results: usize) {
        let results = results.min(self.done.len());
        let done: Vec<Done> = self.done.drain(..results).flat_map(|b| b.done).collect();
        let hints = self
            .shared
            .hints()
            .take_due(Instant::now() + LATER, hints, 0);
        self.batch(done, hints);
    }

    fn batch(&mut self, done: Vec<Done>, hints: Vec<Hint>) {
        let mut now = Now {
            shared: &self.shared,
            catalog: &mut self.catalog,
            folded: self.folded,
        };
        let mut turn = self.examiner.turn(&mut now, done, hints).unwrap();
        let ops = std::mem::take(&mut turn.ops);
        if !ops.is_empty() {
            self.check_deletes(&ops);
            self.log.push(format!("{ops:?}"));
            apply(&mut self.catalog, ops).unwrap();
            self.check_directories();
        }
        self.examiner.close(&self.shared, turn, true);
        let troubles = self.troubles();
        if !troubles.is_empty() && !self.in_trouble {
            let from = self.log.len().saturating_sub(40);
            for (at, ops) in self.log.iter().enumerate().skip(from) {
                eprintln!("  {}: {ops}", at + 2);
            }
            panic!("{troubles:?}");
        }
    }

    /// Lets the catalog's readers see everything.
    pub(super) fn commit(&mut self) {
        self.catalog.commit().unwrap();
        self.folded = self.catalog.folded();
    }

    /// The daemon is killed and starts again: what was appended is there, hints and readings are not.
    pub(super) fn crash(&mut self) {
        self.commit();
        self.lose_events();
        let since = self.shared.watched_since.load(Ordering::Relaxed);
        self.shared = Arc::new(Shared::new(Duration::ZERO));
        self.watched_from(since);
        self.queue = Arc::default();
        self.examiner = Examiner::new(self.mount.clone(), self.queue.clone()).unwrap();
        (self.worker, self.bundles) = worker_of(&self.mount, &self.path, &self.numbers);
        self.jobs.clear();
        self.done.clear();
    }

    /// Logs something beside what is examined.
    pub(super) fn append(&mut self, ops: Vec<Op>) {
        apply(&mut self.catalog, ops).unwrap();
        self.commit();
    }

    /// Makes change times known at once that the daemon waits two minutes for.
    pub(super) fn confirm_at_once(&mut self) {
        self.examiner.confirm_at_once();
    }

    /// Walks everything, as the sweep's thread does.
    pub(super) fn sweep(&mut self) -> Swept {
        self.try_sweep().unwrap()
    }

    /// A sweep that may fail.
    pub(super) fn try_sweep(&mut self) -> Result<Swept, crate::sweep::Error> {
        self.sweep = Sweep::new(self.mount.clone(), self.shared.clone(), &self.path)?;
        self.sweep.run()
    }

    /// Walks what was asked for.
    pub(super) fn walk(&mut self) {
        self.sweep.walk_asked().unwrap();
    }

    // ---- many steps ----------------------------------------------------------------------------

    /// Tells and examines everything until nothing is open.
    pub(super) fn rest(&mut self, rng: &mut Rng) {
        self.shared.urgent.store(u64::MAX, Ordering::Relaxed);
        for _ in 0..TURNS_MAX {
            self.read_events();
            let all = self.events.len();
            self.shared.note(self.events.drain(..));
            self.work(rng, usize::MAX);
            self.turn(1000, usize::MAX);
            self.commit();
            self.walk();
            let open = self.shared.hints().open();
            if all == 0 && open == 0 && self.examiner.under_way() == 0 {
                self.shared.urgent.store(0, Ordering::Relaxed);
                return;
            }
        }
        panic!(
            "never at rest: {:?}",
            self.shared.hints().oldest().map(|(_, hint)| hint.cloned())
        );
    }

    /// Sweeps until a sweep finds nothing; at most two find something.
    pub(super) fn settle(&mut self, rng: &mut Rng) {
        self.rest(rng);
        for round in 0.. {
            let swept = self.sweep();
            assert_eq!(swept.failed, 0, "{swept:?}");
            if swept.found == 0 {
                break;
            }
            let open: Vec<_> = self.shared.hints().take_due(Instant::now() + LATER, 20, 0);
            assert!(round < 2, "sweeps find again and again: {open:?}");
            for hint in open {
                self.shared
                    .hints()
                    .hold(hint, Instant::now(), Duration::ZERO);
            }
            self.rest(rng);
        }
    }

    /// What is wrong, as status says it.
    pub(super) fn troubles(&self) -> Vec<String> {
        let troubles = self.shared.troubles().into_iter();
        troubles
            .map(|(key, why)| format!("{key}: {} ({})", why.what, why.why))
            .collect()
    }

    // ---- what must hold at every transaction -----------------------------------------------------

    /// Nothing is logged as deleted that its handle still finds.
    fn check_deletes(&self, ops: &[Op]) {
        let deletes = ops.iter().filter_map(|op| match op {
            Op::Delete(delete) => Some(delete.file),
            _ => None,
        });
        for file in deletes {
            let row = self.catalog.queries().inode(file).unwrap();
            let Some(handle) = row.as_ref().and_then(|row| row.handle.as_ref()) else {
                continue;
            };
            let handle = Handle::from_bytes(handle).unwrap();
            // Where it goes at this moment, the kernel may say ENOMEM.
            if let Ok(Some(held)) = examine::hold(self.mount.root(), &handle) {
                let stat = stat_of(held.as_fd()).unwrap();
                assert_eq!(
                    stat.nlink, 0,
                    "{file} is deleted and lives: {row:?} {ops:?}"
                );
            }
        }
    }

    /// A directory never loses its place.
    fn check_directories(&self) {
        let orphans: BTreeSet<FileId> = self
            .catalog
            .queries()
            .orphans()
            .unwrap()
            .into_iter()
            .collect();
        for file in orphans {
            let row = self.catalog.queries().inode(file).unwrap().unwrap();
            assert_ne!(
                row.kind,
                Kind::Directory,
                "{row:?} has no name; {:?}",
                self.log.last()
            );
        }
    }
}

fn first_ops(fs: &TestFs) -> Vec<Op> {
    let mount = fs.private();
    let root = handle_of(mount.root()).unwrap();
    let Ok(Outcome::Facts(found)) = examine::attributes(mount.root(), &root) else {
        panic!("the root directory cannot be examined");
    };
    let mut ops = vec![Op::Filesystem(Filesystem {
        uuid: [3; 16],
        fs_type: "test".to_owned(),
        mount: None,
    })];
    ops.extend(found.ops_of_new(FileId::ROOT, Some(&root)));
    ops
}

fn apply(catalog: &mut Catalog, ops: Vec<Op>) -> Result<(), tierfs::catalog::Error> {
    let time = Time::now().max(catalog.last_time().unwrap_or_default());
    let txn = Txn {
        lsn: Lsn::after(catalog.folded()),
        time,
        wall: time,
        ops,
    };
    let place = Place {
        segment: SegmentNo::FIRST,
        frame_offset: 0,
    };
    catalog.apply(&txn, place)
}

fn worker_of(
    mount: &Arc<PrivateMount>,
    catalog: &std::path::Path,
    numbers: &Arc<AtomicU64>,
) -> (Worker, Receiver<Bundle>) {
    let (out, bundles) = unbounded();
    let context = Context {
        mount: mount.clone(),
        catalog: catalog.to_owned(),
        epoch: EPOCH,
        numbers: numbers.clone(),
        level: 1,
        jobs: Arc::default(),
        out,
        log_id: LogId([7; 16]),
        tier: None,
    };
    (Worker::new(context).unwrap(), bundles)
}

/// A number below `end`, which is not 0.
pub(super) fn below(rng: &mut Rng, end: usize) -> usize {
    usize::try_from(rng.below(end as u64)).unwrap()
}

/// Sets an extended attribute by path.
pub(super) fn set_xattr(
    path: &std::ffi::CStr,
    name: &std::ffi::CStr,
    value: &[u8],
) -> std::io::Result<()> {
    // SAFETY: both strings end with NUL, and `value` has as many bytes as is said.
    let result = unsafe {
        libc::lsetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}
