//! Bad input: each is refused with exit status 2 and a message that names the object, the cause and
//! what to do, and nothing is lost by it.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hsm_tests::changes::noise;
use hsm_tests::compare::{Tree, assert_equal};
use hsm_tests::home::Home;
use hsm_tests::loopfs::{Kind, LoopFs, SMALL_BYTES, must};
use hsm_tests::program::{Ran, locate, run_within};
use hsm_tests::system::{Setup, System};

const SOON: Duration = Duration::from_secs(30);

/// What hsmd says to the system's configuration with some keys changed. It must end by itself.
fn hsmd_with(system: &System, changed: &[(&str, &str)]) -> Ran {
    hsmd_on(system, &system.config_text(changed))
}

fn hsmd_on(system: &System, text: &str) -> Ran {
    let config = system.home().at("bad.toml");
    fs::write(&config, text).expect("a configuration");
    let mut command = Command::new(locate("hsmd"));
    command.arg("--config").arg(config);
    run_within(command, SOON)
}

fn quoted(path: &Path) -> String {
    format!("\"{}\"", path.display())
}

fn name(path: &Path) -> &str {
    path.to_str().expect("ASCII")
}

/// Mounts something that is taken away with the directory it lies in.
fn mount(arguments: &[&str], at: &Path) {
    fs::create_dir_all(at).expect("a mount point");
    must(Command::new("mount").args(arguments).arg(at));
}

#[test]
fn mounts_that_cannot_be_watched() {
    let system = Setup::new(Kind::Ext4).build();
    let absent = system.home().at("absent");
    let _ = hsmd_with(&system, &[("mount", &quoted(&absent))]).refuses(&[name(&absent)]);

    let plain = system.home().dir("plain");
    let ran = hsmd_with(&system, &[("mount", &quoted(&plain))]);
    let _ = ran.refuses(&[name(&plain), "not a mount point"]);

    let below = system.at("below");
    fs::create_dir(&below).expect("a directory");
    let ran = hsmd_with(&system, &[("mount", &quoted(&below))]);
    let _ = ran.refuses(&[name(&below), "not a mount point"]);

    let bound = system.home().at("bound");
    mount(&["--bind", name(&below)], &bound);
    let ran = hsmd_with(&system, &[("mount", &quoted(&bound))]);
    let _ = ran.refuses(&[name(&bound), "mount the whole filesystem"]);

    let tmpfs = system.home().at("tmpfs");
    mount(&["-t", "tmpfs", "none"], &tmpfs);
    let ran = hsmd_with(&system, &[("mount", &quoted(&tmpfs))]);
    let _ = ran.refuses(&[name(&tmpfs), "tmpfs"]);

    for dir in ["tmpfs/lower", "tmpfs/upper", "tmpfs/work"] {
        system.home().dir(dir);
    }
    let options = format!(
        "lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work",
        tmpfs.display()
    );
    let overlay = system.home().at("overlay");
    mount(&["-t", "overlay", "none", "-o", &options], &overlay);
    let ran = hsmd_with(&system, &[("mount", &quoted(&overlay))]);
    let _ = ran.refuses(&[name(&overlay), "overlay"]);
}

#[test]
fn ext4_with_small_inodes() {
    let system = Setup::new(Kind::Ext4).build();
    let small = LoopFs::with_options(Kind::Ext4, SMALL_BYTES, &["-I", "128"]);
    let ran = hsmd_with(&system, &[("mount", &quoted(small.root()))]);
    let _ = ran.refuses(&[name(small.root()), "128 bytes", "mkfs.ext4 -I 256"]);
}

