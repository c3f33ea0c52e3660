//! `tierctl find`: the files that a condition holds for.

use std::os::unix::ffi::OsStrExt;

use super::args::Args;
use super::format::some;
use super::{PROGRAM, connect};
use crate::control::model::Found;
use crate::control::path::PathText;
use crate::control::search::FindParameters;
use crate::output::{self, Exit};

/// Prints paths, one in a line (or ended by a NUL), as bytes; or JSON, one file in a line. As with
/// find(1), finding nothing is no failure.
pub(super) fn run(args: &Args, expression: &str, null: bool) -> anyhow::Result<Exit> {
    let asked = FindParameters {
        expression: expression.to_owned(),
        columns: args.json,
    };
    let mut pathless = 0;
    let end = if null { 0 } else { b'\n' };
    let printed = connect(args)?.find(&asked, &mut |found: Found| {
        pathless = found.pathless;
        for file in &found.files {
            output::json_line(file)?;
        }
        output::bytes(&lines(&found.paths, end))
    })?;
    printed?;
    if pathless > 0 && !args.json {
        output::note(
            PROGRAM,
            &format!(
                "{} more without a path below the mount point: --json names them by their numbers",
                some(pathless, "file", "files")
            ),
        );
    }
    Ok(Exit::Done)
}

fn lines(paths: &[PathText], end: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    for path in paths {
        if let Some(path) = path.exact() {
            bytes.extend_from_slice(path.as_os_str().as_bytes());
            bytes.push(end);
        }
    }
    bytes
}
