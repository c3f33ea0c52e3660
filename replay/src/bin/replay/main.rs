//! `replay`: rebuilds a filesystem from the media alone. See replay(1).

mod cli;
mod docs;
mod output;

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use replay::materialise::Options;
use replay::replay::{Replay, Request};
use replay::report::{Collector, Findings};
use replay::state::Mode;

use cli::{Cli, Command};
use output::Output;

/// Something was asked that has a negative answer.
const NEGATIVE: u8 = 1;
/// Usage, or an error that ended the work.
const FAILED: u8 = 2;
/// Done, but for losses that were named.
const PARTLY: u8 = 3;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // RUST_LOG=replay=debug says when each step ends.
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    if let Some(Command::GenerateDocs(directories)) = &cli.command {
        return match docs::generate(directories) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => Output::new(false).error(&error, FAILED),
        };
    }
    let output = Output::new(cli.json);
    match run(&cli, &output) {
        Ok(code) => ExitCode::from(code),
        Err(error) => output.error(&error, FAILED),
    }
}

fn run(cli: &Cli, output: &Output) -> anyhow::Result<u8> {
    let begun = Instant::now();
    let request = Request {
        from: cli.from.clone(),
        until: cli.until,
        path: cli
            .path
            .as_ref()
            .map(|path| path.as_os_str().as_bytes().to_vec()),
        mode: if cli.stubs { Mode::Stubs } else { Mode::Whole },
        scratch: Some(scratch(cli)),
    };
    // What can be refused at once is refused before the log is read.
    if let (Some(to), false, false) = (&cli.to, cli.list, cli.verify) {
        replay::materialise::open(to, request.mode, None)?;
    }
    let progress = Output::progress();
    let found = Collector::new(&progress);
    let replay = Replay::prepare(&request, &found)?;
    if cli.list {
        let needs = replay.needs_by_place()?;
        let tree = replay.counts();
        progress.clear();
        output.list(&replay, tree, &needs, &found.finish());
        return Ok(0);
    }
    let Some(to) = &cli.to else {
        bail!("where to restore is not given: name an empty directory with --to");
    };
    if cli.verify {
        let verified = replay
            .verify(to, &found)
            .with_context(|| format!("comparing {} with the log", to.display()))?;
        progress.clear();
        let found = found.finish();
        output.verified(&replay, verified, &found, begun.elapsed());
        return Ok(if found.losses_total == 0 { 0 } else { NEGATIVE });
    }
    let options = Options {
        sync_interval: Duration::from_millis(cli.sync_ms),
        ..Options::default()
    };
    let made = replay.materialise(to, options, &found)?;
    progress.clear();
    let found: Findings = found.finish();
    output.made(&replay, made, &found, begun.elapsed());
    Ok(if found.losses_total == 0 { 0 } else { PARTLY })
}

/// Where the temporary catalog lies: a tenth of the tree's metadata, so not in a small tmpfs.
fn scratch(cli: &Cli) -> PathBuf {
    let var_tmp = || Some(PathBuf::from("/var/tmp")).filter(|path| path.is_dir());
    cli.scratch
        .clone()
        .or_else(|| std::env::var_os("TMPDIR").map(PathBuf::from))
        .or_else(var_tmp)
        .unwrap_or_else(std::env::temp_dir)
}
