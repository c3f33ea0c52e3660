//! The manual page and the completions, made from the command line's description.
//!
//! man/replay.1 is the page as this program makes it: options from clap, the other sections from
//! `sections.roff` beside this file. A test compares the two; `HSM_BLESS=1` makes it write the page.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::{Cli, Directories};

const SECTIONS: &str = include_str!("sections.roff");

/// The page.
pub fn manual() -> anyhow::Result<Vec<u8>> {
    let man = clap_mangen::Man::new(Cli::command())
        .date("2026-01-01")
        .manual("Hierarchical storage")
        .source("hsmd");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    page.extend(SECTIONS.as_bytes());
    Ok(page)
}

/// Writes what is asked for.
pub fn generate(directories: &Directories) -> anyhow::Result<()> {
    if let Some(to) = &directories.man {
        write(&to.join("replay.1"), &manual()?)?;
    }
    if let Some(to) = &directories.completions {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            clap_complete::generate_to(shell, &mut Cli::command(), "replay", to)
                .with_context(|| format!("writing completions to {}", to.display()))?;
        }
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    std::fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manual_page_is_up_to_date() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../man/replay.1");
        let page = manual().unwrap();
        if std::env::var_os("HSM_BLESS").is_some() {
            write(&path, &page).unwrap();
        }
        let there = std::fs::read(&path).unwrap_or_default();
        assert!(
            there == page,
            "man/replay.1 is not what the program makes: run this test with HSM_BLESS=1"
        );
    }
}
