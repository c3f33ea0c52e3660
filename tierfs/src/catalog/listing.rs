//! Whole directories at once: what replay asks for a million times when it makes names only.
//!
//! One statement gives what would be four for each entry: its attributes, extended attributes, whether
//! it has data, and whether it has further names.

use rusqlite::params;

use super::error::Error;
use super::query::{Queries, XattrList, inode_columns, inode_row};
use super::rows::InodeRow;
use super::sql::Int;
use crate::ids::FileId;
use crate::record::Kind;

/// An entry of a directory with all that the log has of it but the content itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listed {
    /// The entry's name.
    pub name: Vec<u8>,
    /// What it names; `handle` and `ino` are left out.
    pub inode: InodeRow,
    /// Its extended attributes.
    pub xattrs: XattrList,
    /// The current version has data, not only holes.
    pub has_data: bool,
    /// The file has other names beside this one.
    pub has_others: bool,
}

impl Queries<'_> {
    /// The entries of a directory in the order of their names (as bytes), those after `after`, at most
    /// `limit`.
    pub fn listing(
        self,
        parent: FileId,
        after: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<Listed>, Error> {
        let rows = self.list(
            concat!(
                "SELECT ",
                inode_columns!(),
                ", i.ctime_s, i.ctime_n, d.name, x.list,
                 EXISTS(SELECT 1 FROM extent e WHERE e.file = d.file),
                 EXISTS(SELECT 1 FROM dentry n WHERE n.file = d.file
                        AND (n.parent <> d.parent OR n.name <> d.name))
                 FROM dentry d CROSS JOIN inode i ON i.file = d.file
                 LEFT JOIN xattrs x ON x.file = d.file
                 WHERE d.parent = ?1 AND d.name > ?2 ORDER BY d.name LIMIT ?3"
            ),
            params![parent, after.unwrap_or_default(), Int(limit as u64)],
            |row| {
                let listed = Listed {
                    inode: inode_row(row)?,
                    name: row.get(20)?,
                    xattrs: Vec::new(),
                    has_data: row.get(22)?,
                    has_others: row.get(23)?,
                };
                Ok((listed, row.get::<_, Option<Vec<u8>>>(21)?))
            },
        )?;
        rows.into_iter()
            .map(|(mut listed, list)| {
                listed.xattrs = self.xattr_list(listed.inode.file, list)?;
                Ok(listed)
            })
            .collect()
    }

    /// The files of one kind with ids beyond `after`, ascending, at most `limit`. Reads the table of
    /// inodes.
    pub fn files_of_kind(
        self,
        kind: Kind,
        after: Option<FileId>,
        limit: usize,
    ) -> Result<Vec<FileId>, Error> {
        self.list(
            "SELECT file FROM inode WHERE file > ?1 AND kind = ?2 ORDER BY file LIMIT ?3",
            params![
                after.map_or(Int(0), |file| Int(file.get())),
                kind,
                Int(limit as u64)
            ],
            |row| row.get(0),
        )
    }
}
