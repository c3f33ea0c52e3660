//! Frames: at most [`RAW_MAX`] bytes of records, compressed as one zstd frame, behind a skippable
//! frame that says what it is.
//!
//! Guarantees: what [`unpack`] returns is exactly what was packed (both lengths and two hashes are
//! checked), the headers of one segment form a chain, and nothing is allocated beyond the format's
//! bounds whatever the bytes say. Where frames lie in a file is the business of [`crate::segment`].

use minicbor::Encoder;
use zstd::zstd_safe::{CParameter, get_error_name};

use crate::cbor::infallible;
use crate::ids::{DataId, Epoch, Hash, Lsn, SegmentNo};
use crate::layout::CHUNK;
use crate::record::{Record, Txn};

/// The most bytes of records in a frame.
pub const RAW_MAX: usize = 1024 * 1024;
/// The most bytes of a compressed frame: what `ZSTD_compressBound` gives for [`RAW_MAX`], and room.
pub const COMPRESSED_MAX: usize = RAW_MAX + RAW_MAX / 128 + 1024;
/// The head of a skippable frame: magic and length, u32 little endian each (RFC 8878, 3.1.2).
pub const SKIPPABLE_HEAD: usize = 8;
/// Magic of the skippable frame before every zstd frame.
pub const FRAME_MAGIC: u32 = 0x184D_2A51;
/// The payload of that skippable frame, see [`FrameHeader`].
pub const FRAME_HEADER_LEN: usize = 160;
/// Head and payload together: what stands before every zstd frame.
pub const FRAME_PREFIX_LEN: usize = SKIPPABLE_HEAD + FRAME_HEADER_LEN;
/// The most bytes that the CBOR around a data record's content takes.
pub const DATA_OVERHEAD_MAX: usize = 32;

const _: () = assert!(CHUNK + DATA_OVERHEAD_MAX as u64 <= RAW_MAX as u64);

/// What kind of records a frame holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameKind {
    /// Operations and commits (and the segment header's record).
    Meta = 1,
    /// Data records only: a fold of the log need not read it.
    Data = 2,
}

impl FrameKind {
    /// The kind with the format's number `value`.
    pub fn from_number(value: u64) -> Option<Self> {
        match value {
            1 => Some(Self::Meta),
            2 => Some(Self::Data),
            _ => None,
        }
    }
}

/// Why bytes are no frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Not the magic, the length or the hash of a frame header.
    #[error("no valid frame header: {0}")]
    Header(&'static str),
    /// The compressed bytes are not those that the header names.
    #[error("the frame's bytes do not have the hash that its header names")]
    Hash,
    /// zstd refuses bytes whose hash is right.
    #[error("zstd cannot decompress the frame: {0}")]
    Zstd(String),
    /// A length beyond what the format allows, or not what the header says.
    #[error("the frame's length is not what its header says")]
    Length,
    /// A header of a later version of the format.
    #[error("the frame has format version {0}, which this program does not know: use a newer one")]
    Version(u16),
}

/// What stands before every zstd frame. All integers little endian.
///
/// | offset | bytes | field |
/// |---|---|---|
/// | 0 | 4 | "HSMF" |
/// | 4 | 2 | format version |
/// | 6 | 2 | kind |
/// | 8 | 8 | epoch |
/// | 16 | 8 | segment number |
/// | 24 | 4 | frame number in the segment, from 0 |
/// | 28 | 4 | records |
/// | 32 | 8 | LSN of the first commit, 0 where there is none |
/// | 40 | 4 | commits |
/// | 44 | 4 | length of the zstd frame |
/// | 48 | 4 | length of the records |
/// | 52 | 4 | 0 |
/// | 56 | 8 | bytes of this segment that were known durable when the frame was written |
/// | 64 | 32 | hash of the header before (the first frame: of the segment header's payload) |
/// | 96 | 32 | BLAKE3 of the zstd frame |
/// | 128 | 32 | BLAKE3 of bytes 0 to 127: this header's hash |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// Meta or data.
    pub kind: FrameKind,
    /// The writer.
    pub epoch: Epoch,
    /// The segment it belongs to.
    pub segment: SegmentNo,
    /// Its number in the segment, from 0.
    pub number: u32,
    /// How many records.
    pub records: u32,
    /// LSN of the first commit in it.
    pub first_lsn: Option<Lsn>,
    /// How many commits.
    pub commits: u32,
    /// Length of the zstd frame in bytes.
    pub compressed_len: u32,
    /// Length of the records in bytes.
    pub raw_len: u32,
    /// Durable bytes of the segment when this was written.
    pub durable: u64,
    /// Hash of the header before.
    pub previous: Hash,
    /// BLAKE3 of the zstd frame.
    pub body: Hash,
}

