//! Recall: who opens a stub waits until its bytes are back and checked, and no longer.
//!
//! One recall serves all who wait for the same inode. A recalled file goes through three states: *wanted*
//! (queued or being filled), *there* (its bytes are right, but not known to be durable, and it has its
//! mark), and whole. Readers go on as soon as the bytes are there. Who may change the file waits until the
//! mark is gone, and that goes only after it says, durably, that nothing is missing: else a loss of power
//! could bring back a mark that puts the logged bytes over newer ones. All this is done for many files at
//! once.
//!
//! The queue is fair between users, and in the order of the log within a user's files.

mod again;
mod failing;
mod finish;
mod queue;
mod room;
mod seals;
mod stalls;

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tierfs::catalog::Readers;
use tierfs::residency::Residency;
use tierfs::stub::{Stage, StubMark};
use tierfs::{FileId, LogId};

use self::failing::Failing;
pub use self::queue::{BACKGROUND, Cancelled, Filling, Queued, Reached, Waits};
use self::queue::{OnDisk, Queue, State, There, Turn, Waiter, Wanted};
use super::fill::{FillError, Filler};
use super::mark::{self, Marked};
use super::regain;
use super::residents::Residents;
use super::suspects::Suspects;
use super::{Busy, Recalled, Vouched};
use crate::fetch::Fetcher;
use crate::policy::space::Space;
use crate::shared::{Shared, lock};
use crate::sys::handle::{Handle, Opened, handle_of, open_by_handle};
use crate::sys::link::Handed;
use crate::sys::mount::PrivateMount;
use crate::sys::permission::{Answer, Attempt};
use crate::sys::stat::{FileKind, stat_of};
use crate::sys::{Error, io, lease, space};

/// How long recalled files gather before they are made durable, unless somebody waits for it.
const GATHER: Duration = Duration::from_millis(50);
/// And where some were made durable a moment ago: while the filesystem commits its journal, recalls stand still.
const GATHER_AGAIN: Duration = Duration::from_secs(1);
/// The notice about recalled files that cannot be finished.
const STUCK: &str = "recall-stuck";
/// How long a recall that could not be served rests.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a file is left to the release that works on it.
const SOON: Duration = Duration::from_millis(5);
/// A recall thread that had nothing to do for so long gives memory back.
const REST: Duration = Duration::from_mins(1);

/// What came of a recall.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The file is whole and durable.
    Whole {
        /// Bytes that came from the log; 0 where the file was whole.
        bytes: u64,
    },
    /// It is a stub still; what a program hears, and why.
    Failed(i32, String),
    /// It is a stub still, because this user wanted that.
    Cancelled(u32),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Whole { bytes } => write!(f, "{bytes} bytes came from the log"),
            Self::Failed(_, why) => f.write_str(why),
            Self::Cancelled(by) => write!(
                f,
                "the recall was cancelled by user {by}; open the file or ask again when you want it"
            ),
        }
    }
}

/// What came of filling a file.
enum Filled {
    /// Its bytes are there. The file, open since before they were written.
    There(There, OwnedFd),
    /// It is no stub. It is out of the queue: these waited for it.
    Whole(Option<State>),
    /// Its inode cannot be had: it is deleted.
    Gone,
}

/// What recall works with.
pub struct Parts {
    /// Hints, notices.
    pub shared: Arc<Shared>,
    /// The filesystem, without events.
    pub mount: Arc<PrivateMount>,
    /// The kernel's marks.
    pub residents: Arc<Residents>,
    /// The catalog.
    pub catalog: Readers,
    /// The log.
    pub log_id: LogId,
    /// Content.
    pub fetcher: Fetcher,
    /// The list of stubs.
    pub residency: Arc<Mutex<Residency>>,
    /// Files of which nobody knows what belongs into them.
    pub suspects: Arc<Suspects>,
    /// Inodes that are worked on.
    pub busy: Arc<Busy>,
    /// Files that were found to be as logged.
    pub vouched: Arc<Vouched>,
    /// Files that were recalled not long ago.
    pub recalled: Arc<Recalled>,
    /// Who makes room.
    pub space: Arc<Space>,
    /// How long a program waits for a copy that is away.
    pub wait: Duration,
    /// How many threads call [`Recall::work`].
    pub threads: usize,
}

