//! A stub whose inode cannot be read looks as if it were deleted. It is not: nothing takes it off the list of
//! stubs, and when it can be read again it is guarded.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use hsm_tests::changes::noise;
use hsm_tests::loopfs::{Kind, must};
use hsm_tests::stubs::{assert_reads, is_marked, kib_on_disk, release};
use hsm_tests::system::{Setup, System};

const BYTES: usize = 50_000;
const BLOCK: u64 = 4096;

/// The block device that hsmd mounts.
fn device(system: &System) -> PathBuf {
    let text = system.config_text(&[]);
    let named = text.lines().find_map(|line| line.strip_prefix("device = "));
    PathBuf::from(named.expect("a device").trim_matches('"'))
}

/// Where on the device an inode of an ext4 lies.
fn place(device: &Path, name: &str) -> u64 {
    let mut debugfs = Command::new("debugfs");
    // Inode 12 is part of block group 0
    //     located at block 37, offset 0x0b00
    let told = must(debugfs.args(["-R", &format!("imap {name}")]).arg(device));
    let (_, told) = told.split_once("located at block ").expect("a place");
    let (block, offset) = told.split_once(", offset 0x").expect("block and offset");
    let block: u64 = block.parse().expect("a number");
    block * BLOCK + u64::from_str_radix(offset.trim(), 16).expect("a number")
}

/// Makes an inode unreadable, or readable again: it is not what its checksum says.
fn flip(device: &Path, place: u64) {
    /// Of the time of the last change.
    const CTIME: u64 = 0xc;
    let file = File::options().read(true).write(true).open(device);
    let file = file.expect("the device");
    let mut byte = [0];
    file.read_exact_at(&mut byte, place + CTIME).expect("read");
    file.write_all_at(&[byte[0] ^ 1], place + CTIME)
        .expect("written");
    file.sync_all().expect("synced");
}

#[test]
fn a_stub_that_cannot_be_read_for_a_while_stays_guarded() {
    let mut system = Setup::new(Kind::Ext4).exposed().start();
    let names = ["lost", "kept", "other"];
    for (number, name) in names.iter().enumerate() {
        fs::write(system.at(name), noise(number as u64, BYTES)).expect("written");
    }
    system.sync_all();
    for name in names {
        release(&system, &system.at(name));
    }
    let lsn = system.sync(&[]);
    system.stop();
    let device = device(&system);
    let lost = place(&device, names[0]);
    flip(&device, lost);

    system.start();
    let error = fs::read(system.at("lost")).expect_err("its inode is damaged");
    assert_ne!(error.raw_os_error(), Some(libc::ENOENT), "{error}");
    let status = system.wait_for("it is missed", |status| {
        let notices = status["notices"].to_string();
        notices.contains("their inodes cannot be read")
    });
    assert_eq!(status["released"]["files"], 3, "{status:#}");
    assert_eq!(status["released"]["every_file"], true, "{status:#}");
    assert_reads(
        &system.at("kept"),
        &noise(1, BYTES),
        "while another is lost",
    );
    // What the sweep cannot look at it tells, and ends with that.
    let _ = system.tierctl(&["sync", "--sweep"]);
    system.stop();
    flip(&device, lost);

    system.start();
    system.wait_for("only stubs are asked about", |status| {
        status["released"]["every_file"] == false
    });
    assert!(is_marked(&system.at("lost")), "it was recalled");
    assert!(kib_on_disk(&system.at("lost")) <= 4, "it was recalled");
    for (number, name) in names.iter().enumerate() {
        assert_reads(&system.at(name), &noise(number as u64, BYTES), "at the end");
    }
    system.check("an inode that could not be read for a while");
    for lsn in lsn + 1..=system.sync(&[]) {
        let shown = system.tierctl(&["log", "show", &lsn.to_string(), "--json"]);
        let shown = shown.done().json()["operations"].to_string();
        let gone = ["\"delete\"", "\"unlink\""]
            .iter()
            .any(|kind| shown.contains(kind));
        assert!(!gone, "LSN {lsn}: {shown}");
    }
}
