//! A disk that fills up: what is cold makes room before a writer or a recall meets the end of it, and
//! where nothing may be released the error is the right one and nothing is lost.
//!
//! `HSM_FULL=1` writes for ten minutes.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::home::Home;
use hsm_tests::loopfs::{Kind, must};
use hsm_tests::program::run;
use hsm_tests::report::say;
use hsm_tests::stubs::{assert_reads, is_marked, kib_on_disk, release, wait_whole};
use hsm_tests::system::{Setup, System};
use nix::sys::statvfs::statvfs;

const MIB: u64 = 1 << 20;
const BLOCK: usize = 64 << 10;

fn text(path: &Path) -> &str {
    path.to_str().expect("ASCII")
}

/// Content that takes its space on the disk and little of it in the log.
fn content(seed: u64, bytes: usize) -> Vec<u8> {
    let mut all = noise(seed, BLOCK.min(bytes)).repeat(bytes.div_ceil(BLOCK));
    all.truncate(bytes);
    all
}

/// Bytes that a user can still write.
fn available(root: &Path) -> u64 {
    let stat = statvfs(root).expect("statvfs");
    stat.blocks_available() * stat.fragment_size()
}

fn percent(root: &Path) -> u64 {
    let stat = statvfs(root).expect("statvfs");
    let used = stat.blocks() - stat.blocks_free();
    used * 100 / (used + stat.blocks_available())
}

fn sync_fs(root: &Path) {
    let mut sync = Command::new("sync");
    sync.arg("-f").arg(root);
    let _ = run(sync).done();
}

/// A system with this policy, and its home.
fn with_policy(setup: Setup, rules: &str) -> (System, Home) {
    let home = Home::new();
    let policy = home.at("policy.toml");
    fs::write(&policy, rules).expect("a policy");
    let system = setup
        .exposed()
        .with("policies", &format!("{:?}", text(&policy)))
        .with("segment_bytes", "\"16MiB\"")
        .with("segment_age", "\"3s\"")
        .start();
    (system, home)
}

/// Files of this size until so much is left; on btrfs what is free is known after a sync.
fn fill_until(
    system: &System,
    dir: &str,
    bytes: usize,
    enough: impl Fn(&Path) -> bool,
) -> Vec<PathBuf> {
    fs::create_dir_all(system.at(dir)).expect("a directory");
    let mut files = Vec::new();
    loop {
        if system.fs().kind() == Kind::Btrfs {
            sync_fs(system.root());
        }
        if enough(system.root()) {
            return files;
        }
        let path = system.at(format!("{dir}/{:05}", files.len()));
        if let Err(error) = fs::write(&path, content(files.len() as u64 + 1, bytes)) {
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
            let _ = fs::remove_file(&path);
            return files;
        }
        files.push(path);
    }
}

// ---- writers ---------------------------------------------------------------------------------------

const ROOM: &str = r#"
[[rule]]
name = "room"
action = "release"
condition = "size >= mib(1)"
weight = "age(mtime)"
high_watermark = 85
low_watermark = 75
"#;

struct Written {
    bytes: u64,
    least: u64,
    took: Duration,
}

/// Writes files of 4 MiB at this rate for so long; not one write may fail, not even if a user did it.
fn write_at(system: &System, dir: &str, rate: u64, time: Duration) -> Written {
    let dir = system.at(dir);
    fs::create_dir_all(&dir).expect("a directory");
    let begun = Instant::now();
    let mut written = Written {
        bytes: 0,
        least: u64::MAX,
        took: Duration::ZERO,
    };
    let block = content(7777, 1 << 20);
    for number in 0_u64.. {
        let path = dir.join(format!("{number:06}"));
        let mut file = File::create(&path).unwrap_or_else(|error| panic!("{number}: {error}"));
        for _ in 0..4 {
            let whole = file.write_all(&block);
            let left = available(system.root());
            written.least = written.least.min(left);
            if let Err(error) = whole {
                panic!(
                    "after {:?} and {} MiB at {} MiB/s: {error}; {left} bytes are left: {:#}",
                    begun.elapsed(),
                    written.bytes / MIB,
                    rate / MIB,
                    system.status()["space"]
                );
            }
            assert!(left > 0, "{number}: a user would have met a full disk");
            written.bytes += MIB;
            let due = Duration::from_millis(written.bytes * 1000 / rate);
            thread::sleep(due.saturating_sub(begun.elapsed()));
        }
        if begun.elapsed() >= time {
            break;
        }
    }
    written.took = begun.elapsed();
    written
}

