//! What the current state needs of each segment, in the order in which it lies there.
//!
//! The fold keeps no index from places to files: nothing but replay and reclaiming asks that way, and
//! the index would cost every commit. Instead [`Queries::live`] joins extents with places once and
//! sorts the result into a temporary table: one pass over `extent` with a lookup in `data` for each row
//! (mostly in ascending order), and an external merge sort of about 40 bytes a row, in SQLite's
//! temporary directory (`SQLITE_TMPDIR`, else /var/tmp). n log n, whatever the number of segments.

use std::collections::VecDeque;

use rusqlite::params;

use super::error::Error;
use super::query::{Queries, extent_columns, extent_row};
use super::rows::{LiveRow, LiveSegment};
use super::sql::{Int, int};
use crate::ids::{FileId, SegmentNo};

const MAKE: &str = "
    DROP TABLE IF EXISTS temp.live;
    DROP TABLE IF EXISTS temp.live_segment;
    CREATE TEMP TABLE live(
        n INTEGER PRIMARY KEY, segment INTEGER, frame_offset INTEGER, raw_offset INTEGER,
        data_len INTEGER, file INTEGER NOT NULL, offset INTEGER NOT NULL, len INTEGER NOT NULL);
    CREATE TEMP TABLE live_segment(
        segment INTEGER, first INTEGER NOT NULL, last INTEGER NOT NULL, bytes INTEGER NOT NULL);";

/// Sorts all that is needed by its place. Data whose place is unknown comes first, as NULL.
macro_rules! fill {
    ($which:literal) => {
        concat!(
            "INSERT INTO temp.live SELECT NULL, d.segment, d.frame_offset, d.raw_offset, d.len,
                 e.file, e.offset, e.len
             FROM extent e LEFT JOIN data d ON d.id = e.data ",
            $which,
            " ORDER BY d.segment, d.frame_offset, d.raw_offset, e.file, e.offset;
             INSERT INTO temp.live_segment SELECT segment, min(n), max(n), sum(len)
             FROM temp.live GROUP BY segment"
        )
    };
}

const SELECT_TREE: &str = "
    DROP TABLE IF EXISTS temp.selected;
    CREATE TEMP TABLE selected(file INTEGER PRIMARY KEY);
    INSERT INTO temp.selected
        WITH RECURSIVE tree(file) AS (
            SELECT file FROM temp.selected_root UNION
            SELECT d.file FROM tree CROSS JOIN dentry d ON d.parent = tree.file)
        SELECT file FROM tree;";

impl<'c> Queries<'c> {
    /// Works out what the whole tree needs, or `subtree` and what is below it. A connection holds one
    /// such answer at a time: a second call replaces the first.
    pub fn live(self, subtree: Option<FileId>) -> Result<Live<'c>, Error> {
        let run = |sql: &str| {
            self.conn
                .execute_batch(sql)
                .map_err(|error| self.fail(error))
        };
        run(MAKE)?;
        if let Some(root) = subtree {
            run("DROP TABLE IF EXISTS temp.selected_root;
                 CREATE TEMP TABLE selected_root(file INTEGER PRIMARY KEY)")?;
            self.conn
                .execute("INSERT INTO temp.selected_root VALUES (?1)", [root])
                .map_err(|error| self.fail(error))?;
            run(SELECT_TREE)?;
            run(fill!("WHERE e.file IN (SELECT file FROM temp.selected)"))?;
        } else {
            run(fill!(""))?;
        }
        Ok(Live { queries: self })
    }

    /// The same of one file's content as it is now: the segments that hold it, and how much of it.
    pub fn segments_of(self, file: FileId) -> Result<Vec<LiveSegment>, Error> {
        self.list(
            "SELECT d.segment, count(*), sum(e.len) FROM extent e LEFT JOIN data d ON d.id = e.data
             WHERE e.file = ?1 GROUP BY d.segment ORDER BY d.segment",
            [file],
            live_segment,
        )
    }
}

fn live_segment(row: &rusqlite::Row<'_>) -> rusqlite::Result<LiveSegment> {
    Ok(LiveSegment {
        segment: row.get(0)?,
        rows: int(row, 1)?,
        bytes: int(row, 2)?,
    })
}

/// The answer of [`Queries::live`].
#[derive(Clone, Copy)]
pub struct Live<'c> {
    queries: Queries<'c>,
}

impl<'c> Live<'c> {
    /// The segments that are needed, in order. The first may be `None`: data that no segment read so
    /// far holds.
    pub fn segments(self) -> Result<Vec<LiveSegment>, Error> {
        self.queries.list(
            "SELECT segment, last - first + 1, bytes FROM temp.live_segment ORDER BY segment",
            [],
            live_segment,
        )
    }

    /// What is needed of a segment, in the order in which it lies there.
    pub fn rows(self, segment: SegmentNo) -> Result<LiveRows<'c>, Error> {
        let ends = self.queries.one(
            "SELECT first, last FROM temp.live_segment WHERE segment = ?1",
            [segment],
            |row| Ok((int(row, 0)?, int(row, 1)?)),
        )?;
        let (first, last) = ends.unwrap_or((1, 0));
        Ok(LiveRows {
            queries: self.queries,
            next: first,
            last,
            ready: VecDeque::new(),
        })
    }

    /// The files that need data whose place is not known, at most `limit`.
    pub fn missing(self, limit: usize) -> Result<Vec<FileId>, Error> {
        self.queries.list(
            "SELECT DISTINCT file FROM temp.live WHERE n <= (
                 SELECT last FROM temp.live_segment WHERE segment IS NULL) ORDER BY file LIMIT ?1",
            [Int(limit as u64)],
            |row| row.get(0),
        )
    }
}

/// An iterator over [`LiveRow`]s; holds a few at a time.
pub struct LiveRows<'c> {
    queries: Queries<'c>,
    next: u64,
    last: u64,
    ready: VecDeque<LiveRow>,
}

impl LiveRows<'_> {
    fn fetch(&mut self) -> Result<(), Error> {
        const ROWS: u64 = 256;
        let end = self.last.min(self.next.saturating_add(ROWS - 1));
        let rows = self.queries.list(
            concat!(
                "SELECT l.frame_offset, l.raw_offset, l.data_len, l.file, ",
                extent_columns!(),
                " FROM temp.live l CROSS JOIN extent e ON e.file = l.file AND e.offset = l.offset
                  CROSS JOIN epoch p ON p.idx = e.data >> 40
                  WHERE l.n BETWEEN ?1 AND ?2 ORDER BY l.n"
            ),
            params![Int(self.next), Int(end)],
            |row| {
                Ok(LiveRow {
                    frame_offset: int(row, 0)?,
                    raw_offset: row.get(1)?,
                    data_len: row.get(2)?,
                    file: row.get(3)?,
                    extent: extent_row(row, 4)?,
                })
            },
        )?;
        self.ready.extend(rows);
        self.next = end + 1;
        Ok(())
    }
}

impl Iterator for LiveRows<'_> {
    type Item = Result<LiveRow, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() && self.next <= self.last {
            if let Err(error) = self.fetch() {
                self.next = self.last.saturating_add(1);
                return Some(Err(error));
            }
        }
        self.ready.pop_front().map(Ok)
    }
}
