//! The fold of one transaction.
//!
//! Names and extents are written as their operations come; what concerns an inode's row is gathered
//! in [`Node`]s and written once, at the end, in ascending order of file ids. So a file that is
//! created with content, attributes and names costs one insert per table, and a file that changes
//! twice in a transaction keeps only the last change. Bindings to handles take effect then too.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use rusqlite::{OptionalExtension, Row, params};

use super::State;
use super::error::{Error, Refusal};
use super::rows::{History, Place};
use super::sql::{Bits64, Int, device_bits};
use super::stmts::{Epochs, Sql, Stmts};
use crate::cbor::Enc;
use crate::ids::{FileId, Hash, Lsn};
use crate::record::{
    Bind, Content, Delete, Extent, Filesystem, Inode, Kind, Link, Op, Pin, Txn, Unlink, Volume,
    Xattrs, valid_name,
};

/// Why the fold stopped.
pub(super) enum Fault {
    Refused(Refusal),
    Sql(rusqlite::Error),
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sql(error)
    }
}

impl Fault {
    pub(super) fn into_error(self, path: &Path, lsn: Lsn, op: Option<usize>) -> Error {
        match self {
            Self::Sql(error) => Error::sqlite(path, "folding a transaction", error),
            Self::Refused(why) => Error::Refused {
                lsn,
                op,
                why: Box::new(why),
            },
        }
    }
}

/// What a transaction knows of a file that it touches.
pub(super) struct Node<'t> {
    pub(super) kind: Kind,
    /// It has a row in `inode` from an earlier transaction.
    stored: bool,
    pub(super) size: u64,
    pub(super) content_lsn: Option<Lsn>,
    /// The new version, where there is one.
    pub(super) content: Option<&'t Content>,
    attributes: Option<&'t Inode>,
    bind: Option<&'t Bind>,
    xattrs: Vec<&'t Xattrs>,
    xattrs_go_on: bool,
}

impl<'t> Node<'t> {
    fn new(inode: &'t Inode) -> Self {
        Self {
            attributes: Some(inode),
            ..Self::of(inode.kind, 0, None, false)
        }
    }

    fn of(kind: Kind, size: u64, content_lsn: Option<Lsn>, stored: bool) -> Self {
        Self {
            kind,
            stored,
            size,
            content_lsn,
            content: None,
            attributes: None,
            bind: None,
            xattrs: Vec::new(),
            xattrs_go_on: false,
        }
    }

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        let Int(size) = row.get(1)?;
        Ok(Self::of(row.get(0)?, size, row.get(2)?, true))
    }
}

/// The fold of one transaction.
pub(super) struct Fold<'f, 'c, 't> {
    pub(super) stmts: &'f mut Stmts<'c>,
    pub(super) state: &'f mut State,
    pub(super) epochs: &'f mut Epochs,
    txn: &'t Txn,
    /// Files touched; `None` for those that the transaction deleted.
    nodes: BTreeMap<FileId, Option<Node<'t>>>,
    /// Extents whose `Content` has not come yet.
    pub(super) pending: HashMap<FileId, Vec<&'t [Extent]>>,
    linked_dirs: Vec<FileId>,
    pub(super) scratch: Vec<u8>,
}

impl<'f, 'c, 't> Fold<'f, 'c, 't> {
    pub(super) fn new(
        stmts: &'f mut Stmts<'c>,
        state: &'f mut State,
        epochs: &'f mut Epochs,
        txn: &'t Txn,
    ) -> Self {
        Self {
            stmts,
            state,
            epochs,
            txn,
            nodes: BTreeMap::new(),
            pending: HashMap::new(),
            linked_dirs: Vec::new(),
            scratch: Vec::new(),
        }
    }

    pub(super) fn lsn(&self) -> Lsn {
        self.txn.lsn
    }

    pub(super) fn keeps_history(&self) -> bool {
        self.state.history == History::Keep
    }

    /// Applies everything; on failure says at which operation.
    pub(super) fn run(mut self, place: Place) -> Result<(), (Option<usize>, Fault)> {
        let txn = self.txn;
        self.check_order().map_err(|fault| (None, fault.into()))?;
        for (index, op) in txn.ops.iter().enumerate() {
            self.op(index, op).map_err(|fault| (Some(index), fault))?;
        }
        self.finish(place).map_err(|fault| (None, fault))
    }

