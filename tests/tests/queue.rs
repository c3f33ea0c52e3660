//! What recall has to do, as `tierctl queue` shows it, and calling it off.
//!
//! Who waits for a file whose volume is away is named, with that volume; a cancelled recall ends at once,
//! leaves a whole stub, and the file comes back when it is wanted again. Who may not do everything sees
//! and cancels what he waits for himself, and nothing else.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::Kind;
use hsm_tests::program::{Running, locate};
use hsm_tests::stubs::{assert_reads, is_marked, kib_on_disk, release};
use hsm_tests::system::{Setup, System};
use hsm_tests::waiting::{
    NOBODY, as_nobody, bring_back, file, files, open_to_all, queue, reader, spool_empties,
    still_waits, sum, take_away, text, wait_for_queue,
};
use serde_json::Value;

/// What is called off ends in this time, however long the volume stays away.
const AT_ONCE: Duration = Duration::from_secs(5);
const LIMIT: Duration = Duration::from_mins(1);

/// The reader ends with EIO, at once.
fn is_let_go(child: Child, whose: &str) {
    let since = Instant::now();
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{whose}: {said}");
    assert!(said.contains("Input/output error"), "{whose}: {said}");
    let took = since.elapsed();
    assert!(took < AT_ONCE, "{whose}: after {took:?}");
}

fn is_a_whole_stub(path: &Path) {
    let end = Instant::now() + LIMIT;
    while kib_on_disk(path) > 4 {
        assert!(Instant::now() < end, "{}", kib_on_disk(path));
        thread::sleep(Duration::from_millis(20));
    }
    assert!(is_marked(path), "{} has no mark", path.display());
}

/// Three released files, the volume away, and four programs that wait for it.
struct Waiting {
    system: System,
    /// For nobody alone, for him and root, for root alone.
    paths: [PathBuf; 3],
    moved: (PathBuf, PathBuf),
    nobody_mine: Child,
    nobody_shared: Child,
    root_shared: Child,
    root_secret: Child,
}

fn bytes_of(number: usize) -> Vec<u8> {
    noise(number as u64, 300_001)
}

impl Waiting {
    fn start() -> Self {
        let mut system = Setup::new(Kind::Ext4)
            .exposed()
            .with("recall_wait", "\"10m\"")
            .start();
        open_to_all(system.root());
        open_to_all(&system.home().at("hsmd.sock"));
        let paths = ["mine", "shared", "secret"].map(|name| system.at(name));
        for (number, path) in paths.iter().enumerate() {
            fs::write(path, bytes_of(number)).expect("written");
        }
        fs::set_permissions(&paths[2], PermissionsExt::from_mode(0o600)).expect("chmod");
        spool_empties(&mut system);
        for path in &paths {
            release(&system, path);
        }
        let said = system.tierctl(&["queue", "list"]).done();
        assert_eq!(said.stdout, "nobody waits for a released file\n");
        let moved = take_away(&system, 0);
        let waiting = Self {
            nobody_mine: reader(&paths[0], NOBODY),
            nobody_shared: reader(&paths[1], NOBODY),
            root_shared: reader(&paths[1], 0),
            root_secret: reader(&paths[2], 0),
            system,
            paths,
            moved,
        };
        wait_for_queue(&waiting.system, "all wait", |queue| {
            sum(queue, "programs") == 4 && files(queue).iter().all(|file| !file["error"].is_null())
        });
        waiting
    }
}

