//! What must not be released is not: each reason in turn, the file as it was, and released when the
//! reason is gone.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::{Kind, must};
use hsm_tests::stubs::{
    assert_reads, is_marked, kib_on_disk, refused, release, release_soon, wait_whole,
};
use hsm_tests::sys::{APPEND_FL, IMMUTABLE_FL, SharedMap, change_flags};
use hsm_tests::system::{Setup, System};
use nix::fcntl::{Flock, FlockArg};

const BYTES: usize = 700_001;

fn exposed(kind: Kind) -> System {
    Setup::new(kind).exposed().start()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("ASCII")
}

/// Somebody uses the file, in some way.
struct Use {
    name: &'static str,
    /// Until what it gives is dropped.
    begin: fn(&Path) -> Box<dyn std::any::Any>,
}

/// A program that runs until this is dropped.
struct Runs(std::process::Child);

impl Drop for Runs {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const USES: &[Use] = &[
    Use {
        name: "open for reading",
        begin: |path| Box::new(File::open(path).expect("opened")),
    },
    Use {
        name: "open for writing",
        begin: |path| Box::new(File::options().write(true).open(path).expect("opened")),
    },
    Use {
        name: "open for appending",
        begin: |path| Box::new(File::options().append(true).open(path).expect("opened")),
    },
    Use {
        name: "mapped shared",
        begin: |path| {
            let file = File::options().read(true).write(true).open(path);
            Box::new(SharedMap::new(&file.expect("opened"), BYTES).expect("mapped"))
        },
    },
    Use {
        name: "mapped for reading",
        begin: |path| {
            // The descriptor is closed, the mapping stays.
            let script = "import mmap, os, sys, time\n\
                fd = os.open(sys.argv[1], os.O_RDONLY)\n\
                m = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)\n\
                os.close(fd)\nopen(sys.argv[2], 'w').close()\ntime.sleep(1000)\n";
            let python = std::env::var_os("HSM_PYTHON").unwrap_or_else(|| "python3".into());
            let dir = tempfile::tempdir().expect("a directory");
            let sign = dir.path().join("mapped");
            let mut command = Command::new(python);
            command.args(["-c", script]).arg(path).arg(&sign);
            let child = Runs(command.spawn().expect("python"));
            let end = Instant::now() + Duration::from_secs(30);
            while !sign.exists() {
                assert!(Instant::now() < end, "it is never mapped");
                thread::sleep(Duration::from_millis(10));
            }
            Box::new(child)
        },
    },
    Use {
        name: "locked",
        begin: |path| {
            let file = File::open(path).expect("opened");
            Box::new(
                Flock::lock(file, FlockArg::LockShared)
                    .map_err(|(_, e)| e)
                    .expect("locked"),
            )
        },
    },
    Use {
        name: "the standard input of a program",
        begin: |path| {
            let mut command = Command::new("sleep");
            command.arg("1000").stdin(File::open(path).expect("opened"));
            Box::new(Runs(command.spawn().expect("sleep")))
        },
    },
];

fn what_is_in_use_stays(kind: Kind) {
    let system = exposed(kind);
    let files: Vec<PathBuf> = (0..USES.len())
        .map(|n| system.at(format!("f{n}")))
        .collect();
    for (seed, file) in files.iter().enumerate() {
        fs::write(file, noise(seed as u64, BYTES)).expect("written");
    }
    let program = system.at("program");
    fs::copy("/bin/sleep", &program).expect("copied");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("a mode");
    system.sync_all();
    for (seed, (used, file)) in USES.iter().zip(&files).enumerate() {
        let context = format!("{kind}, {}", used.name);
        let content = noise(seed as u64, BYTES);
        let held = (used.begin)(file);
        refused(&system, file, "it is open, mapped or being executed");
        assert_reads(file, &content, &context);
        drop(held);
        // What was open for writing may be examined again now.
        release_soon(&system, file);
        // Who uses a stub waits for its bytes; from then on it is in use.
        let held = (used.begin)(file);
        let ran = system.tierctl(&["release", text(file)]);
        assert!(!ran.stdout.starts_with("1 files"), "{context}: {ran}");
        assert_reads(file, &content, &context);
        drop(held);
        wait_whole(file);
        assert_reads(file, &content, &context);
    }
    let running = Runs(Command::new(&program).arg("1000").spawn().expect("started"));
    refused(&system, &program, "it is open, mapped or being executed");
    drop(running);
    release_soon(&system, &program);
    must(Command::new(&program).arg("0.01"));
    system.check(&format!("{kind}: in use"));
}

#[test]
fn what_is_in_use_stays_on_ext4() {
    what_is_in_use_stays(Kind::Ext4);
}

#[test]
fn what_is_in_use_stays_on_xfs() {
    what_is_in_use_stays(Kind::Xfs);
}

#[test]
fn what_is_in_use_stays_on_btrfs() {
    what_is_in_use_stays(Kind::Btrfs);
}

/// A descriptor with `O_PATH` reads nothing, and keeps nobody from releasing. What it opens is guarded.
#[test]
fn a_place_holder_is_no_user() {
    let system = exposed(Kind::Ext4);
    let path = system.at("file");
    fs::write(&path, noise(1, BYTES)).expect("written");
    system.sync_all();
    let held = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(&path)
        .expect("opened");
    release(&system, &path);
    let through = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
    assert_reads(&through, &noise(1, BYTES), "by a descriptor with O_PATH");
    drop(held);
    release_soon(&system, &path);
    assert_reads(&path, &noise(1, BYTES), "afterwards");
}

#[test]
fn all_names_of_a_file_are_released_and_recalled() {
    let system = exposed(Kind::Ext4);
    let dir = system.at("dir");
    fs::create_dir(&dir).expect("a directory");
    let names: Vec<PathBuf> = (0..3).map(|n| dir.join(format!("name{n}"))).collect();
    fs::write(&names[0], noise(1, BYTES)).expect("written");
    for name in &names[1..] {
        fs::hard_link(&names[0], name).expect("linked");
    }
    system.sync_all();
    // Open under another name is open.
    let held = File::open(&names[2]).expect("opened");
    refused(&system, &names[0], "it is open, mapped or being executed");
    drop(held);
    let mut words = vec!["release"];
    words.extend(names.iter().map(|name| text(name)));
    let ran = system.tierctl(&words).done();
    assert!(names.iter().all(|name| kib_on_disk(name) <= 4), "{ran}");
    fs::remove_file(&names[0]).expect("removed");
    assert_reads(&names[1], &noise(1, BYTES), "a second name");
    assert_reads(&names[2], &noise(1, BYTES), "a third name");
    system.check("several names");
}

/// Immutable and append-only files: released or refused, the bytes and the flags stay.
fn sealed(kind: Kind) {
    let system = exposed(kind);
    let cases = [("immutable", IMMUTABLE_FL), ("append-only", APPEND_FL)];
    for (name, flag) in cases {
        let path = system.at(name);
        fs::write(&path, noise(u64::from(flag), BYTES)).expect("written");
        change_flags(&File::open(&path).expect("opened"), flag, 0).expect("chattr");
    }
    system.sync_all();
    let clear = |path: &Path, flag| {
        change_flags(&File::open(path).expect("opened"), 0, flag).expect("chattr");
    };
    for (name, flag) in cases {
        let path = system.at(name);
        let ran = system.tierctl(&["release", text(&path)]);
        assert!(matches!(ran.code, 0 | 1), "{kind}, {name}: {ran}");
        let content = noise(u64::from(flag), BYTES);
        assert_reads(&path, &content, name);
        wait_whole(&path);
        let now = hsm_tests::sys::flags(&File::open(&path).expect("opened")).expect("flags");
        assert_eq!(now & flag, flag, "{kind}, {name} afterwards: {ran}");
        clear(&path, flag);
    }
    system.sync_all();
    for (name, flag) in cases {
        let path = system.at(name);
        release(&system, &path);
        // Sealed while it is a stub.
        clear(&path, 0);
        release_soon(&system, &path);
        let mut chattr = Command::new("chattr");
        must(
            chattr
                .arg(if flag == IMMUTABLE_FL { "+i" } else { "+a" })
                .arg(&path),
        );
        assert_reads(&path, &noise(u64::from(flag), BYTES), name);
        wait_whole(&path);
        clear(&path, flag);
    }
    system.check(&format!("{kind}: sealed"));
}

#[test]
fn sealed_files_keep_bytes_and_flags_on_ext4() {
    sealed(Kind::Ext4);
}

#[test]
fn sealed_files_keep_bytes_and_flags_on_xfs() {
    sealed(Kind::Xfs);
}

#[test]
fn sealed_files_keep_bytes_and_flags_on_btrfs() {
    sealed(Kind::Btrfs);
}

/// A file that is written again and again, now and then opened for it, while somebody tries to release it.
fn written_all_the_time(kind: Kind) {
    let system = exposed(kind);
    let path = system.at("busy");
    fs::write(&path, noise(0, BYTES)).expect("written");
    system.sync_all();
    let over = AtomicBool::new(false);
    let mut expected = noise(0, BYTES);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut expected = noise(0, BYTES);
            let mut number = 0;
            while !over.load(Ordering::Relaxed) {
                number += 1;
                let part = noise(number, 3000);
                let at = usize::try_from(number * 7919).unwrap_or(0) % (BYTES - part.len());
                let file = File::options().write(true).open(&path).expect("opened");
                file.write_all_at(&part, at as u64).expect("written");
                expected[at..at + part.len()].copy_from_slice(&part);
                drop(file);
                if number.is_multiple_of(4) {
                    let found = fs::read(&path).expect("read");
                    assert!(found == expected, "{kind}: after {number} writes");
                }
                thread::sleep(Duration::from_millis(number % 40));
            }
            expected
        });
        let end = Instant::now() + Duration::from_secs(3);
        let mut released = 0;
        while Instant::now() < end {
            system.sync(&["--to", "media"]);
            let ran = system.tierctl(&["release", text(&path)]);
            assert!(matches!(ran.code, 0 | 1), "{ran}");
            released += u32::from(ran.stdout.starts_with("1 files"));
        }
        hsm_tests::report::say(format_args!("{kind}: released {released} times"));
        over.store(true, Ordering::Relaxed);
        expected = writer.join().expect("right bytes all the time");
    });
    assert_reads(&path, &expected, "at the end");
    system.check(&format!("{kind}: written all the time"));
}

