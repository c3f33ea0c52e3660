//! The tree as one transaction will leave it: the catalog's, with what the transaction changes.
//!
//! Changes are kept as differences from the catalog and can be taken back to a mark, so that a group
//! of entries that turns out not to be ready leaves no trace. [`Tree::into_ops`] turns the difference
//! into operations in an order that is valid at every step.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use tierfs::FileId;
use tierfs::catalog::{self, Catalog};
use tierfs::record::{Delete, Kind, Link, Op, Unlink};

use super::facts::Facts;
use crate::sys::handle::Handle;

/// A name in a directory of the log.
pub type Name = (FileId, Vec<u8>);

/// A file that the log does not know yet.
#[derive(Clone, Debug)]
pub struct NewFile {
    /// Which inode; `None` where its handle is not its own.
    pub handle: Option<Handle>,
    /// What is known of it.
    pub facts: Arc<Facts>,
}

/// What an entry names in this transaction, and what it names in the catalog; `None`: nothing.
#[derive(Clone, Copy)]
struct Target {
    now: Option<FileId>,
    was: Option<FileId>,
}

enum Undo {
    /// What it named in this transaction before; `None` where it was not touched.
    Name(Name, Option<Target>),
    New(FileId, Option<Handle>),
    Deleted(FileId),
    Bound(FileId, Handle),
}

/// See the module.
pub struct Tree<'c> {
    catalog: &'c Catalog,
    names: BTreeMap<Name, Target>,
    gained: HashMap<FileId, BTreeSet<Name>>,
    new: BTreeMap<FileId, NewFile>,
    ids: HashMap<Handle, FileId>,
    bound: BTreeMap<FileId, (Handle, u64)>,
    deleted: BTreeSet<FileId>,
    next_id: FileId,
    undo: Vec<Undo>,
}

impl<'c> Tree<'c> {
    /// The catalog's tree.
    pub fn new(catalog: &'c Catalog) -> Self {
        Self {
            catalog,
            names: BTreeMap::new(),
            gained: HashMap::new(),
            new: BTreeMap::new(),
            ids: HashMap::new(),
            bound: BTreeMap::new(),
            deleted: BTreeSet::new(),
            next_id: catalog.next_file_id(),
            undo: Vec::new(),
        }
    }

    /// A point to come back to.
    pub fn mark(&self) -> usize {
        self.undo.len()
    }

    /// Takes back everything since `mark`. File ids given since are given again: nobody saw them.
    pub fn rewind(&mut self, mark: usize) {
        while self.undo.len() > mark {
            match self.undo.pop() {
                Some(Undo::Name(name, before)) => self.put_back(name, before),
                Some(Undo::New(file, handle)) => {
                    self.new.remove(&file);
                    handle.map(|handle| self.ids.remove(&handle));
                    self.next_id = file;
                }
                Some(Undo::Deleted(file)) => drop(self.deleted.remove(&file)),
                Some(Undo::Bound(file, handle)) => {
                    self.bound.remove(&file);
                    self.ids.remove(&handle);
                }
                None => {}
            }
        }
    }

    fn put_back(&mut self, name: Name, before: Option<Target>) {
        self.lose(&name);
        match before {
            Some(target) => self.give(name, target),
            None => drop(self.names.remove(&name)),
        }
    }

    /// Takes an entry from the file that it names in this transaction.
    fn lose(&mut self, name: &Name) {
        if let Some(set) = self
            .names
            .get(name)
            .and_then(|target| target.now)
            .and_then(|file| self.gained.get_mut(&file))
        {
            set.remove(name);
        }
    }

    /// Lets an entry name a file, or nothing.
    fn give(&mut self, name: Name, target: Target) {
        if let Some(file) = target.now {
            self.gained.entry(file).or_default().insert(name.clone());
        }
        self.names.insert(name, target);
    }

    /// Which file the inode is; `None` where the log does not know it.
    pub fn file_of(&self, handle: &Handle) -> Result<Option<FileId>, catalog::Error> {
        if let Some(file) = self.ids.get(handle) {
            return Ok(Some(*file));
        }
        let file = self.catalog.queries().file_by_handle(&handle.to_bytes())?;
        Ok(file.filter(|file| !self.deleted.contains(file)))
    }

    /// The inode of a file; `None` where it is bound to none on this filesystem.
    pub fn handle_of(&self, file: FileId) -> Result<Option<Handle>, catalog::Error> {
        if let Some(new) = self.new.get(&file) {
            return Ok(new.handle.clone());
        }
        if let Some((handle, _)) = self.bound.get(&file) {
            return Ok(Some(handle.clone()));
        }
        let bytes = self
            .catalog
            .queries()
            .inode(file)?
            .and_then(|row| row.handle);
        Ok(bytes.and_then(|bytes| Handle::from_bytes(&bytes).ok()))
    }

    /// What a file is.
    pub fn kind_of(&self, file: FileId) -> Result<Option<Kind>, catalog::Error> {
        if let Some(new) = self.new.get(&file) {
            return Ok(Some(super::facts::kind_of(new.facts.stat.kind)));
        }
        Ok(self.catalog.queries().inode(file)?.map(|row| row.kind))
    }

    /// What an entry names.
    pub fn lookup(&self, parent: FileId, name: &[u8]) -> Result<Option<FileId>, catalog::Error> {
        if let Some(value) = self.names.get(&(parent, name.to_vec())) {
            return Ok(value.now);
        }
        self.catalog.queries().lookup(parent, name)
    }

    /// All names of a file.
    pub fn names_of(&self, file: FileId) -> Result<BTreeSet<Name>, catalog::Error> {
        let mut names = self.gained.get(&file).cloned().unwrap_or_default();
        if !self.new.contains_key(&file) {
            for name in self.catalog.queries().names_of(file)? {
                if !self.names.contains_key(&name) {
                    names.insert(name);
                }
            }
        }
        Ok(names)
    }