/// Where answers go.
pub type AnswerTo = Box<dyn Fn(u64, Answer) + Send + Sync>;

/// See the module.
pub struct Recall {
    parts: Parts,
    /// For syncs whose errors nobody else is told instead.
    sync_root: OwnedFd,
    /// Syncs that failed.
    sync_errors: AtomicU64,
    queue: Mutex<Queue>,
    wake: Condvar,
    finish: Condvar,
    tend: Condvar,
    /// Threads beside the configured ones.
    spares: AtomicUsize,
    answer: AnswerTo,
    /// What could not be recalled when it was tried last.
    failing: Mutex<Failing>,
    /// What is there and cannot be finished.
    stuck: Mutex<HashSet<Handle>>,
    /// Files without a name, not yet looked up in the list of stubs; and those on the list, until their
    /// inodes are gone, too.
    deleted: Mutex<Vec<FileId>>,
}

impl Recall {
    /// Nothing waits yet; [`Self::work`] and [`Self::finish`] are for threads of the caller.
    pub fn new(parts: Parts, answer: AnswerTo) -> Result<Self, Error> {
        let sync_root = again::opened_anew(parts.mount.root())?;
        let queue = Queue::new(parts.threads);
        Ok(Self {
            parts,
            sync_root,
            sync_errors: AtomicU64::new(0),
            queue: Mutex::new(queue),
            wake: Condvar::new(),
            finish: Condvar::new(),
            tend: Condvar::new(),
            spares: AtomicUsize::new(0),
            answer,
            failing: Mutex::default(),
            stuck: Mutex::default(),
            deleted: Mutex::default(),
        })
    }

    /// How many files are wanted, and how many programs wait.
    pub fn depth(&self) -> (usize, usize) {
        let queue = lock(&self.queue);
        let (mut files, mut programs) = (0, 0);
        for state in queue.states.values() {
            let waits = |waiter: &&Waiter| matches!(waiter, Waiter::Access { .. });
            let wanted = matches!(state, State::Wanted(_)) && !state.is_background();
            files += usize::from(wanted);
            programs += state.waiters().iter().filter(waits).count();
        }
        (files, programs)
    }

    // ---- who comes --------------------------------------------------------------------------------

    /// A program waits for a file that had a mark when the guard looked.
    pub fn access(&self, handed: Handed) {
        let Handed { waits, fd } = handed;
        let (id, attempt, uid) = (waits.id, waits.attempt, waits.uid);
        let waiter = Waiter::Access {
            id,
            attempt,
            who: (waits.pid, uid),
            since: since(waits.since),
        };
        let handle = match handle_of(fd.as_fd()) {
            Ok(handle) => handle,
            Err(error) => {
                tracing::error!(%error, "an access to a stub cannot be served");
                (self.answer)(id, Answer::Deny(libc::EIO));
                return;
            }
        };
        let place = mark::place(fd.as_fd());
        let mut queue = lock(&self.queue);
        if let Some(State::There { there, waiters, .. }) = queue.states.get_mut(&handle) {
            if !there.sealed && there.disk == OnDisk::Told && self.may_go_on(attempt, &handle) {
                drop(queue);
                drop(fd);
                (self.answer)(id, Answer::Allow);
                return;
            }
            if there.disk == OnDisk::Missing {
                drop(queue);
                drop(fd);
                (self.answer)(id, Answer::Deny(libc::EIO));
                return;
            }
            waiters.push(waiter);
            drop(fd);
            self.finish.notify_one();
            return;
        }
        self.want(queue, handle, uid, place, waiter);
    }

