//! What the daemon's threads share: the open hints, how far the log is, what is wrong, who listens.
//!
//! One thread owns the log and the catalog (see [`crate::committer`]); everybody else talks to it
//! through this. No lock here is held across a system call.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use tierfs::Time;

use crate::capture::hints::{Hints, Noted};
use crate::capture::unread::Unread;
use crate::control::model::{Event, Notice, Severity, State};
use crate::control::when::When;
use crate::examination::{Covers, Examination, Facts};
use crate::sys::handle::Handle;

/// Events kept for each subscriber; one who is slower misses some and is told how many.
const EVENTS_KEPT: usize = 4096;

/// Ages of transactions kept; of more, neighbours share the older one's.
const AGES_KEPT: usize = 4096;
/// Of what changes all the time the journal hears so often.
const TELL_AGAIN: Duration = Duration::from_secs(30);
/// A failed transaction that is tried again and again is trouble after this time.
const REFUSED_FOR: Duration = Duration::from_mins(1);

/// How far the log is. An LSN of 0 stands for none.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// The last transaction appended.
    pub written: u64,
    /// The last one that is durable in the spool.
    pub durable: u64,
    /// The last one that the catalog's readers see.
    pub folded: u64,
    /// How often change times were noted that led to no transaction, and how many of these the catalog's
    /// readers see.
    pub seen: u64,
    /// See there.
    pub seen_folded: u64,
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

/// What is known of a trouble beside its words.
struct Kept {
    trouble: Trouble,
    /// When it was last met.
    met: Instant,
    /// When the journal was told of it.
    told: Instant,
}

/// Since when the oldest change waited that a transaction, or a later one, brought into the log. LSNs
/// and moments ascend.
#[derive(Default)]
struct Ages(VecDeque<(u64, Instant)>);

impl Ages {
    fn note(&mut self, lsn: u64, since: Instant) {
        while self.0.pop_back_if(|(_, other)| *other >= since).is_some() {}
        self.0.push_back((lsn, since));
        if self.0.len() > AGES_KEPT {
            let old: Vec<_> = self.0.drain(..).collect();
            let pairs = old.chunks(2);
            self.0 = pairs
                .filter_map(|pair| Some((pair.last()?.0, pair.first()?.1)))
                .collect();
        }
    }