#[test]
fn configurations_that_cannot_be_read() {
    let system = Setup::new(Kind::Ext4).build();
    let good = system.config_text(&[]);
    let cases: &[(&str, &str, &str)] = &[
        ("rpo = \"1s\"", "rpu = \"1s\"", "rpu"),
        ("rpo = \"1s\"", "rpo = 1", "rpo"),
        ("rpo = \"1s\"", "rpo = \"soon\"", "soon"),
        ("rpo = \"1s\"", "rpo = \"0s\"", "rpo"),
        ("rpo = \"1s\"", "rpo = \"1s", "bad.toml"),
        ("rpo = \"1s\"", "rpo = \"1s\"\nrpo = \"2s\"", "rpo"),
        ("rpo = \"1s\"", "segment_bytes = \"1KiB\"", "segment_bytes"),
        ("name = \"pool0\"", "name = \"Pool 0\"", "pool 0"),
        ("[[pool]]", "[[pol]]", "pol"),
    ];
    for (key, bad, word) in cases {
        let text = format!(
            "rpo = \"1s\"\n{}",
            good.replace("segment_bytes = \"4MiB\"\n", "")
        );
        assert!(text.contains(key), "{text}");
        let ran = hsmd_on(&system, &text.replacen(key, bad, 1));
        let _ = ran.refuses(&["bad.toml", word]);
    }
    let missing = system.home().at("missing.toml");
    let mut command = Command::new(locate("hsmd"));
    command.arg("--config").arg(&missing);
    let _ = run_within(command, SOON).refuses(&[name(&missing)]);

    // One that others may write would let them command root.
    fs::write(system.home().at("bad.toml"), &good).expect("a configuration");
    let mode = fs::Permissions::from_mode(0o666);
    fs::set_permissions(system.home().at("bad.toml"), mode).expect("chmod");
    let mut command = Command::new(locate("hsmd"));
    command.arg("--config").arg(system.home().at("bad.toml"));
    let _ = run_within(command, SOON).refuses(&["bad.toml", "chmod"]);
}

#[test]
fn own_files_on_the_watched_filesystem() {
    let mut system = Setup::new(Kind::Ext4).build();
    for key in ["spool", "catalog", "socket"] {
        let inside = system.at(key);
        let ran = hsmd_with(&system, &[(key, &quoted(&inside))]);
        let _ = ran.refuses(&[name(&inside), "watched filesystem"]);
    }
    // By way of a symlink it is no better.
    fs::create_dir(system.at("hidden")).expect("a directory");
    let link = system.home().at("link");
    std::os::unix::fs::symlink(system.at("hidden"), &link).expect("a symlink");
    let ran = hsmd_with(&system, &[("spool", &quoted(&link))]);
    let _ = ran.refuses(&["watched filesystem"]);

    let volume = system.at("volume");
    fs::create_dir(&volume).expect("a directory");
    system.set_volumes(0, vec![volume.clone()]);
    let ran = hsmd_with(&system, &[]);
    let _ = ran.refuses(&[name(&volume), "watched filesystem"]);
}

/// `check-config` finds the same without starting anything.
#[test]
fn check_config_finds_it_too() {
    let system = Setup::new(Kind::Ext4).build();
    let check = |text: &str| {
        let config = system.home().at("bad.toml");
        fs::write(&config, text).expect("a configuration");
        let mut command = Command::new(locate("hsmd"));
        command.args(["check-config", "--config"]).arg(config);
        run_within(command, SOON)
    };
    let _ = check(&system.config_text(&[])).done();
    let absent = system.home().at("absent");
    let _ = check(&system.config_text(&[("mount", &quoted(&absent))])).refuses(&[name(&absent)]);
    let inside = system.at("spool");
    let _ = check(&system.config_text(&[("spool", &quoted(&inside))])).refuses(&[name(&inside)]);
    assert!(!system.catalog().exists(), "check-config changed something");
}

/// A log of its own with something in it, stopped.
fn stopped_log() -> System {
    let mut system = Setup::new(Kind::Ext4).start();
    fs::write(system.at("file"), "one log").expect("a file");
    system.sync_all();
    system.stop();
    system
}

fn volume_bytes(volume: &Path) -> String {
    must(Command::new("sh").arg("-c").arg(format!(
        "cd {} && find . -type f -printf '%p %s %T@\\n' | sort",
        volume.display()
    )))
}

#[test]
fn foreign_volumes() {
    let mut system = Setup::new(Kind::Ext4).build();
    let foreign = system.home().dir("foreign");
    fs::write(foreign.join("photo.jpg"), "somebody's").expect("a file");
    system.set_volumes(0, vec![foreign.clone()]);
    let ran = hsmd_with(&system, &[]);
    let _ = ran.refuses(&[name(&foreign), "photo.jpg"]);
    assert_eq!(
        fs::read_dir(&foreign).expect("the directory").count(),
        1,
        "something was written"
    );

    let other = stopped_log();
    let theirs = other.volumes(0)[0].clone();
    let before = volume_bytes(&theirs);
    system.set_volumes(0, vec![theirs.clone()]);
    let ran = hsmd_with(&system, &[]);
    let _ = ran.refuses(&[name(&theirs), "log"]);
    assert_eq!(
        before,
        volume_bytes(&theirs),
        "another log's volume was changed"
    );
}

