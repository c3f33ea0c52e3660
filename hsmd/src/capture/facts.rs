//! What an examination finds out about an inode, and how that becomes operations of the log.

use tierfs::catalog::InodeRow;
use tierfs::record::{
    Bind, Bits, Content, Device, Extent, Extents, Inode, Kind, Op, UNRESTORABLE_FSCRYPT,
    UNRESTORABLE_UNREADABLE, UNRESTORABLE_VERITY, Xattrs,
};
use tierfs::{FileId, Hash, Lsn, Time};

use crate::sys::handle::Handle;
use crate::sys::stat::{FileKind, Stat};

/// The most bytes of names and values in one record of extended attributes.
const XATTR_RECORD_BYTES: usize = 768 * 1024;
/// The most bytes of extents in one record.
const EXTENT_RECORD_BYTES: usize = 512 * 1024;

/// Everything about an inode that the log records.
#[derive(Clone, Debug)]
pub struct Facts {
    /// As it was when the examination ended.
    pub stat: Stat,
    /// All extended attributes, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// chattr flags that are logged.
    pub flags: u32,
    /// Of a symlink.
    pub target: Option<Vec<u8>>,
    /// A new version of a regular file's content; `None` where it need not be, or could not be read.
    pub content: Option<Version>,
    /// What the change time in `stat` says about the content.
    pub certainty: Certainty,
    /// The content could not be read; why.
    pub unreadable: Option<String>,
    /// It is a stub, and not of the version that the log has: it must be made whole, and read.
    pub hollow: bool,
}

/// Whether a file that has the same change time later has the content that was looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Certainty {
    /// It has: nobody could write while it was looked at, or it has none.
    Sure,
    /// Nothing has changed since the last examination.
    Same,
    /// The change time is a new one, but the content was not read: a write may have come before it whose
    /// event has not been heard yet, and never will be if the daemon is killed now.
    Unread,
    /// Somebody had it open for writing while it was read. A write notes its time first and may put its
    /// bytes in place after our reading; so may a store through a mapping after its page fault.
    Written,
}

/// A version of a regular file's content, its data already on the way into the log.
#[derive(Clone, Debug)]
pub struct Version {
    /// Bytes.
    pub size: u64,
    /// What `Same` refers to.
    pub base: Option<Lsn>,
    /// All of `[0, size)`.
    pub extents: Vec<Extent>,
    /// Over all pieces.
    pub root: Hash,
    /// It changed while it was read.
    pub fuzzy: bool,
}

/// The log's word for a kind of file.
pub fn kind_of(kind: FileKind) -> Kind {
    match kind {
        FileKind::Regular => Kind::Regular,
        FileKind::Directory => Kind::Directory,
        FileKind::Symlink => Kind::Symlink,
        FileKind::Fifo => Kind::Fifo,
        FileKind::Socket => Kind::Socket,
        FileKind::CharDevice => Kind::CharDevice,
        FileKind::BlockDevice => Kind::BlockDevice,
    }
}

/// The log's form of a time.
pub fn time_of(time: crate::sys::stat::Time) -> Time {
    Time {
        seconds: time.0,
        nanos: time.1,
    }
}

impl Facts {
    fn unrestorable(&self) -> Bits {
        let mut bits = 0;
        for (bit, set) in [
            (UNRESTORABLE_FSCRYPT, self.stat.attributes.encrypted()),
            (UNRESTORABLE_VERITY, self.stat.attributes.verity()),
            (UNRESTORABLE_UNREADABLE, self.unreadable.is_some()),
        ] {
            bits |= if set { bit } else { 0 };
        }
        Bits(bits)
    }

    /// The attributes as a record.
    pub fn inode(&self, file: FileId) -> Inode {
        let kind = kind_of(self.stat.kind);
        let device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        Inode {
            file,
            kind,
            mode: self.stat.mode,
            uid: self.stat.uid,
            gid: self.stat.gid,
            mtime: time_of(self.stat.mtime),
            rdev: device.then_some(Device {
                major: self.stat.rdev.0,
                minor: self.stat.rdev.1,
            }),
            target: self.target.clone(),
            flags: Bits(self.flags),
            unrestorable: self.unrestorable(),
            ctime: self.settled_ctime(),
            btime: self.stat.btime.map(time_of),
        }
    }

    /// Everything about a file that the log does not know yet.
    pub fn ops_of_new(&self, file: FileId, handle: Option<&Handle>) -> Vec<Op> {
        let mut ops = vec![Op::Inode(self.inode(file))];
        ops.extend(handle.map(|handle| bind(file, handle, self.stat.ino)));
        if !self.xattrs.is_empty() {
            ops.extend(xattr_ops(file, &self.xattrs));
        }
        ops.extend(self.content.iter().flat_map(|version| version.ops(file)));
        ops
    }

