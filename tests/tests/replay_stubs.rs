//! `replay --stubs` of what the daemon logged: the names are back at once, and the daemon fetches the rest.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::{self, noise};
use hsm_tests::compare::{Tree, assert_equal, ignore_holes};
use hsm_tests::loopfs::{Kind, LoopFs, ROOMY_BYTES, SMALL_BYTES};
use hsm_tests::stubs::{is_marked, read_patiently, release_soon, wait_whole};
use hsm_tests::system::{Setup, System};
use hsm_tests::waiting::{bring_back, spool_empties, take_away};
use hsm_tests::workload::{Workload, seed};

/// Everything that hsmd logs, versions of files and all, and a stopped daemon.
fn grown(kind: Kind) -> System {
    ignore_holes();
    let mut system = Setup::new(kind).bytes(ROOMY_BYTES).build();
    let all = changes::all(kind);
    changes::prepare(system.root(), &all);
    for n in 0..10u64 {
        fs::write(system.at(format!("large{n}")), noise(n, 1_500_000)).expect("a file");
    }
    system.start();
    changes::apply(system.root(), &all);
    Workload::start(system.root(), seed(), 2, 600).finish();
    changes::let_go();
    system.sync_all();
    system.stop();
    system
}

fn stubs_in(system: &System, root: &Path) -> u64 {
    let verified = system.replay_from(&system.volumes(0), root, &["--verify", "--json"]);
    let verified = verified.done().json();
    verified["released"].as_u64().expect("a count")
}

fn names_come_back_at_once(kind: Kind) {
    let mut system = grown(kind);
    let expected = Tree::read(system.root());
    let fresh = system.fresh();
    let made = system.replay_from(&system.volumes(0), fresh.root(), &["--stubs", "--json"]);
    let made = made.done().json();
    assert!(made["stubs"].as_u64() > Some(10), "{made}");
    assert_eq!(made["frames"], 0, "no content is fetched: {made}");
    let found = Tree::read(fresh.root()).without_content();
    assert_equal(
        &expected.clone().without_content(),
        &found,
        &format!("{kind}: names"),
    );
    assert!(stubs_in(&system, fresh.root()) > 10);

    // The daemon takes it over, and gives everybody the bytes.
    system.set("refill", "false");
    system.move_to(fresh);
    system.hand_over();
    system.start();
    assert_equal(
        &expected,
        &Tree::read(system.root()),
        &format!("{kind}: read through the daemon"),
    );
    system.sync_all();
    let logged = system.status()["logged_bytes"].as_u64();
    assert!(
        logged < Some(2_000_000),
        "{kind}: {logged:?} bytes of content are logged again"
    );
    system.check(&format!("{kind}: the log goes on"));
}

#[test]
fn names_come_back_at_once_on_ext4() {
    names_come_back_at_once(Kind::Ext4);
}

#[test]
fn names_come_back_at_once_on_xfs() {
    names_come_back_at_once(Kind::Xfs);
}

#[test]
fn names_come_back_at_once_on_btrfs() {
    names_come_back_at_once(Kind::Btrfs);
}

/// A stopped daemon whose log has these files, on the volumes only; and a disk of their stubs.
fn stubs_of(kind: Kind, files: &[(String, Vec<u8>)], onto: u64) -> System {
    let mut system = Setup::new(kind).start();
    for (name, bytes) in files {
        fs::write(system.at(name), bytes).expect("a file");
    }
    system.sync_all();
    system.restart();
    let _ = system.wait_for("the spool is empty", |status| {
        status["spool"]["segments"] == 0 && status["spool"]["open_segment"].is_null()
    });
    system.stop();
    let fresh = LoopFs::new(kind, onto);
    let made = system.replay_from(&system.volumes(0), fresh.root(), &["--stubs", "--json"]);
    assert_eq!(made.done().json()["stubs"], files.len());
    system.move_to(fresh);
    system.hand_over();
    system
}

fn marked(system: &System, files: &[(String, Vec<u8>)]) -> usize {
    let stubs = files.iter().filter(|(name, _)| is_marked(&system.at(name)));
    stubs.count()
}

