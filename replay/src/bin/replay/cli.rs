//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use replay::Moment;

/// Rebuild a filesystem from the media of its log
///
/// Reads the log from the volumes given, and nothing else: no daemon, no configuration, no catalog.
/// Every byte is checked before it is written. What cannot be restored is named.
#[derive(Parser, Debug)]
#[allow(clippy::struct_excessive_bools)] // switches of a command line
#[command(
    name = "replay",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,

    /// A volume, or a directory of segments (a spool); give several to have all segments, and
    /// another copy where one is damaged
    #[arg(long, value_name = "VOLUME", required = true, num_args = 1..)]
    pub from: Vec<PathBuf>,

    /// The directory to fill: an empty one, a fresh filesystem, or an unfinished replay
    #[arg(long, value_name = "DIRECTORY", required_unless_present = "list")]
    pub to: Option<PathBuf>,

    /// The moment: a transaction's number, or a time (2026-01-31T12:00:00Z; "2026-01-31 12:00" is
    /// local time)
    #[arg(
        long,
        value_name = "LSN|TIME",
        default_value = "end",
        hide_default_value = true
    )]
    pub until: Moment,

    /// Only this file or directory and what is below it; it keeps its path
    #[arg(long, value_name = "SUBTREE", allow_hyphen_values = true)]
    pub path: Option<PathBuf>,

    /// Names and attributes only: each file with data becomes a stub, whose content hsmd fetches when
    /// it is opened. --to must be the root of a filesystem of its own; see STUBS
    #[arg(long, conflicts_with = "verify")]
    pub stubs: bool,

    /// Say which volumes, segments and amounts are needed, and do nothing
    #[arg(long, conflicts_with = "verify")]
    pub list: bool,

    /// Compare the tree in --to with the log instead of writing it; stubs are compared by their marks
    #[arg(long)]
    pub verify: bool,

    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,

    /// How often what is written is synced, and can be continued from, in milliseconds
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 30_000)]
    pub sync_ms: u64,

    /// Where the temporary catalog is kept [default: $TMPDIR, else /var/tmp]
    #[arg(long, value_name = "DIRECTORY")]
    pub scratch: Option<PathBuf>,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Write the manual page and the shells' completions
    #[command(hide = true)]
    GenerateDocs(Directories),
}

/// Where the documents go.
#[derive(Args, Debug)]
pub struct Directories {
    /// For replay.1
    #[arg(long, value_name = "DIRECTORY")]
    pub man: Option<PathBuf>,
    /// For replay.bash, _replay and replay.fish
    #[arg(long, value_name = "DIRECTORY")]
    pub completions: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_is_needed_is_asked_for() {
        let parse = |arguments: &[&str]| Cli::try_parse_from(arguments.iter().copied());
        assert!(parse(&["replay"]).is_err());
        assert!(parse(&["replay", "--from", "a"]).is_err());
        assert!(parse(&["replay", "--from", "a", "--list"]).is_ok());
        assert!(parse(&["replay", "--from", "a", "--from", "b", "--to", "c"]).is_ok());
        assert!(parse(&["replay", "--from", "a", "--to", "c", "--until", "soon"]).is_err());
        assert!(parse(&["replay", "generate-docs", "--man", "d"]).is_ok());
    }
}
