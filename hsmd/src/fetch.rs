//! Fetching logged content: data records from spool and volumes, each piece compared with its hash.
//!
//! Everybody who needs content while the daemon runs (recall, `tierctl log cat`) gets it here. Of a
//! frame that is damaged on one copy another copy is read; what lies in the spool's open segment, which
//! no list of segments names, is read there. Where a segment cannot be found at the places that were
//! known, the places are looked up once more: segments move from the spool to the volumes, and volumes
//! come back.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use media::Volume;
use media::directory::{self, Found};
use replay::sources::Sources;
use tierfs::LogId;
use tierfs::catalog::{DataLocation, ExtentRow, Queries};
use tierfs::ids::{FileId, SegmentNo};
use tierfs::record::Record;
use tierfs::scan::{Scan, Step};

use crate::shared::lock;

/// The places are not looked up again more often than this.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Why content cannot be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// No copy is within reach now: a volume is away.
    #[error("{0}")]
    Away(String),
    /// The log or catalog does not have it, or all copies within reach are damaged.
    #[error("{0}")]
    Damaged(String),
}

/// What is known of copies, and who hears of damage.
pub trait Copies: Send + Sync {
    /// Volumes that have a good copy of a segment, at hand or not: how people call each, and its place.
    fn holders(&self, segment: SegmentNo) -> Vec<(String, PathBuf)>;
    /// A copy of a segment is not what was logged, or cannot be read.
    fn doubt(&self, segment: SegmentNo, why: &str);
}

/// Nothing is known of copies, and nobody hears of damage.
pub struct Nobodys;

impl Copies for Nobodys {
    fn holders(&self, _: SegmentNo) -> Vec<(String, PathBuf)> {
        Vec::new()
    }

    fn doubt(&self, _: SegmentNo, _: &str) {}
}

/// Looks up where sealed segments can be read now.
pub type Look = Box<dyn Fn() -> Result<Arc<Sources>, String> + Send + Sync>;

/// Spool and volumes of a log as they are now. The spool's open segment, which has no index yet, is not
/// among them.
pub fn sources(spool: &Path, volumes: &[PathBuf], log_id: LogId) -> Result<Sources, replay::Error> {
    let holds_segments = |spool: &Path| {
        fs::read_dir(spool).is_ok_and(|entries| {
            entries.flatten().any(|entry| {
                let name = entry.file_name();
                name.to_str()
                    .is_some_and(|name| SegmentNo::from_file_name(name).is_some())
            })
        })
    };
    let mut places = Vec::new();
    if holds_segments(spool) {
        places.push(spool.to_owned());
    }
    let of_this_log = |path: &&PathBuf| {
        matches!(directory::probe(path), Ok(Found::Labelled(volume))
            if volume.label().log_id == log_id.0)
    };
    places.extend(volumes.iter().filter(of_this_log).cloned());
    Sources::open(&places)
}

/// A decompressed frame, or a place for it: who comes while somebody fetches it waits for that.
struct Frame {
    segment: SegmentNo,
    offset: u64,
    records: OnceLock<Result<Vec<Record>, FetchError>>,
}

impl Frame {
    fn records(&self) -> &[Record] {
        match self.records.get() {
            Some(Ok(records)) => records,
            _ => &[],
        }
    }

    fn data(&self, record: usize) -> &[u8] {
        match self.records().get(record) {
            Some(Record::Data(data)) => &data.bytes,
            _ => &[],
        }
    }
}

/// Bytes of content, where they came from: nothing is copied.
pub struct Content {
    frame: Arc<Frame>,
    record: usize,
    extent: ExtentRow,
}

impl Deref for Content {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let record = self.frame.data(self.record);
        self.extent.slice_of(record).unwrap_or_default()
    }
}

struct Known {
    /// Sealed segments; or why there are none to be read.
    sources: Result<Arc<Sources>, String>,
    looked: Instant,
}

/// See the module. Used by any number of threads at once.
pub struct Fetcher {
    spool: PathBuf,
    look: Look,
    copies: Arc<dyn Copies>,
    /// Decompressed frames that are kept at most.
    kept: usize,
    known: Mutex<Option<Known>>,
    looking: Mutex<()>,
    frames: Mutex<VecDeque<Arc<Frame>>>,
}