/// A writer below the measured limit on a nearly full filesystem of cold data never meets its end.
fn a_writer_never_meets_a_full_disk(kind: Kind, mkfs: &'static [&'static str]) {
    let setup = Setup::new(kind).bytes(1536 * MIB).mkfs(mkfs);
    let (system, _home) = with_policy(setup, ROOM);
    let cold = fill_until(&system, "cold", 4 << 20, |root| percent(root) >= 83);
    system.sync_all();
    // The limit is known once a watermark was reached.
    let _ = write_at(&system, "first", 30 * MIB, Duration::from_secs(4));
    let status = system.wait_for("the limit is measured", |status| {
        status["space"]["limit_bytes_per_s"].is_u64() && status["space"]["state"] == "enough"
    });
    let limit = status["space"]["limit_bytes_per_s"].as_u64().expect("it");
    // What is written comes to the volumes, and can be released, at the log's pace.
    let full = std::env::var_os("HSM_FULL").is_some();
    let (time, most) = if full {
        (Duration::from_mins(10), 12 * MIB)
    } else {
        (Duration::from_secs(20), 32 * MIB)
    };
    let rate = (limit / 2).min(most);
    let before = available(system.root());
    let written = write_at(&system, "hot", rate, time);
    let space = &system.status()["space"];
    say(format_args!(
        "{kind}: {} MiB in {:?} with {} MiB free at first and {} MiB at least; the limit is {} MiB/s: {space}",
        written.bytes / MIB,
        written.took,
        before / MIB,
        written.least / MIB,
        limit / MIB
    ));
    assert!(
        written.bytes > before,
        "it would have been full without release"
    );
    assert!(space["released_bytes"].as_u64() > Some(0), "{space:#}");
    let plain = system.tierctl(&["status"]).done();
    assert!(plain.stdout.contains("writers may fill it by"), "{plain}");
    // What was given back comes back as it was.
    let gone: Vec<&PathBuf> = cold.iter().filter(|path| is_marked(path)).collect();
    assert!(!gone.is_empty());
    for path in gone.iter().take(5) {
        let number: u64 = text(path)[text(path).len() - 5..]
            .parse()
            .expect("a number");
        assert_reads(
            path,
            &content(number + 1, 4 << 20),
            "recalled under pressure",
        );
    }
}

#[test]
fn a_writer_never_meets_a_full_ext4() {
    a_writer_never_meets_a_full_disk(Kind::Ext4, &["-m", "0"]);
}

#[test]
fn a_writer_never_meets_a_full_xfs() {
    a_writer_never_meets_a_full_disk(Kind::Xfs, &[]);
}

#[test]
fn a_writer_never_meets_a_full_btrfs() {
    a_writer_never_meets_a_full_disk(Kind::Btrfs, &[]);
}