#[test]
fn who_waits_is_named_with_the_volume() {
    let waiting = Waiting::start();
    let (system, shared) = (&waiting.system, &waiting.paths[1]);
    let all = queue(system);
    assert_eq!(files(&all).len(), 3, "{all:#}");
    let seen = file(&all, shared);
    assert_eq!(seen["size"], 300_001, "{all:#}");
    assert_eq!(seen["programs"], 2);
    let mut who: Vec<(u64, u64)> = seen["waiters"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|waiter| (waiter["uid"].as_u64(), waiter["pid"].as_u64()))
        .map(|(uid, pid)| (uid.expect("a user"), pid.expect("a process")))
        .collect();
    who.sort_unstable();
    let expected = [
        (0, u64::from(waiting.root_shared.id())),
        (65534, u64::from(waiting.nobody_shared.id())),
    ];
    assert_eq!(who, expected);
    let known = system.tierctl(&["volume", "list", "--json"]).done().json();
    for needs in [&seen["needs"], &all["needs"]] {
        let volumes = needs["volumes"].as_array().expect("volumes");
        assert_eq!(volumes.len(), 1, "{needs:#}");
        assert_eq!(volumes[0]["volume"], known[0]["serial"], "{needs:#}");
        assert_eq!(volumes[0]["path"], text(&waiting.moved.0), "{needs:#}");
        assert_eq!(volumes[0]["present"], false, "{needs:#}");
        assert_eq!(needs["spool_bytes"], 0, "{needs:#}");
    }
    assert_eq!(seen["needs"]["bytes"], 300_001, "{all:#}");
    assert_eq!(all["needs"]["volumes"][0]["files"], 3, "{all:#}");
    let error = seen["error"].as_str().unwrap_or_default();
    assert!(error.contains("which is not here"), "{error}");
    let said = system.tierctl(&["queue", "list"]).done().stdout;
    let place = text(&waiting.moved.0);
    for part in [text(shared), "root", "AWAY", "4 programs", place] {
        assert!(said.contains(part), "no {part} in {said}");
    }
    // Who may not do everything sees what he waits for, and nobody else.
    let his = as_nobody(system, &["queue", "list", "--json"])
        .done()
        .json();
    assert_eq!(files(&his).len(), 2, "{his:#}");
    assert_eq!(file(&his, shared)["programs"], 1, "{his:#}");
    assert!(!his.to_string().contains("secret"), "{his:#}");
    for file in files(&his) {
        for waiter in file["waiters"].as_array().into_iter().flatten() {
            assert_eq!(waiter["uid"], 65534, "{his:#}");
        }
    }
    // It comes while they wait.
    bring_back(waiting.moved);
    for mut child in [
        waiting.nobody_mine,
        waiting.nobody_shared,
        waiting.root_shared,
        waiting.root_secret,
    ] {
        assert!(child.wait().expect("it ends").success());
    }
    wait_for_queue(system, "nothing is wanted", |queue| files(queue).is_empty());
}

#[test]
fn a_user_cancels_his_own_and_root_everything() {
    let mut waiting = Waiting::start();
    let system = &waiting.system;
    let [mine, shared, secret] = &waiting.paths;
    for words in [&["--user", "root"][..], &["--user", "0", text(shared)]] {
        let refused = as_nobody(system, &[&["queue", "cancel"], words].concat()).with_code(2);
        assert!(refused.stderr.contains("may not cancel"), "{refused}");
    }
    let refused = as_nobody(system, &["queue", "cancel", text(secret)]).with_code(1);
    assert!(refused.stderr.contains("is told nothing of"), "{refused}");
    let _ = as_nobody(system, &["queue", "cancel", text(shared)]).done();
    is_let_go(waiting.nobody_shared, "nobody, of the shared file");
    still_waits(&mut waiting.root_shared, "root");
    let again = as_nobody(system, &["queue", "cancel", text(shared)]).with_code(1);
    assert!(again.stderr.contains("not in the queue"), "{again}");
    let _ = as_nobody(system, &["queue", "cancel", "--all"]).done();
    is_let_go(waiting.nobody_mine, "nobody, of all");
    still_waits(&mut waiting.root_shared, "root");
    still_waits(&mut waiting.root_secret, "root");
    let rest = queue(system);
    assert_eq!(files(&rest).len(), 2, "{rest:#}");
    assert_eq!(sum(&rest, "programs"), 2, "{rest:#}");
    // Root cancels by path, then everything; somebody who asked hears it, too.
    let _ = system.tierctl(&["queue", "cancel", text(secret)]).done();
    is_let_go(waiting.root_secret, "root, of the secret");
    let mut asks = Command::new(locate("tierctl"));
    asks.arg("--config").arg(system.config());
    asks.args(["recall", "--wait", text(mine)]);
    let mut asks = Running::start(asks, system.home().path(), "asks");
    wait_for_queue(system, "it is asked for", |queue| {
        sum(queue, "requests") == 1
    });
    let words = ["queue", "cancel", "--all", "--json"];
    let done = system.tierctl(&words).done().json();
    assert_eq!(done["files"], 2, "{done:#}");
    assert_eq!(done["programs"], 1, "{done:#}");
    assert_eq!(done["requests"], 1, "{done:#}");
    is_let_go(waiting.root_shared, "root, of all");
    let heard = asks.wait(AT_ONCE).expect("it hears at once").with_code(1);
    assert!(heard.stderr.contains("cancelled by user 0"), "{heard}");
    assert_eq!(files(&queue(system)).len(), 0);
    let status = system.wait_for("nothing is wanted", |status| {
        let notices = status["notices"].to_string();
        !notices.contains(" wanted, and ")
    });
    assert_eq!(status["released"]["waiting"], 0, "{status:#}");
    // They are stubs like any other.
    for path in &waiting.paths {
        is_a_whole_stub(path);
    }
    bring_back(waiting.moved);
    for (number, path) in waiting.paths.iter().enumerate() {
        assert_reads(path, &bytes_of(number), "after it was cancelled");
    }
    system.check("after recalls were cancelled");
}

