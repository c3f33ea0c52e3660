//! The thread that runs rules when they are due.
//!
//! It looks at the clock, at how full the filesystem is and at the spool once a second, and reads the
//! policy file when that has changed. While the file has a fault no rule runs, and status says so. When
//! each rule ran last is remembered only as long as the daemon runs.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};

use policies::decide::{Usage, next_run};
use policies::{Policy, Rule};

use super::{Done, How, load, run};
use crate::control::Core;
use crate::shared::Shared;

const TICK: Duration = Duration::from_secs(1);
/// A rule that could free nothing, or failed, is not asked again for so long, however full the disk is.
const REST: Duration = Duration::from_mins(1);
/// Failures named in the journal for each run.
const NAMED: usize = 5;

/// Runs rules.
pub struct Engine {
    core: Arc<dyn Core>,
    shared: Arc<Shared>,
    file: PathBuf,
    begun: i64,
    stamp: Option<(SystemTime, u64)>,
    policy: Option<Policy>,
    last: HashMap<String, i64>,
    rests: HashMap<String, Instant>,
}

impl Engine {
    /// Of a policy file. Give it a thread with [`Self::run`].
    pub fn new(core: Arc<dyn Core>, shared: Arc<Shared>, file: PathBuf) -> Self {
        Self {
            core,
            shared,
            file,
            begun: unix_now(),
            stamp: None,
            policy: None,
            last: HashMap::new(),
            rests: HashMap::new(),
        }
    }

    /// Runs what is due until the daemon stops.
    pub fn run(mut self) {
        // Set when the daemon stops, so that a long run ends too.
        let cancelled = Arc::new(AtomicBool::new(false));
        let stopper = (self.shared.clone(), cancelled.clone());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while !stopper.0.stopping() {
                    stopper.0.wait_for_progress(TICK);
                }
                stopper.1.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            while !self.shared.stopping() {
                self.turn(&cancelled);
                let next = Instant::now() + TICK;
                while Instant::now() < next && !self.shared.stopping() {
                    let left = next.saturating_duration_since(Instant::now());
                    self.shared.wait_for_progress(left);
                }
            }
        });
    }

    fn turn(&mut self, cancelled: &Arc<AtomicBool>) {
        self.read();
        let Some(policy) = self.policy.take() else {
            return;
        };
        let usage = self.core.usage().ok();
        for rule in &policy.rules {
            if self.shared.stopping() {
                break;
            }
            if self.is_due(rule, usage) {
                self.run_rule(&policy, rule, cancelled);
            }
        }
        self.policy = Some(policy);
    }

    /// Reads the file where it is another than before.
    fn read(&mut self) {
        let stamp = stamp(&self.file);
        if stamp.is_some() && stamp == self.stamp {
            return;
        }
        self.stamp = stamp;
        match load(&self.file) {
            Ok(policy) => {
                tracing::info!(rules = policy.rules.len(), file = %self.file.display(), "policy read");
                self.shared.well("policy");
                self.policy = Some(policy);
            }
            Err(error) => {
                self.policy = None;
                self.shared.trouble(
                    "policy",
                    true,
                    "no rule runs: the policy has a fault",
                    error.to_string(),
                    "mend it, check it with `tierctl policy check`; it is read again when it changes",
                );
            }
        }
    }

    fn is_due(&self, rule: &Rule, usage: Option<Usage>) -> bool {
        let rests = self.rests.get(&rule.name);
        if rests.is_some_and(|until| Instant::now() < *until) {
            return false;
        }
        let last = self.last.get(&rule.name).copied();
        let by_clock = rule.schedule.is_some_and(|schedule| {
            unix_now() >= next_run(schedule, last, self.begun, local_offset())
        });
        let too_full = usage
            .zip(rule.watermarks)
            .is_some_and(|(usage, marks)| usage.to_free(marks).is_some());
        let spool_full =
            rule.spool_full && self.shared.troubles().iter().any(|(key, _)| key == "spool");
        by_clock || too_full || spool_full
    }

    fn run_rule(&mut self, policy: &Policy, rule: &Rule, cancelled: &Arc<AtomicBool>) {
        let how = How {
            dry: false,
            asked: false,
            cancelled: cancelled.clone(),
        };
        let mut named = 0;
        let done = run(&*self.core, policy, rule, &how, &mut |step| {
            if let Some(error) = step.error
                && named < NAMED
            {
                named += 1;
                tracing::warn!(
                    rule = rule.name,
                    file = step.hit.file.get(),
                    error,
                    "a rule failed on a file"
                );
            }
            ControlFlow::Continue(())
        });
        self.last.insert(rule.name.clone(), unix_now());
        let rest = !matches!(&done, Ok(done) if done.files > done.failed);
        if rest {
            self.rests.insert(rule.name.clone(), Instant::now() + REST);
        }
        self.report(rule, done.map_err(|error| error.to_string()));
    }

    fn report(&self, rule: &Rule, done: Result<Done, String>) {
        let key = format!("policy-{}", rule.name);
        let name = &rule.name;
        match done {
            Ok(done) if done.failed == 0 => {
                if done.files > 0 {
                    tracing::info!(
                        rule = name,
                        action = rule.action.word(),
                        files = done.files,
                        bytes = done.bytes,
                        "a rule ran"
                    );
                }
                self.shared.well(&key);
            }
            Ok(done) => {
                let end = if done.gave_up { " and it gave up" } else { "" };
                self.shared.trouble(
                    &key,
                    false,
                    format!(
                        "rule {name} failed on {} of {} files{end}",
                        done.failed, done.files
                    ),
                    "the first of them are named in the journal",
                    format!(
                        "see `journalctl -u hsmd`, and try it with `tierctl policy run {name}`"
                    ),
                );
            }
            Err(error) => self.shared.trouble(
                &key,
                false,
                format!("rule {name} could not run"),
                error,
                format!("try it with `tierctl policy run {name}`"),
            ),
        }
    }
}

fn stamp(file: &Path) -> Option<(SystemTime, u64)> {
    let meta = std::fs::metadata(file).ok()?;
    Some((meta.modified().ok()?, meta.len()))
}

fn unix_now() -> i64 {
    tierfs::Time::now().seconds
}

fn local_offset() -> i64 {
    i64::from(jiff::Zoned::now().offset().seconds())
}
