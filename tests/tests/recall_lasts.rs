//! What recall and release leave behind lasts: over restarts at the worst moment, and a loss of power.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use hsm_tests::loopfs::{Kind, must};
use hsm_tests::program::{locate, run};
use hsm_tests::strace::Tracer;
use hsm_tests::stubs::{
    assert_reads, is_marked, release, release_soon, wait_for_marks, wait_whole,
};
use hsm_tests::sys;
use hsm_tests::system::{Setup, System};
use hsm_tests::waiting::{
    bring_back, passing_reader, spool_empties, sum, take_away, wait_for_queue,
};

/// How long recalled files stay on the list of stubs at least, and some more.
const FORGOTTEN: Duration = Duration::from_secs(8);

fn start(kind: Kind) -> System {
    Setup::new(kind).exposed().start()
}

fn released_again(kind: Kind) {
    let mut system = start(kind);
    let path = system.at("file");
    let bytes = b"some bytes".repeat(1000);
    fs::write(&path, &bytes).expect("written");
    system.sync_all();
    release(&system, &path);
    assert_reads(&path, &bytes, "recalled");
    wait_whole(&path);
    release_soon(&system, &path);
    thread::sleep(FORGOTTEN);
    assert!(is_marked(&path), "it was recalled");
    system.kill_all();
    system.start();
    wait_for_marks(&system);
    assert_reads(&path, &bytes, "released again before it was off the list");
}

#[test]
fn what_is_released_again_at_once_stays_guarded_on_ext4() {
    released_again(Kind::Ext4);
}

#[test]
fn what_is_released_again_at_once_stays_guarded_on_xfs() {
    released_again(Kind::Xfs);
}

#[test]
fn a_recalled_program_runs_on_over_a_restart() {
    let system = start(Kind::Ext4);
    let path = system.at("program");
    let bytes = fs::read("/bin/sleep").expect("a program");
    fs::write(&path, &bytes).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("changed");
    system.sync_all();
    release(&system, &path);
    let mut running = Command::new(&path).arg("600").spawn().expect("recalled");
    system.kill_process("worker");
    assert!(is_marked(&path), "it is in use, and was finished");
    assert_reads(&path, &bytes, "while it runs");
    assert!(
        Command::new(&path)
            .arg("0")
            .status()
            .expect("run")
            .success()
    );
    assert_eq!(running.try_wait().expect("asked"), None, "it ended");
    running.kill().expect("killed");
    running.wait().expect("ended");
    wait_whole(&path);
    system.check("a program that ran over a restart");
}

#[test]
fn a_touch_between_recall_and_restart_is_kept() {
    let system = start(Kind::Ext4);
    let path = system.at("file");
    fs::write(&path, b"bytes").expect("written");
    system.sync_all();
    release(&system, &path);
    let reader = File::open(&path).expect("recalled");
    assert!(is_marked(&path), "it is in use, and was finished");
    let touched = SystemTime::UNIX_EPOCH + Duration::from_millis(981_173_106_789);
    reader.set_modified(touched).expect("touched");
    system.kill_process("worker");
    // Waits for the next worker, which looks at what its predecessor left.
    assert_reads(&path, b"bytes", "while it is in use");
    drop(reader);
    wait_whole(&path);
    let meta = fs::metadata(&path).expect("the file");
    assert_eq!(
        (meta.mtime(), meta.mtime_nsec()),
        (981_173_106, 789_000_000)
    );
    system.check("a touch between recall and restart");
}

/// The power fails after a program has written to a recalled file.
fn power_fails_after_a_write(setup: Setup) {
    let mut system = setup.start();
    let kind = system.fs().kind();
    let path = system.at("file");
    let (old, new) = (vec![b'o'; 8192], vec![b'n'; 4096]);
    fs::write(&path, &old).expect("written");
    system.sync_all();
    for round in 0..4 {
        release_soon(&system, &path);
        // Waits until the mark is gone, or comes when it is.
        let waits = round % 2 == 0;
        if !waits {
            drop(fs::read(&path).expect("recalled"));
            wait_whole(&path);
        }
        let file = OpenOptions::new()
            .write(true)
            .open(&path)
            .expect("recalled");
        file.write_all_at(&new, 4096).expect("written");
        sys::write_back(&file).expect("written back");
        if kind == Kind::Btrfs && round >= 2 {
            sys::commit_btrfs(&file).expect("committed");
        }
        system.power_fails();
        drop(file);
        system.power_returns();
        let context = format!("{kind}, round {round}");
        let found = fs::read(&path).unwrap_or_else(|error| panic!("{context}: {error}"));
        assert_eq!(found.len(), old.len(), "{context}");
        assert!(
            found.starts_with(&[b'o'; 4096]),
            "{context}: what was not written to"
        );
        assert!(
            found.ends_with(&new) || found == old,
            "{context}: neither old nor new"
        );
        fs::write(&path, &old).expect("written");
        system.sync_all();
        system.check(&context);
    }
}

