//! The segment that is being written: its bytes, its hash, its frames so far.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{AppendError, SealedSegment, Unsealed, is_full};
use crate::disk::{Disk, DiskFile};
use crate::frame::{
    FRAME_PREFIX_LEN, FrameError, FrameHeader, FrameKind, MetaFrames, PackedFrame, Packer,
};
use crate::ids::{Hash, Lsn, Time};
use crate::record::{Record, SegmentHeader};
use crate::segment::{self, FrameEntry, Index, TRAILER_LEN, Trailer};
use crate::spool::names::Name;

/// Space is reserved ahead in steps of this many bytes.
const RESERVE_STEP: u64 = 4 * 1024 * 1024;
/// The most bytes of an index around its entries.
const INDEX_OVERHEAD: u64 = 64;
/// The most bytes of a frame's entry in the index, without its data.
const ENTRY_MAX: u64 = 48;
/// The most bytes of a data record in the index, and of the head of a run of one epoch.
const DATA_MAX: u64 = 19;
const GROUP_MAX: u64 = 20;

pub(crate) struct OpenSegment<D: Disk> {
    pub(crate) reader: Arc<Unsealed<D>>,
    /// Bytes written, all of them whole frames.
    pub(crate) written: u64,
    /// Bytes that jobs have taken.
    pub(crate) taken: u64,
    /// Bytes known to be durable.
    pub(crate) durable: u64,
    /// Bytes of space that are reserved.
    reserved: u64,
    /// At most so many bytes will index and trailer have.
    end_max: u64,
    hasher: blake3::Hasher,
    chain: Hash,
    frames: u32,
    first_lsn: Option<Lsn>,
    last_lsn: Option<Lsn>,
}

/// The most bytes that a frame adds to the index.
fn entry_max(frame: &PackedFrame) -> u64 {
    let groups = frame.data.chunk_by(|a, b| a.id.epoch == b.id.epoch).count() as u64;
    ENTRY_MAX + groups * GROUP_MAX + frame.data.len() as u64 * DATA_MAX
}

impl<D: Disk> OpenSegment<D> {
    /// Creates the file and writes the header and the first frame, which repeats it.
    pub(crate) fn begin(
        disk: &D,
        header: SegmentHeader,
        packer: &mut Packer,
    ) -> Result<Self, AppendError> {
        let (bytes, chain) = segment::encode_header(&header);
        if bytes.len() > segment::HEADER_MAX {
            return Err(FrameError::Length.into());
        }
        let mut repeated = MetaFrames::default();
        repeated.push(&Record::Segment(header.clone()))?;
        let frames: Result<Vec<_>, FrameError> = repeated
            .finish()
            .iter()
            .map(|raw| packer.pack(raw))
            .collect();
        let name = Name::Open(header.segment, header.epoch).to_string();
        let file = disk.create(&name).map_err(|source| {
            if is_full(&source) {
                AppendError::Full { source, need: 0 }
            } else {
                AppendError::Failed {
                    name: name.clone(),
                    doing: "creating",
                    source,
                }
            }
        })?;
        let mut open = Self {
            reader: Arc::new(Unsealed {
                file: Arc::new(file),
                name: name.clone(),
                header,
                frames: Mutex::default(),
                bytes: AtomicU64::new(0),
            }),
            written: 0,
            taken: 0,
            durable: 0,
            reserved: 0,
            end_max: INDEX_OVERHEAD + TRAILER_LEN as u64 + 64,
            hasher: blake3::Hasher::new(),
            chain,
            frames: 0,
            first_lsn: None,
            last_lsn: None,
        };
        let begun = open
            .write(&[&bytes], bytes.len() as u64)
            .and_then(|()| open.append(&frames?, 0));
        match begun {
            Ok(_) => Ok(open),
            // A segment of which nothing was said to anybody is taken back whole.
            Err(AppendError::Full { source, need }) => match disk.remove(&name) {
                Ok(()) => Err(AppendError::Full { source, need }),
                Err(error) => Err(open.reader.fail("removing")(error)),
            },
            Err(error) => Err(error),
        }
    }

    /// Whether there is more than the repeated header.
    pub(crate) fn holds_something(&self) -> bool {
        self.frames > 1
    }

    /// Whether `need` more bytes keep the segment within its size. One that holds nothing takes all.
    pub(crate) fn fits(&self, need: u64, limit: u64) -> bool {
        !self.holds_something() || self.written + need + self.end_max <= limit
    }

