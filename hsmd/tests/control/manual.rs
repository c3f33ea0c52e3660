//! The man pages in man/ are what the programs would write.

use std::path::PathBuf;

use clap::CommandFactory;
use hsmd::cli::{self, Hsmd, Manual, check_page, man_page};
use hsmd::tierctl::{self, args::Args};

fn check(name: &str, command: &clap::Command, manual: Manual) {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../man")
        .join(name);
    let page = man_page(command, manual).unwrap();
    if std::env::var_os("HSM_UPDATE").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    check_page(&file, &page).unwrap();
}

#[test]
fn the_man_pages_are_up_to_date() {
    check("tierctl.1", &Args::command(), tierctl::MANUAL);
    check("hsmd.8", &Hsmd::command(), cli::HSMD);
}

#[test]
fn every_command_is_in_its_manual() {
    let page = String::from_utf8(man_page(&Args::command(), tierctl::MANUAL).unwrap()).unwrap();
    for words in [
        "status",
        "state",
        "sync",
        "log list",
        "log show",
        "log cat",
        "volume verify",
        "catalog rebuild",
        "catalog digest",
        "events",
        "find",
        "du",
        "pin",
        "unpin",
        "policy check",
        "policy run",
        "policy explain",
    ] {
        assert!(page.contains(&format!("\\fB{words}\\fR")), "{words}");
    }
    assert!(!page.contains("generate"));
}

#[test]
fn documents_are_written_for_packagers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    for program in [env!("CARGO_BIN_EXE_tierctl"), env!("CARGO_BIN_EXE_hsmd")] {
        let status = std::process::Command::new(program)
            .args(["generate-docs", "--man", path, "--completions", path])
            .status()
            .unwrap();
        assert!(status.success(), "{program}");
    }
    for name in [
        "tierctl.1",
        "tierctl.bash",
        "_tierctl",
        "tierctl.fish",
        "hsmd.8",
        "hsmd.bash",
        "_hsmd",
        "hsmd.fish",
    ] {
        assert!(
            dir.path().join(name).metadata().unwrap().len() > 100,
            "{name}"
        );
    }
}
