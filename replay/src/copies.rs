//! The copies of one segment: a frame that is damaged in one is read from the next.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::{fmt, io};

use tierfs::frame::{self, FRAME_PREFIX_LEN, FrameHeader};
use tierfs::ids::{Hash, LogId, SegmentNo};
use tierfs::scan::Scan;
use tierfs::segment::{ReadAt, Segment, SegmentError};

use crate::error::Error;

/// An opened copy, or why it could not be opened.
pub type OpenCopy = Result<Arc<dyn ReadAt>, String>;

struct Opened {
    name: String,
    bytes: OpenCopy,
}

/// All copies of a segment, opened.
pub struct SegmentCopies {
    number: SegmentNo,
    copies: Vec<Opened>,
    /// The copy that was whole last.
    preferred: AtomicUsize,
}

/// A frame as it lies on the medium: the header is checked, the body is not yet.
pub struct StoredFrame {
    /// The frame's header.
    pub header: FrameHeader,
    /// The zstd frame.
    pub compressed: Vec<u8>,
    /// Which copy it is from.
    pub copy: usize,
}

impl SegmentCopies {
    /// `copies` are names (for messages) and what is open under them, the best first.
    pub fn new(number: SegmentNo, copies: Vec<(String, OpenCopy)>) -> Self {
        let opened = copies
            .into_iter()
            .map(|(name, bytes)| Opened { name, bytes });
        Self {
            number,
            copies: opened.collect(),
            preferred: AtomicUsize::new(0),
        }
    }

    /// The segment's number.
    pub fn number(&self) -> SegmentNo {
        self.number
    }

    /// The indexes of the copies, the preferred one first.
    fn order(&self) -> impl Iterator<Item = usize> + use<> {
        let (first, len) = (self.preferred.load(Ordering::Relaxed), self.copies.len());
        (0..len).map(move |k| (first + k) % len)
    }

    fn read(&self, copy: usize, offset: u64) -> Result<StoredFrame, String> {
        let opened = &self.copies[copy];
        let bytes = opened.bytes.as_ref().map_err(Clone::clone)?;
        let damaged = |what: &dyn fmt::Display| format!("{} at byte {offset}: {what}", opened.name);
        let mut prefix = [0; FRAME_PREFIX_LEN];
        bytes
            .read_exact_at(&mut prefix, offset)
            .map_err(|error| damaged(&error))?;
        let (header, _) = FrameHeader::decode(&prefix).map_err(|error| damaged(&error))?;
        if header.segment != self.number {
            return Err(damaged(&format!(
                "a frame of segment {} lies there",
                header.segment
            )));
        }
        // The header's check has bounded the length.
        let mut compressed = vec![0; header.compressed_len as usize];
        let body = offset.saturating_add(FRAME_PREFIX_LEN as u64);
        bytes
            .read_exact_at(&mut compressed, body)
            .map_err(|error| damaged(&error))?;
        Ok(StoredFrame {
            header,
            compressed,
            copy,
        })
    }

    /// Reads the frame at `offset` of the plain file from the first copy that has a header there.
    /// Its body is for the caller to check; where that fails, [`Self::frame_checked`] helps.
    pub fn frame(&self, offset: u64) -> Result<StoredFrame, String> {
        let mut causes = Vec::new();
        for copy in self.order() {
            match self.read(copy, offset) {
                Ok(frame) => return Ok(frame),
                Err(cause) => causes.push(cause),
            }
        }
        Err(causes.join("; "))
    }

