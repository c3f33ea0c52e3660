//! tierctl: asks the running daemon, or works on log and media where no daemon is needed.
//!
//! Each command has a module; what a command prints is a function of what was answered. Exit status:
//! 0 done, 1 the answer is no, 2 wrong usage or an error, 3 done in part.

pub mod args;
mod catalog;
mod du;
mod events;
mod find;
pub mod format;
mod history;
mod migrate;
mod needs;
mod pin;
mod policy;
mod progress;
mod queue;
mod space;
mod state;
pub mod status;
mod tier;
mod volume;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::CommandFactory;

use args::{
    Args, CatalogCommand, Command, LogCommand, PolicyCommand, QueueCommand, SyncTo, VolumeCommand,
};

use crate::cli::{self, Manual};
use crate::config::{Config, DEFAULT_PATH};
use crate::control::client::{Client, ClientError};
use crate::control::methods::PathParameters;
use crate::control::model::SyncRequest;
use crate::control::path::PathText;
use crate::output::{self, Exit};

/// The program's name in messages.
pub const PROGRAM: &str = "tierctl";

/// tierctl's manual.
pub const MANUAL: Manual = Manual {
    section: "1",
    sections: include_str!("tierctl.1.sections"),
};

/// Does what the command line says.
pub fn run(args: &Args) -> anyhow::Result<Exit> {
    match &args.command {
        Command::Status { check } => show_status(args, *check),
        Command::State { paths } => state::run(args, paths),
        Command::Release(files) => tier::release(args, files),
        Command::Recall(files) => tier::recall(args, files),
        Command::Migrate(files) => migrate::migrate(args, files),
        Command::Queue(QueueCommand::List) => queue::list(args),
        Command::Queue(QueueCommand::Cancel {
            paths,
            all: _,
            user,
        }) => queue::cancel(args, paths, user.as_deref()),
        Command::Sync { to, sweep } => sync(args, *to, *sweep),
        Command::Find { expression, null } => find::run(args, expression, *null),
        Command::Du {
            paths,
            depth,
            summarize,
        } => du::run(args, paths, if *summarize { 0 } else { *depth }),
        Command::Pin(pins) => pin::run(args, pins, true),
        Command::Unpin(pins) => pin::run(args, pins, false),
        Command::Policy(PolicyCommand::Check { file }) => policy::check(args, file),
        Command::Policy(PolicyCommand::Run { name, dry_run }) => {
            policy::run(args, name.as_deref(), *dry_run)
        }
        Command::Policy(PolicyCommand::Explain { path }) => policy::explain(args, path),
        Command::Log(LogCommand::List { path }) => history::list(args, path),
        Command::Log(LogCommand::Show { lsn }) => history::show(args, *lsn),
        Command::Log(LogCommand::Cat { path, at }) => history::cat(args, path, *at),
        Command::Volume(VolumeCommand::List) => volume::list(args),
        Command::Volume(VolumeCommand::Show { serial }) => volume::show(args, serial),
        Command::Volume(VolumeCommand::Verify { volume }) => volume::verify(args, volume),
        Command::Catalog(CatalogCommand::Rebuild) => catalog::rebuild(args),
        Command::Catalog(CatalogCommand::Digest) => catalog::digest(args),
        Command::Events => events::run(args),
        Command::Completions { shell } => {
            output::bytes(&cli::completions(&Args::command(), *shell))?;
            Ok(Exit::Done)
        }
        Command::GenerateDocs(docs) => {
            docs.write(&Args::command(), MANUAL)
                .context("writing the documents")?;
            Ok(Exit::Done)
        }
    }
}

/// The socket, from the command line or the configuration.
fn socket(args: &Args) -> anyhow::Result<PathBuf> {
    if let Some(socket) = &args.socket {
        return Ok(socket.clone());
    }
    match Config::load(&args.config) {
        Ok(config) => Ok(config.socket),
        Err(error) => {
            Err(error).context("where hsmd listens is not known (or name it with --socket)")
        }
    }
}

/// The daemon does not run.
#[derive(Debug, thiserror::Error)]
#[error("{error}; {advice}")]
struct Down {
    error: ClientError,
    advice: String,
}

/// A connection, or what to do about there being none.
fn connect(args: &Args) -> anyhow::Result<Client> {
    let socket = socket(args)?;
    Client::connect(&socket).map_err(|error| match error {
        error @ ClientError::Down { .. } => Down {
            error,
            advice: start_hint(&args.config),
        }
        .into(),
        error => error.into(),
    })
}

/// How the daemon is started.
fn start_hint(config: &Path) -> String {
    if config == Path::new(DEFAULT_PATH) {
        "start it with `systemctl start hsmd` (see `journalctl -u hsmd` for why it ended)"
            .to_owned()
    } else {
        format!("start it with `hsmd --config {}`", config.display())
    }
}

fn show_status(args: &Args, check: bool) -> anyhow::Result<Exit> {
    let status = connect(args)?.status()?;
    if args.json {
        output::json(&status)?;
    } else {
        output::text(&status::render(&status))?;
    }
    if check && status::verdict(&status).word == status::Word::NotSafe {
        return Ok(Exit::No);
    }
    Ok(Exit::Done)
}

fn sync(args: &Args, to: SyncTo, sweep: bool) -> anyhow::Result<Exit> {
    let request = SyncRequest {
        media: to == SyncTo::Media,
        sweep,
    };
    let mut client = connect(args)?;
    let place = match to {
        SyncTo::Spool => "durable in the spool",
        SyncTo::Media => "on every pool",
    };
    output::progress(&format_args!("waiting until everything is {place} ..."));
    let done = client.sync(request);
    output::clear();
    let done = done?;
    if args.json {
        output::json(&done)?;
    } else {
        let upto = done
            .lsn
            .map_or_else(String::new, |lsn| format!(", up to LSN {lsn}"));
        let waited = format::span(done.waited_ms);
        output::text(&format!(
            "everything that was changed before is {place}{upto} (waited {waited})\n"
        ))?;
    }
    Ok(Exit::Done)
}

/// A path as the daemon wants it: absolute, links resolved in all but the last name, which need not
/// exist (any more), nor the directories that it was in.
fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    let path =
        std::path::absolute(path).with_context(|| format!("{}: no such path", path.display()))?;
    let Some(name) = path.file_name() else {
        return path
            .canonicalize()
            .with_context(|| path.display().to_string());
    };
    let Some(parent) = path.parent() else {
        return Ok(path);
    };
    match parent.canonicalize() {
        Ok(parent) => Ok(parent.join(name)),
        // Gone, or not to be seen: as far up as necessary.
        Err(_) => Ok(absolute(parent)?.join(name)),
    }
}

fn path_parameters(path: &Path) -> anyhow::Result<PathParameters> {
    Ok(PathParameters {
        path: PathText::of_path(&absolute(path)?),
    })
}

#[cfg(test)]
mod tests;
