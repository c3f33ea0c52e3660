//! The catalog's tables, and how its file is opened and recognised.
//!
//! Current rows and superseded ones (`*_old`, valid in `[lsn, lsn_to)`) are kept apart, so that
//! questions about now do not pay for history. Tables that describe the local disk only begin with
//! `local_` and are not part of the digest; everything else follows from the log alone.

use std::path::Path;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use super::error::Error;

/// "hsm1": says that an SQLite file is a catalog.
pub(super) const APPLICATION_ID: i64 = 0x6873_6d31;
/// Raised with every change of the tables; another version is rebuilt from the log.
pub(super) const SCHEMA_VERSION: i64 = 3;
/// Bound of SQLite's page cache, KiB.
pub(super) const CACHE_KIB: i64 = 32 * 1024;
/// The same of a reader.
const READER_CACHE_KIB: u32 = 8 * 1024;

/// Data ids are kept as `index of the epoch << 40 | number`.
pub(super) const EPOCH_SHIFT: u32 = 40;
/// So many epochs fit.
pub(super) const EPOCHS_MAX: u64 = 1 << (63 - EPOCH_SHIFT);

pub(crate) const TABLES: &str = "
CREATE TABLE fold(
    one INTEGER PRIMARY KEY CHECK (one = 1),
    log_id BLOB NOT NULL, keep_history INTEGER NOT NULL,
    lsn INTEGER, time_s INTEGER, time_n INTEGER, next_file INTEGER NOT NULL,
    files INTEGER NOT NULL, bytes INTEGER NOT NULL,
    dentries INTEGER NOT NULL, versions INTEGER NOT NULL) STRICT;
CREATE TABLE txn(
    lsn INTEGER PRIMARY KEY, time_s INTEGER NOT NULL, time_n INTEGER NOT NULL,
    wall_s INTEGER NOT NULL, wall_n INTEGER NOT NULL,
    segment INTEGER NOT NULL, frame_offset INTEGER NOT NULL, ops INTEGER NOT NULL) STRICT;
CREATE TABLE filesystem(
    lsn INTEGER NOT NULL, op INTEGER NOT NULL, uuid BLOB NOT NULL, fs_type TEXT NOT NULL,
    mount BLOB, PRIMARY KEY(lsn, op)) STRICT, WITHOUT ROWID;
CREATE TABLE volume(
    serial TEXT NOT NULL, lsn INTEGER NOT NULL, pool TEXT NOT NULL, backend TEXT NOT NULL,
    state TEXT NOT NULL, place BLOB, PRIMARY KEY(serial, lsn)) STRICT, WITHOUT ROWID;
CREATE TABLE inode(
    file INTEGER PRIMARY KEY, lsn INTEGER NOT NULL, kind INTEGER NOT NULL,
    mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL, size INTEGER NOT NULL,
    mtime_s INTEGER NOT NULL, mtime_n INTEGER NOT NULL, ctime_s INTEGER, ctime_n INTEGER,
    btime_s INTEGER, btime_n INTEGER, rdev INTEGER, target BLOB, flags INTEGER NOT NULL,
    unrestorable INTEGER NOT NULL, content_lsn INTEGER, root BLOB, fuzzy INTEGER NOT NULL,
    handle BLOB, ino INTEGER) STRICT;
CREATE UNIQUE INDEX inode_handle ON inode(handle) WHERE handle IS NOT NULL;
CREATE INDEX inode_fuzzy ON inode(file) WHERE fuzzy <> 0;
CREATE INDEX inode_unrestorable ON inode(file) WHERE unrestorable <> 0;
CREATE TABLE inode_old(
    file INTEGER NOT NULL, lsn_to INTEGER NOT NULL, lsn INTEGER NOT NULL, kind INTEGER NOT NULL,
    mode INTEGER NOT NULL, uid INTEGER NOT NULL, gid INTEGER NOT NULL, size INTEGER NOT NULL,
    mtime_s INTEGER NOT NULL, mtime_n INTEGER NOT NULL, ctime_s INTEGER, ctime_n INTEGER,
    btime_s INTEGER, btime_n INTEGER, rdev INTEGER, target BLOB, flags INTEGER NOT NULL,
    unrestorable INTEGER NOT NULL, content_lsn INTEGER, root BLOB, fuzzy INTEGER NOT NULL,
    PRIMARY KEY(file, lsn_to)) STRICT, WITHOUT ROWID;