/// A program has its bytes made durable, and not the times that go with them; the power fails before hsmd has read
/// them. Nothing says that the file is not the one that was logged.
fn written_before_the_power_failed(kind: Kind) {
    const SIZE: usize = 1 << 20;
    let mut system = start(kind);
    let paths = [system.at("written"), system.at("other")];
    for path in &paths {
        fs::write(path, vec![b'o'; SIZE]).expect("written");
    }
    system.sync_all();
    // What has the log's times on the disk, too.
    let root = File::open(system.root()).expect("the root");
    nix::unistd::syncfs(&root).expect("synced");
    drop(root);
    system.kill_all();
    let file = OpenOptions::new()
        .write(true)
        .open(&paths[0])
        .expect("opened");
    file.write_all_at(&[b'n'; 8192], 65536).expect("written");
    file.sync_data().expect("durable");
    let root = File::open(system.root()).expect("the root");
    sys::cut_off(&root).expect("cut off");
    drop((root, file));
    system.fs().unmount();
    system.start();
    system.sync(&["--sweep"]);
    let wanted: Vec<Vec<u8>> = paths
        .iter()
        .map(|path| fs::read(path).expect("read"))
        .collect();
    assert_eq!(wanted[0][65536], b'n', "{kind}: it was durable");
    // The first is read for the log at the first try.
    let _ = system.tierctl(&["release", paths[0].to_str().expect("ASCII")]);
    system.sync_all();
    for (path, wanted) in paths.iter().zip(&wanted) {
        release_soon(&system, path);
        assert_reads(path, wanted, &format!("{kind}: released after that"));
    }
    system.check(&format!("{kind}: after the power failed"));
}

#[test]
fn what_was_written_before_the_power_failed_is_not_released_on_ext4() {
    written_before_the_power_failed(Kind::Ext4);
}

#[test]
fn what_was_written_before_the_power_failed_is_not_released_on_xfs() {
    written_before_the_power_failed(Kind::Xfs);
}

#[test]
fn the_power_fails_after_a_write_to_a_recalled_file_on_ext4() {
    power_fails_after_a_write(Setup::new(Kind::Ext4).exposed());
}

#[test]
fn the_power_fails_after_a_write_to_a_recalled_file_on_xfs() {
    power_fails_after_a_write(Setup::new(Kind::Xfs).exposed());
}

#[test]
fn the_power_fails_after_a_write_to_a_recalled_file_on_btrfs() {
    let setup = Setup::new(Kind::Btrfs).exposed();
    power_fails_after_a_write(setup.bytes(320 << 20).on_failing_disk());
}

/// The marks of released files outlive a loss of power as well as their bytes do.
#[test]
fn the_list_of_stubs_and_their_marks_outlive_a_loss_of_power() {
    let mut system = start(Kind::Xfs);
    let paths = released_files(&system, 20);
    for path in paths.iter().take(10) {
        assert_reads(path, &bytes_of(path), "recalled");
    }
    system.power_fails();
    system.power_returns();
    wait_for_marks(&system);
    for path in &paths {
        assert_reads(path, &bytes_of(path), "after a loss of power");
    }
}

/// So many files with [`bytes_of`] each, released.
fn released_files(system: &System, count: usize) -> Vec<PathBuf> {
    let paths: Vec<_> = (0..count)
        .map(|number| system.at(format!("file{number}")))
        .collect();
    for path in &paths {
        fs::write(path, bytes_of(path)).expect("written");
    }
    system.sync_all();
    for path in &paths {
        release(system, path);
    }
    paths
}

