//! One hash over everything that follows from the log: two catalogs of one log agree, however they
//! were made.
//!
//! Each table is read in the order of its key, each value hashed with its type and length. Data ids
//! are hashed as (epoch, number), since the index that stands for the epoch in the tables depends on
//! the order in which places and transactions came.

use rusqlite::types::ValueRef;

use super::error::Error;
use super::query::Queries;
use super::{Catalog, write_state};
use crate::ids::Hash;

/// The state at the last transaction.
const CURRENT: &[(&str, &str)] = &[
    (
        "fold",
        "SELECT log_id, lsn, time_s, time_n, next_file, files, bytes, dentries, versions FROM fold",
    ),
    (
        "filesystem",
        "SELECT lsn, op, uuid, fs_type, mount FROM filesystem ORDER BY lsn DESC, op DESC LIMIT 1",
    ),
    (
        "volume",
        "SELECT serial, max(lsn), pool, backend, state, place FROM volume GROUP BY serial ORDER BY serial",
    ),
    (
        "inode",
        "SELECT file, lsn, kind, mode, uid, gid, size, mtime_s, mtime_n, ctime_s, ctime_n, btime_s,
         btime_n, rdev, target, flags, unrestorable, content_lsn, root, fuzzy, handle, ino
         FROM inode ORDER BY file",
    ),
    ("gone", "SELECT file, lsn FROM gone ORDER BY file"),
    ("xattrs", "SELECT file, lsn, list FROM xattrs ORDER BY file"),
    ("pin", "SELECT file, lsn FROM pin ORDER BY file"),
    (
        "dentry",
        "SELECT parent, name, file, lsn FROM dentry ORDER BY parent, name",
    ),
    (
        "extent",
        "SELECT e.file, e.offset, e.len, p.epoch, e.data & 0xffffffffff, e.data_off, e.lsn, e.hashes
         FROM extent e CROSS JOIN epoch p ON p.idx = e.data >> 40 ORDER BY e.file, e.offset",
    ),
];

/// What was before, and where things lie.
const PAST: &[(&str, &str)] = &[
    (
        "txn",
        "SELECT lsn, time_s, time_n, wall_s, wall_n, segment, frame_offset, ops FROM txn ORDER BY lsn",
    ),
    (
        "filesystems",
        "SELECT lsn, op, uuid, fs_type, mount FROM filesystem ORDER BY lsn, op",
    ),
    (
        "volumes",
        "SELECT serial, lsn, pool, backend, state, place FROM volume ORDER BY serial, lsn",
    ),
    (
        "inode_old",
        "SELECT file, lsn_to, lsn, kind, mode, uid, gid, size, mtime_s, mtime_n, ctime_s, ctime_n,
         btime_s, btime_n, rdev, target, flags, unrestorable, content_lsn, root, fuzzy
         FROM inode_old ORDER BY file, lsn_to",
    ),
    (
        "xattrs_old",
        "SELECT file, lsn_to, lsn, list FROM xattrs_old ORDER BY file, lsn_to",
    ),
    (
        "pin_old",
        "SELECT file, lsn_to, lsn FROM pin_old ORDER BY file, lsn_to",
    ),
    (
        "dentry_old",
        "SELECT parent, name, lsn_to, lsn, file FROM dentry_old ORDER BY parent, name, lsn_to",
    ),
    (
        "extent_old",
        "SELECT e.file, e.offset, e.lsn_to, e.len, p.epoch, e.data & 0xffffffffff, e.data_off, e.lsn,
         e.hashes FROM extent_old e CROSS JOIN epoch p ON p.idx = e.data >> 40
         ORDER BY e.file, e.offset, e.lsn_to",
    ),
    (
        "data",
        "SELECT p.epoch, d.id & 0xffffffffff, d.segment, d.frame_offset, d.raw_offset, d.len
         FROM epoch p CROSS JOIN data d ON d.id >= p.idx << 40 AND d.id < (p.idx + 1) << 40
         ORDER BY p.epoch, d.id",
    ),
    (
        "segment",
        "SELECT segment, hash, bytes, epoch, first_lsn, last_lsn FROM segment ORDER BY segment",
    ),
];

impl Catalog {
    /// Over all tables of the log, committed or not.
    pub fn digest(&mut self) -> Result<Hash, Error> {
        self.flush_state()?;
        self.queries().digest()
    }

    /// Over the state at the last transaction only: what [`super::History::Drop`] keeps too.
    pub fn digest_current(&mut self) -> Result<Hash, Error> {
        self.flush_state()?;
        self.queries().digest_current()
    }

    fn flush_state(&mut self) -> Result<(), Error> {
        if self.open {
            write_state(&self.conn, &self.state)
                .map_err(|error| self.fail("writing the fold's state", error))?;
        }
        Ok(())
    }
}

impl Queries<'_> {
    /// Over all tables of the log.
    pub fn digest(self) -> Result<Hash, Error> {
        self.hash(&[CURRENT, PAST])
    }

    /// Over the state at the last transaction only.
    pub fn digest_current(self) -> Result<Hash, Error> {
        self.hash(&[CURRENT])
    }

    fn hash(self, lists: &[&[(&str, &str)]]) -> Result<Hash, Error> {
        let mut hasher = blake3::Hasher::new();
        for (table, sql) in lists.iter().copied().flatten() {
            hasher.update(table.as_bytes()).update(b"\0");
            self.hash_rows(sql, &mut hasher)
                .map_err(|error| self.fail(error))?;
        }
        Ok(hasher.finalize().into())
    }

    fn hash_rows(self, sql: &str, hasher: &mut blake3::Hasher) -> rusqlite::Result<()> {
        let mut stmt = self.conn.prepare(sql)?;
        let columns = stmt.column_count();
        let mut rows = stmt.query([])?;
        // A row's bytes are gathered first: the hasher is fast on long inputs only.
        let mut bytes = Vec::new();
        while let Some(row) = rows.next()? {
            for column in 0..columns {
                put(row.get_ref(column)?, &mut bytes);
            }
            if bytes.len() > 1 << 16 {
                hasher.update(&bytes);
                bytes.clear();
            }
        }
        hasher.update(&bytes);
        Ok(())
    }
}

fn put(value: ValueRef<'_>, out: &mut Vec<u8>) {
    let (tag, bytes) = match value {
        ValueRef::Null => return out.push(0),
        ValueRef::Integer(number) => {
            out.push(1);
            return out.extend_from_slice(&number.to_le_bytes());
        }
        ValueRef::Real(number) => {
            out.push(2);
            return out.extend_from_slice(&number.to_le_bytes());
        }
        ValueRef::Text(bytes) => (3, bytes),
        ValueRef::Blob(bytes) => (4, bytes),
    };
    out.push(tag);
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
}
