//! What the daemon's threads share: the open hints, how far the log is, what is wrong, who listens.
//!
//! One thread owns the log and the catalog (see [`crate::committer`]); everybody else talks to it
//! through this. No lock here is held across a system call.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use tierfs::Time;

use crate::capture::hints::{Hints, Noted};
use crate::control::model::{Event, Notice, Severity};
use crate::control::when::When;
use crate::sys::handle::Handle;

/// Events kept for each subscriber; one who is slower misses some and is told how many.
const EVENTS_KEPT: usize = 4096;

/// How far the log is. An LSN of 0 stands for none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// The last transaction appended.
    pub written: u64,
    /// The last one that is durable in the spool.
    pub durable: u64,
    /// The last one that the catalog's readers see.
    pub folded: u64,
}

/// Something that an administrator should know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// What is wrong, naming the object.
    pub what: String,
    /// Why.
    pub why: String,
    /// What to do.
    pub todo: String,
    /// Whether changes are not getting into the log because of it.
    pub severe: bool,
    /// Since when.
    pub since: Time,
}

impl Trouble {
    /// As status and events show it.
    pub fn notice(&self) -> Notice {
        Notice {
            severity: if self.severe {
                Severity::Error
            } else {
                Severity::Warning
            },
            what: self.what.clone(),
            why: self.why.clone(),
            advice: self.todo.clone(),
            since: Some(self.since.into()),
        }
    }
}

struct Subscriber {
    to: Sender<Event>,
    missed: u64,
}

/// Counters for status.
#[derive(Default)]
pub struct Counters {
    /// Events read from the kernel.
    pub events: AtomicU64,
    /// Times that the kernel dropped events.
    pub overflows: AtomicU64,
    /// Files examined.
    pub examined: AtomicU64,
    /// Fuzzy versions committed.
    pub fuzzy: AtomicU64,
    /// Bytes appended to the log.
    pub bytes_logged: AtomicU64,
    /// Differences that sweeps found.
    pub swept_found: AtomicU64,
    /// Entries that the running (or last) sweep has looked at.
    pub swept_entries: AtomicU64,
}

/// See the module.
pub struct Shared {
    hints: Mutex<Hints>,
    wake: Sender<()>,
    woken: Receiver<()>,
    progress: Mutex<Progress>,
    moved: Condvar,
    settle: Duration,
    /// Hints up to this number do not wait for files to settle.
    pub urgent: AtomicU64,
    /// Somebody waits for the open segment to be sealed.
    pub seal_wanted: AtomicBool,
    /// Set once: the daemon is to end.
    pub stopping: AtomicBool,
    /// Files being examined now.
    pub examining: AtomicUsize,
    /// The sweep that is running, or was last: when it ended (unix seconds), 0 while the first runs.
    pub swept_at: AtomicU64,
    /// How many sweeps ended.
    pub sweeps: AtomicU64,
    /// What the last sweep found.
    pub last_found: AtomicU64,
    /// The log is taken over by a disk that replay built: its files are known by their names first.
    pub taken_over: AtomicBool,
    /// A sweep is running.
    pub sweeping: AtomicBool,
    /// Numbers for status.
    pub counters: Counters,
    /// Since when (unix seconds) everything that happens raises an event.
    pub watched_since: AtomicI64,
    /// Directories that were asked to be walked, and are not yet.
    pub walks: AtomicUsize,
    unwalked: Mutex<VecDeque<Handle>>,
    troubles: Mutex<BTreeMap<String, Trouble>>,
    subscribers: Mutex<Vec<Subscriber>>,
    slow: Mutex<VecDeque<(String, u64)>>,
}