    /// The records of the frame at `offset` from the first copy whose frame is whole and whose
    /// records `accept` takes; else what every copy said. Second, what was wrong with the copies
    /// before that one.
    pub fn frame_checked<T>(
        &self,
        offset: u64,
        mut accept: impl FnMut(Vec<u8>) -> Result<T, String>,
    ) -> Result<(T, Vec<String>), String> {
        let mut causes = Vec::new();
        for copy in self.order() {
            let name = &self.copies[copy].name;
            let taken = self.read(copy, offset).and_then(|stored| {
                let raw = frame::unpack(&stored.header, &stored.compressed)
                    .map_err(|error| error.to_string());
                raw.and_then(&mut accept)
                    .map_err(|error| format!("{name} at byte {offset}: {error}"))
            });
            match taken {
                Ok(value) => {
                    self.preferred.store(copy, Ordering::Relaxed);
                    return Ok((value, causes));
                }
                Err(cause) => causes.push(cause),
            }
        }
        Err(causes.join("; "))
    }

    /// The BLAKE3 of the first copy that can be read to its end.
    pub(crate) fn hash(&self) -> Result<Hash, Error> {
        let mut causes = Vec::new();
        for copy in &self.copies {
            let hash = copy.bytes.as_ref().map_err(Clone::clone);
            match hash.and_then(|bytes| hash_of(&**bytes).map_err(|error| error.to_string())) {
                Ok(hash) => return Ok(hash),
                Err(cause) => causes.push(format!("{}: {cause}", copy.name)),
            }
        }
        Err(Error::AllCopies {
            what: format!("segment {}", self.number),
            causes,
            folded: None,
        })
    }

    /// Opens the segment, see [`crate::sources::Sources::open_segment`].
    pub(crate) fn segment(
        self: &Arc<Self>,
        log_id: LogId,
    ) -> Result<(Segment, Vec<String>), Error> {
        let mut causes = Vec::new();
        for primary in self.order() {
            let reader = Arc::new(Healing {
                copies: self.clone(),
                primary,
                frames: OnceLock::new(),
            });
            match Segment::open(reader.clone(), self.copies[primary].name.clone()) {
                Ok(segment) => {
                    self.check(&segment, log_id)?;
                    let frames = segment.index.frames.iter();
                    let _ = reader.frames.set(
                        frames
                            .map(|entry| (entry.offset, entry.compressed_len))
                            .collect(),
                    );
                    return Ok((segment, causes));
                }
                Err(error @ SegmentError::NewerVersion { .. }) => return Err(error.into()),
                Err(error) => causes.push(error.to_string()),
            }
        }
        self.salvage(log_id, causes)
    }

    /// Reads every copy from front to back, and puts together what is whole in any of them.
    fn salvage(
        self: &Arc<Self>,
        log_id: LogId,
        mut causes: Vec<String>,
    ) -> Result<(Segment, Vec<String>), Error> {
        let mut whole: Option<(Segment, Arc<Healing>)> = None;
        for (primary, copy) in self.copies.iter().enumerate() {
            let reader = Arc::new(Healing {
                copies: self.clone(),
                primary,
                frames: OnceLock::new(),
            });
            let Ok(found) = Segment::salvage(reader.clone(), copy.name.clone()) else {
                continue;
            };
            match &mut whole {
                None => whole = Some((found, reader)),
                Some((whole, _)) => whole.index.frames.extend(found.index.frames),
            }
        }
        let Some((mut segment, reader)) = whole else {
            return Err(Error::AllCopies {
                what: format!("segment {}", self.number),
                causes,
                folded: None,
            });
        };
        self.check(&segment, log_id)?;
        let frames = &mut segment.index.frames;
        frames.sort_by_key(|entry| entry.offset);
        frames.dedup_by_key(|entry| entry.offset);
        causes.push(format!(
            "no copy of segment {} has a whole index: {} frames were found by reading it from front to back",
            self.number,
            frames.len()
        ));
        // They may be of different copies: from now on the reader tries all of them.
        let places = frames
            .iter()
            .map(|entry| (entry.offset, entry.compressed_len));
        let _ = reader.frames.set(places.collect());
        Ok((segment, causes))
    }

