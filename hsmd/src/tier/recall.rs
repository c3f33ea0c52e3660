//! Recall: who opens a stub waits until its bytes are back and checked, and no longer.
//!
//! One recall serves all who wait for the same inode. A recalled file goes through three states: *wanted*
//! (queued or being filled), *there* (its bytes are right, but not durable, and its mark still says that
//! it is a stub), and whole. Readers go on as soon as the bytes are there. Who may change the file waits
//! until the mark is gone: else a crash could put the logged bytes over newer ones. Making durable and
//! removing marks is done for many files at once.
//!
//! The queue is fair between users, and in the order of the log within a user's files.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tierfs::record::Bits;
use tierfs::residency::Residency;
use tierfs::stub::StubMark;
use tierfs::{FileId, LogId};

use super::fill::{FillError, Filler};
use super::mark::{self, Marked};
use super::residents::Residents;
use super::{Busy, Gone, Vouched};
use crate::capture::hints::{Beside, Key, Look};
use crate::fetch::Fetcher;
use crate::shared::{Shared, lock};
use crate::sys::handle::{Handle, Opened, handle_of, open_by_handle};
use crate::sys::link::Handed;
use crate::sys::mount::PrivateMount;
use crate::sys::permission::{Answer, Attempt};
use crate::sys::stat::stat_of;
use crate::sys::{Error, flags, io, lease, space};

/// Files whose data is made durable one by one; more are synced with the whole filesystem.
const ONE_BY_ONE: usize = 8;
/// How long recalled files gather before they are made durable, unless somebody waits for it.
const GATHER: Duration = Duration::from_millis(50);
/// The notices about files that cannot be recalled.
const AWAY: &str = "recall-away";
const BROKEN: &str = "recall-broken";
/// How long files that lost their marks stay on the list of stubs at least.
const FORGET: Duration = Duration::from_secs(5);
/// How often it is asked whether a recalled file is still in use.
const IN_USE: Duration = Duration::from_millis(200);
/// How long a recall that could not be served rests.
const AGAIN: Duration = Duration::from_secs(1);
/// Files that finish at once.
const FINISH_MAX: usize = 2000;

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
}

/// Who waits.
enum Waiter {
    /// A program, by the guard's number.
    Access {
        id: u64,
        attempt: Attempt,
        since: Instant,
    },
    /// Somebody who asked for the recall, and is told when the file is durable.
    Asked {
        tell: Box<dyn FnOnce(Outcome) + Send>,
        since: Instant,
    },
}

enum State {
    /// Its bytes are to come.
    Wanted(Vec<Waiter>),
    /// Its bytes are there; these wait for the mark to go.
    There { bytes: u64, waiters: Vec<Waiter> },
}

#[derive(Default)]
struct Queue {
    states: HashMap<Handle, State>,
    /// By user, then by the version's transaction, which is the order of the log, then by arrival.
    todo: BTreeMap<u32, BTreeMap<(u64, u64), Handle>>,
    /// Whose turn was last, and how far it was.
    last: (u32, (u64, u64)),
    /// What could not be served, and when it is tried again.
    later: Vec<(Instant, u32, u64, Handle)>,
    /// Each with when it is to be finished, and whether that can be sooner where somebody waits.
    there: Vec<(Handle, Instant, bool)>,
    arrivals: u64,
    closed: bool,
}

impl Queue {
    fn push(&mut self, uid: u32, place: u64, handle: Handle) {
        self.arrivals += 1;
        let key = (place, self.arrivals);
        self.todo.entry(uid).or_default().insert(key, handle);
    }

    /// The next user's next file on the way through the log.
    fn pop(&mut self) -> Option<Handle> {
        let now = Instant::now();
        let due: Vec<_> = self.later.extract_if(.., |(at, ..)| *at <= now).collect();
        for (_, uid, place, handle) in due {
            self.push(uid, place, handle);
        }
        let (user, at) = self.last;
        let after = self.todo.range(user.saturating_add(1)..).next();
        let uid = *after.or_else(|| self.todo.iter().next())?.0;
        let files = self.todo.get_mut(&uid)?;
        let next = files.range(at..).next().or_else(|| files.iter().next());
        let key = *next?.0;
        let handle = files.remove(&key);
        if files.is_empty() {
            self.todo.remove(&uid);
        }
        self.last = (uid, key);
        handle
    }

    fn next_later(&self) -> Option<Instant> {
        self.later.iter().map(|(at, ..)| *at).min()
    }
}

