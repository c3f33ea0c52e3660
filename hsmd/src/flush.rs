//! The flushers: one thread for each pool copies sealed segments to the pool's volumes.
//!
//! A pool gets every segment of the log, in order. What counts as copied is what a volume's own
//! inventory lists (each object was read back and verified when it was written); the catalog only
//! remembers it. A volume that is absent or full is waited for and reported, and other pools go on.
//! A segment leaves the spool when every pool has it and the catalog would not need it after a crash.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use media::directory::{self, DirectoryVolume, Found};
use media::{Label, ObjectName, Serial, Volume};
use tierfs::writer::SealedSegment;
use tierfs::{Hash, LogId, SegmentNo};

use crate::committer::Asked;
use crate::control::model::Event;
use crate::control::when::When;
use crate::shared::{Shared, lock};

/// How often a missing volume is looked for.
const RETRY: Duration = Duration::from_secs(2);

/// A segment that must be on every pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// Its number.
    pub no: SegmentNo,
    /// BLAKE3 of its file.
    pub hash: Hash,
    /// Its size.
    pub bytes: u64,
    /// The last LSN in it or before it.
    pub lsn: u64,
}

impl From<&SealedSegment> for Due {
    fn from(segment: &SealedSegment) -> Self {
        let lsn = segment
            .last_lsn
            .map_or(segment.first_lsn.get() - 1, tierfs::Lsn::get);
        Self {
            no: segment.no,
            hash: segment.hash,
            bytes: segment.bytes,
            lsn,
        }
    }
}

/// A volume as status shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VolumeView {
    /// Where the configuration says that it is.
    pub path: PathBuf,
    /// Its serial, once it was seen.
    pub serial: Option<String>,
    /// "filling", "full", "absent", "foreign", "damaged", "empty".
    pub state: &'static str,
    /// Why, in words.
    pub why: Option<String>,
    /// Segments on it.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Free bytes.
    pub free: Option<u64>,
}

/// A pool as status shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolView {
    /// Its name.
    pub name: String,
    /// All transactions up to this one are on it.
    pub copied_lsn: u64,
    /// All segments up to this one are on it.
    pub copied_segment: u64,
    /// What it waits for.
    pub waits: Option<String>,
    /// Since when.
    pub since: Option<tierfs::Time>,
    /// Segments in the spool that it lacks, and their bytes.
    pub lacks: (u64, u64),
    /// Its volumes, as configured.
    pub volumes: Vec<VolumeView>,
}

impl PoolView {
    fn goes_on(&mut self) {
        self.waits = None;
        self.since = None;
    }
}

/// What all flushers share: what there is to copy, and who has it.
pub struct Board {
    shared: Arc<Shared>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    due: BTreeMap<SegmentNo, Due>,
    have: BTreeMap<String, BTreeSet<SegmentNo>>,
    pools: BTreeMap<String, PoolView>,
    places: BTreeMap<SegmentNo, Vec<PathBuf>>,
    order: Vec<String>,
}

impl Board {
    /// Nothing is due yet.
    pub fn new(shared: Arc<Shared>, pools: &[String]) -> Self {
        let view = |name: &String| {
            (
                name.clone(),
                PoolView {
                    name: name.clone(),
                    ..PoolView::default()
                },
            )
        };
        let state = State {
            pools: pools.iter().map(view).collect(),
            order: pools.to_vec(),
            ..State::default()
        };
        Self {
            shared,
            state: Mutex::new(state),
        }
    }

    /// A segment is sealed and durable in the spool.
    pub fn add(&self, due: Due) {
        let mut state = lock(&self.state);
        state.due.insert(due.no, due);
        state.refresh();
        drop(state);
        self.shared.nudge();
    }

    /// The segments that a pool lacks, in order.
    fn missing(&self, pool: &str) -> Vec<Due> {
        let state = lock(&self.state);
        let have = state.have.get(pool);
        state
            .due
            .values()
            .filter(|due| !have.is_some_and(|have| have.contains(&due.no)))
            .cloned()
            .collect()
    }