fn cancelled_in_the_middle(kind: Kind) {
    const BYTES: usize = 160 << 20;
    let system = Setup::new(kind).bytes(700 << 20).exposed().start();
    let path = system.at("large");
    fs::write(&path, noise(7, BYTES)).expect("written");
    system.sync_all();
    release(&system, &path);
    let before = fs::symlink_metadata(&path).expect("it").modified();
    let waits = reader(&path, 0);
    let filling = wait_for_queue(&system, "it is being filled", |queue| {
        let file = file(queue, &path);
        file["stage"] == "filling" && file["filled"].as_u64() > Some(1 << 20)
    });
    let filled = file(&filling, &path)["filled"].as_u64().unwrap_or(0);
    assert!(
        filled < BYTES as u64,
        "{kind}: not in the middle: {filling:#}"
    );
    let _ = system.tierctl(&["queue", "cancel", text(&path)]).done();
    is_let_go(waits, "the reader");
    is_a_whole_stub(&path);
    let after = fs::symlink_metadata(&path).expect("it").modified();
    assert_eq!(before.ok(), after.ok(), "{kind}: its modification time");
    let state = system.tierctl(&["state", "--json", text(&path)]);
    let state = state.with_code(0).json();
    assert_eq!(state["states"][0]["state"], "migrated", "{kind}: {state:#}");
    // Who comes while the last fill is called off is served all the same.
    let first = reader(&path, 0);
    wait_for_queue(&system, "it is filled again", |queue| {
        file(queue, &path)["stage"] == "filling"
    });
    let _ = system
        .tierctl(&["queue", "cancel", "--user", "root"])
        .done();
    assert_reads(&path, &noise(7, BYTES), "right after it was cancelled");
    drop(first);
    system.check(&format!("{kind}: after a fill was cancelled"));
}

#[test]
fn a_fill_is_cancelled_in_the_middle_on_ext4() {
    cancelled_in_the_middle(Kind::Ext4);
}

#[test]
fn a_fill_is_cancelled_in_the_middle_on_xfs() {
    cancelled_in_the_middle(Kind::Xfs);
}

#[test]
fn a_fill_is_cancelled_in_the_middle_on_btrfs() {
    cancelled_in_the_middle(Kind::Btrfs);
}

// ---- what it needs, and how far it is -----------------------------------------------------------------

fn plan(system: &System) -> Value {
    let root = system.root().to_str().expect("ASCII").to_owned();
    let words = ["recall", "--dry-run", "--json", "-r", &root];
    system.tierctl(&words).done().json()
}

/// The pools of the volumes that a plan names, and whether they are here.
fn named(plan: &Value) -> Vec<(String, bool)> {
    let volumes = plan["needs"]["volumes"].as_array().expect("volumes");
    let named = volumes.iter().map(|volume| {
        assert_eq!(volume["files"], 3, "{plan:#}");
        assert_eq!(volume["bytes"], 900_003, "{plan:#}");
        assert!(volume["segments"][0].is_u64(), "{plan:#}");
        let pool = volume["pool"].as_str().expect("a pool").to_owned();
        (pool, volume["present"] == true)
    });
    named.collect()
}