CREATE TABLE gone(file INTEGER PRIMARY KEY, lsn INTEGER NOT NULL) STRICT;
CREATE TABLE xattrs(file INTEGER PRIMARY KEY, lsn INTEGER NOT NULL, list BLOB NOT NULL) STRICT;
CREATE TABLE xattrs_old(
    file INTEGER NOT NULL, lsn_to INTEGER NOT NULL, lsn INTEGER NOT NULL, list BLOB NOT NULL,
    PRIMARY KEY(file, lsn_to)) STRICT, WITHOUT ROWID;
CREATE TABLE pin(file INTEGER PRIMARY KEY, lsn INTEGER NOT NULL) STRICT;
CREATE TABLE pin_old(
    file INTEGER NOT NULL, lsn_to INTEGER NOT NULL, lsn INTEGER NOT NULL,
    PRIMARY KEY(file, lsn_to)) STRICT, WITHOUT ROWID;
CREATE TABLE dentry(
    parent INTEGER NOT NULL, name BLOB NOT NULL, file INTEGER NOT NULL, lsn INTEGER NOT NULL,
    PRIMARY KEY(parent, name)) STRICT, WITHOUT ROWID;
CREATE INDEX dentry_file ON dentry(file);
CREATE TABLE dentry_old(
    parent INTEGER NOT NULL, name BLOB NOT NULL, lsn_to INTEGER NOT NULL, lsn INTEGER NOT NULL,
    file INTEGER NOT NULL, PRIMARY KEY(parent, name, lsn_to)) STRICT, WITHOUT ROWID;
CREATE INDEX dentry_old_file ON dentry_old(file);
CREATE TABLE epoch(idx INTEGER PRIMARY KEY, epoch INTEGER NOT NULL UNIQUE) STRICT;
CREATE TABLE extent(
    file INTEGER NOT NULL, offset INTEGER NOT NULL, len INTEGER NOT NULL,
    data INTEGER NOT NULL, data_off INTEGER NOT NULL, lsn INTEGER NOT NULL, hashes BLOB NOT NULL,
    PRIMARY KEY(file, offset)) STRICT, WITHOUT ROWID;
CREATE TABLE extent_old(
    file INTEGER NOT NULL, offset INTEGER NOT NULL, lsn_to INTEGER NOT NULL,
    len INTEGER NOT NULL, data INTEGER NOT NULL, data_off INTEGER NOT NULL,
    lsn INTEGER NOT NULL, hashes BLOB NOT NULL,
    PRIMARY KEY(file, offset, lsn_to)) STRICT, WITHOUT ROWID;
CREATE TABLE data(
    id INTEGER PRIMARY KEY, segment INTEGER NOT NULL, frame_offset INTEGER NOT NULL,
    raw_offset INTEGER NOT NULL, len INTEGER NOT NULL) STRICT;
CREATE TABLE segment(
    segment INTEGER PRIMARY KEY, hash BLOB NOT NULL, bytes INTEGER NOT NULL,
    epoch INTEGER NOT NULL, first_lsn INTEGER NOT NULL, last_lsn INTEGER,
    sealed_s INTEGER NOT NULL, sealed_n INTEGER NOT NULL) STRICT;
CREATE TABLE local_seen(
    file INTEGER PRIMARY KEY, ctime_s INTEGER NOT NULL, ctime_n INTEGER NOT NULL,
    size INTEGER NOT NULL, swept_s INTEGER NOT NULL, swept_n INTEGER NOT NULL) STRICT;
CREATE TABLE local_copy(
    segment INTEGER NOT NULL, serial TEXT NOT NULL, state TEXT NOT NULL,
    verified_s INTEGER, verified_n INTEGER, PRIMARY KEY(segment, serial)) STRICT, WITHOUT ROWID;
CREATE TABLE local_meta(key TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
";

/// How the file is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Journal {
    /// A write-ahead log beside the file: readers are never in the way.
    Wal,
    /// In memory: for a catalog that ends with its process.
    Memory,
}