    fn has(&self, pool: &str, no: SegmentNo, at: &Path) {
        let mut state = lock(&self.state);
        state.have.entry(pool.to_owned()).or_default().insert(no);
        let places = state.places.entry(no).or_default();
        if !places.iter().any(|place| place == at) {
            places.push(at.to_owned());
        }
        state.refresh();
        drop(state);
        self.shared.nudge();
    }

    fn update(&self, pool: &str, change: impl FnOnce(&mut PoolView)) {
        if let Some(view) = lock(&self.state).pools.get_mut(pool) {
            change(view);
        }
    }

    /// All pools, in the order of the configuration.
    pub fn pools(&self) -> Vec<PoolView> {
        let state = lock(&self.state);
        state
            .order
            .iter()
            .filter_map(|name| state.pools.get(name).cloned())
            .collect()
    }

    /// True where every pool has everything up to `lsn`.
    pub fn copied(&self, lsn: u64) -> bool {
        lock(&self.state)
            .pools
            .values()
            .all(|pool| pool.copied_lsn >= lsn)
    }

    /// Segments that every pool has and whose transactions are all at or below `lsn`.
    pub fn dispensable(&self, lsn: u64) -> Vec<SegmentNo> {
        let state = lock(&self.state);
        let everywhere = |no: &SegmentNo| {
            state
                .order
                .iter()
                .all(|pool| state.have.get(pool).is_some_and(|have| have.contains(no)))
        };
        state
            .due
            .values()
            .filter(|due| due.lsn <= lsn && everywhere(&due.no))
            .map(|due| due.no)
            .collect()
    }

    /// A segment left the spool; it stays known as copied.
    pub fn left_spool(&self, no: SegmentNo) {
        lock(&self.state).due.remove(&no);
    }

    /// Volumes that have a segment.
    pub fn places(&self, no: SegmentNo) -> Vec<PathBuf> {
        lock(&self.state)
            .places
            .get(&no)
            .cloned()
            .unwrap_or_default()
    }
}

impl State {
    /// The watermarks of all pools: how far each is without a gap.
    fn refresh(&mut self) {
        let last = self.due.keys().next_back().copied();
        for (name, pool) in &mut self.pools {
            let have = self.have.get(name);
            let has = |no: &SegmentNo| have.is_some_and(|have| have.contains(no));
            let first_missing = self.due.keys().find(|no| !has(no));
            let upto = match first_missing {
                Some(missing) => missing.prev(),
                None => last.or_else(|| have.and_then(|have| have.last().copied())),
            };
            let before = self.due.values().take_while(|due| has(&due.no)).last();
            let lacks = self.due.values().filter(|due| !has(&due.no));
            pool.lacks = lacks.fold((0, 0), |(count, bytes), due| (count + 1, bytes + due.bytes));
            pool.copied_segment = pool.copied_segment.max(upto.map_or(0, SegmentNo::get));
            pool.copied_lsn = pool.copied_lsn.max(before.map_or(0, |due| due.lsn));
        }
    }
}

/// Where a flusher reads segments: the spool, or another pool's volume.
pub trait SegmentSource: Send + Sync {
    /// The segment's plain file.
    fn read(&self, no: SegmentNo) -> std::io::Result<Box<dyn Read + Send>>;
}

/// What a flusher is made of.
pub struct Flusher {
    /// What all share.
    pub shared: Arc<Shared>,
    /// What is due.
    pub board: Arc<Board>,
    /// Where segments are read.
    pub source: Arc<dyn SegmentSource>,
    /// The pool's name.
    pub pool: String,
    /// Its volumes' places, in the order in which they are filled.
    pub volumes: Vec<PathBuf>,
    /// Whose volumes these are.
    pub log_id: LogId,
    /// Serials of the volumes that this pool is known to have had, by place.
    pub known: BTreeMap<PathBuf, String>,
    /// The format's manual, for new volumes.
    pub manuals: Vec<(&'static str, &'static str)>,
    /// To the committer: volumes that joined, copies that were made.
    pub asked: crossbeam_channel::Sender<Asked>,
}