/// What recall works with.
pub struct Parts {
    /// Hints, notices.
    pub shared: Arc<Shared>,
    /// The filesystem, without events.
    pub mount: Arc<PrivateMount>,
    /// The kernel's marks.
    pub residents: Arc<Residents>,
    /// The catalog's file.
    pub catalog: PathBuf,
    /// The log.
    pub log_id: LogId,
    /// Content.
    pub fetcher: Fetcher,
    /// The list of stubs.
    pub residency: Arc<Mutex<Residency>>,
    /// Inodes that are worked on.
    pub busy: Arc<Busy>,
    /// Files that were found to be as logged.
    pub vouched: Arc<Vouched>,
    /// What goes off the list.
    pub gone: Arc<Gone>,
    /// How long a program waits for a copy that is away.
    pub wait: Duration,
}

/// Where answers go.
pub type AnswerTo = Box<dyn Fn(u64, Answer) + Send + Sync>;

/// See the module.
pub struct Recall {
    parts: Parts,
    queue: Mutex<Queue>,
    wake: Condvar,
    finish: Condvar,
    answer: AnswerTo,
    /// What could not be recalled when it was tried last: whether trying again can help, and why.
    failing: Mutex<HashMap<Handle, (bool, String)>>,
}

impl Recall {
    /// Nothing waits yet; [`Self::work`] and [`Self::finish`] are for threads of the caller.
    pub fn new(parts: Parts, answer: AnswerTo) -> Self {
        Self {
            parts,
            queue: Mutex::default(),
            wake: Condvar::new(),
            finish: Condvar::new(),
            answer,
            failing: Mutex::default(),
        }
    }

    /// How many files are wanted, and how many programs wait.
    pub fn depth(&self) -> (usize, usize) {
        let queue = lock(&self.queue);
        let (mut files, mut programs) = (0, 0);
        for state in queue.states.values() {
            let (State::Wanted(waiters) | State::There { waiters, .. }) = state;
            let waits = |waiter: &&Waiter| matches!(waiter, Waiter::Access { .. });
            files += usize::from(matches!(state, State::Wanted(_)));
            programs += waiters.iter().filter(waits).count();
        }
        (files, programs)
    }

    // ---- who comes --------------------------------------------------------------------------------

    /// A program waits for a file that had a mark when the guard looked.
    pub fn access(&self, handed: Handed) {
        let Handed {
            id,
            attempt,
            uid,
            fd,
            ..
        } = handed;
        let handle = match handle_of(fd.as_fd()) {
            Ok(handle) => handle,
            Err(error) => {
                tracing::error!(%error, "an access to a stub cannot be served");
                (self.answer)(id, Answer::Deny(libc::EIO));
                return;
            }
        };
        let mut queue = lock(&self.queue);
        if let Some(State::There { waiters, .. }) = queue.states.get_mut(&handle) {
            if self.may_go_on(attempt, &handle) {
                drop(queue);
                drop(fd);
                (self.answer)(id, Answer::Allow);
                return;
            }
            waiters.push(Waiter::Access {
                id,
                attempt,
                since: Instant::now(),
            });
            drop(fd);
            self.finish.notify_one();
            return;
        }
        // The version's transaction tells where in the log its bytes are, near enough.
        let place = match mark::look(fd.as_fd(), self.parts.log_id) {
            Ok(Marked::Stub(mark)) => mark.version.get(),
            _ => 0,
        };
        let waiter = Waiter::Access {
            id,
            attempt,
            since: Instant::now(),
        };
        self.want(queue, handle, uid, place, waiter);
    }

