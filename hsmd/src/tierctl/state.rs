//! `tierctl state`: which copies have a file.

use std::path::PathBuf;

use serde::Serialize;

use super::args::Args;
use super::format::{add, name, size};
use super::{PROGRAM, connect, path_parameters};
use crate::control::client::{Client, ClientError};
use crate::control::model::{FileState, FileStateWord};
use crate::output::{self, Exit};

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    states: Vec<FileState>,
    failures: Vec<Failure>,
}

/// A path whose state could not be told.
#[derive(Serialize)]
struct Failure {
    path: String,
    error: String,
}

pub(super) fn run(args: &Args, paths: &[PathBuf]) -> anyhow::Result<Exit> {
    let mut client = connect(args)?;
    let mut report = Report {
        states: Vec::new(),
        failures: Vec::new(),
    };
    for path in paths {
        match ask(&mut client, path) {
            Ok(state) => {
                if !args.json {
                    output::text(&render(&state))?;
                }
                report.states.push(state);
            }
            Err(error) if is_fatal(&error) => return Err(error),
            Err(error) => report.failures.push(Failure {
                path: path.display().to_string(),
                error: format!("{error:#}"),
            }),
        }
    }
    if args.json {
        output::json(&report)?;
    }
    for Failure { error, .. } in &report.failures {
        output::error(PROGRAM, error);
    }
    Ok(exit(&report))
}

fn ask(client: &mut Client, path: &std::path::Path) -> anyhow::Result<FileState> {
    Ok(client.file_state(&path_parameters(path)?)?)
}

/// Whether the connection itself is broken, not only this question unanswered.
fn is_fatal(error: &anyhow::Error) -> bool {
    let client = error.downcast_ref::<ClientError>();
    client.is_some_and(|error| !matches!(error, ClientError::Answered { .. }))
}

fn exit(report: &Report) -> Exit {
    let unsafe_yet = |state: &FileState| {
        state.nowhere_bytes > 0
            || matches!(
                state.state,
                FileStateWord::Untracked
                    | FileStateWord::Dirty
                    | FileStateWord::Suspect
                    | FileStateWord::Lost
            )
    };
    match (report.states.is_empty(), report.failures.is_empty()) {
        (true, false) => Exit::Error,
        (false, false) => Exit::Partly,
        (_, true) if report.states.iter().any(unsafe_yet) => Exit::No,
        (_, true) => Exit::Done,
    }
}

/// A file's state in a word, and what that means.
fn words(state: &FileState) -> (&'static str, String) {
    match state.state {
        FileStateWord::Untracked => ("untracked", "not in the log yet".to_owned()),
        FileStateWord::Dirty => ("dirty", "changed, and not yet in the log".to_owned()),
        FileStateWord::Lost => (
            "lost",
            format!(
                "released, and no good copy of {} of it is known; see hsm(7), \"A file cannot be recalled\"",
                size(state.nowhere_bytes)
            ),
        ),
        FileStateWord::Logged if state.nowhere_bytes > 0 => (
            "logged",
            format!(
                "on {} of {} pools, no good copy of {} of it is known but on disk; see hsm(7), \"A volume is damaged\"",
                state.pools_having,
                state.pools,
                size(state.nowhere_bytes)
            ),
        ),
        FileStateWord::Logged => (
            "logged",
            format!(
                "in the spool, on {} of {} pools",
                state.pools_having, state.pools
            ),
        ),
        FileStateWord::Partial => (
            "partial",
            format!(
                "released, on {} of {} pools, some of it is on disk again",
                state.pools_having, state.pools
            ),
        ),
        FileStateWord::Migrated => (
            "migrated",
            format!(
                "released: on {} of {} pools and not on disk; who opens it gets it back",
                state.pools_having, state.pools
            ),
        ),
        FileStateWord::Suspect => (
            "suspect",
            "it has a mark, and what belongs into it is not known: it cannot be read, and nothing of it is logged; delete it where it is only a copy, see hsm(7), STATES"
                .to_owned(),
        ),
        FileStateWord::Premigrated => (
            "premigrated",
            format!(
                "on {} of {} pools and on disk",
                state.pools_having, state.pools
            ),
        ),
    }
}

/// The text about one file.
pub(super) fn render(state: &FileState) -> String {
    let (word, means) = words(state);
    let pinned = if state.pinned { ", pinned" } else { "" };
    let mut text = format!("{}: {word} ({means}){pinned}\n", name(&state.path.path));
    if let Some(pending) = &state.pending {
        let since = pending.since.to_the_second();
        add!(text, "  waits     since {since}: {}\n", name(&pending.why));
    }
    if let (Some(lsn), Some(time)) = (state.lsn, state.time) {
        let kind = state.kind.as_deref().unwrap_or("file").replace('_', " ");
        let bytes = match (kind.as_str(), state.size) {
            ("regular", Some(bytes)) => format!(", {}", size(bytes)),
            _ => String::new(),
        };
        let fuzzy = if state.fuzzy {
            ", fuzzy (changed while it was read)"
        } else {
            ""
        };
        add!(
            text,
            "  newest    LSN {lsn} of {}, {kind}{bytes}{fuzzy}\n",
            time.to_the_second()
        );
    }
    if !state.unrestorable.is_empty() {
        add!(
            text,
            "  limits    replay cannot restore: {}\n",
            state.unrestorable.join(", ")
        );
    }
    for copy in &state.copies {
        let verified = copy.verified.map_or_else(
            || "not read back".to_owned(),
            |time| format!("verified {}", time.to_the_second()),
        );
        let part = if copy.segments < copy.segments_needed {
            format!("{} of {} segments, ", copy.segments, copy.segments_needed)
        } else {
            String::new()
        };
        let path = copy
            .path
            .as_ref()
            .map_or_else(String::new, |path| format!(" at {}", name(path)));
        add!(
            text,
            "  pool {:<4} volume {}{path}: {part}{verified}\n",
            copy.pool,
            copy.volume
        );
    }
    text
}
