//! `tierctl du`: how much lies below directories, on disk and released.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::args::Args;
use super::format::{Side, Table, count, name, size};
use super::{PROGRAM, connect, path_parameters};
use crate::control::client::{Client, ClientError};
use crate::control::model::DirectoryUsage;
use crate::control::search::UsageParameters;
use crate::output::{self, Exit};

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    usage: Vec<DirectoryUsage>,
    failures: Vec<Failure>,
}

/// A path that could not be added up.
#[derive(Serialize)]
struct Failure {
    path: String,
    error: String,
}

pub(super) fn run(args: &Args, paths: &[PathBuf], depth: u64) -> anyhow::Result<Exit> {
    let here = [PathBuf::from(".")];
    let paths = if paths.is_empty() { &here[..] } else { paths };
    let mut client = connect(args)?;
    let mut report = Report {
        usage: Vec::new(),
        failures: Vec::new(),
    };
    for path in paths {
        match ask(&mut client, path, depth) {
            Ok(usage) => report.usage.extend(usage),
            Err(error) => match error.downcast_ref::<ClientError>() {
                Some(ClientError::Answered { .. }) => report.failures.push(Failure {
                    path: path.display().to_string(),
                    error: format!("{error:#}"),
                }),
                _ => return Err(error),
            },
        }
    }
    if args.json {
        output::json(&report)?;
    } else if !report.usage.is_empty() {
        output::text(&render(&report.usage))?;
    }
    for failure in &report.failures {
        output::error(PROGRAM, &failure.error);
    }
    Ok(
        match (report.usage.is_empty(), report.failures.is_empty()) {
            (_, true) => Exit::Done,
            (true, false) => Exit::Error,
            (false, false) => Exit::Partly,
        },
    )
}

fn ask(client: &mut Client, path: &Path, depth: u64) -> anyhow::Result<Vec<DirectoryUsage>> {
    let asked = UsageParameters {
        path: path_parameters(path)?,
        depth,
    };
    Ok(client.usage(&asked)?)
}

/// The table: those within a directory before it, as du(1) has it.
pub(super) fn render(usage: &[DirectoryUsage]) -> String {
    let mut table = Table::new(
        0,
        &[
            ("SIZE", Side::Right),
            ("ON DISK", Side::Right),
            ("RELEASED", Side::Right),
            ("FILES", Side::Right),
            ("STUBS", Side::Right),
            ("PATH", Side::Left),
        ],
    );
    for row in usage {
        table.row([
            size(row.logical_bytes),
            size(row.resident_bytes),
            size(row.released_bytes),
            count(row.files),
            count(row.stubs),
            name(&row.path.path),
        ]);
    }
    table.text()
}
