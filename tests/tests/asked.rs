//! Everybody is asked about who could read a released file as zeros: from the first moment at which anybody can
//! reach the filesystem, wherever a stub is moved to, and whatever its mark is copied to.

use std::ffi::CStr;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::{Kind, must};
use hsm_tests::program::locate;
use hsm_tests::stubs::{assert_reads, is_marked, release, release_soon, wait_whole};
use hsm_tests::sys;
use hsm_tests::system::{Setup, System};
use hsm_tests::waiting::{Ends, text};

const BYTES: usize = 50_000;
const MARK: &CStr = c"trusted.hsm";
/// What has not happened by then never does.
const LIMIT: Duration = Duration::from_mins(1);

/// Has the daemon's program wait before each mark that it sets in the kernel.
fn slow_down_marks(system: &System) {
    let program = system.home().at("hsmd");
    fs::remove_file(&program).expect("the copy of hsmd");
    let strace = "strace -D -f --seccomp-bpf -o /dev/null -e trace=fanotify_mark \
        -e inject=fanotify_mark:delay_enter=200000";
    let real = locate("hsmd");
    let script = format!("#!/bin/sh\nexec {strace} {} \"$@\"\n", text(&real));
    fs::write(&program, script).expect("a script");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("a mode");
}

/// Programs that look for a file all the time find nothing, and then what is in it.
#[test]
fn nobody_reaches_a_stub_before_it_is_asked_about() {
    let mut system = Setup::new(Kind::Ext4).exposed().installed().start();
    let path = system.at("file");
    let content = noise(1, BYTES);
    fs::write(&path, &content).expect("written");
    system.sync_all();
    release(&system, &path);
    system.stop();
    slow_down_marks(&system);
    let (over, found) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let ends = Ends(&over);
        for _ in 0..3 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    match fs::read(&path) {
                        Ok(bytes) => {
                            let zeros = bytes.iter().all(|byte| *byte == 0);
                            assert!(bytes == content, "other bytes; zeros: {zeros}");
                            found.store(true, Ordering::Relaxed);
                        }
                        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOENT)),
                    }
                }
            });
        }
        system.start();
        let end = Instant::now() + LIMIT;
        while !found.load(Ordering::Relaxed) {
            assert!(Instant::now() < end, "nobody finds it");
            thread::sleep(Duration::from_millis(10));
        }
        drop(ends);
    });
    assert_reads(&path, &content, "afterwards");
}

/// Where every file is asked about, whole ones are ignored, one by one, and never all in a directory: a stub that is
/// moved in among them is none of them.
#[test]
fn a_stub_that_is_moved_among_whole_files_is_asked_about() {
    let setup = Setup::new(Kind::Ext4).with("stub_marks_max", "0");
    let system = setup.exposed().start();
    let (path, dir) = (system.at("file"), system.at("dir"));
    let content = noise(1, BYTES);
    fs::create_dir(&dir).expect("a directory");
    fs::write(&path, &content).expect("written");
    for number in 0..20 {
        fs::write(dir.join(number.to_string()), b"whole").expect("written");
    }
    system.sync_all();
    release(&system, &path);
    for _ in 0..3 {
        for number in 0..20 {
            let found = fs::read(dir.join(number.to_string())).expect("read");
            assert_eq!(found, b"whole");
        }
    }
    for to in [dir.join("moved"), dir.join("7")] {
        fs::rename(&path, &to).expect("moved");
        assert_reads(&to, &content, "where it was moved to");
        wait_whole(&to);
        fs::rename(&to, &path).expect("moved back");
        system.sync_all();
        release_soon(&system, &path);
    }
}

fn mark_of(path: &Path) -> Vec<u8> {
    let all = sys::xattrs(path).expect("its attributes");
    let mark = all.into_iter().find(|(name, _)| name == MARK.to_bytes());
    mark.expect("a mark").1
}

/// A mark that comes along with a copy of a file's attributes (`cp -a` and `rsync -X` of root do that) is not the
/// copy's own: the copy keeps its bytes, which are logged.
fn copied_marks(kind: Kind) {
    let system = Setup::new(kind).exposed().start();
    let path = system.at("file");
    let content = noise(1, BYTES);
    fs::write(&path, &content).expect("written");
    system.sync_all();
    release(&system, &path);
    let mark = mark_of(&path);
    // While it is in use it keeps its mark.
    let user = File::open(&path).expect("recalled");
    for (copy, words) in [("cp", &["cp", "-a"][..]), ("rsync", &["rsync", "-aX"])] {
        let mut command = Command::new(words[0]);
        must(command.args(&words[1..]).arg(&path).arg(system.at(copy)));
    }
    let other = system.at("other");
    fs::write(&other, noise(2, BYTES)).expect("written");
    sys::set_xattr(&other, MARK, &mark).expect("a mark");
    system.sync_all();
    for (name, seed) in [("cp", 1), ("rsync", 1), ("other", 2)] {
        assert_reads(&system.at(name), &noise(seed, BYTES), "a copy");
        let end = Instant::now() + LIMIT;
        while is_marked(&system.at(name)) {
            assert!(Instant::now() < end, "{kind}: {name} keeps the mark");
            thread::sleep(Duration::from_millis(20));
        }
    }
    drop(user);
    wait_whole(&path);
    system.check(&format!("{kind}: copied marks"));
}

#[test]
fn a_mark_that_was_copied_is_void_on_ext4() {
    copied_marks(Kind::Ext4);
}

#[test]
fn a_mark_that_was_copied_is_void_on_btrfs() {
    copied_marks(Kind::Btrfs);
}

/// The copy of a stub that was made without asking, by a program that reads the disk itself: what it reads as is
/// not what it is, so nobody reads it, and it is not logged.
#[test]
fn a_copy_of_a_stub_without_its_data_is_neither_read_nor_logged() {
    let system = Setup::new(Kind::Ext4).exposed().start();
    let (path, copy) = (system.at("file"), system.at("copy"));
    let content = noise(1, BYTES);
    fs::write(&path, &content).expect("written");
    system.sync_all();
    release(&system, &path);
    let file = File::create(&copy).expect("created");
    file.set_len(BYTES as u64).expect("extended");
    drop(file);
    sys::set_xattr(&copy, MARK, &mark_of(&path)).expect("a mark");
    system.sync_all();
    let error = fs::read(&copy).expect_err("it has no bytes of its own");
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!(is_marked(&copy));
    let state = system.tierctl(&["state", text(&copy)]);
    assert!(
        state.text().contains("its mark belongs to another"),
        "{state}"
    );
    assert_reads(&path, &content, "the original");
    fs::remove_file(&copy).expect("removed");
    system.check("a copy without data");
}
