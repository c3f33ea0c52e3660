//! The thread that runs rules when they are due.
//!
//! It looks at the clock and at the spool once a second, and reads the policy file when that has changed.
//! While the file has a fault no rule runs, and status says so. When each rule ran last is remembered in
//! the catalog, for this machine only: what was due while the daemon did not run is made up for. Watermarks are not its business: a rule may run for hours, and a disk that
//! fills does not wait ([`super::watch`]).

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use policies::decide::next_run;
use policies::{Policy, Rule};

use super::file::PolicyFile;
use super::{Done, How, run};
use crate::control::Core;
use crate::shared::Shared;

const TICK: Duration = Duration::from_secs(1);
/// A rule that did nothing, or failed, is not asked again for so long, however full the spool is.
const REST: Duration = Duration::from_mins(1);
/// Failures named in the journal for each run.
const NAMED: usize = 5;

/// Runs rules.
pub struct Engine {
    core: Arc<dyn Core>,
    shared: Arc<Shared>,
    file: PolicyFile,
    last: HashMap<String, i64>,
    rests: HashMap<String, Instant>,
}

impl Engine {
    /// Of a policy file. Give it a thread with [`Self::run`].
    pub fn new(core: Arc<dyn Core>, shared: Arc<Shared>, file: PathBuf) -> Self {
        Self {
            core,
            shared,
            file: PolicyFile::new(file),
            last: HashMap::new(),
            rests: HashMap::new(),
        }
    }

    /// Runs what is due until the daemon stops; then sets `cancelled`, so that what takes long ends too.
    pub fn run(mut self, cancelled: &Arc<AtomicBool>) {
        let stopper = (self.shared.clone(), cancelled.clone());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while !stopper.0.stopping() {
                    stopper.0.wait_for_progress(TICK);
                }
                stopper.1.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            while !self.shared.stopping() {
                self.turn(cancelled);
                let next = Instant::now() + TICK;
                while Instant::now() < next && !self.shared.stopping() {
                    let left = next.saturating_duration_since(Instant::now());
                    self.shared.wait_for_progress(left);
                }
            }
        });
    }

    fn turn(&mut self, cancelled: &Arc<AtomicBool>) {
        let Some(policy) = self.file.read(&self.shared) else {
            return;
        };
        for rule in &policy.rules {
            if self.shared.stopping() {
                break;
            }
            if self.is_due(rule) {
                self.run_rule(&policy, rule, cancelled);
            }
        }
    }

    fn is_due(&mut self, rule: &Rule) -> bool {
        let rests = self.rests.get(&rule.name);
        if rests.is_some_and(|until| Instant::now() < *until) {
            return false;
        }
        let by_clock = rule.schedule.is_some_and(|schedule| {
            unix_now() >= next_run(schedule, self.last(&rule.name), local_offset())
        });
        let spool_full =
            rule.spool_full && self.shared.troubles().iter().any(|(key, _)| key == "spool");
        by_clock || spool_full
    }

    /// When a rule ran last; one that never did counts from when it was first seen.
    fn last(&mut self, name: &str) -> i64 {
        if let Some(last) = self.last.get(name) {
            return *last;
        }
        let now = unix_now();
        let known = self.core.rule_ran(name);
        if known.is_none() {
            self.core.note_rule(name, now);
        }
        // A clock that was ahead must not keep the rule from running.
        let last = known.map_or(now, |known| known.min(now));
        self.last.insert(name.to_owned(), last);
        last
    }

    fn run_rule(&mut self, policy: &Policy, rule: &Rule, cancelled: &Arc<AtomicBool>) {
        let how = How {
            dry: false,
            asked: false,
            cancelled: cancelled.clone(),
        };
        let (mut named, mut first) = (0, None);
        let done = run(&*self.core, policy, rule, &how, &mut |step| {
            if let Some(error) = step.error
                && named < NAMED
            {
                named += 1;
                first.get_or_insert_with(|| error.clone());
                tracing::warn!(
                    rule = rule.name,
                    file = step.hit.file.get(),
                    error,
                    "a rule failed on a file"
                );
            }
            ControlFlow::Continue(())
        });
        let now = unix_now();
        self.last.insert(rule.name.clone(), now);
        self.core.note_rule(&rule.name, now);
        let rest = !matches!(&done, Ok(done) if done.files > done.failed);
        if rest {
            self.rests.insert(rule.name.clone(), Instant::now() + REST);
        }
        let first = first.unwrap_or_default();
        self.report(policy, rule, done.map_err(|error| error.to_string()), first);
    }

    /// `first`: why the first file failed.
    fn report(&self, policy: &Policy, rule: &Rule, done: Result<Done, String>, first: String) {
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
                let end = if done.gave_up {
                    let most = policy.failures_max_percent;
                    format!(" and gave up, since more than {most} % failed")
                } else {
                    String::new()
                };
                self.shared.trouble(
                    &key,
                    false,
                    format!(
                        "rule {name} failed on {} of {} files{end}",
                        done.failed, done.files
                    ),
                    first,
                    format!(
                        "see to what it says; `journalctl -u hsmd` names the first files, and `tierctl policy run {name}` tries it again"
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

fn unix_now() -> i64 {
    tierfs::Time::now().seconds
}

fn local_offset() -> i64 {
    i64::from(jiff::Zoned::now().offset().seconds())
}