    fn check_order(&self) -> Result<(), Refusal> {
        let expected = Lsn::after(self.state.folded);
        if self.txn.lsn != expected {
            return Err(Refusal::NotDense { expected });
        }
        match self.state.time {
            Some(last) if self.txn.time < last => Err(Refusal::TimeBack {
                last,
                found: self.txn.time,
            }),
            _ => Ok(()),
        }
    }

    fn op(&mut self, index: usize, op: &'t Op) -> Result<(), Fault> {
        match op {
            Op::Filesystem(filesystem) => self.filesystem(index, filesystem),
            Op::Inode(inode) => self.inode(inode),
            Op::Bind(bind) => {
                self.node(bind.file)?.bind = Some(bind);
                Ok(())
            }
            Op::Xattrs(xattrs) => self.xattrs(xattrs),
            Op::Extents(extents) => {
                let list = self.pending.entry(extents.file).or_default();
                list.push(&extents.list);
                Ok(())
            }
            Op::Content(content) => self.content(content),
            Op::Link(link) => self.link(link),
            Op::Unlink(unlink) => self.unlink(unlink),
            Op::Delete(delete) => self.delete(delete),
            Op::Volume(volume) => self.volume(volume),
            Op::Pin(pin) => self.pin(pin),
        }
    }

    /// The file, which must exist.
    pub(super) fn node(&mut self, file: FileId) -> Result<&mut Node<'t>, Fault> {
        let slot = match self.nodes.entry(file) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if file >= self.state.next_file => {
                return Err(Refusal::NoSuchFile(file).into());
            }
            Entry::Vacant(entry) => {
                let row = self.stmts.get(Sql::GetNode)?;
                let node = row.query_row([file], Node::read).optional()?;
                entry.insert(Some(node.ok_or(Refusal::NoSuchFile(file))?))
            }
        };
        slot.as_mut()
            .ok_or_else(|| Refusal::NoSuchFile(file).into())
    }

    fn filesystem(&mut self, index: usize, filesystem: &Filesystem) -> Result<(), Fault> {
        let known = self.stmts.get(Sql::AnyFilesystem)?.exists([])?;
        if known {
            self.stmts.run(Sql::UnbindAll, [])?;
            self.stmts.run(Sql::ForgetAllSeen, [])?;
            for node in self.nodes.values_mut().flatten() {
                node.bind = None;
            }
        }
        if !self.keeps_history() {
            self.stmts.run(Sql::DropFilesystems, [])?;
        }
        self.stmts.run(
            Sql::InsertFilesystem,
            params![
                self.txn.lsn,
                Int(index as u64),
                filesystem.uuid,
                filesystem.fs_type,
                filesystem.mount
            ],
        )?;
        Ok(())
    }

    fn volume(&mut self, volume: &Volume) -> Result<(), Fault> {
        if !self.keeps_history() {
            self.stmts.run(Sql::DropVolumes, [&volume.serial])?;
        }
        let Volume {
            serial,
            pool,
            backend,
            state,
            place,
        } = volume;
        let row = params![serial, self.txn.lsn, pool, backend, state, place];
        self.stmts.run(Sql::InsertVolume, row)?;
        Ok(())
    }

    fn pin(&mut self, pin: &Pin) -> Result<(), Fault> {
        let file = pin.file;
        if self.node(file)?.kind != Kind::Regular {
            return Err(Refusal::NotRegular(file).into());
        }
        if pin.pinned {
            self.stmts.run(Sql::InsertPin, (file, self.txn.lsn))?;
            return Ok(());
        }
        self.unpin(file)
    }

    fn unpin(&mut self, file: FileId) -> Result<(), Fault> {
        if self.keeps_history() {
            self.stmts.run(Sql::KeepPin, (file, self.txn.lsn))?;
        }
        self.stmts.run(Sql::DeletePin, [file])?;
        Ok(())
    }

    fn inode(&mut self, inode: &'t Inode) -> Result<(), Fault> {
        let file = inode.file;
        check_inode(inode)?;
        match self.node(file) {
            Ok(node) if node.kind == inode.kind => {
                node.attributes = Some(inode);
                Ok(())
            }
            Ok(node) => Err(Refusal::KindChanged {
                file,
                was: node.kind,
                becomes: inode.kind,
            }
            .into()),
            Err(Fault::Refused(_)) => self.create(inode),
            Err(fault) => Err(fault),
        }
    }

    fn create(&mut self, inode: &'t Inode) -> Result<(), Fault> {
        let file = inode.file;
        if file >= self.state.next_file {
            self.state.next_file = file.next();
        } else if self.nodes.contains_key(&file) || self.stmts.get(Sql::IsGone)?.exists([file])? {
            return Err(Refusal::Reused(file).into());
        }
        self.state.counts.files = self.state.counts.files.wrapping_add(1);
        self.nodes.insert(file, Some(Node::new(inode)));
        Ok(())
    }

    fn xattrs(&mut self, xattrs: &'t Xattrs) -> Result<(), Fault> {
        let file = xattrs.file;
        let node = self.node(file)?;
        if !node.xattrs_go_on {
            node.xattrs.clear();
        }
        let before = node.xattrs.iter().rev().find_map(|piece| piece.list.last());
        let names = before.into_iter().chain(&xattrs.list).map(|(name, _)| name);
        let what = if !names.clone().is_sorted_by(|a, b| a < b) {
            "their names are not sorted"
        } else if names.clone().any(|name| !valid_xattr_name(name)) {
            "a name is none that a file may have"
        } else {
            node.xattrs.push(xattrs);
            node.xattrs_go_on = xattrs.more;
            return Ok(());
        };
        Err(Refusal::BadXattrs { file, what }.into())
    }

    fn link(&mut self, link: &Link) -> Result<(), Fault> {
        let Link { parent, name, file } = link;
        if *file == FileId::ROOT {
            return Err(Refusal::Root.into());
        }
        if !valid_name(name) {
            return Err(Refusal::BadName { name: name.clone() }.into());
        }
        if self.node(*parent)?.kind != Kind::Directory {
            return Err(Refusal::NotADirectory(*parent).into());
        }
        if self.node(*file)?.kind == Kind::Directory {
            self.linked_dirs.push(*file);
        }
        let row = params![parent, name, file, self.txn.lsn];
        if self.stmts.run(Sql::InsertDentry, row)? == 0 {
            let (parent, name) = (*parent, name.clone());
            return Err(Refusal::NameTaken { parent, name }.into());
        }
        self.state.counts.dentries = self.state.counts.dentries.wrapping_add(1);
        Ok(())
    }

    fn unlink(&mut self, unlink: &Unlink) -> Result<(), Fault> {
        let Unlink { parent, name } = unlink;
        if self.keeps_history() {
            let key = params![parent, name, self.txn.lsn];
            self.stmts.run(Sql::KeepDentry, key)?;
        }
        if self.stmts.run(Sql::DeleteDentry, params![parent, name])? == 0 {
            let (parent, name) = (*parent, name.clone());
            return Err(Refusal::NoSuchName { parent, name }.into());
        }
        self.state.counts.dentries = self.state.counts.dentries.wrapping_sub(1);
        Ok(())
    }

    fn delete(&mut self, delete: &Delete) -> Result<(), Fault> {
        let file = delete.file;
        if file == FileId::ROOT {
            return Err(Refusal::Root.into());
        }
        let node = self.node(file)?;
        let (stored, size, kind) = (node.stored, node.size, node.kind);
        if self.stmts.get(Sql::ParentsOf)?.exists([file])? {
            return Err(Refusal::DeleteNamed(file).into());
        }
        if kind == Kind::Directory && self.stmts.get(Sql::HasEntry)?.exists([file])? {
            return Err(Refusal::DeleteNotEmpty(file).into());
        }
        if kind == Kind::Regular {
            self.close_extents(file, 0, i64::MAX.unsigned_abs())?;
            self.unpin(file)?;
        }
        if stored {
            if self.keeps_history() {
                self.stmts.run(Sql::KeepInode, (file, self.txn.lsn))?;
            }
            self.stmts.run(Sql::DeleteInode, [file])?;
            self.stmts.run(Sql::ForgetSeen, [file])?;
            self.close_xattrs(file)?;
        }
        self.stmts.run(Sql::InsertGone, (file, self.txn.lsn))?;
        self.nodes.insert(file, None);
        let counts = &mut self.state.counts;
        counts.files = counts.files.wrapping_sub(1);
        counts.bytes = counts.bytes.wrapping_sub(size);
        Ok(())
    }

    fn close_xattrs(&mut self, file: FileId) -> Result<(), Fault> {
        if self.keeps_history() {
            self.stmts.run(Sql::KeepXattrs, (file, self.txn.lsn))?;
        }
        self.stmts.run(Sql::DeleteXattrs, [file])?;
        Ok(())
    }

    /// Checks what only the whole transaction shows, and writes what was gathered.
    fn finish(&mut self, place: Place) -> Result<(), Fault> {
        if let Some(&file) = self.pending.keys().min() {
            return Err(Refusal::ExtentsWithoutContent(file).into());
        }
        self.check_directories()?;
        for (file, node) in std::mem::take(&mut self.nodes) {
            if let Some(node) = node {
                self.write(file, &node)?;
            }
        }
        let Txn {
            lsn,
            time,
            wall,
            ops,
        } = self.txn;
        if self.keeps_history() {
            let (segment, offset) = (place.segment, Int(place.frame_offset));
            let ops = Int(ops.len() as u64);
            self.stmts.run(
                Sql::InsertTxn,
                params![
                    lsn,
                    time.seconds,
                    time.nanos,
                    wall.seconds,
                    wall.nanos,
                    segment,
                    offset,
                    ops
                ],
            )?;
        }
        self.state.folded = Some(*lsn);
        self.state.time = Some(*time);
        Ok(())
    }

    /// Each directory that got a name has that one only, and does not lie within itself.
    fn check_directories(&mut self) -> Result<(), Fault> {
        let mut sound = HashSet::new();
        for dir in std::mem::take(&mut self.linked_dirs) {
            let mut way = HashSet::new();
            let mut at = Some(dir);
            while let Some(here) = at.filter(|here| !sound.contains(here)) {
                if !way.insert(here) {
                    return Err(Refusal::Cycle(here).into());
                }
                at = self.parent_of(here)?;
            }
            sound.extend(way);
        }
        Ok(())
    }

    fn parent_of(&mut self, dir: FileId) -> Result<Option<FileId>, Fault> {
        let mut rows = self.stmts.get(Sql::ParentsOf)?.query([dir])?;
        let parent = rows.next()?.map(|row| row.get(0)).transpose()?;
        if parent.is_some() && rows.next()?.is_some() {
            return Err(Refusal::DirectoryNamedTwice(dir).into());
        }
        Ok(parent)
    }

    fn write(&mut self, file: FileId, node: &Node<'t>) -> Result<(), Fault> {
        if node.xattrs_go_on {
            let what = "the last part of the set is missing";
            return Err(Refusal::BadXattrs { file, what }.into());
        }
        match node.attributes {
            Some(inode) if !node.stored => self.insert(inode, node)?,
            attributes => self.update(file, attributes, node)?,
        }
        if !node.xattrs.is_empty() {
            if node.stored {
                self.close_xattrs(file)?;
            }
            self.insert_xattrs(file, &node.xattrs)?;
        }
        Ok(())
    }

    fn insert(&mut self, inode: &Inode, node: &Node<'t>) -> Result<(), Fault> {
        let content = node.content;
        let handle = node.bind.map(|bind| &bind.handle[..]);
        let (ctime, btime) = (inode.ctime, inode.btime);
        let row = params![
            inode.file,
            self.txn.lsn,
            inode.kind,
            inode.mode,
            inode.uid,
            inode.gid,
            Int(node.size),
            inode.mtime.seconds,
            inode.mtime.nanos,
            ctime.map(|time| time.seconds),
            ctime.map(|time| time.nanos),
            btime.map(|time| time.seconds),
            btime.map(|time| time.nanos),
            inode.rdev.map(device_bits),
            inode.target,
            inode.flags.0,
            inode.unrestorable.0,
            node.content_lsn,
            content.map(|content| content.root),
            content.is_some_and(|content| content.fuzzy),
            handle,
            node.bind.and_then(|bind| bind.ino).map(Bits64),
        ];
        self.write_binding(Sql::InsertInode, row, handle)
    }

    fn update(
        &mut self,
        file: FileId,
        attributes: Option<&Inode>,
        node: &Node<'t>,
    ) -> Result<(), Fault> {
        let lsn = self.txn.lsn;
        if attributes.is_some() || node.content.is_some() {
            if self.keeps_history() {
                self.stmts.run(Sql::KeepInode, (file, lsn))?;
            }
            self.stmts.run(Sql::ForgetSeen, [file])?;
        }
        if let Some(inode) = attributes {
            self.set_attributes(inode)?;
        }
        if let Some(content) = node.content {
            let Content { root, fuzzy, .. } = content;
            let row = params![file, lsn, Int(node.size), node.content_lsn, root, fuzzy];
            self.stmts.run(Sql::SetContent, row)?;
        }
        if let Some(bind) = node.bind {
            let row = params![file, bind.handle, bind.ino.map(Bits64)];
            self.write_binding(Sql::SetBinding, row, Some(&bind.handle))?;
        }
        Ok(())
    }

    fn set_attributes(&mut self, inode: &Inode) -> Result<(), Fault> {
        let (ctime, btime) = (inode.ctime, inode.btime);
        let row = params![
            inode.file,
            self.txn.lsn,
            inode.mode,
            inode.uid,
            inode.gid,
            inode.mtime.seconds,
            inode.mtime.nanos,
            ctime.map(|time| time.seconds),
            ctime.map(|time| time.nanos),
            btime.map(|time| time.seconds),
            btime.map(|time| time.nanos),
            inode.rdev.map(device_bits),
            inode.target,
            inode.flags.0,
            inode.unrestorable.0,
        ];
        self.stmts.run(Sql::SetAttributes, row)?;
        Ok(())
    }

    /// Runs a statement that sets a handle. One handle names one file: the last binding takes it.
    fn write_binding(
        &mut self,
        sql: Sql,
        row: &[&dyn rusqlite::ToSql],
        handle: Option<&[u8]>,
    ) -> Result<(), Fault> {
        let done = self.stmts.run(sql, row);
        let taken = matches!(&done, Err(error) if error.sqlite_error_code()
            == Some(rusqlite::ErrorCode::ConstraintViolation));
        match handle {
            Some(handle) if taken => {
                self.stmts.run(Sql::Unbind, [handle])?;
                self.stmts.run(sql, row)?;
            }
            _ => drop(done?),
        }
        Ok(())
    }

    fn insert_xattrs(&mut self, file: FileId, pieces: &[&Xattrs]) -> Result<(), Fault> {
        let entries = || pieces.iter().flat_map(|piece| &piece.list);
        let count = entries().count();
        if count == 0 {
            return Ok(());
        }
        self.scratch.clear();
        let mut enc = Enc::new(&mut self.scratch);
        crate::cbor::infallible(enc.array(count as u64));
        for (name, value) in entries() {
            crate::cbor::infallible(enc.array(2).and_then(|enc| enc.bytes(name)?.bytes(value)));
        }
        let row = params![file, self.txn.lsn, self.scratch];
        self.stmts.run(Sql::InsertXattrs, row)?;
        Ok(())
    }

    pub(super) fn refuse_root(file: FileId, expected: Hash, found: Hash) -> Result<(), Refusal> {
        if expected == found {
            Ok(())
        } else {
            Err(Refusal::RootHash {
                file,
                expected,
                found,
            })
        }
    }
}