    /// What has changed since `row` was logged, `xattrs` being what was logged of those.
    pub fn ops_of_known(&self, row: &InodeRow, xattrs: &[(Vec<u8>, Vec<u8>)]) -> Vec<Op> {
        let mut ops = Vec::new();
        let inode = self.inode(row.file);
        let content = self.content.as_ref().filter(|version| !version.equals(row));
        if !same_attributes(&inode, row) || content.is_some() {
            ops.push(Op::Inode(inode));
        }
        if xattrs != self.xattrs {
            ops.extend(xattr_ops(row.file, &self.xattrs));
        }
        ops.extend(
            content
                .into_iter()
                .flat_map(|version| version.ops(row.file)),
        );
        ops
    }

    /// The change time, where it is not the one that the catalog remembers.
    pub fn newer_ctime(&self, row: &InodeRow) -> Option<Time> {
        self.settled_ctime()
            .filter(|ctime| row.ctime != Some(*ctime))
    }

    /// The change time, where an equal one will say that nothing has changed. What was being written,
    /// and what could not be or was not read, is looked at again by every sweep.
    fn settled_ctime(&self) -> Option<Time> {
        let settled = self.unreadable.is_none()
            && matches!(self.certainty, Certainty::Sure | Certainty::Same);
        settled.then(|| time_of(self.stat.ctime))
    }
}

/// Which inode the file is.
pub fn bind(file: FileId, handle: &Handle, ino: u64) -> Op {
    Op::Bind(Bind {
        file,
        handle: handle.to_bytes(),
        ino: Some(ino),
    })
}

fn same_attributes(inode: &Inode, row: &InodeRow) -> bool {
    (inode.kind, inode.mode, inode.uid, inode.gid, inode.mtime)
        == (row.kind, row.mode, row.uid, row.gid, row.mtime)
        && (inode.rdev, &inode.target, inode.flags, inode.unrestorable)
            == (row.rdev, &row.target, row.flags, row.unrestorable)
}

impl Version {
    fn equals(&self, row: &InodeRow) -> bool {
        if row.content_lsn.is_none() {
            return self.size == 0;
        }
        // A whole reading replaces a fuzzy one even where the bytes are the same.
        row.root == Some(self.root) && row.size == self.size && row.fuzzy == self.fuzzy
    }

    fn ops(&self, file: FileId) -> Vec<Op> {
        let content = Content {
            file,
            size: self.size,
            base: self.base,
            root: self.root,
            fuzzy: self.fuzzy,
        };
        let mut ops = extent_ops(file, &self.extents);
        ops.push(Op::Content(content));
        ops
    }
}

fn extent_ops(file: FileId, extents: &[Extent]) -> Vec<Op> {
    let bytes = |extent: &Extent| match extent {
        Extent::Data { hashes, .. } => 64 + hashes.len() * Hash::LEN,
        _ => 32,
    };
    let lists = in_pieces(extents, EXTENT_RECORD_BYTES, bytes);
    lists
        .into_iter()
        .map(|list| {
            Op::Extents(Extents {
                file,
                list: list.to_vec(),
            })
        })
        .collect()
}

fn xattr_ops(file: FileId, xattrs: &[(Vec<u8>, Vec<u8>)]) -> Vec<Op> {
    let mut lists = in_pieces(xattrs, XATTR_RECORD_BYTES, |(name, value)| {
        name.len() + value.len() + 16
    });
    if lists.is_empty() {
        lists.push(&[]);
    }
    let last = lists.len() - 1;
    let piece = |(at, list): (usize, &[_])| {
        Op::Xattrs(Xattrs {
            file,
            list: list.to_vec(),
            more: at < last,
        })
    };
    lists.into_iter().enumerate().map(piece).collect()
}

/// Cuts a list so that no piece is larger than `max`, but for single items.
fn in_pieces<T>(list: &[T], max: usize, bytes: impl Fn(&T) -> usize) -> Vec<&[T]> {
    let (mut pieces, mut start, mut sum) = (Vec::new(), 0, 0);
    for (at, item) in list.iter().enumerate() {
        let more = bytes(item);
        if sum + more > max && at > start {
            pieces.push(&list[start..at]);
            (start, sum) = (at, 0);
        }
        sum += more;
    }
    if start < list.len() {
        pieces.push(&list[start..]);
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_cut_and_lose_nothing() {
        let list: Vec<usize> = (0..100).collect();
        let pieces = in_pieces(&list, 10, |_| 3);
        assert!(
            pieces
                .iter()
                .all(|piece| piece.len() == 3 || piece.last() == Some(&99))
        );
        assert_eq!(pieces.concat(), list);
        assert_eq!(in_pieces(&[50, 1], 10, |item| *item), [&[50][..], &[1]]);
        assert!(in_pieces(&[0_usize; 0], 10, |_| 1).is_empty());
    }
}
