//! The fold of content: how a version's extents replace those of the version before.
//!
//! `extent` has one row per stretch of a data record that the current version shows; what no row
//! covers is a hole. A new version leaves the rows of its unchanged ranges as they are, splits a row
//! where such a range begins or ends within it, and supersedes the rest. Splitting is refused but at
//! the boundaries of pieces, since only whole pieces have a hash.

use rusqlite::{OptionalExtension, Row, params};

use super::error::Refusal;
use super::fold::{Fault, Fold};
use super::sql::{Int, int};
use super::stmts::Sql;
use crate::ids::{DataId, FileId, Hash, Lsn};
use crate::layout::{self, BLOCK, Range, RootHasher};
use crate::record::{Content, Extent, Kind};

/// A row of `extent` that a boundary runs through.
struct Stored {
    range: Range,
    data: i64,
    data_off: u64,
    hashes: Vec<u8>,
}

impl Stored {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            range: Range {
                offset: int(row, 0)?,
                len: int(row, 1)?,
            },
            data: row.get(2)?,
            data_off: int(row, 3)?,
            hashes: row.get(4)?,
        })
    }
}

impl<'t> Fold<'_, '_, 't> {
    /// A new version of a file.
    pub(super) fn content(&mut self, content: &'t Content) -> Result<(), Fault> {
        let file = content.file;
        let lists = self.pending.remove(&file).unwrap_or_default();
        let node = self.node(file)?;
        if node.kind != Kind::Regular {
            return Err(Refusal::NotRegular(file).into());
        }
        let (size, current) = (node.size, node.content_lsn);
        let extents = || lists.iter().copied().flatten();
        let unchanged = check_cover(content, extents())?;
        check_base(content, size, current, unchanged)?;
        if unchanged.is_some() {
            self.replace(file, size, extents())?;
        } else if size > 0 {
            self.close_extents(file, 0, size)?;
        }
        for extent in extents() {
            self.insert_extent(file, extent)?;
        }
        let root = if unchanged.is_some() {
            self.root_of_rows(content)?
        } else {
            root_of_list(content, extents())
        };
        Self::refuse_root(file, content.root, root)?;
        let lsn = self.lsn();
        let node = self.node(file)?;
        node.size = content.size;
        node.content_lsn = Some(lsn);
        node.content = Some(content);
        let counts = &mut self.state.counts;
        counts.bytes = counts.bytes.wrapping_sub(size).wrapping_add(content.size);
        counts.versions = counts.versions.wrapping_add(1);
        Ok(())
    }

