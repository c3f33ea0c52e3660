//! What is on the local disk and what is not: the list of stubs, and when files were last read.
//!
//! An SQLite file of its own beside the catalog, because it must be durable before a byte is given
//! back, while the catalog waits for the log. It describes this disk only: each stub carries its mark
//! ([`crate::stub`]), so a list that is missing or not known to be complete is made again by looking at
//! every file. While it is complete, its stubs are the files that the kernel is told to ask about.
//!
//! Guarantees: a file is on the list, durably, before it gets a mark; it stays on the list after it
//! lost it until the filesystem was synced, for a loss of power could bring the mark back; and it stays
//! if it is put on the list again before that. So the list holds all stubs while it is
//! [`Residency::is_complete`].
//!
//! A disk that is set back to an earlier state (a snapshot of a volume manager, an image) may have stubs
//! that have left the list since, and a list that is set back (from a backup of the machine's own disk) lacks those that
//! were put on it since. So before files leave, and before those that were added get their marks, the disk gets a new
//! generation ([`crate::stub::DiskMark`]), and a list is complete for the generations that it knows only.
//!
//! A disk that replay made of stubs is to get all its content back: that is kept here, too
//! ([`Residency::take_over`]). Of each stub the list says since when it is one, or that it was found as
//! one. Only those that were found flow back: what somebody released since then, he wants released.
//!
//! Files with a mark of which nobody knows what belongs into them are on the list as well: whoever opens them must
//! be asked about, too. They are suspect, and no stubs.
//!
//! Beside the stubs it has the flags that were taken off a file so that it can be recalled (immutable,
//! append-only): with them nobody can write its mark, so this is where they are kept, durably, until the file
//! has them again, durably.

use std::collections::{HashMap, HashSet};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use crate::catalog::Error;
use crate::ids::{FileId, Lsn};
use crate::stub::DiskMark;

/// "hsr1": says that an SQLite file is such a list.
const APPLICATION_ID: i64 = 0x6873_7231;
/// Raised with every change of the tables; another version is made anew from the disk.
const SCHEMA_VERSION: i64 = 3;

const TABLES: &str = "
CREATE TABLE stub(file INTEGER PRIMARY KEY, handle BLOB NOT NULL, since_s INTEGER NOT NULL) STRICT;
CREATE TABLE sealed(handle BLOB PRIMARY KEY, seals INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE atime(file INTEGER PRIMARY KEY, atime_s INTEGER NOT NULL) STRICT;
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
";

/// Of which filesystem the list is.
const DISK: &str = "disk";
/// For which filesystem the list is complete.
const COMPLETE: &str = "complete";
/// The disk's generations, in hexadecimal, with spaces between, the newest last: it has one of them.
const GENERATIONS: &str = "generation";
/// So many are kept at most: the disk has one of the last few, as many as threads give it one at once.
const GENERATIONS_MAX: usize = 64;
/// Of earlier versions: what the disk's generation may have become.
const NEXT: &str = "next";
/// What was found released is to flow back.
const REFILL: &str = "refill";
/// The log's end when the disk took the place of another.
const TAKEN_OVER: &str = "taken-over";

/// The mount of the disk that has not ended yet, and when one began that came after one that did not end well.
const MOUNT: &str = "mount";
const UNCLEAN: &str = "unclean_s";

/// Since when a stub is one that was found on the disk: nobody knows.
const FOUND: i64 = 0;
/// In its place: it is suspect.
const SUSPECT: i64 = -1;

/// A stub on the list.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Stub {
    /// Which file.
    pub file: FileId,
    /// Its inode: handle type (i32 little endian) and bytes.
    pub handle: Vec<u8>,
}

/// The list, and the one connection that writes it.
pub struct Residency {
    conn: Connection,
    path: PathBuf,
    /// Inodes that have lost their marks, or do not exist any more.
    unmarked: HashSet<Stub>,
    /// Those of them that leave after the sync that goes on now.
    leaving: HashSet<Stub>,
    /// What the disk has after that sync, or something newer.
    leaving_at: Option<String>,
    /// By handle, as in the table.
    sealed: HashMap<Vec<u8>, u32>,
}

