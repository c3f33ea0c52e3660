//! Writing back while the rest is being fetched, and noting what is synced.
//!
//! Frames are written by several threads and are done out of order. Up to which frame all are done is
//! known here; now and then the filesystem is synced, and what was done *before* that is recorded. So
//! the disk works all the time, and the sync at the end is short.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::report::Collector;
use crate::state::{Progress, State};
use crate::sys;

/// What is written is synced, and so can be continued from, at this interval.
pub const SYNC_INTERVAL: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Inner {
    /// Places of the jobs from `first` on.
    planned: VecDeque<Progress>,
    /// The first job that is not done.
    first: u64,
    /// Later ones that are.
    ahead: BTreeSet<u64>,
    /// Everything up to here is done.
    done: Option<Progress>,
    ended: bool,
}

/// Follows the jobs, and syncs.
pub struct Syncer {
    interval: Duration,
    inner: Mutex<Inner>,
    wake: Condvar,
}

impl Syncer {
    /// Syncs at this interval.
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            inner: Mutex::default(),
            wake: Condvar::new(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panicking thread leaves jobs that are never done: nothing more is recorded.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Job `number` writes what lies at `place`. Numbers are dense and ascend.
    pub fn planned(&self, _number: u64, place: Progress) {
        self.inner().planned.push_back(place);
    }

    /// Job `number` is done.
    pub fn done(&self, number: u64) {
        let mut inner = self.inner();
        inner.ahead.insert(number);
        while inner.ahead.first() == Some(&inner.first) {
            inner.ahead.pop_first();
            inner.first += 1;
            inner.done = inner.planned.pop_front().or(inner.done);
        }
    }

    /// No more jobs come.
    pub fn end(&self) {
        self.inner().ended = true;
        self.wake.notify_one();
    }

    /// The syncing thread: ends after [`Self::end`]. What was done last is not synced by it.
    pub fn run(
        &self,
        root: &OwnedFd,
        state: &mut State,
        found: &Collector<'_>,
    ) -> Result<(), Error> {
        let fail = |error| {
            Error::target(
                ".hsm-replay",
                "syncing the target and recording it in",
                error,
            )
        };
        loop {
            let Some(done) = self.wait() else {
                return Ok(());
            };
            sys::sync_filesystem(root).map_err(fail)?;
            state.save_found(&found.so_far()).map_err(fail)?;
            state.save(done).map_err(fail)?;
            tracing::debug!(?done, "synced on the way");
        }
    }

    /// Waits until a sync is due; gives what is done then. `None` at the end.
    fn wait(&self) -> Option<Progress> {
        let begun = Instant::now();
        let mut inner = self.inner();
        loop {
            if inner.ended {
                return None;
            }
            let left = self.interval.saturating_sub(begun.elapsed());
            if left.is_zero()
                && let Some(done) = inner.done.take()
            {
                return Some(done);
            }
            let pause = left.max(Duration::from_millis(5));
            let waited = self.wake.wait_timeout(inner, pause);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_unbroken_row_of_jobs_is_done() {
        let syncer = Syncer::new(SYNC_INTERVAL);
        for number in 0..4 {
            syncer.planned(number, Progress::Content(1, number));
        }
        syncer.done(1);
        syncer.done(2);
        assert_eq!(syncer.inner().done, None);
        syncer.done(0);
        assert_eq!(syncer.inner().done, Some(Progress::Content(1, 2)));
        syncer.done(3);
        assert_eq!(syncer.inner().done, Some(Progress::Content(1, 3)));
    }
}