    fn beyond(&self, lsn: u64) -> Option<Instant> {
        let at = self.0.partition_point(|(other, _)| *other <= lsn);
        self.0.get(at).map(|(_, since)| *since)
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
    /// Bytes appended to the log, as they are stored.
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
    /// When the sweep that is running, or was last, began (unix seconds).
    pub swept_from: AtomicU64,
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
    /// What is examined but for its content.
    pub unread: Unread,
    /// Directories that were asked to be walked, and are not yet.
    pub walks: AtomicUsize,
    unwalked: Mutex<VecDeque<Handle>>,
    troubles: Mutex<BTreeMap<String, Kept>>,
    subscribers: Mutex<Vec<Subscriber>>,
    examination: Mutex<Examination>,
    ages: Mutex<Ages>,
    /// Since when the event reader is behind the kernel's queue.
    reading: Mutex<Option<Instant>>,
    /// Since when no transaction was taken, and one was refused.
    refused: Mutex<Option<Instant>>,
    told: Mutex<Option<State>>,
    public: OnceLock<(PathBuf, Vec<u8>)>,
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
            swept_from: AtomicU64::new(0),
            sweeps: AtomicU64::new(0),
            last_found: AtomicU64::new(0),
            taken_over: AtomicBool::new(false),
            sweeping: AtomicBool::new(false),
            counters: Counters::default(),
            watched_since: AtomicI64::new(i64::MAX),
            unread: Unread::default(),
            walks: AtomicUsize::new(0),
            unwalked: Mutex::default(),
            troubles: Mutex::default(),
            subscribers: Mutex::default(),
            examination: Mutex::default(),
            ages: Mutex::default(),
            reading: Mutex::default(),
            refused: Mutex::default(),
            told: Mutex::default(),
            public: OnceLock::new(),
        }
    }

    /// Says where the public mount is, and which directory of the log's tree is its root. Once.
    pub fn set_public(&self, mount: &Path, prefix: Vec<u8>) {
        let _ = self.public.set((mount.to_owned(), prefix));
    }

    /// A path of the log's tree as people see it: absolute, on the public mount. `None` for what lies
    /// outside of it (another subvolume).
    pub fn on_mount(&self, in_log: &[u8]) -> Option<String> {
        let (mount, prefix) = self.public.get()?;
        let below = match in_log.strip_prefix(prefix.as_slice())? {
            below if prefix.is_empty() || below.is_empty() => below,
            below => below.strip_prefix(b"/")?,
        };
        let mut path = mount.clone();
        if !below.is_empty() {
            path.push(String::from_utf8_lossy(below).as_ref());
        }
        Some(path.display().to_string())
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
        // What a transaction brings into the log is among the open hints until it is appended.
        let waiting = self.hints().oldest().map(|(since, _)| since);
        let mut progress = lock(&self.progress);
        let before = *progress;
        change(&mut progress);
        if progress.written > before.written {
            let since = waiting.unwrap_or_else(Instant::now);
            lock(&self.ages).note(progress.written, since);
        }
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

    /// True where a change waits for its examination for much longer than files rest: within the `rpo`.
    pub fn is_behind(&self) -> bool {
        let rest = self.settle * 3;
        let hints = self.hints();
        hints
            .oldest()
            .is_some_and(|(since, _)| since.elapsed() > rest)
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
        let trouble = Trouble {
            what: what.into(),
            why: why.into(),
            todo: todo.into(),
            severe,
            since: Time::now(),
        };
        self.note_trouble(key, trouble, Duration::ZERO);
    }

    /// The same for what changes with every moment, such as a number: where it is known already, the journal hears
    /// of it now and then.
    pub fn lasting_trouble(&self, key: &str, trouble: Trouble) {
        self.note_trouble(key, trouble, TELL_AGAIN);
    }

    fn note_trouble(&self, key: &str, mut trouble: Trouble, tell_again: Duration) {
        let now = Instant::now();
        let mut troubles = lock(&self.troubles);
        let mut told = now;
        if let Some(known) = troubles.get_mut(key) {
            known.met = now;
            trouble.since = known.trouble.since;
            if known.trouble == trouble {
                return;
            }
            if now.duration_since(known.told) < tell_again {
                told = known.told;
            }
        }
        let kept = Kept {
            trouble: trouble.clone(),
            met: now,
            told,
        };
        troubles.insert(key.to_owned(), kept);
        drop(troubles);
        if told != now {
            return;
        }
        let Trouble {
            what, why, todo, ..
        } = &trouble;
        if trouble.severe {
            tracing::error!(key, "{what}: {why}; {todo}");
        } else {
            tracing::warn!(key, "{what}: {why}; {todo}");
        }
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
            .map(|(key, kept)| (key.clone(), kept.trouble.clone()))
            .collect()
    }

    // ---- what is true of everything ------------------------------------------------------------

    /// Events were lost, or nobody listened: everything must be looked at by a sweep that begins now.
    pub fn ask_examination(&self) {
        lock(&self.examination).ask();
        self.tell_state();
    }

    /// How many examinations were asked for.
    pub fn examinations_asked(&self) -> u64 {
        lock(&self.examination).asked()
    }

    /// How many of them a sweep has covered; what it found is noted, but may still be open.
    pub fn examinations_swept(&self) -> u64 {
        lock(&self.examination).swept()
    }

    /// A sweep begins.
    pub fn sweep_begins(&self) -> Covers {
        lock(&self.examination).begins()
    }

    /// It has noted the last difference.
    pub fn sweep_ends(&self, covers: Covers) {
        let facts = self.facts();
        lock(&self.examination).ends(covers, facts);
    }

    fn facts(&self) -> Facts {
        // In this order: what is settled was appended before, what is walked was noted before.
        let walks = self.walks.load(Ordering::Acquire);
        let (oldest, last) = {
            let hints = self.hints();
            (hints.oldest_seq(), hints.last_seq())
        };
        let walks = walks.max(self.walks.load(Ordering::Acquire));
        let Progress {
            written, durable, ..
        } = self.progress();
        Facts {
            oldest,
            last,
            walks,
            written,
            durable,
        }
    }

    /// True where everything that the start and lost events called for is examined and durable. What
    /// could not be examined before the last sweep, and was by it, is no trouble any more.
    pub fn is_examined(&self) -> bool {
        let facts = self.facts();
        let mut examination = lock(&self.examination);
        let begun = examination.look(facts);
        let over = examination.is_over();
        drop(examination);
        if let Some(begun) = begun {
            for key in ["unexamined", "unreadable"] {
                let met = lock(&self.troubles).get(key).map(|kept| kept.met);
                if met.is_some_and(|met| met < begun) {
                    self.well(key);
                }
            }
        }
        over
    }

    /// What the daemon is at.
    pub fn state(&self) -> State {
        let examined = self.is_examined();
        let severe = lock(&self.troubles)
            .values()
            .any(|kept| kept.trouble.severe);
        if self.stopping() {
            State::Stopping
        } else if severe {
            State::Degraded
        } else if examined {
            State::Following
        } else {
            State::Examining
        }
    }

    /// Tells the subscribers where the daemon is at something else.
    pub fn tell_state(&self) {
        let state = self.state();
        if lock(&self.told).replace(state) != Some(state) {
            let time = When::now();
            self.tell(&Event::State { time, state });
        }
    }

    /// How long the oldest change has waited that came into the log with a later transaction than
    /// `lsn`. `None` where there is none, or only what an earlier run of the daemon has appended.
    pub fn age_beyond(&self, lsn: u64) -> Option<Duration> {
        let since = lock(&self.ages).beyond(lsn);
        since.map(|since| since.elapsed())
    }

    /// The event reader begins to read (`true`), or has emptied the kernel's queue.
    pub fn reads_events(&self, reading: bool) {
        let mut since = lock(&self.reading);
        *since = reading.then(|| since.unwrap_or_else(Instant::now));
    }

    /// How long the event reader has been behind the kernel's queue.
    pub fn events_behind(&self) -> Option<Duration> {
        lock(&self.reading).map(|since| since.elapsed())
    }

    /// A transaction was taken (`None`), or does not fit the tree as the catalog has it. Nothing is
    /// lost by that, its parts are examined again; it is trouble only where it goes on.
    pub fn refused(&self, why: Option<&dyn std::fmt::Display>) {
        let mut since = lock(&self.refused);
        let Some(why) = why else {
            if since.take().is_some() {
                drop(since);
                self.well("refused");
            }
            return;
        };
        let first = *since.get_or_insert_with(Instant::now);
        drop(since);
        tracing::info!(
            "what was found does not fit together yet ({why}): nothing is lost, it is looked at again"
        );
        if first.elapsed() >= REFUSED_FOR {
            self.trouble(
                "refused",
                true,
                "changes do not get into the log, though they are looked at again and again",
                why.to_string(),
                "restart hsmd; if that does not help, stop it and run `tierctl catalog rebuild`, and report this message",
            );
        }
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
}

#[cfg(test)]
mod tests;
