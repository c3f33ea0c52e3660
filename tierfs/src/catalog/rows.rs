//! What queries give and what the fold takes beside transactions: plain rows.

use crate::ids::{DataId, Epoch, FileId, Hash, Lsn, SegmentNo, Time};
use crate::layout::{self, Range};
use crate::record::{Bits, Device, Kind};

/// Whether superseded rows are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum History {
    /// Every earlier LSN can be asked for.
    Keep,
    /// Only the current state: what replay needs of a fold that it stopped at its target.
    Drop,
}

/// Where a transaction's commit lies in the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The segment.
    pub segment: SegmentNo,
    /// Offset of the frame in the segment's plain file, bytes.
    pub frame_offset: u64,
}

/// Where a data record lies, as a segment's index or a frame's scan gives it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DataPlace {
    /// Its name.
    pub id: DataId,
    /// Offset of the frame in the segment's plain file, bytes.
    pub frame_offset: u64,
    /// Offset of the content in the decompressed frame, bytes.
    pub raw_offset: u32,
    /// Bytes of content.
    pub len: u32,
}

/// Where a data id's content is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DataLocation {
    /// The segment.
    pub segment: SegmentNo,
    /// Offset of the frame in the segment's plain file, bytes.
    pub frame_offset: u64,
    /// Offset of the content in the decompressed frame, bytes.
    pub raw_offset: u32,
    /// Bytes of content.
    pub len: u32,
}

/// A sealed segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentRow {
    /// Its number.
    pub segment: SegmentNo,
    /// BLAKE3 of its plain file.
    pub hash: Hash,
    /// Size of its plain file.
    pub bytes: u64,
    /// Its writer.
    pub epoch: Epoch,
    /// The LSN of the first commit in it, had it one.
    pub first_lsn: Lsn,
    /// The LSN of the last commit in it; `None` where it holds only data.
    pub last_lsn: Option<Lsn>,
    /// When it was sealed (not part of the digest).
    pub sealed: Time,
}

/// A file's attributes, as of one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InodeRow {
    /// Which file.
    pub file: FileId,
    /// The transaction that last changed attributes or content.
    pub lsn: Lsn,
    /// What it is.
    pub kind: Kind,
    /// mode & 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of content; 0 for everything but regular files.
    pub size: u64,
    /// Modification time.
    pub mtime: Time,
    /// Change time as it was logged, or as a sweep saw it since then (see
    /// [`super::Catalog::set_seen`]); never the latter in queries as of an LSN.
    pub ctime: Option<Time>,
    /// Birth time.
    pub btime: Option<Time>,
    /// Of a device.
    pub rdev: Option<Device>,
    /// Of a symlink.
    pub target: Option<Vec<u8>>,
    /// chattr flags.
    pub flags: Bits,
    /// `UNRESTORABLE_*`.
    pub unrestorable: Bits,
    /// The transaction that gave the content; `None` while a regular file has none (it is empty).
    pub content_lsn: Option<Lsn>,
    /// The content's root hash.
    pub root: Option<Hash>,
    /// The content was read while it changed.
    pub fuzzy: bool,
    /// What [`crate::record::Bind`] said last; `None` in queries as of an LSN.
    pub handle: Option<Vec<u8>>,
    /// What [`crate::record::Bind`] said last; `None` in queries as of an LSN.
    pub ino: Option<u64>,
}

/// An entry of a directory with what a sweep compares.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Child {
    /// The entry's name.
    pub name: Vec<u8>,
    /// What it names.
    pub file: FileId,
    /// What that is.
    pub kind: Kind,
    /// Its inode number, where it is bound.
    pub ino: Option<u64>,
    /// As in [`InodeRow::ctime`].
    pub ctime: Option<Time>,
    /// Bytes of content.
    pub size: u64,
}

/// A stretch of one data record that is part of a version. What no extent covers is a hole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExtentRow {
    /// Where in the file.
    pub range: Range,
    /// The data record.
    pub data: DataId,
    /// Where in the data record's content it begins.
    pub data_offset: u64,
    /// BLAKE3 of each of its pieces ([`crate::layout::pieces`] of `range`).
    pub hashes: Vec<Hash>,
}

