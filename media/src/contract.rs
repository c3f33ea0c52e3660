//! The contract of [`Volume`] as tests that every backend must pass: `contract::holds(&backend)`.
//!
//! Checks beyond it (full media, kills, damage to a backend's own structures) are the backend's.

use std::collections::BTreeMap;
use std::io::{self, Cursor, Read};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::{Entry, Error, ObjectName, Volume, Written};

/// What a backend gives to be tested.
pub(crate) trait Backend {
    type Volume: Volume;

    /// A new, empty volume.
    fn fresh(&self) -> Self::Volume;

    /// The same medium opened anew, as after a restart.
    fn again(&self, volume: &Self::Volume) -> Self::Volume;

    /// Changes the byte at `at` of an object behind the volume's back.
    fn flip(&self, volume: &Self::Volume, name: &ObjectName, at: u64);
}

/// Runs every check, each on a fresh volume.
pub(crate) fn holds<B: Backend>(backend: &B) {
    stored_objects_are_read_back(backend);
    the_inventory_is_sorted_and_survives(backend);
    other_bytes_are_refused(backend);
    wrong_sources_leave_nothing(backend);
    reads_at_every_offset(backend);
    damage_is_found_and_never_overwritten(backend);
    unknown_objects_are_named(backend);
    writers_do_not_disturb_each_other(backend);
    random_appends_match_a_model(backend);
}

pub(crate) fn name(text: &str) -> ObjectName {
    ObjectName::new(text).unwrap()
}

pub(crate) fn hash(data: &[u8]) -> [u8; 32] {
    *blake3::hash(data).as_bytes()
}

/// Bytes that differ at every place and for every seed.
pub(crate) fn data(seed: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut out);
    out
}

pub(crate) fn append(volume: &dyn Volume, at: &ObjectName, data: &[u8]) -> Result<Written, Error> {
    volume.append(at, data.len() as u64, &hash(data), &mut Cursor::new(data))
}

pub(crate) fn content(volume: &dyn Volume, at: &ObjectName) -> Vec<u8> {
    let object = volume.open(at).unwrap();
    let mut all = vec![0; usize::try_from(object.bytes()).unwrap()];
    object.read_exact_at(0, &mut all).unwrap();
    all
}

fn stored_objects_are_read_back<B: Backend>(backend: &B) {
    let volume = backend.fresh();
    for (i, bytes) in [0, 1, 4095, 4096, 65537, 3 * 1024 * 1024 + 5]
        .into_iter()
        .enumerate()
    {
        let at = name(&format!("segments/000000/{i}.hsm.zst"));
        let data = data(i as u64, bytes);
        assert_eq!(append(&volume, &at, &data).unwrap(), Written::Stored);
        assert_eq!(content(&volume, &at), data);
        let entry = Entry {
            name: at.clone(),
            bytes: bytes as u64,
            hash: hash(&data),
        };
        assert_eq!(volume.verify(&at).unwrap(), entry);
        assert_eq!(append(&volume, &at, &data).unwrap(), Written::AlreadyThere);
    }
    assert!(volume.free_bytes().unwrap() > 0);
}

fn the_inventory_is_sorted_and_survives<B: Backend>(backend: &B) {
    let volume = backend.fresh();
    assert!(volume.list().unwrap().is_empty());
    let mut names = [
        "z",
        "a/b/c",
        "a/b-c",
        "a.b",
        "a/b/0",
        "0/1",
        &"n".repeat(200),
    ]
    .map(name);
    for (i, at) in names.iter().enumerate() {
        append(&volume, at, &data(i as u64, 10 * i)).unwrap();
    }
    names.sort();
    let listed = volume.list().unwrap();
    assert_eq!(
        listed.iter().map(|e| &e.name).collect::<Vec<_>>(),
        names.iter().collect::<Vec<_>>()
    );
    let again = backend.again(&volume);
    assert_eq!(again.label(), volume.label());
    assert_eq!(again.list().unwrap(), listed);
    let inventory = again.inventory().unwrap();
    assert_eq!(inventory.entries, listed);
    assert!(
        inventory.faults.is_empty()
            && inventory.unlisted.is_empty()
            && inventory.strangers.is_empty()
    );
    for entry in listed {
        assert_eq!(again.verify(&entry.name).unwrap(), entry);
    }
}

fn other_bytes_are_refused<B: Backend>(backend: &B) {
    let volume = backend.fresh();
    let at = name("segments/000000/1");
    let first = data(1, 100_000);
    append(&volume, &at, &first).unwrap();
    for other in [data(2, 100_000), data(1, 99_999), Vec::new()] {
        let error = append(&volume, &at, &other).unwrap_err();
        assert!(matches!(error, Error::Exists { .. }), "{error}");
        assert_eq!(content(&volume, &at), first);
        volume.verify(&at).unwrap();
    }
    assert_eq!(volume.list().unwrap().len(), 1);
}

/// Fails after some bytes.
struct Failing(usize);

impl Read for Failing {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.0 == 0 {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let n = self.0.min(buf.len());
        buf[..n].fill(7);
        self.0 -= n;
        Ok(n)
    }
}

