//! Tables that describe the local disk and the volumes at hand. They are not part of the log, not part
//! of the digest, and start empty after a rebuild.

use rusqlite::{OptionalExtension, Row, params};

use super::rows::CopyRow;
use super::sql::{Int, time_at};
use super::{Catalog, Error, Queries};
use crate::ids::{FileId, SegmentNo, Time};

impl Catalog {
    /// A sweep found the file as logged, though its ctime is another than the logged one. From now on
    /// [`super::InodeRow::ctime`] and [`super::Child::ctime`] are `ctime`, until the file changes.
    pub fn set_seen(
        &mut self,
        file: FileId,
        ctime: Time,
        size: u64,
        swept: Time,
    ) -> Result<(), Error> {
        self.begin()?;
        self.conn
            .prepare_cached("INSERT OR REPLACE INTO local_seen VALUES (?1, ?2, ?3, ?4, ?5, ?6)")
            .and_then(|mut stmt| {
                stmt.execute(params![
                    file,
                    ctime.seconds,
                    ctime.nanos,
                    Int(size),
                    swept.seconds,
                    swept.nanos
                ])
            })
            .map(|_| ())
            .map_err(|error| self.fail("noting what a sweep saw", error))
    }

    /// Notes a copy of a segment on a volume, or its new state.
    pub fn set_copy(&mut self, copy: &CopyRow) -> Result<(), Error> {
        self.begin()?;
        let CopyRow {
            segment,
            serial,
            state,
            verified,
        } = copy;
        let (seconds, nanos) = (
            verified.map(|time| time.seconds),
            verified.map(|time| time.nanos),
        );
        self.conn
            .prepare_cached("INSERT OR REPLACE INTO local_copy VALUES (?1, ?2, ?3, ?4, ?5)")
            .and_then(|mut stmt| stmt.execute(params![segment, serial, state, seconds, nanos]))
            .map(|_| ())
            .map_err(|error| self.fail("noting a copy", error))
    }

    /// Forgets all copies on a volume: its inventory is about to be read again.
    pub fn forget_copies(&mut self, serial: &str) -> Result<(), Error> {
        self.begin()?;
        self.conn
            .execute("DELETE FROM local_copy WHERE serial = ?1", [serial])
            .map(|_| ())
            .map_err(|error| self.fail("forgetting copies", error))
    }

    /// Keeps a value that concerns this machine only; `None` removes it.
    pub fn set_meta(&mut self, key: &str, value: Option<&[u8]>) -> Result<(), Error> {
        self.begin()?;
        let done = match value {
            Some(value) => self.conn.execute(
                "INSERT OR REPLACE INTO local_meta VALUES (?1, ?2)",
                params![key, value],
            ),
            None => self
                .conn
                .execute("DELETE FROM local_meta WHERE key = ?1", [key]),
        };
        done.map(|_| ())
            .map_err(|error| self.fail("keeping a local value", error))
    }
}

impl Queries<'_> {
    /// The copies of a segment that are known, by serial.
    pub fn copies(self, segment: SegmentNo) -> Result<Vec<CopyRow>, Error> {
        self.list(
            "SELECT segment, serial, state, verified_s, verified_n FROM local_copy
             WHERE segment = ?1 ORDER BY serial",
            [segment],
            copy_row,
        )
    }

    /// Calls `each` for every copy that is known.
    pub fn for_each_copy(self, mut each: impl FnMut(CopyRow)) -> Result<(), Error> {
        let mut stmt = self.prepare(
            "SELECT segment, serial, state, verified_s, verified_n FROM local_copy
             ORDER BY segment, serial",
        )?;
        let mut rows = stmt.query([]).map_err(|error| self.fail(error))?;
        while let Some(row) = rows.next().map_err(|error| self.fail(error))? {
            each(copy_row(row).map_err(|error| self.fail(error))?);
        }
        Ok(())
    }

    /// A value kept by [`Catalog::set_meta`].
    pub fn meta(self, key: &str) -> Result<Option<Vec<u8>>, Error> {
        self.prepare("SELECT value FROM local_meta WHERE key = ?1")?
            .query_row([key], |row| row.get(0))
            .optional()
            .map_err(|error| self.fail(error))
    }
}

fn copy_row(row: &Row<'_>) -> rusqlite::Result<CopyRow> {
    Ok(CopyRow {
        segment: row.get(0)?,
        serial: row.get(1)?,
        state: row.get(2)?,
        verified: time_at(row, 3)?,
    })
}
