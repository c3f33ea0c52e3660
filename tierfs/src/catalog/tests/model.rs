//! A catalog as simple as can be: maps in memory, a whole copy kept for each LSN. It takes valid
//! transactions only.

use std::collections::{BTreeMap, BTreeSet};

use super::build::id;
use crate::catalog::{Catalog, XattrList};
use crate::ids::{DataId, FileId, Hash, Lsn, Time};
use crate::layout::{self, Range};
use crate::record::{Extent, Inode, Op, Txn};

/// A piece of a version: where, its hash, and where its bytes are logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) range: Range,
    pub(super) hash: Hash,
    pub(super) data: DataId,
    pub(super) data_offset: u64,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct File {
    pub(super) inode: Inode,
    pub(super) lsn: Lsn,
    pub(super) xattrs: XattrList,
    pub(super) size: u64,
    pub(super) content_lsn: Option<Lsn>,
    pub(super) root: Option<Hash>,
    pub(super) fuzzy: bool,
    pub(super) pieces: Vec<Piece>,
    pub(super) handle: Option<Vec<u8>>,
}

#[derive(Clone, Default, Debug)]
pub(super) struct Tree {
    pub(super) files: BTreeMap<FileId, File>,
    pub(super) dentries: BTreeMap<(FileId, Vec<u8>), FileId>,
    pub(super) uuid: Option<[u8; 16]>,
    pub(super) pins: BTreeSet<FileId>,
}

impl Tree {
    fn unbind(&mut self, handle: &[u8]) {
        let bound = |file: &&mut File| file.handle.as_deref() == Some(handle);
        let bound = self.files.values_mut().filter(bound);
        bound.for_each(|file| file.handle = None);
    }
}

#[derive(Default)]
pub(super) struct Model {
    pub(super) now: Tree,
    /// The tree after each transaction, its time, its LSN being the index + 1.
    pub(super) past: Vec<(Time, Tree)>,
    pub(super) ever: BTreeSet<FileId>,
}

impl Model {
    pub(super) fn apply(&mut self, txn: &Txn) {
        let mut lists: BTreeMap<FileId, Vec<Extent>> = BTreeMap::new();
        let mut xattrs: BTreeMap<FileId, XattrList> = BTreeMap::new();
        let mut handles: BTreeMap<FileId, Vec<u8>> = BTreeMap::new();
        for op in &txn.ops {
            match op {
                Op::Extents(extents) => lists
                    .entry(extents.file)
                    .or_default()
                    .extend(extents.list.clone()),
                Op::Xattrs(part) => {
                    let list = xattrs.entry(part.file).or_default();
                    list.extend(part.list.clone());
                    if !part.more {
                        let list = xattrs.remove(&part.file).unwrap();
                        self.now.files.get_mut(&part.file).unwrap().xattrs = list;
                    }
                }
                Op::Content(content) => {
                    let list = lists.remove(&content.file).unwrap_or_default();
                    let file = self.now.files.get_mut(&content.file).unwrap();
                    file.pieces = list
                        .iter()
                        .flat_map(|extent| pieces_of(extent, &file.pieces))
                        .collect();
                    file.size = content.size;
                    file.root = Some(content.root);
                    file.fuzzy = content.fuzzy;
                    (file.lsn, file.content_lsn) = (txn.lsn, Some(txn.lsn));
                }
                op => self.apply_small(op, txn.lsn, &mut handles),
            }
        }
        for (file, handle) in handles {
            self.now.unbind(&handle);
            self.now.files.get_mut(&file).unwrap().handle = Some(handle);
        }
        self.past.push((txn.time, self.now.clone()));
    }