/// Where writers are faster than release can be, status says so, and what to do.
#[test]
fn too_little_headroom_is_told() {
    let rules = ROOM.replace("= 85", "= 99").replace("= 75", "= 97");
    let setup = Setup::new(Kind::Ext4).bytes(768 * MIB).mkfs(&["-m", "0"]);
    let (system, _home) = with_policy(setup, &rules);
    let _ = fill_until(&system, "cold", 4 << 20, |root| percent(root) >= 96);
    system.sync_all();
    let file = system.at("fast");
    let end = Instant::now() + Duration::from_mins(1);
    let mut told = false;
    while !told && Instant::now() < end {
        // Whether it meets the end of the disk or not.
        for _ in 0..30 {
            let _ = fs::write(&file, content(1, 20 << 20));
            let _ = fs::remove_file(&file);
        }
        told = system.status()["notices"]
            .to_string()
            .contains("writers may meet a full disk");
    }
    let status = system.status();
    assert!(told, "{status:#}");
    let notices = status["notices"].to_string();
    assert!(
        notices.contains("high_watermark") || notices.contains("write more slowly"),
        "{notices}"
    );
}

// ---- recall ------------------------------------------------------------------------------------------

/// Releases nothing by itself.
const BY_NIGHT: &str = r#"
[[rule]]
name = "cold"
action = "release"
condition = "path glob 'cold/*'"
weight = "age(mtime)"
daily = "03:30"
"#;

const LARGE: usize = 48 << 20;

/// A released file, and a filesystem that is full but for less than the file needs.
fn full_disk(kind: Kind, rules: &str) -> (System, Home, PathBuf, Vec<PathBuf>) {
    let (system, home) = with_policy(Setup::new(kind).bytes(700 * MIB), rules);
    let large = system.at("large");
    fs::write(&large, content(9999, LARGE)).expect("a large file");
    system.sync_all();
    release(&system, &large);
    sync_fs(system.root());
    let files = fill_until(&system, "cold", 4 << 20, |root| available(root) < 8 * MIB);
    assert!(files.len() > 40, "{} files", files.len());
    system.sync_all();
    assert!(
        available(system.root()) < LARGE as u64,
        "{kind}: it is not full"
    );
    (system, home, large, files)
}

fn recall_makes_room(kind: Kind) {
    let (system, _home, large, files) = full_disk(kind, BY_NIGHT);
    // The coldest ones are pinned, and open.
    let pinned: Vec<&str> = files[..5].iter().map(|path| text(path)).collect();
    let mut words = vec!["pin"];
    words.extend(&pinned);
    let _ = system.tierctl(&words).done();
    let open: Vec<File> = files[5..10]
        .iter()
        .map(|path| File::open(path).expect("opened"))
        .collect();
    assert_reads(&large, &content(9999, LARGE), "recalled onto a full disk");
    wait_whole(&large);
    let gone: Vec<usize> = (0..files.len()).filter(|n| is_marked(&files[*n])).collect();
    say(format_args!(
        "{kind}: {} files made room: {gone:?}",
        gone.len()
    ));
    assert!(gone.len() >= 10, "{gone:?}");
    assert!(gone.iter().all(|n| *n >= 10), "pinned or open: {gone:?}");
    assert!(gone.len() <= 30, "no more than is wanted: {gone:?}");
    drop(open);
    // There and back again, several at once: each recall makes room for itself.
    thread::scope(|scope| {
        for n in &gone {
            let path = &files[*n];
            scope.spawn(move || {
                assert_reads(path, &content(*n as u64 + 1, 4 << 20), "recalled in turn");
            });
        }
    });
    for path in &files[..10] {
        assert!(!is_marked(path), "{} is released", path.display());
    }
    let notices = system.status()["notices"].to_string();
    assert!(!notices.contains("no room for"), "{notices}");
    // More than the disk can hold, one after the other.
    for (n, path) in files.iter().enumerate() {
        assert_reads(path, &content(n as u64 + 1, 4 << 20), "all in turn");
    }
    assert_reads(&large, &content(9999, LARGE), "and the large one again");
}

#[test]
fn recall_makes_room_on_ext4() {
    recall_makes_room(Kind::Ext4);
}

#[test]
fn recall_makes_room_on_xfs() {
    recall_makes_room(Kind::Xfs);
}

#[test]
fn recall_makes_room_on_btrfs() {
    recall_makes_room(Kind::Btrfs);
}