enum Look {
    Ready(Box<DirectoryVolume>),
    Not(&'static str, String),
}

impl Flusher {
    /// The thread's body.
    pub fn run(mut self) {
        let mut open: Vec<Option<Box<DirectoryVolume>>> =
            self.volumes.iter().map(|_| None).collect();
        let mut full = vec![false; self.volumes.len()];
        while !self.shared.stopping() {
            for (at, place) in open.iter_mut().enumerate() {
                if place.is_none() {
                    *place = self.open(at);
                }
            }
            let idle = self.copy_missing(&mut open, &mut full);
            if idle {
                full.fill(false);
                self.shared.wait_for_progress(RETRY);
            }
        }
    }

    /// Copies until there is nothing more to do, or nothing can be done. True: wait a while.
    fn copy_missing(&self, open: &mut [Option<Box<DirectoryVolume>>], full: &mut [bool]) -> bool {
        let missing = self.board.missing(&self.pool);
        let Some(due) = missing.first() else {
            self.board.update(&self.pool, PoolView::goes_on);
            self.shared.well(&self.key());
            return true;
        };
        let Some(at) = (0..open.len()).find(|at| open[*at].is_some() && !full[*at]) else {
            self.wanted(due);
            return true;
        };
        let Some(volume) = &open[at] else { return true };
        match self.copy(volume, due) {
            Ok(()) => {
                self.board.update(&self.pool, PoolView::goes_on);
                self.shared.well(&self.key());
                let free = volume.free_bytes().ok();
                self.view(at, |view| {
                    view.segments += 1;
                    view.bytes += due.bytes;
                    view.free = free;
                    view.state = "filling";
                    view.why = None;
                });
                false
            }
            Err(error) => {
                let state = if error.is_full() {
                    full[at] = true;
                    "full"
                } else {
                    open[at] = None;
                    if error.is_absent() {
                        "absent"
                    } else {
                        "damaged"
                    }
                };
                self.view(at, |view| {
                    view.state = state;
                    view.why = Some(error.to_string());
                });
                tracing::warn!(pool = self.pool, %error, "a volume cannot take a segment");
                self.wanted(due);
                !error.is_full()
            }
        }
    }

    fn copy(&self, volume: &DirectoryVolume, due: &Due) -> Result<(), media::Error> {
        let name = ObjectName::new(&due.no.object_name())?;
        let mut source = self
            .source
            .read(due.no)
            .map_err(|source| media::Error::Io {
                path: PathBuf::from(due.no.file_name()),
                what: "reading the segment from the spool".to_owned(),
                source,
            })?;
        volume.append(&name, due.bytes, &due.hash.0, &mut source)?;
        let serial = volume.label().serial.to_string();
        self.board.has(&self.pool, due.no, volume.location());
        let _ = self
            .asked
            .send(Asked::Copy(crate::daemon::verified_copy(due.no, &serial)));
        self.shared.wake();
        self.shared.tell(&Event::Copied {
            time: When::now(),
            pool: self.pool.clone(),
            volume: serial,
            segment: due.no.get(),
            lsn: Some(due.lsn).filter(|lsn| *lsn > 0),
        });
        Ok(())
    }

    fn key(&self) -> String {
        format!("pool {}", self.pool)
    }

    /// Says which volume the pool waits for.
    fn wanted(&self, due: &Due) {
        let pools = self.board.pools();
        let view = pools.iter().find(|view| view.name == self.pool);
        let states: Vec<String> = view
            .into_iter()
            .flat_map(|view| &view.volumes)
            .map(|volume| {
                let serial = volume
                    .serial
                    .as_deref()
                    .map_or(String::new(), |serial| format!(" ({serial})"));
                format!("{}{serial} is {}", volume.path.display(), volume.state)
            })
            .collect();
        let why = states.join(", ");
        let what = format!(
            "pool {} waits for a volume for segment {}",
            self.pool, due.no
        );
        self.board.update(&self.pool, |view| {
            view.since.get_or_insert_with(tierfs::Time::now);
            view.waits = Some(why.clone());
        });
        let todo = "mount an absent volume at its place, or add an empty directory on another disk to the pool's volumes \
                    in the configuration and restart hsmd; until then the spool keeps the segments";
        self.shared.trouble(&self.key(), false, what, why, todo);
    }

