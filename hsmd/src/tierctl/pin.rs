//! `tierctl pin` and `tierctl unpin`.

use super::args::{Args, PinArgs};
use super::format::{add, some};
use super::{PROGRAM, absolute, connect};
use crate::control::model::PinsDone;
use crate::control::path::PathText;
use crate::control::policies::PinParameters;
use crate::output::{self, Exit};

pub(super) fn run(args: &Args, pins: &PinArgs, pinned: bool) -> anyhow::Result<Exit> {
    let paths = pins
        .paths
        .iter()
        .map(|path| Ok(PathText::of_path(&absolute(path)?)))
        .collect::<anyhow::Result<_>>()?;
    let asked = PinParameters {
        paths,
        pinned,
        recursive: pins.recursive,
    };
    let done = connect(args)?.set_pins(&asked)?;
    if args.json {
        output::json(&done)?;
    } else {
        output::text(&render(&done, pinned))?;
    }
    for failure in &done.failures {
        output::error(PROGRAM, &failure.error);
    }
    let all_failed = done.failures.len() == pins.paths.len();
    Ok(match (done.failures.is_empty(), all_failed) {
        (true, _) => Exit::Done,
        (false, true) => Exit::Error,
        (false, false) => Exit::Partly,
    })
}

fn render(done: &PinsDone, pinned: bool) -> String {
    let word = if pinned { "pinned" } else { "unpinned" };
    let mut text = format!("{word} {}", some(done.changed, "file", "files"));
    if let Some(lsn) = done.lsn {
        add!(text, " (LSN {lsn}, durable)");
    }
    if done.unchanged > 0 {
        add!(text, "; {} so before", some(done.unchanged, "was", "were"));
    }
    text.push('\n');
    text
}