    /// Somebody wants a file back. `tell` hears when it is whole and durable, or why not.
    pub fn ask(
        &self,
        handle: &Handle,
        uid: u32,
        place: u64,
        tell: impl FnOnce(Outcome) + Send + 'static,
    ) {
        let waiter = Waiter::Asked {
            tell: Box::new(tell),
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
    /// waits for it: who reads the file meanwhile is not to see its change time change.
    pub fn resume(&self, handle: &Handle) {
        let mut queue = lock(&self.queue);
        if !queue.states.contains_key(handle) {
            queue
                .states
                .insert(handle.clone(), State::Wanted(Vec::new()));
            queue.push(0, 0, handle.clone());
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
        if let Some(State::Wanted(waiters)) = queue.states.get_mut(&handle) {
            waiters.push(waiter);
            return;
        }
        queue
            .states
            .insert(handle.clone(), State::Wanted(vec![waiter]));
        queue.push(uid, place, handle);
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
        while let Some(handle) = self.next() {
            self.serve(&handle);
        }
    }

    fn next(&self) -> Option<Handle> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.closed {
                return None;
            }
            if let Some(handle) = queue.pop() {
                return Some(handle);
            }
            let patience = queue.next_later().map_or(Duration::from_mins(1), |at| {
                at.saturating_duration_since(Instant::now())
            });
            queue = self
                .wake
                .wait_timeout(queue, patience.max(Duration::from_millis(1)))
                .map_or_else(|poisoned| poisoned.into_inner().0, |(queue, _)| queue);
        }
    }

    /// Ends all threads; who waits goes on waiting, for the next worker.
    pub fn close(&self) {
        lock(&self.queue).closed = true;
        self.wake.notify_all();
        self.finish.notify_all();
    }

    fn serve(&self, handle: &Handle) {
        let held = self.parts.busy.hold(handle);
        let result = self.fill(handle);
        drop(held);
        match result {
            Ok(Some((bytes, sealed))) => self.is_there(handle, bytes, sealed),
            Ok(None) => {
                self.is_well(handle);
                self.is_whole(handle, 0);
            }
            Err(error) => self.failed(handle, &error),
        }
    }

    /// Fills the file; `None`: it is whole, or gone. Second, whether flags of it are off until it is
    /// finished.
    fn fill(&self, handle: &Handle) -> Result<Option<(u64, bool)>, FillError> {
        let root = self.parts.mount.root();
        let Opened::Fd(held) = open_by_handle(root, handle.as_ref(), io::READ)? else {
            return Ok(None);
        };
        let mut mark = match mark::look(held.as_fd(), self.parts.log_id)? {
            Marked::Whole => return Ok(None),
            Marked::Suspect(why) => return Err(FillError::Suspect(why)),
            Marked::Stub(mark) => mark,
        };
        // Who made a stub immutable did not mean that it cannot be read any more. Its flags are in the
        // mark as long as they are off.
        let seals = flags::unseal(held.as_fd())?;
        if seals != 0 {
            mark.seals.0 |= seals;
            if let Err(error) = space::set_mark(held.as_fd(), &mark.to_bytes()) {
                flags::seal(held.as_fd(), seals)?;
                return Err(error.into());
            }
        }
        let filled = self.fill_marked(handle, &mark);
        if filled.is_err() && mark.seals.0 != 0 {
            self.seal_again(held.as_fd())?;
        }
        Ok(filled?.map(|bytes| (bytes, mark.seals.0 != 0)))
    }

    fn fill_marked(&self, handle: &Handle, mark: &StubMark) -> Result<Option<u64>, FillError> {
        let write = libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NOATIME;
        let Opened::Fd(fd) = open_by_handle(self.parts.mount.root(), handle.as_ref(), write)?
        else {
            return Ok(None);
        };
        let filler = Filler {
            fetcher: &self.parts.fetcher,
            catalog: &self.parts.catalog,
        };
        filler.fill(fd.as_fd(), mark).map(Some)
    }

    /// The file stays a stub.
    fn seal_again(&self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        if let Marked::Stub(mut mark) = mark::look(fd, self.parts.log_id)? {
            let seals = std::mem::replace(&mut mark.seals, Bits(0));
            space::set_mark(fd, &mark.to_bytes())?;
            flags::seal(fd, seals.0)?;
        }
        Ok(())
    }

    fn is_there(&self, handle: &Handle, bytes: u64, sealed: bool) {
        let mut queue = lock(&self.queue);
        let Some(State::Wanted(waiters)) = queue.states.remove(handle) else {
            return;
        };
        let (mut go_on, mut stay) = (Vec::new(), Vec::new());
        for waiter in waiters {
            match waiter {
                Waiter::Access { id, attempt, .. }
                    if !sealed && self.may_go_on(attempt, handle) =>
                {
                    go_on.push(id);
                }
                waiter => stay.push(waiter),
            }
        }
        let state = State::There {
            bytes,
            waiters: stay,
        };
        queue.states.insert(handle.clone(), state);
        queue
            .there
            .push((handle.clone(), Instant::now() + GATHER, true));
        drop(queue);
        self.finish.notify_one();
        for id in go_on {
            (self.answer)(id, Answer::Allow);
        }
    }

    fn is_whole(&self, handle: &Handle, bytes: u64) {
        let state = lock(&self.queue).states.remove(handle);
        let waiters = match state {
            Some(State::Wanted(waiters) | State::There { waiters, .. }) => waiters,
            None => Vec::new(),
        };
        for waiter in waiters {
            match waiter {
                Waiter::Access { id, .. } => (self.answer)(id, Answer::Allow),
                Waiter::Asked { tell, .. } => tell(Outcome::Whole { bytes }),
            }
        }
    }

    fn failed(&self, handle: &Handle, error: &FillError) {
        let errno = error.errno();
        let again = error.may_pass();
        self.tell_failure(handle, error);
        let mut queue = lock(&self.queue);
        let Some(State::Wanted(waiters)) = queue.states.remove(handle) else {
            return;
        };
        let (mut over, mut stay) = (Vec::new(), Vec::new());
        for waiter in waiters {
            let since = match &waiter {
                Waiter::Access { since, .. } | Waiter::Asked { since, .. } => *since,
            };
            if again && since.elapsed() < self.parts.wait {
                stay.push(waiter);
            } else {
                over.push(waiter);
            }
        }
        if !stay.is_empty() {
            queue.states.insert(handle.clone(), State::Wanted(stay));
            let at = Instant::now() + AGAIN;
            queue.later.push((at, 0, 0, handle.clone()));
        }
        drop(queue);
        self.wake.notify_one();
        for waiter in over {
            match waiter {
                Waiter::Access { id, .. } => (self.answer)(id, Answer::Deny(errno)),
                Waiter::Asked { tell, .. } => tell(Outcome::Failed(errno, error.to_string())),
            }
        }
    }

    /// Says what cannot be recalled: that no copy is within reach, apart from what is worse.
    fn tell_failure(&self, handle: &Handle, error: &FillError) {
        let away = error.may_pass();
        let why = format!("{}: {error}", self.name_of(handle));
        let mut failing = lock(&self.failing);
        failing.insert(handle.clone(), (away, why.clone()));
        let count = failing.values().filter(|(other, _)| *other == away).count();
        drop(failing);
        if away {
            self.parts.shared.trouble(
                AWAY,
                false,
                format!("{count} released files are wanted, and no copy of them is within reach"),
                why,
                "bring the volume that it names; who opens such a file waits as long as `recall_wait` says, and gets an error then",
            );
        } else {
            self.parts.shared.trouble(
                BROKEN,
                true,
                format!("{count} released files cannot be recalled"),
                why,
                "the file stays a stub, nothing is lost that the log has; see hsm(7), \"a file cannot be recalled\"",
            );
        }
    }

    fn is_well(&self, handle: &Handle) {
        let mut failing = lock(&self.failing);
        let Some((away, _)) = failing.remove(handle) else {
            return;
        };
        if failing.values().all(|(other, _)| *other != away) {
            drop(failing);
            self.parts.shared.well(if away { AWAY } else { BROKEN });
        }
    }

    fn name_of(&self, handle: &Handle) -> String {
        let path = || {
            let reader = tierfs::catalog::Reader::open(&self.parts.catalog).ok()?;
            let file = reader.queries().file_by_handle(&handle.to_bytes()).ok()??;
            let path = reader.queries().path_of(file).ok()??;
            self.parts.shared.on_mount(&path)
        };
        path().unwrap_or_else(|| format!("the file with the handle {handle:?}"))
    }

    // ---- making it last -------------------------------------------------------------------------------

    /// The finishing thread's body: makes recalled files durable and takes their marks away.
    pub fn finish(&self) {
        let mut forgot = Instant::now();
        while let Some(batch) = self.next_batch() {
            let closed = lock(&self.queue).closed;
            if !batch.is_empty() {
                self.finish_batch(batch);
            }
            if closed || forgot.elapsed() >= FORGET {
                forgot = Instant::now();
                self.forget();
            }
            if closed {
                return;
            }
        }
        self.forget();
    }

    /// Takes files off the list whose marks are gone for good.
    fn forget(&self) {
        let gone = self.parts.gone.take();
        if gone.is_empty() {
            return;
        }
        let forgotten = io::syncfs(self.parts.mount.root()).is_ok()
            && lock(&self.parts.residency).remove(&gone).is_ok();
        if !forgotten {
            tracing::warn!("the list of stubs keeps files that are none");
        }
    }

    /// Files to finish, each with whether somebody waits for it.
    fn next_batch(&self) -> Option<Vec<(Handle, bool)>> {
        let mut queue = lock(&self.queue);
        let begun = Instant::now();
        loop {
            let now = Instant::now();
            let waited = begun.elapsed() >= FORGET;
            let closed = queue.closed;
            let Queue { there, states, .. } = &mut *queue;
            let awaited = |handle: &Handle| matches!(states.get(handle), Some(State::There { waiters, .. }) if !waiters.is_empty());
            let mut batch = Vec::new();
            let due = |(handle, due, sooner): &mut (Handle, Instant, bool)| {
                closed || *due <= now || (*sooner && awaited(handle))
            };
            for (handle, ..) in there.extract_if(.., due).take(FINISH_MAX) {
                let waits = awaited(&handle);
                batch.push((handle, waits));
            }
            if closed || !batch.is_empty() {
                // Once more after the end: the next worker is to find whole files where nobody uses them.
                return Some(batch).filter(|batch| !batch.is_empty());
            }
            let next = queue.there.iter().map(|(_, due, _)| *due).min();
            let mut patience = next.map_or(Duration::from_mins(1), |due| due - now);
            if !self.parts.gone.is_empty() {
                patience = patience.min(FORGET);
                if waited {
                    return Some(Vec::new());
                }
            }
            queue = self
                .finish
                .wait_timeout(queue, patience)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(queue, _)| queue);
        }
    }