fn opens_with(path: &Path) -> Option<i32> {
    match fs::read(path) {
        Ok(_) => None,
        Err(error) => error.raw_os_error(),
    }
}

fn stays_a_stub(path: &Path) {
    assert!(is_marked(path));
    let kib = kib_on_disk(path);
    assert!(kib <= 64, "{kib} KiB are left of a recall that failed");
    let meta = fs::metadata(path).expect("the stub");
    assert_eq!(meta.len(), LARGE as u64);
}

/// Nothing may be released: the opener hears ENOSPC, the stub stays whole, and comes back when there is room.
fn a_disk_full_of_pinned_data(kind: Kind) {
    let (system, _home, large, files) = full_disk(kind, BY_NIGHT);
    let before = fs::metadata(&large)
        .expect("the stub")
        .modified()
        .expect("a time");
    let _ = system
        .tierctl(&["pin", "-r", text(&system.at("cold"))])
        .done();
    for _ in 0..3 {
        assert_eq!(opens_with(&large), Some(libc::ENOSPC), "{kind}");
        stays_a_stub(&large);
    }
    let status = system.status();
    let notices = status["notices"].to_string();
    assert!(
        notices.contains("there is no room for") && notices.contains("no rule finds"),
        "{status:#}"
    );
    assert!(
        files.iter().all(|path| !is_marked(path)),
        "pinned means pinned"
    );
    let after = fs::metadata(&large)
        .expect("the stub")
        .modified()
        .expect("a time");
    assert_eq!(before, after, "its time");
    for path in &files[..15] {
        fs::remove_file(path).expect("removed");
    }
    sync_fs(system.root());
    assert_reads(&large, &content(9999, LARGE), "with room again");
    wait_whole(&large);
    let _ = system.wait_for("all is well", |status| {
        !status["notices"].to_string().contains("no room for")
    });
}

#[test]
fn a_recall_onto_pinned_data_fails_whole_on_ext4() {
    a_disk_full_of_pinned_data(Kind::Ext4);
}

#[test]
fn a_recall_onto_pinned_data_fails_whole_on_xfs() {
    a_disk_full_of_pinned_data(Kind::Xfs);
}

#[test]
fn a_recall_onto_pinned_data_fails_whole_on_btrfs() {
    a_disk_full_of_pinned_data(Kind::Btrfs);
}

#[test]
fn without_a_policy_nothing_is_released_for_a_recall() {
    let system = Setup::new(Kind::Ext4).bytes(400 * MIB).exposed().start();
    let large = system.at("large");
    fs::write(&large, content(9999, LARGE)).expect("a large file");
    system.sync_all();
    release(&system, &large);
    let files = fill_until(&system, "cold", 4 << 20, |root| available(root) < 8 * MIB);
    system.sync_all();
    assert_eq!(opens_with(&large), Some(libc::ENOSPC));
    stays_a_stub(&large);
    assert!(files.iter().all(|path| !is_marked(path)));
    let notices = system.status()["notices"].to_string();
    assert!(notices.contains("there is no policy"), "{notices}");
}

// ---- quotas --------------------------------------------------------------------------------------------

const USER: u32 = 12_345;

/// Whether this kernel has quotas for this filesystem.
fn mounts(kind: Kind, mkfs: &'static [&'static str]) -> bool {
    let home = Home::for_images();
    let (image, root) = (home.at("image"), home.dir("mnt"));
    let file = File::create(&image).expect("an image");
    file.set_len(512 * MIB).expect("its size");
    must(
        Command::new(format!("mkfs.{kind}"))
            .arg("-q")
            .args(mkfs)
            .arg(&image),
    );
    let mut mount = Command::new("mount");
    mount.args(["-o", "loop,usrquota"]).arg(&image).arg(&root);
    mount.output().expect("mount").status.success() && {
        must(Command::new("umount").arg(&root));
        true
    }
}

