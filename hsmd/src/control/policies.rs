//! Pins, runs of policies, and why a rule is about a file. For root and the control group only.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use policies::{Expression, Policy, Rule};
use serde::{Deserialize, Serialize};
use tierfs::FileId;
use tierfs::files::{COLUMNS, FileRow, Files, Limits, Value};
use tierfs::record::Kind;

use super::methods::PathParameters;
use super::model::{
    Clause, ColumnValue, Explanation, FoundFile, PathFailure, PinsDone, PolicyFile, PolicyRun,
    RuleDone, RuleExplained,
};
use super::path::{PathText, below};
use super::search::{exact, wrong};
use super::varlink::Failure;
use super::when::When;
use super::{Core, CoreError};
use crate::policy::{self, Done, How, Step};

/// Files pinned in one transaction.
const PINS_AT_ONCE: usize = 10_000;
/// Entries of a directory read at a time.
const PAGE: usize = 1000;
/// Files in one reply.
const FILES_AT_ONCE: usize = 200;

/// Of `SetPins`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PinParameters {
    /// Files, and directories with `recursive`.
    pub paths: Vec<PathText>,
    /// Whether they are pinned from now on.
    pub pinned: bool,
    /// All files below the directories among them.
    #[serde(default)]
    pub recursive: bool,
    /// Only tell.
    #[serde(default)]
    pub dry_run: bool,
}

/// Of `RunPolicy`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunParameters {
    /// Only this rule, whatever its triggers say.
    #[serde(default)]
    pub name: Option<String>,
    /// Only tell.
    #[serde(default)]
    pub dry_run: bool,
}

fn load(core: &dyn Core) -> Result<Policy, Failure> {
    let file = core.policy_file().ok_or_else(|| {
        CoreError::NotFound(
            "there is no policy: write one as hsm-policy(5) describes, name it with `policies = \"/etc/hsmd/policy.toml\"` in hsmd.toml, and restart hsmd"
                .to_owned(),
        )
    })?;
    policy::load(&file).map_err(|error| CoreError::Failed(error.to_string()).into())
}

// ---- pins --------------------------------------------------------------------------------------

/// Pins files, or takes that back.
pub(super) fn set_pins(
    core: &dyn Core,
    asked: &PinParameters,
    cancelled: &AtomicBool,
) -> Result<PinsDone, Failure> {
    let mut done = PinsDone::default();
    let mut files = Vec::new();
    for path in &asked.paths {
        let plain = exact(path)?;
        let gathered = gather(core, &plain, asked.recursive, &mut |file| {
            files.push(file);
            if files.len() < PINS_AT_ONCE {
                return Ok(());
            }
            log_pins(core, &mut files, asked, cancelled, &mut done)
        });
        match gathered {
            Ok(()) => {}
            Err(error @ (CoreError::Cancelled(_) | CoreError::Unavailable(_))) => {
                return Err(error.into());
            }
            Err(error) => done.failures.push(PathFailure {
                path: path.clone(),
                error: error.to_string(),
            }),
        }
    }
    log_pins(core, &mut files, asked, cancelled, &mut done)?;
    Ok(done)
}

fn log_pins(
    core: &dyn Core,
    files: &mut Vec<FileId>,
    asked: &PinParameters,
    cancelled: &AtomicBool,
    done: &mut PinsDone,
) -> Result<(), CoreError> {
    if cancelled.load(Ordering::Relaxed) {
        return Err(CoreError::Cancelled("the pinning"));
    }
    if files.is_empty() {
        return Ok(());
    }
    // A file with several names is meant once.
    files.sort_unstable();
    files.dedup();
    let (lsn, changed) = if asked.dry_run {
        (None, would_change(core, files, asked.pinned)?)
    } else {
        core.pin(files, asked.pinned)?
    };
    done.changed += changed;
    done.unchanged += files.len() as u64 - changed;
    done.lsn = lsn.or(done.lsn);
    files.clear();
    Ok(())
}

/// How many of these files a pin, or taking it back, would change.
fn would_change(core: &dyn Core, files: &[FileId], pinned: bool) -> Result<u64, CoreError> {
    let (reader, mut changed) = (core.catalog()?, 0);
    for file in files {
        if reader.queries().is_pinned(*file)? != pinned {
            changed += 1;
        }
    }
    Ok(changed)
}

