//! Where the log can be read: volumes, and plain directories of segments (a spool).
//!
//! [`Sources`] knows every copy of every segment, refuses what does not belong together (two logs,
//! forks), and reads from the first copy that is whole: a segment's index from one copy, each frame
//! from another where it must be ([`crate::copies`]). It never changes anything on a medium.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use media::directory::{self, DirectoryVolume, Found};
use media::{Object, ObjectName, Volume};
use tierfs::ids::{Hash, LogId, SegmentNo};
use tierfs::scan::Scan;
use tierfs::segment::{ReadAt, Segment};

use crate::copies::SegmentCopies;
use crate::error::Error;

/// Segments whose copies are kept open.
const OPEN_MAX: usize = 16;

/// A place that was given.
pub struct Place {
    path: PathBuf,
    log_id: LogId,
    volume: Option<DirectoryVolume>,
}

impl Place {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The serial, where it is a labelled volume.
    pub fn serial(&self) -> Option<String> {
        self.volume
            .as_ref()
            .map(|volume| volume.label().serial.to_string())
    }

    /// The pool, where it is a labelled volume.
    pub fn pool(&self) -> Option<&str> {
        self.volume
            .as_ref()
            .map(|volume| volume.label().pool.as_str())
    }

    fn file_of(&self, segment: SegmentNo) -> PathBuf {
        self.path.join(if self.volume.is_some() {
            segment.object_name()
        } else {
            segment.file_name()
        })
    }

    pub(crate) fn open(&self, segment: SegmentNo) -> Result<Arc<dyn ReadAt>, String> {
        let Some(volume) = &self.volume else {
            let path = self.file_of(segment);
            return match File::open(&path) {
                Ok(file) => Ok(Arc::new(file)),
                Err(error) => Err(format!("opening {}: {error}", path.display())),
            };
        };
        let name = ObjectName::new(&segment.object_name()).map_err(|error| error.to_string())?;
        match volume.open(&name) {
            Ok(object) => Ok(Arc::new(ObjectBytes(object))),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.volume {
            Some(volume) => write!(
                f,
                "volume {} at {}",
                volume.label().serial,
                self.path.display()
            ),
            None => write!(f, "{}", self.path.display()),
        }
    }
}

/// An object on a volume as tierfs reads it.
pub struct ObjectBytes(pub Arc<dyn Object>);

impl ReadAt for ObjectBytes {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.bytes())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0
            .read_exact_at(offset, buf)
            .map_err(|error| match error {
                media::Error::Short { .. } => io::Error::new(io::ErrorKind::UnexpectedEof, error),
                error => io::Error::other(error),
            })
    }
}

/// One copy of a segment.
#[derive(Clone, Copy, Debug)]
pub struct Copy {
    /// Index into [`Sources::places`].
    pub place: usize,
    /// Size of the file.
    pub bytes: u64,
    /// BLAKE3 of the file as the volume's inventory says; `None` where there is no inventory.
    pub hash: Option<Hash>,
}

/// All places and what they hold.
pub struct Sources {
    log_id: LogId,
    places: Vec<Place>,
    segments: BTreeMap<SegmentNo, Vec<Copy>>,
    warnings: Vec<String>,
    open: Mutex<VecDeque<Arc<SegmentCopies>>>,
}

impl Sources {
    /// Reads the inventories of all places. No segment is read.
    pub fn open(paths: &[PathBuf]) -> Result<Self, Error> {
        let (mut places, mut warnings) = (Vec::<Place>::new(), Vec::new());
        let mut segments = BTreeMap::<SegmentNo, Vec<Copy>>::new();
        for path in paths {
            let (place, found) = look(path, &mut warnings)?;
            if let Some(first) = places.first()
                && first.log_id != place.log_id
            {
                return Err(Error::ForeignLog {
                    path: path.clone(),
                    found: place.log_id,
                    other: first.path.clone(),
                    expected: first.log_id,
                });
            }
            let index = places.len();
            places.push(place);
            for (segment, bytes, hash) in found {
                let copy = Copy {
                    place: index,
                    bytes,
                    hash,
                };
                add(&places, segments.entry(segment).or_default(), segment, copy)?;
            }
        }
        let log_id = places.first().ok_or(Error::NoSource)?.log_id;
        for copies in segments.values_mut() {
            copies.sort_by_key(|copy| copy.hash.is_none());
        }
        Ok(Self {
            log_id,
            places,
            segments,
            warnings,
            open: Mutex::default(),
        })
    }