    /// Somebody wants a file back. `tell` hears when it is whole and durable, or why not. Where that is
    /// nobody ([`BACKGROUND`]), everybody else is served first, no room is made, and what may pass fails
    /// at once, with EAGAIN.
    pub fn ask(
        &self,
        handle: &Handle,
        uid: u32,
        place: u64,
        tell: impl FnOnce(Outcome) + Send + 'static,
    ) {
        let waiter = Waiter::Asked {
            tell: Box::new(tell),
            uid,
            since: Instant::now(),
        };
        let mut queue = lock(&self.queue);
        if let Some(State::There { waiters, .. }) = queue.states.get_mut(handle) {
            waiters.push(waiter);
            drop(queue);
            self.finish.notify_one();
            return;
        }
        self.want(queue, handle.clone(), uid, place, waiter);
    }

    /// Goes on with a recall that a dead worker began, or undoes a release that it did not end. Nobody
    /// waits for it: who reads the file meanwhile is not to see its change time change. A release of our own
    /// that was taken for such a one stays: what it leaves is a stub at rest.
    pub fn resume(&self, handle: &Handle) {
        let mut queue = lock(&self.queue);
        if !queue.states.contains_key(handle) {
            let turn = Turn { uid: 0, place: 0 };
            queue.want(handle.clone(), turn, Vec::new());
            drop(queue);
            self.wake.notify_one();
        }
    }

    fn want(
        &self,
        mut queue: std::sync::MutexGuard<'_, Queue>,
        handle: Handle,
        uid: u32,
        place: u64,
        waiter: Waiter,
    ) {
        if let Some(State::Wanted(wanted)) = queue.states.get_mut(&handle) {
            wanted.waiters.push(waiter);
            if uid != BACKGROUND {
                queue.advance(&handle, Turn { uid, place });
                drop(queue);
                self.wake.notify_one();
            }
            return;
        }
        queue.want(handle, Turn { uid, place }, vec![waiter]);
        drop(queue);
        self.wake.notify_one();
    }

    /// Whether an access may go on while the file's mark is still there: reading may. Who opens a file
    /// for writing counts as a writer already while he waits.
    fn may_go_on(&self, attempt: Attempt, handle: &Handle) -> bool {
        // Cutting a file by its path opens nothing, and gives no range.
        let cuts = matches!(attempt, Attempt::Access(None | Some((_, 0))));
        if cuts {
            return false;
        }
        // By a descriptor of our own: a lease on the one that came from the guard would outlive us there.
        let root = self.parts.mount.root();
        match open_by_handle(root, handle.as_ref(), io::READ) {
            Ok(Opened::Fd(fd)) => lease::nobody_writes(fd.as_fd()).unwrap_or(false),
            _ => false,
        }
    }

    // ---- the work -----------------------------------------------------------------------------------

    /// A recall thread's body: until [`Self::close`].
    pub fn work(&self) {
        while let Some((handle, filling)) = self.next() {
            self.serve(&handle, &filling);
        }
    }

