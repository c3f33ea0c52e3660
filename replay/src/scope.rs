//! Which part of the tree is wanted: all of it, or one entry and what is below it.

use std::sync::Arc;

use tierfs::FileId;
use tierfs::catalog::Queries;
use tierfs::ids::Lsn;

use crate::dirs::Dir;
use crate::error::Error;

/// The part of the tree that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    entry: Option<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    file: FileId,
    /// The names from the root, each with what it names; the last is the wanted one.
    way: Vec<(Vec<u8>, FileId)>,
}

impl Scope {
    /// The whole tree.
    pub fn whole() -> Self {
        Self { entry: None }
    }

    /// What `path` names in the tree as of `at`, which the catalog was folded to.
    pub fn of(queries: Queries<'_>, path: Option<&[u8]>, at: Lsn) -> Result<Self, Error> {
        let Some(path) = path else {
            return Ok(Self::whole());
        };
        let (mut way, mut file) = (Vec::new(), FileId::ROOT);
        let names = path.split(|byte| *byte == b'/');
        for name in names.filter(|name| !name.is_empty() && *name != b".") {
            file = queries
                .lookup(file, name)?
                .ok_or_else(|| Error::NoSuchPath {
                    path: path.to_owned(),
                    at,
                })?;
            way.push((name.to_vec(), file));
        }
        Ok(Self {
            entry: (!way.is_empty()).then_some(Entry { file, way }),
        })
    }

    /// The file at which the part begins; `None` for the whole tree.
    pub fn file(&self) -> Option<FileId> {
        self.entry.as_ref().map(|entry| entry.file)
    }

    /// The root itself is part of it.
    pub(crate) fn holds_root(&self) -> bool {
        self.entry.is_none()
    }

    /// The part begins with this entry.
    pub(crate) fn begins_at(&self, parent: FileId, name: &[u8]) -> bool {
        self.entry.as_ref().is_some_and(|entry| {
            let above = entry
                .way
                .len()
                .checked_sub(2)
                .and_then(|up| entry.way.get(up));
            let above = above.map_or(FileId::ROOT, |(_, file)| *file);
            parent == above && entry.way.last().is_some_and(|(last, _)| last == name)
        })
    }

    /// The entry `name` of `dir` is wanted.
    pub fn wants(&self, dir: &Dir, name: &[u8]) -> bool {
        dir.inside || self.begins_at(dir.file, name)
    }

    /// The only entry of `dir` that leads to the part, where the part lies below it.
    pub fn way_from(&self, dir: &Arc<Dir>) -> Option<&[u8]> {
        let entry = self.entry.as_ref().filter(|_| !dir.inside)?;
        let step = if dir.file == FileId::ROOT {
            0
        } else {
            1 + entry.way.iter().position(|(_, file)| *file == dir.file)?
        };
        entry.way.get(step).map(|(name, _)| name.as_slice())
    }
}
