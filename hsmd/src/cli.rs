//! hsmd's command line, and the man pages and completions of both programs.
//!
//! A man page is made from the command line's own description, followed by sections written by hand;
//! man/ holds the result, and a test that it is up to date.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::{CommandFactory, Parser, Subcommand, ValueHint};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::config::DEFAULT_PATH;
use crate::tierctl::format::add;

/// Write every change of a filesystem to write-once media
#[derive(Debug, Parser)]
#[command(name = "hsmd", version, max_term_width = 100)]
pub struct Hsmd {
    /// The configuration, see hsmd.toml(5)
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH, value_hint = ValueHint::FilePath)]
    pub config: PathBuf,

    /// How much to say: error, warn, info, debug, trace, or a filter such as `hsmd::capture=debug`
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: String,

    /// Go on with the log on a filesystem that is neither the one it knows nor marked by replay;
    /// everything that differs becomes new transactions
    #[arg(long)]
    pub adopt_filesystem: bool,

    /// Go on where the log ends with this transaction (0: with none), though more was durable once:
    /// what came after it is lost
    #[arg(long, value_name = "LSN")]
    pub accept_loss_after: Option<u64>,

    /// Instead of running the daemon
    #[command(subcommand)]
    pub command: Option<HsmdCommand>,
}

/// Instead of running the daemon.
#[derive(Debug, Subcommand)]
pub enum HsmdCommand {
    /// Check the configuration and everything that it names, without changing anything
    CheckConfig {
        /// The configuration, see hsmd.toml(5)
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        config: Option<PathBuf>,
    },
    /// Answer accesses to released files (hsmd starts it)
    #[command(hide = true)]
    Guard(GuardArgs),
    /// Be the daemon under a guard (the guard starts it)
    #[command(hide = true)]
    Worker(WorkerArgs),
    /// Write man page and completions
    #[command(hide = true)]
    GenerateDocs(GenerateDocs),
}

/// What the keeper tells the guard.
#[derive(Debug, Clone, clap::Args)]
pub struct GuardArgs {
    /// The permission group's descriptor
    #[arg(long)]
    pub group_fd: i32,
    /// The notification group's descriptor
    #[arg(long)]
    pub events_fd: i32,
    /// The keeper's process
    #[arg(long)]
    pub keeper: i32,
    /// The filesystem's block device
    #[arg(long)]
    pub device: PathBuf,
    /// Where everybody sees it
    #[arg(long)]
    pub place: PathBuf,
    /// Accesses that wait for each user at most
    #[arg(long)]
    pub waiters_max: usize,
    /// Every access is asked about, not only opening
    #[arg(long)]
    pub pre_access: bool,
    /// A worker has run before: one that refuses to start (its predecessor may still be ending) is tried again
    #[arg(long)]
    pub again: bool,
    /// For the first worker
    #[arg(long)]
    pub adopt_filesystem: bool,
    /// For the first worker
    #[arg(long)]
    pub accept_loss_after: Option<u64>,
}

/// What the guard tells the worker.
#[derive(Debug, Clone, clap::Args)]
pub struct WorkerArgs {
    /// The permission group's descriptor
    #[arg(long)]
    pub group_fd: i32,
    /// The notification group's descriptor
    #[arg(long)]
    pub events_fd: i32,
    /// The link to the guard
    #[arg(long)]
    pub link_fd: i32,
    /// Every access is asked about, not only opening
    #[arg(long)]
    pub pre_access: bool,
}

/// Where the documents go.
#[derive(Debug, Clone, clap::Args)]
pub struct GenerateDocs {
    /// Directory of the man page
    #[arg(long, value_name = "DIR")]
    pub man: PathBuf,
    /// Directory of the completions
    #[arg(long, value_name = "DIR")]
    pub completions: PathBuf,
}

/// hsmd's manual.
pub const HSMD: Manual = Manual {
    section: "8",
    sections: include_str!("hsmd.8.sections"),
};

/// The parts of a man page that the command line does not say.
#[derive(Debug, Clone, Copy)]
pub struct Manual {
    /// Of the manual.
    pub section: &'static str,
    /// Roff source, appended to what clap gives.
    pub sections: &'static str,
}

impl GenerateDocs {
    /// Writes hsmd's.
    pub fn write_hsmd(&self) -> io::Result<()> {
        self.write(&Hsmd::command(), HSMD)
    }

