//! Recalls that stand still: a medium or a network that does not answer holds nobody up but those who want
//! what lies there, and these no longer than `recall_wait`.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::queue::{STALLED, State};
use super::{FillError, Handle, Recall, Waiter};
use crate::fetch::FetchError;
use crate::shared::lock;

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(1);
/// Threads beside the configured ones.
const SPARE_MAX: usize = 32;

impl Recall {
    /// The body of the thread that looks after fills that stand still.
    pub fn tend(self: &Arc<Self>) {
        let mut queue = lock(&self.queue);
        while !queue.closed {
            let stalled = queue.stalled(STALLED).min(SPARE_MAX);
            let waits = !queue.is_idle();
            drop(queue);
            if waits {
                self.add_spares(stalled);
            }
            self.give_up();
            queue = lock(&self.queue);
            queue = self
                .tend
                .wait_timeout(queue, LOOK)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(queue, _)| queue);
        }
    }

    fn add_spares(self: &Arc<Self>, wanted: usize) {
        while self.spares.load(Ordering::Relaxed) < wanted {
            let recall = self.clone();
            let spawned = std::thread::Builder::new()
                .name("recall+".to_owned())
                .spawn(move || {
                    recall.work_while_there_is();
                    recall.spares.fetch_sub(1, Ordering::Relaxed);
                });
            match spawned {
                Ok(_) => self.spares.fetch_add(1, Ordering::Relaxed),
                Err(error) => {
                    tracing::warn!(%error, "recalls stand still, and no other thread can be had");
                    return;
                }
            };
        }
    }

    /// A spare thread's body.
    fn work_while_there_is(&self) {
        loop {
            let mut queue = lock(&self.queue);
            let next = if queue.closed { None } else { queue.pop() };
            drop(queue);
            let Some((handle, filling)) = next else {
                return;
            };
            self.serve(&handle, &filling);
        }
    }

    /// Who has waited for `recall_wait`, and whose file has not come a step further for as long, gets an error.
    fn give_up(&self) {
        let wait = self.parts.wait;
        let mut over: Vec<(Handle, Vec<Waiter>)> = Vec::new();
        let mut queue = lock(&self.queue);
        let nothing_moves = queue.stalled(wait) == queue.filling.len();
        let filling = queue.filling.clone();
        for (handle, state) in &mut queue.states {
            let State::Wanted(wanted) = state else {
                continue;
            };
            let stands = match filling.get(handle) {
                Some(filling) => filling.stands_for() >= wait,
                None => !filling.is_empty() && nothing_moves,
            };
            if !stands {
                continue;
            }
            let late = |waiter: &mut Waiter| waiter.since().elapsed() >= wait;
            let late: Vec<Waiter> = wanted.waiters.extract_if(.., late).collect();
            if wanted.waiters.is_empty()
                && let Some(filling) = filling.get(handle)
            {
                filling.stop();
            }
            if !late.is_empty() {
                over.push((handle.clone(), late));
            }
        }
        drop(queue);
        for (handle, waiters) in over {
            let why = format!(
                "nothing of it has come for {} s: whatever its bytes are read from does not answer",
                wait.as_secs()
            );
            let error = FillError::Fetch(FetchError::Away(why));
            self.tell_failure(&handle, &error);
            for waiter in waiters {
                let later = waiter.is_background();
                let errno = if later { libc::EAGAIN } else { error.errno() };
                self.refuse(waiter, errno, &error.to_string());
            }
        }
    }
}