    fn view(&self, at: usize, change: impl FnOnce(&mut VolumeView)) {
        let path = self.volumes[at].clone();
        self.board.update(&self.pool, |pool| {
            if !pool.volumes.iter().any(|view| view.path == path) {
                pool.volumes.push(VolumeView {
                    path: path.clone(),
                    ..VolumeView::default()
                });
            }
            if let Some(view) = pool.volumes.iter_mut().find(|view| view.path == path) {
                change(view);
            }
        });
    }

    /// Opens a volume, labels a new one, and takes its inventory.
    fn open(&mut self, at: usize) -> Option<Box<DirectoryVolume>> {
        let path = self.volumes[at].clone();
        let look = self
            .look(&path)
            .unwrap_or_else(|error| Look::Not(state_of(&error), error.to_string()));
        match look {
            Look::Ready(volume) => {
                let serial = volume.label().serial.to_string();
                if self.known.insert(path.clone(), serial.clone()).as_ref() != Some(&serial) {
                    let (serial, pool) = (serial.clone(), self.pool.clone());
                    let _ = self.asked.send(Asked::Volume { serial, pool, path });
                    self.shared.wake();
                }
                self.take_inventory(at, &volume);
                Some(volume)
            }
            Look::Not(state, why) => {
                let serial = self.known.get(&path).cloned();
                self.view(at, |view| {
                    view.state = state;
                    view.why = Some(why);
                    view.serial = serial;
                });
                None
            }
        }
    }

    fn look(&self, path: &Path) -> Result<Look, media::Error> {
        match directory::probe(path)? {
            Found::Labelled(volume) => Ok(self.own(volume)),
            Found::Empty => match self.known.get(path) {
                Some(serial) => Ok(Look::Not(
                    "absent",
                    format!("{} is empty, volume {serial} belongs there", path.display()),
                )),
                None => self.label(path),
            },
            Found::Absent => Ok(Look::Not(
                "absent",
                format!("there is no directory {}", path.display()),
            )),
        }
    }

    fn own(&self, volume: DirectoryVolume) -> Look {
        let label = volume.label();
        let place = volume.location().display();
        if label.log_id != self.log_id.0 {
            return Look::Not(
                "foreign",
                format!(
                    "{place} holds a volume of another log ({})",
                    LogId(label.log_id)
                ),
            );
        }
        if label.pool != self.pool {
            return Look::Not(
                "foreign",
                format!("{place} holds a volume of pool {}", label.pool),
            );
        }
        Look::Ready(Box::new(volume))
    }

    fn label(&self, path: &Path) -> Result<Look, media::Error> {
        let label = Label {
            format: media::FORMAT,
            log_id: self.log_id.0,
            pool: self.pool.clone(),
            serial: Serial::random()?,
            barcode: None,
            created: jiff::Timestamp::now().to_string(),
        };
        tracing::info!(pool = self.pool, serial = %label.serial, path = %path.display(), "labels a new volume");
        directory::label(path, &label, &self.manuals).map(|volume| Look::Ready(Box::new(volume)))
    }

    fn take_inventory(&self, at: usize, volume: &DirectoryVolume) {
        let (mut segments, mut bytes) = (0, 0);
        let why = match volume.inventory() {
            Ok(inventory) => {
                for entry in inventory.entries {
                    segments += 1;
                    bytes += entry.bytes;
                    if let Some(no) = SegmentNo::from_object_name(entry.name.as_str()) {
                        self.board.has(&self.pool, no, volume.location());
                    }
                }
                inventory.faults.first().map(ToString::to_string)
            }
            Err(error) => Some(error.to_string()),
        };
        let (serial, free) = (volume.label().serial.to_string(), volume.free_bytes().ok());
        self.view(at, |view| {
            *view = VolumeView {
                path: view.path.clone(),
                serial: Some(serial),
                state: "filling",
                why,
                segments,
                bytes,
                free,
            };
        });
    }
}

fn state_of(error: &media::Error) -> &'static str {
    if error.is_absent() {
        "absent"
    } else if matches!(
        error,
        media::Error::Foreign { .. } | media::Error::NewerFormat { .. }
    ) {
        "foreign"
    } else {
        "damaged"
    }
}