    fn next(&self) -> Option<(Handle, Arc<Filling>)> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            if let Some(next) = queue.pop() {
                return Some(next);
            }
            let patience = queue
                .next_later()
                .map_or(REST, |at| at.saturating_duration_since(Instant::now()));
            let rested;
            (queue, rested) = self
                .wake
                .wait_timeout(queue, patience.max(Duration::from_millis(1)))
                .unwrap_or_else(PoisonError::into_inner);
            if rested.timed_out() && patience == REST && queue.filling.is_empty() {
                self.parts.fetcher.forget();
            }
        }
    }

    /// Ends all threads; who waits goes on waiting, for the next worker.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.wake.notify_all();
        self.finish.notify_all();
        self.tend.notify_all();
    }

    fn serve(&self, handle: &Handle, filling: &Filling) {
        let Some(held) = self.parts.busy.try_hold(handle) else {
            // A release has it, with hundreds of others: no thread waits for that.
            return self.leave(handle, filling, Instant::now() + SOON);
        };
        let errors = self.sync_errors.load(Ordering::SeqCst);
        let fill = || {
            let filled = self.fill(handle, filling);
            if filled.is_err() {
                self.seal_after_failure(handle);
            }
            filled
        };
        let result = self.fill_with_room(handle, held, fill, &|| filling.stops());
        match result {
            Ok(Filled::There(there, fd)) => self.is_there(handle, there, fd, errors),
            Ok(Filled::Whole(state)) => {
                self.is_well(handle);
                self.all_go_on(state, 0);
            }
            Ok(Filled::Gone) => {
                self.is_well(handle);
                self.is_gone(handle);
            }
            // Whatever else went wrong: nobody waits for it any more.
            Err(_) if filling.stops() => self.stopped(handle),
            Err(FillError::Full(full)) if self.may_fit_soon(handle, filling) => {
                tracing::debug!(%full, "a recall waits until recalled files can be released");
            }
            Err(error) => {
                self.failed(handle, &error);
                if filling.stops() {
                    self.is_well(handle);
                }
            }
        }
    }

    /// Fills the file, which is held.
    fn fill(&self, handle: &Handle, filling: &Filling) -> Result<Filled, FillError> {
        if filling.stops() {
            return Err(FillError::Cancelled);
        }
        let root = self.parts.mount.root();
        let Opened::Fd(held) = open_by_handle(root, handle.as_ref(), io::READ)? else {
            return Ok(Filled::Gone);
        };
        let (mut mark, original) = match mark::tidy(held.as_fd(), self.parts.log_id)? {
            Marked::Whole => match self.regain(handle, held.as_fd())? {
                Some(mark) => (mark, None),
                // While it is held: who comes later may find it released.
                None => return Ok(Filled::Whole(lock(&self.queue).remove(handle))),
            },
            Marked::Suspect(why) => return Err(FillError::Unknown(why)),
            Marked::Stub(mark) if mark.stage == Stage::Rests && !self.is_wanted(handle) => {
                filling.stop();
                return Err(FillError::Cancelled);
            }
            Marked::Stub(mark) => (mark, None),
            Marked::Snapshot(original) => {
                let handle = handle.to_bytes();
                let own = StubMark {
                    handle,
                    ..original.clone()
                };
                (own, Some(original))
            }
        };
        let filler = Filler {
            fetcher: &self.parts.fetcher,
            catalog: &self.parts.catalog,
            filling,
        };
        let durable = mark.stage == Stage::There;
        let there = There {
            bytes: 0,
            sealed: mark.seals.0 != 0,
            // The log has a snapshot's file only when it was read.
            news: durable || original.is_some(),
            disk: OnDisk::Told,
        };
        // A worker before this one got so far, and programs may use the file: a running one could not be
        // opened for writing.
        if durable || (mark.stage == Stage::Filled && self.is_on_disk(handle, &filler, &mark)?) {
            return Ok(Filled::There(there, held));
        }
        // Who made a stub immutable did not mean that it cannot be read any more.
        mark.seals.0 |= self.unseal(handle, held.as_fd())?;
        if mark.seals.0 != 0
            && let Err(error) = space::set_mark(held.as_fd(), &mark.to_bytes())
        {
            self.seal(handle, held.as_fd(), mark.seals.0)?;
            return Err(error.into());
        }
        let write = libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NOATIME;
        let filled = match open_by_handle(root, handle.as_ref(), write) {
            Ok(Opened::Fd(fd)) => {
                let filled = filler.fill(fd.as_fd(), &mark);
                filled
                    .map(Some)
                    .inspect(|_| self.parts.recalled.note(mark.file))
            }
            Ok(Opened::Stale) => Ok(None),
            Err(error) => Err(error.into()),
        };
        // What another worker wrote of it may have been refused by the disk, and only that worker was told.
        let doubtful = mark.stage != Stage::Rests;
        let disk = if doubtful {
            OnDisk::Doubtful
        } else {
            OnDisk::Told
        };
        let sealed = mark.seals.0 != 0;
        if let (Err(_), Some(original)) = (&filled, &original) {
            self.stays_a_snapshot(held.as_fd(), original)?;
        }
        let Some(bytes) = filled? else {
            return Ok(Filled::Gone);
        };
        let there = There {
            bytes,
            sealed,
            disk,
            ..there
        };
        Ok(Filled::There(there, held))
    }

    /// Gives a stub its mark again that has lost it; see [`regain`]. The inode is held.
    fn regain(&self, handle: &Handle, fd: BorrowedFd<'_>) -> Result<Option<StubMark>, FillError> {
        let Parts {
            log_id, residency, ..
        } = &self.parts;
        let catalog = &self.parts.catalog;
        catalog.with(|reader| regain::regain(fd, handle, *log_id, residency, reader))
    }

    /// Looks at a file whose content is about to be read for the log. False: it is being worked on.
    pub fn regain_mark(&self, handle: &Handle) -> Result<bool, FillError> {
        let root = self.parts.mount.root();
        let Opened::Fd(held) = open_by_handle(root, handle.as_ref(), io::HOLD)? else {
            return Ok(true);
        };
        let stat = stat_of(held.as_fd())?;
        if stat.kind != FileKind::Regular || stat.blocks >= stat.size.div_ceil(512) {
            return Ok(true);
        }
        let Opened::Fd(fd) = open_by_handle(root, handle.as_ref(), io::READ)? else {
            return Ok(true);
        };
        let fd = fd.as_fd();
        let is_whole = || Ok::<_, Error>(mark::look(fd, self.parts.log_id)? == Marked::Whole);
        if !regain::is_hollow(fd)? || !is_whole()? {
            return Ok(true);
        }
        let Some(_held) = self.parts.busy.try_hold(handle) else {
            return Ok(false);
        };
        if is_whole()? {
            self.regain(handle, fd)?;
        }
        Ok(true)
    }

    /// The file of a snapshot has nothing yet: it is that of the original still.
    fn stays_a_snapshot(&self, fd: BorrowedFd<'_>, original: &StubMark) -> Result<(), Error> {
        match mark::look(fd, self.parts.log_id)? {
            Marked::Stub(mark) if mark.stage == Stage::Rests => {
                space::set_mark(fd, &original.to_bytes())
            }
            _ => Ok(()),
        }
    }

    /// `errors`: how many syncs had failed when it began.
    fn is_there(&self, handle: &Handle, mut there: There, fd: OwnedFd, errors: u64) {
        let mut queue = lock(&self.queue);
        if self.sync_errors.load(Ordering::SeqCst) != errors {
            there.disk.doubt();
        }
        let Some(State::Wanted(Wanted { waiters, .. })) = queue.remove(handle) else {
            return;
        };
        let finish_at = queue.finish_at();
        let (mut go_on, mut stay) = (Vec::new(), Vec::new());
        for waiter in waiters {
            match waiter {
                Waiter::Access { id, attempt, .. }
                    if !there.sealed
                        && there.disk == OnDisk::Told
                        && self.may_go_on(attempt, handle) =>
                {
                    go_on.push(id);
                }
                waiter => stay.push(waiter),
            }
        }
        let state = State::There {
            there,
            waiters: stay,
            // More are not synced one by one.
            open: Some(fd).filter(|_| queue.there.len() < finish::ONE_BY_ONE),
        };
        queue.states.insert(handle.clone(), state);
        queue.there.push((handle.clone(), finish_at, true));
        drop(queue);
        self.finish.notify_one();
        for id in go_on {
            (self.answer)(id, Answer::Allow);
        }
    }

    /// Its inode is not to be had any more. Who waits may hold it all the same, and it is as it was.
    fn is_gone(&self, handle: &Handle) {
        let state = lock(&self.queue).remove(handle);
        for waiter in state.map_or(Vec::new(), State::into_waiters) {
            match waiter {
                Waiter::Access { id, .. } => (self.answer)(id, Answer::Deny(libc::EIO)),
                Waiter::Asked { tell, .. } => tell(Outcome::Whole { bytes: 0 }),
            }
        }
    }

    fn is_whole(&self, handle: &Handle, bytes: u64) {
        let state = lock(&self.queue).remove(handle);
        self.all_go_on(state, bytes);
    }

    /// Who waited for a file that is whole.
    fn all_go_on(&self, state: Option<State>, bytes: u64) {
        for waiter in state.map_or(Vec::new(), State::into_waiters) {
            match waiter {
                Waiter::Access { id, .. } => (self.answer)(id, Answer::Allow),
                Waiter::Asked { tell, .. } => tell(Outcome::Whole { bytes }),
            }
        }
    }

    fn failed(&self, handle: &Handle, error: &FillError) {
        let errno = error.errno();
        let away = error.may_pass();
        let full = matches!(error, FillError::Full(_));
        // Whoever asks in the background tells himself why he rests.
        if !(self.is_background(handle) && (away || full)) {
            self.tell_failure(handle, error);
        }
        let mut queue = lock(&self.queue);
        queue.filling.remove(handle);
        let Some(State::Wanted(wanted)) = queue.states.get_mut(handle) else {
            return;
        };
        wanted.full_since = None;
        // No room was made for the background: who came meanwhile has that tried.
        let background = wanted.waiters.iter().any(Waiter::is_background);
        let again = away || (full && background);
        let for_good = |waiter: &mut Waiter| {
            !again || waiter.is_background() || waiter.since().elapsed() >= self.parts.wait
        };
        let over: Vec<Waiter> = wanted.waiters.extract_if(.., for_good).collect();
        if wanted.waiters.is_empty() {
            queue.remove(handle);
        } else {
            queue.put_off(handle, Instant::now() + AGAIN);
        }
        drop(queue);
        self.wake.notify_one();
        let why = error.to_string();
        // Disk and catalog may be well again, too.
        let later = again || matches!(error, FillError::Sys(_) | FillError::Catalog(_));
        for waiter in over {
            let later = later && waiter.is_background();
            self.refuse(waiter, if later { libc::EAGAIN } else { errno }, &why);
        }
    }

    /// Whether anybody waits for a file, or wants it to come back by the way.
    fn is_wanted(&self, handle: &Handle) -> bool {
        let queue = lock(&self.queue);
        let state = queue.states.get(handle);
        state.is_some_and(|state| !state.waiters().is_empty())
    }

    /// Whether nobody waits for a file that is to come back by the way.
    fn is_background(&self, handle: &Handle) -> bool {
        let queue = lock(&self.queue);
        let state = queue.states.get(handle);
        state.is_some_and(State::is_background)
    }

    fn is_well(&self, handle: &Handle) {
        let mut stuck = lock(&self.stuck);
        if stuck.remove(handle) && stuck.is_empty() {
            self.parts.shared.well(STUCK);
        }
        drop(stuck);
        self.fails_no_more(handle);
    }

    fn name_of(&self, handle: &Handle) -> String {
        let path = || {
            let path = self.parts.catalog.with(|reader| {
                let file = reader.queries().file_by_handle(&handle.to_bytes())?;
                file.map_or(Ok(None), |file| reader.queries().path_of(file))
            });
            self.parts.shared.on_mount(&path.ok()??)
        };
        path().unwrap_or_else(|| format!("the file with the handle {handle:?}"))
    }

    fn refuse(&self, waiter: Waiter, errno: i32, why: &str) {
        match waiter {
            Waiter::Access { id, .. } => (self.answer)(id, Answer::Deny(errno)),
            Waiter::Asked { tell, .. } => tell(Outcome::Failed(errno, why.to_owned())),
        }
    }
}

/// When it was so long ago.
fn since(waited: Duration) -> Instant {
    let now = Instant::now();
    now.checked_sub(waited).unwrap_or(now)
}