impl Fetcher {
    /// Nothing is looked up yet. Up to `kept` decompressed frames (1 MiB each) are kept: small files
    /// that were written together lie together.
    pub fn new(spool: PathBuf, look: Look, copies: Arc<dyn Copies>, kept: usize) -> Self {
        Self {
            spool,
            look,
            copies,
            kept: kept.max(1),
            known: Mutex::default(),
            looking: Mutex::default(),
            frames: Mutex::default(),
        }
    }

    /// The bytes of an extent, each piece compared with its hash.
    pub fn extent(
        &self,
        queries: Queries<'_>,
        file: FileId,
        extent: &ExtentRow,
    ) -> Result<Content, FetchError> {
        let told = |why: &str| {
            format!(
                "the content of file {file} at byte {} cannot be read: {why}; bring the volume that has another copy, or check with `tierctl volume verify`",
                extent.range.offset
            )
        };
        let damaged = |why: &str| FetchError::Damaged(told(why));
        let place = queries
            .data(extent.data)
            .map_err(|error| FetchError::Damaged(error.to_string()))?
            .ok_or_else(|| damaged(&format!("no segment has data record {}", extent.data)))?;
        let frame = self.frame(place).map_err(|error| match error {
            FetchError::Away(why) => FetchError::Away(told(&why)),
            FetchError::Damaged(why) => damaged(&why),
        })?;
        let is_it =
            |record: &Record| matches!(record, Record::Data(data) if data.id == extent.data);
        let record = frame.records().iter().position(is_it).ok_or_else(|| {
            damaged(&format!(
                "data record {} is not in segment {} at byte {}",
                extent.data, place.segment, place.frame_offset
            ))
        })?;
        let bytes = extent.slice_of(frame.data(record));
        let bytes = bytes.ok_or_else(|| damaged("the data record is too short"))?;
        extent.check(bytes).map_err(|why| damaged(&why))?;
        Ok(Content {
            frame,
            record,
            extent: extent.clone(),
        })
    }

    /// A frame, kept from before or fetched, once for all who want it now.
    fn frame(&self, place: DataLocation) -> Result<Arc<Frame>, FetchError> {
        let (segment, offset) = (place.segment, place.frame_offset);
        let frame = self.kept(segment, offset);
        let records = frame.records.get_or_init(|| {
            let begun = Instant::now();
            self.records(segment, offset, None)
                .or_else(|_| self.records(segment, offset, begun.checked_sub(LOOK_AGAIN)))
                .or_else(|error| match error {
                    // What cannot be read may have gone since its place was looked up.
                    FetchError::Damaged(_) => self.records(segment, offset, Some(begun)),
                    away @ FetchError::Away(_) => Err(away),
                })
        });
        match records {
            Ok(_) => Ok(frame),
            Err(error) => {
                let error = error.clone();
                // The next one tries it again.
                lock(&self.frames).retain(|other| !Arc::ptr_eq(other, &frame));
                Err(error)
            }
        }
    }

    /// The place of a frame among those that are kept; what was used last goes last.
    fn kept(&self, segment: SegmentNo, offset: u64) -> Arc<Frame> {
        let mut frames = lock(&self.frames);
        let known = |frame: &Arc<Frame>| frame.segment == segment && frame.offset == offset;
        let found = frames.iter().position(known);
        let frame = found.and_then(|at| frames.remove(at)).unwrap_or_else(|| {
            Arc::new(Frame {
                segment,
                offset,
                records: OnceLock::new(),
            })
        });
        frames.push_front(frame.clone());
        frames.truncate(self.kept);
        frame
    }

    /// Gives back what decompressed frames take.
    pub fn forget(&self) {
        lock(&self.frames).clear();
    }

    /// The places, looked up again where that was not done since then.
    fn sources(&self, since: Option<Instant>) -> Result<Arc<Sources>, String> {
        let known = || {
            let known = lock(&self.known);
            let known = known.as_ref();
            let known = known.filter(|known| since.is_none_or(|since| known.looked >= since));
            known.map(|known| known.sources.clone())
        };
        if let Some(sources) = known() {
            return sources;
        }
        // Whoever is content with what is known does not wait for a place that does not answer.
        let looking = lock(&self.looking);
        if let Some(sources) = known() {
            return sources;
        }
        let sources = (self.look)();
        *lock(&self.known) = Some(Known {
            sources: sources.clone(),
            looked: Instant::now(),
        });
        drop(looking);
        sources
    }

