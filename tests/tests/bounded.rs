//! P2, bounded: a change is durable in the spool within `rpo`, and its state can be asked for.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use hsm_tests::changes::noise;
use hsm_tests::loopfs::Kind;
use hsm_tests::report::say;
use hsm_tests::system::{Setup, System};
use serde_json::Value;

/// This machine may be busy with other tests.
const PATIENCE: Duration = Duration::from_secs(8);

fn state(system: &System, name: &str) -> Value {
    let path = system.at(name);
    let answer = system.tierctl(&["state", "--json", path.to_str().expect("ASCII")]);
    let answer = answer.json();
    let one = answer.get(0).or_else(|| answer["states"].get(0));
    one.cloned().unwrap_or(answer)
}

/// How long it takes until the file is in the log as large as it is, without any sync.
fn until_logged(system: &System, name: &str) -> Duration {
    let size = fs::metadata(system.at(name)).expect("the file").len();
    let start = Instant::now();
    loop {
        let state = state(system, name);
        let word = state["state"].as_str().unwrap_or_default().to_owned();
        if ["logged", "premigrated"].contains(&word.as_str()) && state["size"] == size {
            return start.elapsed();
        }
        assert!(start.elapsed() < PATIENCE, "{name}: {state:#}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn changes_are_durable_soon_without_being_asked_for() {
    let mut system = Setup::new(Kind::Ext4).with("rpo", "\"500ms\"").start();
    for n in 0..5usize {
        let name = format!("file{n}");
        fs::write(system.at(&name), noise(n as u64, 10_000 * (n + 1))).expect("a file");
        let first = until_logged(&system, &name);
        let file = fs::OpenOptions::new().append(true).open(system.at(&name));
        std::io::Write::write_all(&mut file.expect("the file"), b"more").expect("a write");
        say(format_args!(
            "{first:?}, {:?}",
            until_logged(&system, &name)
        ));
    }
    // What is said to be durable survives a kill, with no sync before it.
    let lsn = system.status()["durable_lsn"].as_u64();
    system.kill9();
    system.start();
    assert!(system.status()["durable_lsn"].as_u64() >= lsn);
    system.check("after a kill");
}

#[test]
fn a_file_goes_through_its_states() {
    let system = Setup::new(Kind::Xfs).start();
    fs::write(system.at("file"), noise(1, 100_000)).expect("a file");
    system.sync(&["--to", "media"]);
    let there = state(&system, "file");
    assert_eq!(there["state"], "premigrated", "{there:#}");
    assert_eq!(there["pools_having"], 1, "{there:#}");
    let missing = system.at("missing");
    let asked = system.tierctl(&["state", missing.to_str().expect("ASCII")]);
    assert!([1, 2, 3].contains(&asked.code), "{asked}");
    assert!(asked.text().contains("missing"), "{asked}");
}

/// A burst larger than what can be logged at once: the lag is shown, and goes away.
#[test]
fn the_lag_is_shown() {
    let system = Setup::new(Kind::Ext4).bytes(2 << 30).start();
    for n in 0..400u64 {
        fs::write(system.at(format!("file{n}")), noise(n, 200_000)).expect("a file");
    }
    let during = system.status();
    assert!(during["lag"]["pending"].is_u64(), "{during:#}");
    system.sync(&[]);
    let after = system.wait_for("nothing is pending", |status| status["lag"]["pending"] == 0);
    assert!(after["lag"]["oldest_age_ms"].is_null(), "{after:#}");
    system.check("after a burst");
}
