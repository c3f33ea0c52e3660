//! tierctl's command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, Subcommand, ValueEnum, ValueHint};

use crate::config::DEFAULT_PATH;
use crate::control::when::When;

/// Ask the daemon hsmd: is my data safe, where is it, what was it before
#[derive(Debug, Parser)]
#[command(
    name = "tierctl",
    version,
    max_term_width = 100,
    subcommand_required = true
)]
pub struct Args {
    /// The daemon's configuration, which says where its socket is
    #[arg(long, global = true, value_name = "FILE", default_value = DEFAULT_PATH, value_hint = ValueHint::FilePath)]
    pub config: PathBuf,

    /// The daemon's socket; the configuration is not read then
    #[arg(long, global = true, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub socket: Option<PathBuf>,

    /// Print JSON, whose keys do not change their meaning from version to version
    #[arg(long, global = true)]
    pub json: bool,

    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Is my data safe, and if not, what do I do?
    Status {
        /// End with status 1 unless the answer is SAFE or CATCHING UP, for monitoring
        #[arg(long)]
        check: bool,
    },
    /// The state of files: in the log, on which copies, verified when
    State {
        /// Files, directories, anything on the watched filesystem
        #[arg(required = true, value_name = "PATH", value_hint = ValueHint::AnyPath)]
        paths: Vec<PathBuf>,
    },
    /// Give the disk space of files back that are on every copy; who opens one gets its data
    Release(Files),
    /// Bring the data of released files back to the disk
    Recall(Files),
    /// Make sure that files are on every copy
    Migrate(Files),
    /// What recall has to do: who waits for which file, and which volumes that needs
    #[command(subcommand)]
    Queue(QueueCommand),
    /// Wait until everything that was changed before is safe
    Sync {
        /// How safe: in the spool, or on the volumes of every pool too
        #[arg(long, value_name = "WHERE", default_value = "spool")]
        to: SyncTo,
        /// Look for changes that raise no event (mmap, chattr) too
        #[arg(long)]
        sweep: bool,
    },
    /// Print the files that a condition holds for
    #[command(
        after_help = "EXPRESSION is an SQL expression over the columns of a file, see hsm-policy(5)"
    )]
    Find {
        /// Such as "size > mib(100) and age(atime) > days(30) and path glob 'video/*'"
        #[arg(value_name = "EXPRESSION")]
        expression: String,
        /// End each path with a NUL instead of a newline, for xargs -0
        #[arg(long, short = '0', conflicts_with = "json")]
        null: bool,
    },
    /// How much lies below directories, on disk and released
    Du {
        /// Files or directories; the current directory, if none is given
        #[arg(value_name = "PATH", value_hint = ValueHint::AnyPath)]
        paths: Vec<PathBuf>,
        /// Show the directories so far below them too
        #[arg(long, short, value_name = "N", default_value_t = 1)]
        depth: u64,
        /// Show only the sums
        #[arg(long, short, conflicts_with = "depth")]
        summarize: bool,
    },
    /// Keep files on disk: what is pinned is never released
    Pin(PinArgs),
    /// Let files be released again
    Unpin(PinArgs),
    /// The rules that release, recall, migrate and pin files
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// The history of files
    #[command(subcommand)]
    Log(LogCommand),
    /// The media
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// The database that is derived from the log
    #[command(subcommand)]
    Catalog(CatalogCommand),
    /// Follow what the daemon does; with --json one object a line
    Events,
    /// Print a shell's completions
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Write man page and completions
    #[command(hide = true)]
    GenerateDocs(crate::cli::GenerateDocs),
}

/// Which files, and how.
#[derive(Debug, Clone, clap::Args)]
pub struct Files {
    /// Files on the watched filesystem
    #[arg(value_name = "PATH", value_hint = ValueHint::AnyPath, required_unless_present = "from_file")]
    pub paths: Vec<PathBuf>,
    /// Everything below directories, too
    #[arg(long, short)]
    pub recursive: bool,
    /// Paths from a file, one in each line, or with NUL between them if there is one (- for standard input)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub from_file: Option<PathBuf>,
    /// Wait until the files are there (recall), or on every copy first (release); migrate always waits
    #[arg(long)]
    pub wait: bool,
    /// Only say what would be done
    #[arg(long)]
    pub dry_run: bool,
}