    /// Writes a program's man page and its completions for bash, zsh and fish.
    pub fn write(&self, command: &clap::Command, manual: Manual) -> io::Result<()> {
        let name = command.get_name().to_owned();
        let page = format!("{name}.{}", manual.section);
        fs::write(self.man.join(page), man_page(command, manual)?)?;
        for (shell, file) in [
            (Shell::Bash, format!("{name}.bash")),
            (Shell::Zsh, format!("_{name}")),
            (Shell::Fish, format!("{name}.fish")),
        ] {
            fs::write(self.completions.join(file), completions(command, shell))?;
        }
        Ok(())
    }
}

/// A shell's completions for a program.
pub fn completions(command: &clap::Command, shell: Shell) -> Vec<u8> {
    let (mut command, mut bytes) = (command.clone(), Vec::new());
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, &mut command, name, &mut bytes);
    bytes
}

/// The man page: the command, each of its subcommands, and the sections written by hand.
pub fn man_page(command: &clap::Command, manual: Manual) -> io::Result<Vec<u8>> {
    let mut command = command.clone().disable_help_subcommand(true);
    command.build();
    let title = format!(
        ".TH {} {} \"\" \"hsmd {}\" \"hsmd\"\n",
        command.get_name(),
        manual.section,
        env!("CARGO_PKG_VERSION")
    );
    let mut page = title.into_bytes();
    let man = Man::new(command.clone());
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    let mut list = Vec::new();
    subcommands(&command, "", &mut list);
    if !list.is_empty() {
        page.extend_from_slice(b".SH COMMANDS\n");
        for (words, subcommand) in list {
            describe(&words, &subcommand, &mut page);
        }
    }
    page.extend_from_slice(manual.sections.as_bytes());
    Ok(page)
}

/// The leaves of the tree of commands, each with the words that call it.
fn subcommands(command: &clap::Command, before: &str, list: &mut Vec<(String, clap::Command)>) {
    for subcommand in command.get_subcommands().filter(|one| !one.is_hide_set()) {
        let words = format!("{before}{} ", subcommand.get_name());
        if subcommand.has_subcommands() {
            subcommands(subcommand, &words, list);
        } else {
            list.push((words.trim_end().to_owned(), subcommand.clone()));
        }
    }
}

/// One subcommand: how it is called, what it does, its own options.
fn describe(words: &str, command: &clap::Command, page: &mut Vec<u8>) {
    let mut call = format!("\\fB{}\\fR", roff(words));
    let own =
        |arg: &&clap::Arg| !arg.is_global_set() && !arg.is_hide_set() && arg.get_id() != "help";
    let arguments: Vec<&clap::Arg> = command.get_arguments().filter(own).collect();
    for arg in &arguments {
        let value = arg.get_value_names().and_then(|names| names.first());
        let value = value.map_or_else(String::new, |name| format!("\\fI{}\\fR", roff(name)));
        let several = if arg
            .get_num_args()
            .is_some_and(|range| range.max_values() > 1)
        {
            " ..."
        } else {
            ""
        };
        let takes_value = arg.get_action().takes_values();
        let shown = match arg.get_long() {
            Some(long) if takes_value => format!("[\\fB\\-\\-{}\\fR {value}]", roff(long)),
            Some(long) => format!("[\\fB\\-\\-{}\\fR]", roff(long)),
            None => format!("{value}{several}"),
        };
        call.push(' ');
        call.push_str(&shown);
    }
    let about = command
        .get_about()
        .map(ToString::to_string)
        .unwrap_or_default();
    let mut text = format!(".TP\n{call}\n{}\n", sentence(&about));
    for arg in arguments {
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let name = match (
            arg.get_long(),
            arg.get_value_names().and_then(|names| names.first()),
        ) {
            (Some(long), _) => format!("\\fB\\-\\-{}\\fR", roff(long)),
            (None, Some(name)) => format!("\\fI{}\\fR", roff(name)),
            (None, None) => continue,
        };
        add!(text, ".RS\n.TP\n{name}\n{}\n.RE\n", sentence(&help));
    }
    page.extend_from_slice(text.as_bytes());
}

/// A sentence for roff.
fn sentence(text: &str) -> String {
    let end = if text.ends_with(['?', '.', '!']) {
        ""
    } else {
        "."
    };
    format!("{}{end}", roff(text))
}

/// Plain text for roff.
fn roff(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

/// Whether a page in man/ is what the program would write; the message says how to make it so.
pub fn check_page(file: &Path, wanted: &[u8]) -> Result<(), String> {
    let found = fs::read(file).unwrap_or_default();
    if found == wanted {
        return Ok(());
    }
    Err(format!(
        "{} is not what the command line says: write it again with HSM_UPDATE=1 in the environment of this test",
        file.display()
    ))
}