    /// All entries of a directory.
    pub fn children(&self, dir: FileId) -> Result<Vec<(Vec<u8>, FileId)>, catalog::Error> {
        let mut found = BTreeMap::new();
        if !self.new.contains_key(&dir) {
            let mut after: Option<Vec<u8>> = None;
            loop {
                let page = self
                    .catalog
                    .queries()
                    .children(dir, after.as_deref(), 1000)?;
                let Some(last) = page.last() else { break };
                after = Some(last.name.clone());
                found.extend(page.into_iter().map(|child| (child.name, child.file)));
            }
        }
        for ((_, name), value) in self
            .names
            .range((dir, Vec::new())..(dir.next(), Vec::new()))
        {
            match value.now {
                Some(file) => drop(found.insert(name.clone(), file)),
                None => drop(found.remove(name)),
            }
        }
        Ok(found.into_iter().collect())
    }

    /// Gives an entry, for which [`Self::lookup`] said `was`, another file or none.
    pub fn set_name(
        &mut self,
        parent: FileId,
        name: &[u8],
        was: Option<FileId>,
        file: Option<FileId>,
    ) {
        let name = (parent, name.to_vec());
        let before = self.names.get(&name).copied();
        self.lose(&name);
        let was = before.map_or(was, |before| before.was);
        self.give(name.clone(), Target { now: file, was });
        self.undo.push(Undo::Name(name, before));
    }

    /// Adds a file without a name. Without a handle it is only known by the name that it gets.
    pub fn add(&mut self, handle: Option<Handle>, facts: Arc<Facts>) -> FileId {
        let file = self.next_id;
        self.next_id = file.next();
        if let Some(handle) = &handle {
            self.ids.insert(handle.clone(), file);
        }
        self.undo.push(Undo::New(file, handle.clone()));
        self.new.insert(file, NewFile { handle, facts });
        file
    }

    /// Newer facts of a file that this transaction adds.
    pub fn refresh(&mut self, file: FileId, facts: Facts) {
        if let Some(new) = self.new.get_mut(&file) {
            new.facts = Arc::new(facts);
        }
    }

    /// Says which inode a file is that the log knows from another disk.
    pub fn bind(&mut self, file: FileId, handle: Handle, ino: u64) {
        self.ids.insert(handle.clone(), file);
        self.undo.push(Undo::Bound(file, handle.clone()));
        self.bound.insert(file, (handle, ino));
    }

    /// Deletes a file; its names are gone already.
    pub fn delete(&mut self, file: FileId) {
        if self.deleted.insert(file) {
            self.undo.push(Undo::Deleted(file));
        }
    }

    /// True where the file was deleted by this transaction.
    pub fn is_deleted(&self, file: FileId) -> bool {
        self.deleted.contains(&file)
    }

    /// True where this transaction adds the file.
    pub fn is_new(&self, file: FileId) -> bool {
        self.new.contains_key(&file)
    }

    /// True where the file is bound to an inode by this transaction only.
    pub fn is_bound(&self, file: FileId) -> bool {
        self.bound.contains_key(&file)
    }

    /// What this transaction adds, with a name.
    pub fn added(&self) -> impl Iterator<Item = (FileId, &NewFile)> {
        let named = |file| self.gained.get(file).is_some_and(|names| !names.is_empty());
        let new = self.new.iter().filter(move |(file, _)| named(file));
        new.map(|(file, new)| (*file, new))
    }

    /// The directories whose entries change, those that stay.
    pub fn touched(&self) -> BTreeSet<FileId> {
        let parents = self.names.keys().map(|(parent, _)| *parent);
        parents
            .filter(|parent| !self.deleted.contains(parent))
            .collect()
    }

    /// Files of the catalog that are bound to an inode by this transaction.
    pub fn bound(&self) -> impl Iterator<Item = (FileId, &Handle)> {
        self.bound.iter().map(|(file, (handle, _))| (*file, handle))
    }

    /// The first directory on the way up from `dir` that does not lead to the root: itself in a
    /// cycle, or without a name. `None`: all is well.
    pub fn broken_above(&self, dir: FileId) -> Result<Option<FileId>, catalog::Error> {
        let (mut at, mut seen) = (dir, BTreeSet::new());
        while at != FileId::ROOT {
            if !seen.insert(at) {
                return Ok(Some(at));
            }
            match self.names_of(at)?.into_iter().next() {
                Some((parent, _)) => at = parent,
                None => return Ok(Some(at)),
            }
        }
        Ok(None)
    }

    /// The operations that lead from the catalog's tree to this one.
    pub fn into_ops(self) -> Vec<Op> {
        let (mut ops, mut links) = (Vec::new(), Vec::new());
        for ((parent, name), value) in &self.names {
            if value.was == value.now {
                continue;
            }
            if value.was.is_some() {
                ops.push(Op::Unlink(Unlink {
                    parent: *parent,
                    name: name.clone(),
                }));
            }
            if let Some(file) = value.now {
                links.push(Op::Link(Link {
                    parent: *parent,
                    name: name.clone(),
                    file,
                }));
            }
        }
        for (file, new) in &self.new {
            if self.gained.get(file).is_some_and(|names| !names.is_empty()) {
                ops.extend(new.facts.ops_of_new(*file, new.handle.as_ref()));
            }
        }
        for (file, (handle, ino)) in &self.bound {
            ops.push(super::facts::bind(*file, handle, *ino));
        }
        ops.append(&mut links);
        let deleted = self
            .deleted
            .iter()
            .filter(|file| !self.new.contains_key(file));
        ops.extend(deleted.map(|file| Op::Delete(Delete { file: *file })));
        ops
    }
}
