//! A log made by hand: records into frames, frames into segments, segments into directories.

use std::path::{Path, PathBuf};

use tierfs::frame::{FrameHeader, FrameKind, MetaFrames, PackedFrame, Packer, RawFrame};
use tierfs::ids::{DataId, Epoch, FileId, Hash, LogId, Lsn, SegmentNo, Time};
use tierfs::layout::{self, Range, RootHasher};
use tierfs::record::{Content, Extent, Extents, Filesystem, Op, Record, SegmentHeader, Txn};
use tierfs::segment::{self, FORMAT_VERSION, FrameEntry, Index, Trailer};

pub const LOG: LogId = LogId([0x5a; 16]);
const EPOCH: Epoch = Epoch(77);

/// Writes sealed segments into a directory.
pub struct LogWriter {
    pub dir: PathBuf,
    pub log_id: LogId,
    pub epoch: Epoch,
    /// Segments are sealed when they reach it.
    pub segment_bytes: u64,
    pub next_lsn: Lsn,
    pub next_file: FileId,
    next_data: u64,
    segment: SegmentNo,
    previous: Option<Hash>,
    bytes: Vec<u8>,
    frames: Vec<FrameEntry>,
    chain: Hash,
    data: RawFrame,
    /// Commits wait until a data frame is full, as a writer's do that has much to log.
    pub lazy: bool,
    queue: Vec<Txn>,
    packer: Packer,
    first: Option<Lsn>,
    last: Option<Lsn>,
    pub time: i64,
    /// Hashes of the sealed segments.
    pub sealed: Vec<(SegmentNo, Hash)>,
}

impl LogWriter {
    pub fn new(dir: &Path) -> Self {
        std::fs::create_dir_all(dir).unwrap();
        let mut log = Self {
            dir: dir.to_owned(),
            log_id: LOG,
            epoch: EPOCH,
            segment_bytes: 8 << 20,
            next_lsn: Lsn::FIRST,
            next_file: FileId::ROOT,
            next_data: 0,
            segment: SegmentNo::FIRST,
            previous: None,
            bytes: Vec::new(),
            frames: Vec::new(),
            chain: Hash([0; 32]),
            data: RawFrame::new(FrameKind::Data),
            lazy: false,
            queue: Vec::new(),
            packer: Packer::new(1).unwrap(),
            first: None,
            last: None,
            time: 1_000_000,
            sealed: Vec::new(),
        };
        log.begin();
        log
    }

    /// The same log for another writer id: for forks.
    pub fn with_epoch(dir: &Path, epoch: u64) -> Self {
        let mut log = Self::new(dir);
        log.epoch = Epoch(epoch);
        log.bytes.clear();
        log.frames.clear();
        log.begin();
        log
    }

    fn header(&self) -> SegmentHeader {
        SegmentHeader {
            version: FORMAT_VERSION,
            log_id: self.log_id,
            epoch: self.epoch,
            segment: self.segment,
            previous: self.previous,
            predecessor: None,
            first_lsn: self.next_lsn,
            time: Time::default(),
            fs_uuid: [1; 16],
            fs_type: "ext4".into(),
            host: None,
        }
    }

    fn begin(&mut self) {
        let (bytes, hash) = segment::encode_header(&self.header());
        (self.bytes, self.chain) = (bytes, hash);
        let mut frames = MetaFrames::default();
        frames.push(&Record::Segment(self.header())).unwrap();
        self.meta(frames);
    }

    fn meta(&mut self, frames: MetaFrames) {
        for raw in frames.finish() {
            let packed = self.packer.pack(&raw).unwrap();
            self.put(&packed);
        }
    }

    fn put(&mut self, packed: &PackedFrame) {
        let header = FrameHeader {
            kind: packed.kind,
            epoch: self.epoch,
            segment: self.segment,
            number: u32::try_from(self.frames.len()).unwrap(),
            records: packed.records,
            first_lsn: packed.first_lsn,
            commits: packed.commits,
            compressed_len: u32::try_from(packed.compressed.len()).unwrap(),
            raw_len: packed.raw_len,
            durable: 0,
            previous: self.chain,
            body: packed.body,
        };
        let (prefix, hash) = header.encode();
        self.chain = hash;
        self.frames
            .push(FrameEntry::new(self.bytes.len() as u64, packed));
        self.bytes.extend(prefix);
        self.bytes.extend(&packed.compressed);
    }

    /// Writes the data frame that is being filled, and the commits that wait for it.
    pub fn flush(&mut self) {
        if !self.data.is_empty() {
            let packed = self.packer.pack(&self.data).unwrap();
            self.data.clear();
            self.put(&packed);
        }
        let mut frames = MetaFrames::default();
        for txn in std::mem::take(&mut self.queue) {
            self.first.get_or_insert(txn.lsn);
            self.last = Some(txn.lsn);
            frames.push_txn(&txn).unwrap();
        }
        self.meta(frames);
    }

    fn id(&mut self) -> DataId {
        self.next_data += 1;
        DataId {
            epoch: self.epoch,
            number: self.next_data - 1,
        }
    }

