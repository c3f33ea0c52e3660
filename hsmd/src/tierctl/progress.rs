//! How far a long command is: a line that changes on a terminal, a line now and then elsewhere.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::PROGRAM;
use super::args::Args;
use super::format::{percent, size};
use crate::output;

/// How often a line is written where standard error is no terminal.
const LINES: Duration = Duration::from_secs(5);
/// The same for programs.
const JSON_LINES: Duration = Duration::from_secs(1);

/// What `--json` writes to standard error, an object a line.
#[derive(Serialize)]
struct Line {
    progress: Figures,
}

#[derive(Serialize)]
struct Figures {
    files: u64,
    files_total: u64,
    bytes: u64,
    bytes_total: u64,
    bytes_per_s: u64,
}

/// Counts towards a known end.
pub(super) struct Progress {
    /// "recalled", "on every pool".
    word: &'static str,
    total: (u64, u64),
    json: bool,
    begun: Instant,
    said: Instant,
}

impl Progress {
    /// Towards so many files and bytes.
    pub(super) fn new(args: &Args, word: &'static str, total: (u64, u64)) -> Self {
        let now = Instant::now();
        Self {
            word,
            total,
            json: args.json,
            begun: now,
            said: now,
        }
    }

    /// So many files and bytes are done.
    pub(super) fn show(&mut self, files: u64, bytes: u64) {
        let (files_total, bytes_total) = self.total;
        let millis = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let bytes_per_s = bytes.saturating_mul(1000) / millis.max(1);
        let line = format!(
            "{} {files} of {files_total} files, {} of {} ({}), {}/s",
            self.word,
            size(bytes),
            size(bytes_total),
            percent(bytes, bytes_total.max(1)),
            size(bytes_per_s)
        );
        if output::shows_progress() {
            return output::progress(&line);
        }
        if self.said.elapsed() < if self.json { JSON_LINES } else { LINES } {
            return;
        }
        self.said = Instant::now();
        if !self.json {
            return output::note(PROGRAM, &line);
        }
        let progress = Figures {
            files,
            files_total,
            bytes,
            bytes_total,
            bytes_per_s,
        };
        if let Ok(line) = serde_json::to_string(&Line { progress }) {
            output::aside(&line);
        }
    }
}