/// Gives the file that a path names, or all below it.
fn gather(
    core: &dyn Core,
    path: &Path,
    recursive: bool,
    each: &mut dyn FnMut(FileId) -> Result<(), CoreError>,
) -> Result<(), CoreError> {
    let unknown = || {
        CoreError::NotFound(format!(
            "{} is not in the log yet: try again after `tierctl sync`",
            path.display()
        ))
    };
    let located = core.resolve(path)?;
    let file = located.file.and_then(FileId::new).ok_or_else(unknown)?;
    let reader = core.catalog()?;
    let queries = reader.queries();
    match queries.inode(file)?.ok_or_else(unknown)?.kind {
        Kind::Regular => each(file),
        Kind::Directory if recursive => {
            let mut todo = VecDeque::from([file]);
            while let Some(dir) = todo.pop_front() {
                let mut after: Option<Vec<u8>> = None;
                loop {
                    let page = queries.children(dir, after.as_deref(), PAGE)?;
                    for child in &page {
                        match child.kind {
                            Kind::Regular => each(child.file)?,
                            Kind::Directory => todo.push_back(child.file),
                            _ => {}
                        }
                    }
                    match page.last() {
                        Some(last) if page.len() == PAGE => after = Some(last.name.clone()),
                        _ => break,
                    }
                }
            }
            Ok(())
        }
        Kind::Directory => Err(CoreError::Failed(format!(
            "{} is a directory: with --recursive all files below it are meant",
            path.display()
        ))),
        _ => Err(CoreError::Failed(format!(
            "{} is no regular file: only those have data that can be released, so only they are pinned",
            path.display()
        ))),
    }
}

// ---- runs --------------------------------------------------------------------------------------

/// Runs the rules, or tells what they would do, in parts.
pub(super) fn run(
    core: &dyn Core,
    asked: &RunParameters,
    cancelled: &Arc<AtomicBool>,
    part: &mut dyn FnMut(PolicyRun) -> ControlFlow<()>,
) -> Result<PolicyRun, Failure> {
    let policy = load(core)?;
    let rules: Vec<&Rule> = match &asked.name {
        None => policy.rules.iter().collect(),
        Some(name) => vec![policy.rule(name).ok_or_else(|| {
            let names: Vec<&str> = policy.rules.iter().map(|rule| &rule.name[..]).collect();
            CoreError::NotFound(format!(
                "{} has no rule {name}: its rules are {}",
                policy.file,
                names.join(", ")
            ))
        })?],
    };
    let how = How {
        dry: asked.dry_run,
        asked: asked.name.is_some(),
        cancelled: cancelled.clone(),
    };
    let (mut shown, mut out) = (Shown::open(core)?, PolicyRun::default());
    for rule in rules {
        let done = policy::run(core, &policy, rule, &how, &mut |step| {
            out.files.push(shown.file(rule, step));
            if out.files.len() < FILES_AT_ONCE {
                return ControlFlow::Continue(());
            }
            part(std::mem::take(&mut out))
        });
        let done = match done {
            Err(error @ CoreError::Cancelled(_)) => return Err(error.into()),
            done => done,
        };
        out.rules.push(rule_done(rule, done));
    }
    Ok(out)
}

fn rule_done(rule: &Rule, done: Result<Done, CoreError>) -> RuleDone {
    let (done, error) = match done {
        Ok(done) => (done, None),
        Err(error) => (Done::default(), Some(error.to_string())),
    };
    RuleDone {
        rule: rule.name.clone(),
        action: rule.action.word().to_owned(),
        why: done.why,
        files: done.files,
        bytes: done.bytes,
        failed: done.failed,
        gave_up: done.gave_up,
        left: done.left,
        error,
    }
}

/// Finds the paths of files.
struct Shown {
    files: Files,
    mount: std::path::PathBuf,
}

impl Shown {
    fn open(core: &dyn Core) -> Result<Self, CoreError> {
        Ok(Self {
            files: core.files()?,
            mount: core.mount(),
        })
    }

    fn file(&mut self, rule: &Rule, step: Step) -> PolicyFile {
        let Step { hit, error } = step;
        let mut path = None;
        let id = Value::Integer(i64::try_from(hit.file.get()).unwrap_or(i64::MAX));
        // Without a path the file is still named by its number.
        let _ = self
            .files
            .paths("file = ?1", &[id], &Limits::default(), &mut |found| {
                path = found.map(|found| below(&self.mount, found));
                ControlFlow::Break(())
            });
        PolicyFile {
            rule: rule.name.clone(),
            action: rule.action.word().to_owned(),
            file: hit.file.get(),
            path: path.into(),
            size: hit.size,
            weight: rule.weight.is_some().then_some(hit.weight),
            error,
        }
    }
}

