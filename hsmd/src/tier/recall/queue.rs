//! The queue of recalls: in which order files are served, who waits for them, and how that is called off.
//!
//! Who cancels is answered at once: whoever waits gets his error, whatever a recall thread is at. A fill
//! that is under way hears of it between two chunks ([`Filling`]), and leaves a file that was empty empty.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{GATHER, GATHER_AGAIN, Outcome, Recall};
use crate::shared::lock;
use crate::sys::handle::Handle;
use crate::sys::permission::{Answer, Attempt};

/// What a program hears whose recall is cancelled. Not EAGAIN: programs and NFS servers that try again at
/// that would put the file into the queue again.
pub const CANCELLED: i32 = libc::EIO;
/// For whom a file comes back that nobody waits for: no user's number. His turn is when nobody else has one.
pub const BACKGROUND: u32 = u32::MAX;
/// Files that are filled for nobody at once. The other threads are there for whoever comes: he does not wait
/// until a large file is through.
const BACKGROUND_FILLS: usize = 2;

/// A fill without a step for so long gets another thread beside it.
pub(super) const STALLED: Duration = Duration::from_secs(5);

/// Who waits.
pub(super) enum Waiter {
    /// A program, by the guard's number.
    Access {
        id: u64,
        attempt: Attempt,
        /// Its process, 0 where it is of another namespace, and its user.
        who: (i32, u32),
        since: Instant,
    },
    /// Somebody who asked for the recall, and is told when the file is durable.
    Asked {
        tell: Box<dyn FnOnce(Outcome) + Send>,
        uid: u32,
        since: Instant,
    },
}

impl Waiter {
    pub(super) fn since(&self) -> Instant {
        match self {
            Self::Access { since, .. } | Self::Asked { since, .. } => *since,
        }
    }

    fn uid(&self) -> u32 {
        match self {
            Self::Access { who: (_, uid), .. } | Self::Asked { uid, .. } => *uid,
        }
    }

    /// Nobody waits: the file comes back by the way.
    pub(super) fn is_background(&self) -> bool {
        self.uid() == BACKGROUND
    }

    fn seen(&self) -> Waits {
        match self {
            Self::Access { who, since, .. } => Waits {
                uid: who.1,
                program: true,
                pid: Some(who.0).filter(|pid| *pid > 0),
                since: since.elapsed(),
            },
            Self::Asked { uid, since, .. } => Waits {
                uid: *uid,
                program: false,
                pid: None,
                since: since.elapsed(),
            },
        }
    }
}

pub(super) enum State {
    /// Its bytes are to come.
    Wanted(Wanted),
    /// Its bytes are there; these wait for the mark to go.
    There {
        there: There,
        waiters: Vec<Waiter>,
        /// Open since before the first byte was written, until it is finished or found in use: a sync of it hears of
        /// every error, whoever was told before.
        open: Option<OwnedFd>,
    },
}

impl State {
    pub(super) fn waiters(&self) -> &[Waiter] {
        match self {
            Self::Wanted(Wanted { waiters, .. }) | Self::There { waiters, .. } => waiters,
        }
    }

    pub(super) fn waiters_mut(&mut self) -> &mut Vec<Waiter> {
        match self {
            Self::Wanted(Wanted { waiters, .. }) | Self::There { waiters, .. } => waiters,
        }
    }

    /// Whether somebody waits for it, and it does not only come back by the way.
    pub(super) fn is_awaited(&self) -> bool {
        !self.waiters().iter().all(Waiter::is_background)
    }

    /// Whether it only comes back by the way.
    pub(super) fn is_background(&self) -> bool {
        !self.waiters().is_empty() && !self.is_awaited()
    }

    pub(super) fn into_waiters(self) -> Vec<Waiter> {
        match self {
            Self::Wanted(Wanted { waiters, .. }) | Self::There { waiters, .. } => waiters,
        }
    }
}

