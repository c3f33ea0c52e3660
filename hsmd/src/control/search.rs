//! Searches: which files meet a condition, and how much lies below a directory.
//!
//! For root and the control group only: a condition tells of every file, whoever may read it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use policies::{Expression, Statement};
use serde::{Deserialize, Serialize};
use tierfs::FileId;
use tierfs::files::usage::Sums;
use tierfs::files::{FilesError, Limits};
use tierfs::record::Kind;

use super::methods::PathParameters;
use super::model::{DirectoryUsage, Found, FoundFile};
use super::path::{PathText, below};
use super::varlink::Failure;
use super::{Core, CoreError};
use crate::policy::{SEARCH_TIME, values};

/// Paths in one reply.
const PATHS_AT_ONCE: usize = 1000;
/// Files in one reply.
const FILES_AT_ONCE: usize = 200;

/// Of `FindFiles`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FindParameters {
    /// The condition, see hsm-policy(5).
    pub expression: String,
    /// Give all columns, not only paths.
    #[serde(default)]
    pub columns: bool,
}

/// Of `GetUsage`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UsageParameters {
    /// The file or directory.
    #[serde(flatten)]
    pub path: PathParameters,
    /// How far below it directories are named.
    #[serde(default)]
    pub depth: u64,
}

/// Parameters that are wrong.
pub(super) fn wrong(parameter: &str, why: impl Into<String>) -> Failure {
    Failure::InvalidParameter {
        parameter: parameter.to_owned(),
        why: why.into(),
    }
}

/// Searches; gives what it finds in parts, the last one at its end.
pub(super) fn find(
    core: &dyn Core,
    asked: &FindParameters,
    cancelled: &Arc<AtomicBool>,
    part: &mut dyn FnMut(Found) -> ControlFlow<()>,
) -> Result<Found, Failure> {
    let expression = Expression::parse(&asked.expression).map_err(|fault| {
        let why = policies::rules::located(&asked.expression, &fault);
        wrong("expression", format!("{why}; {}", fault.advice))
    })?;
    let Statement {
        condition, params, ..
    } = Statement::search(&expression);
    let params = values(&params);
    let limits = Limits {
        time: Some(SEARCH_TIME),
        cancelled: Some(cancelled),
    };
    let (mut files, mount) = (core.files()?, core.mount());
    // In the words of the expression, before anything is searched.
    let wrong_words = |error| match error {
        FilesError::Expression(bad) => {
            let why = match bad.at {
                Some(at) => policies::rules::located(
                    &asked.expression,
                    &policies::Fault {
                        at,
                        why: bad.why,
                        advice: String::new(),
                    },
                ),
                None => bad.why,
            };
            wrong("expression", format!("{why}; {}", bad.advice))
        }
        error => Failure::Core(error.into()),
    };
    files.check(&condition, &params).map_err(wrong_words)?;
    let mut found = Found::default();
    let done = if asked.columns {
        files.rows(&condition, &params, &limits, &mut |row| {
            found.pathless += u64::from(row.path.is_none());
            found.files.push(FoundFile::of(row, &mount));
            if found.files.len() < FILES_AT_ONCE {
                return ControlFlow::Continue(());
            }
            pass_on(&mut found, part)
        })
    } else {
        files.paths(&condition, &params, &limits, &mut |path| {
            match path {
                Some(path) => found.paths.push(below(&mount, path)),
                None => found.pathless += 1,
            }
            if found.paths.len() < PATHS_AT_ONCE {
                return ControlFlow::Continue(());
            }
            pass_on(&mut found, part)
        })
    };
    done.map_err(wrong_words)?;
    Ok(found)
}

fn pass_on(found: &mut Found, part: &mut dyn FnMut(Found) -> ControlFlow<()>) -> ControlFlow<()> {
    let pathless = found.pathless;
    let full = std::mem::take(found);
    found.pathless = pathless;
    part(full)
}

/// Adds up what lies below a path.
pub(super) fn usage(
    core: &dyn Core,
    asked: &UsageParameters,
    cancelled: &AtomicBool,
) -> Result<Vec<DirectoryUsage>, Failure> {
    let path = asked.path.exact()?;
    let located = core.resolve(&path)?;
    let file = located.file.and_then(FileId::new).ok_or_else(|| {
        CoreError::NotFound(format!(
            "{} is not in the log yet: ask again after `tierctl sync`",
            path.display()
        ))
    })?;
    let row = core.catalog()?.queries().inode(file)?;
    let usage = core.sums()?;
    let shown = |path: PathText, sums: Sums| DirectoryUsage {
        path,
        files: sums.files,
        logical_bytes: sums.logical,
        resident_bytes: sums.resident,
        released_bytes: sums.released,
        stubs: sums.stubs,
    };
    if row.is_none_or(|row| row.kind != Kind::Directory) {
        let sums = usage.of_file(file)?;
        return Ok(vec![shown(asked.path.path.clone(), sums)]);
    }
    let depth = usize::try_from(asked.depth).unwrap_or(usize::MAX);
    let mut list = Vec::new();
    usage.below(file, depth, cancelled, &mut |name, sums| {
        list.push(shown(below(&path, name), sums));
    })?;
    Ok(list)
}

/// A path with its bytes: what a list of paths holds.
pub(super) fn exact(path: &PathText) -> Result<PathBuf, Failure> {
    PathParameters { path: path.clone() }.exact()
}