/// The version in every frame header.
pub const FRAME_VERSION: u16 = 1;
const MAGIC: [u8; 4] = *b"HSMF";
const HASHED: usize = 128;
const _: () = assert!(HASHED + Hash::LEN == FRAME_HEADER_LEN);

impl FrameHeader {
    /// The skippable frame: head and payload, and the header's hash.
    pub fn encode(&self) -> ([u8; FRAME_PREFIX_LEN], Hash) {
        let mut out = Vec::with_capacity(FRAME_PREFIX_LEN);
        out.extend(FRAME_MAGIC.to_le_bytes());
        out.extend(160_u32.to_le_bytes());
        out.extend(MAGIC);
        out.extend(FRAME_VERSION.to_le_bytes());
        out.extend((self.kind as u16).to_le_bytes());
        out.extend(self.epoch.0.to_le_bytes());
        out.extend(self.segment.get().to_le_bytes());
        out.extend(self.number.to_le_bytes());
        out.extend(self.records.to_le_bytes());
        out.extend(self.first_lsn.map_or(0, Lsn::get).to_le_bytes());
        out.extend(self.commits.to_le_bytes());
        out.extend(self.compressed_len.to_le_bytes());
        out.extend(self.raw_len.to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.durable.to_le_bytes());
        out.extend(self.previous.0);
        out.extend(self.body.0);
        let hash = Hash::of(&out[SKIPPABLE_HEAD..]);
        out.extend(hash.0);
        let mut bytes = [0; FRAME_PREFIX_LEN];
        bytes.copy_from_slice(&out);
        (bytes, hash)
    }

    /// Checks and reads a skippable frame made by [`Self::encode`]; gives the header and its hash.
    pub fn decode(bytes: &[u8; FRAME_PREFIX_LEN]) -> Result<(Self, Hash), FrameError> {
        let mut at = Cursor(bytes);
        if u32::from_le_bytes(at.take()) != FRAME_MAGIC {
            return Err(FrameError::Header("its magic number is missing"));
        }
        if u32::from_le_bytes(at.take()) != 160 {
            return Err(FrameError::Header("its length is not 160"));
        }
        let hash = Hash::of(&bytes[SKIPPABLE_HEAD..SKIPPABLE_HEAD + HASHED]);
        if hash.0 != bytes[SKIPPABLE_HEAD + HASHED..] {
            return Err(FrameError::Header("its hash does not match"));
        }
        if at.take() != MAGIC {
            return Err(FrameError::Header("its mark HSMF is missing"));
        }
        let version = u16::from_le_bytes(at.take());
        if version != FRAME_VERSION {
            return Err(FrameError::Version(version));
        }
        let kind = FrameKind::from_number(u16::from_le_bytes(at.take()).into());
        let header = Self {
            kind: kind.ok_or(FrameError::Header("its kind is unknown"))?,
            epoch: Epoch(u64::from_le_bytes(at.take())),
            segment: SegmentNo::new(u64::from_le_bytes(at.take()))
                .ok_or(FrameError::Header("its segment number is 0"))?,
            number: u32::from_le_bytes(at.take()),
            records: u32::from_le_bytes(at.take()),
            first_lsn: Lsn::new(u64::from_le_bytes(at.take())),
            commits: u32::from_le_bytes(at.take()),
            compressed_len: u32::from_le_bytes(at.take()),
            raw_len: u32::from_le_bytes(at.take()),
            durable: {
                at.take::<4>();
                u64::from_le_bytes(at.take())
            },
            previous: Hash(at.take()),
            body: Hash(at.take()),
        };
        if header.compressed_len as usize > COMPRESSED_MAX || header.raw_len as usize > RAW_MAX {
            return Err(FrameError::Length);
        }
        Ok((header, hash))
    }
}