/// A file whose bytes are to come.
pub(super) struct Wanted {
    /// Whose turn it takes, however often it is tried.
    turn: Turn,
    pub(super) waiters: Vec<Waiter>,
    /// Since when there is no room for it.
    pub(super) full_since: Option<Instant>,
}

/// The place of a file in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    /// Who wanted it first.
    pub(super) uid: u32,
    /// The version's transaction, which is the order of the log.
    pub(super) place: u64,
}

/// Whether the disk has what was written of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum OnDisk {
    /// A sync tells.
    Told,
    /// It may be nowhere but in memory, which nobody will be told again: it is written once more before the file is
    /// finished.
    Doubtful,
    /// It is not, and can be written only while nobody has the file open: who comes to open it is refused.
    Missing,
}

impl OnDisk {
    /// Believes nothing any more that was written before.
    pub(super) fn doubt(&mut self) {
        if *self == Self::Told {
            *self = Self::Doubtful;
        }
    }
}

/// A file whose bytes are there.
#[derive(Clone, Copy)]
pub(super) struct There {
    /// Bytes that came from the log.
    pub(super) bytes: u64,
    /// Flags of it are off until it is finished.
    pub(super) sealed: bool,
    /// It was found durable: it may have been changed since, after a mark that a loss of power brought back.
    pub(super) news: bool,
    /// Whether the disk has what was written of it.
    pub(super) disk: OnDisk,
}

/// A fill that is under way, for those who look at it, and to stop it.
#[derive(Debug)]
pub struct Filling {
    stop: AtomicBool,
    written: AtomicU64,
    /// When it came a step further.
    moved: Mutex<Instant>,
    uid: u32,
}

impl Filling {
    pub(super) fn new(uid: u32) -> Self {
        Self {
            stop: AtomicBool::new(false),
            written: AtomicU64::new(0),
            moved: Mutex::new(Instant::now()),
            uid,
        }
    }

    /// Asks it to stop.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether it is to stop.
    pub fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// So many bytes are written.
    pub fn note(&self, written: u64) {
        self.written.store(written, Ordering::Relaxed);
        self.moves();
    }

    /// It is a step further.
    pub fn moves(&self) {
        *lock(&self.moved) = Instant::now();
    }

    /// For how long it has not come further.
    pub fn stands_for(&self) -> Duration {
        lock(&self.moved).elapsed()
    }
}

#[derive(Default)]
pub(super) struct Queue {
    pub(super) states: HashMap<Handle, State>,
    /// By user, then by the version's transaction, which is the order of the log, then by arrival.
    todo: BTreeMap<u32, BTreeMap<(u64, u64), Handle>>,
    /// Whose turn was last, and how far it was.
    last: (u32, (u64, u64)),
    /// What could not be served, by when it is tried again and by arrival.
    later: BTreeMap<(Instant, u64), Handle>,
    /// What threads work on. A wanted file is in exactly one of `todo`, `later` and this.
    pub(super) filling: HashMap<Handle, Arc<Filling>>,
    /// Each with when it is to be finished, and whether that can be sooner where somebody waits.
    pub(super) there: Vec<(Handle, Instant, bool)>,
    /// When some were finished last.
    pub(super) finished: Option<Instant>,
    arrivals: u64,
    /// As many work on it, if no others were added.
    pub(super) threads: usize,
    pub(super) closed: bool,
}

impl Queue {
    /// For so many threads.
    pub(super) fn new(threads: usize) -> Self {
        Self {
            threads,
            ..Self::default()
        }
    }

    /// A file that nobody wanted before.
    pub(super) fn want(&mut self, handle: Handle, turn: Turn, waiters: Vec<Waiter>) {
        let wanted = Wanted {
            turn,
            waiters,
            full_since: None,
        };
        self.states.insert(handle.clone(), State::Wanted(wanted));
        self.push(turn, handle);
    }

    fn push(&mut self, Turn { uid, place }: Turn, handle: Handle) {
        self.arrivals += 1;
        let key = (place, self.arrivals);
        self.todo.entry(uid).or_default().insert(key, handle);
    }

