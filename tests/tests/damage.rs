//! Damaged volumes: what one copy has lost is read from the other; where there is no other it is
//! named, and never restored wrong in silence.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use hsm_tests::changes::noise;
use hsm_tests::compare::{Tree, assert_equal, differences, listing};
use hsm_tests::home::Home;
use hsm_tests::loopfs::{Kind, must};
use hsm_tests::report::say;
use hsm_tests::system::{Setup, System};

/// Several segments' worth of files, in two versions.
fn grow(system: &System) {
    for version in 0..2 {
        for n in 0..12u64 {
            let dir = system.at(format!("d{}", n % 3));
            fs::create_dir_all(&dir).expect("a directory");
            let bytes = noise(n * 100 + version, 900_000);
            fs::write(dir.join(format!("file{n}")), bytes).expect("a file");
        }
        fs::write(system.at("words"), "words ".repeat(100_000)).expect("a file");
        system.sync(&["--to", "media"]);
    }
}

/// The segments of a volume, in order. Anything large is one.
fn segments(volume: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![volume.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(dir).expect("a directory").flatten() {
            let path = entry.path();
            if path.is_dir() {
                left.push(path);
            } else if path.to_string_lossy().contains(".hsm.zst")
                && !path.to_string_lossy().ends_with(".b3")
            {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(found.len() >= 3, "{}: {found:?}", volume.display());
    found
}

/// A copy of a volume that may be damaged: the immutable flags are not copied.
fn scratch_copy(volume: &Path, home: &Home, name: &str) -> PathBuf {
    let copy = home.at(name);
    must(Command::new("cp").args(["-a", "-T"]).args([volume, &copy]));
    must(Command::new("chmod").args(["-R", "u+w"]).arg(&copy));
    copy
}

fn flip(path: &Path, at: u64) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 0x40], at)
}

fn resize(path: &Path, len: u64) -> io::Result<()> {
    File::options().write(true).open(path)?.set_len(len)
}

/// Damages one segment out of several.
type Damage = fn(&[PathBuf]) -> io::Result<()>;

fn middle(segments: &[PathBuf]) -> (&Path, u64) {
    let path = &segments[segments.len() / 2];
    (path, fs::metadata(path).expect("a segment").len())
}

const DAMAGES: &[(&str, Damage)] = &[
    ("a flipped bit in the middle", |s| {
        let (path, len) = middle(s);
        flip(path, len / 2)
    }),
    ("a flipped bit in the header", |s| flip(middle(s).0, 20)),
    ("a flipped bit in the trailer", |s| {
        let (path, len) = middle(s);
        flip(path, len - 5)
    }),
    ("flipped bits in every segment", |s| {
        s.iter()
            .try_for_each(|path| flip(path, fs::metadata(path)?.len() / 3))
    }),
    ("a segment cut in half", |s| {
        let (path, len) = middle(s);
        resize(path, len / 2)
    }),
    ("an empty segment", |s| resize(middle(s).0, 0)),
    ("a longer segment", |s| {
        let (path, len) = middle(s);
        resize(path, len + 1000)
    }),
    ("a segment of zeros", |s| {
        let (path, len) = middle(s);
        resize(path, 0)?;
        resize(path, len)
    }),
    ("a missing segment", |s| fs::remove_file(middle(s).0)),
    ("the first segment missing", |s| fs::remove_file(&s[0])),
    ("two segments swapped", |s| {
        let between = s[0].with_extension("between");
        fs::rename(&s[0], &between)?;
        fs::rename(&s[1], &s[0])?;
        fs::rename(between, &s[1])
    }),
];

