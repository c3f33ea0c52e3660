//! The catalog: an SQLite database that is the fold of the log, and nothing else.
//!
//! [`Catalog`] is the one writer: [`Catalog::apply`] folds a transaction, [`Catalog::apply_data`]
//! notes where data records lie. The daemon calls them behind the log's writer, start-up on the log's
//! tail, rebuilding on the media, replay in a temporary catalog up to its target. [`Reader`]s are
//! read-only connections for other threads; both answer through [`Queries`].
//!
//! Guarantees: a transaction is applied whole or not at all; one that no correct writer makes is
//! refused by name ([`Refusal`]), whatever its bytes were; the tables of the log (all but those
//! named `local_*`) depend on the log alone, which [`Catalog::digest`] shows; memory is bounded by
//! the page cache and the largest transaction.
//!
//! The catalog gives no durability of its own: what it holds can be folded again. [`Catalog::sync`]
//! says how far the file has it for certain, so that the caller keeps the log beyond that.

mod content;
mod digest;
mod error;
mod fold;
mod history;
mod listing;
mod live;
mod local;
mod places;
mod query;
mod readers;
mod rows;
mod schema;
mod sql;
mod stmts;
#[cfg(test)]
mod tests;

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use crate::ids::{FileId, LogId, Lsn, Time};
use crate::record::{Filesystem, Txn};

pub use error::{Error, Refusal};
pub use history::AsOf;
pub use listing::Listed;
pub use live::{Live, LiveRows};
pub use query::{Pieces, Queries, XattrList};
pub use readers::Readers;
pub use rows::{
    Changes, Child, CopyRow, Counts, DataLocation, DataPlace, ExtentRow, History, InodeRow,
    LiveRow, LiveSegment, NameRow, Place, SegmentRow, TxnRow, VersionRow, VolumeRow,
};

pub(crate) use schema::{TABLES, connect_reader as read_only};

use schema::Journal;
use sql::{Bits64, time_at};
use stmts::{Epochs, Stmts};

/// What the fold knows of itself; kept in the table `fold`, written at each commit.
#[derive(Clone, PartialEq, Eq, Debug)]
struct State {
    log_id: LogId,
    history: History,
    folded: Option<Lsn>,
    time: Option<Time>,
    next_file: FileId,
    counts: Counts,
}

/// The writer's connection. There is one for each catalog.
pub struct Catalog {
    conn: Connection,
    path: PathBuf,
    state: State,
    epochs: Epochs,
    /// An SQLite transaction is open.
    open: bool,
    durable: Option<Lsn>,
}

impl Catalog {
    /// Makes a new catalog. The file must not exist, or be empty.
    pub fn create(path: &Path, log_id: LogId) -> Result<Self, Error> {
        create_file(path, Existing::Empty)?;
        Self::make(path, log_id, History::Keep, Journal::Wal)
    }

    /// A catalog in a nameless file (in `dir`, else in the system's temporary directory), which is
    /// gone when the process ends.
    pub fn temporary(dir: Option<&Path>, log_id: LogId, history: History) -> Result<Self, Error> {
        let dir = dir.map_or_else(std::env::temp_dir, Path::to_owned);
        let path = dir.join(format!("hsm-fold-{}.sqlite", random_name(&dir)?));
        create_file(&path, Existing::Refuse)?;
        let made = Self::make(&path, log_id, history, Journal::Memory);
        let removed = std::fs::remove_file(&path);
        let made = made?;
        removed.map_err(|source| Error::Io {
            path,
            doing: "unlinking the temporary catalog",
            source,
        })?;
        Ok(made)
    }

    fn make(path: &Path, log_id: LogId, history: History, journal: Journal) -> Result<Self, Error> {
        let conn = schema::connect_writer(path, OpenFlags::SQLITE_OPEN_READ_WRITE, journal)?;
        schema::create(&conn, path)?;
        let state = State {
            log_id,
            history,
            folded: None,
            time: None,
            next_file: FileId::ROOT,
            counts: Counts::default(),
        };
        let mut catalog = Self {
            conn,
            path: path.to_owned(),
            state,
            epochs: Epochs::default(),
            open: false,
            durable: None,
        };
        catalog.begin()?;
        catalog.commit()?;
        Ok(catalog)
    }