/// The queue of recalls.
#[derive(Debug, Subcommand)]
pub enum QueueCommand {
    /// Files that are wanted, who waits for them, the volumes that they need, and what went wrong
    List,
    /// Do not fetch files: who waits for one gets an error at once, and it stays released
    Cancel {
        /// Released files on the watched filesystem
        #[arg(value_name = "PATH", value_hint = ValueHint::FilePath, required_unless_present_any = ["all", "user"], conflicts_with = "all")]
        paths: Vec<PathBuf>,
        /// All files
        #[arg(long)]
        all: bool,
        /// Only what this user (a name or a number) waits for; of all files, if none is named
        #[arg(long, value_name = "USER", value_hint = ValueHint::Username)]
        user: Option<String>,
    },
}

/// How safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SyncTo {
    /// Durable on the spool's disk
    Spool,
    /// On the volumes of every pool too, read back
    Media,
}

/// Of pin and unpin.
#[derive(Debug, clap::Args)]
pub struct PinArgs {
    /// Files on the watched filesystem
    #[arg(value_name = "PATH", value_hint = ValueHint::AnyPath, required_unless_present = "from_file")]
    pub paths: Vec<PathBuf>,
    /// All files that are below the directories among them now
    #[arg(long, short)]
    pub recursive: bool,
    /// Paths from a file, one in each line, or with NUL between them if there is one (- for standard input)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub from_file: Option<PathBuf>,
    /// First wait until everything that was changed before is in the log: only what is in the log can be pinned
    #[arg(long)]
    pub wait: bool,
    /// Only say what would be done
    #[arg(long)]
    pub dry_run: bool,
}

/// Policies.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Check a policy file; needs no daemon and changes nothing
    Check {
        /// The file, see hsm-policy(5)
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Run the rules now, those with watermarks if the filesystem is full enough
    Run {
        /// Only this rule, whatever its triggers are
        name: Option<String>,
        /// Only say what would be done, and why
        #[arg(long)]
        dry_run: bool,
    },
    /// Which rules are about a file, and which part of their conditions decides
    Explain {
        /// A file on the watched filesystem
        #[arg(value_name = "PATH", value_hint = ValueHint::FilePath)]
        path: PathBuf,
    },
}

/// The history of files.
#[derive(Debug, Subcommand)]
pub enum LogCommand {
    /// The versions of a path, also of one that is deleted
    List {
        /// As it is or was named on the watched filesystem
        #[arg(value_hint = ValueHint::AnyPath)]
        path: PathBuf,
    },
    /// What a transaction did
    Show {
        /// Its number
        lsn: u64,
    },
    /// Print what a file contained, every byte checked against the log's hashes
    Cat {
        /// As it was named on the watched filesystem
        #[arg(value_hint = ValueHint::FilePath)]
        path: PathBuf,
        /// At which transaction, or time such as 2026-11-20T17:00:00Z; now, if not given
        #[arg(long, value_name = "LSN|TIME")]
        at: Option<Moment>,
    },
}

/// The media.
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// All volumes of all pools
    List,
    /// One volume
    Show {
        /// Its serial number
        serial: String,
    },
    /// Read all of a volume back and compare it with its inventory
    Verify {
        /// Its serial number, or the directory where it is; the latter also works without the daemon
        #[arg(value_name = "SERIAL|PATH", value_hint = ValueHint::DirPath)]
        volume: String,
    },
}

/// The database that is derived from the log.
#[derive(Debug, Subcommand)]
pub enum CatalogCommand {
    /// Make the catalog anew from spool and volumes alone; only while hsmd does not run
    Rebuild,
    /// Print the digest of the catalog's logical tables: equal logs give equal digests
    Digest,
}

/// When.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// At the end of this transaction.
    Lsn(u64),
    /// At the last transaction that is not later.
    Time(When),
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(lsn) = text.parse() {
            return Ok(Self::Lsn(lsn));
        }
        text.parse().map(Self::Time).map_err(|_| {
            "give a transaction's number, or a time like 2026-11-20T17:00:00Z".to_owned()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn moments_are_numbers_or_times() {
        assert_eq!("1042".parse(), Ok(Moment::Lsn(1042)));
        let time = "2026-11-20T17:00:00Z".parse::<When>().unwrap();
        assert_eq!("2026-11-20T18:00:00+01:00".parse(), Ok(Moment::Time(time)));
        assert!("yesterday".parse::<Moment>().is_err());
    }
}