#[test]
fn a_file_that_is_written_all_the_time_loses_nothing_on_ext4() {
    written_all_the_time(Kind::Ext4);
}

#[test]
fn a_file_that_is_written_all_the_time_loses_nothing_on_xfs() {
    written_all_the_time(Kind::Xfs);
}

#[test]
fn a_file_that_is_written_all_the_time_loses_nothing_on_btrfs() {
    written_all_the_time(Kind::Btrfs);
}

/// What changed after it was logged is not released before the change is on all copies, whether the
/// change raised an event or not.
fn changed_since(kind: Kind) {
    let system = exposed(kind);
    let (written, stored, held, times) = (
        system.at("written"),
        system.at("stored"),
        system.at("held"),
        system.at("times"),
    );
    for path in [&written, &stored, &held, &times] {
        fs::write(path, noise(1, BYTES)).expect("written");
    }
    system.sync_all();
    let mut expected = noise(1, BYTES);
    expected[5000] ^= 1;
    let open = |path: &Path| {
        File::options()
            .read(true)
            .write(true)
            .open(path)
            .expect("opened")
    };
    // In one go, so that release comes before the examination, most of the time.
    open(&written)
        .write_all_at(&expected[5000..=5000], 5000)
        .expect("written");
    let mut map = SharedMap::new(&open(&stored), BYTES).expect("mapped");
    map.store(5000, expected[5000]);
    drop(map);
    let file = open(&times);
    file.set_modified(std::time::UNIX_EPOCH).expect("touched");
    drop(file);
    let mut kept = SharedMap::new(&open(&held), BYTES).expect("mapped");
    kept.store(5000, expected[5000]);
    for path in [&written, &stored, &held, &times] {
        let ran = system.tierctl(&["release", text(path)]);
        assert!(matches!(ran.code, 0 | 1), "{ran}");
        if path == &held {
            assert_eq!(ran.code, 1, "it is mapped: {ran}");
        }
    }
    kept.sync().expect("synced");
    system.sync(&["--to", "media", "--sweep"]);
    let again = expected[5000] ^ 2;
    // The page is clean now, the mapping old: this store changes the change time alone.
    kept.store(5000, again);
    drop(kept);
    let ran = system.tierctl(&["release", text(&held)]);
    assert!(matches!(ran.code, 0 | 1), "{ran}");
    for path in [&written, &stored] {
        assert_reads(path, &expected, &format!("{kind}: changed since"));
    }
    assert_reads(&times, &noise(1, BYTES), &format!("{kind}: touched since"));
    expected[5000] = again;
    assert_reads(&held, &expected, &format!("{kind}: stored to since"));
    system.sync_all();
    for path in [&written, &stored, &held, &times] {
        release_soon(&system, path);
    }
    assert_reads(&held, &expected, &format!("{kind}: released afterwards"));
    system.check(&format!("{kind}: changed since"));
}

