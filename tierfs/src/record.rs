//! The log's records: one CBOR item each, `[kind, body]`.
//!
//! A transaction is a run of operations that ends with a [`Commit`]; nothing else stands between
//! them but frame boundaries. Content is logged before the transaction that refers to it, as [`Data`]
//! records in frames of their own. Operations without a commit and data without a reference mean
//! nothing. man/hsm-log.5 is the normative description of everything here.

use minicbor::Decoder;

use crate::cbor::{self, CborError, Enc, Field, array_len, array_of, infallible};
use crate::cbor_map;
use crate::ids::{DataId, Epoch, FileId, Hash, LogId, Lsn, SegmentNo, Time};
use crate::layout::{self, Range};

/// What a file is. The numbers are the format's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A regular file.
    Regular = 0,
    /// A directory.
    Directory = 1,
    /// A symbolic link.
    Symlink = 2,
    /// A named pipe.
    Fifo = 3,
    /// A Unix socket's name.
    Socket = 4,
    /// A character device.
    CharDevice = 5,
    /// A block device.
    BlockDevice = 6,
}

impl Kind {
    /// The kind with the format's number `value`.
    pub fn from_number(value: u64) -> Option<Self> {
        Some(match value {
            0 => Self::Regular,
            1 => Self::Directory,
            2 => Self::Symlink,
            3 => Self::Fifo,
            4 => Self::Socket,
            5 => Self::CharDevice,
            6 => Self::BlockDevice,
            _ => return None,
        })
    }

    /// The format's number.
    pub fn number(self) -> u64 {
        self as u64
    }
}

impl Field for Kind {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.u64(self.number()));
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        Self::from_number(dec.u64()?).ok_or(CborError::Range {
            what: "a file's kind",
        })
    }
}

/// A set of bits; left out where none is set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
pub struct Bits(pub u32);

/// The chattr flags that are logged (`FS_*_FL`), as hsm-log.5 lists them: `c S i a d A m j D T C`.
pub const FLAGS_LOGGED: u32 = 0x0083_44fc;

impl Field for Bits {
    fn present(&self) -> bool {
        self.0 != 0
    }
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.u32(self.0));
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        Ok(Self(dec.u32()?))
    }
    fn absent() -> Option<Self> {
        Some(Self(0))
    }
}

/// [`Inode::unrestorable`]: the file is encrypted by fscrypt, its content was read in the clear or not at all.
pub const UNRESTORABLE_FSCRYPT: u32 = 1;
/// [`Inode::unrestorable`]: the file is protected by fs-verity, which is not set again.
pub const UNRESTORABLE_VERITY: u32 = 2;
/// [`Inode::unrestorable`]: the content could not be read (an I/O error), what is logged is older or empty.
pub const UNRESTORABLE_UNREADABLE: u32 = 4;

/// A device number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Device {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl Field for Device {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(
            enc.array(2)
                .and_then(|enc| enc.u32(self.major)?.u32(self.minor)),
        );
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        array_of(dec, 2, "a device number")?;
        Ok(Self {
            major: dec.u32()?,
            minor: dec.u32()?,
        })
    }
}

cbor_map! {
    /// What begins every segment, as a skippable frame and again as the first record.
    SegmentHeader {
        /// Version of the format, [`crate::segment::FORMAT_VERSION`].
        0 => version: u32,
        /// The host's name.
        1 => host: Option<String>,
        /// The log's name.
        2 => log_id: LogId,
        /// The writer of this segment.
        4 => epoch: Epoch,
        /// This segment's number.
        6 => segment: SegmentNo,
        /// BLAKE3 of the whole file of the segment before; absent in the first segment of the log.
        8 => previous: Option<Hash>,
        /// Where this writer began: the last segment of the writer before it.
        10 => predecessor: Option<Predecessor>,
        /// The LSN of the first commit in this segment, had it one: the last one before it plus one.
        12 => first_lsn: Lsn,
        /// When the segment was begun (wall clock).
        14 => time: Time,
        /// UUID of the watched filesystem.
        16 => fs_uuid: [u8; 16],
        /// Its type: "ext4", "xfs", "btrfs".
        18 => fs_type: String,
    }
}

cbor_map! {
    /// The end of the log as the writer found it when it started.
    Predecessor {
        /// Its writer.
        0 => epoch: Epoch,
        /// Its last segment.
        2 => segment: SegmentNo,
        /// BLAKE3 of that segment's file.
        4 => hash: Hash,
    }
}