// ---- reasons -----------------------------------------------------------------------------------

/// Which rules are about a file, and why.
pub(super) fn explain(core: &dyn Core, asked: &PathParameters) -> Result<Explanation, Failure> {
    let policy = load(core)?;
    let path = asked.exact()?;
    let located = core.resolve(&path)?;
    let mut files = core.files()?;
    let row = match located.file.and_then(FileId::new) {
        Some(file) => files.row(file).map_err(CoreError::from)?,
        None => None,
    };
    let row = row.ok_or_else(|| {
        CoreError::NotFound(format!(
            "{} is no regular file of the log (yet): rules are about those only; after `tierctl sync` what is new is in it",
            path.display()
        ))
    })?;
    let mut rules = Vec::new();
    for rule in &policy.rules {
        rules.push(explain_rule(&mut files, &policy, rule, &row)?);
    }
    Ok(Explanation {
        file: FoundFile::of(row, &core.mount()),
        rules,
    })
}

fn explain_rule(
    files: &mut Files,
    policy: &Policy,
    rule: &Rule,
    row: &FileRow,
) -> Result<RuleExplained, Failure> {
    let of_action =
        Expression::parse(rule.action.applies_to()).map_err(|fault| wrong("action", fault.why))?;
    let mut clauses = Vec::new();
    for (text, sql) in of_action.clauses().chain(rule.condition.clauses()) {
        clauses.push(clause(files, row, text, sql, &[])?);
    }
    if let Some(ignored) = policies::statement::ignored(&policy.ignore, 1) {
        let params = policy::values(&policy.ignore);
        let text = format!("not in ignore ({})", policy.ignore.join(", "));
        clauses.push(clause(
            files,
            row,
            &text,
            &format!("not {ignored}"),
            &params,
        )?);
    }
    let weight = match &rule.weight {
        Some(weight) => files
            .value(row.file, weight.sql(), &[])
            .map_err(CoreError::from)?,
        None => None,
    };
    Ok(RuleExplained {
        rule: rule.name.clone(),
        action: rule.action.word().to_owned(),
        applies: clauses.iter().all(|clause| clause.holds == Some(true)),
        weight,
        clauses,
    })
}

fn clause(
    files: &mut Files,
    row: &FileRow,
    text: &str,
    sql: &str,
    params: &[Value],
) -> Result<Clause, Failure> {
    let used = files.check(sql, params).map_err(CoreError::from)?;
    let value = files
        .value(row.file, sql, params)
        .map_err(CoreError::from)?;
    let values = used.into_iter().map(|column| ColumnValue {
        column: column.to_owned(),
        value: column_text(row, column),
    });
    Ok(Clause {
        text: text.to_owned(),
        holds: value.map(|value| value != 0.0),
        values: values.collect(),
    })
}

fn column_text(row: &FileRow, column: &str) -> Option<String> {
    debug_assert!(COLUMNS.iter().any(|known| known.name == column));
    let bytes = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
    let time = |seconds| When(tierfs::Time { seconds, nanos: 0 }).to_string();
    match column {
        "file" => Some(row.file.to_string()),
        "path" => row.path.as_ref().map(bytes),
        "name" => row.name.as_ref().map(bytes),
        "size" => Some(row.size.to_string()),
        "mtime" => Some(time(row.mtime)),
        "atime" => Some(time(row.atime)),
        "ctime" => row.ctime.map(time),
        "uid" => Some(row.uid.to_string()),
        "gid" => Some(row.gid.to_string()),
        "user" => row.user.clone(),
        "group" => row.group.clone(),
        "mode" => Some(format!("{} ({:04o})", row.mode, row.mode)),
        "links" => Some(row.links.to_string()),
        "state" => Some(row.state.clone()),
        "pinned" => Some(if row.pinned { "1" } else { "0" }.to_owned()),
        "lsn" => Some(row.lsn.to_string()),
        "version" => row.version.map(|lsn| lsn.to_string()),
        "logged" => row.logged.map(time),
        _ => None,
    }
}
