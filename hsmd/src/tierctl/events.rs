//! `tierctl events`: what the daemon does, as it does it.

use super::args::Args;
use super::connect;
use super::format::{name, size, some};
use crate::control::model::{Event, Severity};
use crate::output::{self, Exit};

/// Paths of one event that are shown to people; JSON has more.
const PATHS_SHOWN: usize = 5;

pub(super) fn run(args: &Args) -> anyhow::Result<Exit> {
    let mut client = connect(args)?;
    client.subscribe()?;
    while let Some(event) = client.next_event()? {
        if args.json {
            output::json_line(&event)?;
        } else {
            output::text(&render(&event))?;
        }
    }
    output::note(super::PROGRAM, &"hsmd has ended");
    Ok(Exit::Done)
}

fn word<T: serde::Serialize>(value: &T) -> String {
    let text = serde_json::to_value(value).unwrap_or_default();
    text.as_str().unwrap_or_default().replace('_', "-")
}

/// One line about an event.
pub(super) fn render(event: &Event) -> String {
    let text = match event {
        Event::Durable {
            time,
            lsn,
            paths,
            paths_total,
        } => {
            let shown: Vec<String> = paths
                .iter()
                .take(PATHS_SHOWN)
                .map(|path| name(path))
                .collect();
            let rest = paths_total.saturating_sub(shown.len() as u64);
            let more = if rest > 0 {
                format!(" and {rest} more")
            } else {
                String::new()
            };
            format!("{time} durable up to LSN {lsn}: {}{more}", shown.join(" "))
        }
        Event::Sealed {
            time,
            segment,
            bytes,
            ..
        } => {
            format!("{time} segment {segment} is sealed, {}", size(*bytes))
        }
        Event::Copied {
            time,
            pool,
            volume,
            segment,
            ..
        } => {
            format!("{time} segment {segment} is on volume {volume} of pool {pool}, read back")
        }
        Event::Volume {
            time,
            pool,
            volume,
            path,
            state,
        } => {
            let volume = volume.as_deref().unwrap_or("without a serial");
            format!(
                "{time} volume {volume} of pool {pool} at {} is {}",
                name(path),
                word(state)
            )
        }
        Event::Notice { time, notice } => {
            let severity = match notice.severity {
                Severity::Info => "note",
                Severity::Warning => "warning",
                Severity::Error => "error",
            };
            format!(
                "{time} {severity}: {}: {}; {}",
                notice.what, notice.why, notice.advice
            )
        }
        Event::Overflow { time, total } => {
            format!(
                "{time} the kernel's queue overflowed ({total} since the start): everything is compared again"
            )
        }
        Event::Sweep {
            time,
            finished: false,
            ..
        } => format!("{time} a sweep begins"),
        Event::Sweep {
            time, files, found, ..
        } => format!(
            "{time} a sweep looked at {} and found {}",
            some(*files, "file", "files"),
            some(*found, "change", "changes")
        ),
        Event::State { time, state } => format!("{time} hsmd is {}", word(state)),
        Event::Missed { count } => format!(
            "{} left out here: read faster",
            some(*count, "event is", "events are")
        ),
    };
    text.trim_end().to_owned() + "\n"
}