    /// Opens an existing catalog and goes on where its last commit left it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        if !path.exists() {
            return Err(Error::Missing {
                path: path.to_owned(),
            });
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE;
        // Before anything is set: a foreign database must not even get another journal mode.
        let look = Connection::open_with_flags(path, flags)
            .map_err(|error| Error::sqlite(path, "opening", error))?;
        schema::check(&look, path)?;
        schema::check_tables(&look, path)?;
        drop(look);
        let conn = schema::connect_writer(path, flags, Journal::Wal)?;
        let state = read_state(&conn, path)?;
        let epochs =
            Epochs::read(&conn).map_err(|error| Error::sqlite(path, "reading epochs", error))?;
        Ok(Self {
            conn,
            path: path.to_owned(),
            state,
            epochs,
            open: false,
            durable: None,
        })
    }

    /// The log that this is the fold of.
    pub fn log_id(&self) -> LogId {
        self.state.log_id
    }

    /// The last transaction that was applied, committed or not.
    pub fn folded(&self) -> Option<Lsn> {
        self.state.folded
    }

    /// Its time.
    pub fn last_time(&self) -> Option<Time> {
        self.state.time
    }

    /// One more than the largest file id that ever appeared.
    pub fn next_file_id(&self) -> FileId {
        self.state.next_file
    }

    /// How much there is.
    pub fn counts(&self) -> Counts {
        self.state.counts
    }

    /// Where the log last said that the tree lies.
    pub fn filesystem(&self) -> Result<Option<Filesystem>, Error> {
        self.queries().filesystem()
    }

    /// The path as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Queries that see what was applied, committed or not.
    pub fn queries(&self) -> Queries<'_> {
        Queries::new(&self.conn, &self.path)
    }

    /// Opens an SQLite transaction, unless one is open. [`Self::apply`] and all other writes do it
    /// themselves.
    pub fn begin(&mut self) -> Result<(), Error> {
        if !self.open {
            self.run("beginning a transaction", "BEGIN IMMEDIATE")?;
            self.open = true;
        }
        Ok(())
    }

    /// Makes what was applied visible to readers. Nothing is synced here.
    pub fn commit(&mut self) -> Result<(), Error> {
        if !self.open {
            return Ok(());
        }
        write_state(&self.conn, &self.state)
            .map_err(|error| self.fail("writing the fold's state", error))?;
        self.run("committing", "COMMIT")?;
        self.open = false;
        Ok(())
    }

    /// Commits, and brings everything into the database file, synced. Gives the LSN up to which the
    /// catalog survives a power loss: the log beyond it must be kept. Waits for nobody: where a long
    /// query of another connection is in the way, that is what an earlier call reached (`None`:
    /// nothing is known).
    pub fn sync(&mut self) -> Result<Option<Lsn>, Error> {
        self.commit()?;
        let (busy, log, done): (i64, i64, i64) = self
            .conn
            .query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })
            .map_err(|error| self.fail("syncing", error))?;
        if busy == 0 && log == done {
            self.durable = self.state.folded;
        }
        Ok(self.durable)
    }

    /// Folds one transaction; `place` is its commit's. Everything that a damaged or hostile log could
    /// break is checked, and after an error nothing of the transaction is applied.
    pub fn apply(&mut self, txn: &Txn, place: Place) -> Result<(), Error> {
        self.begin()?;
        let (state, epochs) = (self.state.clone(), self.epochs.len());
        let mut stmts = Stmts::new(&self.conn);
        let done = stmts
            .savepoint()
            .map_err(|error| Error::sqlite(&self.path, "beginning to fold", error))
            .and_then(|()| {
                fold::Fold::new(&mut stmts, &mut self.state, &mut self.epochs, txn)
                    .run(place)
                    .map_err(|(op, fault)| fault.into_error(&self.path, txn.lsn, op))
            });
        let ended = stmts
            .end_savepoint(done.is_ok())
            .map_err(|error| Error::sqlite(&self.path, "ending the fold", error));
        let done = done.and(ended);
        drop(stmts);
        if done.is_err() {
            self.state = state;
            self.epochs.truncate(epochs);
        }
        done
    }

    fn run(&self, doing: &'static str, sql: &str) -> Result<(), Error> {
        self.conn
            .prepare_cached(sql)
            .and_then(|mut stmt| stmt.execute([]))
            .map(|_| ())
            .map_err(|error| self.fail(doing, error))
    }

    fn fail(&self, doing: &'static str, error: rusqlite::Error) -> Error {
        Error::sqlite(&self.path, doing, error)
    }
}

