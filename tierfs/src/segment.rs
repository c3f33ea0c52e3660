//! Segments: a header, frames, an index, a trailer; a file that `zstd -dc` reads as a CBOR sequence.
//!
//! ```text
//! skippable frame 0x184D2A50: segment header
//! (skippable frame 0x184D2A51: frame header, zstd frame) ...
//! skippable frame 0x184D2A52: index
//! skippable frame 0x184D2A53: trailer, the last TRAILER_LEN bytes of the file
//! ```
//!
//! [`Segment::open`] reads a sealed segment from its trailer, without reading its frames.
//! [`Scan`] (in [`crate::scan`]) walks frames from the front, for open and for damaged segments. Neither trusts a byte:
//! lengths are bounded before anything is allocated, and hashes are checked before values are used.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::{fmt, io};

use minicbor::Decoder;

use crate::cbor::{self, CborError, Enc, Field, array_len, array_of, infallible};
use crate::cbor_map;
use crate::frame::{
    self, Cursor, DataEntry, FRAME_HEADER_LEN, FRAME_PREFIX_LEN, FrameError, FrameHeader,
    FrameKind, PackedFrame, SKIPPABLE_HEAD,
};
use crate::ids::{DataId, Epoch, Hash, Lsn, SegmentNo};
use crate::record::{Record, SegmentHeader};
use crate::scan::{Scan, Step};

/// The version that this program writes; it reads every version up to it.
pub const FORMAT_VERSION: u32 = 1;
/// Magic of the skippable frame around the segment header.
pub const HEADER_MAGIC: u32 = 0x184D_2A50;
/// Magic of the skippable frame around the index.
pub const INDEX_MAGIC: u32 = 0x184D_2A52;
/// Magic of the skippable frame around the trailer.
pub const TRAILER_MAGIC: u32 = 0x184D_2A53;
/// The most bytes of a segment header's payload.
pub const HEADER_MAX: usize = 4096;
/// The most bytes of an index's payload.
pub const INDEX_MAX: u64 = 256 * 1024 * 1024;
/// Bytes of the trailer's payload.
pub const TRAILER_PAYLOAD_LEN: usize = 104;
/// Bytes of the trailer with its head: where a reader begins, counted from the end of the file.
pub const TRAILER_LEN: usize = SKIPPABLE_HEAD + TRAILER_PAYLOAD_LEN;

const HEADER_MARK: [u8; 8] = *b"HSM-SEG\n";
const INDEX_MARK: [u8; 8] = *b"HSM-IDX\n";
const TRAILER_MARK: [u8; 8] = *b"HSM-END\n";

/// Why a segment cannot be read. Every variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The disk or medium failed.
    #[error("cannot read {name}: {source}")]
    Io {
        /// The file.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// The bytes are not what was written.
    #[error("{name} is damaged at byte {offset}: {what}; read this segment from another copy")]
    Corrupt {
        /// The file.
        name: String,
        /// Where.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// A later version of the format.
    #[error(
        "{name} has format version {version}, this program knows versions up to {FORMAT_VERSION}: use a newer one"
    )]
    NewerVersion {
        /// The file.
        name: String,
        /// Its version.
        version: u32,
    },
    /// The file has no trailer: it was never sealed, or its end is lost.
    #[error("{name} is not sealed: it ends without a trailer")]
    NotSealed {
        /// The file.
        name: String,
    },
}

/// Bytes that can be read at any place: a file, an object on a volume.
pub trait ReadAt: Send + Sync {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Fills `buf` from `offset`, or fails.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// True where there are no bytes.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
}

impl ReadAt for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }
}

