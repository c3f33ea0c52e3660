//! What happens to released files, and to what is known of them, without anybody being asked: files are cut by their
//! path while they are recalled, the list of stubs, or the disk, is set back, and marks are taken off.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::Kind;
use hsm_tests::stubs::{
    assert_reads, is_marked, kib_on_disk, release_soon, wait_for_marks, wait_whole,
};
use hsm_tests::sys;
use hsm_tests::system::{Setup, System};

/// How long recalled files stay on the list of stubs at least, and some more.
const FORGOTTEN: Duration = Duration::from_secs(8);

fn start(kind: Kind) -> System {
    Setup::new(kind).exposed().start()
}

fn bytes_of(path: &Path) -> Vec<u8> {
    path.to_string_lossy().into_owned().repeat(700).into_bytes()
}

/// So many files, on every pool.
fn files(system: &System, count: usize) -> Vec<PathBuf> {
    let paths: Vec<_> = (0..count)
        .map(|number| system.at(format!("file{number}")))
        .collect();
    for path in &paths {
        fs::write(path, bytes_of(path)).expect("written");
    }
    system.sync_all();
    paths
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a directory");
    for entry in fs::read_dir(from).expect("a directory").flatten() {
        fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
}

/// Where only opening is asked about, a file can be cut by its path in the middle of a recall.
fn cut_in_a_recall(kind: Kind) {
    const SIZE: usize = 96 << 20;
    const CUT: usize = 12_345;
    let system = Setup::new(kind)
        .bytes(400 << 20)
        .with("pre_access", "false")
        .exposed()
        .start();
    let (path, bytes) = (system.at("file"), noise(1, SIZE));
    fs::write(&path, &bytes).expect("written");
    system.sync_all();
    release_soon(&system, &path);
    let reader = {
        let path = path.clone();
        thread::spawn(move || fs::read(path))
    };
    let end = Instant::now() + Duration::from_secs(30);
    while kib_on_disk(&path) < 4096 {
        assert!(Instant::now() < end, "no byte comes");
        thread::sleep(Duration::from_micros(200));
    }
    nix::unistd::truncate(&path, CUT.try_into().expect("small")).expect("cut");
    let read = reader.join().expect("the reader").expect("read");
    assert_eq!(
        read.len(),
        CUT,
        "{kind}: what was cut in the middle of a recall is back"
    );
    assert!(read == bytes[..CUT], "{kind}: what is left of it");
    wait_whole(&path);
    assert_eq!(fs::metadata(&path).expect("the file").len(), CUT as u64);
    system.sync_all();
    system.check(&format!("{kind}: cut in the middle of a recall"));
}

#[test]
fn a_file_that_is_cut_in_the_middle_of_a_recall_stays_cut_on_ext4() {
    cut_in_a_recall(Kind::Ext4);
}

#[test]
fn a_file_that_is_cut_in_the_middle_of_a_recall_stays_cut_on_xfs() {
    cut_in_a_recall(Kind::Xfs);
}

/// What is on the machine's own disk comes from a backup, and the watched disk is as it was.
#[test]
fn stubs_that_an_old_list_lacks_are_guarded() {
    let mut system = start(Kind::Ext4);
    let paths = files(&system, 3);
    release_soon(&system, &paths[0]);
    wait_for_marks(&system);
    let (state, backup) = (system.home().at("state"), system.home().at("backup"));
    // No file has left the list since.
    system.stop();
    copy_dir(&state, &backup);
    system.start();
    wait_for_marks(&system);
    release_soon(&system, &paths[1]);
    system.sync_all();
    system.stop();
    fs::remove_dir_all(&state).expect("lost");
    fs::rename(&backup, &state).expect("from the backup");
    system.start();
    wait_for_marks(&system);
    for path in &paths {
        assert_reads(path, &bytes_of(path), "after the list was set back");
    }
    system.check("after the list was set back");
}

/// A disk was set back, and before every file has been looked at some are recalled and leave the list.
#[test]
fn a_recall_does_not_make_an_incomplete_list_complete() {
    let mut system = Setup::new(Kind::Ext4)
        .bytes(400 << 20)
        .with("compression_level", "19")
        .exposed()
        .start();
    let paths = files(&system, 3);
    for path in &paths {
        release_soon(&system, path);
    }
    wait_for_marks(&system);
    system.stop();
    let kept = system.fs().image().with_extension("kept");
    fs::copy(system.fs().image(), &kept).expect("kept");
    system.start();
    wait_for_marks(&system);
    assert_reads(&paths[0], &bytes_of(&paths[0]), "recalled");
    wait_whole(&paths[0]);
    thread::sleep(FORGOTTEN);
    system.stop();
    // In place: the loop device stays.
    let mut image = OpenOptions::new()
        .write(true)
        .open(system.fs().image())
        .expect("the image");
    io::copy(&mut File::open(&kept).expect("kept"), &mut image).expect("set back");
    image.sync_all().expect("written");
    drop(image);
    // It takes long until it is known.
    system.fs().mount();
    fs::write(system.at("large"), noise(9, 96 << 20)).expect("written");
    system.fs().unmount();
    system.start();
    assert_reads(&paths[1], &bytes_of(&paths[1]), "recalled at once");
    wait_whole(&paths[1]);
    wait_for_marks(&system);
    for path in &paths {
        assert_reads(path, &bytes_of(path), "of a disk that was set back");
    }
    system.check("a disk that was set back");
}

/// As `rsync -aX` does to a file that it believes to be the same: by its path, without opening it.
fn take_mark_off(path: &Path) {
    sys::remove_xattr(path, c"trusted.hsm").expect("removed");
}

fn versions(system: &System, path: &Path) -> usize {
    let path = path.to_str().expect("ASCII");
    let shown = system.tierctl(&["log", "list", "--json", path]).done();
    shown.json()["list"].as_array().map_or(0, Vec::len)
}

/// A program of root takes the marks of stubs off.
fn marks_are_taken_off(kind: Kind, stub_marks_max: &str) {
    let mut system = Setup::new(kind)
        .with("stub_marks_max", stub_marks_max)
        .exposed()
        .start();
    let paths = files(&system, 3);
    let context = format!("{kind}, {stub_marks_max} marks");
    let hole = File::create(system.at("hole")).expect("a file");
    hole.set_len(100_000).expect("a hole");
    drop(hole);
    system.sync_all();
    for path in &paths {
        release_soon(&system, path);
    }
    // Who opens it at once.
    take_mark_off(&paths[0]);
    assert_reads(&paths[0], &bytes_of(&paths[0]), &context);
    // Nobody opens it.
    take_mark_off(&paths[1]);
    let end = Instant::now() + Duration::from_secs(30);
    while !is_marked(&paths[1]) {
        assert!(
            Instant::now() < end,
            "{context}: the mark does not come back"
        );
        thread::sleep(Duration::from_millis(20));
    }
    // While hsmd does not run.
    system.stop();
    system.fs().mount();
    take_mark_off(&paths[2]);
    system.fs().unmount();
    system.start();
    system.sync(&["--sweep"]);
    for path in &paths {
        assert_reads(path, &bytes_of(path), &context);
        wait_whole(path);
    }
    // What is no stub is what it seems to be.
    assert_reads(&system.at("hole"), &vec![0; 100_000], &context);
    let old = fs::metadata(&paths[0]).expect("the file");
    let file = OpenOptions::new()
        .write(true)
        .open(&paths[0])
        .expect("opened");
    file.set_len(0).expect("cut");
    file.set_len(old.len()).expect("extended");
    let time = old.modified().expect("a time");
    file.set_modified(time).expect("put back");
    drop(file);
    let zeros = vec![0; bytes_of(&paths[0]).len()];
    assert_reads(&paths[0], &zeros, &format!("{context}: a user's zeros"));
    system.sync_all();
    assert_reads(&paths[0], &zeros, &format!("{context}: a user's zeros"));
    for path in &paths[1..] {
        assert_eq!(versions(&system, path), 1, "{context}: {}", path.display());
    }
    system.check(&context);
}

#[test]
fn marks_that_are_taken_off_come_back_on_ext4() {
    marks_are_taken_off(Kind::Ext4, "100000");
}

#[test]
fn marks_that_are_taken_off_come_back_where_every_file_is_asked_about() {
    marks_are_taken_off(Kind::Ext4, "0");
}

#[test]
fn marks_that_are_taken_off_come_back_on_xfs() {
    marks_are_taken_off(Kind::Xfs, "100000");
}

#[test]
fn marks_that_are_taken_off_come_back_on_btrfs() {
    marks_are_taken_off(Kind::Btrfs, "100000");
}