#[test]
fn what_changed_since_it_was_logged_is_not_lost_on_ext4() {
    changed_since(Kind::Ext4);
}

#[test]
fn what_changed_since_it_was_logged_is_not_lost_on_xfs() {
    changed_since(Kind::Xfs);
}

#[test]
fn what_changed_since_it_was_logged_is_not_lost_on_btrfs() {
    changed_since(Kind::Btrfs);
}

#[test]
fn sparse_files_keep_their_holes() {
    for kind in Kind::ALL {
        let system = exposed(kind);
        let path = system.at("sparse");
        let mut file = File::create(&path).expect("created");
        for at in [0_u64, 3 << 20, 90 << 20] {
            file.seek(SeekFrom::Start(at)).expect("seek");
            file.write_all(&noise(at, 100_000)).expect("written");
        }
        file.set_len(200 << 20).expect("extended");
        drop(file);
        File::create(system.at("hole"))
            .expect("created")
            .set_len(5 << 20)
            .expect("extended");
        system.sync_all();
        let before = hsm_tests::compare::Tree::read(system.root());
        release(&system, &path);
        let ran = system.tierctl(&["release", text(&system.at("hole"))]);
        assert!(matches!(ran.code, 0 | 1), "{ran}");
        hsm_tests::compare::assert_equal(
            &before,
            &hsm_tests::compare::Tree::read(system.root()),
            &format!("{kind}: sparse"),
        );
        assert!(kib_on_disk(&path) < 1000, "{kind}: {}", kib_on_disk(&path));
        system.check(&format!("{kind}: sparse"));
    }
}