    /// Somebody wants a file that was to come back by the way: it takes his turn.
    pub(super) fn advance(&mut self, handle: &Handle, turn: Turn) {
        match self.states.get_mut(handle) {
            Some(State::Wanted(wanted)) if wanted.turn.uid == BACKGROUND => wanted.turn = turn,
            _ => return,
        }
        let Some(files) = self.todo.get_mut(&BACKGROUND) else {
            return;
        };
        let key = files.iter().find(|(_, other)| *other == handle);
        if let Some(key) = key.map(|(key, _)| *key) {
            files.remove(&key);
            if files.is_empty() {
                self.todo.remove(&BACKGROUND);
            }
            self.push(turn, handle.clone());
        }
    }

    /// No thread works on a wanted file any more, and it is tried again then.
    pub(super) fn put_off(&mut self, handle: &Handle, until: Instant) {
        self.filling.remove(handle);
        self.arrivals += 1;
        self.later.insert((until, self.arrivals), handle.clone());
    }

    /// When a file is to be finished whose bytes are there now.
    pub(super) fn finish_at(&self) -> Instant {
        let soon = Instant::now() + GATHER;
        let again = self.finished.map(|last| last + GATHER_AGAIN);
        again.map_or(soon, |again| again.max(soon))
    }

    /// The next user's next file on the way through the log; it is being filled from here on.
    pub(super) fn pop(&mut self) -> Option<(Handle, Arc<Filling>)> {
        let now = Instant::now();
        while let Some(first) = self
            .later
            .first_entry()
            .filter(|first| first.key().0 <= now)
        {
            let handle = first.remove();
            if let Some(State::Wanted(Wanted { turn, .. })) = self.states.get(&handle) {
                self.push(*turn, handle);
            }
        }
        let (user, at) = self.last;
        let mut busy = HashMap::<u32, usize>::new();
        let moving = |filling: &&Arc<Filling>| filling.stands_for() < STALLED;
        for filling in self.filling.values().filter(moving) {
            *busy.entry(filling.uid).or_default() += 1;
        }
        // One thread is always left to the others: large files may take hours. What comes back by the way takes
        // nobody's place.
        let most = self.threads.saturating_sub(1).max(1);
        let by_the_way = busy.get(&BACKGROUND).copied().unwrap_or(0);
        let all: usize = busy.values().sum();
        let may = |(uid, _): &(&u32, _)| match busy.get(uid) {
            _ if **uid == BACKGROUND => by_the_way < BACKGROUND_FILLS && all < most,
            None => true,
            Some(count) => count + by_the_way < most,
        };
        let mut after = self.todo.range(user.saturating_add(1)..BACKGROUND);
        let uid = *after.find(may).or_else(|| self.todo.iter().find(may))?.0;
        let files = self.todo.get_mut(&uid)?;
        let next = files.range(at..).next().or_else(|| files.iter().next());
        let key = *next?.0;
        let handle = files.remove(&key)?;
        if files.is_empty() {
            self.todo.remove(&uid);
        }
        self.last = (uid, key);
        let filling = Arc::new(Filling::new(uid));
        self.filling.insert(handle.clone(), filling.clone());
        Some((handle, filling))
    }

    /// Nobody waits for a thread.
    pub(super) fn is_idle(&self) -> bool {
        self.todo.is_empty()
    }

    /// How many files have been filled for so long without coming a step further.
    pub(super) fn stalled(&self, time: Duration) -> usize {
        let stalled = |filling: &&Arc<Filling>| filling.stands_for() >= time;
        self.filling.values().filter(stalled).count()
    }

    pub(super) fn next_later(&self) -> Option<Instant> {
        self.later.keys().next().map(|(at, _)| *at)
    }

    /// The file is out of the queue; what was known of it.
    pub(super) fn remove(&mut self, handle: &Handle) -> Option<State> {
        self.filling.remove(handle);
        self.states.remove(handle)
    }

