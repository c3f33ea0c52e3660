//! `tierctl pin` and `tierctl unpin`.

use super::args::{Args, PinArgs};
use super::format::{add, some};
use super::tier::{Batches, named};
use super::{PROGRAM, connect};
use crate::control::model::{PinsDone, SyncRequest};
use crate::control::policies::PinParameters;
use crate::output::{self, Exit};

pub(super) fn run(args: &Args, pins: &PinArgs, pinned: bool) -> anyhow::Result<Exit> {
    let paths = named(&pins.paths, pins.from_file.as_deref())?;
    let mut client = connect(args)?;
    if pins.wait && !pins.dry_run {
        let request = SyncRequest {
            media: false,
            sweep: false,
        };
        output::progress(&"waiting until everything is in the log ...");
        client.sync(request)?;
        output::clear();
    }
    let mut all = PinsDone::default();
    let mut ask = |paths| {
        let asked = PinParameters {
            paths,
            pinned,
            recursive: pins.recursive,
            dry_run: pins.dry_run,
        };
        let done = client.set_pins(&asked)?;
        all.changed += done.changed;
        all.unchanged += done.unchanged;
        all.lsn = done.lsn.or(all.lsn);
        all.failures.extend(done.failures);
        Ok(())
    };
    let mut batches = Batches::new(&mut ask);
    for path in &paths {
        batches.add(path)?;
    }
    batches.finish()?;
    if args.json {
        output::json(&all)?;
    } else {
        output::text(&render(&all, pinned, pins.dry_run))?;
    }
    for failure in &all.failures {
        output::error(PROGRAM, &failure.error);
    }
    let all_failed = all.failures.len() == paths.len();
    Ok(match (all.failures.is_empty(), all_failed) {
        (true, _) => Exit::Done,
        (false, true) => Exit::Error,
        (false, false) => Exit::Partly,
    })
}

fn render(done: &PinsDone, pinned: bool, dry_run: bool) -> String {
    let word = match (dry_run, pinned) {
        (false, true) => "pinned",
        (false, false) => "unpinned",
        (true, true) => "would pin",
        (true, false) => "would unpin",
    };
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