/// Takes fixed fields from the front of a buffer that is known to be long enough.
pub(crate) struct Cursor<'b>(pub(crate) &'b [u8]);

impl Cursor<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_at(N);
        self.0 = rest;
        let mut field = [0; N];
        field.copy_from_slice(head);
        field
    }
}

/// Where a data record lies within a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DataEntry {
    /// Its name.
    pub id: DataId,
    /// Offset of its content (not of the CBOR around it) in the decompressed frame.
    pub raw_offset: u32,
    /// Bytes of content.
    pub len: u32,
}

/// A frame that is ready to be written: everything but its place in the segment.
#[derive(Clone, Debug)]
pub struct PackedFrame {
    /// Meta or data.
    pub kind: FrameKind,
    /// How many records.
    pub records: u32,
    /// LSN of the first commit in it.
    pub first_lsn: Option<Lsn>,
    /// How many commits.
    pub commits: u32,
    /// Bytes of records.
    pub raw_len: u32,
    /// The zstd frame.
    pub compressed: Vec<u8>,
    /// Its BLAKE3.
    pub body: Hash,
    /// The data records in it, in order.
    pub data: Vec<DataEntry>,
}

/// Compresses frames; one for each thread.
pub struct Packer {
    zstd: zstd::bulk::Compressor<'static>,
}

impl Packer {
    /// `level` as zstd's, 1 to 19.
    pub fn new(level: i32) -> Result<Self, FrameError> {
        let fail = |error: std::io::Error| FrameError::Zstd(error.to_string());
        let mut zstd = zstd::bulk::Compressor::new(level).map_err(fail)?;
        zstd.set_parameter(CParameter::ChecksumFlag(true))
            .map_err(fail)?;
        zstd.set_parameter(CParameter::ContentSizeFlag(true))
            .map_err(fail)?;
        Ok(Self { zstd })
    }

    /// Compresses what the builder holds.
    pub fn pack(&mut self, raw: &RawFrame) -> Result<PackedFrame, FrameError> {
        let compressed = self
            .zstd
            .compress(&raw.bytes)
            .map_err(|error| FrameError::Zstd(error.to_string()))?;
        let raw_len = u32::try_from(raw.bytes.len()).map_err(|_| FrameError::Length)?;
        if raw.bytes.len() > RAW_MAX || compressed.len() > COMPRESSED_MAX {
            return Err(FrameError::Length);
        }
        Ok(PackedFrame {
            kind: raw.kind,
            records: raw.records,
            first_lsn: raw.first_lsn,
            commits: raw.commits,
            raw_len,
            body: Hash::of(&compressed),
            compressed,
            data: raw.data.clone(),
        })
    }
}

/// Checks the compressed bytes against the header and decompresses them.
pub fn unpack(header: &FrameHeader, compressed: &[u8]) -> Result<Vec<u8>, FrameError> {
    if compressed.len() != header.compressed_len as usize {
        return Err(FrameError::Length);
    }
    if Hash::of(compressed) != header.body {
        return Err(FrameError::Hash);
    }
    decompress(compressed, header.raw_len as usize)
}

/// Decompresses one zstd frame of exactly `raw_len` (at most [`RAW_MAX`]) bytes.
pub fn decompress(compressed: &[u8], raw_len: usize) -> Result<Vec<u8>, FrameError> {
    if raw_len > RAW_MAX {
        return Err(FrameError::Length);
    }
    let mut raw = Vec::with_capacity(raw_len);
    let len = zstd::zstd_safe::decompress(&mut raw, compressed)
        .map_err(|code| FrameError::Zstd(get_error_name(code).to_owned()))?;
    if len == raw_len {
        Ok(raw)
    } else {
        Err(FrameError::Length)
    }
}

/// Records on their way into a frame.
#[derive(Debug)]
pub struct RawFrame {
    kind: FrameKind,
    bytes: Vec<u8>,
    records: u32,
    first_lsn: Option<Lsn>,
    commits: u32,
    data: Vec<DataEntry>,
}