fn wrong_sources_leave_nothing<B: Backend>(backend: &B) {
    let volume = backend.fresh();
    let at = name("a/b");
    let right = data(1, 3_000_000);
    let bytes = right.len() as u64;
    for (wrong, why) in [
        (&right[1..], "2999999"),
        (&[&right[..], &[0]].concat(), "at least"),
        (&data(2, right.len())[..], "expected"),
        (&[][..], "got 0"),
    ] {
        let error = volume
            .append(&at, bytes, &hash(&right), &mut Cursor::new(wrong))
            .unwrap_err();
        assert!(matches!(error, Error::BadSource { .. }), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    }
    let error = volume
        .append(&at, bytes, &hash(&right), &mut Failing(2_000_000))
        .unwrap_err();
    assert!(matches!(error, Error::Source { .. }), "{error}");
    let inventory = volume.inventory().unwrap();
    assert!(inventory.entries.is_empty() && inventory.unlisted.is_empty());
    assert_eq!(append(&volume, &at, &right).unwrap(), Written::Stored);
}

fn reads_at_every_offset<B: Backend>(backend: &B) {
    let volume = backend.fresh();
    let data = data(9, 1000);
    append(&volume, &name("x"), &data).unwrap();
    let object = volume.open(&name("x")).unwrap();
    assert_eq!(object.bytes(), 1000);
    for (offset, bytes) in [(0, 1000), (0, 0), (999, 1), (500, 250), (1000, 0)] {
        let mut buf = vec![0; bytes];
        object.read_exact_at(offset as u64, &mut buf).unwrap();
        assert_eq!(buf, data[offset..offset + bytes]);
    }
    assert_eq!(object.read_at(1000, &mut [0; 4]).unwrap(), 0);
    for offset in [1000, 999, 5000, i64::MAX as u64] {
        let error = object.read_exact_at(offset, &mut [0; 2]).unwrap_err();
        assert!(error.to_string().contains('x'), "{error}");
    }
    assert!(object.read_exact_at(u64::MAX, &mut [0; 2]).is_err());
}

fn damage_is_found_and_never_overwritten<B: Backend>(backend: &B) {
    let volume = backend.fresh();
    let (at, data) = (name("segments/000000/7"), data(7, 200_000));
    append(&volume, &at, &data).unwrap();
    append(&volume, &name("whole"), &data).unwrap();
    backend.flip(&volume, &at, 123_456);
    for error in [
        volume.verify(&at).unwrap_err(),
        append(&volume, &at, &data).unwrap_err(),
    ] {
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        assert!(error.to_string().contains("segments/000000/7"), "{error}");
    }
    assert_ne!(
        content(&volume, &at),
        data,
        "write once: the damage is left as it is"
    );
    assert_eq!(volume.list().unwrap().len(), 2);
    volume.verify(&name("whole")).unwrap();
}

fn unknown_objects_are_named<B: Backend>(backend: &B) {
    let volume = backend.fresh();
    append(&volume, &name("a/b"), b"x").unwrap();
    for missing in ["x", "a", "a/c", "b/b", "a/b/c"] {
        let at = name(missing);
        let open = volume.open(&at).err().unwrap();
        for error in [open, volume.verify(&at).unwrap_err()] {
            assert!(!error.is_absent() && !error.is_full());
            assert!(error.to_string().contains(missing), "{error}");
        }
    }
}

fn writers_do_not_disturb_each_other<B: Backend>(backend: &B) {
    let volume = backend.fresh();
    let stored = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let (volume, stored) = (&volume as &dyn Volume, &stored);
            scope.spawn(move || {
                append(
                    volume,
                    &name(&format!("own/{thread}")),
                    &data(thread, 300_000),
                )
                .unwrap();
                if append(volume, &name("one/for/all"), &data(99, 300_000)).unwrap()
                    == Written::Stored
                {
                    stored.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(stored.into_inner(), 1);
    let listed = volume.list().unwrap();
    assert_eq!(listed.len(), 5);
    for entry in listed {
        volume.verify(&entry.name).unwrap();
    }
}

fn random_appends_match_a_model<B: Backend>(backend: &B) {
    let step = (
        "[ab](/[ab]{1,2}){0,2}",
        0u64..3,
        0usize..5000,
        any::<bool>(),
    );
    let mut runner = TestRunner::new(Config::with_cases(12));
    let steps = proptest::collection::vec(step, 1..25);
    let checked = runner.run(&steps, |steps| {
        let mut volume = backend.fresh();
        let mut model = BTreeMap::<ObjectName, Vec<u8>>::new();
        for (at, seed, bytes, reopen) in steps {
            let (at, data) = (name(&at), data(seed, bytes));
            let done = append(&volume, &at, &data);
            match (model.get(&at), done) {
                (Some(there), Ok(Written::AlreadyThere)) => prop_assert_eq!(there, &data),
                (Some(there), Err(Error::Exists { .. })) => prop_assert_ne!(there, &data),
                (None, Ok(Written::Stored)) => {
                    model.insert(at, data);
                }
                // A file where the name wants a directory, or the other way round.
                (None, Err(Error::Io { .. } | Error::Corrupt { .. })) => {
                    prop_assert!(conflicts(&model, &at));
                }
                (_, other) => prop_assert!(false, "{at}: {other:?}"),
            }
            if reopen {
                volume = backend.again(&volume);
            }
        }
        let listed = volume.list().unwrap();
        prop_assert!(listed.iter().map(|e| &e.name).eq(model.keys()));
        for (at, data) in &model {
            prop_assert_eq!(&content(&volume, at), data);
        }
        Ok(())
    });
    checked.unwrap();
}

fn conflicts(model: &BTreeMap<ObjectName, Vec<u8>>, at: &ObjectName) -> bool {
    let below = |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.starts_with('/'));
    model
        .keys()
        .any(|there| below(there.as_str(), at.as_str()) || below(at.as_str(), there.as_str()))
}