impl ReadAt for Vec<u8> {
    fn len(&self) -> io::Result<u64> {
        Ok(Vec::len(self) as u64)
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).ok();
        let range = start.and_then(|start| self.get(start..start.checked_add(buf.len())?));
        buf.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// The head of a skippable frame.
fn skippable_head(magic: u32, len: usize) -> [u8; SKIPPABLE_HEAD] {
    let mut head = [0; SKIPPABLE_HEAD];
    head[..4].copy_from_slice(&magic.to_le_bytes());
    head[4..].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
    head
}

/// A skippable frame: mark, CBOR, BLAKE3 of both. Gives the bytes and that hash.
fn sealed_block(magic: u32, mark: [u8; 8], cbor: &[u8]) -> (Vec<u8>, Hash) {
    let mut bytes = skippable_head(magic, mark.len() + cbor.len() + Hash::LEN).to_vec();
    bytes.extend(mark);
    bytes.extend(cbor);
    let hash = Hash::of(&bytes[SKIPPABLE_HEAD..]);
    bytes.extend(hash.0);
    (bytes, hash)
}

/// The first bytes of a segment, and the hash that its first frame header names as the one before.
pub fn encode_header(header: &SegmentHeader) -> (Vec<u8>, Hash) {
    sealed_block(HEADER_MAGIC, HEADER_MARK, &cbor::to_bytes(header))
}

/// One frame as the index knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrameEntry {
    /// Where its header's skippable frame begins in the file.
    pub offset: u64,
    /// Meta or data.
    pub kind: FrameKind,
    /// Length of the zstd frame, which begins [`FRAME_PREFIX_LEN`] bytes after `offset`.
    pub compressed_len: u32,
    /// Length of its records.
    pub raw_len: u32,
    /// LSN of the first commit in it.
    pub first_lsn: Option<Lsn>,
    /// How many commits.
    pub commits: u32,
    /// How many records.
    pub records: u32,
    /// The data records in it, in order.
    pub data: Vec<DataEntry>,
}

impl FrameEntry {
    /// The entry of a frame that lies at `offset`.
    pub fn new(offset: u64, frame: &PackedFrame) -> Self {
        Self {
            offset,
            kind: frame.kind,
            compressed_len: u32::try_from(frame.compressed.len()).unwrap_or(u32::MAX),
            raw_len: frame.raw_len,
            first_lsn: frame.first_lsn,
            commits: frame.commits,
            records: frame.records,
            data: frame.data.clone(),
        }
    }

    /// The offset of the byte after the frame.
    pub fn end(&self) -> u64 {
        self.offset + FRAME_PREFIX_LEN as u64 + u64::from(self.compressed_len)
    }

    /// Are these records what the frame's header says?
    pub(crate) fn check(&self, records: &[Record]) -> Result<(), &'static str> {
        let mut commits = records.iter().filter_map(|record| match record {
            Record::Commit(commit) => Some(commit.lsn),
            _ => None,
        });
        let belongs = |record: &Record| match record {
            Record::Data(_) => self.kind == FrameKind::Data,
            Record::Segment(_) | Record::Op(_) | Record::Commit(_) => self.kind == FrameKind::Meta,
            Record::Unknown(_) => true,
        };
        let first = commits.next();
        if records.len() as u64 != u64::from(self.records) {
            Err("the frame has another number of records than its header says")
        } else if !records.iter().all(belongs) {
            Err("the frame has a record that does not belong into its kind")
        } else if first != self.first_lsn
            || commits.count() as u64 + u64::from(first.is_some()) != u64::from(self.commits)
        {
            Err("the frame's commits are not those that its header names")
        } else {
            Ok(())
        }
    }

    /// `[offset, kind, compressed, raw, lsn, commits, records, [epoch, [number, offset, len, ...]]...]`
    fn put(&self, enc: &mut Enc<'_>) {
        let groups: Vec<&[DataEntry]> = self
            .data
            .chunk_by(|a, b| a.id.epoch == b.id.epoch)
            .collect();
        infallible(enc.array(7 + groups.len() as u64).and_then(|enc| {
            enc.u64(self.offset)?
                .u64(self.kind as u64)?
                .u32(self.compressed_len)?
                .u32(self.raw_len)?;
            enc.u64(self.first_lsn.map_or(0, Lsn::get))?
                .u32(self.commits)?
                .u32(self.records)
        }));
        for group in groups {
            infallible(
                enc.array(2)
                    .and_then(|enc| enc.u64(group[0].id.epoch.0)?.array(group.len() as u64 * 3)),
            );
            for entry in group {
                infallible(
                    enc.u64(entry.id.number)
                        .and_then(|enc| enc.u32(entry.raw_offset)?.u32(entry.len)),
                );
            }
        }
    }

    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        let items = array_len(dec, "a frame's entry in the index")?;
        let groups = items.checked_sub(7).ok_or(CborError::Range {
            what: "a frame's entry in the index",
        })?;
        let mut entry = Self {
            offset: dec.u64()?,
            kind: FrameKind::from_number(dec.u64()?).ok_or(CborError::Range {
                what: "a frame's kind",
            })?,
            compressed_len: dec.u32()?,
            raw_len: dec.u32()?,
            first_lsn: Lsn::new(dec.u64()?),
            commits: dec.u32()?,
            records: dec.u32()?,
            data: Vec::new(),
        };
        for _ in 0..groups {
            entry.get_data(dec)?;
        }
        if entry.compressed_len as usize > frame::COMPRESSED_MAX
            || entry.raw_len as usize > frame::RAW_MAX
        {
            return Err(CborError::Range {
                what: "a frame's length in the index",
            });
        }
        let data = entry.data.len() as u64;
        let possible = match entry.kind {
            FrameKind::Meta => data == 0 && (entry.commits == 0) == entry.first_lsn.is_none(),
            FrameKind::Data => entry.commits == 0 && entry.first_lsn.is_none(),
        };
        if possible && data <= entry.records.into() && entry.commits <= entry.records {
            Ok(entry)
        } else {
            Err(CborError::Range {
                what: "a frame's counts in the index",
            })
        }
    }

    /// The data records of one epoch: they lie one behind another.
    fn get_data(&mut self, dec: &mut Decoder<'_>) -> Result<(), CborError> {
        let range = |what| CborError::Range { what };
        array_of(dec, 2, "a frame's data in the index")?;
        let epoch = Epoch(dec.u64()?);
        let items = array_len(dec, "a frame's data in the index")?;
        if items % 3 != 0 {
            return Err(range("a frame's data in the index"));
        }
        for _ in 0..items / 3 {
            let id = DataId {
                epoch,
                number: dec.u64()?,
            };
            let data = DataEntry {
                id,
                raw_offset: dec.u32()?,
                len: dec.u32()?,
            };
            let before = self.data.last();
            let start = before.map_or(0, |last| u64::from(last.raw_offset) + u64::from(last.len));
            if u64::from(data.raw_offset) < start
                || data.len == 0
                || u64::from(data.raw_offset) + u64::from(data.len) > self.raw_len.into()
                || id.number >= DataId::NUMBER_MAX
            {
                return Err(range("a data record's place in the index"));
            }
            self.data.push(data);
        }
        Ok(())
    }
}

