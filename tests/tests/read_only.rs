//! Who reads through a mount that cannot be written to, reads all the same: what is written for him is written
//! elsewhere.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use hsm_tests::changes::noise;
use hsm_tests::loopfs::{Kind, must};
use hsm_tests::stubs::{assert_reads, is_marked, refused, release, release_soon, wait_whole};
use hsm_tests::system::Setup;

const BYTES: usize = 50_000;

fn mount(arguments: &[&str], paths: &[&Path]) {
    must(Command::new("mount").args(arguments).args(paths));
}

fn by_read_only_mounts(kind: Kind) {
    let mut system = Setup::new(kind).exposed().start();
    let [stub, whole, used] = ["stub", "whole", "used"].map(|name| system.at(name));
    for path in [&stub, &whole, &used] {
        fs::write(path, noise(1, BYTES)).expect("written");
    }
    system.sync_all();
    release(&system, &stub);
    let view = system.home().dir("view");
    mount(&["--bind"], &[system.root(), &view]);
    mount(&["-o", "remount,ro,bind"], &[&view]);
    let error = fs::write(view.join("new"), b"").expect_err("it cannot be written to");
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    assert_reads(&view.join("whole"), &noise(1, BYTES), "a whole file");
    assert_reads(&view.join("stub"), &noise(1, BYTES), "a released file");
    must(Command::new("umount").arg(&view));
    wait_whole(&stub);

    // Where nothing at all can be written, nothing can be released or recalled, and what was recalled before waits.
    system.sync_all();
    release(&system, &stub);
    release(&system, &used);
    let reader = File::open(&used).expect("recalled");
    mount(&["-o", "remount,ro"], &[system.root()]);
    assert_reads(&whole, &noise(1, BYTES), "a whole file");
    let error = fs::read(&stub).expect_err("nobody can write its bytes");
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{kind}: {error}");
    assert!(is_marked(&stub), "{kind}");
    let notices = system.status()["notices"].to_string();
    let told = notices.contains("Read-only") && notices.contains(stub.to_str().expect("ASCII"));
    assert!(told, "{kind}: {notices}");
    refused(&system, &whole, "its filesystem is read-only");
    drop(reader);
    system.wait_for("what is recalled cannot be finished", |status| {
        let notices = status["notices"].to_string();
        notices.contains("recalled files can be read, but not changed")
    });
    assert_reads(&used, &noise(1, BYTES), "it is recalled");
    mount(&["-o", "remount,rw"], &[system.root()]);
    assert_reads(&stub, &noise(1, BYTES), "it can be written again");
    wait_whole(&used);
    system.wait_for("nothing is amiss", |status| {
        status["notices"].as_array().is_some_and(Vec::is_empty)
    });
    system.sync_all();
    release(&system, &whole);
    assert_reads(&whole, &noise(1, BYTES), "released afterwards");
    system.check(&format!("{kind}: read-only mounts"));

    // Stopping needs to write nothing there.
    system.sync_all();
    release_soon(&system, &stub);
    mount(&["-o", "remount,ro"], &[system.root()]);
    system.stop();
    system.start();
    assert_reads(&stub, &noise(1, BYTES), "it is writable again");
    system.check(&format!("{kind}: stopped while it was read-only"));
}

#[test]
fn who_reads_by_a_read_only_mount_of_ext4_gets_the_bytes() {
    by_read_only_mounts(Kind::Ext4);
}

#[test]
fn who_reads_by_a_read_only_mount_of_xfs_gets_the_bytes() {
    by_read_only_mounts(Kind::Xfs);
}

#[test]
fn who_reads_by_a_read_only_mount_of_btrfs_gets_the_bytes() {
    by_read_only_mounts(Kind::Btrfs);
}
