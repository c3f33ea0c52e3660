//! Questions about the current state, and about what the log says of itself.

use std::collections::{HashSet, VecDeque};
use std::path::Path;

use rusqlite::{CachedStatement, Connection, OptionalExtension, Params, Row, params};

use super::error::Error;
use super::history::AsOf;
use super::rows::{
    Child, Counts, DataLocation, ExtentRow, InodeRow, Place, SegmentRow, TxnRow, VolumeRow,
};
use super::schema::EPOCH_SHIFT;
use super::sql::{Bits64, Int, device_of, int, time, time_at};
use crate::cbor;
use crate::ids::{DataId, Epoch, FileId, Hash, LogId, Lsn, SegmentNo, Time};
use crate::layout::{self, Range};
use crate::record::{Bits, Filesystem, Volume};

/// The list of a file's extended attributes: names and values, sorted by name.
pub type XattrList = Vec<(Vec<u8>, Vec<u8>)>;

/// The questions that a [`super::Catalog`] and a [`super::Reader`] answer.
#[derive(Clone, Copy)]
pub struct Queries<'c> {
    pub(super) conn: &'c Connection,
    path: &'c Path,
}

/// The columns that [`inode_row`] reads, of the table or alias `i`.
macro_rules! inode_columns {
    () => {
        "i.file, i.lsn, i.kind, i.mode, i.uid, i.gid, i.size, i.mtime_s, i.mtime_n, i.btime_s, \
         i.btime_n, i.rdev, i.target, i.flags, i.unrestorable, i.content_lsn, i.root, i.fuzzy"
    };
}
pub(super) use inode_columns;

/// Reads [`inode_columns`], then ctime in two columns; handle and ino are left out.
pub(super) fn inode_row(row: &Row<'_>) -> rusqlite::Result<InodeRow> {
    Ok(InodeRow {
        file: row.get(0)?,
        lsn: row.get(1)?,
        kind: row.get(2)?,
        mode: row.get(3)?,
        uid: row.get(4)?,
        gid: row.get(5)?,
        size: int(row, 6)?,
        mtime: time(row, 7)?,
        btime: time_at(row, 9)?,
        rdev: row.get::<_, Option<Bits64>>(11)?.map(device_of),
        target: row.get(12)?,
        flags: Bits(row.get(13)?),
        unrestorable: Bits(row.get(14)?),
        content_lsn: row.get(15)?,
        root: row.get(16)?,
        fuzzy: row.get(17)?,
        ctime: time_at(row, 18)?,
        handle: None,
        ino: None,
    })
}

/// The columns that [`extent_row`] reads, of the tables or aliases `e` (extent) and `p` (epoch).
macro_rules! extent_columns {
    () => {
        "e.offset, e.len, p.epoch, e.data, e.data_off, e.hashes"
    };
}
pub(super) use extent_columns;

/// Reads [`extent_columns`], the first of which is column `at`.
pub(super) fn extent_row(row: &Row<'_>, at: usize) -> rusqlite::Result<ExtentRow> {
    let hashes = row.get_ref(at + 5)?.as_blob()?.as_chunks().0;
    Ok(ExtentRow {
        range: Range {
            offset: int(row, at)?,
            len: int(row, at + 1)?,
        },
        data: DataId {
            epoch: Epoch(row.get::<_, Bits64>(at + 2)?.0),
            number: int(row, at + 3)? & (DataId::NUMBER_MAX - 1),
        },
        data_offset: int(row, at + 4)?,
        hashes: hashes.iter().copied().map(Hash).collect(),
    })
}

impl<'c> Queries<'c> {
    pub(super) fn new(conn: &'c Connection, path: &'c Path) -> Self {
        Self { conn, path }
    }

    pub(super) fn fail(self, error: rusqlite::Error) -> Error {
        Error::sqlite(self.path, "reading", error)
    }

    pub(super) fn corrupt(self, what: String) -> Error {
        Error::Corrupt {
            path: self.path.to_owned(),
            what,
        }
    }