    fn records(
        &self,
        segment: SegmentNo,
        offset: u64,
        since: Option<Instant>,
    ) -> Result<Vec<Record>, FetchError> {
        let sources = self.sources(since);
        let has_copy = |sources: &Arc<Sources>| !sources.copies(segment).is_empty();
        if !sources.as_ref().is_ok_and(has_copy)
            && let Some(records) =
                open_frame(&self.spool, segment, offset).map_err(FetchError::Damaged)?
        {
            return Ok(records);
        }
        let absent = self.absent(segment, sources.as_ref().ok());
        let away = |why: String| match &absent {
            None => FetchError::Away(format!("segment {segment} is within reach nowhere: {why}")),
            Some(absent) => FetchError::Away(format!(
                "segment {segment} is on {absent}, which is not here"
            )),
        };
        let sources = sources.map_err(away)?;
        if !has_copy(&sources) {
            let places: Vec<_> = sources.places().iter().map(ToString::to_string).collect();
            return Err(away(format!("not on {}", places.join(", "))));
        }
        let copies = sources
            .open_copies(segment)
            .map_err(|error| away(error.to_string()))?;
        let decode = |raw: Vec<u8>| Record::decode_all(&raw).map_err(|error| error.to_string());
        match copies.frame_checked(offset, decode) {
            Ok((records, causes)) => {
                if !causes.is_empty() {
                    self.copies.doubt(segment, &causes.join("; "));
                }
                Ok(records)
            }
            Err(why) => {
                self.copies.doubt(segment, &why);
                Err(match absent {
                    None => FetchError::Damaged(why),
                    Some(absent) => FetchError::Away(format!(
                        "{why}; another copy is on {absent}, which is not here"
                    )),
                })
            }
        }
    }

    /// Volumes with a good copy of a segment that are not at hand.
    fn absent(&self, segment: SegmentNo, sources: Option<&Arc<Sources>>) -> Option<String> {
        let is_here = |path: &Path| {
            sources.is_some_and(|sources| {
                let mut copies = sources.copies(segment).iter();
                copies.any(|copy| {
                    let place = sources.places().get(copy.place);
                    place.is_some_and(|place| place.path() == path)
                })
            })
        };
        let holders = self.copies.holders(segment);
        let absent = holders.into_iter().filter(|(_, path)| !is_here(path));
        let names: Vec<String> = absent.map(|(name, _)| name).collect();
        (!names.is_empty()).then(|| names.join(", or on "))
    }
}

/// The records of a frame in the spool's open segment; `None` where there is no such file.
pub fn open_frame(
    spool: &Path,
    segment: SegmentNo,
    offset: u64,
) -> Result<Option<Vec<Record>>, String> {
    let Some((mut scan, name)) = open_segment(spool, segment)? else {
        return Ok(None);
    };
    scan.offset = offset;
    scan.chain = None;
    match scan.next_frame().map_err(|error| error.to_string())? {
        Step::Frame(found) => Ok(Some(found.records)),
        Step::Stop(_) => Err(format!("{name} has no whole frame at byte {offset}")),
    }
}

/// A scan of the spool's open segment from its front, where that is the one.
pub fn open_segment(spool: &Path, segment: SegmentNo) -> Result<Option<(Scan, String)>, String> {
    let prefix = format!("{:010}.open-", segment.get());
    let failed = |error: std::io::Error| format!("reading {}: {error}", spool.display());
    for entry in fs::read_dir(spool).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let is_it = path.file_name().and_then(|name| name.to_str());
        if is_it.is_some_and(|name| name.starts_with(&prefix)) {
            let name = path.display().to_string();
            let file = File::open(&path).map_err(|error| format!("opening {name}: {error}"))?;
            let scan =
                Scan::open(Arc::new(file), name.clone()).map_err(|error| error.to_string())?;
            return Ok(Some((scan, name)));
        }
    }
    Ok(None)
}
