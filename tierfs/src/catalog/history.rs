//! Questions about any earlier moment, and about how a file or a name changed over time.
//!
//! A row is true in `[lsn, lsn_to)`; current rows have no end. All answers here come from the union of
//! the current and the superseded rows.

use std::collections::BTreeMap;

use rusqlite::params;

use super::error::Error;
use super::query::{
    Pieces, Queries, Source, XattrList, climb, extent_columns, extent_row, inode_columns,
    inode_row, walk,
};
use super::rows::{Changes, ExtentRow, InodeRow, NameRow, VersionRow};
use super::sql::Int;
use crate::ids::{FileId, Lsn, Time};
use crate::layout::CHUNK;

/// Questions as of the end of a transaction.
#[derive(Clone, Copy)]
pub struct AsOf<'c> {
    queries: Queries<'c>,
    lsn: Lsn,
}

impl<'c> AsOf<'c> {
    pub(super) fn new(queries: Queries<'c>, lsn: Lsn) -> Result<Self, Error> {
        let folded = queries.one("SELECT max(lsn) FROM txn", [], |row| row.get(0))?;
        match folded.flatten() {
            Some(folded) if lsn <= folded => Ok(Self { queries, lsn }),
            folded => Err(Error::NotYet { asked: lsn, folded }),
        }
    }

    /// The moment.
    pub fn lsn(self) -> Lsn {
        self.lsn
    }

    /// What an entry named.
    pub fn lookup(self, parent: FileId, name: &[u8]) -> Result<Option<FileId>, Error> {
        self.queries.one(
            "SELECT file FROM dentry WHERE parent = ?1 AND name = ?2 AND lsn <= ?3
             UNION ALL SELECT file FROM dentry_old
             WHERE parent = ?1 AND name = ?2 AND lsn <= ?3 AND lsn_to > ?3",
            params![parent, name, self.lsn],
            |row| row.get(0),
        )
    }

    /// What a path from the root named; see [`Queries::resolve`].
    pub fn resolve(self, path: &[u8]) -> Result<Option<FileId>, Error> {
        walk(path, |parent, name| self.lookup(parent, name))
    }

    /// Whether the file was pinned.
    pub fn is_pinned(self, file: FileId) -> Result<bool, Error> {
        let sql = "SELECT 1 FROM pin WHERE file = ?1 AND lsn <= ?2
             UNION ALL SELECT 1 FROM pin_old WHERE file = ?1 AND lsn <= ?2 AND lsn_to > ?2";
        let row = self.queries.one(sql, params![file, self.lsn], |_| Ok(()))?;
        Ok(row.is_some())
    }