    fn apply_small(&mut self, op: &Op, lsn: Lsn, handles: &mut BTreeMap<FileId, Vec<u8>>) {
        let tree = &mut self.now;
        match op {
            Op::Filesystem(filesystem) => {
                if tree.uuid.is_some() {
                    tree.files.values_mut().for_each(|file| file.handle = None);
                    handles.clear();
                }
                tree.uuid = Some(filesystem.uuid);
            }
            Op::Inode(inode) => {
                self.ever.insert(inode.file);
                let file = tree.files.entry(inode.file);
                let file = file.or_insert_with(|| empty(inode.clone(), lsn));
                (file.inode, file.lsn) = (inode.clone(), lsn);
            }
            Op::Bind(bind) => {
                handles.insert(bind.file, bind.handle.clone());
            }
            Op::Link(link) => {
                let key = (link.parent, link.name.clone());
                tree.dentries.insert(key, link.file);
            }
            Op::Unlink(unlink) => {
                tree.dentries.remove(&(unlink.parent, unlink.name.clone()));
            }
            Op::Delete(delete) => {
                tree.files.remove(&delete.file);
                tree.pins.remove(&delete.file);
                handles.remove(&delete.file);
            }
            Op::Pin(pin) if pin.pinned => {
                tree.pins.insert(pin.file);
            }
            Op::Pin(pin) => {
                tree.pins.remove(&pin.file);
            }
            op => assert!(matches!(op, Op::Volume(_)), "{op:?}"),
        }
    }
}

fn empty(inode: Inode, lsn: Lsn) -> File {
    File {
        inode,
        lsn,
        xattrs: Vec::new(),
        size: 0,
        content_lsn: None,
        root: None,
        fuzzy: false,
        pieces: Vec::new(),
        handle: None,
    }
}

fn pieces_of(extent: &Extent, base: &[Piece]) -> Vec<Piece> {
    match extent {
        Extent::Hole(_) => Vec::new(),
        Extent::Same(range) => base
            .iter()
            .filter(|piece| piece.range.offset >= range.offset && piece.range.end() <= range.end())
            .copied()
            .collect(),
        Extent::Data {
            range,
            first,
            hashes,
        } => {
            let mut hashes = hashes.iter();
            let chunks = layout::chunks(*range).zip(first.number..);
            chunks
                .flat_map(|(chunk, number)| {
                    layout::pieces(chunk).map(move |range| (chunk.offset, number, range))
                })
                .map(|(chunk, number, range)| Piece {
                    range,
                    hash: *hashes.next().unwrap(),
                    data: DataId {
                        epoch: first.epoch,
                        number,
                    },
                    data_offset: range.offset - chunk,
                })
                .collect()
        }
    }
}

/// The catalog's extents as pieces.
fn expand(rows: &[crate::catalog::ExtentRow]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for row in rows {
        assert_eq!(row.hashes.len() as u64, layout::piece_count(row.range));
        for (range, hash) in layout::pieces(row.range).zip(&row.hashes) {
            pieces.push(Piece {
                range,
                hash: *hash,
                data: row.data,
                data_offset: row.data_offset + range.offset - row.range.offset,
            });
        }
    }
    pieces
}

/// Every answer as of every LSN is the model's.
pub(super) fn compare_past(catalog: &Catalog, model: &Model) {
    for (index, (time, tree)) in model.past.iter().enumerate() {
        let lsn = Lsn::new(index as u64 + 1).unwrap();
        let then = catalog.queries().at(lsn).unwrap();
        let last = model.past.iter().rposition(|(other, _)| other <= time);
        let found = catalog.queries().lsn_at_time(*time).unwrap();
        assert_eq!(found.map(Lsn::get), last.map(|last| last as u64 + 1));
        for &file in &model.ever {
            let expected = tree.files.get(&file);
            let row = then.inode(file).unwrap();
            assert_eq!(
                then.is_pinned(file).unwrap(),
                tree.pins.contains(&file),
                "{file} at {lsn}"
            );
            assert_eq!(row.is_some(), expected.is_some(), "file {file} at {lsn}");
            let (Some(row), Some(expected)) = (row, expected) else {
                assert_eq!(then.extents(file, 0, 1).unwrap(), []);
                assert_eq!(then.xattrs(file).unwrap(), []);
                continue;
            };
            compare_inode(&row, expected);
            assert_eq!(row.ctime, expected.inode.ctime);
            assert_eq!(
                then.xattrs(file).unwrap(),
                expected.xattrs,
                "{file} at {lsn}"
            );
            let rows = then.extents(file, 0, 100_000).unwrap();
            assert_eq!(expand(&rows), expected.pieces, "file {file} at {lsn}");
            let pieces = then.pieces(file, 0).map(Result::unwrap);
            let expected = expected
                .pieces
                .iter()
                .map(|piece| (piece.range, piece.hash));
            assert!(pieces.eq(expected));
        }
        for &dir in &model.ever {
            let range = (dir, Vec::new())..(dir.next(), Vec::new());
            let expected = tree.dentries.range(range);
            let expected = expected.map(|((_, name), file)| (name.clone(), *file));
            let found = then.children(dir, None, 100_000).unwrap();
            assert!(
                found.iter().cloned().eq(expected),
                "{dir} at {lsn}: {found:?}"
            );
        }
        for ((parent, name), file) in &tree.dentries {
            assert_eq!(then.lookup(*parent, name).unwrap(), Some(*file));
            if let Some(path) = then.path_of(*file).unwrap() {
                assert_eq!(then.resolve(&path).unwrap(), Some(*file));
            }
        }
    }
}