#[test]
fn a_volume_of_another_pool() {
    let mut system = stopped_log();
    let volume = system.volumes(0)[0].clone();
    let text = system.config_text(&[]).replace("pool0\"\n", "other\"\n");
    let ran = hsmd_on(&system, &text);
    let _ = ran.refuses(&[name(&volume), "pool0", "other"]);
    system.start();
    system.check("after a refusal");
}

#[test]
fn a_volume_of_a_newer_format() {
    let mut system = stopped_log();
    let volume = system.volumes(0)[0].clone();
    must(Command::new("chattr").args(["-R", "-i"]).arg(&volume));
    let label = volume.join("VOLUME.json");
    let text = fs::read_to_string(&label).expect("the label");
    let newer = text.replace("\"format\": 1", "\"format\": 7");
    assert_ne!(text, newer);
    let old = fs::metadata(&label).expect("the label").permissions();
    let writable = fs::Permissions::from_mode(0o644);
    let store = |text: &str| {
        let sum = format!("{}  VOLUME.json\n", blake3::hash(text.as_bytes()));
        for (path, text) in [(label.clone(), text), (volume.join("VOLUME.json.b3"), &sum)] {
            fs::set_permissions(&path, writable.clone()).expect("chmod");
            fs::write(&path, text).expect("the label");
            fs::set_permissions(&path, old.clone()).expect("chmod");
        }
    };
    store(&newer);
    let _ = hsmd_with(&system, &[]).refuses(&[name(&volume), "format 7", "newer version"]);
    let target = system.fresh();
    let ran = system.replay_from(&system.volumes(0), target.root(), &[]);
    let _ = ran.refuses(&["format 7", "newer version"]);
    store(&text);
    system.start();
    system.check("with the label as it was");
}

/// Spool, catalog and volume must be of one log.
#[test]
fn wrong_log_ids() {
    let (mut one, two) = (stopped_log(), stopped_log());
    let tree = Tree::read(one.root());

    let ran = hsmd_with(&one, &[("spool", &quoted(&two.spool()))]);
    let _ = ran.refuses(&["log"]);
    let ran = hsmd_with(&one, &[("catalog", &quoted(&two.catalog()))]);
    let _ = ran.refuses(&["log"]);
    // Another filesystem under the same log would have everything logged as deleted.
    let ran = hsmd_with(&one, &[("mount", &quoted(two.root()))]);
    let _ = ran.refuses(&[name(two.root()), "not the one"]);

    one.start();
    one.check("after all these");
    assert_equal(&tree, &Tree::read(one.root()), "the tree itself");

    let fresh = one.fresh();
    let both = [one.volumes(0), two.volumes(0)].concat();
    let _ = one.replay_from(&both, fresh.root(), &[]).refuses(&["log"]);
    assert_eq!(Tree::read(fresh.root()).len(), 1, "something was written");
}

#[test]
fn two_daemons_on_one_log() {
    let mut system = Setup::new(Kind::Ext4).start();
    let pid = system.daemon().pid().to_string();
    let second = hsmd_with(&system, &[]);
    let _ = second.refuses(&["another hsmd", &pid]);
    // With a spool and catalog of its own it would begin another log of the same filesystem.
    let home = Home::new();
    let (spool, catalog) = (home.dir("spool"), home.at("catalog.db"));
    let socket = home.at("hsmd.sock");
    let second = hsmd_with(
        &system,
        &[
            ("spool", &quoted(&spool)),
            ("catalog", &quoted(&catalog)),
            ("socket", &quoted(&socket)),
        ],
    );
    assert_eq!(second.code, 2, "{second}");
    fs::write(system.at("file"), "x").expect("a file");
    system.check("beside a second daemon");
}