impl Field for Vec<FrameEntry> {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.array(self.len() as u64));
        for entry in self {
            entry.put(enc);
        }
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        let mut list = Vec::new();
        for _ in 0..array_len(dec, "the index")? {
            list.push(FrameEntry::get(dec)?);
        }
        Ok(list)
    }
}

cbor_map! {
    /// The frames of a segment, in order.
    Index {
        /// Each frame: its place, lengths, LSNs and data records.
        0 => frames: Vec<FrameEntry>,
    }
}

/// The end of a sealed segment. Payload, all integers little endian:
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 8 | "HSM-END\n" |
/// | 8 | 8 | epoch |
/// | 16 | 8 | segment number |
/// | 24 | 8 | offset of the index's skippable frame |
/// | 32 | 4 | length of the index's skippable frame |
/// | 36 | 4 | number of frames |
/// | 40 | 8 | LSN of the first commit, 0 where there is none |
/// | 48 | 8 | LSN of the last commit, 0 where there is none |
/// | 56 | 8 | seconds since 1970 at which the segment was sealed |
/// | 64 | 8 | 0 |
/// | 72 | 32 | BLAKE3 of bytes 0 to 71 and of the index's hash |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trailer {
    /// The writer.
    pub epoch: Epoch,
    /// The segment.
    pub segment: SegmentNo,
    /// Where the index's skippable frame begins.
    pub index_offset: u64,
    /// Its length.
    pub index_len: u32,
    /// How many frames.
    pub frames: u32,
    /// First commit in the segment.
    pub first_lsn: Option<Lsn>,
    /// Last commit in the segment.
    pub last_lsn: Option<Lsn>,
    /// When it was sealed (wall clock, seconds).
    pub sealed_at: u64,
}

