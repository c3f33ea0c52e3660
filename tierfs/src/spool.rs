//! The spool: the log's segments on the local disk, from their first byte until every required copy
//! has them.
//!
//! A spool is a directory of its own with these files, and no others:
//!
//! | name | what |
//! |---|---|
//! | `spool.hsm` | whose log this is and how far it is durable |
//! | `spool.hsm.tmp` | the same while it is made |
//! | `lock` | keeps a second daemon out |
//! | `0000000001.hsm.zst` | a sealed segment, read-only |
//! | `0000000002.open-EPOCH` | the segment being written; after a crash there may be several |
//! | `0000000002.tmp-EPOCH` | a segment that recovery was about to write; worth nothing |
//! | `0000000003.void-EPOCH-N` | set aside by recovery: nothing in it was ever acknowledged |
//!
//! [`Spool::open`] runs recovery ([`crate::recovery`]) and leaves only sealed segments;
//! [`Spool::writer`] goes on from there. Handles are cheap to clone and work on every thread.
//! Segments leave the spool in order, by [`Spool::remove`], when the caller has proven its copies; with a
//! segment go the files set aside with its number or a lower one, as the log beyond them is safe then.

pub(crate) mod error;
pub(crate) mod mark;
pub(crate) mod names;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{Disk, Locked, RealDisk};
use crate::ids::{Epoch, Hash, LogId, Lsn, SegmentNo, Time};
use crate::recovery::{self, Recovered};
use crate::segment::Segment;
pub use crate::writer::{Head, SealedSegment};
use crate::writer::{Unsealed, Writer};

pub use error::{Evidence, SpoolError};
use mark::{MarkError, MarkFile, ReadMark};
use names::{MARK_NAME, Name};

/// How the spool's segments are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpoolOptions {
    /// A segment is sealed before it grows beyond this, unless one append is larger.
    pub segment_bytes: u64,
    /// The most bytes of all files together; beyond it appending gives `Full`.
    pub bytes_max: u64,
    /// zstd's level for the frames that the writer makes itself (headers).
    pub level: i32,
    /// UUID of the watched filesystem.
    pub fs_uuid: [u8; 16],
    /// Its type.
    pub fs_type: String,
    /// The host's name.
    pub host: Option<String>,
}

/// What the caller knows of the log, to be compared with what the spool holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Floor {
    /// Whose log is expected.
    pub log_id: Option<LogId>,
    /// The last transaction in the catalog.
    pub folded: Option<Lsn>,
    /// The last transaction that is on record as durable elsewhere.
    pub durable: Option<Lsn>,
    /// The last sealed segment that the catalog or a volume knows.
    pub sealed: Option<Head>,
    /// The operator's word (`--accept-loss-after`): go on where the log ends with this transaction
    /// (0: with none), though more was durable.
    pub accept_loss_after: Option<u64>,
}

/// What the spool, its clones and its writer share.
pub(crate) struct Shared<D: Disk> {
    pub(crate) disk: D,
    pub(crate) options: SpoolOptions,
    pub(crate) log_id: LogId,
    pub(crate) mark: MarkFile<D>,
    pub(crate) boot: Option<[u8; 16]>,
    state: Mutex<State<D>>,
    writer_taken: AtomicBool,
    _lock: D::Lock,
}

struct State<D: Disk> {
    sealed: BTreeMap<SegmentNo, SealedSegment>,
    unsealed: BTreeMap<SegmentNo, Arc<Unsealed<D>>>,
    voids: Vec<Void>,
    /// Bytes of `sealed` and `voids`.
    settled_bytes: u64,
    head: Option<Head>,
}

/// A file that recovery set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Void {
    /// The number that it had.
    pub segment: SegmentNo,
    /// Its name in the spool.
    pub file_name: String,
    /// Its size.
    pub bytes: u64,
}

impl<D: Disk> Shared<D> {
    fn state(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begun(&self, no: SegmentNo, unsealed: Arc<Unsealed<D>>) {
        self.state().unsealed.insert(no, unsealed);
    }

    pub(crate) fn sealed(&self, segments: &[SealedSegment]) {
        let mut state = self.state();
        for segment in segments {
            state.unsealed.remove(&segment.no);
            state.settled_bytes += segment.bytes;
            state.sealed.insert(segment.no, segment.clone());
            state.head = Some(segment.head());
        }
    }

    pub(crate) fn bytes_used(&self) -> u64 {
        let state = self.state();
        let unsealed: u64 = state
            .unsealed
            .values()
            .map(|open| open.bytes.load(Ordering::Relaxed))
            .sum();
        state.settled_bytes + unsealed
    }

    fn mark_failed(&self, error: MarkError) -> SpoolError {
        SpoolError::io(self.disk.path(), MARK_NAME, error.doing, error.source)
    }
}

/// An open spool.
pub struct Spool<D: Disk = RealDisk> {
    shared: Arc<Shared<D>>,
}

impl<D: Disk> Clone for Spool<D> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
        }
    }
}