    /// The log that all places belong to.
    pub fn log_id(&self) -> LogId {
        self.log_id
    }

    /// The places in the order in which they were given.
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// What is odd about the places without being an error: damaged inventory entries and so on.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The numbers of all segments that some place has, ascending.
    pub fn segments(&self) -> impl DoubleEndedIterator<Item = SegmentNo> + '_ {
        self.segments.keys().copied()
    }

    /// The copies of a segment, those with an inventory entry first.
    pub fn copies(&self, segment: SegmentNo) -> &[Copy] {
        self.segments.get(&segment).map_or(&[], Vec::as_slice)
    }

    /// The last segment that some place has.
    pub fn last(&self) -> Option<SegmentNo> {
        self.segments.keys().next_back().copied()
    }

    /// The numbers up to the last segment that no place has.
    pub fn missing(&self) -> Vec<SegmentNo> {
        let (mut missing, mut expected) = (Vec::new(), SegmentNo::FIRST);
        for segment in self.segments() {
            while expected < segment && missing.len() < 1_000_000 {
                missing.push(expected);
                expected = expected.next();
            }
            expected = segment.next();
        }
        missing
    }

    /// The hash that some inventory names for the segment, and where.
    pub fn known_hash(&self, segment: SegmentNo) -> Option<(Hash, &Place)> {
        self.copies(segment)
            .iter()
            .find_map(|copy| Some((copy.hash?, self.places.get(copy.place)?)))
    }

    /// The hash of a segment's plain file: the inventory's, else it is computed from the first copy.
    pub fn hash(&self, segment: SegmentNo) -> Result<Hash, Error> {
        match self.known_hash(segment) {
            Some((hash, _)) => Ok(hash),
            None => self.open_copies(segment)?.hash(),
        }
    }

    /// What messages call the segment: the file of its first copy.
    pub fn name(&self, segment: SegmentNo) -> String {
        let first = self.copies(segment).first();
        let place = first.and_then(|copy| self.places.get(copy.place));
        place.map_or_else(
            || format!("segment {segment}"),
            |place| place.file_of(segment).display().to_string(),
        )
    }

    /// Where there are several copies, one that holds another segment is none.
    fn is_named_right(
        &self,
        bytes: Arc<dyn ReadAt>,
        name: &str,
        segment: SegmentNo,
    ) -> Result<Arc<dyn ReadAt>, String> {
        let several = self.copies(segment).len() > 1;
        match Scan::open(bytes.clone(), name) {
            Ok(scan) if several && scan.header.segment != segment => Err(format!(
                "it holds segment {} under the name of segment {segment}",
                scan.header.segment
            )),
            _ => Ok(bytes),
        }
    }

    /// The copies of a segment, opened for reading its frames.
    pub fn open_copies(&self, segment: SegmentNo) -> Result<Arc<SegmentCopies>, Error> {
        let known = || self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known().iter().find(|copies| copies.number() == segment) {
            return Ok(found.clone());
        }
        // Nobody else is held up where a medium does not answer.
        let copies = self.copies(segment);
        if copies.is_empty() {
            return Err(Error::Missing {
                segments: vec![segment],
                places: self.places.iter().map(ToString::to_string).collect(),
                folded: None,
            });
        }
        let copies = copies.iter().map(|copy| {
            let place = &self.places[copy.place];
            let name = place.file_of(segment).display().to_string();
            let bytes = place
                .open(segment)
                .and_then(|bytes| self.is_named_right(bytes, &name, segment));
            (name, bytes)
        });
        let copies = Arc::new(SegmentCopies::new(segment, copies.collect()));
        let mut open = known();
        if let Some(found) = open.iter().find(|copies| copies.number() == segment) {
            return Ok(found.clone());
        }
        open.push_back(copies.clone());
        if open.len() > OPEN_MAX {
            open.pop_front();
        }
        Ok(copies)
    }

    /// Opens a segment: the index comes from the first copy that has a whole one (where none has,
    /// from reading all copies from front to back), each frame from the first copy where it is whole.
    /// Second, what was wrong on the way.
    pub fn open_segment(&self, segment: SegmentNo) -> Result<(Segment, Vec<String>), Error> {
        self.open_copies(segment)?.segment(self.log_id)
    }
}

type Listing = Vec<(SegmentNo, u64, Option<Hash>)>;