cbor_map! {
    /// One chunk of a file's content. Only in data frames.
    Data {
        /// Its name.
        0 => id: DataId,
        /// 1 to [`layout::CHUNK`] bytes.
        2 => bytes: Vec<u8>,
    }
}

cbor_map! {
    /// From here on the tree lies on this filesystem: all earlier bindings are void.
    Filesystem {
        /// Its UUID.
        0 => uuid: [u8; 16],
        /// Where it was mounted, bytes of the path.
        1 => mount: Option<Vec<u8>>,
        /// Its type.
        2 => fs_type: String,
    }
}

cbor_map! {
    /// A file's attributes, all of them. The first one of a file creates it, without a name and
    /// (a regular file) with size 0 and no content.
    Inode {
        /// Which file.
        0 => file: FileId,
        /// Change time on the filesystem it was read from. Tells a sweep that nothing has changed.
        1 => ctime: Option<Time>,
        /// What it is; never changes for a file.
        2 => kind: Kind,
        /// Birth time, for information.
        3 => btime: Option<Time>,
        /// Permission bits with set-id and sticky: mode & 0o7777.
        4 => mode: u32,
        /// Owner.
        6 => uid: u32,
        /// Group.
        8 => gid: u32,
        /// Modification time.
        10 => mtime: Time,
        /// Only for devices.
        12 => rdev: Option<Device>,
        /// Only for symlinks: where it points, bytes.
        14 => target: Option<Vec<u8>>,
        /// chattr flags as `FS_IOC_GETFLAGS` gives them, masked to the list in hsm-log.5.
        16 => flags: Bits,
        /// `UNRESTORABLE_*`: what replay will not bring back.
        18 => unrestorable: Bits,
    }
}

cbor_map! {
    /// Which inode of the filesystem (the last [`Filesystem`]) the file is.
    Bind {
        /// Which file.
        0 => file: FileId,
        /// The inode number as stat(2) gives it.
        1 => ino: Option<u64>,
        /// Handle type (i32 little endian) and bytes of `name_to_handle_at(2)`.
        2 => handle: Vec<u8>,
    }
}

cbor_map! {
    /// All extended attributes of a file, but `trusted.hsm`. Those of a set that does not fit one
    /// record follow in further ones of the same transaction.
    Xattrs {
        /// Which file.
        0 => file: FileId,
        /// Name and value, sorted by name.
        2 => list: Vec<(Vec<u8>, Vec<u8>)>,
        /// Another piece of the set follows.
        4 => more: bool,
    }
}

/// A list of pairs of byte strings.
impl Field for Vec<(Vec<u8>, Vec<u8>)> {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.array(self.len() as u64));
        for (name, value) in self {
            infallible(enc.array(2).and_then(|enc| enc.bytes(name)?.bytes(value)));
        }
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        let len = array_len(dec, "a list of extended attributes")?;
        let mut list = Vec::new();
        for _ in 0..len {
            array_of(dec, 2, "an extended attribute")?;
            list.push((dec.bytes()?.to_vec(), dec.bytes()?.to_vec()));
        }
        Ok(list)
    }
}

/// What a range of a version holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Nothing: reads as zeros, takes no space. `[0, offset, len]`
    Hole(Range),
    /// The same pieces as the base version has there, holes included. `[1, offset, len]`
    Same(Range),
    /// Logged content. `[2, offset, len, [epoch, number], hashes]`: chunk k of the range (see
    /// [`layout::chunks`]) is the data id `number + k`; `hashes` has 32 bytes for every piece.
    Data {
        /// Where in the file.
        range: Range,
        /// The data id of the first chunk.
        first: DataId,
        /// BLAKE3 of every piece (see [`layout::pieces`]).
        hashes: Vec<Hash>,
    },
}

impl Extent {
    /// Where in the file.
    pub fn range(&self) -> Range {
        match self {
            Self::Hole(range) | Self::Same(range) | Self::Data { range, .. } => *range,
        }
    }

