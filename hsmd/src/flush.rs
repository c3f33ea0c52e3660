//! The flushers: one thread for each pool copies sealed segments to the pool's volumes.
//!
//! A pool gets every segment of the log, in order. What counts as copied is what a volume's own
//! inventory lists (each object was read back and verified when it was written); the catalog only
//! remembers it. A volume that is absent or full is waited for and reported, and other pools go on.
//! A segment leaves the spool when every pool has it and the catalog would not need it after a crash.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use media::directory::{self, DirectoryVolume, Found};
use media::{Label, ObjectName, Serial, Volume};
use tierfs::{LogId, SegmentNo};

use crate::board::{Board, Due, PoolView, VolumeView, Waits};
use crate::committer::Asked;
use crate::control::model::{Event, VolumeState, WaitingReason};
use crate::control::when::When;
use crate::shared::Shared;

/// How often a missing volume is looked for.
const RETRY: Duration = Duration::from_secs(2);
/// How often a volume that nothing is written to is looked at: is it still there?
const PRESENCE: Duration = Duration::from_secs(10);

/// What a flusher is made of.
pub struct Flusher {
    /// What all share.
    pub shared: Arc<Shared>,
    /// What is due.
    pub board: Arc<Board>,
    /// Where segments are read first; then from other volumes.
    pub spool: PathBuf,
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
    Not(VolumeState, String),
}

/// Why a segment was not copied.
enum Failed {
    /// The volume does not take it.
    Volume(media::Error),
    /// It cannot be read anywhere.
    Source(String),
}

/// What became of a segment.
enum Tried {
    /// It is on a volume.
    Copied,
    /// A volume is full: there may be another one.
    Full,
    /// A volume has failed: nothing more for a while.
    VolumeFailed,
    /// It cannot be copied now; others may.
    Blocked(Waits),
    /// There is no volume to write on.
    NoVolume,
}

/// A pool's volumes while the flusher runs.
struct Open {
    volumes: Vec<Option<Box<DirectoryVolume>>>,
    full: Vec<bool>,
    seen: Instant,
}

impl Flusher {
    /// The thread's body.
    pub fn run(mut self) {
        let mut open = Open {
            volumes: self.volumes.iter().map(|_| None).collect(),
            full: vec![false; self.volumes.len()],
            seen: Instant::now(),
        };
        while !self.shared.stopping() {
            for (at, place) in open.volumes.iter_mut().enumerate() {
                if place.is_none() {
                    *place = self.open(at);
                }
            }
            let idle = self.copy_missing(&mut open);
            if idle {
                open.full.fill(false);
                self.shared.wait_for_progress(RETRY);
                self.look_after(&mut open);
            }
        }
    }

    /// Notices volumes that are taken away while nothing is written to them.
    fn look_after(&self, open: &mut Open) {
        if open.seen.elapsed() < PRESENCE {
            return;
        }
        open.seen = Instant::now();
        for (at, place) in open.volumes.iter_mut().enumerate() {
            let Some(free) = place.as_ref().map(|volume| volume.free_bytes()) else {
                continue;
            };
            match free {
                Ok(free) => self.view(at, |view| view.free = Some(free)),
                // It is opened, and looked at more closely, in the next turn.
                Err(_) => *place = None,
            }
        }
    }

    /// Copies until there is nothing more to do, or nothing can be done. True: wait a while.
    fn copy_missing(&self, open: &mut Open) -> bool {
        let mut blocked: Option<(SegmentNo, Waits)> = None;
        let mut after = None;
        while let Some(due) = self.board.missing(&self.pool, after) {
            after = Some(due.no);
            match self.try_copy(&due, open) {
                Tried::Copied => {
                    if blocked.is_none() {
                        self.goes_on();
                    }
                    return false;
                }
                Tried::Full => return false,
                Tried::VolumeFailed => return true,
                // Newer segments need not wait for one that nobody can give or take.
                Tried::Blocked(waits) => drop(blocked.get_or_insert((due.no, waits))),
                Tried::NoVolume => {
                    blocked = Some((due.no, self.no_volume()));
                    break;
                }
            }
        }
        match blocked {
            Some((no, waits)) => self.wanted(no, waits),
            None => self.goes_on(),
        }
        true
    }

    fn goes_on(&self) {
        self.board.update(&self.pool, PoolView::goes_on);
        self.shared.well(&self.key());
    }

