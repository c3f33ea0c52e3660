//! Policies at work: reads the file, asks the view of files, has done what the rules say.
//!
//! What a rule means and when it is due is decided in the crate `policies`, which files it is about by
//! SQLite over [`tierfs::files`], what is done to them by [`Core::act`]. A rule's files are found first and
//! then acted on in batches: a search over a large catalog does not stay open while tapes turn.

mod candidates;
pub mod engine;
mod file;
pub mod space;
#[cfg(test)]
mod tests;
pub mod watch;

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use policies::decide::{Budget, Usage, gives_up};
use policies::{Fault, Policy, PolicyError, Rule, Statement, Watermarks};
use tierfs::FileId;
use tierfs::files::{Files, FilesError, Hit, Limits, Select, Value};

use crate::control::{Core, CoreError};

/// Larger is no policy.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// One run of one rule takes no more files; the next one takes the rest. Bounds the memory.
const FILES_PER_RUN: usize = 200_000;
/// So many files are acted on at once, so that a release syncs once for all of them.
const BATCH_FILES: usize = 256;
/// Files of so many bytes together, likewise.
const BATCH_BYTES: u64 = 16 << 30;
/// A rule looks again, so many times, whether the low watermark is reached.
const PASSES_MAX: usize = 5;
/// A search that takes longer is ended.
pub const SEARCH_TIME: Duration = Duration::from_mins(10);

/// Why there is no policy.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("{}: the policy cannot be read: {source}; {advice}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// Something in it is wrong.
    #[error(transparent)]
    Wrong(#[from] PolicyError),
    /// The made-up catalog to check it with cannot be made.
    #[error(transparent)]
    Catalog(#[from] tierfs::catalog::Error),
}

/// Reads and checks a policy file.
pub fn load(file: &Path) -> Result<Policy, LoadError> {
    let failed = |source: std::io::Error| LoadError::Read {
        file: file.to_owned(),
        advice: match source.kind() {
            std::io::ErrorKind::NotFound => {
                "write it (hsm-policy(5) has examples), or name another"
            }
            std::io::ErrorKind::PermissionDenied => "run as root",
            std::io::ErrorKind::InvalidData => "it must be UTF-8 text of at most 1 MiB",
            _ => "make it a readable file",
        },
        source,
    };
    let length = std::fs::metadata(file).map_err(failed)?.len();
    if length > FILE_BYTES_MAX {
        return Err(failed(std::io::ErrorKind::InvalidData.into()));
    }
    let text = std::fs::read_to_string(file).map_err(failed)?;
    parse(&file.display().to_string(), &text)
}

/// Checks a text as if it stood in `file`, its expressions too.
pub fn parse(file: &str, text: &str) -> Result<Policy, LoadError> {
    let policy = Policy::parse(file, text)?;
    let files = Files::made_up()?;
    for rule in &policy.rules {
        let weight = rule.weight.as_ref().map(|weight| ("weight", weight));
        for (key, expression) in [("condition", &rule.condition)].into_iter().chain(weight) {
            match files.check(expression.sql(), &[]) {
                // A look at one made-up file takes no time.
                Ok(_) | Err(FilesError::TimedOut { .. } | FilesError::Cancelled) => {}
                Err(FilesError::Expression(bad)) => {
                    let fault = Fault {
                        // Where SQLite names no place, the whole is meant.
                        at: bad.at.unwrap_or(0),
                        why: bad.why,
                        advice: bad.advice,
                    };
                    return Err(policy.expression_error(rule, key, &fault).into());
                }
                Err(FilesError::Catalog(error)) => return Err(error.into()),
            }
        }
    }
    Ok(policy)
}

impl From<FilesError> for CoreError {
    fn from(error: FilesError) -> Self {
        match error {
            FilesError::Catalog(error) => error.into(),
            FilesError::Cancelled => Self::Cancelled("the search"),
            error => Self::Failed(error.to_string()),
        }
    }
}

/// What became of one file of a rule.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// The file.
    pub hit: Hit,
    /// Why it failed; `None` where it did not, or nothing was tried.
    pub error: Option<String>,
}

/// What became of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Done {
    /// Why it ran, or did not.
    pub why: String,
    /// Files that it is about, in this run.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Files that failed.
    pub failed: u64,
    /// It ended early, since too many failed.
    pub gave_up: bool,
    /// More files are left for another run.
    pub left: bool,
}

/// How a rule is run.
#[derive(Clone)]
pub struct How {
    /// Only tell.
    pub dry: bool,
    /// Asked for by its name: whatever its triggers say.
    pub asked: bool,
    /// Ends it.
    pub cancelled: Arc<AtomicBool>,
}