    /// Nobody wants these any more, and no thread works on them.
    fn forget(&mut self, handles: &HashSet<Handle>) {
        if handles.is_empty() {
            return;
        }
        self.later.retain(|_, handle| !handles.contains(handle));
        for files in self.todo.values_mut() {
            files.retain(|_, handle| !handles.contains(handle));
        }
        self.todo.retain(|_, files| !files.is_empty());
    }
}

/// How far a file in the queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// It waits for its turn, or for a copy of it.
    Wanted,
    /// Its bytes are coming; so many are there.
    Filling(u64),
    /// Its bytes are there, and not yet durable.
    There,
}

/// Somebody who waits, as others see him.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waits {
    /// The user.
    pub uid: u32,
    /// A program that opens or reads the file; else somebody asked for the recall.
    pub program: bool,
    /// The program's process, where it is known.
    pub pid: Option<i32>,
    /// For so long.
    pub since: Duration,
}

/// A file in the queue, as others see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queued {
    /// Which file.
    pub handle: Handle,
    /// How far it is.
    pub reached: Reached,
    /// Who waits; nobody where the daemon itself goes on with what was interrupted.
    pub waiters: Vec<Waits>,
    /// Why it could not be served when that was tried last.
    pub error: Option<String>,
}

/// What was cancelled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cancelled {
    /// Files for which nobody (of those meant) waits any more.
    pub files: u64,
    /// Programs that got an error.
    pub programs: u64,
    /// Requests for a recall that were called off.
    pub requests: u64,
}

impl Recall {
    /// The queue, who waits longest first; of one user only what he waits for, and nobody beside him.
    pub fn list(&self, uid: Option<u32>) -> Vec<Queued> {
        let queue = lock(&self.queue);
        let mut list = Vec::new();
        for (handle, state) in &queue.states {
            let theirs = |waiter: &&Waiter| match uid {
                Some(uid) => waiter.uid() == uid,
                None => !waiter.is_background(),
            };
            let waiters = state.waiters().iter().filter(theirs);
            let waiters: Vec<Waits> = waiters.map(Waiter::seen).collect();
            if uid.is_some() && waiters.is_empty() {
                continue;
            }
            let reached = match (state, queue.filling.get(handle)) {
                (State::There { .. }, _) => Reached::There,
                (State::Wanted(_), Some(filling)) => {
                    Reached::Filling(filling.written.load(Ordering::Relaxed))
                }
                (State::Wanted(_), None) => Reached::Wanted,
            };
            // There may be very many, and status counts them.
            if state.is_background() && !matches!(reached, Reached::Filling(_)) {
                continue;
            }
            list.push(Queued {
                handle: handle.clone(),
                reached,
                waiters,
                error: None,
            });
        }
        drop(queue);
        let failing = lock(&self.failing);
        for queued in &mut list {
            queued.error = failing.why(&queued.handle);
        }
        drop(failing);
        let longest = |file: &Queued| file.waiters.iter().map(|waits| waits.since).max();
        list.sort_by_key(|file| std::cmp::Reverse(longest(file)));
        list
    }

    /// Bytes that are there of those of these files that are being filled now.
    pub fn filled(&self, files: &HashSet<Handle>) -> u64 {
        let queue = lock(&self.queue);
        let theirs = queue
            .filling
            .iter()
            .filter(|(file, _)| files.contains(*file));
        theirs
            .map(|(_, filling)| filling.written.load(Ordering::Relaxed))
            .sum()
    }