#[test]
fn no_privileges() {
    let system = Setup::new(Kind::Ext4).build();
    let without = |arguments: &[&str]| {
        let mut command = Command::new("setpriv");
        command
            .args(arguments)
            .arg(locate("hsmd"))
            .arg("--config")
            .arg(system.config());
        run_within(command, SOON)
    };
    let ran = without(&["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]);
    let _ = ran.refuses(&["CAP_SYS_ADMIN", "give them to"]);

    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(system.home().path(), open).expect("chmod");
    let ran = without(&["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    let _ = ran.refuses(&["CAP_SYS_ADMIN"]);
}

/// A spool whose disk is full: the daemon says so, and what happened meanwhile is not lost.
#[test]
fn a_full_spool_disk() {
    let disk = LoopFs::new(Kind::Ext4, 48 << 20);
    let spool = disk.at("spool");
    let mut system = Setup::new(Kind::Ext4)
        .with("spool", &quoted(&spool))
        .with("segment_bytes", "\"1MiB\"")
        .build();
    // The volume is absent, so the spool cannot be emptied.
    let volume = system.volumes(0)[0].clone();
    let away = volume.with_extension("away");
    fs::rename(&volume, &away).expect("to take the volume away");
    system.start();
    for n in 0..60u64 {
        fs::write(system.at(format!("file{n}")), noise(n, 1 << 20)).expect("a file");
    }
    let status = system.wait_for("the spool is full", |status| {
        status["spool"]["full"] == true
            || status["notices"]
                .to_string()
                .to_lowercase()
                .contains("full")
    });
    let notices = status["notices"].to_string();
    assert!(
        notices.contains(name(&spool)),
        "the notice names the spool: {notices}"
    );
    fs::remove_file(system.at("file7")).expect("to remove a file");
    fs::write(system.at("file8"), "changed while the spool was full").expect("a file");

    // Started on a full disk it refuses, or waits and says so; either way nothing is lost.
    system.kill9();
    match system.try_start() {
        Ok(()) => {
            system.wait_for("the full spool is told again", |status| {
                status["notices"].to_string().contains(name(&spool))
            });
        }
        Err(ran) => {
            let _ = ran.refuses(&[name(&spool)]);
            fs::rename(&away, &volume).expect("to bring the volume back");
            system.start();
        }
    }
    if away.exists() {
        fs::rename(&away, &volume).expect("to bring the volume back");
    }
    system.check("after the spool was full");
}

#[test]
fn replay_refuses_what_it_cannot_do() {
    let system = stopped_log();
    let volume = system.volumes(0);
    let fresh = system.fresh();
    let refused = |volumes: &[PathBuf], to: &Path, more: &[&str], words: &[&str]| {
        let _ = system.replay_from(volumes, to, more).refuses(words);
    };
    let absent = system.home().at("absent");
    refused(
        std::slice::from_ref(&absent),
        fresh.root(),
        &[],
        &[name(&absent)],
    );
    let empty = system.home().dir("empty");
    refused(
        std::slice::from_ref(&empty),
        fresh.root(),
        &[],
        &[name(&empty)],
    );
    refused(&volume, system.root(), &[], &[name(system.root()), "empty"]);
    refused(&volume, fresh.root(), &["--until", "999999"], &["999999"]);
    refused(
        &volume,
        fresh.root(),
        &["--until", "yesterday"],
        &["yesterday"],
    );
    refused(
        &volume,
        fresh.root(),
        &["--until", "1999-01-01T00:00:00Z"],
        &["1999"],
    );
    refused(
        &volume,
        fresh.root(),
        &["--path", "not/there"],
        &["not/there"],
    );
    let file = system.home().at("a file");
    File::create(&file).expect("a file");
    refused(&volume, &file, &[], &[name(&file)]);
    assert_eq!(Tree::read(fresh.root()).len(), 1, "something was written");
}

#[test]
fn tierctl_refuses_what_it_cannot_do() {
    let mut system = stopped_log();
    let _ = system.tierctl(&["status"]).refuses(&["hsmd --config"]);
    let _ = system
        .tierctl(&["catalog", "rebuild", "--nonsense"])
        .with_code(2);
    system.start();
    let _ = system
        .tierctl(&["log", "cat", "/etc/passwd"])
        .refuses(&["/etc/passwd"]);
    // What is not there is a negative answer.
    let never = system.at("never there");
    let questions: [&[&str]; 3] = [
        &["log", "show", "999999"],
        &["log", "list", name(&never)],
        &["volume", "show", "0123456789abcdef"],
    ];
    for question in questions {
        let asked = system.tierctl(question).with_code(1);
        let about = question.last().expect("a word");
        assert!(asked.text().contains(about), "{asked}");
    }
}