impl Trailer {
    fn encode(&self, index_hash: &Hash) -> Vec<u8> {
        let mut out = skippable_head(TRAILER_MAGIC, TRAILER_PAYLOAD_LEN).to_vec();
        out.extend(TRAILER_MARK);
        out.extend(self.epoch.0.to_le_bytes());
        out.extend(self.segment.get().to_le_bytes());
        out.extend(self.index_offset.to_le_bytes());
        out.extend(self.index_len.to_le_bytes());
        out.extend(self.frames.to_le_bytes());
        out.extend(self.first_lsn.map_or(0, Lsn::get).to_le_bytes());
        out.extend(self.last_lsn.map_or(0, Lsn::get).to_le_bytes());
        out.extend(self.sealed_at.to_le_bytes());
        out.extend([0; 8]);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&out[SKIPPABLE_HEAD..]).update(&index_hash.0);
        out.extend(Hash::from(hasher.finalize()).0);
        out
    }

    /// The fields, not yet checked against the hash; `None` where this is no trailer at all.
    fn decode(bytes: &[u8; TRAILER_LEN]) -> Option<Self> {
        let mut at = Cursor(bytes);
        let head = (u32::from_le_bytes(at.take()), u32::from_le_bytes(at.take()));
        if head != (TRAILER_MAGIC, 104) || at.take() != TRAILER_MARK {
            return None;
        }
        Some(Self {
            epoch: Epoch(u64::from_le_bytes(at.take())),
            segment: SegmentNo::new(u64::from_le_bytes(at.take()))?,
            index_offset: u64::from_le_bytes(at.take()),
            index_len: u32::from_le_bytes(at.take()),
            frames: u32::from_le_bytes(at.take()),
            first_lsn: Lsn::new(u64::from_le_bytes(at.take())),
            last_lsn: Lsn::new(u64::from_le_bytes(at.take())),
            sealed_at: u64::from_le_bytes(at.take()),
        })
    }
}

/// Index and trailer as they end the file, for frames whose last byte lies before `index_offset`.
pub fn encode_end(index: &Index, mut trailer: Trailer) -> Result<Vec<u8>, FrameError> {
    let (mut bytes, hash) = sealed_block(INDEX_MAGIC, INDEX_MARK, &cbor::to_bytes(index));
    if bytes.len() as u64 > INDEX_MAX {
        return Err(FrameError::Length);
    }
    trailer.index_len = u32::try_from(bytes.len()).map_err(|_| FrameError::Length)?;
    bytes.extend(trailer.encode(&hash));
    Ok(bytes)
}

/// A sealed segment, or one whose index was made again by [`Segment::salvage`].
#[derive(Clone)]
pub struct Segment {
    name: String,
    source: Arc<dyn ReadAt>,
    /// What its header says.
    pub header: SegmentHeader,
    /// Its frames.
    pub index: Index,
    /// Its end; `None` where it was salvaged or is still open.
    pub trailer: Option<Trailer>,
    /// Where the first frame begins.
    pub(crate) frames_at: u64,
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Segment({})", self.name)
    }
}

/// Reads from a named source, with the name in every error.
pub(crate) struct Source<'s> {
    pub(crate) name: &'s str,
    pub(crate) bytes: &'s dyn ReadAt,
}

impl Source<'_> {
    pub(crate) fn corrupt(&self, offset: u64, what: impl fmt::Display) -> SegmentError {
        SegmentError::Corrupt {
            name: self.name.to_owned(),
            offset,
            what: what.to_string(),
        }
    }

    fn io(&self, source: io::Error) -> SegmentError {
        SegmentError::Io {
            name: self.name.to_owned(),
            source,
        }
    }

    pub(crate) fn len(&self) -> Result<u64, SegmentError> {
        self.bytes.len().map_err(|error| self.io(error))
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, SegmentError> {
        let mut bytes = vec![0; len];
        match self.bytes.read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.corrupt(offset, "the file ends too early"))
            }
            Err(error) => Err(self.io(error)),
        }
    }

    pub(crate) fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N], SegmentError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.read(offset, N)?);
        Ok(bytes)
    }

    /// Reads a block made by [`sealed_block`]: its CBOR, its hash, its length in the file.
    fn block(
        &self,
        offset: u64,
        magic: u32,
        mark: [u8; 8],
        max: u64,
    ) -> Result<(Vec<u8>, Hash, u64), SegmentError> {
        let head: [u8; SKIPPABLE_HEAD] = self.array(offset)?;
        let mut at = Cursor(&head);
        if u32::from_le_bytes(at.take()) != magic {
            return Err(self.corrupt(offset, "the magic number of a skippable frame is missing"));
        }
        let len = u32::from_le_bytes(at.take());
        let overhead = mark.len() + Hash::LEN;
        if u64::from(len) > max
            || (len as usize) < overhead
            || offset + u64::from(len) > self.len()?
        {
            return Err(self.corrupt(offset, "the length of a skippable frame is out of range"));
        }
        let mut payload = self.read(offset + SKIPPABLE_HEAD as u64, len as usize)?;
        let hash = payload.split_off(len as usize - Hash::LEN);
        if payload[..mark.len()] != mark || Hash::of(&payload).0 != hash[..] {
            return Err(self.corrupt(offset, "the hash does not match"));
        }
        let hash = Hash::of(&payload);
        payload.drain(..mark.len());
        Ok((payload, hash, SKIPPABLE_HEAD as u64 + u64::from(len)))
    }

    /// The segment header, its hash, and where the first frame begins.
    pub(crate) fn header(&self) -> Result<(SegmentHeader, Hash, u64), SegmentError> {
        let (body, hash, len) = self.block(0, HEADER_MAGIC, HEADER_MARK, HEADER_MAX as u64)?;
        // The version is looked at first: what follows may have changed with it.
        let version = first_value(&body).map_err(|error| self.corrupt(0, error))?;
        if version > u64::from(FORMAT_VERSION) {
            let version = u32::try_from(version).unwrap_or(u32::MAX);
            return Err(SegmentError::NewerVersion {
                name: self.name.to_owned(),
                version,
            });
        }
        let header =
            cbor::whole(&body, "the segment header").map_err(|error| self.corrupt(0, error))?;
        Ok((header, hash, len))
    }
}

