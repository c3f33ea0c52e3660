//! tierctl: asks hsmd, see tierctl(1).

use std::process::ExitCode;

use clap::Parser;
use hsmd::output;
use hsmd::tierctl::{self, PROGRAM, args::Args};

fn main() -> ExitCode {
    output::end(PROGRAM, tierctl::run(&Args::parse()))
}