fn compare_inode(row: &crate::catalog::InodeRow, expected: &File) {
    let inode = &expected.inode;
    assert_eq!(row.lsn, expected.lsn, "{}", row.file);
    assert_eq!(row.kind, inode.kind);
    assert_eq!(
        (row.mode, row.uid, row.gid),
        (inode.mode, inode.uid, inode.gid)
    );
    assert_eq!((row.mtime, row.btime), (inode.mtime, inode.btime));
    assert_eq!((row.rdev, &row.target), (inode.rdev, &inode.target));
    assert_eq!(
        (row.flags, row.unrestorable),
        (inode.flags, inode.unrestorable)
    );
    assert_eq!(
        (row.size, row.content_lsn),
        (expected.size, expected.content_lsn)
    );
    assert_eq!((row.root, row.fuzzy), (expected.root, expected.fuzzy));
}

/// Every answer about now is the model's.
pub(super) fn compare_now(catalog: &Catalog, model: &Model) {
    let (queries, tree) = (catalog.queries(), &model.now);
    for &file in &model.ever {
        let row = queries.inode(file).unwrap();
        assert_eq!(queries.is_pinned(file).unwrap(), tree.pins.contains(&file));
        let expected = tree.files.get(&file);
        assert_eq!(row.is_some(), expected.is_some());
        let (Some(row), Some(expected)) = (row, expected) else {
            continue;
        };
        compare_inode(&row, expected);
        assert_eq!(row.handle, expected.handle);
        if let Some(handle) = &row.handle {
            assert_eq!(queries.file_by_handle(handle).unwrap(), Some(file));
        }
        assert_eq!(queries.xattrs(file).unwrap(), expected.xattrs);
        let rows = queries.extents(file, 0, 100_000).unwrap();
        assert_eq!(expand(&rows), expected.pieces, "file {file}");
        let pieces = queries.pieces(file, 0).map(Result::unwrap);
        let hashes = expected
            .pieces
            .iter()
            .map(|piece| (piece.range, piece.hash));
        assert!(pieces.eq(hashes));
        let names = queries.names_of(file).unwrap();
        let named = tree.dentries.iter().filter(|(_, named)| **named == file);
        assert!(names.iter().eq(named.map(|(key, _)| key)));
    }
    for ((parent, name), file) in &tree.dentries {
        assert_eq!(queries.lookup(*parent, name).unwrap(), Some(*file));
        let children = queries.children(*parent, None, 100_000).unwrap();
        let child = children.iter().find(|child| child.name == *name).unwrap();
        let expected = &tree.files[file];
        assert_eq!((child.file, child.kind), (*file, expected.inode.kind));
        assert_eq!(
            (child.size, child.ctime),
            (expected.size, expected.inode.ctime)
        );
    }
    let counts = catalog.counts();
    assert_eq!(counts.files, tree.files.len() as u64);
    assert_eq!(counts.dentries, tree.dentries.len() as u64);
    assert_eq!(
        counts.bytes,
        tree.files.values().map(|file| file.size).sum::<u64>()
    );
    let named: BTreeSet<_> = tree.dentries.values().collect();
    let orphans = tree
        .files
        .keys()
        .filter(|file| !named.contains(file) && **file != id(1));
    assert!(queries.orphans().unwrap().iter().eq(orphans));
}
