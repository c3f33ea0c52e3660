//! What is true of everything: ages, troubles, the state.

use super::*;
use crate::capture::hints::{Beside, Key, Look};

fn shared() -> Shared {
    Shared::new(Duration::ZERO)
}

fn key(byte: u8) -> Key {
    Key::Inode(Handle::from_bytes(&[1, 0, 0, 0, byte, 0, 0, 0, 9, 9, 9, 9]).unwrap())
}

fn note(shared: &Shared, byte: u8) {
    shared.note([(key(byte), Look::Content, Beside::Nothing)]);
}

/// Everything that is due is examined and appended as one transaction.
fn append(shared: &Shared) {
    let due = shared
        .hints()
        .take_due(Instant::now() + Duration::from_secs(1), 100, u64::MAX);
    shared.advance(|progress| progress.written += 1);
    for hint in due {
        shared.hints().finish(&hint);
    }
}

fn sync(shared: &Shared) {
    shared.advance(|progress| progress.durable = progress.written);
}

#[test]
fn what_is_appended_is_old_until_it_is_durable() {
    let shared = shared();
    note(&shared, 1);
    std::thread::sleep(Duration::from_millis(30));
    append(&shared);
    assert_eq!(shared.hints().open(), 0);
    let age = shared.age_beyond(shared.progress().durable).unwrap();
    assert!(age >= Duration::from_millis(30), "{age:?}");
    sync(&shared);
    assert_eq!(shared.age_beyond(shared.progress().durable), None);
    // A pool that lacks it has an older gap than the commit's own time says.
    assert!(shared.age_beyond(0).unwrap() >= age);
}

#[test]
fn ages_are_bounded_and_never_too_young() {
    let (mut ages, start) = (Ages::default(), Instant::now());
    let at = |lsn: u64| start + Duration::from_secs(lsn);
    for lsn in 1..=20_000 {
        ages.note(lsn, at(lsn));
    }
    assert!(ages.0.len() <= AGES_KEPT);
    for lsn in [0, 1, 77, 9_999, 19_999] {
        assert!(ages.beyond(lsn).unwrap() <= at(lsn + 1), "{lsn}");
    }
    assert_eq!(ages.beyond(20_000), None);
    // A change that waited long makes all before it look as old.
    ages.note(20_001, at(5));
    assert!(ages.beyond(19_000).unwrap() <= at(5));
}

#[test]
fn the_start_is_over_when_its_findings_are_durable() {
    let shared = shared();
    assert_eq!(shared.state(), State::Examining);
    let covers = shared.sweep_begins();
    note(&shared, 1);
    shared.sweep_ends(covers);
    assert_eq!(shared.state(), State::Examining, "it is only noted");
    append(&shared);
    assert_eq!(shared.state(), State::Examining, "it is only appended");
    sync(&shared);
    assert_eq!(shared.state(), State::Following);
    // What an overflow dropped is not safe before a sweep has found it.
    shared.ask_examination();
    assert_eq!(shared.state(), State::Examining);
    let covers = shared.sweep_begins();
    shared.sweep_ends(covers);
    assert_eq!(shared.state(), State::Following);
}

#[test]
fn a_file_stays_unreadable_until_a_sweep_has_read_it() {
    let shared = shared();
    let covers = shared.sweep_begins();
    shared.sweep_ends(covers);
    shared.trouble("unreadable", true, "a file", "EIO", "");
    assert_eq!(shared.state(), State::Degraded);
    // A sweep begins, notes it, and it fails again.
    let covers = shared.sweep_begins();
    assert_eq!(shared.state(), State::Degraded);
    note(&shared, 1);
    shared.sweep_ends(covers);
    assert_eq!(shared.state(), State::Degraded);
    shared.trouble("unreadable", true, "a file", "EIO", "");
    append(&shared);
    sync(&shared);
    assert_eq!(shared.state(), State::Degraded);
    // The next one can read it.
    std::thread::sleep(Duration::from_millis(2));
    let covers = shared.sweep_begins();
    shared.sweep_ends(covers);
    assert_eq!(shared.state(), State::Following);
}

#[test]
fn a_refused_transaction_is_trouble_only_where_it_goes_on() {
    let shared = shared();
    shared.refused(Some(&"no such directory"));
    shared.refused(Some(&"no such directory"));
    assert!(shared.troubles().is_empty());
    shared.refused(None);
    assert!(lock(&shared.refused).is_none());
    *lock(&shared.refused) = Instant::now().checked_sub(REFUSED_FOR);
    shared.refused(Some(&"no such directory"));
    assert!(shared.troubles()[0].1.severe);
    shared.refused(None);
    assert!(shared.troubles().is_empty());
}

#[test]
fn paths_are_those_of_the_mount() {
    let whole = shared();
    whole.set_public(Path::new("/data"), Vec::new());
    assert_eq!(whole.on_mount(b"").unwrap(), "/data");
    assert_eq!(whole.on_mount(b"a/b").unwrap(), "/data/a/b");
    let part = shared();
    part.set_public(Path::new("/data"), b"@home".to_vec());
    assert_eq!(part.on_mount(b"@home").unwrap(), "/data");
    assert_eq!(part.on_mount(b"@home/a").unwrap(), "/data/a");
    assert_eq!(part.on_mount(b"@homes/a"), None);
    assert_eq!(part.on_mount(b"@root"), None);
}
