//! The files that a rule would release next, found before they are needed: a search over a large catalog
//! takes seconds, in which writers go on.

use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use policies::{Policy, Statement};
use tierfs::FileId;
use tierfs::files::{Hit, Limits, Select};

use super::{FILES_PER_RUN, SEARCH_TIME, values};
use crate::control::{Core, CoreError};

/// A list that is older is made anew when there is time for it: what is cold changes slowly.
const FRESH: Duration = Duration::from_mins(1);
/// Searches take at most this part of the time.
const SEARCH_PART: u32 = 20;
/// After a search that found nothing there is none for so long.
const NOTHING: Duration = Duration::from_secs(2);
/// A file that was refused is not tried again for so long.
const REFUSED: Duration = Duration::from_secs(30);
/// More refused files are forgotten, and tried again.
const REFUSED_MAX: usize = 100_000;
/// What was recalled a moment ago is not released at all: whoever waits for it has not even opened it yet.
const JUST_RECALLED: Duration = Duration::from_secs(5);

/// Files that were not released, and since when.
#[derive(Default)]
pub struct RefusedFiles(HashMap<FileId, Instant>);

impl RefusedFiles {
    /// Not for now.
    pub fn note(&mut self, file: FileId) {
        if self.0.len() >= REFUSED_MAX {
            self.0.clear();
        }
        self.0.insert(file, Instant::now());
    }

    /// Not long ago.
    pub fn has(&self, file: FileId) -> bool {
        let since = self.0.get(&file);
        since.is_some_and(|since| since.elapsed() < REFUSED)
    }
}

/// See the module. Of one rule.
#[derive(Default)]
pub struct Candidates {
    hits: VecDeque<Hit>,
    /// Recalled not long ago: when nothing else is left.
    last_resort: Vec<(Instant, Hit)>,
    /// There are more than the list has.
    more: bool,
    /// When the list was made, and how long that took.
    made: Option<(Instant, Duration)>,
}

/// What a list is made of.
pub struct Search {
    /// Asks the catalog.
    pub core: Arc<dyn Core>,
    /// The policy.
    pub policy: Arc<Policy>,
    /// The name of one of its rules.
    pub rule: String,
    /// A further condition, without parameters, which begins with `and`; may be empty.
    pub more: String,
    /// Files whose sizes add up to this are enough.
    pub bytes: u64,
    /// Ends it.
    pub cancelled: Arc<AtomicBool>,
}

impl Search {
    /// Makes the list.
    pub fn run(&self) -> Result<Candidates, CoreError> {
        let begun = Instant::now();
        let Some(rule) = self.policy.rule(&self.rule) else {
            return Ok(Candidates::default());
        };
        let statement = Statement::of(&self.policy, rule);
        let params = values(&statement.params);
        let condition = format!("{} {}", statement.condition, self.more);
        let select = Select {
            condition: &condition,
            weight: statement.weight.as_deref(),
            params: &params,
        };
        let limits = Limits {
            time: Some(SEARCH_TIME),
            cancelled: Some(&self.cancelled),
        };
        let (mut hits, mut bytes, mut more) = (VecDeque::new(), 0_u64, false);
        self.core.files()?.select(&select, &limits, &mut |hit| {
            bytes = bytes.saturating_add(hit.size);
            hits.push_back(hit);
            more = hits.len() >= FILES_PER_RUN || bytes >= self.bytes;
            if more {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        Ok(Candidates {
            hits,
            last_resort: Vec::new(),
            more,
            made: Some((Instant::now(), begun.elapsed())),
        })
    }
}

impl Candidates {
    /// Whether a new list should be made while nobody waits for it.
    pub fn is_stale(&self) -> bool {
        self.made.is_none_or(|(at, took)| {
            let rest = match (self.is_empty(), self.more) {
                (true, true) => return at.elapsed() >= took,
                (true, false) => NOTHING,
                (false, _) => FRESH,
            };
            at.elapsed() >= rest.max(took * SEARCH_PART)
        })
    }

    /// Nothing is on the list.
    pub fn is_empty(&self) -> bool {
        self.hits.is_empty() && self.last_resort.is_empty()
    }

    /// The next files, best first: at most so many, until their sizes add up to `bytes`. What was refused
    /// is left out. What was recalled not long ago (`recalled` says when) comes when nothing else is left,
    /// the longest ago first.
    pub fn next(
        &mut self,
        files: usize,
        bytes: u64,
        refused: &RefusedFiles,
        recalled: &dyn Fn(FileId) -> Option<Instant>,
    ) -> Vec<Hit> {
        let (mut batch, mut sum) = (Vec::new(), 0_u64);
        while batch.len() < files && sum < bytes {
            let Some(hit) = self.hits.pop_front() else {
                break;
            };
            if refused.has(hit.file) {
                continue;
            }
            if let Some(when) = recalled(hit.file) {
                self.last_resort.push((when, hit));
                continue;
            }
            sum = sum.saturating_add(hit.size);
            batch.push(hit);
        }
        if batch.is_empty() && !self.last_resort.is_empty() {
            self.last_resort.sort_by_key(|(when, _)| *when);
            let old = |(when, _): &&(Instant, Hit)| when.elapsed() >= JUST_RECALLED;
            let mut count = 0;
            for (_, hit) in self.last_resort.iter().take(files).take_while(old) {
                if sum >= bytes {
                    break;
                }
                sum = sum.saturating_add(hit.size);
                count += 1;
            }
            batch.extend(self.last_resort.drain(..count).map(|(_, hit)| hit));
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> FileId {
        FileId::new(number).expect("not 0")
    }

    fn list(sizes: &[u64]) -> Candidates {
        let hit = |(number, size): (u64, &u64)| Hit {
            file: id(number),
            size: *size,
            weight: 0.0,
        };
        Candidates {
            hits: (1..).zip(sizes).map(hit).collect(),
            ..Candidates::default()
        }
    }

    fn numbers(hits: &[Hit]) -> Vec<u64> {
        hits.iter().map(|hit| hit.file.get()).collect()
    }

    #[test]
    fn a_batch_is_bounded_by_files_and_bytes() {
        let mut list = list(&[10, 10, 10, 10, 10]);
        assert_eq!(
            numbers(&list.next(2, 1000, &RefusedFiles::default(), &|_| None)),
            [1, 2]
        );
        assert_eq!(
            numbers(&list.next(10, 11, &RefusedFiles::default(), &|_| None)),
            [3, 4]
        );
        assert_eq!(
            numbers(&list.next(10, 1, &RefusedFiles::default(), &|_| None)),
            [5]
        );
        assert!(
            list.next(10, 1, &RefusedFiles::default(), &|_| None)
                .is_empty()
                && list.is_empty()
        );
    }

    #[test]
    fn what_was_recalled_comes_last_and_not_at_once() {
        let mut list = list(&[10, 10, 10, 10]);
        let now = Instant::now();
        let Some(long_ago) = now.checked_sub(JUST_RECALLED * 2) else {
            return;
        };
        let recalled = |file: FileId| match file.get() {
            1 => Some(long_ago + Duration::from_secs(1)),
            2 => Some(long_ago),
            3 => Some(now),
            _ => None,
        };
        assert_eq!(
            numbers(&list.next(10, 1000, &RefusedFiles::default(), &recalled)),
            [4]
        );
        assert_eq!(
            numbers(&list.next(10, 1000, &RefusedFiles::default(), &recalled)),
            [2, 1]
        );
        assert!(
            list.next(10, 1000, &RefusedFiles::default(), &recalled)
                .is_empty()
        );
        assert!(!list.is_empty());
    }
}