    /// Whoever waits for these files (`None`: for any) gets an error at once: only who is of `uid`, where
    /// that is given. What nobody waits for then is not fetched any more. What comes back by the way is
    /// meant only where it is named.
    pub fn cancel(&self, files: Option<&HashSet<Handle>>, uid: Option<u32>, by: u32) -> Cancelled {
        let (mut done, mut over, mut dropped) =
            (Cancelled::default(), Vec::new(), HashSet::<Handle>::new());
        let mut queue = lock(&self.queue);
        let Queue {
            states, filling, ..
        } = &mut *queue;
        let meant = |handle: &Handle| files.is_none_or(|files| files.contains(handle));
        for (handle, state) in states.iter_mut().filter(|(handle, _)| meant(handle)) {
            let wanted = matches!(state, State::Wanted(_));
            let waiters = state.waiters_mut();
            let unattended = wanted && waiters.is_empty();
            let before = over.len();
            over.extend(waiters.extract_if(.., |waiter| match uid {
                Some(uid) => waiter.uid() == uid,
                None => files.is_some() || !waiter.is_background(),
            }));
            if over.len() == before && !(unattended && uid.is_none()) {
                continue;
            }
            done.files += 1;
            if waiters.is_empty() && wanted {
                match filling.get(handle) {
                    Some(filling) => filling.stop(),
                    None => {
                        dropped.insert(handle.clone());
                    }
                }
            }
        }
        for handle in &dropped {
            queue.states.remove(handle);
        }
        queue.forget(&dropped);
        drop(queue);
        for handle in &dropped {
            self.is_well(handle);
        }
        for waiter in over {
            match waiter {
                Waiter::Access { id, .. } => {
                    done.programs += 1;
                    (self.answer)(id, Answer::Deny(CANCELLED));
                }
                Waiter::Asked { tell, .. } => {
                    done.requests += 1;
                    tell(Outcome::Cancelled(by));
                }
            }
        }
        done
    }

    /// Something else works on the file: it is left to that until then, where anybody wants it still.
    pub(super) fn leave(&self, handle: &Handle, filling: &Filling, until: Instant) {
        let mut queue = lock(&self.queue);
        if filling.stops() {
            drop(queue);
            return self.stopped(handle);
        }
        queue.put_off(handle, until);
    }

    /// A fill ended early because it was cancelled. Who came since then is served anew.
    pub(super) fn stopped(&self, handle: &Handle) {
        let mut queue = lock(&self.queue);
        queue.filling.remove(handle);
        match queue.states.get(handle) {
            Some(State::Wanted(Wanted { turn, waiters, .. })) if !waiters.is_empty() => {
                let turn = *turn;
                queue.push(turn, handle.clone());
                drop(queue);
                self.wake.notify_one();
            }
            Some(State::Wanted(_)) => {
                queue.states.remove(handle);
                drop(queue);
            }
            _ => drop(queue),
        }
        self.is_well(handle);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(n: u8) -> Handle {
        Handle::from_bytes(&[1, 0, 0, 0, n]).expect("a handle")
    }

    fn want(queue: &mut Queue, n: u8, uid: u32) {
        let place = u64::from(n);
        queue.want(handle(n), Turn { uid, place }, Vec::new());
    }

    fn pop(queue: &mut Queue) -> Option<u8> {
        queue.pop().map(|(handle, _)| handle.to_bytes()[4])
    }

    #[test]
    fn the_background_gives_way_to_everybody() {
        let mut queue = Queue {
            threads: 8,
            ..Queue::default()
        };
        for n in 1..=6 {
            want(&mut queue, n, BACKGROUND);
        }
        want(&mut queue, 10, 0);
        want(&mut queue, 11, 1000);
        assert_eq!((pop(&mut queue), pop(&mut queue)), (Some(11), Some(10)));
        assert_eq!((pop(&mut queue), pop(&mut queue)), (Some(1), Some(2)));
        // Threads stay free for whoever comes.
        assert_eq!(pop(&mut queue), None);
        want(&mut queue, 12, 1000);
        assert_eq!(pop(&mut queue), Some(12));
        // Somebody opens what was to come by the way.
        queue.advance(
            &handle(5),
            Turn {
                uid: 1000,
                place: 5,
            },
        );
        assert_eq!(pop(&mut queue), Some(5));
        for (done, next) in [(1, 6), (2, 3), (6, 4)] {
            assert_eq!(pop(&mut queue), None);
            queue.remove(&handle(done));
            assert_eq!(pop(&mut queue), Some(next));
        }
        assert!(queue.todo.is_empty());
    }
}