fn bytes_of(path: &Path) -> Vec<u8> {
    path.to_string_lossy().into_owned().repeat(700).into_bytes()
}

/// The disk is set back to an earlier state, and the list of stubs is not.
#[test]
fn stubs_of_a_disk_that_was_set_back_are_guarded() {
    let mut system = start(Kind::Ext4);
    let paths = released_files(&system, 3);
    system.stop();
    let kept = system.fs().image().with_extension("kept");
    fs::copy(system.fs().image(), &kept).expect("kept");
    system.start();
    wait_for_marks(&system);
    assert_reads(&paths[0], &bytes_of(&paths[0]), "recalled");
    fs::remove_file(&paths[1]).expect("removed");
    system.sync_all();
    thread::sleep(FORGOTTEN);
    system.stop();
    // Once more, so that what is deleted leaves the list.
    system.start();
    wait_for_marks(&system);
    thread::sleep(FORGOTTEN);
    system.stop();
    // In place: the loop device stays.
    let mut image = OpenOptions::new()
        .write(true)
        .open(system.fs().image())
        .expect("the image");
    std::io::copy(&mut File::open(&kept).expect("kept"), &mut image).expect("set back");
    image.sync_all().expect("written");
    system.start();
    wait_for_marks(&system);
    // The deleted one is recalled by itself: it is not what the log has.
    assert!(is_marked(&paths[0]), "it is no stub again");
    for path in &paths {
        assert_reads(path, &bytes_of(path), "of a disk that was set back");
    }
    system.check("a disk that was set back");
}

fn btrfs(words: &[&str], path: &Path, more: Option<&Path>) {
    let mut command = Command::new("btrfs");
    hsm_tests::loopfs::must(command.arg("subvolume").args(words).arg(path).args(more));
}

#[test]
fn released_files_of_a_snapshot_come_back() {
    let mut system = start(Kind::Btrfs);
    let (sub, copy) = (system.at("sub"), system.at("copy"));
    btrfs(&["create"], &sub, None);
    let path = sub.join("file");
    let bytes = bytes_of(&path);
    fs::write(&path, &bytes).expect("written");
    fs::write(sub.join("other"), &bytes).expect("written");
    system.sync_all();
    release(&system, &path);
    release(&system, &sub.join("other"));
    btrfs(&["snapshot"], &sub, Some(&copy));
    btrfs(&["snapshot", "-r"], &sub, Some(&system.at("frozen")));
    system.sync_all();
    assert!(is_marked(&copy.join("file")), "it has no mark");
    assert_reads(&copy.join("file"), &bytes, "of the snapshot");
    wait_whole(&copy.join("file"));
    // Nothing can be written there.
    let refused = fs::read(system.at("frozen/file")).expect_err("a snapshot that is read-only");
    assert_eq!(refused.raw_os_error(), Some(libc::EIO));
    assert!(is_marked(&path), "the original was recalled");
    thread::sleep(FORGOTTEN);
    system.kill_all();
    system.start();
    assert_reads(&path, &bytes, "the original");
    assert_reads(&copy.join("other"), &bytes, "of the snapshot");
    wait_whole(&copy.join("other"));
    btrfs(&["delete"], &system.at("frozen"), None);
    system.check("a snapshot of released files");
}

/// A subvolume can be deleted while programs wait for its files: there is nothing left to fill, and they must not read
/// what there is.
#[test]
fn who_waits_for_files_of_a_deleted_subvolume_gets_an_error() {
    let mut system = start(Kind::Btrfs);
    let sub = system.at("sub");
    btrfs(&["create"], &sub, None);
    let paths = ["one", "two"].map(|name| sub.join(name));
    for path in &paths {
        fs::write(path, bytes_of(path)).expect("written");
    }
    let kept = system.at("kept");
    fs::write(&kept, bytes_of(&kept)).expect("written");
    spool_empties(&mut system);
    for path in paths.iter().chain([&kept]) {
        release(&system, path);
    }
    let away = take_away(&system, 0);
    let readers = paths.each_ref().map(|path| passing_reader(path, 0));
    let other = passing_reader(&kept, 0);
    wait_for_queue(&system, "all wait", |queue| sum(queue, "programs") == 3);
    btrfs(&["delete"], &sub, None);
    assert!(!sub.exists(), "it is deleted");
    bring_back(away);
    for reader in readers {
        let read = reader.wait_with_output().expect("it ends");
        assert!(read.stdout.is_empty(), "{} bytes", read.stdout.len());
        let said = String::from_utf8_lossy(&read.stderr);
        assert!(said.contains("Input/output error"), "{said}");
    }
    let read = other.wait_with_output().expect("it ends");
    assert!(
        read.stdout == bytes_of(&kept),
        "{} bytes",
        read.stdout.len()
    );
    system.wait_for("nothing is amiss", |status| {
        let none = status["notices"].as_array().is_some_and(Vec::is_empty);
        none && status["released"]["waiting"] == 0
    });
    system.check("a deleted subvolume");
}

