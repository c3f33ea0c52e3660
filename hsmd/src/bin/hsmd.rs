//! hsmd: watches a filesystem and logs every change of it.

use std::process::ExitCode;

use clap::Parser;
use hsmd::cli::{Hsmd, HsmdCommand};

fn main() -> ExitCode {
    let args = Hsmd::parse();
    match &args.command {
        None => hsmd::run::daemon(&args),
        Some(HsmdCommand::CheckConfig { config }) => {
            hsmd::run::check_config(config.as_ref().unwrap_or(&args.config))
        }
        Some(HsmdCommand::Guard(guard)) => hsmd::run::guard(&args, guard),
        Some(HsmdCommand::Worker(worker)) => hsmd::run::worker(&args, worker),
        Some(HsmdCommand::GenerateDocs(docs)) => match docs.write_hsmd() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                hsmd::output::error("hsmd", &format!("cannot write the documents: {error}"));
                ExitCode::from(2)
            }
        },
    }
}