fn content_flows_back(kind: Kind) {
    let file = |n: u64| {
        let bytes = if n.is_multiple_of(500) {
            1_500_000
        } else {
            2000
        };
        (format!("file{n}"), noise(n, bytes))
    };
    let files: Vec<_> = (0..2500).map(file).collect();
    let all = files.len();
    let mut system = stubs_of(kind, &files, SMALL_BYTES);

    // Not where it is not wanted.
    system.set("refill", "false");
    system.start();
    let released = system.at("file7");
    assert!(read_patiently(&released) == files[7].1, "{kind}");
    wait_whole(&released);
    system.sync_all();
    release_soon(&system, &released);
    thread::sleep(Duration::from_secs(2));
    assert!(system.status()["refill"].is_null());
    assert_eq!(marked(&system, &files), all, "{kind}");
    system.stop();

    // The wish lasts, and outlives a worker.
    system.set("refill", "true");
    system.start();
    // Who has a file open, for days perhaps, holds up nothing.
    let used = system.at("file2400");
    let open = fs::File::open(&used).expect("recalled");
    let end = Instant::now() + Duration::from_mins(1);
    while marked(&system, &files) + 10 > all {
        assert!(Instant::now() < end, "{:#}", system.status());
        thread::sleep(Duration::from_millis(20));
    }
    system.kill_process("worker");
    assert!(marked(&system, &files) > 2, "{kind}: it was done already");
    let end = Instant::now() + Duration::from_mins(1);
    while marked(&system, &files) > 2 {
        assert!(Instant::now() < end, "{:#}", system.status());
        thread::sleep(Duration::from_millis(100));
    }
    let status = system.wait_for("it ends", |status| status["refill"].is_null());
    assert_eq!(
        status["notices"].as_array().map(Vec::len),
        Some(0),
        "{status:#}"
    );
    assert!(is_marked(&used), "{kind}: {} is used", used.display());
    drop(open);
    wait_whole(&used);
    assert!(is_marked(&released), "{kind}: what was released stays so");
    system.restart();
    thread::sleep(Duration::from_secs(1));
    assert!(is_marked(&released), "{kind}: what was released stays so");
    for (name, bytes) in &files {
        assert!(read_patiently(&system.at(name)) == *bytes, "{kind}: {name}");
    }
    system.check(&format!("{kind}: flowed back"));
}

#[test]
fn content_flows_back_on_ext4() {
    content_flows_back(Kind::Ext4);
}

#[test]
fn content_flows_back_on_xfs() {
    content_flows_back(Kind::Xfs);
}

#[test]
fn content_flows_back_on_btrfs() {
    content_flows_back(Kind::Btrfs);
}

/// The disk lost its files, and is the same: the daemon knows it, and has a list of its stubs that was complete. Of
/// the inodes that lie there now nothing is on that list.
fn the_same_disk(kind: Kind) {
    let mut system = Setup::new(kind)
        .exposed()
        .with("recall_wait", "\"1s\"")
        .start();
    let files: Vec<_> = (0..60)
        .map(|n| (format!("dir{}/file{n}", n % 3), noise(n, 20_000)))
        .collect();
    for (name, bytes) in &files {
        let path = system.at(name);
        fs::create_dir_all(path.parent().expect("a directory")).expect("made");
        fs::write(path, bytes).expect("a file");
    }
    let rests = |system: &System| {
        system.wait_for("only stubs are asked about", |status| {
            kind == Kind::Btrfs || status["released"]["every_file"] == false
        })
    };
    spool_empties(&mut system);
    let first = system.at("dir0");
    let first = first.to_str().expect("ASCII");
    let _ = system.tierctl(&["release", "-r", first]).done();
    let _ = rests(&system);
    let before = system.sync(&[]);
    let logged = |system: &System| -> Vec<_> {
        let shown = |(name, _): &(String, Vec<u8>)| {
            let path = system.at(name);
            let path = path.to_str().expect("ASCII");
            system
                .tierctl(&["log", "list", "--json", path])
                .done()
                .json()
        };
        files.iter().map(shown).collect()
    };
    let logged_before = logged(&system);
    system.stop();
    system.fs().mount();
    for number in 0..3 {
        fs::remove_dir_all(system.at(format!("dir{number}"))).expect("removed");
    }
    let made = system.replay_from(&system.volumes(0), system.root(), &["--stubs", "--json"]);
    assert_eq!(made.done().json()["stubs"], files.len());
    system.fs().unmount();

    // From the first moment on nobody reads zeros, also where nothing can be recalled.
    let away = take_away(&system, 0);
    system.start();
    for round in 0..3 {
        if round == 2 {
            // The next one goes on with the take-over.
            system.kill_process("worker");
            system.wait_until_it_answers();
        }
        thread::sleep(Duration::from_millis(500 * round));
        for (name, _) in files.iter().step_by(20) {
            let error = fs::read(system.at(name)).expect_err(name);
            assert_eq!(
                error.raw_os_error(),
                Some(libc::EIO),
                "{kind}: {name}: {error}"
            );
        }
    }
    bring_back(away);
    for (name, bytes) in &files {
        assert!(read_patiently(&system.at(name)) == *bytes, "{kind}: {name}");
    }
    system.sync_all();
    let _ = rests(&system);
    for (name, bytes) in &files {
        assert!(read_patiently(&system.at(name)) == *bytes, "{kind}: {name}");
    }
    // They are the files that the log has, and all of them flow back.
    assert_eq!(logged(&system), logged_before, "{kind}");
    let end = Instant::now() + Duration::from_mins(1);
    while marked(&system, &files) > 0 {
        assert!(Instant::now() < end, "{:#}", system.status());
        thread::sleep(Duration::from_millis(100));
    }
    system.restart();
    assert_eq!(logged(&system), logged_before, "{kind}, later");
    system.check(&format!("{kind}: the same disk"));
    let fresh = system.replay_to_fresh(&["--until", &before.to_string()]);
    for (name, bytes) in &files {
        let found = fs::read(fresh.at(name)).expect("a file");
        assert!(found == *bytes, "{kind}: {name}, before that");
    }
}