    /// Logs a contiguous range of content, and gives its extent.
    pub fn extent(&mut self, offset: u64, bytes: &[u8]) -> Extent {
        let range = Range {
            offset,
            len: bytes.len() as u64,
        };
        let at = |range: Range| {
            let start = usize::try_from(range.offset - offset).unwrap();
            &bytes[start..start + usize::try_from(range.len).unwrap()]
        };
        let mut first = None;
        for chunk in layout::chunks(range) {
            let id = self.id();
            first.get_or_insert(id);
            if !self.data.fits_data(at(chunk).len()) {
                self.flush();
                if self.bytes.len() as u64 > self.segment_bytes {
                    self.seal();
                }
            }
            self.data.push_data(id, at(chunk));
        }
        Extent::Data {
            range,
            first: first.unwrap(),
            hashes: layout::pieces(range)
                .map(|piece| Hash::of(at(piece)))
                .collect(),
        }
    }

    /// Logs data again at another place, under the same id: what reclaiming does.
    pub fn again(&mut self, id: DataId, bytes: &[u8]) {
        self.flush();
        self.data.push_data(id, bytes);
        self.flush();
    }

    /// The operations of a new version: `parts` are (offset, bytes), the rest are holes.
    pub fn content(&mut self, file: FileId, size: u64, parts: &[(u64, &[u8])]) -> Vec<Op> {
        let (mut list, mut root, mut at) = (Vec::new(), RootHasher::default(), 0);
        let hole = |from: u64, to: u64| {
            Extent::Hole(Range {
                offset: from,
                len: to - from,
            })
        };
        for (offset, bytes) in parts {
            if *offset > at {
                list.push(hole(at, *offset));
            }
            let extent = self.extent(*offset, bytes);
            if let Extent::Data { range, hashes, .. } = &extent {
                root.pieces(*range, hashes);
            }
            at = extent.range().end();
            list.push(extent);
        }
        if at < size {
            list.push(hole(at, size));
        }
        let mut ops: Vec<Op> = list
            .chunks(256)
            .map(|list| {
                Op::Extents(Extents {
                    file,
                    list: list.to_vec(),
                })
            })
            .collect();
        ops.push(Op::Content(Content {
            file,
            size,
            base: None,
            root: root.finish(size),
            fuzzy: false,
        }));
        ops
    }

    /// A new file's id.
    pub fn file(&mut self) -> FileId {
        let file = self.next_file;
        self.next_file = file.next();
        file
    }

    /// Commits a transaction; its data lies before it.
    pub fn commit(&mut self, ops: Vec<Op>) -> Lsn {
        let lsn = self.next_lsn;
        self.next_lsn = lsn.next();
        self.time += 1;
        let time = Time {
            seconds: self.time,
            nanos: 0,
        };
        self.queue.push(Txn {
            lsn,
            time,
            wall: time,
            ops,
        });
        if !self.lazy || self.queue.len() > 2000 {
            self.flush();
        }
        if self.bytes.len() as u64 > self.segment_bytes {
            self.seal();
        }
        lsn
    }

    /// The record that begins every log of a filesystem.
    pub fn filesystem() -> Op {
        Op::Filesystem(Filesystem {
            uuid: [1; 16],
            fs_type: "ext4".into(),
            mount: None,
        })
    }

    /// Seals the segment and begins the next; gives the path of its file.
    pub fn seal(&mut self) -> PathBuf {
        self.flush();
        let trailer = Trailer {
            epoch: self.epoch,
            segment: self.segment,
            index_offset: self.bytes.len() as u64,
            index_len: 0,
            frames: u32::try_from(self.frames.len()).unwrap(),
            first_lsn: self.first,
            last_lsn: self.last,
            sealed_at: 5,
        };
        let index = Index {
            frames: std::mem::take(&mut self.frames),
        };
        let end = segment::encode_end(&index, trailer).unwrap();
        self.bytes.extend(end);
        let path = self.dir.join(self.segment.file_name());
        std::fs::write(&path, &self.bytes).unwrap();
        let hash = Hash::of(&self.bytes);
        self.previous = Some(hash);
        self.sealed.push((self.segment, hash));
        self.segment = self.segment.next();
        (self.first, self.last) = (None, None);
        self.begin();
        path
    }
}

/// Makes a labelled volume of a directory of segments.
pub fn volume(segments: &Path, at: &Path, log_id: LogId) {
    use media::Volume;
    std::fs::create_dir_all(at).unwrap();
    let label = media::Label {
        format: media::FORMAT,
        log_id: log_id.0,
        pool: "test".into(),
        serial: media::Serial::random().unwrap(),
        barcode: None,
        created: "2026-01-02T03:04:05Z".into(),
    };
    media::directory::label(at, &label, &[]).unwrap();
    let media::directory::Found::Labelled(volume) = media::directory::probe(at).unwrap() else {
        panic!("no label at {}", at.display());
    };
    for entry in std::fs::read_dir(segments).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Some(no) = SegmentNo::from_file_name(&name) else {
            continue;
        };
        let bytes = std::fs::read(segments.join(&name)).unwrap();
        let object = media::ObjectName::new(&no.object_name()).unwrap();
        let hash = Hash::of(&bytes).0;
        volume
            .append(&object, bytes.len() as u64, &hash, &mut bytes.as_slice())
            .unwrap();
    }
}
