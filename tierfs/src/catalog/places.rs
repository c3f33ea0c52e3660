//! The second fold: where things lie in the log. It is always read to the log's end, whatever moment
//! is asked for, so bytes that were written again elsewhere are found by every earlier version.

use rusqlite::{OptionalExtension, params};

use super::rows::{DataPlace, Place, SegmentRow};
use super::sql::{Bits64, Int};
use super::stmts::{Sql, Stmts};
use super::{Catalog, Error};
use crate::ids::{Hash, Lsn, SegmentNo};

impl Catalog {
    /// Notes where data records of `segment` lie. A data id that is known already gets the new place:
    /// the later in the log's order wins, so segments must come in that order.
    pub fn apply_data(&mut self, segment: SegmentNo, items: &[DataPlace]) -> Result<(), Error> {
        if items.is_empty() {
            return Ok(());
        }
        self.begin()?;
        let mut stmts = Stmts::new(&self.conn);
        let mut put = |item: &DataPlace| {
            let id = self.epochs.pack(&mut stmts, item.id)?.ok_or_else(|| {
                rusqlite::Error::ToSqlConversionFailure(
                    format!("data id {} does not fit", item.id).into(),
                )
            })?;
            let (offset, raw, len) = (Int(item.frame_offset), item.raw_offset, item.len);
            stmts.run(Sql::PutData, params![id, segment, offset, raw, len])
        };
        items
            .iter()
            .try_for_each(|item| put(item).map(|_| ()))
            .map_err(|error| Error::sqlite(&self.path, "noting where data lies", error))
    }

    /// Forgets every data place in `segment`. For a segment of which recovery wrote the surviving rest
    /// elsewhere; the new places are then noted with [`Self::apply_data`]. Reads all places once.
    pub fn forget_data(&mut self, segment: SegmentNo) -> Result<(), Error> {
        self.begin()?;
        self.conn
            .execute("DELETE FROM data WHERE segment = ?1", [segment])
            .map(|_| ())
            .map_err(|error| self.fail("forgetting places of data", error))
    }

    /// Notes that the commit of a transaction, already applied, lies elsewhere: recovery wrote it
    /// to another segment.
    pub fn set_place(&mut self, lsn: Lsn, place: Place) -> Result<(), Error> {
        self.begin()?;
        let Place {
            segment,
            frame_offset,
        } = place;
        self.conn
            .prepare_cached("UPDATE txn SET segment = ?2, frame_offset = ?3 WHERE lsn = ?1")
            .and_then(|mut stmt| stmt.execute(params![lsn, segment, Int(frame_offset)]))
            .map(|_| ())
            .map_err(|error| self.fail("noting where a transaction lies", error))
    }

    /// Notes a sealed segment. The same one again changes nothing; the same number with another hash
    /// is [`Error::Fork`].
    pub fn add_segment(&mut self, row: &SegmentRow) -> Result<(), Error> {
        self.begin()?;
        let known: Option<Hash> = self
            .conn
            .prepare_cached("SELECT hash FROM segment WHERE segment = ?1")
            .and_then(|mut stmt| stmt.query_row([row.segment], |row| row.get(0)).optional())
            .map_err(|error| self.fail("looking for a segment", error))?;
        match known {
            Some(known) if known != row.hash => Err(Error::Fork {
                segment: row.segment,
                known,
                found: row.hash,
            }),
            Some(_) => Ok(()),
            None => self
                .insert_segment(row)
                .map_err(|error| self.fail("noting a segment", error)),
        }
    }

    fn insert_segment(&self, row: &SegmentRow) -> rusqlite::Result<()> {
        self.conn
            .prepare_cached("INSERT INTO segment VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?
            .execute(params![
                row.segment,
                row.hash,
                Int(row.bytes),
                Bits64(row.epoch.0),
                row.first_lsn,
                row.last_lsn,
                row.sealed.seconds,
                row.sealed.nanos
            ])
            .map(|_| ())
    }
}