    fn try_copy(&self, due: &Due, open: &mut Open) -> Tried {
        let is_damaged = |volume: &DirectoryVolume| {
            let serial = volume.label().serial.as_str();
            self.board.is_damaged(&self.pool, serial, due.no)
        };
        let mut damaged = None;
        let mut chosen = None;
        for (at, place) in open.volumes.iter().enumerate() {
            match place {
                Some(volume) if !open.full[at] && is_damaged(volume) => damaged = Some(volume),
                Some(volume) if !open.full[at] => {
                    chosen = Some((at, volume));
                    break;
                }
                _ => {}
            }
        }
        let Some((at, volume)) = chosen else {
            return damaged.map_or(Tried::NoVolume, |volume| {
                Tried::Blocked(Waits {
                    reason: WaitingReason::Failed,
                    serial: Some(volume.label().serial.to_string()),
                    path: volume.location().to_owned(),
                    why: format!(
                        "its copy of segment {} is damaged, and the pool has no other volume to copy it to: \
                         add an empty directory on another disk to the pool's volumes and restart hsmd",
                        due.no
                    ),
                })
            });
        };
        match self.copy(volume, due) {
            Ok(()) => {
                let free = volume.free_bytes().ok();
                self.view(at, |view| {
                    view.bytes += due.bytes;
                    view.free = free;
                    view.state = VolumeState::Filling;
                    view.why = None;
                });
                Tried::Copied
            }
            Err(Failed::Source(why)) => Tried::Blocked(self.no_source(due, &why)),
            Err(Failed::Volume(error)) => {
                let serial = volume.label().serial.to_string();
                self.failed(at, serial, &error, open, due)
            }
        }
    }

    /// A volume does not take a segment.
    fn failed(
        &self,
        at: usize,
        serial: String,
        error: &media::Error,
        open: &mut Open,
        due: &Due,
    ) -> Tried {
        tracing::warn!(pool = self.pool, %error, "a volume cannot take a segment");
        let state = state_of(error);
        self.view(at, |view| {
            view.state = state;
            view.why = Some(error.to_string());
        });
        if error.is_full() {
            open.full[at] = true;
            return Tried::Full;
        }
        open.volumes[at] = None;
        let waits = Waits {
            reason: match state {
                VolumeState::Absent => WaitingReason::Absent,
                _ => WaitingReason::Failed,
            },
            serial: Some(serial),
            path: self.volumes[at].clone(),
            why: error.to_string(),
        };
        self.wanted(due.no, waits);
        Tried::VolumeFailed
    }

    /// Where a segment may be read: the spool, then other volumes with a good copy.
    fn files_of(&self, no: SegmentNo) -> Vec<PathBuf> {
        let mut files = vec![self.spool.join(no.file_name())];
        let places = self.board.places(no);
        files.extend(places.iter().map(|place| place.join(no.object_name())));
        files
    }

