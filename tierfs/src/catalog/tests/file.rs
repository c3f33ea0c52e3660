//! The catalog's file: made, opened, left in the middle, read by others, refused.

use std::fs;

use rusqlite::Connection;

use super::build::*;
use crate::catalog::{Catalog, Error, History, Reader, Readers};
use crate::ids::Lsn;
use crate::record::Kind;

fn txns() -> Vec<Vec<crate::record::Op>> {
    let mut txns = vec![vec![filesystem(1), root()]];
    for file in 2..40 {
        let mut ops = vec![
            inode(file, Kind::Regular),
            link(1, &format!("f{file}"), file),
        ];
        ops.extend(version(file, vec![data(0, 1000 + file, file)]));
        txns.push(ops);
    }
    txns
}

#[test]
fn a_killed_process_goes_on_where_it_had_committed() {
    let dir = tempfile::tempdir().unwrap();
    let mut whole = temporary();
    fold(&mut whole, txns()).unwrap();
    for committed in [0, 1, 7, 38] {
        let path = dir.path().join(format!("{committed}.sqlite"));
        let mut catalog = Catalog::create(&path, LOG).unwrap();
        fold(&mut catalog, txns()[..committed].to_vec()).unwrap();
        catalog.commit().unwrap();
        fold(&mut catalog, txns()[committed..].to_vec()).unwrap();
        drop(catalog);
        let mut catalog = Catalog::open(&path).unwrap();
        let folded = catalog.folded().map_or(0, Lsn::get);
        assert_eq!(folded, committed as u64);
        fold(&mut catalog, txns()[committed..].to_vec()).unwrap();
        assert_eq!(catalog.digest().unwrap(), whole.digest().unwrap());
        assert_eq!(catalog.counts(), whole.counts());
        assert_eq!(catalog.next_file_id(), id(40));
        assert_eq!(catalog.log_id(), LOG);
    }
}

#[test]
fn readers_see_what_was_committed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalog.sqlite");
    let mut catalog = Catalog::create(&path, LOG).unwrap();
    let reader = Reader::open(&path).unwrap();
    assert_eq!(reader.queries().folded().unwrap(), None);
    fold(&mut catalog, txns()).unwrap();
    assert_eq!(reader.queries().folded().unwrap(), None);
    assert!(catalog.queries().lookup(id(1), b"f3").unwrap().is_some());
    catalog.commit().unwrap();
    let (last, _) = reader.queries().folded().unwrap().unwrap();
    assert_eq!(Some(last), catalog.folded());
    assert_eq!(reader.queries().log_id().unwrap(), LOG);
    assert_eq!(reader.queries().counts().unwrap(), catalog.counts());
    let seen = reader.snapshot(|queries| {
        let before = queries.counts()?;
        fold(&mut catalog, vec![vec![inode(50, Kind::Fifo)]])?;
        catalog.commit()?;
        assert_eq!(queries.counts()?, before);
        Ok::<_, Error>(before)
    });
    assert_eq!(
        seen.unwrap().files + 1,
        reader.queries().counts().unwrap().files
    );
    assert!(fs::metadata(&path).unwrap().len() > 0);
}

#[test]
fn a_reader_that_was_used_before_sees_what_is_committed_now() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalog.sqlite");
    let mut catalog = Catalog::create(&path, LOG).unwrap();
    let readers = Readers::new(path.clone());
    let files = || {
        readers
            .with(|reader| reader.queries().counts())
            .unwrap()
            .files
    };
    assert_eq!(files(), 0);
    fold(&mut catalog, txns()).unwrap();
    catalog.commit().unwrap();
    let before = files();
    assert!(before > 0);
    // One that is in a snapshot is nobody else's, and one that failed in it is none any more.
    let failed = readers.with(|reader| {
        reader.snapshot(|queries| {
            queries.counts()?;
            fold(&mut catalog, vec![vec![inode(50, Kind::Fifo)]])?;
            catalog.commit()?;
            assert_eq!(files(), before + 1);
            assert_eq!(queries.counts()?.files, before);
            Err::<(), _>(Error::NotYet {
                asked: Lsn::FIRST,
                folded: None,
            })
        })
    });
    assert!(failed.is_err());
    assert_eq!(files(), before + 1);
    assert_eq!(files(), before + 1);
    // Nothing of it holds the log's journal.
    assert_eq!(catalog.sync().unwrap(), catalog.folded());
}

#[test]
fn sync_says_what_survives() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalog.sqlite");
    let mut catalog = Catalog::create(&path, LOG).unwrap();
    assert_eq!(catalog.sync().unwrap(), None);
    fold(&mut catalog, txns()).unwrap();
    assert_eq!(catalog.sync().unwrap(), catalog.folded());
    // Only the database file, without its journal: as after a power loss.
    let copy = dir.path().join("copy.sqlite");
    fs::copy(&path, &copy).unwrap();
    let copied = Catalog::open(&copy).unwrap();
    assert_eq!(copied.folded(), catalog.folded());
    // While a query of another connection runs, the answer is what was reached before.
    let reached = catalog.folded();
    let reader = Reader::open(&path).unwrap();
    reader
        .snapshot(|queries| {
            queries.counts()?;
            fold(&mut catalog, vec![vec![inode(50, Kind::Fifo)]])?;
            let begun = std::time::Instant::now();
            assert_eq!(catalog.sync()?, reached);
            assert!(begun.elapsed().as_secs() < 5);
            Ok::<_, Error>(())
        })
        .unwrap();
    assert_eq!(catalog.sync().unwrap(), catalog.folded());
}