/// The value of the first key (0, the version) of a map.
fn first_value(body: &[u8]) -> Result<u64, CborError> {
    let mut dec = Decoder::new(body);
    dec.map()?;
    if dec.u64()? != 0 {
        return Err(CborError::Missing {
            what: "SegmentHeader",
            field: "version",
        });
    }
    Ok(dec.u64()?)
}

/// Header, index and trailer name the same transactions, without a gap.
fn check_lsns(
    header: &SegmentHeader,
    index: &Index,
    trailer: &Trailer,
) -> Result<(), &'static str> {
    let mut last = header.first_lsn.prev();
    let mut first = None;
    for frame in index.frames.iter().filter(|frame| frame.commits > 0) {
        if frame.first_lsn != Some(Lsn::after(last)) {
            return Err("the index's LSNs are not dense");
        }
        first = first.or(frame.first_lsn);
        last = Lsn::new(last.map_or(0, Lsn::get) + u64::from(frame.commits));
    }
    if (trailer.first_lsn, trailer.last_lsn) == (first, first.and(last)) {
        Ok(())
    } else {
        Err("the index's transactions are not those that the trailer names")
    }
}

impl Segment {
    /// Opens a sealed segment: trailer, index and header are read and checked, frames are not.
    pub fn open(source: Arc<dyn ReadAt>, name: impl Into<String>) -> Result<Self, SegmentError> {
        let name = name.into();
        let from = Source {
            name: &name,
            bytes: &*source,
        };
        let (header, _, frames_at) = from.header()?;
        let len = from.len()?;
        let end = len.checked_sub(TRAILER_LEN as u64);
        let end = end.ok_or_else(|| SegmentError::NotSealed { name: name.clone() })?;
        let trailer = Trailer::decode(&from.array(end)?)
            .ok_or_else(|| SegmentError::NotSealed { name: name.clone() })?;
        if trailer.index_offset.checked_add(trailer.index_len.into()) != Some(end) {
            return Err(from.corrupt(end, "the trailer does not follow the index that it names"));
        }
        let (body, index_hash, _) =
            from.block(trailer.index_offset, INDEX_MAGIC, INDEX_MARK, INDEX_MAX)?;
        // The whole trailer again: its hash covers what decoding does not look at as well.
        if trailer.encode(&index_hash) != from.read(end, TRAILER_LEN)? {
            return Err(from.corrupt(end, "the trailer's hash does not match"));
        }
        let index: Index = cbor::whole(&body, "the index")
            .map_err(|error| from.corrupt(trailer.index_offset, error))?;
        if (header.epoch, header.segment) != (trailer.epoch, trailer.segment) {
            return Err(from.corrupt(end, "header and trailer are of different segments"));
        }
        let mut at = frames_at;
        for entry in &index.frames {
            if entry.offset != at {
                return Err(from.corrupt(
                    trailer.index_offset,
                    "the index's frames do not follow one another",
                ));
            }
            at = entry.end();
        }
        check_lsns(&header, &index, &trailer)
            .map_err(|what| from.corrupt(trailer.index_offset, what))?;
        if at != trailer.index_offset || index.frames.len() as u64 != u64::from(trailer.frames) {
            return Err(from.corrupt(trailer.index_offset, "the index does not cover the frames"));
        }
        Ok(Self {
            name,
            source,
            header,
            index,
            trailer: Some(trailer),
            frames_at,
        })
    }