#[test]
fn a_dry_run_names_the_volumes_and_how_much() {
    let mut system = Setup::new(Kind::Ext4).exposed().pools(2).start();
    for number in 0..3 {
        fs::write(system.at(format!("f{number}")), bytes_of(number)).expect("written");
    }
    fs::write(system.at("whole"), b"whole").expect("written");
    system.sync_all();
    for number in 0..3 {
        release(&system, &system.at(format!("f{number}")));
    }
    // As long as it is in the spool no volume is needed.
    let first = plan(&system);
    assert_eq!(first["files"], 3, "{first:#}");
    assert_eq!(first["bytes"], 900_003, "{first:#}");
    let in_spool = first["needs"]["spool_bytes"].as_u64().expect("bytes");
    let on_volumes = first["needs"]["volumes"].as_array().expect("volumes");
    let on_volumes = on_volumes.iter().map(|one| one["bytes"].as_u64());
    assert_eq!(in_spool + on_volumes.flatten().sum::<u64>(), 900_003);
    spool_empties(&mut system);
    let here = |pool: &str| (pool.to_owned(), true);
    let away = |pool: &str| (pool.to_owned(), false);
    assert_eq!(named(&plan(&system)), [here("pool0")]);
    let none = take_away(&system, 0);
    assert_eq!(named(&plan(&system)), [here("pool1")]);
    let other = take_away(&system, 1);
    assert_eq!(named(&plan(&system)), [away("pool0"), away("pool1")]);
    let root = system.root().to_str().expect("ASCII").to_owned();
    let said = system.tierctl(&["recall", "--dry-run", "-r", &root]).done();
    for part in [
        "3 files would be recalled",
        "AWAY",
        text(&none.0),
        text(&other.0),
        "those of one pool suffice",
    ] {
        assert!(said.stdout.contains(part), "no {part:?}: {said}");
    }
    assert!(is_marked(&system.at("f0")), "it was dry");
    assert_eq!(files(&queue(&system)).len(), 0);
    // The same is said before it begins; how far it is, while it goes on.
    let mut recall = Command::new(locate("tierctl"));
    recall.arg("--config").arg(system.config());
    recall.args(["recall", "--wait", "--json", "-r", &root]);
    let mut recall = Running::start(recall, system.home().path(), "recall");
    wait_for_queue(&system, "all are asked for", |queue| {
        sum(queue, "requests") == 3
    });
    let end = Instant::now() + LIMIT;
    while !recall.stderr().contains("\"progress\"") {
        assert!(Instant::now() < end, "no progress: {}", recall.stderr());
        thread::sleep(Duration::from_millis(50));
    }
    bring_back(other);
    let done = recall.wait(LIMIT).expect("it ends").done();
    let line = done.stderr.lines().next().unwrap_or_default();
    let line: Value = serde_json::from_str(line).expect("JSON");
    assert_eq!(line["progress"]["files_total"], 3, "{line:#}");
    assert_eq!(line["progress"]["bytes_total"], 900_003, "{line:#}");
    let report = done.json();
    assert_eq!(report["files"], 3, "{report:#}");
    assert_eq!(report["bytes"], 900_003, "{report:#}");
    assert_eq!(named(&report), [away("pool0"), away("pool1")]);
    bring_back(none);
    for number in 0..3 {
        let path = system.at(format!("f{number}"));
        assert_reads(&path, &bytes_of(number), "recalled");
    }
}

#[test]
fn migrate_says_which_pool_lacks_what() {
    let system = Setup::new(Kind::Ext4).pools(2).start();
    let path = system.at("file");
    fs::write(system.at("before"), b"before").expect("written");
    system.sync_all();
    let moved = take_away(&system, 1);
    fs::write(&path, bytes_of(0)).expect("written");
    system.sync(&[]);
    let words = ["migrate", "--dry-run", "--json", text(&path)];
    let end = Instant::now() + LIMIT;
    let said = loop {
        let said = system.tierctl(&words).with_code(1).json();
        if said["pools"][1]["waits"].is_string() {
            break said;
        }
        assert!(Instant::now() < end, "it waits for nothing: {said:#}");
        // What is in the open segment is copied when that is sealed.
        let mut sync = Command::new(locate("tierctl"));
        sync.arg("--config").arg(system.config());
        sync.args(["sync", "--to", "media"]);
        let mut sync = Running::start(sync, system.home().path(), "sync");
        let _ = sync.wait(Duration::from_secs(2));
        sync.kill();
    };
    assert_eq!((&said["files"], &said["missing"]), (&0.into(), &1.into()));
    let lacks = &said["pools"][1];
    assert_eq!(lacks["pool"], "pool1", "{said:#}");
    assert_eq!(lacks["files"], 1, "{said:#}");
    assert_eq!(lacks["bytes"], 300_001, "{said:#}");
    assert_eq!(lacks["path"], text(&moved.0), "{said:#}");
    assert_eq!(lacks["present"], false, "{said:#}");
    let mut migrate = Command::new(locate("tierctl"));
    migrate.arg("--config").arg(system.config());
    migrate.args(["migrate", "--json", text(&path)]);
    let mut migrate = Running::start(migrate, system.home().path(), "migrate");
    while !migrate.stderr().contains("\"progress\"") {
        assert!(Instant::now() < end, "no progress: {}", migrate.stderr());
        thread::sleep(Duration::from_millis(50));
    }
    bring_back(moved);
    let done = migrate.wait(LIMIT).expect("it ends").done().json();
    assert_eq!((&done["files"], &done["missing"]), (&1.into(), &0.into()));
}