impl RawFrame {
    /// An empty frame.
    pub fn new(kind: FrameKind) -> Self {
        Self {
            kind,
            bytes: Vec::new(),
            records: 0,
            first_lsn: None,
            commits: 0,
            data: Vec::new(),
        }
    }

    /// True where nothing has been put in.
    pub fn is_empty(&self) -> bool {
        self.records == 0
    }

    /// Bytes of records so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True where a data record of `len` bytes still fits.
    pub fn fits_data(&self, len: usize) -> bool {
        self.bytes.len() + DATA_OVERHEAD_MAX + len <= RAW_MAX
    }

    /// Appends a data record and returns its content, zeroed, to be filled by the caller.
    /// The caller has asked [`Self::fits_data`]; `len` is 1 to [`CHUNK`].
    pub fn begin_data(&mut self, id: DataId, len: usize) -> &mut [u8] {
        assert!(
            self.kind == FrameKind::Data && self.fits_data(len) && len > 0 && len as u64 <= CHUNK
        );
        let mut enc = Encoder::new(&mut self.bytes);
        // [2, {0: [epoch, number], 2: bytes}], as record::Data encodes it.
        infallible(enc.array(2).and_then(|enc| {
            enc.u64(2)?
                .map(2)?
                .u64(0)?
                .array(2)?
                .u64(id.epoch.0)?
                .u64(id.number)?
                .u64(2)?
                .bytes_len(len as u64)
        }));
        let start = self.bytes.len();
        self.bytes.resize(start + len, 0);
        let entry = DataEntry {
            id,
            raw_offset: u32::try_from(start).unwrap_or(0),
            len: u32::try_from(len).unwrap_or(0),
        };
        self.data.push(entry);
        self.records += 1;
        &mut self.bytes[start..]
    }

    /// Appends a data record.
    pub fn push_data(&mut self, id: DataId, content: &[u8]) {
        self.begin_data(id, content.len()).copy_from_slice(content);
    }

    /// A point to come back to with [`Self::rewind`].
    pub fn mark(&self) -> FrameMark {
        FrameMark {
            bytes: self.bytes.len(),
            records: self.records,
            data: self.data.len(),
        }
    }

    /// Takes back every data record since the mark.
    pub fn rewind(&mut self, mark: FrameMark) {
        self.bytes.truncate(mark.bytes);
        self.records = mark.records;
        self.data.truncate(mark.data);
    }

    /// The data records so far.
    pub fn data(&self) -> &[DataEntry] {
        &self.data
    }

    /// Empties the frame, keeping its memory.
    pub fn clear(&mut self) {
        self.rewind(FrameMark {
            bytes: 0,
            records: 0,
            data: 0,
        });
        self.first_lsn = None;
        self.commits = 0;
    }

    /// Appends an encoded record; false (and nothing done) where it does not fit any more.
    fn push_record(&mut self, encoded: &[u8], commit: Option<Lsn>) -> bool {
        if self.bytes.len() + encoded.len() > RAW_MAX {
            return false;
        }
        self.bytes.extend_from_slice(encoded);
        self.records += 1;
        if let Some(lsn) = commit {
            self.first_lsn.get_or_insert(lsn);
            self.commits += 1;
        }
        true
    }
}

/// See [`RawFrame::mark`].
#[derive(Clone, Copy, Debug)]
pub struct FrameMark {
    bytes: usize,
    records: u32,
    data: usize,
}

/// Lays transactions into meta frames.
pub struct MetaFrames {
    open: RawFrame,
    full: Vec<RawFrame>,
}

impl Default for MetaFrames {
    fn default() -> Self {
        Self {
            open: RawFrame::new(FrameKind::Meta),
            full: Vec::new(),
        }
    }
}

