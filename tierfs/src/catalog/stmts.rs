//! The fold's prepared statements, looked up once per transaction, and the table of epochs.

use std::collections::HashMap;

use rusqlite::{CachedStatement, Connection, Params};

use super::schema::{EPOCH_SHIFT, EPOCHS_MAX};
use super::sql::Bits64;
use crate::ids::{DataId, Epoch};

macro_rules! statements {
    ($($name:ident = $text:expr;)*) => {
        /// A statement of the fold.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub(super) enum Sql { $($name,)* }

        impl Sql {
            const ALL: &'static [&'static str] = &[$($text,)*];
        }
    };
}

/// The attribute columns that `inode` and `inode_old` share, after the file id.
macro_rules! shared {
    () => {
        "lsn, kind, mode, uid, gid, size, mtime_s, mtime_n, ctime_s, ctime_n, btime_s, btime_n, \
         rdev, target, flags, unrestorable, content_lsn, root, fuzzy"
    };
}

statements! {
    Savepoint = "SAVEPOINT fold";
    Rollback = "ROLLBACK TO fold";
    Release = "RELEASE fold";
    InsertTxn = "INSERT INTO txn VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    AnyFilesystem = "SELECT 1 FROM filesystem LIMIT 1";
    InsertFilesystem = "INSERT INTO filesystem VALUES (?1, ?2, ?3, ?4, ?5)";
    DropFilesystems = "DELETE FROM filesystem";
    UnbindAll = "UPDATE inode SET handle = NULL, ino = NULL WHERE handle IS NOT NULL";
    ForgetAllSeen = "DELETE FROM local_seen";
    DropVolumes = "DELETE FROM volume WHERE serial = ?1";
    InsertVolume = "INSERT OR REPLACE INTO volume VALUES (?1, ?2, ?3, ?4, ?5, ?6)";
    IsGone = "SELECT 1 FROM gone WHERE file = ?1";
    InsertGone = "INSERT INTO gone VALUES (?1, ?2)";
    GetNode = "SELECT kind, size, content_lsn, lsn FROM inode WHERE file = ?1";
    InsertInode = concat!("INSERT INTO inode(file, ", shared!(), ", handle, ino) VALUES \
        (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22)");
    KeepInode = concat!("INSERT INTO inode_old(file, lsn_to, ", shared!(), ") SELECT file, ?2, ",
        shared!(), " FROM inode WHERE file = ?1");
    SetAttributes = "UPDATE inode SET lsn = ?2, mode = ?3, uid = ?4, gid = ?5, mtime_s = ?6, \
        mtime_n = ?7, ctime_s = ?8, ctime_n = ?9, btime_s = ?10, btime_n = ?11, rdev = ?12, \
        target = ?13, flags = ?14, unrestorable = ?15 WHERE file = ?1";
    SetContent = "UPDATE inode SET lsn = ?2, size = ?3, content_lsn = ?4, root = ?5, fuzzy = ?6 WHERE file = ?1";
    SetBinding = "UPDATE inode SET handle = ?2, ino = ?3 WHERE file = ?1";
    Unbind = "UPDATE inode SET handle = NULL, ino = NULL WHERE handle = ?1";
    DeleteInode = "DELETE FROM inode WHERE file = ?1";
    ForgetSeen = "DELETE FROM local_seen WHERE file = ?1";
    KeepXattrs = "INSERT INTO xattrs_old SELECT file, ?2, lsn, list FROM xattrs WHERE file = ?1 AND lsn < ?2";
    DeleteXattrs = "DELETE FROM xattrs WHERE file = ?1";
    InsertXattrs = "INSERT INTO xattrs VALUES (?1, ?2, ?3)";
    InsertPin = "INSERT INTO pin VALUES (?1, ?2) ON CONFLICT DO NOTHING";
    KeepPin = "INSERT INTO pin_old SELECT file, ?2, lsn FROM pin WHERE file = ?1 AND lsn < ?2";
    DeletePin = "DELETE FROM pin WHERE file = ?1";
    InsertDentry = "INSERT INTO dentry VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO NOTHING";
    KeepDentry = "INSERT INTO dentry_old SELECT parent, name, ?3, lsn, file FROM dentry \
        WHERE parent = ?1 AND name = ?2 AND lsn < ?3";
    DeleteDentry = "DELETE FROM dentry WHERE parent = ?1 AND name = ?2";
    ParentsOf = "SELECT parent FROM dentry WHERE file = ?1 LIMIT 2";
    HasEntry = "SELECT 1 FROM dentry WHERE parent = ?1 LIMIT 1";
    InsertEpoch = "INSERT INTO epoch VALUES (?1, ?2)";
    InsertExtent = "INSERT INTO extent VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
    ExtentBefore = "SELECT offset, len, data, data_off, hashes FROM extent \
        WHERE file = ?1 AND offset < ?2 ORDER BY offset DESC LIMIT 1";
    KeepExtents = "INSERT INTO extent_old(file, offset, lsn_to, len, data, data_off, lsn, hashes) \
        SELECT file, offset, ?4, len, data, data_off, lsn, hashes FROM extent \
        WHERE file = ?1 AND offset >= ?2 AND offset < ?3 AND lsn < ?4";
    DeleteExtents = "DELETE FROM extent WHERE file = ?1 AND offset >= ?2 AND offset < ?3";
    ListExtents = "SELECT offset, len, hashes FROM extent WHERE file = ?1 ORDER BY offset";
    PutData = "INSERT OR REPLACE INTO data VALUES (?1, ?2, ?3, ?4, ?5)";
}