#[test]
fn what_has_no_data_is_not_released() {
    let system = exposed(Kind::Ext4);
    fs::write(system.at("empty"), b"").expect("written");
    fs::write(system.at("file"), noise(1, BYTES)).expect("written");
    fs::create_dir(system.at("dir")).expect("a directory");
    symlink("file", system.at("link")).expect("a link");
    nix::unistd::mkfifo(&system.at("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    system.sync_all();
    for name in ["empty", "link", "fifo"] {
        let ran = system.tierctl(&["release", text(&system.at(name))]).done();
        assert!(ran.stdout.starts_with("0 files released"), "{ran}");
        assert!(!is_marked(&system.at(name)), "{ran}");
    }
    assert!(!is_marked(&system.at("file")), "a link was followed");
    let ran = system.tierctl(&["release", text(&system.at("dir"))]);
    assert!(ran.code == 2 && ran.text().contains("--recursive"), "{ran}");
    let outside = system.home().at("hsmd.toml");
    let ran = system.tierctl(&["release", text(&outside)]);
    assert!(ran.code == 1 || ran.code == 2, "{ran}");
    assert_reads(&system.at("file"), &noise(1, BYTES), "never released");
}

// ---- copies ----------------------------------------------------------------------------------------

#[test]
fn a_file_that_a_pool_lacks_stays() {
    let mut system = Setup::new(Kind::Ext4).exposed().pools(2).build();
    let volume = system.volumes(1)[0].clone();
    let away = volume.with_extension("away");
    fs::rename(&volume, &away).expect("to take it away");
    system.start();
    let path = system.at("file");
    fs::write(&path, noise(1, BYTES)).expect("written");
    system.sync(&[]);
    refused(&system, &path, "pool");
    fs::rename(&away, &volume).expect("to bring it back");
    system.sync_all();
    release(&system, &path);
    assert_reads(&path, &noise(1, BYTES), "recalled");
    system.check("a pool that came late");
}

/// The sealed segments of a volume.
fn segments(volume: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(volume).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(segments(&path));
        } else if text(&path).ends_with(".hsm.zst") {
            found.push(path);
        }
    }
    found
}