impl MetaFrames {
    /// Appends one record.
    pub fn push(&mut self, record: &Record) -> Result<(), FrameError> {
        let mut encoded = Vec::new();
        record.encode(&mut encoded);
        // The writer decodes what it encoded before it is written.
        if !matches!(Record::decode(&encoded), Ok((ref back, len)) if back == record && len == encoded.len())
        {
            return Err(FrameError::Header(
                "a record does not come back as it was encoded",
            ));
        }
        let commit = if let Record::Commit(commit) = record {
            Some(commit.lsn)
        } else {
            None
        };
        if !self.open.push_record(&encoded, commit) {
            self.full.push(std::mem::replace(
                &mut self.open,
                RawFrame::new(FrameKind::Meta),
            ));
            if !self.open.push_record(&encoded, commit) {
                return Err(FrameError::Length);
            }
        }
        Ok(())
    }

    /// Appends a transaction: its operations and its commit.
    pub fn push_txn(&mut self, txn: &Txn) -> Result<(), FrameError> {
        for op in &txn.ops {
            self.push(&Record::Op(op.clone()))?;
        }
        self.push(&Record::Commit(crate::record::Commit {
            lsn: txn.lsn,
            time: txn.time,
            wall: txn.wall,
            ops: txn.ops.len() as u64,
        }))
    }

    /// Bytes of records so far.
    pub fn len(&self) -> usize {
        self.full.iter().map(RawFrame::len).sum::<usize>() + self.open.len()
    }

    /// True where nothing has been pushed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The frames, none of them empty.
    pub fn finish(self) -> Vec<RawFrame> {
        let mut frames = self.full;
        frames.extend((!self.open.is_empty()).then_some(self.open));
        frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(packed: &PackedFrame) -> FrameHeader {
        FrameHeader {
            kind: packed.kind,
            epoch: Epoch(7),
            segment: SegmentNo::FIRST,
            number: 3,
            records: packed.records,
            first_lsn: packed.first_lsn,
            commits: packed.commits,
            compressed_len: packed.compressed.len().try_into().unwrap(),
            raw_len: packed.raw_len,
            durable: 11,
            previous: Hash::of(b"previous"),
            body: packed.body,
        }
    }

    fn data_frame() -> PackedFrame {
        let mut raw = RawFrame::new(FrameKind::Data);
        raw.push_data(
            DataId {
                epoch: Epoch(7),
                number: 1,
            },
            &vec![5; 70_000],
        );
        let mark = raw.mark();
        raw.push_data(
            DataId {
                epoch: Epoch(7),
                number: 2,
            },
            b"dropped",
        );
        raw.rewind(mark);
        raw.push_data(
            DataId {
                epoch: Epoch(7),
                number: 3,
            },
            b"content",
        );
        Packer::new(1).unwrap().pack(&raw).unwrap()
    }

    #[test]
    fn frames_come_back_and_their_entries_point_at_the_content() {
        let packed = data_frame();
        let header = header(&packed);
        let (bytes, hash) = header.encode();
        assert_eq!(FrameHeader::decode(&bytes).unwrap(), (header, hash));
        let raw = unpack(&header, &packed.compressed).unwrap();
        let records = Record::decode_all(&raw).unwrap();
        assert_eq!(records.len(), 2);
        for (record, entry) in records.iter().zip(&packed.data) {
            let Record::Data(data) = record else {
                panic!("{record:?}")
            };
            assert_eq!(data.id, entry.id);
            let start = entry.raw_offset as usize;
            assert_eq!(raw[start..start + entry.len as usize], data.bytes);
        }
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let packed = data_frame();
        let header = header(&packed);
        let (bytes, _) = header.encode();
        for at in 0..bytes.len() {
            let mut bad = bytes;
            bad[at] ^= 0x10;
            assert!(FrameHeader::decode(&bad).is_err(), "byte {at}");
        }
        for at in 0..packed.compressed.len() {
            let mut bad = packed.compressed.clone();
            bad[at] ^= 1;
            assert!(
                matches!(unpack(&header, &bad), Err(FrameError::Hash)),
                "byte {at}"
            );
        }
        assert!(matches!(
            unpack(&header, &packed.compressed[1..]),
            Err(FrameError::Length)
        ));
    }

    #[test]
    fn a_bomb_is_not_unpacked_beyond_the_header() {
        let bomb = zstd::bulk::compress(&vec![0; 10 * RAW_MAX], 1).unwrap();
        assert!(decompress(&bomb, RAW_MAX).is_err());
        assert!(decompress(&bomb, 10 * RAW_MAX).is_err());
    }
}
