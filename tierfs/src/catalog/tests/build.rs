//! Short ways to write transactions down.

use crate::catalog::{Catalog, DataPlace, Error, Place, Refusal};
use crate::ids::{DataId, Epoch, FileId, Hash, LogId, Lsn, SegmentNo, Time};
use crate::layout::{self, Range, RootHasher};
use crate::record::{
    Bind, Bits, Content, Delete, Extent, Extents, Filesystem, Inode, Kind, Link, Op, Txn, Unlink,
    Xattrs,
};

pub(super) const LOG: LogId = LogId([7; 16]);
pub(super) const EPOCH: Epoch = Epoch(0xfeed_0000_0000_0001);

pub(super) fn id(number: u64) -> FileId {
    FileId::new(number).unwrap()
}

pub(super) fn lsn(number: u64) -> Lsn {
    Lsn::new(number).unwrap()
}

pub(super) fn segment(number: u64) -> SegmentNo {
    SegmentNo::new(number).unwrap()
}

pub(super) fn at(seconds: i64) -> Time {
    Time { seconds, nanos: 5 }
}

pub(super) fn place(number: u64) -> Place {
    Place {
        segment: SegmentNo::FIRST,
        frame_offset: 1000 + number,
    }
}

pub(super) fn range(offset: u64, len: u64) -> Range {
    Range { offset, len }
}

pub(super) fn attributes(file: u64, kind: Kind) -> Inode {
    Inode {
        file: id(file),
        kind,
        mode: 0o644,
        uid: 1000,
        gid: 100,
        mtime: at(77),
        rdev: None,
        target: (kind == Kind::Symlink).then(|| b"over/there".to_vec()),
        flags: Bits(0),
        unrestorable: Bits(0),
        ctime: Some(at(78)),
        btime: None,
    }
}

pub(super) fn inode(file: u64, kind: Kind) -> Op {
    Op::Inode(attributes(file, kind))
}

pub(super) fn root() -> Op {
    inode(1, Kind::Directory)
}

pub(super) fn link(parent: u64, name: &str, file: u64) -> Op {
    Op::Link(Link {
        parent: id(parent),
        name: name.into(),
        file: id(file),
    })
}

pub(super) fn unlink(parent: u64, name: &str) -> Op {
    Op::Unlink(Unlink {
        parent: id(parent),
        name: name.into(),
    })
}

pub(super) fn delete(file: u64) -> Op {
    Op::Delete(Delete { file: id(file) })
}

pub(super) fn bind(file: u64, handle: &[u8]) -> Op {
    Op::Bind(Bind {
        file: id(file),
        handle: handle.to_vec(),
        ino: Some(file << 60 | 9),
    })
}

pub(super) fn xattrs(file: u64, list: &[(&str, &str)], more: bool) -> Op {
    let list = list
        .iter()
        .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()));
    Op::Xattrs(Xattrs {
        file: id(file),
        list: list.collect(),
        more,
    })
}

pub(super) fn filesystem(byte: u8) -> Op {
    Op::Filesystem(Filesystem {
        uuid: [byte; 16],
        fs_type: "ext4".into(),
        mount: Some(b"/data".to_vec()),
    })
}

/// Logged content with made-up hashes that follow from `number`.
pub(super) fn data(offset: u64, len: u64, number: u64) -> Extent {
    let range = range(offset, len);
    let hash = |piece: Range| {
        Hash::of(
            &(number, piece.offset)
                .0
                .wrapping_add(piece.offset)
                .to_le_bytes(),
        )
    };
    Extent::Data {
        range,
        first: DataId {
            epoch: EPOCH,
            number,
        },
        hashes: layout::pieces(range).map(hash).collect(),
    }
}

pub(super) fn same(offset: u64, len: u64) -> Extent {
    Extent::Same(range(offset, len))
}

pub(super) fn hole(offset: u64, len: u64) -> Extent {
    Extent::Hole(range(offset, len))
}

/// The root hash over the pieces of the extents, those that are unchanged taken from `base`.
pub(super) fn root_of(list: &[Extent], base: &[Extent], size: u64) -> Hash {
    let mut root = RootHasher::default();
    for extent in list {
        match extent {
            Extent::Data { range, hashes, .. } => root.pieces(*range, hashes),
            Extent::Same(same) => {
                for extent in base {
                    let Extent::Data { range, hashes, .. } = extent else {
                        continue;
                    };
                    for (piece, hash) in layout::pieces(*range).zip(hashes) {
                        if piece.offset >= same.offset && piece.end() <= same.end() {
                            root.piece(piece, hash);
                        }
                    }
                }
            }
            Extent::Hole(_) => {}
        }
    }
    root.finish(size)
}

/// A version without unchanged ranges.
pub(super) fn version(file: u64, list: Vec<Extent>) -> [Op; 2] {
    version_on(file, list, None, &[])
}

/// A version whose unchanged ranges are those of `base_list`, the version of transaction `base`.
pub(super) fn version_on(
    file: u64,
    list: Vec<Extent>,
    base: Option<Lsn>,
    base_list: &[Extent],
) -> [Op; 2] {
    let size = list.last().map_or(0, |extent| extent.range().end());
    let root = root_of(&list, base_list, size);
    let file = id(file);
    [
        Op::Extents(Extents { file, list }),
        Op::Content(Content {
            file,
            size,
            base,
            root,
            fuzzy: false,
        }),
    ]
}

pub(super) fn txn(number: u64, ops: Vec<Op>) -> Txn {
    Txn {
        lsn: lsn(number),
        time: at(i64::try_from(number).unwrap() * 10),
        wall: at(i64::try_from(number).unwrap() * 10 + 1),
        ops,
    }
}

pub(super) fn data_place(number: u64, frame_offset: u64, raw_offset: u32, len: u32) -> DataPlace {
    DataPlace {
        id: DataId {
            epoch: EPOCH,
            number,
        },
        frame_offset,
        raw_offset,
        len,
    }
}

/// Folds one transaction after another, numbered from where the catalog is.
pub(super) fn fold(catalog: &mut Catalog, txns: Vec<Vec<Op>>) -> Result<(), Error> {
    for ops in txns {
        let number = Lsn::after(catalog.folded()).get();
        catalog.apply(&txn(number, ops), place(number))?;
    }
    Ok(())
}

pub(super) fn temporary() -> Catalog {
    Catalog::temporary(None, LOG, crate::catalog::History::Keep).unwrap()
}

/// Why the transaction was refused.
pub(super) fn refusal(result: Result<(), Error>) -> Refusal {
    match result {
        Err(Error::Refused { why, .. }) => *why,
        other => panic!("a refusal is expected, not {other:?}"),
    }
}