/// A read-only connection: sees what the writer committed. For one thread at a time; who needs one often
/// has it lent by [`Readers`].
pub struct Reader {
    conn: Connection,
    path: PathBuf,
}

impl Reader {
    /// Opens an existing catalog for reading.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self {
            conn: schema::connect_reader(path)?,
            path: path.to_owned(),
        })
    }

    /// The queries, each of them on the newest state.
    pub fn queries(&self) -> Queries<'_> {
        Queries::new(&self.conn, &self.path)
    }

    /// Runs several queries on one and the same state.
    pub fn snapshot<T, E: From<Error>>(
        &self,
        ask: impl FnOnce(Queries<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let run = |sql| {
            self.conn
                .execute_batch(sql)
                .map_err(|error| Error::sqlite(&self.path, "taking a snapshot", error))
        };
        run("BEGIN")?;
        let answer = ask(self.queries());
        run("COMMIT")?;
        answer
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Existing {
    Refuse,
    Empty,
}

/// Makes the file, readable by its owner only: the catalog has every name of the filesystem.
fn create_file(path: &Path, existing: Existing) -> Result<(), Error> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    match made {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let empty = std::fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == 0);
            if existing == Existing::Empty && empty {
                Ok(())
            } else {
                Err(Error::Exists {
                    path: path.to_owned(),
                })
            }
        }
        Err(source) => Err(Error::Io {
            path: path.to_owned(),
            doing: "creating the catalog",
            source,
        }),
    }
}

fn random_name(dir: &Path) -> Result<String, Error> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| Error::Io {
        path: dir.to_owned(),
        doing: "choosing a random name in",
        source: io::Error::other(error.to_string()),
    })?;
    Ok(format!("{:016x}", u64::from_le_bytes(bytes)))
}

fn write_state(conn: &Connection, state: &State) -> rusqlite::Result<()> {
    conn.prepare_cached(
        "INSERT OR REPLACE INTO fold VALUES (1, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?
    .execute(params![
        state.log_id.0,
        state.history == History::Keep,
        state.folded,
        state.time.map(|time| time.seconds),
        state.time.map(|time| time.nanos),
        state.next_file,
        Bits64(state.counts.files),
        Bits64(state.counts.bytes),
        Bits64(state.counts.dentries),
        Bits64(state.counts.versions),
    ])?;
    Ok(())
}

fn read_state(conn: &Connection, path: &Path) -> Result<State, Error> {
    let state = conn
        .query_row("SELECT log_id, keep_history, lsn, time_s, time_n, next_file, files, bytes, dentries, versions FROM fold", [], |row| {
            let bits = |column| row.get(column).map(|Bits64(bits)| bits);
            Ok(State {
                log_id: LogId(row.get(0)?),
                history: if row.get(1)? { History::Keep } else { History::Drop },
                folded: row.get(2)?,
                time: time_at(row, 3)?,
                next_file: row.get(5)?,
                counts: Counts {
                    files: bits(6)?,
                    bytes: bits(7)?,
                    dentries: bits(8)?,
                    versions: bits(9)?,
                },
            })
        })
        .optional()
        .map_err(|error| Error::sqlite(path, "reading the fold's state", error))?;
    let corrupt = |what: &str| Error::Corrupt {
        path: path.to_owned(),
        what: what.to_owned(),
    };
    let state = state.ok_or_else(|| corrupt("the fold's state is missing"))?;
    let last = conn
        .query_row("SELECT max(lsn) FROM txn", [], |row| row.get(0))
        .map_err(|error| Error::sqlite(path, "reading the last transaction", error))?;
    if state.history == History::Keep && state.folded != last {
        return Err(corrupt(
            "its last transaction is not the one that it was folded to",
        ));
    }
    Ok(state)
}