    /// All names of a file.
    pub fn names_of(self, file: FileId) -> Result<Vec<(FileId, Vec<u8>)>, Error> {
        self.queries.list(
            "SELECT parent, name FROM dentry WHERE file = ?1 AND lsn <= ?2
             UNION ALL SELECT parent, name FROM dentry_old
             WHERE file = ?1 AND lsn <= ?2 AND lsn_to > ?2 ORDER BY 1, 2",
            params![file, self.lsn],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
    }

    /// One path of a file; see [`Queries::path_of`].
    pub fn path_of(self, file: FileId) -> Result<Option<Vec<u8>>, Error> {
        climb(self.queries, file, |file| {
            Ok(self.names_of(file)?.into_iter().next())
        })
    }

    /// The entries of a directory in the order of their names, those after `after`.
    pub fn children(
        self,
        parent: FileId,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<(Vec<u8>, FileId)>, Error> {
        self.queries.list(
            "SELECT name, file FROM dentry WHERE parent = ?1 AND name > ?2 AND lsn <= ?3
             UNION ALL SELECT name, file FROM dentry_old
             WHERE parent = ?1 AND name > ?2 AND lsn <= ?3 AND lsn_to > ?3
             ORDER BY 1 LIMIT ?4",
            params![
                parent,
                after.unwrap_or_default(),
                self.lsn,
                Int(limit as u64)
            ],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
    }

    /// The file's attributes; `None` where it did not exist.
    pub fn inode(self, file: FileId) -> Result<Option<InodeRow>, Error> {
        self.queries.one(
            concat!(
                "SELECT ",
                inode_columns!(),
                ", i.ctime_s, i.ctime_n FROM inode i WHERE file = ?1 AND lsn <= ?2
                 UNION ALL SELECT ",
                inode_columns!(),
                ", i.ctime_s, i.ctime_n FROM inode_old i
                 WHERE file = ?1 AND lsn_to > ?2 AND lsn <= ?2"
            ),
            params![file, self.lsn],
            inode_row,
        )
    }

    /// The file's extended attributes.
    pub fn xattrs(self, file: FileId) -> Result<XattrList, Error> {
        let list = self.queries.one(
            "SELECT list FROM xattrs WHERE file = ?1 AND lsn <= ?2
             UNION ALL SELECT list FROM xattrs_old WHERE file = ?1 AND lsn_to > ?2 AND lsn <= ?2",
            params![file, self.lsn],
            |row| row.get(0),
        )?;
        self.queries.xattr_list(file, list)
    }

    /// The extents of the version of that moment that end after `from`, in order, at most `limit`.
    pub fn extents(self, file: FileId, from: u64, limit: usize) -> Result<Vec<ExtentRow>, Error> {
        // No row is longer than a chunk, so one that ends after `from` does not begin before this.
        let begin = from.saturating_sub(CHUNK);
        self.queries.list(
            concat!(
                "SELECT ",
                extent_columns!(),
                " FROM extent e CROSS JOIN epoch p ON p.idx = e.data >> 40
                 WHERE e.file = ?1 AND e.offset >= ?5 AND e.offset + e.len > ?2
                 AND e.lsn <= ?4 UNION ALL SELECT ",
                extent_columns!(),
                " FROM extent_old e CROSS JOIN epoch p ON p.idx = e.data >> 40
                 WHERE e.file = ?1 AND e.offset >= ?5 AND e.offset + e.len > ?2
                 AND e.lsn <= ?4 AND e.lsn_to > ?4
                 ORDER BY 1 LIMIT ?3"
            ),
            params![file, Int(from), Int(limit as u64), self.lsn, Int(begin)],
            |row| extent_row(row, 0),
        )
    }

    /// The pieces of the version of that moment; see [`Queries::pieces`].
    pub fn pieces(self, file: FileId, from: u64) -> Pieces<'c> {
        Pieces::new(Source::Then(self), file, from)
    }
}

impl Queries<'_> {
    /// The transactions that changed a file, in order, with what they changed.
    pub fn versions_of(self, file: FileId) -> Result<Vec<VersionRow>, Error> {
        let mut steps: BTreeMap<Lsn, Changes> = BTreeMap::new();
        let inodes = self.inodes_of(file)?;
        let mut before: Option<&InodeRow> = None;
        for row in &inodes {
            let step = steps.entry(row.lsn).or_default();
            step.created = before.is_none();
            step.content = row.content_lsn == Some(row.lsn);
            step.attributes =
                before.is_none_or(|before| !same_attributes(before, row)) || !step.content;
            before = Some(row);
        }
        for lsn in self.lsns(
            "SELECT lsn FROM xattrs WHERE file = ?1 UNION SELECT lsn FROM xattrs_old
             WHERE file = ?1 UNION SELECT lsn_to FROM xattrs_old WHERE file = ?1",
            file,
        )? {
            steps.entry(lsn).or_default().xattrs = true;
        }
        for lsn in self.lsns(
            "SELECT lsn FROM dentry WHERE file = ?1 UNION SELECT lsn FROM dentry_old
             WHERE file = ?1 UNION SELECT lsn_to FROM dentry_old WHERE file = ?1",
            file,
        )? {
            steps.entry(lsn).or_default().names = true;
        }
        for lsn in self.lsns("SELECT lsn FROM gone WHERE file = ?1", file)? {
            steps.entry(lsn).or_default().deleted = true;
        }
        let mut versions = Vec::new();
        for (lsn, changes) in steps {
            let row = inodes.iter().rfind(|row| row.lsn <= lsn);
            versions.push(VersionRow {
                lsn,
                time: self.time_of(lsn)?,
                changes,
                size: row.filter(|_| !changes.deleted).map(|row| row.size),
                fuzzy: row.is_some_and(|row| row.fuzzy),
            });
        }
        Ok(versions)
    }

    fn inodes_of(self, file: FileId) -> Result<Vec<InodeRow>, Error> {
        self.list(
            concat!(
                "SELECT ",
                inode_columns!(),
                ", i.ctime_s, i.ctime_n FROM inode i WHERE file = ?1 UNION ALL SELECT ",
                inode_columns!(),
                ", i.ctime_s, i.ctime_n FROM inode_old i WHERE file = ?1 ORDER BY 2"
            ),
            [file],
            inode_row,
        )
    }

    fn lsns(self, sql: &str, file: FileId) -> Result<Vec<Lsn>, Error> {
        self.list(sql, [file], |row| row.get(0))
    }

    fn time_of(self, lsn: Lsn) -> Result<Time, Error> {
        self.txn(lsn)?
            .map(|row| row.time)
            .ok_or_else(|| self.corrupt(format!("transaction {lsn} is missing")))
    }

    /// The files that bore a name in a directory, in the order of time.
    pub fn files_named(self, parent: FileId, name: &[u8]) -> Result<Vec<NameRow>, Error> {
        self.list(
            "SELECT file, lsn, NULL FROM dentry WHERE parent = ?1 AND name = ?2
             UNION ALL SELECT file, lsn, lsn_to FROM dentry_old WHERE parent = ?1 AND name = ?2
             ORDER BY 2, 1",
            params![parent, name],
            |row| {
                Ok(NameRow {
                    file: row.get(0)?,
                    from: row.get(1)?,
                    to: row.get(2)?,
                })
            },
        )
    }

    /// The files that bore a path from the root, in the order of time, each with the LSNs between
    /// which it did: directories above may have been renamed in between.
    pub fn files_at_path(self, path: &[u8]) -> Result<Vec<NameRow>, Error> {
        let mut found = vec![NameRow {
            file: FileId::ROOT,
            from: Lsn::FIRST,
            to: None,
        }];
        for name in path.split(|byte| *byte == b'/') {
            if name.is_empty() || name == b"." {
                continue;
            }
            let mut next = Vec::new();
            for dir in found {
                let rows = self.files_named(dir.file, name)?;
                next.extend(rows.into_iter().filter_map(|row| overlap(dir, row)));
            }
            next.sort_by_key(|row| (row.from, row.file));
            found = next;
        }
        Ok(found)
    }
}

/// The part of `inner`'s time that lies in `outer`'s.
fn overlap(outer: NameRow, inner: NameRow) -> Option<NameRow> {
    let from = outer.from.max(inner.from);
    let to = match (outer.to, inner.to) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    let file = inner.file;
    to.is_none_or(|to| from < to)
        .then_some(NameRow { file, from, to })
}

/// True where two states of a file differ in nothing but the content.
fn same_attributes(a: &InodeRow, b: &InodeRow) -> bool {
    let key = |row: &InodeRow| {
        (
            (row.mode, row.uid, row.gid, row.mtime),
            (row.ctime, row.btime, row.flags, row.unrestorable),
            row.rdev,
        )
    };
    key(a) == key(b) && a.target == b.target
}