#[test]
fn the_same_disk_made_of_stubs_is_guarded_on_ext4() {
    the_same_disk(Kind::Ext4);
}

#[test]
fn the_same_disk_made_of_stubs_is_guarded_on_xfs() {
    the_same_disk(Kind::Xfs);
}

#[test]
fn the_same_disk_made_of_stubs_is_guarded_on_btrfs() {
    the_same_disk(Kind::Btrfs);
}

/// While the volume is away it rests, and says so; then it goes on.
#[test]
fn what_flows_back_waits_for_the_volume() {
    let files: Vec<_> = (0..50)
        .map(|n| (format!("file{n}"), noise(n, 3000)))
        .collect();
    let mut system = stubs_of(Kind::Ext4, &files, SMALL_BYTES);
    let volume = system.volumes(0).remove(0);
    let away = volume.with_extension("away");
    fs::rename(&volume, &away).expect("to take it away");
    system.start();
    let status = system.wait_for("it rests", |status| {
        let rests = status["refill"]["rests"].to_string();
        rests.contains("which is not here")
    });
    assert_eq!(status["refill"]["files"], 50, "{status:#}");
    assert_eq!(status["released"]["wanted"], 0, "{status:#}");
    let text = system.tierctl(&["status"]).text();
    assert!(
        text.contains("refill    50 files are still to flow back"),
        "{text}"
    );
    fs::rename(&away, &volume).expect("to bring it back");
    system.wait_for("it ends", |status| status["refill"].is_null());
    assert_eq!(marked(&system, &files), 0);
}

/// A disk that is too small keeps a tenth of it free, and nothing is wrong.
#[test]
fn what_flows_back_leaves_room() {
    let files: Vec<_> = (0..60u64)
        .map(|n| (format!("file{n}"), noise(n, 1_000_000)))
        .collect();
    let mut system = stubs_of(Kind::Ext4, &files, 48 << 20);
    system.start();
    let status = system.wait_for("it rests", |status| {
        let rests = status["refill"]["rests"].to_string();
        rests.contains("it is filled up to 90 % only")
    });
    let left = status["refill"]["files"].as_u64().expect("a count");
    assert!((20..60).contains(&left), "{status:#}");
    assert_eq!(
        status["notices"].as_array().map(Vec::len),
        Some(0),
        "{status:#}"
    );
    let stat = nix::sys::statvfs::statvfs(system.root()).expect("statvfs");
    let used = stat.blocks() - stat.blocks_free();
    let all = used + stat.blocks_available();
    assert!((used * 100).div_ceil(all) <= 90, "{used} blocks of {all}");
    // What is opened comes back all the same.
    let (name, bytes) = files
        .iter()
        .find(|(name, _)| is_marked(&system.at(name)))
        .expect("a stub");
    assert!(read_patiently(&system.at(name)) == *bytes);
}
