//! Stores through mmap raise no event and hide behind pages that are dirty already; whenever they
//! come, the next sweep after them finds them.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use hsm_tests::changes::noise;
use hsm_tests::compare::{Tree, assert_equal};
use hsm_tests::loopfs::Kind;
use hsm_tests::sys::SharedMap;
use hsm_tests::system::{Setup, System};
use hsm_tests::workload::{rounds, seed};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const LEN: usize = 300_000;
const FILES: u64 = 4;

/// Stores here and there, with pauses and now and then an msync, until it is stopped.
fn store(path: &Path, mut random: StdRng, stop: &AtomicBool) {
    let file = File::options()
        .read(true)
        .write(true)
        .open(path)
        .expect("the file");
    let mut map = SharedMap::new(&file, LEN).expect("a mapping");
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..random.random_range(1..10) {
            map.store(random.random_range(0..LEN), random.random());
        }
        if random.random_bool(0.2) {
            map.sync().expect("msync");
        }
        thread::sleep(Duration::from_micros(random.random_range(0..30_000)));
    }
}

/// What the log holds of a file now, without a replay.
fn logged(system: &System, path: &Path) -> Vec<u8> {
    let mut cat = std::process::Command::new(hsm_tests::program::locate("tierctl"));
    cat.arg("--config")
        .arg(system.config())
        .args(["log", "cat"])
        .arg(path);
    cat.output().expect("tierctl runs").stdout
}

fn stores_are_found(kind: Kind) {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    let system = Setup::new(kind).start();
    let paths: Vec<_> = (0..FILES)
        .map(|n| system.at(format!("mapped{n}")))
        .collect();
    for (number, path) in paths.iter().enumerate() {
        fs::write(path, noise(number as u64, LEN)).expect("a file");
    }
    for round in 0..rounds(12) {
        // Two of them begin as a hole again.
        for path in &paths[..2] {
            fs::remove_file(path).expect("to remove it");
            let file = File::create(path).expect("a file");
            file.set_len(LEN as u64).expect("its size");
        }
        let stop = AtomicBool::new(false);
        let sweeps = random.random_range(0..4);
        thread::scope(|scope| {
            for path in &paths {
                let (random, stop) = (StdRng::seed_from_u64(random.random()), &stop);
                scope.spawn(move || store(path, random, stop));
            }
            for _ in 0..sweeps {
                thread::sleep(Duration::from_millis(random.random_range(0..150)));
                system.sync(&["--sweep"]);
            }
            thread::sleep(Duration::from_millis(random.random_range(0..150)));
            stop.store(true, Ordering::Relaxed);
        });
        system.sync(&["--sweep"]);
        for path in &paths {
            let (there, logged) = (fs::read(path).expect("the file"), logged(&system, path));
            let differing = there.iter().zip(&logged).filter(|(a, b)| a != b).count();
            assert!(
                there.len() == logged.len() && differing == 0,
                "{kind}, round {round}, HSM_SEED={seed}: {}: {differing} bytes of {} are not logged",
                path.display(),
                there.len()
            );
        }
    }
    system.sync_all();
    let fresh = system.replay_to_fresh(&[]);
    assert_equal(
        &Tree::read(system.root()),
        &Tree::read(fresh.root()),
        "mapped files",
    );
}

#[test]
fn stores_are_found_on_ext4() {
    stores_are_found(Kind::Ext4);
}

#[test]
fn stores_are_found_on_xfs() {
    stores_are_found(Kind::Xfs);
}

#[test]
fn stores_are_found_on_btrfs() {
    stores_are_found(Kind::Btrfs);
}