    fn finish_batch(&self, batch: Vec<(Handle, bool)>) {
        let root = self.parts.mount.root();
        let mut open = Vec::new();
        for (handle, awaited) in batch {
            match open_by_handle(root, handle.as_ref(), io::READ) {
                // Taking the mark away changes the file's change time, and programs that read it (tar)
                // take that for a change of the file: not before they are done.
                Ok(Opened::Fd(fd)) if !awaited && is_used(&fd) => {
                    let at = Instant::now() + IN_USE;
                    lock(&self.queue).there.push((handle, at, true));
                }
                Ok(Opened::Fd(fd)) => open.push((handle, fd)),
                // Deleted meanwhile.
                Ok(Opened::Stale) => self.is_whole(&handle, 0),
                Err(error) => self.put_off(handle, &error),
            }
        }
        if open.len() > ONE_BY_ONE
            && let Err(error) = io::syncfs(root)
        {
            for (handle, _) in open {
                self.put_off(handle, &error);
            }
            return;
        }
        let one_by_one = open.len() <= ONE_BY_ONE;
        let mut gone: Vec<FileId> = Vec::new();
        for (handle, fd) in open {
            match self.finish_one(&handle, &fd, one_by_one) {
                Ok(mark) => {
                    gone.extend(mark.map(|mark| mark.file));
                    drop(fd);
                    self.finished(&handle);
                }
                Err(error) => self.put_off(handle, &error),
            }
        }
        self.parts.gone.note(gone);
    }