/// The user's limit on a mounted filesystem, KiB; 0 for none.
fn limit(system: &System, kib: u64) {
    let kib = kib.to_string();
    must(
        Command::new("setquota")
            .args(["-u", &USER.to_string(), "0", &kib, "0", "0"])
            .arg(system.root()),
    );
}

/// A user's quota holds for what is recalled: nobody gets past his limit by opening a file. His own cold
/// files make room within it, others' do not.
fn a_users_quota_holds(kind: Kind, mkfs: &'static [&'static str]) {
    if !mounts(kind, mkfs) {
        say(format_args!(
            "{kind}: this kernel has no quotas for it, not tried"
        ));
        return;
    }
    let setup = Setup::new(kind)
        .bytes(600 * MIB)
        .mkfs(mkfs)
        .with("mount_options", "\"usrquota\"");
    let (system, _home) = with_policy(setup, BY_NIGHT);
    let own = |path: &Path| std::os::unix::fs::chown(path, Some(USER), Some(USER)).expect("chown");
    let large = system.at("large");
    fs::write(&large, content(9999, LARGE)).expect("a large file");
    own(&large);
    let other = fill_until(&system, "cold", 4 << 20, |root| {
        fs::read_dir(root.join("cold")).expect("it").count() >= 20
    });
    system.sync_all();
    release(&system, &large);
    limit(&system, 60 << 10);
    let hot = system.at("hot");
    fs::write(&hot, content(5, 40 << 20)).expect("written");
    own(&hot);
    system.sync_all();
    assert_eq!(opens_with(&large), Some(libc::EDQUOT), "{kind}");
    stays_a_stub(&large);
    let notices = system.status()["notices"].to_string();
    assert!(notices.contains("quota of its owner"), "{notices}");
    assert!(
        other.iter().all(|path| !is_marked(path)),
        "others' files do not help"
    );
    // His own ones do.
    let cold = system.at("cold/own");
    fs::rename(&hot, &cold).expect("renamed");
    system.sync_all();
    assert_reads(&large, &content(9999, LARGE), "within the quota");
    assert!(is_marked(&cold));
    assert_eq!(
        opens_with(&cold),
        Some(libc::EDQUOT),
        "large is not what the rule is about"
    );
    limit(&system, 0);
    assert_reads(&cold, &content(5, 40 << 20), "without a limit");
    system.check(&format!("{kind}: quota"));
}

#[test]
fn a_users_quota_holds_on_ext4() {
    a_users_quota_holds(Kind::Ext4, &["-O", "quota"]);
}

#[test]
fn a_users_quota_holds_on_xfs() {
    a_users_quota_holds(Kind::Xfs, &[]);
}

/// btrfs limits subvolumes, not users.
#[test]
fn a_subvolumes_quota_holds_on_btrfs() {
    let (system, _home) = with_policy(Setup::new(Kind::Btrfs).bytes(700 * MIB), BY_NIGHT);
    let btrfs = |words: &[&str], path: &Path| {
        let mut command = Command::new("btrfs");
        command.args(words).arg(path);
        must(&mut command)
    };
    let sub = system.at("sub");
    btrfs(&["subvolume", "create"], &sub);
    let large = sub.join("large");
    fs::write(&large, content(9999, LARGE)).expect("a large file");
    system.sync_all();
    release(&system, &large);
    btrfs(&["quota", "enable"], system.root());
    btrfs(&["quota", "rescan", "-w"], system.root());
    fs::write(sub.join("hot"), content(5, 40 << 20)).expect("written");
    system.sync_all();
    btrfs(&["qgroup", "limit", "60M"], &sub);
    assert_eq!(opens_with(&large), Some(libc::EDQUOT));
    stays_a_stub(&large);
    btrfs(&["qgroup", "limit", "none"], &sub);
    assert_reads(&large, &content(9999, LARGE), "without a limit");
}