    fn put(&self, enc: &mut Enc<'_>) {
        let range = self.range();
        let (tag, items) = match self {
            Self::Hole(_) => (0, 3),
            Self::Same(_) => (1, 3),
            Self::Data { .. } => (2, 5),
        };
        infallible(
            enc.array(items)
                .and_then(|enc| enc.u8(tag)?.u64(range.offset)?.u64(range.len)),
        );
        if let Self::Data { first, hashes, .. } = self {
            first.put(enc);
            let bytes: Vec<u8> = hashes.iter().flat_map(|hash| hash.0).collect();
            infallible(enc.bytes(&bytes));
        }
    }

    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        let items = array_len(dec, "an extent")?;
        let tag = dec.u8()?;
        let range = Range {
            offset: dec.u64()?,
            len: dec.u64()?,
        };
        // File offsets are signed 64-bit numbers to the kernel.
        if range.len == 0
            || range
                .offset
                .checked_add(range.len)
                .is_none_or(|end| end > i64::MAX as u64)
        {
            return Err(CborError::Range {
                what: "an extent's range",
            });
        }
        match (tag, items) {
            (0, 3) => Ok(Self::Hole(range)),
            (1, 3) => Ok(Self::Same(range)),
            (2, 5) => Self::get_data(dec, range),
            _ => Err(CborError::Range {
                what: "an extent's kind",
            }),
        }
    }

    fn get_data(dec: &mut Decoder<'_>, range: Range) -> Result<Self, CborError> {
        let first = DataId::get(dec)?;
        let bytes = dec.bytes()?;
        let last = first.number.saturating_add(layout::chunk_count(range) - 1);
        if bytes.len() as u64 != layout::piece_count(range).saturating_mul(Hash::LEN as u64)
            || last >= DataId::NUMBER_MAX
        {
            return Err(CborError::Range {
                what: "an extent's hashes",
            });
        }
        let hashes = bytes.chunks_exact(Hash::LEN).map(|chunk| {
            let mut hash = [0; Hash::LEN];
            hash.copy_from_slice(chunk);
            Hash(hash)
        });
        Ok(Self::Data {
            range,
            first,
            hashes: hashes.collect(),
        })
    }
}

impl Field for Vec<Extent> {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.array(self.len() as u64));
        for extent in self {
            extent.put(enc);
        }
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        let len = array_len(dec, "a list of extents")?;
        let mut list = Vec::new();
        for _ in 0..len {
            list.push(Extent::get(dec)?);
        }
        Ok(list)
    }
}

cbor_map! {
    /// Extents of the version that the next [`Content`] of the same file and transaction completes,
    /// in ascending order. A long list takes several records.
    Extents {
        /// Which file.
        0 => file: FileId,
        /// Ascending, each beginning where the one before ended.
        2 => list: Vec<Extent>,
    }
}

cbor_map! {
    /// A new version of a regular file's content. The [`Extents`] before it in the transaction cover
    /// [0, size) without gap or overlap.
    Content {
        /// Which file.
        0 => file: FileId,
        /// Size in bytes.
        2 => size: u64,
        /// The version (its LSN) that [`Extent::Same`] refers to; absent where no extent does.
        4 => base: Option<Lsn>,
        /// Root hash of the whole version, see [`layout::RootHasher`].
        6 => root: Hash,
        /// The file changed while it was read: the bytes of different moments may be mixed.
        8 => fuzzy: bool,
    }
}

cbor_map! {
    /// A name appears.
    Link {
        /// The directory.
        0 => parent: FileId,
        /// 1 to 255 bytes, neither "/" nor NUL in it, neither "." nor "..".
        2 => name: Vec<u8>,
        /// What it names.
        4 => file: FileId,
    }
}

cbor_map! {
    /// A name disappears. The file stays, until it is deleted.
    Unlink {
        /// The directory.
        0 => parent: FileId,
        /// As in [`Link`].
        2 => name: Vec<u8>,
    }
}

cbor_map! {
    /// A file without a name is gone for good.
    Delete {
        /// Which file.
        0 => file: FileId,
    }
}

cbor_map! {
    /// A volume joins a pool, or its state changes.
    Volume {
        /// Serial as on its label.
        0 => serial: String,
        /// The pool's name.
        2 => pool: String,
        /// "directory", later "tape", "optical", "object".
        4 => backend: String,
        /// "filling", "full", "retired", "damaged" and so on.
        6 => state: String,
        /// Where it stood, a path of the daemon's machine: an empty directory there is a disk that is
        /// not mounted, not a new volume.
        7 => place: Option<Vec<u8>>,
    }
}

cbor_map! {
    /// A regular file is pinned (never released), or not any more. A file begins unpinned.
    Pin {
        /// Which file.
        0 => file: FileId,
        /// What holds from here on.
        2 => pinned: bool,
    }
}

cbor_map! {
    /// The end of a transaction: everything since the commit before becomes true at once.
    Commit {
        /// The transaction's number.
        0 => lsn: Lsn,
        /// The transaction's time: never earlier than the one before.
        2 => time: Time,
        /// What the wall clock said.
        4 => wall: Time,
        /// How many operations it has.
        6 => ops: u64,
    }
}