    fn finish_one(
        &self,
        handle: &Handle,
        fd: &OwnedFd,
        sync: bool,
    ) -> Result<Option<StubMark>, Error> {
        let _held = self.parts.busy.hold(handle);
        if sync {
            space::sync_data(fd.as_fd())?;
        }
        let marked = mark::look(fd.as_fd(), self.parts.log_id)?;
        // While it has its mark nobody writes; with the lease nobody does before the look at its time.
        let alone = lease::ReadLease::take(fd.as_fd())?;
        let late = flags::unseal(fd.as_fd())?;
        let removed = space::remove_mark(fd.as_fd());
        let seals = match &marked {
            Marked::Stub(mark) => mark.seals.0 | late,
            _ => late,
        };
        flags::seal(fd.as_fd(), seals)?;
        removed?;
        if alone.is_some() {
            self.parts.vouched.note(handle, stat_of(fd.as_fd())?.ctime);
        }
        drop(alone);
        self.parts.residents.unprotect(fd.as_fd())?;
        Ok(match marked {
            Marked::Stub(mark) => Some(mark),
            _ => None,
        })
    }

    fn finished(&self, handle: &Handle) {
        let bytes = match lock(&self.queue).states.get(handle) {
            Some(State::There { bytes, .. }) => *bytes,
            _ => 0,
        };
        self.is_well(handle);
        // Its change time is a new one, by our own doing: what else it says is found by looking.
        let note = (
            Key::Inode(handle.clone()),
            Look::Attributes,
            Beside::Nothing,
        );
        self.parts.shared.note([note]);
        self.is_whole(handle, bytes);
    }

    /// The file is right but cannot be made durable: tried again, its mark stays.
    fn put_off(&self, handle: Handle, error: &Error) {
        tracing::warn!(%error, "a recalled file cannot be made durable yet, it keeps its mark");
        let at = Instant::now() + AGAIN;
        lock(&self.queue).there.push((handle, at, false));
    }
}

/// Whether anybody but us has the file open.
fn is_used(fd: &OwnedFd) -> bool {
    !matches!(lease::WriteLease::take(fd.as_fd()), Ok(Some(_)))
}
