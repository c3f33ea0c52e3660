//! Recall where there is no room: other files give theirs first.

use std::time::{Duration, Instant};

use super::{FillError, Filling, Handle, Recall, State, Waiter};
use crate::policy::space::{Made, Whose};
use crate::shared::lock;
use crate::tier::Held;

/// Others take the room that was made, too: so often it is tried again.
const TRIES: usize = 10;
/// What is within a quota is taken by its user alone; and where it does not help that his files are released,
/// it is another quota.
const TRIES_WITHIN_QUOTA: usize = 2;
/// How long recalled files take at most until they can be released again, where the pools are at hand.
const PATIENCE: Duration = Duration::from_secs(15);
const PAUSE: Duration = Duration::from_millis(200);

impl Recall {
    /// Fills a file; where its bytes do not fit, other files are released first, and it is tried again. The
    /// inode is held (`held`) while it is filled, and not while room is made.
    pub(super) fn fill_with_room<'r, T>(
        &'r self,
        handle: &Handle,
        mut held: Held<'r>,
        fill: impl Fn() -> Result<T, FillError>,
        stops: &dyn Fn() -> bool,
    ) -> Result<T, FillError> {
        let mut tries = 0;
        loop {
            let result = fill();
            let full = match result {
                // Nothing is released for what nobody waits for.
                Err(FillError::Full(full)) if !self.is_background(handle) => full,
                result => return result,
            };
            let (whose, most) = if full.errno == libc::EDQUOT {
                let (uid, gid) = (full.uid, full.gid);
                (Whose::Of { uid, gid }, TRIES_WITHIN_QUOTA)
            } else {
                (Whose::Anybodys, TRIES)
            };
            let bytes = match whose {
                Whose::Of { .. } => Some(full.wanted),
                // A moment ago it may have been so.
                Whose::Anybodys if tries == 0 => Some(full.wanted),
                Whose::Anybodys => full.more(self.parts.mount.root()),
            };
            let Some(bytes) = bytes.filter(|_| tries < most) else {
                return Err(FillError::Full(full));
            };
            tries += 1;
            drop(held);
            let stops = || self.parts.shared.stopping() || stops();
            match self.parts.space.make(bytes, whose, &stops) {
                Made::Room => held = self.parts.busy.hold(handle),
                Made::None(why) => return Err(FillError::Full(full.because(why))),
            }
        }
    }

    /// Where nothing can be released now, what was recalled a moment ago soon can: when its new change time
    /// is in the log, and on every pool. No thread waits for that: the file is tried again, unless this says no.
    pub(super) fn may_fit_soon(&self, handle: &Handle, filling: &Filling) -> bool {
        let mut queue = lock(&self.queue);
        if filling.stops() {
            return false;
        }
        let Some(State::Wanted(wanted)) = queue.states.get_mut(handle) else {
            return false;
        };
        let since = *wanted.full_since.get_or_insert_with(Instant::now);
        let awaited = !wanted.waiters.iter().all(Waiter::is_background);
        let soon =
            awaited && since.elapsed() < PATIENCE && self.parts.recalled.any_within(PATIENCE);
        // The next worker makes room for those who wait.
        let soon = soon || queue.closed || self.parts.shared.stopping();
        if soon {
            queue.put_off(handle, Instant::now() + PAUSE);
            drop(queue);
            self.wake.notify_one();
        }
        soon
    }
}