/// What is at a place.
fn look(path: &Path, warnings: &mut Vec<String>) -> Result<(Place, Listing), Error> {
    let no_log = |found| Error::NoLog {
        path: path.to_owned(),
        found,
    };
    match directory::probe(path) {
        Ok(Found::Labelled(volume)) => look_at_volume(path, volume, warnings),
        Ok(Found::Absent) => Err(no_log("there is no such directory")),
        Ok(Found::Empty) => Err(no_log("it is empty")),
        Err(error @ media::Error::Foreign { .. }) => {
            look_at_directory(path)?.ok_or(Error::Media(error))
        }
        Err(error) => Err(error.into()),
    }
}

fn look_at_volume(
    path: &Path,
    volume: DirectoryVolume,
    warnings: &mut Vec<String>,
) -> Result<(Place, Listing), Error> {
    let inventory = volume.inventory()?;
    warnings.extend(inventory.faults.iter().map(ToString::to_string));
    let mut found: Listing = Vec::new();
    for entry in &inventory.entries {
        if let Some(segment) = SegmentNo::from_object_name(entry.name.as_str()) {
            found.push((segment, entry.bytes, Some(Hash(entry.hash))));
        }
    }
    let mut known: BTreeSet<SegmentNo> = found.iter().map(|(segment, ..)| *segment).collect();
    // An object without an inventory entry: its append was interrupted, or the entry is lost. Its
    // frames are checked one by one as all others are.
    let unlisted = inventory.unlisted.iter().map(ObjectName::as_str);
    let damaged = listed_faults(path);
    for name in unlisted.map(str::to_owned).chain(damaged) {
        if let Some(segment) = SegmentNo::from_object_name(&name)
            && known.insert(segment)
        {
            let bytes = std::fs::metadata(path.join(&name)).map_or(0, |meta| meta.len());
            warnings.push(format!(
                "{} has no whole inventory entry, it is used where no other copy is",
                path.join(&name).display()
            ));
            found.push((segment, bytes, None));
        }
    }
    let place = Place {
        path: path.to_owned(),
        log_id: LogId(volume.label().log_id),
        volume: Some(volume),
    };
    Ok((place, found))
}

/// Names of objects that lie on the volume whatever its inventory says.
fn listed_faults(path: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let Ok(groups) = std::fs::read_dir(path.join("segments")) else {
        return names;
    };
    for group in groups.flatten() {
        let Ok(files) = std::fs::read_dir(group.path()) else {
            continue;
        };
        for file in files.flatten() {
            let name = file.file_name().into_string().unwrap_or_default();
            if let Some(segment) = SegmentNo::from_file_name(&name) {
                names.push(segment.object_name());
            }
        }
    }
    names
}

/// A directory without a label: `None` where it holds no segments.
fn look_at_directory(path: &Path) -> Result<Option<(Place, Listing)>, Error> {
    let failed = |source| media_io(path, source);
    let mut found: Listing = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        if let Some(segment) = name.to_str().and_then(SegmentNo::from_file_name) {
            let bytes = entry.metadata().map_err(failed)?.len();
            found.push((segment, bytes, None));
        }
    }
    found.sort_unstable_by_key(|(segment, ..)| *segment);
    let mut first_error = None;
    for (segment, ..) in &found {
        let file = path.join(segment.file_name());
        let opened = File::open(&file).map_err(failed)?;
        match Scan::open(Arc::new(opened), file.display().to_string()) {
            Ok(scan) => {
                let place = Place {
                    path: path.to_owned(),
                    log_id: scan.header.log_id,
                    volume: None,
                };
                return Ok(Some((place, found)));
            }
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    first_error.map_or(Ok(None), |error| Err(error.into()))
}

fn media_io(path: &Path, source: io::Error) -> Error {
    Error::Media(media::Error::Io {
        path: path.to_owned(),
        what: "listing".to_owned(),
        source,
    })
}

/// Adds a copy, unless it contradicts one that is there.
fn add(
    places: &[Place],
    copies: &mut Vec<Copy>,
    segment: SegmentNo,
    copy: Copy,
) -> Result<(), Error> {
    let name = |copy: &Copy, hash: Hash| format!("{hash} on {}", places[copy.place]);
    for other in copies.iter() {
        if let (Some(known), Some(found)) = (other.hash, copy.hash)
            && known != found
        {
            return Err(Error::Fork {
                segment,
                first: name(other, known),
                second: name(&copy, found),
            });
        }
    }
    copies.push(copy);
    Ok(())
}