/// Where the list lies that belongs to a catalog.
pub fn path_beside(catalog: &Path) -> PathBuf {
    let mut path = catalog.as_os_str().to_owned();
    path.push(".residency");
    PathBuf::from(path)
}

fn number(file: FileId) -> i64 {
    // File ids are given one by one from 1.
    i64::try_from(file.get()).unwrap_or(i64::MAX)
}

fn stub_of((file, handle): (i64, Vec<u8>)) -> Option<Stub> {
    let file = FileId::new(u64::try_from(file).ok()?)?;
    Some(Stub { file, handle })
}

impl Residency {
    /// Opens the list, or begins one that is empty and not complete. What is at `path` and no list of
    /// this version is replaced: nothing in it cannot be found again.
    pub fn open(path: &Path) -> Result<Self, Error> {
        match Self::open_existing(path) {
            Ok(Some(list)) => return Ok(list),
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "the list of stubs is made anew"),
        }
        for end in ["", "-wal", "-shm"] {
            let mut name = path.as_os_str().to_owned();
            name.push(end);
            match std::fs::remove_file(&name) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::Io {
                        path: name.into(),
                        doing: "removing an unreadable list of stubs",
                        source,
                    });
                }
                _ => {}
            }
        }
        // Its owner only: handles open files past all directories.
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|source| Error::Io {
                path: path.to_owned(),
                doing: "making the list of stubs",
                source,
            })?;
        let conn = Self::connect(path, OpenFlags::empty())?;
        let list = Self::new(conn, path);
        list.batch(&format!(
            "BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; \
             PRAGMA user_version = {SCHEMA_VERSION}; {TABLES} COMMIT"
        ))?;
        Ok(list)
    }

    fn open_existing(path: &Path) -> Result<Option<Self>, Error> {
        if !path.exists() {
            return Ok(None);
        }
        let conn = Self::connect(path, OpenFlags::empty())?;
        let fail = |error| Error::sqlite(path, "opening the list of stubs", error);
        let pragma = |name: &str| {
            conn.query_row(name, [], |row| row.get::<_, i64>(0))
                .map_err(fail)
        };
        let ours = pragma("PRAGMA application_id")? == APPLICATION_ID
            && pragma("PRAGMA user_version")? == SCHEMA_VERSION;
        if !ours {
            return Ok(None);
        }
        let mut list = Self::new(conn, path);
        list.sealed = list.read_sealed()?;
        Ok(Some(list))
    }

    fn read_sealed(&self) -> Result<HashMap<Vec<u8>, u32>, Error> {
        self.conn
            .prepare("SELECT handle, seals FROM sealed")
            .and_then(|mut stmt| {
                stmt.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                    .collect()
            })
            .map_err(self.fail("reading the list of stubs"))
    }

    fn new(conn: Connection, path: &Path) -> Self {
        Self {
            conn,
            path: path.to_owned(),
            unmarked: HashSet::new(),
            leaving: HashSet::new(),
            leaving_at: None,
            sealed: HashMap::new(),
        }
    }

    fn connect(path: &Path, more: OpenFlags) -> Result<Connection, Error> {
        let fail = |error| Error::sqlite(path, "opening the list of stubs", error);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | more;
        let conn = Connection::open_with_flags(path, flags).map_err(fail)?;
        // FULL: what was added is on the disk when the call returns.
        conn.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 10000; PRAGMA cache_size = -8192",
        )
        .map_err(fail)?;
        Ok(conn)
    }

    fn fail(&self, doing: &'static str) -> impl Fn(rusqlite::Error) -> Error + '_ {
        move |error| Error::sqlite(&self.path, doing, error)
    }

    fn batch(&self, sql: &str) -> Result<(), Error> {
        self.conn
            .execute_batch(sql)
            .map_err(self.fail("writing the list of stubs"))
    }

    /// Runs a statement for each of many rows, all of them or none. Durable when it returns; without rows
    /// nothing is written.
    fn write<T, P: rusqlite::Params>(
        &mut self,
        doing: &'static str,
        sql: &str,
        rows: &[T],
        params: impl Fn(&T) -> P,
    ) -> Result<(), Error> {
        if rows.is_empty() {
            return Ok(());
        }
        let run = |conn: &mut Connection| -> rusqlite::Result<()> {
            let txn = conn.transaction()?;
            {
                let mut statement = txn.prepare_cached(sql)?;
                for row in rows {
                    statement.execute(params(row))?;
                }
            }
            txn.commit()
        };
        run(&mut self.conn).map_err(|error| Error::sqlite(&self.path, doing, error))
    }

    /// Puts files on the list that are to be released. Durable when it returns: now they may get their marks, and
    /// lose their data when the disk has this generation, durably.
    pub fn add(&mut self, stubs: &[Stub], now: i64) -> Result<DiskMark, Error> {
        self.put(
            stubs,
            "INSERT INTO stub(file, handle, since_s) VALUES (?1, ?2, ?3)
             ON CONFLICT(file) DO UPDATE SET handle = excluded.handle, since_s = excluded.since_s",
            now,
        )?;
        self.next_generation()
    }

    /// Puts files on the list that were found to be stubs. Of one that is on it as a stub nothing new is known.
    pub fn add_found(&mut self, stubs: &[Stub]) -> Result<(), Error> {
        self.put(
            stubs,
            "INSERT INTO stub(file, handle, since_s) VALUES (?1, ?2, ?3)
             ON CONFLICT(file) DO UPDATE SET handle = excluded.handle, since_s = max(since_s, excluded.since_s)",
            FOUND,
        )
    }

    /// Puts suspect files on the list. Durable when it returns.
    pub fn add_suspects(&mut self, suspects: &[Stub]) -> Result<(), Error> {
        self.put(
            suspects,
            "INSERT INTO stub(file, handle, since_s) VALUES (?1, ?2, ?3)
             ON CONFLICT(file) DO UPDATE SET handle = excluded.handle, since_s = excluded.since_s",
            SUSPECT,
        )
    }

    fn put(&mut self, stubs: &[Stub], sql: &str, since: i64) -> Result<(), Error> {
        for stub in stubs {
            self.unmarked.remove(stub);
            self.leaving.remove(stub);
        }
        self.write("adding to the list of stubs", sql, stubs, |stub| {
            (number(stub.file), stub.handle.clone(), since)
        })
    }

    /// An inode has lost its mark, or got none, or does not exist any more. The caller keeps everybody from
    /// giving it one meanwhile.
    pub fn note_unmarked(&mut self, stub: Stub) {
        self.unmarked.insert(stub);
    }

    /// These flags (`FS_*_FL`) are about to be taken off an inode. Durable when it returns.
    pub fn note_unsealed(&mut self, handle: &[u8], seals: u32) -> Result<(), Error> {
        let all = seals | self.seals_of(handle);
        self.write(
            "noting the flags of a file",
            "INSERT OR REPLACE INTO sealed(handle, seals) VALUES (?1, ?2)",
            &[all],
            |all| (handle, *all),
        )?;
        self.sealed.insert(handle.to_vec(), all);
        Ok(())
    }

    /// The flags that an inode is to get again.
    pub fn seals_of(&self, handle: &[u8]) -> u32 {
        self.sealed.get(handle).copied().unwrap_or(0)
    }

    /// Every inode that is to get flags again.
    pub fn unsealed(&self) -> Vec<(Vec<u8>, u32)> {
        let all = self.sealed.iter();
        all.map(|(handle, seals)| (handle.clone(), *seals))
            .collect()
    }

    /// An inode has its flags again, durably, or is gone.
    pub fn note_sealed(&mut self, handle: &[u8]) -> Result<(), Error> {
        if !self.sealed.contains_key(handle) {
            return Ok(());
        }
        let sql = "DELETE FROM sealed WHERE handle = ?1";
        self.write("noting the flags of a file", sql, &[handle], |handle| {
            [*handle]
        })?;
        self.sealed.remove(handle);
        Ok(())
    }

    /// Whether anything is to leave the list.
    pub fn has_leaving(&self) -> bool {
        !(self.unmarked.is_empty() && self.leaving.is_empty())
    }

    /// What has lost its mark so far leaves with the next [`Self::leave`]. Before that the disk must get
    /// this generation, durably. `None`: nothing leaves.
    pub fn prepare_to_leave(&mut self) -> Result<Option<DiskMark>, Error> {
        self.leaving.extend(self.unmarked.drain());
        if !self.has_leaving() {
            return Ok(None);
        }
        let mark = self.next_generation()?;
        self.leaving_at = Some(hex(&mark.generation));
        Ok(Some(mark))
    }

    /// A generation that no disk has, and this one is to get. It is known to the list, durably.
    pub fn next_generation(&mut self) -> Result<DiskMark, Error> {
        let mark = self.new_generation()?;
        let mut all = self.generations()?;
        all.push(hex(&mark.generation));
        let old = all.len().saturating_sub(GENERATIONS_MAX);
        self.set_meta(GENERATIONS, &all[old..].join(" "))?;
        Ok(mark)
    }

    fn generations(&self) -> Result<Vec<String>, Error> {
        let all = self.meta(GENERATIONS)?.unwrap_or_default();
        Ok(all.split_whitespace().map(str::to_owned).collect())
    }

    /// Those that the disk may have, which has got this one or a newer one, durably.
    fn generations_since(&self, generation: &str) -> Result<String, Error> {
        let all = self.generations()?;
        let at = all.iter().position(|other| other == generation);
        Ok(at.map_or_else(|| generation.to_owned(), |at| all[at..].join(" ")))
    }

    fn new_generation(&self) -> Result<DiskMark, Error> {
        let mut generation = [0; 16];
        getrandom::fill(&mut generation).map_err(|error| Error::Io {
            path: self.path.clone(),
            doing: "drawing a random number for",
            source: std::io::Error::other(error.to_string()),
        })?;
        Ok(DiskMark { generation })
    }

    /// Takes files off the list; see [`Self::prepare_to_leave`].
    pub fn leave(&mut self) -> Result<(), Error> {
        let since = match self.leaving_at.take() {
            Some(generation) => self.generations_since(&generation)?,
            None => return Ok(()),
        };
        let run = |list: &mut Self| -> rusqlite::Result<()> {
            let txn = list.conn.transaction()?;
            {
                let sql = "DELETE FROM stub WHERE file = ?1 AND handle = ?2";
                let mut leave = txn.prepare_cached(sql)?;
                for stub in &list.leaving {
                    leave.execute((number(stub.file), &stub.handle))?;
                }
                let sql = "INSERT OR REPLACE INTO meta(key, value) VALUES (?1, ?2)";
                txn.prepare_cached(sql)?.execute([GENERATIONS, &since])?;
                let sql = "DELETE FROM meta WHERE key = ?1";
                txn.prepare_cached(sql)?.execute([NEXT])?;
            }
            txn.commit()
        };
        run(self)
            .map_err(|error| Error::sqlite(&self.path, "shortening the list of stubs", error))?;
        self.leaving.clear();
        Ok(())
    }

    /// A file as it is on the list.
    pub fn get(&self, file: FileId) -> Result<Option<Stub>, Error> {
        self.conn
            .prepare_cached("SELECT handle FROM stub WHERE file = ?1")
            .and_then(|mut stmt| stmt.query_row([number(file)], |row| row.get(0)).optional())
            .map(|found| found.map(|handle| Stub { file, handle }))
            .map_err(self.fail("reading the list of stubs"))
    }

    /// Whether an inode is a stub as far as is known.
    pub fn has(&self, stub: &Stub) -> Result<bool, Error> {
        let gone = self.unmarked.contains(stub) || self.leaving.contains(stub);
        Ok(!gone && self.get(stub.file)?.as_ref() == Some(stub))
    }

    /// Up to `limit` stubs with ids beyond `after`, ascending.
    pub fn page(&self, after: Option<FileId>, limit: usize) -> Result<Vec<Stub>, Error> {
        let after = after.map_or(0, number);
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = self
            .conn
            .prepare_cached("SELECT file, handle FROM stub WHERE file > ?1 ORDER BY file LIMIT ?2")
            .and_then(|mut stmt| {
                stmt.query_map(params![after, limit], |row| {
                    Ok((row.get::<_, i64>(0)?, row.get(1)?))
                })?
                .collect::<Result<Vec<(i64, Vec<u8>)>, _>>()
            })
            .map_err(self.fail("reading the list of stubs"))?;
        Ok(rows.into_iter().filter_map(stub_of).collect())
    }

    // ---- what flows back -----------------------------------------------------------------------------

    /// The disk takes the place of the one before, which the log is to say behind `folded`: what is found released on
    /// it is to flow back. Durable when it returns.
    pub fn take_over(&mut self, fs_uuid: &[u8; 16], folded: Lsn) -> Result<(), Error> {
        // It may be the same one, made anew.
        self.forget_disk()?;
        self.set_meta(REFILL, "wanted")?;
        self.set_meta(TAKEN_OVER, &folded.get().to_string())?;
        self.set_meta(DISK, &hex(fs_uuid))
    }

    /// Behind which transaction the log says that this disk takes the place of another, if it does. Its stubs may have
    /// been found all or not.
    pub fn taken_over(&self) -> Result<Option<Lsn>, Error> {
        let folded = self.meta(TAKEN_OVER)?.and_then(|lsn| lsn.parse().ok());
        Ok(folded.and_then(Lsn::new))
    }

    /// Whether all stubs of this filesystem had been found, whatever has become of the disk since.
    pub fn was_complete(&self, fs_uuid: &[u8; 16]) -> Result<bool, Error> {
        Ok(self.meta(COMPLETE)? == Some(hex(fs_uuid)))
    }

    /// Whether stubs that were found are to flow back.
    pub fn wants_refill(&self) -> Result<bool, Error> {
        Ok(self.meta(REFILL)?.is_some())
    }

    /// All that was to flow back has, or never will.
    pub fn end_refill(&mut self) -> Result<(), Error> {
        self.write(
            "writing the list of stubs",
            "DELETE FROM meta WHERE key = ?1",
            &[REFILL],
            |key| [*key],
        )
    }

    /// Up to `limit` files beyond `after` that were found to be stubs, ascending. Some may be whole by now.
    pub fn found(&self, after: Option<FileId>, limit: usize) -> Result<Vec<FileId>, Error> {
        let sql = "SELECT file FROM stub WHERE file > ?1 AND since_s = ?2 ORDER BY file LIMIT ?3";
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.conn
            .prepare_cached(sql)
            .and_then(|mut stmt| {
                stmt.query_map(params![after.map_or(0, number), FOUND, limit], |row| {
                    row.get(0)
                })?
                .collect()
            })
            .map_err(self.fail("reading the list of stubs"))
    }

    /// How many were found to be stubs, and still are.
    pub fn count_found(&self) -> Result<u64, Error> {
        let sql = "SELECT count(*) FROM stub WHERE since_s = ?1";
        let count: i64 = self
            .conn
            .query_row(sql, [FOUND], |row| row.get(0))
            .map_err(self.fail("counting stubs"))?;
        let gone = self.unmarked.len() + self.leaving.len();
        Ok(u64::try_from(count)
            .unwrap_or(0)
            .saturating_sub(gone as u64))
    }

    /// A file that was found to be a stub, and still is one as far as is known.
    pub fn get_found(&self, file: FileId) -> Result<Option<Stub>, Error> {
        Ok(self.get_since(file, FOUND)?.filter(|stub| self.stays(stub)))
    }

    /// A file that is on the list with this in place of a time.
    fn get_since(&self, file: FileId, since: i64) -> Result<Option<Stub>, Error> {
        self.conn
            .prepare_cached("SELECT handle FROM stub WHERE file = ?1 AND since_s = ?2")
            .and_then(|mut stmt| {
                stmt.query_row([number(file), since], |row| row.get(0))
                    .optional()
            })
            .map(|found| found.map(|handle| Stub { file, handle }))
            .map_err(self.fail("reading the list of stubs"))
    }

    /// Whether a file of the list has not lost its mark.
    fn stays(&self, stub: &Stub) -> bool {
        !self.unmarked.contains(stub) && !self.leaving.contains(stub)
    }

    /// These are to flow back no more: from now on they are like files that somebody released.
    pub fn pass_over(&mut self, files: &[FileId], now: i64) -> Result<(), Error> {
        self.write(
            "noting what does not flow back",
            "UPDATE stub SET since_s = ?2 WHERE file = ?1",
            files,
            |file| (number(*file), now),
        )
    }

    // ---- how the disk was left -----------------------------------------------------------------------

    /// The disk is watched on this mount from now on. Gives when (unix seconds) a mount of it began last that came
    /// after one that did not end well; `None` where none is known. Durable when it returns.
    pub fn begin_mount(&mut self, mount: &str, now: i64) -> Result<Option<i64>, Error> {
        if self.meta(MOUNT)?.is_some_and(|before| before != mount) {
            self.set_meta(UNCLEAN, &now.to_string())?;
        }
        self.set_meta(MOUNT, mount)?;
        Ok(self.meta(UNCLEAN)?.and_then(|since| since.parse().ok()))
    }

    /// Everything that was changed on that mount is in the log, and nothing more can be.
    pub fn end_mount(&mut self) -> Result<(), Error> {
        self.write(
            "writing the list of stubs",
            "DELETE FROM meta WHERE key = ?1",
            &[MOUNT],
            |key| [*key],
        )
    }

    // ---- what is suspect -----------------------------------------------------------------------------

    /// The first suspect file, and how many there are.
    pub fn suspects(&self) -> Result<(Option<Stub>, u64), Error> {
        let fail = |error| Error::sqlite(&self.path, "reading the list of stubs", error);
        let sql = "SELECT count(*) FROM stub WHERE since_s = ?1";
        let all: i64 = self
            .conn
            .query_row(sql, [SUSPECT], |row| row.get(0))
            .map_err(fail)?;
        if all == 0 {
            return Ok((None, 0));
        }
        let mut gone = 0;
        for stub in self.unmarked.union(&self.leaving) {
            gone += u64::from(self.get_since(stub.file, SUSPECT)?.as_ref() == Some(stub));
        }
        let sql = "SELECT file, handle FROM stub WHERE since_s = ?1 ORDER BY file";
        let mut stmt = self.conn.prepare_cached(sql).map_err(fail)?;
        let rows = stmt.query_map([SUSPECT], |row| Ok((row.get(0)?, row.get(1)?)));
        for row in rows.map_err(fail)? {
            if let Some(stub) = stub_of(row.map_err(fail)?).filter(|stub| self.stays(stub)) {
                let all = u64::try_from(all).unwrap_or(0);
                return Ok((Some(stub), all.saturating_sub(gone)));
            }
        }
        Ok((None, 0))
    }

    /// A file that is on the list as suspect.
    pub fn get_suspect(&self, file: FileId) -> Result<Option<Stub>, Error> {
        Ok(self
            .get_since(file, SUSPECT)?
            .filter(|stub| self.stays(stub)))
    }

    /// How many of them are stubs.
    pub fn count_stubs(&self) -> Result<u64, Error> {
        let (_, suspects) = self.suspects()?;
        Ok(self.count()?.saturating_sub(suspects))
    }

    /// How many are on the list.
    pub fn count(&self) -> Result<u64, Error> {
        self.conn
            .query_row("SELECT count(*) FROM stub", [], |row| row.get::<_, i64>(0))
            .map(|count| u64::try_from(count).unwrap_or(0))
            .map_err(self.fail("counting stubs"))
    }

    /// Whether the list is known to hold every stub of this filesystem, whose root has this mark.
    pub fn is_complete(&self, fs_uuid: &[u8; 16], mark: Option<&DiskMark>) -> Result<bool, Error> {
        let Some(generation) = mark.map(|mark| hex(&mark.generation)) else {
            return Ok(false);
        };
        // A crash may have come before the disk got the newest: then nothing has left yet that the disk has.
        let known = self.generations()?.contains(&generation)
            || self.meta(NEXT)?.as_ref() == Some(&generation);
        Ok(known && self.was_complete(fs_uuid)?)
    }

    /// The disk has another generation than the list knows: until every file has been looked at the list is not
    /// complete, whatever generation the disk gets meanwhile. Durable when it returns.
    pub fn set_incomplete(&mut self) -> Result<(), Error> {
        let sql = "DELETE FROM meta WHERE key = ?1";
        self.write("writing the list of stubs", sql, &[COMPLETE], |key| [*key])
    }

    fn meta(&self, key: &str) -> Result<Option<String>, Error> {
        self.conn
            .prepare_cached("SELECT value FROM meta WHERE key = ?1")
            .and_then(|mut stmt| stmt.query_row([key], |row| row.get(0)).optional())
            .map_err(self.fail("reading the list of stubs"))
    }

    fn set_meta(&self, key: &str, value: &str) -> Result<(), Error> {
        self.conn
            .prepare_cached("INSERT OR REPLACE INTO meta(key, value) VALUES (?1, ?2)")
            .and_then(|mut stmt| stmt.execute([key, value]))
            .map(drop)
            .map_err(self.fail("writing the list of stubs"))
    }

    /// Every file of this filesystem has been looked at, and all that have a mark are on the list; its
    /// root has this mark ([`Self::next_generation`]) or a newer one, durably. From here on it stays complete, a crash
    /// included.
    pub fn set_complete(&mut self, fs_uuid: &[u8; 16], mark: &DiskMark) -> Result<(), Error> {
        let since = self.generations_since(&hex(&mark.generation))?;
        self.set_meta(GENERATIONS, &since)?;
        self.set_meta(COMPLETE, &hex(fs_uuid))
    }

    /// Forgets what is of another disk than this: its inodes are others. When files were read stays.
    pub fn keep_for(&mut self, fs_uuid: &[u8; 16]) -> Result<(), Error> {
        let disk = hex(fs_uuid);
        let before = self.meta(DISK)?;
        if before.as_ref() == Some(&disk) {
            return Ok(());
        }
        if before.is_some() {
            self.forget_disk()?;
        }
        self.set_meta(DISK, &disk)
    }

    fn forget_disk(&mut self) -> Result<(), Error> {
        self.batch(
            "BEGIN IMMEDIATE; DELETE FROM stub; DELETE FROM sealed; DELETE FROM meta; COMMIT",
        )?;
        self.sealed.clear();
        self.unmarked.clear();
        self.leaving.clear();
        Ok(())
    }

    /// Notes when files were last read (unix seconds), where that is later than what is noted. Where
    /// nothing is, nothing is written.
    pub fn set_atimes(&mut self, atimes: &[(FileId, i64)]) -> Result<(), Error> {
        let doing = "noting access times";
        let later = later_atimes(&self.conn, atimes).map_err(self.fail(doing))?;
        self.write(
            doing,
            "INSERT INTO atime(file, atime_s) VALUES (?1, ?2)
             ON CONFLICT(file) DO UPDATE SET atime_s = excluded.atime_s WHERE excluded.atime_s > atime_s",
            &later,
            |(file, atime)| (number(*file), *atime),
        )
    }

    /// Of how many files the access time is noted.
    pub fn count_atimes(&self) -> Result<u64, Error> {
        self.conn
            .query_row("SELECT count(*) FROM atime", [], |row| row.get::<_, i64>(0))
            .map(|count| u64::try_from(count).unwrap_or(0))
            .map_err(self.fail("counting access times"))
    }

    /// Up to `limit` files beyond `after` whose access time is noted, ascending.
    pub fn atimes_of(&self, after: Option<FileId>, limit: usize) -> Result<Vec<FileId>, Error> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.conn
            .prepare_cached("SELECT file FROM atime WHERE file > ?1 ORDER BY file LIMIT ?2")
            .and_then(|mut stmt| {
                stmt.query_map(params![after.map_or(0, number), limit], |row| row.get(0))?
                    .collect()
            })
            .map_err(self.fail("reading access times"))
    }

    /// Forgets the access times of files that are gone.
    pub fn forget_atimes(&mut self, files: &[FileId]) -> Result<(), Error> {
        let sql = "DELETE FROM atime WHERE file = ?1";
        self.write("forgetting access times", sql, files, |file| {
            [number(*file)]
        })
    }
}

/// Those of which nothing is noted, or something earlier.
fn later_atimes(
    conn: &Connection,
    atimes: &[(FileId, i64)],
) -> rusqlite::Result<Vec<(FileId, i64)>> {
    let mut known = conn.prepare_cached("SELECT atime_s FROM atime WHERE file = ?1")?;
    let mut later = Vec::new();
    for (file, atime) in atimes {
        let noted: Option<i64> = known
            .query_row([number(*file)], |row| row.get(0))
            .optional()?;
        if noted.is_none_or(|noted| noted < *atime) {
            later.push((*file, *atime));
        }
    }
    Ok(later)
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