    /// Supersedes everything that is not unchanged.
    fn replace<'e>(
        &mut self,
        file: FileId,
        old_size: u64,
        extents: impl Iterator<Item = &'e Extent>,
    ) -> Result<(), Fault> {
        // Where the stretch of replaced bytes began that is not closed yet.
        let mut from = None;
        let mut end = 0;
        for extent in extents {
            let range = extent.range();
            end = range.end();
            match (extent, from) {
                (Extent::Same(_), Some(begin)) => {
                    self.replace_range(file, begin, range.offset)?;
                    from = None;
                }
                (Extent::Same(_), None) | (_, Some(_)) => {}
                (_, None) => from = Some(range.offset),
            }
        }
        let begin = from.unwrap_or(end);
        if begin < old_size {
            self.replace_range(file, begin, old_size)?;
        }
        Ok(())
    }

    fn replace_range(&mut self, file: FileId, begin: u64, end: u64) -> Result<(), Fault> {
        self.split(file, begin)?;
        self.split(file, end)?;
        self.close_extents(file, begin, end)
    }

    /// Sees to it that no row of the file runs across `at`.
    fn split(&mut self, file: FileId, at: u64) -> Result<(), Fault> {
        let before = self
            .stmts
            .get(Sql::ExtentBefore)?
            .query_row((file, Int(at)), Stored::read)
            .optional()?;
        let Some(row) = before.filter(|row| row.range.end() > at) else {
            return Ok(());
        };
        let offset = row.range.offset;
        if !at.is_multiple_of(BLOCK) {
            return Err(Refusal::NotAtAPiece { file, offset: at }.into());
        }
        let head = Range {
            offset,
            len: at - offset,
        };
        let tail = Range {
            offset: at,
            len: row.range.end() - at,
        };
        let pieces = usize::try_from(layout::piece_count(head)).unwrap_or(usize::MAX);
        let cut = pieces.saturating_mul(Hash::LEN).min(row.hashes.len());
        let (head_hashes, tail_hashes) = row.hashes.split_at(cut);
        self.close_extents(file, offset, offset + 1)?;
        let lsn = self.lsn();
        for (range, skipped, hashes) in [(head, 0, head_hashes), (tail, head.len, tail_hashes)] {
            let data_off = Int(row.data_off + skipped);
            let (offset, len) = (Int(range.offset), Int(range.len));
            let row = params![file, offset, len, row.data, data_off, lsn, hashes];
            self.stmts.run(Sql::InsertExtent, row)?;
        }
        Ok(())
    }

    /// Supersedes the rows that begin in `[begin, end)`.
    pub(super) fn close_extents(
        &mut self,
        file: FileId,
        begin: u64,
        end: u64,
    ) -> Result<(), Fault> {
        let (begin, end) = (Int(begin), Int(end));
        if self.keeps_history() {
            let row = (file, begin, end, self.lsn());
            self.stmts.run(Sql::KeepExtents, row)?;
        }
        self.stmts.run(Sql::DeleteExtents, (file, begin, end))?;
        Ok(())
    }

    /// One row for each chunk of logged content.
    fn insert_extent(&mut self, file: FileId, extent: &Extent) -> Result<(), Fault> {
        let Extent::Data {
            range,
            first,
            hashes,
        } = extent
        else {
            return Ok(());
        };
        let lsn = self.lsn();
        let mut hashes = &hashes[..];
        for (number, chunk) in (first.number..).zip(layout::chunks(*range)) {
            let pieces = usize::try_from(layout::piece_count(chunk)).unwrap_or(usize::MAX);
            let (here, rest) = hashes.split_at(pieces.min(hashes.len()));
            hashes = rest;
            let epoch = first.epoch;
            let data = self
                .epochs
                .pack(self.stmts, DataId { epoch, number })?
                .ok_or(Refusal::TooLarge {
                    what: "the number of a data id (or of writers)",
                    value: number,
                })?;
            self.scratch.clear();
            let bytes = if let [one] = here {
                &one.0[..]
            } else {
                for hash in here {
                    self.scratch.extend_from_slice(&hash.0);
                }
                &self.scratch[..]
            };
            let (offset, len) = (Int(chunk.offset), Int(chunk.len));
            let row = params![file, offset, len, data, 0, lsn, bytes];
            self.stmts.run(Sql::InsertExtent, row)?;
        }
        Ok(())
    }

    /// The root hash of the version as the rows have it.
    fn root_of_rows(&mut self, content: &Content) -> Result<Hash, Fault> {
        let mut root = RootHasher::default();
        let mut rows = self.stmts.get(Sql::ListExtents)?.query([content.file])?;
        while let Some(row) = rows.next()? {
            let range = Range {
                offset: int(row, 0)?,
                len: int(row, 1)?,
            };
            let hashes = row.get_ref(2)?.as_blob().map_err(rusqlite::Error::from)?;
            for (piece, hash) in layout::pieces(range).zip(hashes.as_chunks().0) {
                root.piece(piece, &Hash(*hash));
            }
        }
        Ok(root.finish(content.size))
    }
}

/// The root hash of a version of which nothing is unchanged.
fn root_of_list<'e>(content: &Content, extents: impl Iterator<Item = &'e Extent>) -> Hash {
    let mut root = RootHasher::default();
    for extent in extents {
        if let Extent::Data { range, hashes, .. } = extent {
            root.pieces(*range, hashes);
        }
    }
    root.finish(content.size)
}

/// Checks that the extents are exactly `[0, size)`; gives the end of the last unchanged one.
fn check_cover<'e>(
    content: &Content,
    extents: impl Iterator<Item = &'e Extent>,
) -> Result<Option<u64>, Refusal> {
    let Content { file, size, .. } = *content;
    let (mut covered, mut unchanged) = (0, None);
    for extent in extents {
        let range = extent.range();
        if range.offset != covered || range.len == 0 {
            return Err(Refusal::ExtentsGap {
                file,
                expected: covered,
                found: range.offset,
            });
        }
        covered = range
            .offset
            .checked_add(range.len)
            .filter(|end| *end <= i64::MAX.unsigned_abs())
            .ok_or(Refusal::TooLarge {
                what: "the length of an extent",
                value: range.len,
            })?;
        match extent {
            Extent::Same(_) => unchanged = Some(covered),
            Extent::Data { hashes, .. } => {
                let (expected, found) = (layout::piece_count(range), hashes.len() as u64);
                let offset = range.offset;
                if expected != found {
                    return Err(Refusal::HashCount {
                        file,
                        offset,
                        expected,
                        found,
                    });
                }
            }
            Extent::Hole(_) => {}
        }
    }
    if covered == size {
        Ok(unchanged)
    } else {
        Err(Refusal::ExtentsShort {
            file,
            covered,
            size,
        })
    }
}

/// Checks that what is unchanged is so since the current version, and lies within it.
fn check_base(
    content: &Content,
    base_size: u64,
    current: Option<Lsn>,
    unchanged: Option<u64>,
) -> Result<(), Refusal> {
    let Content { file, base, .. } = *content;
    match unchanged {
        Some(end) if base == current && base.is_some() && end > base_size => {
            Err(Refusal::SameBeyondBase {
                file,
                end,
                base_size,
            })
        }
        Some(_) if base.is_some() && base == current => Ok(()),
        None if base.is_none() || base == current => Ok(()),
        _ => Err(Refusal::BaseNotCurrent {
            file,
            base,
            current,
        }),
    }
}
