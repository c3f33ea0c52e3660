//! What the fixtures tell a person: the only place of this library that prints.

#![allow(clippy::print_stderr, clippy::print_stdout)] // a test's captured output goes there

use std::fmt::Arguments;

/// Prints one line on the standard error stream, as part of the test's output.
pub fn say(line: Arguments<'_>) {
    eprintln!("{line}");
}

/// Prints one line on the standard output stream, for the bench that reads it.
pub fn output(line: Arguments<'_>) {
    println!("{line}");
}
