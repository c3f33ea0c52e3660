//! `tierctl catalog` without a daemon: the catalog is made again from the log alone.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use tierfs::catalog::Reader;

use crate::fake::{Ran, run};
use crate::log;

fn tierctl(config: &Path, words: &[&str]) -> Ran {
    run(Command::new(env!("CARGO_BIN_EXE_tierctl"))
        .arg("--config")
        .arg(config)
        .args(words))
}

fn digest_of(catalog: &Path) -> String {
    let reader = Reader::open(catalog).unwrap();
    reader.queries().digest().unwrap().to_string()
}

fn config(dir: &Path) -> std::path::PathBuf {
    let (file, path) = (dir.join("hsmd.toml"), dir.display());
    std::fs::write(
        &file,
        format!(
            "mount = \"{path}/m\"\nspool = \"{path}/spool\"\ncatalog = \"{path}/catalog.db\"\nsocket = \"{path}/s\"\n\
             [[pool]]\nname = \"a\"\nvolumes = [\"{path}/v\"]\n"
        ),
    )
    .unwrap();
    file
}

#[test]
fn rebuilding_waits_for_the_daemon_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    // The maker holds the spool's lock, as the daemon does.
    let made = log::make(dir.path());
    let before = std::fs::read(&made.catalog).unwrap();
    let ran = tierctl(&config, &["catalog", "rebuild"]);
    assert_eq!(ran.code, 2);
    assert!(
        ran.err.contains("hsmd runs (process") && ran.err.contains("systemctl stop hsmd"),
        "{}",
        ran.err
    );
    assert_eq!(std::fs::read(&made.catalog).unwrap(), before);
}

#[test]
fn a_rebuilt_catalog_is_equal() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let made = log::make_sealed(dir.path());
    let wanted = digest_of(&made);
    // Offline, from the file.
    let ran = tierctl(&config, &["catalog", "digest"]);
    assert_eq!(ran.out, format!("{wanted}  LSN 6\n"), "{}", ran.err);
    for suffix in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(dir.path().join(format!("catalog.db{suffix}")));
    }
    let ran = tierctl(&config, &["catalog", "digest"]);
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("tierctl catalog rebuild"), "{}", ran.err);
    let ran = tierctl(&config, &["catalog", "rebuild", "--json"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let json: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(json["digest"].as_str(), Some(wanted.as_str()));
    assert_eq!(
        (json["lsn"].as_u64(), json["segments"].as_u64()),
        (Some(6), Some(2))
    );
    assert!(ran.err.contains("no volume is at"), "{}", ran.err);
    assert_eq!(digest_of(&made), wanted);
    // Over an existing one, and nothing is left beside it.
    assert_eq!(tierctl(&config, &["catalog", "rebuild"]).code, 0);
    assert!(!dir.path().join("catalog.db.rebuild").exists());
}

#[test]
fn what_a_daemon_left_open_is_read_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let made = log::make_ended(dir.path());
    let wanted = digest_of(&made);
    let open: Vec<_> = std::fs::read_dir(dir.path().join("spool"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().contains(".open-"))
        .collect();
    assert_eq!(open.len(), 1);
    let bytes = std::fs::read(&open[0]).unwrap();
    let ran = tierctl(&config, &["catalog", "rebuild"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.out.contains("from 2 segments, up to LSN 6"),
        "{}",
        ran.out
    );
    assert_eq!(digest_of(&made), wanted);
    assert_eq!(std::fs::read(&open[0]).unwrap(), bytes);
    // Torn in the last transaction: everything before it.
    std::fs::write(&open[0], &bytes[..bytes.len() - 5]).unwrap();
    let ran = tierctl(&config, &["catalog", "rebuild"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.contains("up to LSN 5"), "{}", ran.out);
}

#[test]
fn a_log_with_a_gap_leaves_the_old_catalog() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let made = log::make_sealed(dir.path());
    let before = std::fs::read(&made).unwrap();
    std::fs::remove_file(dir.path().join("spool/0000000001.hsm.zst")).unwrap();
    let ran = tierctl(&config, &["catalog", "rebuild"]);
    assert_eq!(ran.code, 2);
    assert!(
        ran.err.contains("segment 1") && ran.err.contains("the old one is as it was"),
        "{}",
        ran.err
    );
    assert_eq!(std::fs::read(&made).unwrap(), before);
    assert!(!dir.path().join("catalog.db.rebuild").exists());
}

#[test]
fn nothing_to_rebuild_from() {
    let dir = tempfile::tempdir().unwrap();
    let ran = tierctl(&config(dir.path()), &["catalog", "rebuild"]);
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("mount the volumes"), "{}", ran.err);
}