fn lock<D: Disk>(disk: &D) -> Result<D::Lock, SpoolError> {
    let locked = disk
        .lock()
        .map_err(|source| SpoolError::io(disk.path(), crate::disk::LOCK_NAME, "locking", source))?;
    match locked {
        Locked::Ours(lock) => Ok(lock),
        Locked::Other(pid) => Err(SpoolError::Locked {
            path: disk.path().to_owned(),
            pid,
        }),
    }
}

impl<D: Disk> Spool<D> {
    /// Makes a directory that is empty the spool of a log. `head` is the log's end where it exists
    /// already: on volumes, when the spool's disk was lost.
    pub fn create(disk: &D, log_id: LogId, head: Option<Head>) -> Result<(), SpoolError> {
        let _lock = lock(disk)?;
        let fail = |doing| move |source| SpoolError::io(disk.path(), "", doing, source);
        for name in disk.list().map_err(fail("listing"))? {
            match Name::parse(&name) {
                Some(Name::Lock | Name::LostAndFound) => {}
                // A creation that was interrupted: nobody has written anything yet.
                Some(Name::NewMark) => disk
                    .remove(&name)
                    .map_err(fail("removing the unfinished spool.hsm.tmp in"))?,
                _ => {
                    return Err(SpoolError::NotEmpty {
                        path: disk.path().to_owned(),
                        name,
                    });
                }
            }
        }
        MarkFile::create(disk, mark::fresh(log_id, head, disk.boot()))
            .map_err(|error| SpoolError::io(disk.path(), MARK_NAME, error.doing, error.source))?;
        disk.sync_dir().map_err(fail("syncing"))
    }

    /// True where there is no spool yet, so that [`Self::create`] may make one.
    pub fn is_empty(disk: &D) -> Result<bool, SpoolError> {
        let names = disk
            .list()
            .map_err(|source| SpoolError::io(disk.path(), "", "listing", source))?;
        Ok(names.iter().all(|name| {
            let name = Name::parse(name);
            matches!(name, Some(Name::Lock | Name::LostAndFound | Name::NewMark))
        }))
    }

    /// Locks and recovers a spool. What was done is in [`Recovered`]; what cannot be done safely is
    /// an error, and nothing is changed.
    pub fn open(
        disk: D,
        options: SpoolOptions,
        floor: &Floor,
    ) -> Result<(Self, Recovered), SpoolError> {
        Self::open_at(disk, options, floor, Time::now())
    }

    /// [`Self::open`] with a clock of the caller's.
    pub fn open_at(
        disk: D,
        options: SpoolOptions,
        floor: &Floor,
        now: Time,
    ) -> Result<(Self, Recovered), SpoolError> {
        let lock = lock(&disk)?;
        let mark = MarkFile::open(&disk)?;
        let known = if let ReadMark::Good(file) = &mark {
            Some(file.get())
        } else {
            None
        };
        let boot = disk.boot();
        let (end, recovered) = recovery::recover(&disk, known.as_ref(), floor, boot, now)?;
        let mark = match mark {
            ReadMark::Good(file) => file,
            ReadMark::Absent | ReadMark::Damaged => recovery::new_mark(&disk, &end, boot)?,
        };
        let sealed = end.sealed.values().map(|segment| segment.bytes);
        let settled_bytes = sealed.chain(end.voids.iter().map(|void| void.bytes)).sum();
        let shared = Shared {
            disk,
            options,
            log_id: end.log_id,
            mark,
            boot,
            state: Mutex::new(State {
                sealed: end.sealed,
                unsealed: BTreeMap::new(),
                voids: end.voids,
                settled_bytes,
                head: end.head.clone(),
            }),
            writer_taken: AtomicBool::new(false),
            _lock: lock,
        };
        // From here on the files say what the log is: older records are settled.
        shared
            .mark
            .update(|mark| {
                mark.sealed = end.head;
                mark.durable = None;
                mark.boot = boot;
            })
            .and_then(|()| shared.mark.sync())
            .map_err(|error| shared.mark_failed(error))?;
        Ok((
            Self {
                shared: Arc::new(shared),
            },
            recovered,
        ))
    }

    /// The log's name.
    pub fn log_id(&self) -> LogId {
        self.shared.log_id
    }

    /// The last sealed segment of the log, whether it is still in the spool or not.
    pub fn head(&self) -> Option<Head> {
        self.shared.state().head.clone()
    }