    /// Opens a segment whose index or trailer is damaged or missing: every frame that is whole is
    /// found by reading the file from front to back. What lies between is not there.
    pub fn salvage(source: Arc<dyn ReadAt>, name: impl Into<String>) -> Result<Self, SegmentError> {
        let mut scan = Scan::open(source.clone(), name)?;
        let frames_at = scan.offset;
        let mut frames = Vec::new();
        loop {
            match scan.next_frame()? {
                Step::Frame(found) => frames.push(found.entry),
                Step::Stop(_) if scan.resync()? => {}
                Step::Stop(_) => break,
            }
        }
        Ok(Self {
            name: scan.name,
            source,
            header: scan.header,
            index: Index { frames },
            trailer: None,
            frames_at,
        })
    }

    /// A segment that its writer still holds open: what it has appended so far.
    pub(crate) fn unsealed(
        source: Arc<dyn ReadAt>,
        name: String,
        header: SegmentHeader,
        frames: Vec<FrameEntry>,
    ) -> Self {
        let frames_at = frames.first().map_or(0, |frame| frame.offset);
        Self {
            name,
            source,
            header,
            index: Index { frames },
            trailer: None,
            frames_at,
        }
    }

    /// The number of the frame that begins at `offset`, as places in the catalog name it.
    pub fn frame_at(&self, offset: u64) -> Option<usize> {
        self.index
            .frames
            .binary_search_by_key(&offset, |frame| frame.offset)
            .ok()
    }

    /// Says that the segment is damaged at `offset`.
    pub fn corrupt(&self, offset: u64, what: impl fmt::Display) -> SegmentError {
        Source {
            name: &self.name,
            bytes: &*self.source,
        }
        .corrupt(offset, what)
    }

    /// The name that errors use.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads frame `number`, checks header and body, and gives its records' bytes.
    pub fn read_frame(&self, number: usize) -> Result<Vec<u8>, SegmentError> {
        let from = Source {
            name: &self.name,
            bytes: &*self.source,
        };
        let entry = self
            .index
            .frames
            .get(number)
            .ok_or_else(|| from.corrupt(0, format!("there is no frame {number}")))?;
        let bytes = from.read(
            entry.offset,
            FRAME_PREFIX_LEN + entry.compressed_len as usize,
        )?;
        let fail = |error: FrameError| from.corrupt(entry.offset, error);
        let (prefix, body) = bytes.split_at(FRAME_PREFIX_LEN);
        let mut fixed = [0; FRAME_PREFIX_LEN];
        fixed.copy_from_slice(prefix);
        let (header, _) = FrameHeader::decode(&fixed).map_err(fail)?;
        if (header.epoch, header.segment) != (self.header.epoch, self.header.segment)
            || (
                header.kind,
                header.raw_len,
                header.first_lsn,
                header.commits,
            ) != (entry.kind, entry.raw_len, entry.first_lsn, entry.commits)
        {
            return Err(from.corrupt(
                entry.offset,
                "the frame is not the one that the index names",
            ));
        }
        frame::unpack(&header, body).map_err(fail)
    }

    /// Reads frame `number` as records, which are those that the index names.
    pub fn read_records(&self, number: usize) -> Result<Vec<Record>, SegmentError> {
        let raw = self.read_frame(number)?;
        let entry = &self.index.frames[number];
        let fail = |error: &dyn fmt::Display| self.corrupt(entry.offset, error);
        let (records, data) = decode_with_places(&raw).map_err(|error| fail(&error))?;
        entry.check(&records).map_err(|error| fail(&error))?;
        if data == entry.data {
            Ok(records)
        } else {
            Err(fail(&"the frame's data is not where the index says"))
        }
    }
}

/// Decodes a frame's records and says where the content of each data record lies.
pub(crate) fn decode_with_places(raw: &[u8]) -> Result<(Vec<Record>, Vec<DataEntry>), CborError> {
    let (mut records, mut data, mut at) = (Vec::new(), Vec::new(), 0);
    while at < raw.len() {
        let (record, len) = Record::decode(&raw[at..])?;
        at += len;
        if let Record::Data(record) = &record {
            // The content is the last thing in the record.
            let raw_offset = u32::try_from(at - record.bytes.len()).unwrap_or(u32::MAX);
            let len = u32::try_from(record.bytes.len()).unwrap_or(u32::MAX);
            data.push(DataEntry {
                id: record.id,
                raw_offset,
                len,
            });
        }
        records.push(record);
    }
    Ok((records, data))
}

const _: () = assert!(FRAME_HEADER_LEN == 160 && TRAILER_PAYLOAD_LEN == 72 + Hash::LEN);
