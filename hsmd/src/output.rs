//! The only place of the programs that prints.
//!
//! Results go to standard output, everything else to standard error: errors, notes, and (only where
//! it is a terminal) progress. Whoever reads standard output may stop reading at any time.

#![allow(clippy::print_stdout, clippy::print_stderr)] // this is the output module

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use serde::Serialize;

/// How a program ends.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Exit {
    /// 0: done.
    Done,
    /// 1: the answer is no.
    No,
    /// 2: wrong usage or an error.
    Error,
    /// 3: done in part; the failures were repeated at the end.
    Partly,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(match exit {
            Exit::Done => 0,
            Exit::No => 1,
            Exit::Error => 2,
            Exit::Partly => 3,
        })
    }
}

/// Writes a text to standard output as it is.
pub fn text(text: &str) -> io::Result<()> {
    bytes(text.as_bytes())
}

/// Writes bytes to standard output.
pub fn bytes(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// Writes so many zeros to standard output.
pub fn zeros(mut count: u64) -> io::Result<()> {
    let zeros = [0; 8 * 1024];
    let mut out = io::stdout().lock();
    while count > 0 {
        let len = zeros
            .len()
            .min(usize::try_from(count).unwrap_or(usize::MAX));
        out.write_all(&zeros[..len])?;
        count -= len as u64;
    }
    out.flush()
}

/// Writes a value as JSON, indented, to standard output.
pub fn json<T: Serialize>(value: &T) -> io::Result<()> {
    let mut line = serde_json::to_string_pretty(value)?;
    line.push('\n');
    text(&line)
}

/// Writes a value as one line of JSON to standard output.
pub fn json_line<T: Serialize>(value: &T) -> io::Result<()> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    text(&line)
}

/// Says on standard error what went wrong.
pub fn error(program: &str, what: &dyn Display) {
    clear();
    // Nobody is left to tell where standard error is closed.
    let _ = writeln!(io::stderr().lock(), "{program}: error: {what}");
}

/// Says something else on standard error.
pub fn note(program: &str, what: &dyn Display) {
    clear();
    let _ = writeln!(io::stderr().lock(), "{program}: {what}");
}

/// A line on standard error, as it is.
pub fn aside(what: &dyn Display) {
    clear();
    let _ = writeln!(io::stderr().lock(), "{what}");
}

/// Shows how far something is, in one line that the next one replaces; only on a terminal.
pub fn progress(what: &dyn Display) {
    let mut err = io::stderr().lock();
    if err.is_terminal() {
        let _ = write!(err, "\r\x1b[K{what}");
        let _ = err.flush();
    }
}

/// Takes the line of [`progress`] away.
pub fn clear() {
    let mut err = io::stderr().lock();
    if err.is_terminal() {
        let _ = write!(err, "\r\x1b[K");
        let _ = err.flush();
    }
}

/// Whether standard error is a terminal, so that [`progress`] is seen.
pub fn shows_progress() -> bool {
    io::stderr().is_terminal()
}

/// Whether an error only says that nobody reads standard output any more.
pub fn is_closed(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<io::Error>();
        io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// Ends a program: prints its error, if there is one, with all its causes.
pub fn end(program: &str, result: anyhow::Result<Exit>) -> ExitCode {
    match result {
        Ok(exit) => exit.into(),
        Err(error) if is_closed(&error) => Exit::Done.into(),
        Err(failure) => {
            error(program, &chain(&failure));
            Exit::Error.into()
        }
    }
}

/// An error with its causes, each said once: most messages name their cause already.
fn chain(failure: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in failure.chain() {
        let cause = cause.to_string();
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[derive(Debug, thiserror::Error)]
    #[error("opening it: {0}")]
    struct Outer(#[source] io::Error);

    #[test]
    fn a_cause_is_said_once() {
        let inner = io::Error::other("the disk is gone");
        let failure: anyhow::Result<()> = Err(Outer(inner).into());
        let failure = failure.context("rebuilding").expect_err("it failed");
        assert_eq!(chain(&failure), "rebuilding: opening it: the disk is gone");
    }

    #[test]
    fn a_reader_that_went_away_is_no_error() {
        let failure = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert!(is_closed(&failure.context("printing")));
    }
}
