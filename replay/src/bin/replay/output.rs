//! Everything that the program prints: results on standard output, the rest on standard error.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use replay::materialise::Made;
use replay::moment::rfc3339;
use replay::replay::{PlaceNeeds, Replay};
use replay::report::{Findings, Loss, Lost, Stage, Watch, printable};
use replay::state::Mode;
use replay::verify::Verified;
use serde_json::{Value, json};
use tierfs::catalog::Counts;

/// What must happen to a tree of stubs before anybody reads it.
const BEFORE_USE: &str = "do not use this filesystem before hsmd exposes it: until then stubs read as zeros. \
    Unmount it now, name its device in hsmd.toml (device = ...) and start hsmd, which mounts it; see hsm(7)";

/// Text or JSON.
pub struct Output {
    json: bool,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// A progress bar on a terminal; warnings and losses as they are met.
    pub fn progress() -> Progress {
        Progress {
            bar: Mutex::new(None),
            visible: std::io::stderr().is_terminal(),
        }
    }

    pub fn error(&self, error: &anyhow::Error, code: u8) -> ExitCode {
        eprintln!("replay: {error:#}");
        if self.json {
            print(&json!({ "error": format!("{error:#}") }));
        }
        ExitCode::from(code)
    }

    pub fn made(&self, replay: &Replay, made: Made, found: &Findings, took: Duration) {
        if self.json {
            let mut object = head(replay, found);
            object["directories"] = made.directories.into();
            object["files"] = made.files.into();
            object["bytes"] = made.bytes.into();
            object["frames"] = made.frames.into();
            object["stubs"] = made.stubs.into();
            object["stub_bytes"] = made.stub_bytes.into();
            object["resumed"] = made.resumed.into();
            object["fuzzy"] = found.fuzzy.iter().map(|path| path_json(path)).collect();
            object["fuzzy_total"] = found.fuzzy_total.into();
            object["losses"] = found.losses.iter().map(loss_json).collect();
            object["losses_total"] = found.losses_total.into();
            object["seconds"] = took.as_secs_f64().into();
            if replay.mode() == Mode::Stubs {
                object["before_use"] = BEFORE_USE.into();
            }
            print(&object);
            return;
        }
        if found.fuzzy_total > 0 {
            println!(
                "{} logged while being written, bytes may be of different moments:",
                count(found.fuzzy_total, "file was", "files were")
            );
            found
                .fuzzy
                .iter()
                .for_each(|path| println!("  {}", printable(path)));
            rest(found.fuzzy_total, found.fuzzy.len());
        }
        println!(
            "{}restored {} and {} ({}) {} in {:.1} s",
            if made.resumed { "continued and " } else { "" },
            count(made.files, "file", "files"),
            count(made.directories, "directory", "directories"),
            HumanBytes(made.bytes),
            moment(replay),
            took.as_secs_f64()
        );
        if found.losses_total > 0 {
            println!(
                "{} not restored:",
                count(found.losses_total, "thing was", "things were")
            );
            found.losses.iter().for_each(|loss| println!("  {loss}"));
            rest(found.losses_total, found.losses.len());
        }
        if made.stubs > 0 {
            println!(
                "{} of them stubs: their content ({}) is in the log only",
                HumanCount(made.stubs),
                HumanBytes(made.stub_bytes)
            );
        }
        // Also where an earlier run made them all.
        if replay.mode() == Mode::Stubs {
            println!("{BEFORE_USE}");
        }
    }

    pub fn verified(&self, replay: &Replay, done: Verified, found: &Findings, took: Duration) {
        if self.json {
            let mut object = head(replay, found);
            object["entries"] = done.entries.into();
            object["bytes"] = done.bytes.into();
            object["released"] = done.released.into();
            object["released_bytes"] = done.released_bytes.into();
            object["differences"] = found.losses.iter().map(loss_json).collect();
            object["differences_total"] = found.losses_total.into();
            object["seconds"] = took.as_secs_f64().into();
            print(&object);
            return;
        }
        found.losses.iter().for_each(|loss| println!("{loss}"));
        rest(found.losses_total, found.losses.len());
        println!(
            "compared {} ({}) with the log {}: {}",
            count(done.entries, "entry", "entries"),
            HumanBytes(done.bytes),
            moment(replay),
            match found.losses_total {
                0 => "equal".to_owned(),
                total => count(total, "difference", "differences"),
            }
        );
        if done.released > 0 {
            println!(
                "{} released ({}): compared by mark, size and time; the content is in the log only",
                count(done.released, "file is", "files are"),
                HumanBytes(done.released_bytes)
            );
        }
    }

    pub fn list(&self, replay: &Replay, tree: Counts, needs: &[PlaceNeeds], found: &Findings) {
        let missing = replay.sources.missing();
        if self.json {
            let mut object = head(replay, found);
            object["files"] = tree.files.into();
            object["bytes"] = tree.bytes.into();
            object["missing_segments"] = missing.iter().map(|segment| segment.get()).collect();
            object["places"] = needs.iter().map(place_json).collect();
            print(&object);
            return;
        }
        println!("log {} {}", replay.sources.log_id(), moment(replay));
        println!(
            "the tree has {}, {}",
            count(tree.files, "file", "files"),
            HumanBytes(tree.bytes)
        );
        for need in needs {
            if replay.mode() == Mode::Stubs {
                println!(
                    "{}: {} to read of {} with transactions, no content",
                    need.place,
                    HumanBytes(need.metadata_bytes),
                    count(need.segments, "segment", "segments"),
                );
                continue;
            }
            println!(
                "{}: {} ({}) to read, content from {} of them ({})",
                need.place,
                count(need.segments, "segment", "segments"),
                HumanBytes(need.segment_bytes),
                need.needed.len(),
                HumanBytes(need.content_bytes)
            );
        }
        if !missing.is_empty() {
            println!(
                "{} on none of the places given{}",
                replay::error::missing_list(&missing),
                match replay.mode() {
                    Mode::Whole => "",
                    Mode::Stubs => "; no transaction up to that moment is in them",
                }
            );
        }
    }
}