/// What the status says is released is what is.
#[test]
fn deleted_stubs_leave_the_list() {
    let system = start(Kind::Ext4);
    let paths = released_files(&system, 20);
    let (gone, kept) = paths.split_at(15);
    let held = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(&gone[0])
        .expect("held without being opened");
    let linked = system.at("linked");
    fs::hard_link(&gone[1], &linked).expect("linked");
    for path in gone {
        fs::remove_file(path).expect("deleted");
    }
    system.sync_all();
    let released = |count: usize| {
        system.wait_for("the deleted files are off the list", |status| {
            status["released"]["files"] == count
        });
    };
    released(kept.len() + 2);
    // The inode of one of them is there still, and another has a name still.
    thread::sleep(FORGOTTEN);
    released(kept.len() + 2);
    drop(held);
    released(kept.len() + 1);
    assert_reads(&linked, &bytes_of(&gone[1]), "its other name");
    for path in kept {
        assert_reads(path, &bytes_of(path), "it was kept");
    }
}

/// Who waits while the disk turns out not to have what it took gets an error, and the next one the file.
fn opened_soon(path: &Path) -> File {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match File::open(path) {
            Ok(file) => return file,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
                assert!(Instant::now() < end, "it never comes back");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// What happens while the disk refuses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Then {
    Nothing,
    /// The worker is killed.
    Restart,
    /// Somebody who has the files open syncs them.
    SomebodySyncs,
}

/// The disk takes recalled bytes and fails to write them, which the kernel tells once: nobody reads zeros when
/// memory has let go of them.
fn what_the_disk_refused(files: usize, then: Then) {
    const MIB: u64 = 1 << 20;
    let system = Setup::new(Kind::Ext4)
        .bytes(120 * MIB)
        .mkfs(&["-E", "lazy_itable_init=0,nodiscard", "-J", "size=4"])
        .thin(140 * MIB)
        .with("recall_wait", "\"3s\"")
        .exposed()
        .start();
    let paths: Vec<_> = (0..files)
        .map(|number| system.at(format!("file{number}")))
        .collect();
    let bytes = |path: &Path| {
        hsm_tests::changes::noise(path.as_os_str().len() as u64, (24 << 20) / files + 777)
    };
    for path in &paths {
        fs::write(path, bytes(path)).expect("written");
    }
    system.sync_all();
    for path in &paths {
        release(&system, path);
    }
    must(Command::new("fstrim").arg(system.root()));
    let ballast = system.fs().image().with_file_name("ballast");
    let mut fill = File::create(&ballast).expect("ballast");
    while std::io::Write::write_all(&mut fill, &vec![1; 1 << 16]).is_ok() {}
    drop(fill);
    if then == Then::SomebodySyncs {
        let users: Vec<File> = paths
            .iter()
            .map(|path| File::open(path).expect("recalled"))
            .collect();
        // He is told, and nobody who opens the file later is.
        for user in &users {
            user.sync_all().expect_err("the disk takes nothing");
        }
    } else {
        // Some may find no room for what says where their bytes are.
        let right = |path: &PathBuf| fs::read(path).is_ok_and(|found| found == bytes(path));
        let read: Vec<bool> = paths.iter().map(right).collect();
        assert!(read.contains(&true), "none could be read");
        system.wait_for("it is told", |status| {
            status["notices"]
                .to_string()
                .contains("recalled files can be read")
        });
        thread::sleep(Duration::from_secs(3));
    }
    if then == Then::Restart {
        // The next one was told nothing.
        system.kill_process("worker");
        system.wait_until_it_answers();
    }
    fs::remove_file(&ballast).expect("room again");
    system.wait_for("it is well again", |status| {
        !status["notices"]
            .to_string()
            .contains("recalled files can be read")
    });
    if then == Then::SomebodySyncs {
        wait_whole(&paths[0]);
    }
    for path in &paths {
        let file = opened_soon(path);
        let _ = nix::fcntl::posix_fadvise(
            &file,
            0,
            0,
            nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
        );
    }
    for path in &paths {
        assert_reads(path, &bytes(path), "as the disk has it");
    }
    // The kernel tells it to everybody once.
    let _ = system.tierctl(&["sync"]);
    system.check("after the disk refused recalled bytes");
}

#[test]
fn a_large_file_that_the_disk_refused_is_written_again() {
    what_the_disk_refused(1, Then::Nothing);
}

#[test]
fn many_files_that_the_disk_refused_are_written_again() {
    what_the_disk_refused(12, Then::Nothing);
}

#[test]
fn another_worker_writes_again_what_the_disk_refused() {
    what_the_disk_refused(12, Then::Restart);
}

/// A recalled file gets a flag before its recall has been finished: nobody sees it without that one.
#[test]
fn flags_of_recalled_files_stay() {
    let system = start(Kind::Ext4);
    let path = system.at("file");
    fs::write(&path, bytes_of(&path)).expect("written");
    let change = |set, clear| {
        let file = File::open(&path).expect("opened");
        sys::change_flags(&file, set, clear).expect("chattr");
    };
    for round in 0..5 {
        system.sync_all();
        release_soon(&system, &path);
        change(sys::APPEND_FL, 0);
        let mut looks = 0;
        while is_marked(&path) {
            let flags = sys::flags(&File::open(&path).expect("opened")).expect("flags");
            assert!(
                flags & sys::APPEND_FL != 0,
                "round {round}, after {looks} looks"
            );
            looks += 1;
            // It is finished when nobody has it open.
            thread::sleep(Duration::from_millis(looks % 4));
        }
        assert_reads(&path, &bytes_of(&path), "it was recalled");
        change(0, sys::APPEND_FL);
    }
}

#[test]
fn what_another_program_was_told_the_disk_refused_is_written_again() {
    what_the_disk_refused(1, Then::SomebodySyncs);
}

/// Without the three processes nobody would guard them.
#[test]
fn a_disk_with_stubs_is_refused_without_device() {
    let mut system = start(Kind::Ext4);
    let paths = released_files(&system, 2);
    system.stop();
    let text = fs::read_to_string(system.config()).expect("the configuration");
    let kept = text.lines().filter(|line| !line.starts_with("device"));
    let plain = system.home().at("plain.toml");
    fs::write(&plain, kept.collect::<Vec<_>>().join("\n")).expect("written");
    system.fs().mount();
    let mut command = Command::new(locate("hsmd"));
    command.arg("--config").arg(&plain);
    let ran = run(command).with_code(2);
    system.fs().unmount();
    assert!(ran.text().contains("released files lie on it"), "{ran}");
    system.start();
    for path in &paths {
        assert_reads(path, &bytes_of(path), "guarded again");
    }
}

/// A worker that starts looks for releases that were interrupted. One that runs just then is none.
#[test]
fn what_is_released_while_the_marks_are_set_stays_released() {
    let system = start(Kind::Btrfs);
    let stubs = released_files(&system, 3);
    let path = system.at("last");
    fs::write(&path, bytes_of(&path)).expect("written");
    system.sync_all();
    let guard = system.processes("guard");
    // The marks are set slowly, and this one's release takes still longer once it has its own.
    let delays = [
        ("open_by_handle_at", "delay_enter=500000:when=1..3"),
        ("syncfs", "delay_enter=3000000:when=2"),
    ];
    let delays = Tracer::on_all(guard[0], &delays);
    system.kill_process("worker");
    system.wait_until_it_answers();
    release(&system, &path);
    drop(delays);
    thread::sleep(Duration::from_secs(1));
    for path in stubs.iter().chain([&path]) {
        assert!(is_marked(path), "{} came back by itself", path.display());
    }
}