/// What replay could not create, or what SQLite could not hold.
fn check_inode(inode: &Inode) -> Result<(), Refusal> {
    let device = matches!(inode.kind, Kind::CharDevice | Kind::BlockDevice);
    let file = inode.file;
    let nanos = [Some(inode.mtime), inode.ctime, inode.btime];
    let what = if file.get() >= i64::MAX.unsigned_abs() {
        let value = file.get();
        let what = "a file id";
        return Err(Refusal::TooLarge { what, value });
    } else if file == FileId::ROOT && inode.kind != Kind::Directory {
        "the root is no directory"
    } else if inode.mode > 0o7777 {
        "its mode has more than the permission bits"
    } else if inode.rdev.is_some() != device {
        "devices, and only they, have a device number"
    } else if inode.target.is_some() != (inode.kind == Kind::Symlink) {
        "symbolic links, and only they, have a target"
    } else if inode.target.as_deref().is_some_and(invalid_target) {
        "the target is empty, too long or holds a NUL"
    } else if nanos.iter().flatten().any(|time| time.nanos > 999_999_999) {
        "a time has more nanoseconds than a second"
    } else {
        return Ok(());
    };
    Err(Refusal::BadInode { file, what })
}

fn invalid_target(target: &[u8]) -> bool {
    target.is_empty() || target.len() > 4096 || target.contains(&0)
}

fn valid_xattr_name(name: &[u8]) -> bool {
    (1..=255).contains(&name.len()) && !name.contains(&0) && name != b"trusted.hsm"
}