/// One operation of a transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Op {
    Filesystem(Filesystem),
    Inode(Inode),
    Bind(Bind),
    Xattrs(Xattrs),
    Extents(Extents),
    Content(Content),
    Link(Link),
    Unlink(Unlink),
    Delete(Delete),
    Volume(Volume),
    Pin(Pin),
}

/// One item of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Record {
    Segment(SegmentHeader),
    Data(Data),
    Op(Op),
    Commit(Commit),
    /// A kind that an older reader may ignore (an odd number).
    Unknown(u64),
}

macro_rules! kinds {
    ($($kind:literal => $make:path, $match:pat => $body:ident;)*) => {
        impl Record {
            /// Appends the record's bytes.
            pub fn encode(&self, out: &mut Vec<u8>) {
                match self {
                    $($match => cbor::put_record($kind, $body, out),)*
                    Self::Unknown(kind) => unreachable!("a record of kind {kind} is only ever read"),
                }
            }

            fn get_body(kind: u64, dec: &mut Decoder<'_>) -> Result<Self, CborError> {
                Ok(match kind {
                    $($kind => $make(Field::get(dec)?).into(),)*
                    kind if kind % 2 == 0 => return Err(CborError::Critical { what: "a record", key: kind }),
                    kind => {
                        dec.skip()?;
                        Self::Unknown(kind)
                    }
                })
            }
        }
    };
}

impl From<Op> for Record {
    fn from(op: Op) -> Self {
        Self::Op(op)
    }
}

kinds! {
    0 => Record::Segment, Record::Segment(body) => body;
    2 => Record::Data, Record::Data(body) => body;
    4 => Record::Commit, Record::Commit(body) => body;
    10 => Op::Filesystem, Record::Op(Op::Filesystem(body)) => body;
    12 => Op::Inode, Record::Op(Op::Inode(body)) => body;
    14 => Op::Bind, Record::Op(Op::Bind(body)) => body;
    16 => Op::Xattrs, Record::Op(Op::Xattrs(body)) => body;
    18 => Op::Extents, Record::Op(Op::Extents(body)) => body;
    20 => Op::Content, Record::Op(Op::Content(body)) => body;
    22 => Op::Link, Record::Op(Op::Link(body)) => body;
    24 => Op::Unlink, Record::Op(Op::Unlink(body)) => body;
    26 => Op::Delete, Record::Op(Op::Delete(body)) => body;
    28 => Op::Volume, Record::Op(Op::Volume(body)) => body;
    30 => Op::Pin, Record::Op(Op::Pin(body)) => body;
}

impl Record {
    /// Reads the record at the start of `bytes`; gives it and its length.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), CborError> {
        let mut dec = Decoder::new(bytes);
        array_of(&mut dec, 2, "a record")?;
        let kind = dec.u64()?;
        let record = Self::get_body(kind, &mut dec)?;
        record.check()?;
        Ok((record, dec.position()))
    }

    /// Reads all the records that `bytes` (a decompressed frame) consist of.
    pub fn decode_all(mut bytes: &[u8]) -> Result<Vec<Self>, CborError> {
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let (record, len) = Self::decode(bytes)?;
            records.push(record);
            bytes = &bytes[len..];
        }
        Ok(records)
    }

    fn check(&self) -> Result<(), CborError> {
        let name = match self {
            Self::Op(Op::Link(link)) => &link.name,
            Self::Op(Op::Unlink(unlink)) => &unlink.name,
            Self::Data(data)
                if data.bytes.is_empty() || data.bytes.len() as u64 > layout::CHUNK =>
            {
                return Err(CborError::Range {
                    what: "the length of a data record",
                });
            }
            _ => return Ok(()),
        };
        if valid_name(name) {
            Ok(())
        } else {
            Err(CborError::Range { what: "a name" })
        }
    }
}

/// True for what can be an entry's name in a directory: bytes that replay may safely create.
pub fn valid_name(name: &[u8]) -> bool {
    (1..=255).contains(&name.len())
        && name != b"."
        && name != b".."
        && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}

/// A committed transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Txn {
    /// Its number.
    pub lsn: Lsn,
    /// Its time, never going back.
    pub time: Time,
    /// The wall clock beside it.
    pub wall: Time,
    /// What it does, in order.
    pub ops: Vec<Op>,
}