/// "as of transaction 12 (2026-01-31T12:00:00Z; the log's last is 40)".
fn moment(replay: &Replay) -> String {
    let mut text = format!("as of transaction {}", replay.at);
    let time = replay.time.map(rfc3339).unwrap_or_default();
    let _ = if replay.at == replay.last {
        write!(text, " ({time}, the log's last)")
    } else {
        write!(text, " ({time}; the log's last is {})", replay.last)
    };
    text
}

fn count(number: u64, one: &str, many: &str) -> String {
    format!(
        "{} {}",
        HumanCount(number),
        if number == 1 { one } else { many }
    )
}

fn rest(total: u64, shown: usize) {
    let shown = shown as u64;
    if total > shown {
        println!(
            "  and {} more, which stand above",
            HumanCount(total - shown)
        );
    }
}

fn head(replay: &Replay, found: &Findings) -> Value {
    json!({
        "log_id": replay.sources.log_id().to_string(),
        "at": replay.at.get(),
        "time": replay.time.map(rfc3339),
        "last": replay.last.get(),
        "warnings": found.warnings,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn path_json(path: &[u8]) -> Value {
    let mut object = json!({ "path": String::from_utf8_lossy(path) });
    if std::str::from_utf8(path).is_err() {
        object["path_hex"] = hex(path).into();
    }
    object
}

fn loss_json(loss: &Loss) -> Value {
    let mut object = path_json(&loss.path);
    let (kind, why) = match &loss.what {
        Lost::Entry { why } => ("entry", why.as_str()),
        Lost::Bytes { why, .. } => ("bytes", why.as_str()),
        Lost::Attribute { why, .. } => ("attribute", why.as_str()),
        Lost::Name { why } => ("name", why.as_str()),
        Lost::Tail { why } => ("tail", why.as_str()),
        Lost::Unrestorable { what } => ("unrestorable", what.as_str()),
        Lost::Differs { how } => ("differs", how.as_str()),
    };
    object["kind"] = kind.into();
    object["why"] = why.into();
    match &loss.what {
        Lost::Bytes { offset, len, .. } => {
            object["offset"] = (*offset).into();
            object["len"] = (*len).into();
        }
        Lost::Attribute { what, .. } => object["attribute"] = what.as_str().into(),
        _ => {}
    }
    object
}

fn place_json(need: &PlaceNeeds) -> Value {
    json!({
        "place": need.path.to_string_lossy(),
        "serial": need.serial,
        "segments": need.segments,
        "segment_bytes": need.segment_bytes,
        "metadata_bytes": need.metadata_bytes,
        "content_segments": need.needed.iter().map(|segment| segment.get()).collect::<Vec<_>>(),
        "content_bytes": need.content_bytes,
    })
}

/// Standard output may be a pipe that nobody reads any more: that ends nothing.
fn print(object: &Value) {
    let _ = writeln!(std::io::stdout(), "{object}");
}

/// Progress on standard error.
pub struct Progress {
    bar: Mutex<Option<ProgressBar>>,
    visible: bool,
}

impl Progress {
    fn with(&self, act: impl FnOnce(&mut Option<ProgressBar>)) {
        act(&mut self
            .bar
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    /// Takes the bar away, before the result is printed.
    pub fn clear(&self) {
        self.with(|bar| {
            if let Some(bar) = bar.take() {
                bar.finish_and_clear();
            }
        });
    }

    fn say(&self, text: &str) {
        self.with(|bar| match bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        });
    }
}

impl Watch for Progress {
    fn begin(&self, stage: Stage, total: Option<u64>) {
        if !self.visible {
            return;
        }
        let (name, unit) = match stage {
            Stage::Fold => ("reading the log", "{pos}/{len} segments"),
            Stage::Names => ("making names", "{pos}/{len}"),
            Stage::Content => (
                "restoring content",
                "{bytes}/{total_bytes} {bytes_per_sec} {eta}",
            ),
            Stage::Directories => ("finishing directories", "{pos}"),
            Stage::Sync => ("syncing", ""),
            Stage::Verify => ("comparing", "{pos}/{len}"),
        };
        let fresh = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        let bar = if total.is_some() {
            "{wide_bar}"
        } else {
            "{spinner}"
        };
        if let Ok(style) = ProgressStyle::with_template(&format!("{name:22} {bar} {unit}")) {
            fresh.set_style(style);
        }
        fresh.enable_steady_tick(Duration::from_millis(200));
        self.with(|bar| {
            if let Some(old) = bar.replace(fresh) {
                old.finish_and_clear();
            }
        });
    }

    fn advance(&self, by: u64) {
        if self.visible {
            self.with(|bar| {
                if let Some(bar) = bar {
                    bar.inc(by);
                }
            });
        }
    }

    fn loss(&self, loss: &Loss) {
        self.say(&loss.to_string());
    }

    fn warning(&self, text: &str) {
        self.say(&format!("warning: {text}"));
    }
}