#[test]
fn connections_go_to_other_threads() {
    fn is_send<T: Send>() {}
    is_send::<Catalog>();
    is_send::<Reader>();
}

#[test]
fn nothing_is_made_over_something() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalog.sqlite");
    fs::write(&path, "").unwrap();
    drop(Catalog::create(&path, LOG).unwrap());
    let error = Catalog::create(&path, LOG).err().unwrap();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &fs::metadata(dir.path().join("catalog.sqlite"))
            .unwrap()
            .permissions(),
    );
    assert_eq!(mode & 0o400, 0o400);
    let error = Catalog::create(&dir.path().join("no/where"), LOG)
        .err()
        .unwrap();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn a_temporary_catalog_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut catalog = Catalog::temporary(Some(dir.path()), LOG, History::Drop).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    fold(&mut catalog, txns()).unwrap();
    catalog.commit().unwrap();
    fold(&mut catalog, vec![vec![inode(77, Kind::Fifo)]]).unwrap();
    let why = refusal(fold(&mut catalog, vec![vec![root(), delete(99)]]));
    assert_eq!(why.to_string(), "file 99 does not exist");
    assert_eq!(catalog.counts().files, 40);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_is_no_catalog_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalog.sqlite");
    let error = Catalog::open(&path).err().unwrap();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    assert!(matches!(Reader::open(&path), Err(Error::Missing { .. })));

    fs::write(&path, "no database".repeat(1000)).unwrap();
    let error = Catalog::open(&path).err().unwrap();
    assert!(matches!(error, Error::NotACatalog { .. }), "{error}");
    assert!(matches!(
        Reader::open(&path),
        Err(Error::NotACatalog { .. })
    ));
    assert!(fs::read(&path).unwrap().starts_with(b"no database"));

    let foreign = dir.path().join("foreign.sqlite");
    Connection::open(&foreign)
        .unwrap()
        .execute_batch("CREATE TABLE t(a)")
        .unwrap();
    let before = fs::read(&foreign).unwrap();
    let error = Catalog::open(&foreign).err().unwrap();
    assert!(matches!(error, Error::NotACatalog { .. }), "{error}");
    assert_eq!(fs::read(&foreign).unwrap(), before);
}

#[test]
fn other_versions_and_damage_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let open_after = |sql: &str| {
        let path = dir.path().join("catalog.sqlite");
        drop(fs::remove_file(&path));
        let mut catalog = Catalog::create(&path, LOG).unwrap();
        fold(&mut catalog, txns()).unwrap();
        catalog.sync().unwrap();
        drop(catalog);
        Connection::open(&path).unwrap().execute_batch(sql).unwrap();
        let error = Catalog::open(&path).err().unwrap();
        let text = error.to_string();
        assert!(text.contains("tierctl catalog rebuild"), "{text}");
        error
    };
    let error = open_after("PRAGMA user_version = 99");
    assert!(matches!(error, Error::NewerSchema { found: 99, .. }));
    let error = open_after("PRAGMA user_version = 0");
    assert!(matches!(error, Error::OlderSchema { found: 0, .. }));
    for damage in [
        "DROP INDEX dentry_file",
        "DROP TABLE extent_old",
        "DELETE FROM fold",
        "UPDATE fold SET next_file = 0",
        "UPDATE fold SET log_id = x'00'",
        "DELETE FROM txn WHERE lsn = 39",
        "INSERT INTO epoch VALUES (77, 77)",
    ] {
        let error = open_after(damage);
        assert!(matches!(error, Error::Corrupt { .. }), "{damage}: {error}");
    }
}

#[test]
fn no_byte_of_the_file_makes_the_catalog_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalog.sqlite");
    let mut catalog = Catalog::create(&path, LOG).unwrap();
    fold(&mut catalog, txns()).unwrap();
    catalog.sync().unwrap();
    drop(catalog);
    let whole = fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(619) {
        let damaged = dir.path().join("damaged.sqlite");
        let mut bytes = whole.clone();
        bytes[at] ^= 0x41;
        fs::write(&damaged, &bytes).unwrap();
        let Ok(mut catalog) = Catalog::open(&damaged) else {
            continue;
        };
        drop(catalog.queries().children(id(1), None, 100));
        drop(catalog.queries().extents(id(5), 0, 100));
        drop(catalog.queries().path_of(id(5)));
        drop(catalog.digest());
        drop(fold(
            &mut catalog,
            vec![vec![root(), inode(60, Kind::Fifo), link(1, "n", 60)]],
        ));
    }
}