    /// Is it this segment of this log, and are the copies without a hash copies of it?
    fn check(&self, segment: &Segment, log_id: LogId) -> Result<(), Error> {
        let fault = |why: String| Error::Log {
            name: segment.name().to_owned(),
            why,
            folded: None,
        };
        let header = &segment.header;
        if header.log_id != log_id {
            return Err(fault(format!(
                "it belongs to log {}, not to {log_id}",
                header.log_id
            )));
        }
        if header.segment != self.number {
            return Err(fault(format!("it holds segment {}", header.segment)));
        }
        for copy in &self.copies {
            let Ok(bytes) = &copy.bytes else { continue };
            let Ok(scan) = Scan::open(bytes.clone(), copy.name.clone()) else {
                continue;
            };
            if (scan.header.epoch, scan.header.previous) != (header.epoch, header.previous) {
                let tell = |epoch, previous: Option<Hash>, name: &str| {
                    let previous =
                        previous.map_or_else(|| "none".to_owned(), |hash| hash.to_string());
                    format!("{name} of writer {epoch} after {previous}")
                };
                return Err(Error::Fork {
                    segment: self.number,
                    first: tell(header.epoch, header.previous, segment.name()),
                    second: tell(scan.header.epoch, scan.header.previous, &copy.name),
                });
            }
        }
        Ok(())
    }
}

/// Reads from one copy; frames (once their places are known) from the first that is whole.
struct Healing {
    copies: Arc<SegmentCopies>,
    primary: usize,
    /// Offset of each frame, and the length of its zstd frame.
    frames: OnceLock<HashMap<u64, u32>>,
}

impl Healing {
    fn primary(&self) -> io::Result<&Arc<dyn ReadAt>> {
        let copy = &self.copies.copies[self.primary];
        copy.bytes
            .as_ref()
            .map_err(|why| io::Error::other(why.clone()))
    }

    fn is_frame(&self, offset: u64, len: usize) -> bool {
        let known = self.frames.get().and_then(|frames| frames.get(&offset));
        known.is_some_and(|body| FRAME_PREFIX_LEN + *body as usize == len)
    }
}

impl ReadAt for Healing {
    fn len(&self) -> io::Result<u64> {
        self.primary()?.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if !self.is_frame(offset, buf.len()) {
            return self.primary()?.read_exact_at(buf, offset);
        }
        let len = self.copies.copies.len();
        let mut causes = Vec::new();
        for copy in (0..len).map(|k| &self.copies.copies[(self.primary + k) % len]) {
            let read = copy.bytes.as_ref().map_err(Clone::clone).and_then(|bytes| {
                bytes
                    .read_exact_at(buf, offset)
                    .map_err(|error| error.to_string())?;
                whole_frame(buf)
            });
            match read {
                Ok(()) => return Ok(()),
                Err(why) => causes.push(format!("{} at byte {offset}: {why}", copy.name)),
            }
        }
        Err(io::Error::other(format!(
            "no copy has this frame whole: {}",
            causes.join("; ")
        )))
    }
}

fn hash_of(bytes: &dyn ReadAt) -> io::Result<Hash> {
    let (mut hasher, mut buf, mut at) = (blake3::Hasher::new(), vec![0; 1024 * 1024], 0);
    let len = bytes.len()?;
    while at < len {
        let step = usize::try_from(len - at)
            .unwrap_or(buf.len())
            .min(buf.len());
        bytes.read_exact_at(&mut buf[..step], at)?;
        hasher.update(&buf[..step]);
        at += step as u64;
    }
    Ok(hasher.finalize().into())
}

/// Do header and body match?
fn whole_frame(bytes: &[u8]) -> Result<(), String> {
    let (prefix, body) = bytes.split_first_chunk().ok_or("it is too short")?;
    let (header, _) = FrameHeader::decode(prefix).map_err(|error| error.to_string())?;
    if header.compressed_len as usize == body.len() && Hash::of(body) == header.body {
        Ok(())
    } else {
        Err("the frame's bytes do not have the hash that its header names".to_owned())
    }
}