/// Flips a bit in the middle of each segment of a volume.
fn damage(volume: &Path) {
    for path in segments(volume) {
        let file = File::open(&path).expect("a segment");
        change_flags(&file, 0, IMMUTABLE_FL).expect("chattr -i");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("a mode");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .expect("a segment");
        let at = file.metadata().expect("its size").len() / 2;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        file.write_all_at(&[byte[0] ^ 4], at).expect("written");
    }
}

#[test]
fn a_file_whose_copy_is_damaged_stays() {
    let system = Setup::new(Kind::Ext4).exposed().start();
    let path = system.at("file");
    fs::write(&path, noise(1, 3 * BYTES)).expect("written");
    system.sync_all();
    let volume = system.volumes(0)[0].clone();
    damage(&volume);
    let _ = system
        .tierctl(&["volume", "verify", text(&volume)])
        .with_code(1);
    refused(&system, &path, "pool0");
    assert_reads(
        &path,
        &noise(1, 3 * BYTES),
        "its only good copy is the disk",
    );
    assert!(!is_marked(&path));
}

/// After the catalog was made anew nobody has read the copies back: they are listed, no more.
#[test]
fn a_copy_that_nobody_has_read_back_does_not_count() {
    let mut system = Setup::new(Kind::Ext4).exposed().start();
    let path = system.at("file");
    fs::write(&path, noise(1, BYTES)).expect("written");
    system.sync_all();
    system.stop();
    for ending in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{ending}", text(&system.catalog())));
    }
    let _ = system.tierctl(&["catalog", "rebuild"]).done();
    system.start();
    system.sync_all();
    refused(&system, &path, "tierctl volume verify");
    let volume = system.volumes(0)[0].clone();
    let _ = system.tierctl(&["volume", "verify", text(&volume)]).done();
    release(&system, &path);
    assert_reads(&path, &noise(1, BYTES), "recalled");
}

#[test]
fn what_is_pinned_stays() {
    let system = exposed(Kind::Ext4);
    let path = system.at("file");
    fs::write(&path, noise(1, BYTES)).expect("written");
    system.sync_all();
    let _ = system.tierctl(&["pin", text(&path)]).done();
    system.sync_all();
    refused(&system, &path, "it is pinned");
    let _ = system.tierctl(&["unpin", text(&path)]).done();
    system.sync_all();
    release(&system, &path);
    assert_reads(&path, &noise(1, BYTES), "recalled");
}