    /// The writer, with a new random epoch. There is one.
    pub fn writer(&self) -> Result<Writer<D>, SpoolError> {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).map_err(|error| {
            let source = std::io::Error::other(error.to_string());
            SpoolError::io(
                self.shared.disk.path(),
                "",
                "choosing a random epoch for",
                source,
            )
        })?;
        self.writer_with(Epoch(u64::from_le_bytes(bytes)), Time::now)
    }

    /// The writer, with an epoch and a clock of the caller's.
    pub fn writer_with(&self, epoch: Epoch, now: fn() -> Time) -> Result<Writer<D>, SpoolError> {
        if self.shared.writer_taken.swap(true, Ordering::Relaxed) {
            return Err(SpoolError::WriterTaken {
                path: self.shared.disk.path().to_owned(),
            });
        }
        Ok(Writer::new(self.shared.clone(), self.head(), epoch, now)?)
    }

    /// The sealed segments, in order.
    pub fn segments(&self) -> Vec<SealedSegment> {
        self.shared.state().sealed.values().cloned().collect()
    }

    /// The files that recovery set aside. They may be removed by hand at any time.
    pub fn voids(&self) -> Vec<Void> {
        self.shared.state().voids.clone()
    }

    /// Bytes of all segments, sealed, open and set aside.
    pub fn bytes_used(&self) -> u64 {
        self.shared.bytes_used()
    }

    /// Bytes that the disk has left.
    pub fn bytes_free(&self) -> Result<u64, SpoolError> {
        let disk = &self.shared.disk;
        disk.free().map_err(|source| {
            SpoolError::io(disk.path(), "", "asking for the free space of", source)
        })
    }

    /// Opens a segment for reading: a sealed one, or what its writer has appended so far. The handle
    /// is cheap to clone and stays valid when the segment is sealed or removed.
    pub fn open_segment(&self, no: SegmentNo) -> Result<Segment, SpoolError> {
        let disk = &self.shared.disk;
        let (open, sealed) = {
            let state = self.shared.state();
            (
                state.unsealed.get(&no).cloned(),
                state.sealed.get(&no).cloned(),
            )
        };
        let path = |name: &str| disk.path().join(name);
        if let Some(open) = open {
            let frames = open
                .frames
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            let name = path(&open.name).display().to_string();
            return Ok(Segment::unsealed(
                open.file.clone(),
                name,
                open.header.clone(),
                frames,
            ));
        }
        let sealed = sealed.ok_or_else(|| SpoolError::NoSuchSegment {
            path: disk.path().to_owned(),
            segment: no,
        })?;
        let name = &sealed.file_name;
        let file = disk
            .open(name)
            .map_err(|source| SpoolError::io(disk.path(), name, "opening", source))?;
        Segment::open(Arc::new(file), path(name).display().to_string()).map_err(SpoolError::Sealed)
    }

    /// Reads a sealed segment from front to back and compares its hash.
    pub fn verify(&self, no: SegmentNo) -> Result<(), SpoolError> {
        let sealed = self.shared.state().sealed.get(&no).cloned();
        let disk = &self.shared.disk;
        let sealed = sealed.ok_or_else(|| SpoolError::NoSuchSegment {
            path: disk.path().to_owned(),
            segment: no,
        })?;
        let found = recovery::hash_file(disk, &sealed.file_name)?;
        if found == sealed.hash {
            Ok(())
        } else {
            Err(SpoolError::Hash {
                path: disk.path().join(&sealed.file_name),
                found,
                expected: sealed.hash,
            })
        }
    }

    /// Removes the oldest sealed segment. The caller has proven its copies.
    ///
    /// That it left, and its hash, is durable before the file goes, so that a gap is never mistaken
    /// for it, and the chain is known when nothing is left.
    pub fn remove(&self, no: SegmentNo) -> Result<(), SpoolError> {
        let mut state = self.shared.state();
        let oldest = state.sealed.first_key_value();
        let Some((_, sealed)) = oldest.filter(|(oldest, _)| **oldest == no) else {
            return Err(SpoolError::NotOldest {
                asked: no,
                oldest: oldest.map(|(oldest, _)| *oldest),
            });
        };
        let (head, name) = (sealed.head(), sealed.file_name.clone());
        self.shared
            .mark
            .update(|mark| mark.removed = Some(head))
            .and_then(|()| self.shared.mark.sync())
            .map_err(|error| self.shared.mark_failed(error))?;
        let disk = &self.shared.disk;
        let fail = |name: &str| {
            let path = disk.path().join(name);
            move |source| SpoolError::Io {
                path,
                doing: "removing",
                source,
            }
        };
        disk.remove(&name).map_err(fail(&name))?;
        if let Some(gone) = state.sealed.remove(&no) {
            state.settled_bytes -= gone.bytes;
        }
        while let Some(at) = state.voids.iter().position(|void| void.segment <= no) {
            let name = state.voids[at].file_name.clone();
            disk.remove(&name).map_err(fail(&name))?;
            state.settled_bytes -= state.voids.swap_remove(at).bytes;
            tracing::info!(
                "removed {name}, which recovery had set aside: the log beyond it is on its volumes"
            );
        }
        Ok(())
    }

    /// The hash of the newest segment that has left the spool, `None` where none has.
    pub fn removed(&self) -> Option<(SegmentNo, Hash)> {
        let mark = self.shared.mark.get();
        mark.removed.map(|head| (head.segment, head.hash))
    }
}