/// A lock that a panicking thread held is taken all the same: what it guards is valid at every step.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Nothing noted yet. `settle` is how long a file may rest before it is examined.
    pub fn new(settle: Duration) -> Self {
        let (wake, woken) = bounded(1);
        Self {
            hints: Mutex::default(),
            wake,
            woken,
            progress: Mutex::default(),
            moved: Condvar::new(),
            settle,
            urgent: AtomicU64::new(0),
            seal_wanted: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            examining: AtomicUsize::new(0),
            swept_at: AtomicU64::new(0),
            sweeps: AtomicU64::new(0),
            last_found: AtomicU64::new(0),
            taken_over: AtomicBool::new(false),
            sweeping: AtomicBool::new(false),
            counters: Counters::default(),
            watched_since: AtomicI64::new(i64::MAX),
            walks: AtomicUsize::new(0),
            unwalked: Mutex::default(),
            troubles: Mutex::default(),
            subscribers: Mutex::default(),
            slow: Mutex::default(),
        }
    }

    /// The open hints.
    pub fn hints(&self) -> MutexGuard<'_, Hints> {
        lock(&self.hints)
    }

    /// Notes a batch of hints and wakes the committer where it may sleep longer than they can wait.
    pub fn note(&self, batch: impl IntoIterator<Item = Noted>) {
        let now = Instant::now();
        let urgent = self.urgent.load(Ordering::Relaxed);
        let sooner = {
            let mut hints = self.hints();
            let before = hints.next_due(urgent);
            for (key, look, beside) in batch {
                hints.note(key, look, beside, now, self.settle);
            }
            let after = hints.next_due(urgent);
            before.is_none_or(|before| after.is_some_and(|after| after < before))
        };
        if sooner {
            self.wake();
        }
    }

    /// Asks the sweep to walk directories whose content raised no events.
    pub fn walk(&self, dirs: Vec<Handle>) {
        if !dirs.is_empty() {
            self.walks.fetch_add(dirs.len(), Ordering::Relaxed);
            lock(&self.unwalked).extend(dirs);
        }
    }

    /// A directory that somebody asked to walk. [`Self::walked`] must follow.
    pub fn next_walk(&self) -> Option<Handle> {
        lock(&self.unwalked).pop_front()
    }

    /// One of these has been walked.
    pub fn walked(&self) {
        self.walks.fetch_sub(1, Ordering::Relaxed);
    }

    /// Lets the committer look at everything again.
    pub fn wake(&self) {
        // A full channel means that it will.
        let _ = self.wake.try_send(());
    }

    /// What [`Self::wake`] sends.
    pub fn woken(&self) -> &Receiver<()> {
        &self.woken
    }

    /// How far the log is.
    pub fn progress(&self) -> Progress {
        *lock(&self.progress)
    }

    /// Moves the watermarks, in their order, and wakes who waits for them.
    pub fn advance(&self, change: impl FnOnce(&mut Progress)) {
        let mut progress = lock(&self.progress);
        let before = *progress;
        change(&mut progress);
        assert!(
            progress.folded <= progress.durable && progress.durable <= progress.written,
            "{progress:?}"
        );
        assert!(
            progress.durable >= before.durable && progress.written >= before.written,
            "{progress:?}"
        );
        self.moved.notify_all();
    }

    /// Waits until something moved, or `patience` is over.
    pub fn wait_for_progress(&self, patience: Duration) {
        let progress = lock(&self.progress);
        drop(self.moved.wait_timeout(progress, patience));
    }

    /// Wakes everybody who waits for progress.
    pub fn nudge(&self) {
        let _held = lock(&self.progress);
        self.moved.notify_all();
    }

    /// True once the daemon is to end.
    pub fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Begins the end.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.wake();
        self.nudge();
    }

    /// Says that something is wrong; once for each `key` until [`Self::well`].
    pub fn trouble(
        &self,
        key: &str,
        severe: bool,
        what: impl Into<String>,
        why: impl Into<String>,
        todo: impl Into<String>,
    ) {
        let (what, why, todo) = (what.into(), why.into(), todo.into());
        let mut troubles = lock(&self.troubles);
        if troubles
            .get(key)
            .is_some_and(|known| known.what == what && known.why == why)
        {
            return;
        }
        tracing::warn!(key, "{what}: {why}; {todo}");
        let since = troubles
            .get(key)
            .map_or_else(Time::now, |known| known.since);
        let trouble = Trouble {
            what,
            why,
            todo,
            severe,
            since,
        };
        troubles.insert(key.to_owned(), trouble.clone());
        drop(troubles);
        self.tell(&Event::Notice {
            time: When::now(),
            notice: trouble.notice(),
        });
    }

    /// Says that it is right again.
    pub fn well(&self, key: &str) {
        if lock(&self.troubles).remove(key).is_some() {
            tracing::info!(key, "is well again");
            let notice = Notice {
                severity: Severity::Info,
                what: format!("{key} is well again"),
                why: String::new(),
                advice: String::new(),
                since: None,
            };
            self.tell(&Event::Notice {
                time: When::now(),
                notice,
            });
        }
    }

    /// All that is wrong now.
    pub fn troubles(&self) -> Vec<(String, Trouble)> {
        lock(&self.troubles)
            .iter()
            .map(|(key, trouble)| (key.clone(), trouble.clone()))
            .collect()
    }

    /// A new subscriber's end.
    pub fn subscribe(&self) -> Receiver<Event> {
        let (to, from) = bounded(EVENTS_KEPT);
        lock(&self.subscribers).push(Subscriber { to, missed: 0 });
        from
    }

    /// True where somebody listens.
    pub fn heard(&self) -> bool {
        !lock(&self.subscribers).is_empty()
    }

    /// Tells all subscribers.
    pub fn tell(&self, event: &Event) {
        lock(&self.subscribers).retain_mut(|subscriber| {
            if subscriber.missed > 0
                && subscriber
                    .to
                    .try_send(Event::Missed {
                        count: subscriber.missed,
                    })
                    .is_ok()
            {
                subscriber.missed = 0;
            }
            match subscriber.to.try_send(event.clone()) {
                Ok(()) => true,
                Err(TrySendError::Full(_)) => {
                    subscriber.missed += 1;
                    true
                }
                Err(TrySendError::Disconnected(_)) => false,
            }
        });
    }

    /// Remembers a file whose examination took long, for status.
    pub fn slow_file(&self, path: String, millis: u64) {
        let mut slow = lock(&self.slow);
        slow.retain(|(known, _)| *known != path);
        slow.push_front((path, millis));
        slow.truncate(8);
    }

    /// Files whose examination took long, newest first, with milliseconds.
    pub fn slow_files(&self) -> Vec<(String, u64)> {
        lock(&self.slow).iter().cloned().collect()
    }
}