    pub(super) fn prepare(self, sql: &str) -> Result<CachedStatement<'c>, Error> {
        self.conn
            .prepare_cached(sql)
            .map_err(|error| self.fail(error))
    }

    pub(super) fn one<T>(
        self,
        sql: &str,
        params: impl Params,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Option<T>, Error> {
        self.prepare(sql)?
            .query_row(params, read)
            .optional()
            .map_err(|error| self.fail(error))
    }

    pub(super) fn list<T>(
        self,
        sql: &str,
        params: impl Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>, Error> {
        let mut stmt = self.prepare(sql)?;
        let rows = stmt
            .query_map(params, read)
            .map_err(|error| self.fail(error))?;
        rows.collect::<rusqlite::Result<_>>()
            .map_err(|error| self.fail(error))
    }

    /// The same questions as of the end of transaction `lsn`.
    pub fn at(self, lsn: Lsn) -> Result<AsOf<'c>, Error> {
        AsOf::new(self, lsn)
    }

    /// The log that this is the fold of.
    pub fn log_id(self) -> Result<LogId, Error> {
        self.one("SELECT log_id FROM fold", [], |row| row.get(0).map(LogId))?
            .ok_or_else(|| self.corrupt("the fold's state is missing".to_owned()))
    }

    /// The last transaction and its time, as committed to the catalog.
    pub fn folded(self) -> Result<Option<(Lsn, Time)>, Error> {
        let row = self.one("SELECT lsn, time_s, time_n FROM fold", [], |row| {
            Ok((row.get::<_, Option<Lsn>>(0)?, time_at(row, 1)?))
        })?;
        Ok(row.and_then(|(lsn, time)| lsn.zip(time)))
    }

    /// How much there is, as committed to the catalog.
    pub fn counts(self) -> Result<Counts, Error> {
        let sql = "SELECT files, bytes, dentries, versions FROM fold";
        let row = self.one(sql, [], |row| {
            let bits = |column| row.get(column).map(|Bits64(bits)| bits);
            Ok(Counts {
                files: bits(0)?,
                bytes: bits(1)?,
                dentries: bits(2)?,
                versions: bits(3)?,
            })
        })?;
        Ok(row.unwrap_or_default())
    }

    /// Where the log last said that the tree lies.
    pub fn filesystem(self) -> Result<Option<Filesystem>, Error> {
        self.one(
            "SELECT uuid, fs_type, mount FROM filesystem ORDER BY lsn DESC, op DESC LIMIT 1",
            [],
            |row| {
                Ok(Filesystem {
                    uuid: row.get(0)?,
                    fs_type: row.get(1)?,
                    mount: row.get(2)?,
                })
            },
        )
    }

    /// The transaction that said so.
    pub fn filesystem_since(self) -> Result<Option<Lsn>, Error> {
        let sql = "SELECT lsn FROM filesystem ORDER BY lsn DESC LIMIT 1";
        self.one(sql, [], |row| row.get(0))
    }

    /// The last state of each volume, by serial.
    pub fn volumes(self) -> Result<Vec<VolumeRow>, Error> {
        self.list(
            "SELECT serial, pool, backend, state, place, max(lsn) FROM volume GROUP BY serial ORDER BY serial",
            [],
            |row| {
                Ok(VolumeRow {
                    volume: Volume {
                        serial: row.get(0)?,
                        pool: row.get(1)?,
                        backend: row.get(2)?,
                        state: row.get(3)?,
                        place: row.get(4)?,
                    },
                    lsn: row.get(5)?,
                })
            },
        )
    }

    /// The file that is bound to this handle (type and bytes, as in [`crate::record::Bind`]).
    pub fn file_by_handle(self, handle: &[u8]) -> Result<Option<FileId>, Error> {
        let sql = "SELECT file FROM inode WHERE handle = ?1";
        self.one(sql, [handle], |row| row.get(0))
    }

    /// Everything about a file but its names, extended attributes and extents.
    pub fn inode(self, file: FileId) -> Result<Option<InodeRow>, Error> {
        self.one(
            concat!(
                "SELECT ",
                inode_columns!(),
                ", coalesce(s.ctime_s, i.ctime_s), coalesce(s.ctime_n, i.ctime_n), i.handle, i.ino
                 FROM inode i LEFT JOIN local_seen s ON s.file = i.file WHERE i.file = ?1"
            ),
            [file],
            |row| {
                Ok(InodeRow {
                    handle: row.get(20)?,
                    ino: row.get::<_, Option<Bits64>>(21)?.map(|Bits64(ino)| ino),
                    ..inode_row(row)?
                })
            },
        )
    }

    /// Calls `each` for every file, in ascending order of ids, with its inode number where it is bound.
    pub fn for_each_file<E: From<Error>>(
        self,
        mut each: impl FnMut(FileId, Option<u64>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut stmt = self.prepare("SELECT file, ino FROM inode ORDER BY file")?;
        let mut rows = stmt.query([]).map_err(|error| self.fail(error))?;
        while let Some(row) = rows.next().map_err(|error| self.fail(error))? {
            let file = row.get(0).map_err(|error| self.fail(error))?;
            let ino: Option<Bits64> = row.get(1).map_err(|error| self.fail(error))?;
            each(file, ino.map(|Bits64(ino)| ino))?;
        }
        Ok(())
    }

    /// Calls `each` for every regular file that has content, or has some that could not be read, with its handle where
    /// it has an inode.
    pub fn for_each_content<E: From<Error>>(
        self,
        mut each: impl FnMut(FileId, Option<&[u8]>) -> Result<(), E>,
    ) -> Result<(), E> {
        let sql = "SELECT file, handle FROM inode WHERE kind = 0 AND (content_lsn IS NOT NULL OR unrestorable <> 0)";
        let mut stmt = self.prepare(sql)?;
        let mut rows = stmt.query([]).map_err(|error| self.fail(error))?;
        while let Some(row) = rows.next().map_err(|error| self.fail(error))? {
            let file = row.get(0).map_err(|error| self.fail(error))?;
            let handle = row
                .get_ref(1)
                .and_then(|value| Ok(value.as_blob_or_null()?))
                .map_err(|error| self.fail(error))?;
            each(file, handle)?;
        }
        Ok(())
    }

    /// How many files have a newest version that was read while it changed.
    pub fn fuzzy_count(self) -> Result<u64, Error> {
        self.count("SELECT count(*) FROM inode WHERE fuzzy <> 0")
    }

    /// How many files have something that cannot be restored: content that could not be read, or
    /// attributes that no other filesystem can be given.
    pub fn unrestorable_count(self) -> Result<u64, Error> {
        self.count("SELECT count(*) FROM inode WHERE unrestorable <> 0")
    }

    fn count(self, sql: &str) -> Result<u64, Error> {
        let count: Option<u64> = self.one(sql, [], |row| int(row, 0))?;
        Ok(count.unwrap_or(0))
    }

    /// The files without a name (open and unlinked, or `O_TMPFILE`), the root not among them.
    pub fn orphans(self) -> Result<Vec<FileId>, Error> {
        self.list(
            "SELECT file FROM inode i WHERE file <> 1
             AND NOT EXISTS (SELECT 1 FROM dentry d WHERE d.file = i.file) ORDER BY file",
            [],
            |row| row.get(0),
        )
    }

    /// The file's extended attributes.
    pub fn xattrs(self, file: FileId) -> Result<XattrList, Error> {
        let sql = "SELECT list FROM xattrs WHERE file = ?1";
        let list: Option<Vec<u8>> = self.one(sql, [file], |row| row.get(0))?;
        self.xattr_list(file, list)
    }

    pub(super) fn xattr_list(
        self,
        file: FileId,
        list: Option<Vec<u8>>,
    ) -> Result<XattrList, Error> {
        list.map_or(Ok(Vec::new()), |list| {
            cbor::whole(&list, "a list of extended attributes").map_err(|error| {
                self.corrupt(format!("the extended attributes of file {file}: {error}"))
            })
        })
    }

    /// Whether the file is pinned.
    pub fn is_pinned(self, file: FileId) -> Result<bool, Error> {
        let sql = "SELECT 1 FROM pin WHERE file = ?1";
        Ok(self.one(sql, [file], |_| Ok(()))?.is_some())
    }

    /// All names of a file: directory and entry.
    pub fn names_of(self, file: FileId) -> Result<Vec<(FileId, Vec<u8>)>, Error> {
        let sql = "SELECT parent, name FROM dentry WHERE file = ?1 ORDER BY parent, name";
        self.list(sql, [file], |row| Ok((row.get(0)?, row.get(1)?)))
    }

    /// What an entry names.
    pub fn lookup(self, parent: FileId, name: &[u8]) -> Result<Option<FileId>, Error> {
        let sql = "SELECT file FROM dentry WHERE parent = ?1 AND name = ?2";
        self.one(sql, params![parent, name], |row| row.get(0))
    }

    /// What a path from the root names. Empty components and "." mean nothing; ".." is found nowhere.
    pub fn resolve(self, path: &[u8]) -> Result<Option<FileId>, Error> {
        walk(path, |parent, name| self.lookup(parent, name))
    }

    /// One path of a file from the root, without a leading slash (empty for the root). `None` where
    /// the file, or a directory above it, has no name.
    pub fn path_of(self, file: FileId) -> Result<Option<Vec<u8>>, Error> {
        let sql = "SELECT parent, name FROM dentry WHERE file = ?1 ORDER BY parent, name LIMIT 1";
        climb(self, file, |file| {
            self.one(sql, [file], |row| Ok((row.get(0)?, row.get(1)?)))
        })
    }

    /// The entries of a directory in the order of their names (as bytes), those after `after`.
    pub fn children(
        self,
        parent: FileId,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Child>, Error> {
        self.list(
            "SELECT d.name, d.file, i.kind, i.ino, coalesce(s.ctime_s, i.ctime_s),
                    coalesce(s.ctime_n, i.ctime_n), i.size
             FROM dentry d CROSS JOIN inode i ON i.file = d.file
             LEFT JOIN local_seen s ON s.file = d.file
             WHERE d.parent = ?1 AND d.name > ?2 ORDER BY d.name LIMIT ?3",
            params![parent, after.unwrap_or_default(), Int(limit as u64)],
            |row| {
                Ok(Child {
                    name: row.get(0)?,
                    file: row.get(1)?,
                    kind: row.get(2)?,
                    ino: row.get::<_, Option<Bits64>>(3)?.map(|Bits64(ino)| ino),
                    ctime: time_at(row, 4)?,
                    size: int(row, 6)?,
                })
            },
        )
    }

    /// The extents of the current version that end after `from`, in order, at most `limit`.
    pub fn extents(self, file: FileId, from: u64, limit: usize) -> Result<Vec<ExtentRow>, Error> {
        self.list(
            concat!(
                "SELECT ",
                extent_columns!(),
                " FROM extent e CROSS JOIN epoch p ON p.idx = e.data >> 40
                 WHERE e.file = ?1 AND e.offset + e.len > ?2 AND e.offset >= coalesce((
                     SELECT offset FROM extent WHERE file = ?1 AND offset <= ?2
                     ORDER BY offset DESC LIMIT 1), 0)
                 ORDER BY e.offset LIMIT ?3"
            ),
            params![file, Int(from), Int(limit as u64)],
            |row| extent_row(row, 0),
        )
    }

    /// Bytes of data (not of holes) in the current version.
    pub fn content_bytes(self, file: FileId) -> Result<u64, Error> {
        let sql = "SELECT coalesce(sum(len), 0) FROM extent WHERE file = ?1";
        Ok(self.one(sql, [file], |row| int(row, 0))?.unwrap_or(0))
    }

    /// Regular files after `after` that have a size but no data, in order, at most `limit`.
    pub fn hollow(self, after: Option<FileId>, limit: usize) -> Result<Vec<FileId>, Error> {
        self.list(
            "SELECT file FROM inode i WHERE file > ?1 AND kind = 0 AND size > 0
             AND NOT EXISTS (SELECT 1 FROM extent e WHERE e.file = i.file) ORDER BY file LIMIT ?2",
            params![
                after.map_or(Int(0), |file| Int(file.get())),
                Int(limit as u64)
            ],
            |row| row.get(0),
        )
    }

    /// The pieces of the current version with their hashes, in order, from the one that holds or
    /// follows the byte at `from`.
    pub fn pieces(self, file: FileId, from: u64) -> Pieces<'c> {
        Pieces::new(Source::Now(self), file, from)
    }

    /// Where a data record lies.
    pub fn data(self, id: DataId) -> Result<Option<DataLocation>, Error> {
        self.one(
            "SELECT segment, frame_offset, raw_offset, len FROM data
             WHERE id = (SELECT idx << 40 FROM epoch WHERE epoch = ?1) + ?2",
            params![Bits64(id.epoch.0), Int(id.number)],
            |row| {
                Ok(DataLocation {
                    segment: row.get(0)?,
                    frame_offset: int(row, 1)?,
                    raw_offset: row.get(2)?,
                    len: row.get(3)?,
                })
            },
        )
    }

    /// The sealed segments with numbers from `from` on, in order, at most `limit`.
    pub fn segments(self, from: SegmentNo, limit: usize) -> Result<Vec<SegmentRow>, Error> {
        self.list(
            "SELECT segment, hash, bytes, epoch, first_lsn, last_lsn, sealed_s, sealed_n
             FROM segment WHERE segment >= ?1 ORDER BY segment LIMIT ?2",
            params![from, Int(limit as u64)],
            |row| {
                Ok(SegmentRow {
                    segment: row.get(0)?,
                    hash: row.get(1)?,
                    bytes: int(row, 2)?,
                    epoch: Epoch(row.get::<_, Bits64>(3)?.0),
                    first_lsn: row.get(4)?,
                    last_lsn: row.get(5)?,
                    sealed: time(row, 6)?,
                })
            },
        )
    }

    /// A transaction.
    pub fn txn(self, lsn: Lsn) -> Result<Option<TxnRow>, Error> {
        self.one(
            "SELECT lsn, time_s, time_n, wall_s, wall_n, segment, frame_offset, ops
             FROM txn WHERE lsn = ?1",
            [lsn],
            |row| {
                Ok(TxnRow {
                    lsn: row.get(0)?,
                    time: time(row, 1)?,
                    wall: time(row, 3)?,
                    place: Place {
                        segment: row.get(5)?,
                        frame_offset: int(row, 6)?,
                    },
                    ops: int(row, 7)?,
                })
            },
        )
    }

    /// The last transaction whose time is not after `moment`.
    pub fn lsn_at_time(self, moment: Time) -> Result<Option<Lsn>, Error> {
        let sql = "SELECT (SELECT min(lsn) FROM txn), (SELECT max(lsn) FROM txn)";
        let ends: Option<(Option<Lsn>, Option<Lsn>)> =
            self.one(sql, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let Some((Some(first), Some(last))) = ends else {
            return Ok(None);
        };
        // Times do not go back and LSNs are dense. All up to `low` are not after the moment.
        let (mut low, mut high) = (first.get() - 1, last.get());
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            let row = Lsn::new(middle).map_or(Ok(None), |lsn| self.txn(lsn))?;
            let row =
                row.ok_or_else(|| self.corrupt(format!("transaction {middle} is missing")))?;
            if row.time <= moment {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        Ok(Lsn::new(low).filter(|lsn| *lsn >= first))
    }
}

/// Follows a path from the root.
pub(super) fn walk(
    path: &[u8],
    mut lookup: impl FnMut(FileId, &[u8]) -> Result<Option<FileId>, Error>,
) -> Result<Option<FileId>, Error> {
    let mut at = FileId::ROOT;
    for name in path.split(|byte| *byte == b'/') {
        if name.is_empty() || name == b"." {
            continue;
        }
        match lookup(at, name)? {
            Some(file) => at = file,
            None => return Ok(None),
        }
    }
    Ok(Some(at))
}

/// The path from the root to a file, by the name that `parent` gives for each step.
pub(super) fn climb(
    queries: Queries<'_>,
    file: FileId,
    mut parent: impl FnMut(FileId) -> Result<Option<(FileId, Vec<u8>)>, Error>,
) -> Result<Option<Vec<u8>>, Error> {
    let (mut names, mut seen, mut at) = (Vec::new(), HashSet::new(), file);
    while at != FileId::ROOT {
        if !seen.insert(at) {
            return Err(queries.corrupt(format!("directory {at} lies within itself")));
        }
        let Some((up, name)) = parent(at)? else {
            return Ok(None);
        };
        names.push(name);
        at = up;
    }
    names.reverse();
    Ok(Some(names.join(&b'/')))
}

pub(super) enum Source<'c> {
    Now(Queries<'c>),
    Then(AsOf<'c>),
}

/// An iterator over the pieces of a version; holds a few extents at a time.
pub struct Pieces<'c> {
    source: Source<'c>,
    file: FileId,
    from: u64,
    ready: VecDeque<(Range, Hash)>,
    done: bool,
}

impl<'c> Pieces<'c> {
    pub(super) fn new(source: Source<'c>, file: FileId, from: u64) -> Self {
        Self {
            source,
            file,
            from,
            ready: VecDeque::new(),
            done: false,
        }
    }

    fn fetch(&mut self) -> Result<(), Error> {
        const EXTENTS: usize = 32;
        let rows = match &self.source {
            Source::Now(now) => now.extents(self.file, self.from, EXTENTS),
            Source::Then(then) => then.extents(self.file, self.from, EXTENTS),
        }?;
        self.done = rows.len() < EXTENTS;
        for row in &rows {
            let pieces = layout::pieces(row.range).zip(row.hashes.iter().copied());
            self.ready
                .extend(pieces.filter(|(piece, _)| piece.end() > self.from));
        }
        if let Some(last) = rows.last() {
            self.from = last.range.end();
        }
        Ok(())
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<(Range, Hash), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() && !self.done {
            if let Err(error) = self.fetch() {
                self.done = true;
                return Some(Err(error));
            }
        }
        self.ready.pop_front().map(Ok)
    }
}

const _: () = assert!(EPOCH_SHIFT == 40, "the queries here say `<< 40`");