/// Opens the file for the one writer and sets what holds for every connection.
pub(super) fn connect_writer(
    path: &Path,
    flags: OpenFlags,
    journal: Journal,
) -> Result<Connection, Error> {
    let fail = |error| Error::sqlite(path, "opening", error);
    let flags = flags | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags).map_err(fail)?;
    let set = |pragma: &str| conn.execute_batch(pragma).map_err(fail);
    set(&format!("PRAGMA cache_size = -{CACHE_KIB}"))?;
    set(match journal {
        // The checkpoint is ours to time: it costs two syncs.
        Journal::Wal => {
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA wal_autocheckpoint = 16384;
             PRAGMA journal_size_limit = 67108864; PRAGMA busy_timeout = 10000"
        }
        Journal::Memory => {
            "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = MEMORY; PRAGMA synchronous = OFF"
        }
    })?;
    stable_plans(&conn).map_err(fail)?;
    conn.set_prepared_statement_cache_capacity(128);
    Ok(conn)
}

/// Without this SQLite plans some statements anew for each value bound, which costs more than they do.
fn stable_plans(conn: &Connection) -> rusqlite::Result<bool> {
    conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)
}

/// Opens the file for reading only.
pub(crate) fn connect_reader(path: &Path) -> Result<Connection, Error> {
    connect_reader_with(path, READER_CACHE_KIB)
}

/// With a page cache of this size.
pub(super) fn connect_reader_with(path: &Path, cache_kib: u32) -> Result<Connection, Error> {
    let fail = |error| Error::sqlite(path, "opening", error);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags).map_err(fail)?;
    conn.execute_batch(&format!(
        "PRAGMA cache_size = -{cache_kib}; PRAGMA busy_timeout = 10000"
    ))
    .map_err(fail)?;
    check(&conn, path)?;
    stable_plans(&conn).map_err(fail)?;
    conn.set_prepared_statement_cache_capacity(64);
    Ok(conn)
}

/// Makes the tables in an empty file.
pub(super) fn create(conn: &Connection, path: &Path) -> Result<(), Error> {
    conn.execute_batch(&format!(
        "PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}; {TABLES}"
    ))
    .map_err(|error| Error::sqlite(path, "making the tables", error))
}

/// Is this a catalog, of our version, with all its tables?
pub(super) fn check(conn: &Connection, path: &Path) -> Result<(), Error> {
    let fail = |error| Error::sqlite(path, "opening", error);
    let number = |pragma: &str| {
        conn.query_row(pragma, [], |row| row.get::<_, i64>(0))
            .map_err(fail)
    };
    let application = number("PRAGMA application_id")?;
    if application != APPLICATION_ID {
        return Err(Error::NotACatalog {
            path: path.to_owned(),
            found: format!("an SQLite database of application id {application:#x}"),
        });
    }
    let found = number("PRAGMA user_version")?;
    let (path, known) = (path.to_owned(), SCHEMA_VERSION);
    match found.cmp(&known) {
        std::cmp::Ordering::Less => Err(Error::OlderSchema { path, found, known }),
        std::cmp::Ordering::Greater => Err(Error::NewerSchema { path, found, known }),
        std::cmp::Ordering::Equal => Ok(()),
    }
}

/// Compares the tables with those that [`create`] makes.
pub(super) fn check_tables(conn: &Connection, path: &Path) -> Result<(), Error> {
    const LIST: &str = "SELECT name, coalesce(sql, '') FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%' ORDER BY name";
    let fail = |error| Error::sqlite(path, "reading the schema", error);
    let list = |conn: &Connection| -> rusqlite::Result<Vec<(String, String)>> {
        conn.prepare(LIST)?
            .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
            .collect()
    };
    let ours = Connection::open_in_memory().map_err(fail)?;
    ours.execute_batch(TABLES).map_err(fail)?;
    let (ours, found) = (list(&ours).map_err(fail)?, list(conn).map_err(fail)?);
    match ours.iter().find(|table| !found.contains(table)) {
        None => Ok(()),
        Some((name, _)) => Err(Error::Corrupt {
            path: path.to_owned(),
            what: format!("its table or index {name} is missing or changed"),
        }),
    }
}