/// Runs a rule now.
pub fn run(
    core: &dyn Core,
    policy: &Policy,
    rule: &Rule,
    how: &How,
    each: &mut dyn FnMut(Step) -> ControlFlow<()>,
) -> Result<Done, CoreError> {
    let usage = rule.watermarks.map(|_| core.usage()).transpose()?;
    let (to_free, why) = reason(rule, usage, how.asked);
    let mut done = Done {
        why,
        ..Done::default()
    };
    if to_free == Some(0) {
        return Ok(done);
    }
    let mut budget = Budget::new(rule, to_free);
    let mut tried = HashSet::new();
    let hits = find(core, policy, rule, &mut budget, how, &tried, &mut done)?;
    if how.dry {
        for hit in hits {
            (done.files, done.bytes) = (done.files + 1, done.bytes + hit.size);
            if each(Step { hit, error: None }).is_break() {
                break;
            }
        }
        return Ok(done);
    }
    tried.extend(hits.iter().map(|hit| hit.file));
    let mut go_on = act(core, policy, rule, how, &hits, &mut done, each)?;
    for _ in 1..PASSES_MAX {
        let Some(more) = rule.watermarks.filter(|_| go_on.is_continue()) else {
            break;
        };
        let low = Watermarks {
            high: more.low,
            low: more.low,
        };
        // Holes and shared extents free less than the size says.
        let still = core.usage()?.to_free(low).unwrap_or(0);
        if still == 0 || !budget.may_go_on() || done.gave_up {
            break;
        }
        budget.again(still);
        let hits = find(core, policy, rule, &mut budget, how, &tried, &mut done)?;
        if hits.is_empty() {
            break;
        }
        tried.extend(hits.iter().map(|hit| hit.file));
        go_on = act(core, policy, rule, how, &hits, &mut done, each)?;
    }
    Ok(done)
}

/// How many bytes a rule has to free (`None`: it has no such goal), and why it runs.
fn reason(rule: &Rule, usage: Option<Usage>, asked: bool) -> (Option<u64>, String) {
    let (Some(marks), Some(usage)) = (rule.watermarks, usage) else {
        let why = match (asked, rule.schedule) {
            (true, _) => "it was asked for",
            (false, Some(policies::Schedule::Every { .. })) => "it runs at an interval",
            (false, Some(policies::Schedule::Daily(_))) => "it runs once a day",
            (false, None) if rule.spool_full => "it runs when the spool is full",
            (false, None) => "it runs when it is asked for",
        };
        return (None, why.to_owned());
    };
    let full = usage.percent();
    let Watermarks { high, low } = marks;
    // By its clock, and when it is asked for, it frees down to the low watermark.
    let begins = if asked || rule.schedule.is_some() {
        low
    } else {
        high
    };
    match usage.to_free(Watermarks { high: begins, low }) {
        Some(bytes) => (
            Some(bytes),
            format!("the filesystem is {full} % full, {low} % is wanted"),
        ),
        None => (
            Some(0),
            format!("the filesystem is {full} % full, less than {begins} %: nothing is to be done"),
        ),
    }
}

/// The files that a rule is about, best first, as far as its limits and `to_free` go.
fn find(
    core: &dyn Core,
    policy: &Policy,
    rule: &Rule,
    budget: &mut Budget,
    how: &How,
    tried: &HashSet<FileId>,
    done: &mut Done,
) -> Result<Vec<Hit>, CoreError> {
    let statement = Statement::of(policy, rule);
    let params = values(&statement.params);
    let select = Select {
        condition: &statement.condition,
        weight: statement.weight.as_deref(),
        params: &params,
    };
    let limits = Limits {
        time: Some(SEARCH_TIME),
        cancelled: Some(&how.cancelled),
    };
    let mut hits = Vec::new();
    done.left = false;
    core.files()?.select(&select, &limits, &mut |hit| {
        if tried.contains(&hit.file) {
            return ControlFlow::Continue(());
        }
        if !budget.wants_more() || hits.len() >= FILES_PER_RUN {
            done.left = true;
            return ControlFlow::Break(());
        }
        budget.take(hit.size);
        hits.push(hit);
        ControlFlow::Continue(())
    })?;
    Ok(hits)
}

fn act(
    core: &dyn Core,
    policy: &Policy,
    rule: &Rule,
    how: &How,
    hits: &[Hit],
    done: &mut Done,
    each: &mut dyn FnMut(Step) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, CoreError> {
    let mut rest = hits;
    while !rest.is_empty() {
        if how.cancelled.load(Ordering::Relaxed) {
            return Err(CoreError::Cancelled("the rule's run"));
        }
        if gives_up(done.files, done.failed, policy.failures_max_percent) {
            (done.gave_up, done.left) = (true, true);
            break;
        }
        let (batch, after) = rest.split_at(batch_len(rest));
        rest = after;
        let files: Vec<FileId> = batch.iter().map(|hit| hit.file).collect();
        let mut failed = core.act(rule.action, &files, &how.cancelled)?;
        failed.sort_by_key(|(file, _)| *file);
        for hit in batch {
            let at = failed.binary_search_by_key(&hit.file, |(file, _)| *file);
            let error = at.ok().map(|at| failed[at].1.clone());
            done.files += 1;
            match &error {
                None => done.bytes += hit.size,
                Some(_) => done.failed += 1,
            }
            if each(Step { hit: *hit, error }).is_break() {
                done.left |= !rest.is_empty();
                return Ok(ControlFlow::Break(()));
            }
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn batch_len(hits: &[Hit]) -> usize {
    let mut bytes = 0_u64;
    let fits = hits.iter().take(BATCH_FILES).take_while(|hit| {
        bytes = bytes.saturating_add(hit.size);
        bytes <= BATCH_BYTES
    });
    fits.count().max(1)
}

/// Texts as values for the view.
pub fn values(texts: &[String]) -> Vec<Value> {
    texts
        .iter()
        .map(|text| Value::Text(text.clone().into_bytes()))
        .collect()
}