    /// Appends whole frames with one write; gives their offsets. All or (full disk) none.
    pub(crate) fn append(
        &mut self,
        frames: &[PackedFrame],
        limit: u64,
    ) -> Result<Vec<u64>, AppendError> {
        let mut at = self.written;
        let (mut chain, mut number) = (self.chain, self.frames);
        let mut prefixes = Vec::with_capacity(frames.len());
        let mut entries = Vec::with_capacity(frames.len());
        let mut end_max = self.end_max;
        for frame in frames {
            let (prefix, hash) = self.header_of(frame, number, chain)?.encode();
            entries.push(FrameEntry::new(at, frame));
            prefixes.push(prefix);
            at += (FRAME_PREFIX_LEN + frame.compressed.len()) as u64;
            number = number.checked_add(1).ok_or(FrameError::Length)?;
            chain = hash;
            end_max += entry_max(frame);
        }
        if end_max > segment::INDEX_MAX {
            return Err(FrameError::Length.into());
        }
        self.reserve(at + end_max, limit)?;
        let parts: Vec<&[u8]> = prefixes
            .iter()
            .zip(frames)
            .flat_map(|(prefix, frame)| [&prefix[..], &frame.compressed[..]])
            .collect();
        self.write(&parts, at - self.written)?;
        (self.chain, self.frames, self.end_max) = (chain, number, end_max);
        for frame in frames {
            self.count(frame);
        }
        let offsets = entries.iter().map(|entry| entry.offset).collect();
        self.entries().extend(entries);
        Ok(offsets)
    }

    fn header_of(
        &self,
        frame: &PackedFrame,
        number: u32,
        previous: Hash,
    ) -> Result<FrameHeader, FrameError> {
        Ok(FrameHeader {
            kind: frame.kind,
            epoch: self.reader.header.epoch,
            segment: self.reader.header.segment,
            number,
            records: frame.records,
            first_lsn: frame.first_lsn,
            commits: frame.commits,
            compressed_len: u32::try_from(frame.compressed.len())
                .map_err(|_| FrameError::Length)?,
            raw_len: frame.raw_len,
            durable: self.durable,
            previous,
            body: frame.body,
        })
    }

    fn count(&mut self, frame: &PackedFrame) {
        if frame.kind == FrameKind::Meta
            && let Some(first) = frame.first_lsn
        {
            self.first_lsn.get_or_insert(first);
            self.last_lsn = Lsn::new(first.get() + u64::from(frame.commits) - 1);
        }
    }

    fn entries(&self) -> std::sync::MutexGuard<'_, Vec<FrameEntry>> {
        self.reader
            .frames
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Space for `target` bytes, so that index and trailer still fit when the disk is full.
    fn reserve(&mut self, target: u64, limit: u64) -> Result<(), AppendError> {
        if target <= self.reserved {
            return Ok(());
        }
        let ahead = (target + RESERVE_STEP).min(limit.max(target));
        for want in [ahead, target] {
            match self.reader.file.reserve(want) {
                Ok(()) => {
                    self.reserved = want;
                    return Ok(());
                }
                Err(error) if is_full(&error) && want != target => {}
                Err(source) if is_full(&source) => {
                    let need = target - self.written;
                    return Err(AppendError::Full { source, need });
                }
                Err(error) => return Err(self.reader.fail("reserving space for")(error)),
            }
        }
        Ok(())
    }

    fn write(&mut self, parts: &[&[u8]], len: u64) -> Result<(), AppendError> {
        match self.reader.file.write_all_at(parts, self.written) {
            Ok(()) => {}
            Err(error) if is_full(&error) => {
                // Cutting off gives reserved space back as well.
                self.reserved = 0;
                return Err(self.reader.take_back(self.written, len, error));
            }
            Err(error) => return Err(self.reader.fail("writing")(error)),
        }
        for part in parts {
            self.hasher.update(part);
        }
        self.written += len;
        self.reader.bytes.store(self.written, Ordering::Relaxed);
        Ok(())
    }

    /// Writes index and trailer. The segment takes no more frames.
    pub(crate) fn end(&mut self, now: Time) -> Result<SealedSegment, AppendError> {
        let header = &self.reader.header;
        let trailer = Trailer {
            epoch: header.epoch,
            segment: header.segment,
            index_offset: self.written,
            index_len: 0,
            frames: self.frames,
            first_lsn: self.first_lsn,
            last_lsn: self.last_lsn,
            sealed_at: u64::try_from(now.seconds).unwrap_or(0),
        };
        let index = Index {
            frames: self.entries().clone(),
        };
        let end = segment::encode_end(&index, trailer)?;
        self.write(&[&end], end.len() as u64)?;
        let header = &self.reader.header;
        Ok(SealedSegment {
            no: header.segment,
            hash: self.hasher.finalize().into(),
            bytes: self.written,
            epoch: header.epoch,
            first_lsn: header.first_lsn,
            last_lsn: self.last_lsn,
            file_name: header.segment.file_name(),
            sealed_at: now,
        })
    }
}