/// Statements of one connection, each prepared at its first use.
pub(super) struct Stmts<'c> {
    conn: &'c Connection,
    slots: Vec<Option<CachedStatement<'c>>>,
}

impl<'c> Stmts<'c> {
    pub(super) fn new(conn: &'c Connection) -> Self {
        let mut slots = Vec::new();
        slots.resize_with(Sql::ALL.len(), || None);
        Self { conn, slots }
    }

    /// The statement, prepared.
    pub(super) fn get(&mut self, sql: Sql) -> rusqlite::Result<&mut CachedStatement<'c>> {
        let slot = &mut self.slots[sql as usize];
        if slot.is_none() {
            *slot = Some(self.conn.prepare_cached(Sql::ALL[sql as usize])?);
        }
        slot.as_mut().ok_or(rusqlite::Error::InvalidQuery)
    }

    /// Runs it; gives how many rows changed.
    pub(super) fn run(&mut self, sql: Sql, params: impl Params) -> rusqlite::Result<usize> {
        self.get(sql)?.execute(params)
    }

    pub(super) fn savepoint(&mut self) -> rusqlite::Result<()> {
        self.run(Sql::Savepoint, []).map(|_| ())
    }

    /// Keeps what was done since [`Self::savepoint`], or undoes it.
    pub(super) fn end_savepoint(&mut self, keep: bool) -> rusqlite::Result<()> {
        if !keep {
            self.run(Sql::Rollback, [])?;
        }
        self.run(Sql::Release, []).map(|_| ())
    }
}

/// The writers' epochs, numbered in the order of their appearance so that a data id fits one integer.
#[derive(Default)]
pub(super) struct Epochs {
    list: Vec<Epoch>,
    index: HashMap<Epoch, i64>,
}

impl Epochs {
    pub(super) fn read(conn: &Connection) -> rusqlite::Result<Self> {
        let mut stmt = conn.prepare("SELECT idx, epoch FROM epoch ORDER BY idx")?;
        let rows = stmt.query_map([], |row| {
            Ok((row.get::<_, i64>(0)?, Epoch(row.get::<_, Bits64>(1)?.0)))
        })?;
        let mut epochs = Self::default();
        for row in rows {
            let (index, epoch) = row?;
            if usize::try_from(index) != Ok(epochs.list.len()) {
                return Err(rusqlite::Error::IntegralValueOutOfRange(0, index));
            }
            epochs.list.push(epoch);
            epochs.index.insert(epoch, index);
        }
        Ok(epochs)
    }

    pub(super) fn len(&self) -> usize {
        self.list.len()
    }

    /// Forgets those beyond the first `len`, after their rows were rolled back.
    pub(super) fn truncate(&mut self, len: usize) {
        for epoch in self.list.drain(len..) {
            self.index.remove(&epoch);
        }
    }

    /// The data id as one integer; `None` where there are more epochs than fit.
    pub(super) fn pack(
        &mut self,
        stmts: &mut Stmts<'_>,
        id: DataId,
    ) -> rusqlite::Result<Option<i64>> {
        let index = match self.index.get(&id.epoch) {
            Some(&index) => index,
            None if self.list.len() as u64 >= EPOCHS_MAX => return Ok(None),
            None => {
                let index = i64::try_from(self.list.len()).unwrap_or(i64::MAX);
                stmts.run(Sql::InsertEpoch, (index, Bits64(id.epoch.0)))?;
                self.list.push(id.epoch);
                self.index.insert(id.epoch, index);
                index
            }
        };
        let number = i64::try_from(id.number).ok();
        Ok(number
            .filter(|_| id.number < DataId::NUMBER_MAX)
            .map(|number| index << EPOCH_SHIFT | number))
    }
}
