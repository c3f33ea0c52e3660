//! How much below a directory there is, on disk, and released.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rusqlite::Connection;

use super::attach;
use crate::catalog::{self, Error};
use crate::ids::FileId;

/// Sums over files; one with several names counts once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Files of every kind but directories.
    pub files: u64,
    /// Bytes of content, holes included: what `ls -l` shows.
    pub logical: u64,
    /// Bytes of content, without holes, that are on disk.
    pub resident: u64,
    /// Bytes of content, without holes, that were given back.
    pub released: u64,
    /// Files whose data was given back.
    pub stubs: u64,
}

impl Sums {
    fn add(&mut self, other: Self) {
        self.files += other.files;
        self.logical = self.logical.saturating_add(other.logical);
        self.resident = self.resident.saturating_add(other.resident);
        self.released = self.released.saturating_add(other.released);
        self.stubs += other.stubs;
    }
}

/// A connection that adds up.
pub struct Usage {
    conn: Connection,
    path: PathBuf,
}

/// A directory whose subdirectories are still to be added.
struct Open {
    name: Vec<u8>,
    sums: Sums,
    todo: Vec<(Vec<u8>, FileId)>,
}

const ENTRIES: &str = "
SELECT d.name, d.file, i.kind, i.size,
    CASE WHEN i.kind = 0 THEN (SELECT coalesce(sum(e.len), 0) FROM extent e WHERE e.file = i.file) ELSE 0 END,
    coalesce((SELECT s.since_s FROM stub s WHERE s.file = i.file) >= 0, 0),
    i.kind <> 1 AND (SELECT count(*) FROM dentry o INDEXED BY dentry_file WHERE o.file = i.file) > 1
FROM dentry d CROSS JOIN inode i ON i.file = d.file WHERE ";

impl Usage {
    /// Opens the catalog, and the list of stubs beside it where there is one.
    pub fn open(catalog: &Path) -> Result<Self, Error> {
        let conn = catalog::read_only(catalog)?;
        attach(&conn, catalog)?;
        Ok(Self {
            conn,
            path: catalog.to_owned(),
        })
    }

    fn fail(&self, error: rusqlite::Error) -> Error {
        Error::sqlite(&self.path, "adding up", error)
    }

    /// Adds up what lies below `top`. `each` gets every directory that is at most `depth` below it, after
    /// all that lies in it, with its path from `top` (empty for `top` itself). Ends early when `cancelled` is set.
    pub fn below(
        &self,
        top: FileId,
        depth: usize,
        cancelled: &AtomicBool,
        each: &mut dyn FnMut(&[u8], Sums),
    ) -> Result<(), Error> {
        let mut seen = HashSet::new();
        let mut first = Open {
            name: Vec::new(),
            sums: Sums::default(),
            todo: Vec::new(),
        };
        self.entries(top, &mut first, &mut seen)?;
        let mut way = vec![first];
        while let Some(open) = way.last_mut() {
            if cancelled.load(Ordering::Relaxed) {
                break;
            }
            if let Some((name, dir)) = open.todo.pop() {
                let mut next = Open {
                    name,
                    sums: Sums::default(),
                    todo: Vec::new(),
                };
                self.entries(dir, &mut next, &mut seen)?;
                way.push(next);
                continue;
            }
            let names: Vec<&[u8]> = way[1..].iter().map(|open| &open.name[..]).collect();
            let told = way.len() <= depth + 1;
            let path = if told { names.join(&b'/') } else { Vec::new() };
            let Some(done) = way.pop() else { break };
            if told {
                each(&path, done.sums);
            }
            if let Some(above) = way.last_mut() {
                above.sums.add(done.sums);
            }
        }
        Ok(())
    }

    /// What one file that is no directory takes.
    pub fn of_file(&self, file: FileId) -> Result<Sums, Error> {
        let mut open = Open {
            name: Vec::new(),
            sums: Sums::default(),
            todo: Vec::new(),
        };
        self.rows(
            "d.file = ?1 ORDER BY d.parent, d.name LIMIT 1",
            file,
            &mut open,
            &mut HashSet::new(),
        )?;
        Ok(open.sums)
    }

    fn entries(
        &self,
        dir: FileId,
        open: &mut Open,
        seen: &mut HashSet<FileId>,
    ) -> Result<(), Error> {
        self.rows("d.parent = ?1 ORDER BY d.name DESC", dir, open, seen)
    }

    fn rows(
        &self,
        which: &str,
        id: FileId,
        open: &mut Open,
        seen: &mut HashSet<FileId>,
    ) -> Result<(), Error> {
        let unsigned = |number: i64| u64::try_from(number).unwrap_or(0);
        let mut run = || -> rusqlite::Result<()> {
            let mut stmt = self.conn.prepare_cached(&format!("{ENTRIES}{which}"))?;
            let mut rows = stmt.query([id])?;
            while let Some(row) = rows.next()? {
                let (file, kind): (FileId, i64) = (row.get(1)?, row.get(2)?);
                if kind == 1 {
                    open.todo.push((row.get(0)?, file));
                    continue;
                }
                if row.get(6)? && !seen.insert(file) {
                    continue;
                }
                let (content, stub) = (unsigned(row.get(4)?), row.get::<_, bool>(5)?);
                open.sums.add(Sums {
                    files: 1,
                    logical: unsigned(row.get(3)?),
                    resident: if stub { 0 } else { content },
                    released: if stub { content } else { 0 },
                    stubs: u64::from(stub),
                });
            }
            Ok(())
        };
        run().map_err(|error| self.fail(error))
    }
}