#[test]
fn every_damage_is_healed_from_the_other_pool_or_named() {
    let mut system = Setup::new(Kind::Ext4)
        .pools(2)
        .with("segment_bytes", "\"2MiB\"")
        .start();
    grow(&system);
    system.sync_all();
    system.stop();
    let expected = Tree::read(system.root());
    let good = system.volumes(1);
    for (number, (name, damage)) in DAMAGES.iter().enumerate() {
        say(format_args!("{name}"));
        let bad = scratch_copy(
            &system.volumes(0)[0],
            system.home(),
            &format!("bad{number}"),
        );
        damage(&segments(&bad)).unwrap_or_else(|e| panic!("{name}: {e}"));

        let fresh = system.fresh();
        let both = [bad.clone(), good[0].clone()];
        let healed = system.replay_from(&both, fresh.root(), &[]).done();
        assert_equal(
            &expected,
            &Tree::read(fresh.root()),
            &format!("{name}, healed: {healed}"),
        );

        let fresh = system.fresh();
        let alone = system.replay_from(std::slice::from_ref(&bad), fresh.root(), &[]);
        let found = differences(&expected, &Tree::read(fresh.root()));
        assert!(!alone.text().contains("panicked"), "{name}: {alone}");
        match alone.code {
            // Only where nothing that is needed was hit.
            0 => assert!(found.is_empty(), "{name}: {}\n{alone}", listing(&found)),
            2 => {}
            3 => {
                for difference in &found {
                    // Directories whose entries are lost have other times; files are named.
                    let file = difference.path.rsplit('/').next().unwrap_or_default();
                    let named = alone.text().contains(file);
                    assert!(named, "{name}: not named: {difference}\n{alone}");
                }
            }
            code => panic!("{name}: status {code}: {alone}"),
        }
        let verified = system.tierctl(&["volume", "verify", bad.to_str().expect("a path")]);
        assert!(
            verified.code != 0 || *name == "a longer segment",
            "{name}: the volume's check finds nothing: {verified}"
        );
    }
}

/// Whatever byte is hit, replay never restores wrong bytes as if they were right.
#[test]
fn random_flips_never_pass_unseen() {
    let mut system = Setup::new(Kind::Ext4)
        .with("segment_bytes", "\"1MiB\"")
        .start();
    for n in 0..30u64 {
        let bytes = noise(n, 60_000);
        fs::write(system.at(format!("file{n:02}")), bytes).expect("a file");
    }
    system.sync_all();
    system.stop();
    let expected = Tree::read(system.root());
    let seed = hsm_tests::workload::seed();
    for round in 0..u64::from(hsm_tests::workload::rounds(8)) {
        let bad = scratch_copy(
            &system.volumes(0)[0],
            system.home(),
            &format!("flip{round}"),
        );
        let all = segments_of_any_size(&bad);
        let random = u64::from_le_bytes(noise(seed + round, 8).try_into().expect("8 bytes"));
        let path = &all[usize::try_from(random % all.len() as u64).expect("an index")];
        let at = (random >> 8) % fs::metadata(path).expect("a file").len();
        flip(path, at).expect("a flip");
        let context = format!("HSM_SEED={seed}, round {round}: {} at {at}", path.display());
        let fresh = system.fresh();
        let ran = system.replay_from(std::slice::from_ref(&bad), fresh.root(), &[]);
        assert!([0, 2, 3].contains(&ran.code), "{context}: {ran}");
        let found = differences(&expected, &Tree::read(fresh.root()));
        if ran.code == 0 {
            assert!(found.is_empty(), "{context}: {}\n{ran}", listing(&found));
        }
    }
}

fn segments_of_any_size(volume: &Path) -> Vec<PathBuf> {
    let output = must(
        Command::new("find")
            .arg(volume)
            .args(["-type", "f", "-size", "+1k"]),
    );
    output.lines().map(PathBuf::from).collect()
}

/// A copy that is damaged while the daemon runs is reported by the check.
#[test]
fn the_check_of_a_volume_names_what_is_damaged() {
    let mut system = Setup::new(Kind::Ext4)
        .with("segment_bytes", "\"1MiB\"")
        .start();
    grow(&system);
    system.sync_all();
    let volume = system.volumes(0)[0].clone();
    let path = volume.to_str().expect("a path");
    let _ = system.tierctl(&["volume", "verify", path]).done();
    let all = segments(&volume);
    let victim = &all[1];
    must(Command::new("chattr").arg("-i").arg(victim));
    flip(victim, 30_000).expect("a flip");
    let name = victim
        .file_name()
        .expect("a name")
        .to_string_lossy()
        .into_owned();
    let live = system.tierctl(&["volume", "verify", path]).with_code(1);
    assert!(live.text().contains(&name), "{name}: {live}");
    system.stop();
    let alone = system.tierctl(&["volume", "verify", path]).with_code(1);
    assert!(alone.text().contains(&name), "{name}: {alone}");
}