impl ExtentRow {
    /// Its bytes within the content of its data record; `None` where that is too short.
    pub fn slice_of<'r>(&self, content: &'r [u8]) -> Option<&'r [u8]> {
        let start = usize::try_from(self.data_offset).ok()?;
        let len = usize::try_from(self.range.len).ok()?;
        content.get(start..)?.get(..len)
    }

    /// Compares the hash of each piece with its bytes. Says what is wrong with them.
    pub fn check(&self, mut bytes: &[u8]) -> Result<(), String> {
        let mut hashes = self.hashes.iter();
        for piece in layout::pieces(self.range) {
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
            let (head, rest) = bytes.split_at_checked(len).ok_or("it is too short")?;
            if hashes.next() != Some(&Hash::of(head)) {
                return Err(format!(
                    "the bytes for offset {} do not have the hash that was logged",
                    piece.offset
                ));
            }
            bytes = rest;
        }
        Ok(())
    }
}

/// A transaction as the catalog remembers it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TxnRow {
    /// Its number.
    pub lsn: Lsn,
    /// Its time.
    pub time: Time,
    /// The wall clock beside it.
    pub wall: Time,
    /// Where its commit lies.
    pub place: Place,
    /// How many operations it has.
    pub ops: u64,
}

/// How much there is, now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Files of every kind, those without a name too.
    pub files: u64,
    /// The sum of their sizes.
    pub bytes: u64,
    /// Directory entries.
    pub dentries: u64,
    /// Versions of content that were ever committed.
    pub versions: u64,
}

/// What a transaction changed of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[allow(clippy::struct_excessive_bools)] // a set: any of them may be true
pub struct Changes {
    /// The file appeared.
    pub created: bool,
    /// A new version of the content.
    pub content: bool,
    /// Attributes (mode, owner, times and so on) or their being logged again.
    pub attributes: bool,
    /// The extended attributes.
    pub xattrs: bool,
    /// A name appeared or disappeared.
    pub names: bool,
    /// The file was deleted.
    pub deleted: bool,
}

/// One step of a file's life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VersionRow {
    /// The transaction.
    pub lsn: Lsn,
    /// Its time.
    pub time: Time,
    /// What it changed.
    pub changes: Changes,
    /// The size after it, `None` after a deletion.
    pub size: Option<u64>,
    /// The content's state after it was read while it changed.
    pub fuzzy: bool,
}

/// A file that bore a name for a while.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NameRow {
    /// Which file.
    pub file: FileId,
    /// Since this transaction.
    pub from: Lsn,
    /// Until before this transaction; `None` while it has the name.
    pub to: Option<Lsn>,
}

/// A stretch of a data record that the current state needs, in the order of the medium.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LiveRow {
    /// Offset of the frame in the segment's plain file, bytes.
    pub frame_offset: u64,
    /// Offset of the data record's content in the decompressed frame, bytes.
    pub raw_offset: u32,
    /// Bytes of the data record's content.
    pub data_len: u32,
    /// The file that needs it, and what of the record it needs.
    pub extent: ExtentRow,
    /// Which file.
    pub file: FileId,
}

/// How much of a segment the current state needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LiveSegment {
    /// The segment; `None` for data whose place is not known.
    pub segment: Option<SegmentNo>,
    /// Stretches needed.
    pub rows: u64,
    /// Bytes needed (content, decompressed).
    pub bytes: u64,
}

/// A volume's state as the log says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeRow {
    /// What the record said.
    pub volume: crate::record::Volume,
    /// In which transaction.
    pub lsn: Lsn,
}

/// A copy of a segment on a volume (local knowledge, read from the volume's inventory).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CopyRow {
    /// The segment.
    pub segment: SegmentNo,
    /// The volume's serial.
    pub serial: String,
    /// "verified", "listed" (by the volume's inventory), "damaged" or "lost".
    pub state: String,
    /// When it was last read back and compared.
    pub verified: Option<Time>,
}