    fn copy(&self, volume: &DirectoryVolume, due: &Due) -> Result<(), Failed> {
        let name = ObjectName::new(&due.no.object_name()).map_err(Failed::Volume)?;
        let mut why = Vec::new();
        for file in self.files_of(due.no) {
            let opened = fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOATIME)
                .open(&file);
            let mut source = match opened {
                Ok(source) => source,
                Err(error) => {
                    why.push(format!("{}: {error}", file.display()));
                    continue;
                }
            };
            match volume.append(&name, due.bytes, &due.hash.0, &mut source) {
                Ok(_) => {
                    self.copied(volume, due);
                    return Ok(());
                }
                Err(error @ (media::Error::Source { .. } | media::Error::BadSource { .. })) => {
                    why.push(format!("{}: {error}", file.display()));
                }
                Err(error) => return Err(Failed::Volume(error)),
            }
        }
        Err(Failed::Source(why.join("; ")))
    }

    fn copied(&self, volume: &DirectoryVolume, due: &Due) {
        let serial = volume.label().serial.to_string();
        self.remember(self.board.has(&self.pool, &serial, due.no));
        self.shared.wake();
        self.shared.tell(&Event::Copied {
            time: When::now(),
            pool: self.pool.clone(),
            volume: serial,
            segment: due.no.get(),
            lsn: Some(due.lsn).filter(|lsn| *lsn > 0),
        });
    }

    /// The catalog is to know of a copy.
    fn remember(&self, copy: tierfs::catalog::CopyRow) {
        // Only a daemon that ends has no committer.
        let _ = self.asked.send(Asked::Copy(copy));
    }

    fn key(&self) -> String {
        format!("pool {}", self.pool)
    }

    fn volumes_now(&self) -> Vec<VolumeView> {
        let pools = self.board.pools();
        let view = pools.into_iter().find(|view| view.name == self.pool);
        view.map_or_else(Vec::new, |view| view.volumes)
    }

    /// None of the pool's volumes can be written on: which one would help?
    fn no_volume(&self) -> Waits {
        let volumes = self.volumes_now();
        let full = |view: &&VolumeView| view.state == VolumeState::Full;
        let wanted = volumes
            .iter()
            .find(|view| view.state == VolumeState::Absent)
            .or_else(|| volumes.iter().find(|view| !full(view)))
            .or(volumes.last());
        let states: Vec<String> = volumes.iter().map(described).collect();
        Waits {
            reason: match wanted.map(|view| view.state) {
                Some(VolumeState::Full) => WaitingReason::Full,
                Some(VolumeState::Absent) | None => WaitingReason::Absent,
                Some(_) => WaitingReason::Failed,
            },
            serial: wanted.and_then(|view| view.serial.clone()),
            path: wanted.map_or_else(PathBuf::new, |view| view.path.clone()),
            why: states.join(", "),
        }
    }

    /// A segment that left the spool, and that no volume at hand has: which one would help?
    fn no_source(&self, due: &Due, why: &str) -> Waits {
        let pools = self.board.pools();
        let mut volumes = pools.iter().flat_map(|pool| &pool.volumes);
        let absent = volumes.find(|view| view.state == VolumeState::Absent);
        let path = absent.map_or_else(|| self.spool.clone(), |view| view.path.clone());
        Waits {
            reason: match absent {
                Some(_) => WaitingReason::Absent,
                None => WaitingReason::Failed,
            },
            serial: absent.and_then(|view| view.serial.clone()),
            path,
            why: format!(
                "segment {} can be read neither from the spool nor from a volume at hand ({why})",
                due.no
            ),
        }
    }

    /// Says which volume the pool waits for.
    fn wanted(&self, no: SegmentNo, waits: Waits) {
        let what = format!("pool {} waits for a volume for segment {no}", self.pool);
        let why = waits.why.clone();
        self.board.update(&self.pool, |view| {
            view.since.get_or_insert_with(tierfs::Time::now);
            view.waits = Some(waits);
        });
        let todo = "mount an absent volume at its place, or add an empty directory on another disk to the pool's volumes \
                    in the configuration and restart hsmd; until then the spool keeps the segments";
        self.shared.trouble(&self.key(), false, what, why, todo);
    }

    fn view(&self, at: usize, change: impl FnOnce(&mut VolumeView)) {
        let path = &self.volumes[at];
        let mut told = None;
        self.board.update(&self.pool, |pool| {
            if let Some(view) = pool.volumes.iter_mut().find(|view| view.path == *path) {
                let before = (view.state, view.serial.clone());
                change(view);
                if before != (view.state, view.serial.clone()) {
                    told = Some((view.serial.clone(), view.state));
                }
            }
        });
        if let Some((volume, state)) = told {
            self.shared.tell(&Event::Volume {
                time: When::now(),
                pool: self.pool.clone(),
                volume,
                path: path.display().to_string(),
                state,
            });
        }
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
                    VolumeState::Absent,
                    format!("{} is empty, volume {serial} belongs there", path.display()),
                )),
                None => self.label(path),
            },
            Found::Absent => Ok(Look::Not(
                VolumeState::Absent,
                format!("there is no directory {}", path.display()),
            )),
        }
    }

    fn own(&self, volume: DirectoryVolume) -> Look {
        let label = volume.label();
        let place = volume.location().display();
        if label.log_id != self.log_id.0 {
            return Look::Not(
                VolumeState::Foreign,
                format!(
                    "{place} holds a volume of another log ({})",
                    LogId(label.log_id)
                ),
            );
        }
        if label.pool != self.pool {
            return Look::Not(
                VolumeState::Foreign,
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
        let serial = volume.label().serial.to_string();
        let mut bytes = 0;
        let why = match volume.inventory() {
            Ok(inventory) => {
                let mut listed = BTreeSet::new();
                for entry in &inventory.entries {
                    bytes += entry.bytes;
                    listed.extend(SegmentNo::from_object_name(entry.name.as_str()));
                }
                let faulty: BTreeSet<_> = inventory.faults.iter().filter_map(damaged).collect();
                let rows = self.board.inventory(&self.pool, &serial, &listed, &faulty);
                for row in rows {
                    self.remember(row);
                }
                self.shared.wake();
                inventory.faults.first().map(ToString::to_string)
            }
            Err(error) => Some(error.to_string()),
        };
        let free = volume.free_bytes().ok();
        self.view(at, |view| {
            view.serial = Some(serial);
            view.state = VolumeState::Filling;
            view.why = why;
            view.bytes = bytes;
            view.free = free;
        });
    }
}

/// A volume in words.
fn described(view: &VolumeView) -> String {
    let serial = view.serial.as_deref();
    let serial = serial.map_or_else(String::new, |serial| format!(" ({serial})"));
    let path = view.path.display();
    match (view.state, &view.why) {
        (VolumeState::Full, _) => format!("{path}{serial} is full"),
        (_, Some(why)) => format!("{path}{serial}: {why}"),
        (VolumeState::Absent, None) => format!("{path}{serial} is not there"),
        (_, None) => format!("{path}{serial} cannot be used"),
    }
}

/// The segment whose object or inventory entry is damaged. One that is not there at all is none: the
/// same object may be appended again.
pub fn damaged(fault: &media::Error) -> Option<SegmentNo> {
    let media::Error::Corrupt { path, .. } = fault else {
        return None;
    };
    let name = path.file_name()?.to_str()?;
    let no = SegmentNo::from_file_name(name.strip_suffix(".b3").unwrap_or(name))?;
    path.exists().then_some(no)
}

fn state_of(error: &media::Error) -> VolumeState {
    match error {
        media::Error::Absent { .. } => VolumeState::Absent,
        media::Error::Full { .. } => VolumeState::Full,
        media::Error::ReadOnly { .. } => VolumeState::ReadOnly,
        media::Error::Foreign { .. } | media::Error::NewerFormat { .. } => VolumeState::Foreign,
        _ => VolumeState::Damaged,
    }
}
