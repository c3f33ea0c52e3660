//! What a start finds in the spool, and what becomes of it.
//!
//! Recovery walks the segments in order and leaves only sealed ones. What a crash left open is
//! copied, frame for frame and under the same number, into a new file that is synced before it gets
//! its name; so nothing is trusted to pages that a failed sync may have dropped. The end of the log
//! is the first place where no whole frame continues it, if that can be the torn end of a crash:
//!
//! * no later segment is sealed, and no later file says that this one was durable;
//! * the spool's own file, the catalog and the caller know nothing beyond it;
//! * where the machine has not been booted since (so no written byte can be missing), no whole frame
//!   follows; after a boot, none follows that records as durable what is invalid.
//!
//! Anything else is damage: an error that names file and offset, and the files that it is about are
//! left as they are. Frames
//! behind a torn end, and files after it, were never acknowledged: they are set aside as `*.void-*`.
//!
//! Every step may be the last one before another crash: files are set aside first, then the
//! new segment gets its name, then the old file goes; each start takes up whatever is left.

mod open;
mod scan;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::disk::Disk;
use crate::ids::{Epoch, Hash, LogId, Lsn, SegmentNo, Time};
use crate::record::SegmentHeader;
use crate::scan::Scan;
use crate::segment::{ReadAt, Segment, SegmentError};
use crate::spool::error::SpoolError;
use crate::spool::mark::{self, Mark, MarkFile};
use crate::spool::names::{MARK_NAME, Name};
use crate::spool::{Floor, Head, SealedSegment, Void};

use open::Tail;
use scan::{Examined, examine};

const COPY_BYTES: u64 = 1024 * 1024;

/// What recovery found and did, for the journal and for `tierctl`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// The last transaction of the log.
    pub end: Option<Lsn>,
    /// Segments that a crash had left open, and that are sealed now.
    pub segments: Vec<RecoveredSegment>,
    /// What was set aside, removed or could not be checked, a sentence each.
    pub warnings: Vec<String>,
    /// The operator's word was needed: acknowledged transactions are gone.
    pub loss_accepted: bool,
    /// The catalog knows transactions that the log has lost: it must be rebuilt before it is used.
    pub catalog_is_ahead: bool,
}

/// A segment that a crash had left open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecoveredSegment {
    /// Its number.
    pub no: SegmentNo,
    /// The last transaction in it.
    pub last_lsn: Option<Lsn>,
    /// Bytes of frames that were kept.
    pub kept: u64,
    /// Bytes that were not: torn, or of transactions without a commit.
    pub dropped: u64,
}

/// The state of a recovered spool.
pub(crate) struct End {
    pub(crate) log_id: LogId,
    pub(crate) head: Option<Head>,
    pub(crate) removed: Option<Head>,
    pub(crate) sealed: BTreeMap<SegmentNo, SealedSegment>,
    pub(crate) voids: Vec<Void>,
}

/// The spool's own file, made again where it was lost.
pub(crate) fn new_mark<D: Disk>(
    disk: &D,
    end: &End,
    boot: Option<[u8; 16]>,
) -> Result<MarkFile<D>, SpoolError> {
    let fail = |doing| move |source| SpoolError::io(disk.path(), MARK_NAME, doing, source);
    if disk
        .list()
        .map_err(fail("looking for"))?
        .iter()
        .any(|name| name == MARK_NAME)
    {
        disk.remove(MARK_NAME)
            .map_err(fail("removing the damaged"))?;
    }
    let mut mark = mark::fresh(end.log_id, end.head.clone(), boot);
    mark.removed.clone_from(&end.removed);
    let file = MarkFile::create(disk, mark)
        .map_err(|error| SpoolError::io(disk.path(), MARK_NAME, error.doing, error.source))?;
    disk.sync_dir().map_err(fail("syncing the directory of"))?;
    Ok(file)
}

/// BLAKE3 of a file in the spool.
pub(crate) fn hash_file<D: Disk>(disk: &D, name: &str) -> Result<Hash, SpoolError> {
    let fail = |doing| move |source| SpoolError::io(disk.path(), name, doing, source);
    let file = disk.open(name).map_err(fail("opening"))?;
    let len = file.len().map_err(fail("reading"))?;
    let mut hasher = blake3::Hasher::new();
    copy(&file, len, |bytes, _| {
        hasher.update(bytes);
        Ok(())
    })
    .map_err(fail("reading"))?;
    Ok(hasher.finalize().into())
}

/// Gives the first `len` bytes of a file in pieces, with their offsets.
fn copy(
    from: &dyn ReadAt,
    len: u64,
    mut to: impl FnMut(&[u8], u64) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut buf = vec![0; usize::try_from(COPY_BYTES.min(len)).unwrap_or(0)];
    let mut at = 0;
    while at < len {
        let now = usize::try_from((len - at).min(COPY_BYTES)).unwrap_or(0);
        from.read_exact_at(&mut buf[..now], at)?;
        to(&buf[..now], at)?;
        at += now as u64;
    }
    Ok(())
}

/// What lies in the spool's directory.
#[derive(Default)]
struct Files {
    sealed: BTreeSet<SegmentNo>,
    open: BTreeMap<SegmentNo, Epoch>,
    temporary: Vec<String>,
    voids: Vec<Void>,
}

impl Files {
    fn list<D: Disk>(disk: &D) -> Result<Self, SpoolError> {
        let fail = |doing| move |source| SpoolError::io(disk.path(), "", doing, source);
        let mut files = Self::default();
        for file_name in disk.list().map_err(fail("listing"))? {
            let path = || disk.path().join(&file_name);
            match Name::parse(&file_name) {
                None => return Err(SpoolError::UnknownFile { path: path() }),
                Some(Name::Mark | Name::Lock | Name::LostAndFound) => {}
                Some(Name::Sealed(no)) => {
                    files.sealed.insert(no);
                }
                Some(Name::Open(no, epoch)) => {
                    if let Some(other) = files.open.insert(no, epoch) {
                        return Err(SpoolError::Fork {
                            path: path(),
                            what: format!("{} is there as well", Name::Open(no, other)),
                        });
                    }
                }
                Some(Name::Temporary(..) | Name::NewMark) => files.temporary.push(file_name),
                Some(Name::Void(segment, ..)) => {
                    let bytes = disk.open(&file_name).and_then(|file| file.len());
                    files.voids.push(Void {
                        segment,
                        bytes: bytes.map_err(fail("looking at a file of"))?,
                        file_name,
                    });
                }
            }
        }
        files.voids.sort_by_key(|void| void.segment);
        Ok(files)
    }

    fn numbers(&self) -> BTreeSet<SegmentNo> {
        self.sealed
            .iter()
            .chain(self.open.keys())
            .copied()
            .collect()
    }
}

/// See the module's description.
pub(crate) fn recover<D: Disk>(
    disk: &D,
    mark: Option<&Mark>,
    floor: &Floor,
    boot: Option<[u8; 16]>,
    now: Time,
) -> Result<(End, Recovered), SpoolError> {
    let files = Files::list(disk)?;
    let log_id = log_id(disk, &files, mark, floor)?;
    let removed = match mark {
        Some(mark) => mark.removed.clone(),
        None if files.numbers().is_empty() => floor.sealed.clone(),
        None => None,
    };
    let mut recovery = Recovery {
        disk,
        mark,
        floor,
        // Without a boot since, every written byte is there.
        nothing_lost: boot.is_some() && mark.is_some_and(|mark| mark.boot == boot),
        seen: files.numbers().last().copied(),
        front_known: mark.is_some(),
        now,
        end: End {
            log_id,
            head: removed.clone(),
            removed,
            sealed: BTreeMap::new(),
            voids: files.voids.clone(),
        },
        report: Recovered::default(),
    };
    if mark.is_none() {
        recovery.report.warnings.push(format!(
            "{} is damaged or missing and was made again: what it had on record could not be compared",
            disk.path().join(MARK_NAME).display()
        ));
    }
    recovery.run(&files)?;
    Ok((recovery.end, recovery.report))
}

/// Whose log it is, by every word that there is on it but the segments'.
fn log_id<D: Disk>(
    disk: &D,
    files: &Files,
    mark: Option<&Mark>,
    floor: &Floor,
) -> Result<LogId, SpoolError> {
    let from_segment = || {
        let names = files.sealed.iter().map(|no| Name::Sealed(*no));
        let names = names.chain(files.open.iter().map(|(no, epoch)| Name::Open(*no, *epoch)));
        names.into_iter().find_map(|name| {
            let file = disk.open(&name.to_string()).ok()?;
            Some(
                Scan::open(Arc::new(file), name.to_string())
                    .ok()?
                    .header
                    .log_id,
            )
        })
    };
    let found = mark.map(|mark| mark.log_id).or_else(from_segment);
    match (found, floor.log_id) {
        (Some(found), Some(expected)) if found != expected => Err(SpoolError::WrongLog {
            path: disk.path().to_owned(),
            found,
            expected,
        }),
        (Some(found), _) => Ok(found),
        (None, Some(expected)) if floor.sealed.is_some() => Ok(expected),
        (None, _) => Err(SpoolError::NotASpool {
            path: disk.path().to_owned(),
            what: "its file spool.hsm and all segments are missing",
        }),
    }
}

struct Recovery<'r, D: Disk> {
    disk: &'r D,
    mark: Option<&'r Mark>,
    floor: &'r Floor,
    nothing_lost: bool,
    /// The last segment of which there is a file, if only one that holds nothing.
    seen: Option<SegmentNo>,
    /// What came before the first file is known.
    front_known: bool,
    now: Time,
    end: End,
    report: Recovered,
}

impl<D: Disk> Recovery<'_, D> {
    fn run(&mut self, files: &Files) -> Result<(), SpoolError> {
        for name in &files.temporary {
            self.remove(name)?;
        }
        let mut numbers = files.numbers();
        self.finish_removals(files, &mut numbers)?;
        let orphans = self.check_gaps(files, &mut numbers)?;
        let mut left: Vec<SegmentNo> = numbers.into_iter().collect();
        left.reverse();
        while let Some(no) = left.pop() {
            let rest: Vec<SegmentNo> = left.iter().rev().copied().collect();
            if files.sealed.contains(&no) {
                self.adopt(files, no, rest.first().copied())?;
            } else if let Some(&epoch) = files.open.get(&no)
                && self.take_open(files, no, epoch, &rest)? == Tail::Torn
            {
                break;
            }
        }
        self.check_floor()?;
        // Only now, where nothing can be refused any more, the last leftovers go.
        for no in orphans {
            if let Some(&epoch) = files.open.get(&no) {
                self.set_aside(no, epoch, "the segment before it is missing")?;
            }
        }
        // Also where nothing was done: the process before may have ended before its own sync.
        self.sync_dir()?;
        self.report.end = self.next_lsn().prev();
        self.report.catalog_is_ahead = self.floor.folded > self.report.end;
        Ok(())
    }

    fn next_lsn(&self) -> Lsn {
        self.end
            .head
            .as_ref()
            .map_or(Lsn::FIRST, |head| head.next_lsn)
    }

    fn io(
        &self,
        name: &str,
        doing: &'static str,
    ) -> impl FnOnce(std::io::Error) -> SpoolError + use<D> {
        let path = self.disk.path().join(name);
        move |source| SpoolError::Io {
            path,
            doing,
            source,
        }
    }

    fn sync_dir(&self) -> Result<(), SpoolError> {
        self.disk.sync_dir().map_err(self.io("", "syncing"))
    }

    fn remove(&self, name: &str) -> Result<(), SpoolError> {
        self.disk.remove(name).map_err(self.io(name, "removing"))
    }

    fn warn(&mut self, warning: String) {
        self.report.warnings.push(warning);
    }

    /// A segment that was on record as removed is still there where a crash came in between.
    fn finish_removals(
        &mut self,
        files: &Files,
        numbers: &mut BTreeSet<SegmentNo>,
    ) -> Result<(), SpoolError> {
        let Some(removed) = self.end.removed.as_ref().map(|head| head.segment) else {
            return Ok(());
        };
        let old: Vec<_> = numbers.range(..=removed).copied().collect();
        for no in old {
            if !files.sealed.contains(&no) || files.open.contains_key(&no) {
                let epoch = files.open.get(&no).copied().unwrap_or(Epoch(0));
                return Err(SpoolError::Fork {
                    path: self.disk.path().join(Name::Open(no, epoch).to_string()),
                    what: format!("segment {no} was sealed, copied and removed before"),
                });
            }
            let name = no.file_name();
            if no == removed {
                let found = hash_file(self.disk, &name)?;
                self.compare_hash(no, found)?;
            }
            self.remove(&name)?;
            self.warn(format!(
                "{name} was removed: it had been copied, and a crash had come in between"
            ));
            numbers.remove(&no);
        }
        Ok(())
    }

    /// Splits off what lies behind a gap in the numbers. That is an error, unless it can be the
    /// work of a power loss, which may keep the name of a new file and lose that of the one before.
    fn check_gaps(
        &mut self,
        files: &Files,
        numbers: &mut BTreeSet<SegmentNo>,
    ) -> Result<BTreeSet<SegmentNo>, SpoolError> {
        let mut expected = match (&self.end.head, self.front_known) {
            (Some(head), _) => head.segment.next(),
            (None, true) => SegmentNo::FIRST,
            (None, false) => numbers.first().copied().unwrap_or(SegmentNo::FIRST),
        };
        for &no in &*numbers {
            if let Some(last) = no.prev().filter(|_| no > expected) {
                let behind = numbers.split_off(&no);
                let gap = SpoolError::Gap {
                    path: self.disk.path().to_owned(),
                    first: expected,
                    last,
                };
                return self.orphans(files, behind, gap);
            }
            expected = no.next();
        }
        Ok(BTreeSet::new())
    }

    fn orphans(
        &self,
        files: &Files,
        behind: BTreeSet<SegmentNo>,
        gap: SpoolError,
    ) -> Result<BTreeSet<SegmentNo>, SpoolError> {
        for &no in &behind {
            if self.nothing_lost || files.sealed.contains(&no) || self.durable_in(files, no)? > 0 {
                return Err(gap);
            }
        }
        Ok(behind)
    }

    /// Every hash that is on record for this segment.
    fn compare_hash(&self, no: SegmentNo, found: Hash) -> Result<(), SpoolError> {
        let mark = self
            .mark
            .into_iter()
            .flat_map(|mark| [&mark.removed, &mark.sealed]);
        let known = mark.chain([&self.floor.sealed]).flatten();
        for head in known.filter(|head| head.segment == no) {
            if head.hash != found {
                return Err(SpoolError::Hash {
                    path: self.disk.path().join(no.file_name()),
                    found,
                    expected: head.hash,
                });
            }
        }
        Ok(())
    }

    /// Does the header continue the log, and is it the one that the name says?
    fn check_header(&mut self, name: &Name, header: &SegmentHeader) -> Result<(), SpoolError> {
        let path = self.disk.path().join(name.to_string());
        if header.log_id != self.end.log_id {
            return Err(SpoolError::WrongLog {
                path,
                found: header.log_id,
                expected: self.end.log_id,
            });
        }
        let fork = |what: String| SpoolError::Fork { path, what };
        let named = match *name {
            Name::Open(no, epoch) => (no, epoch) == (header.segment, header.epoch),
            Name::Sealed(no) => no == header.segment,
            _ => false,
        };
        if !named {
            return Err(fork(format!(
                "its header says segment {} of epoch {}",
                header.segment, header.epoch
            )));
        }
        if self.end.head.is_none() && !self.front_known {
            // Nothing is known of what came before: believe the first header.
            self.front_known = true;
            self.end.head = header
                .previous
                .zip(header.segment.prev())
                .zip(Some(header.first_lsn))
                .map(|((hash, segment), next_lsn)| Head {
                    segment,
                    hash,
                    epoch: header.epoch,
                    next_lsn,
                });
            self.end.removed.clone_from(&self.end.head);
        }
        let head = self.end.head.as_ref();
        if header.previous != head.map(|head| head.hash) {
            return Err(fork(
                "it continues another segment than the one before it".to_owned(),
            ));
        }
        if header.first_lsn != self.next_lsn() {
            return Err(fork(format!(
                "it begins with transaction {}, the log goes on with {}",
                header.first_lsn,
                self.next_lsn()
            )));
        }
        Ok(())
    }

    fn open_file(&self, name: &str) -> Result<Arc<D::File>, SpoolError> {
        let file = self.disk.open(name).map_err(self.io(name, "opening"))?;
        Ok(Arc::new(file))
    }

    /// Takes a sealed segment as it is. Its hash is what the next one says of it; where that is not
    /// sealed as well, the file is read.
    fn adopt(
        &mut self,
        files: &Files,
        no: SegmentNo,
        next: Option<SegmentNo>,
    ) -> Result<(), SpoolError> {
        let name = Name::Sealed(no);
        let (file_name, path) = (name.to_string(), self.disk.path().join(name.to_string()));
        let file = self.open_file(&file_name)?;
        let segment =
            Segment::open(file.clone(), path.display().to_string()).map_err(
                |error| match error {
                    SegmentError::NewerVersion { .. } => SpoolError::Segment(error),
                    _ => SpoolError::Sealed(error),
                },
            )?;
        self.check_header(&name, &segment.header)?;
        let claimed = next
            .filter(|next| files.sealed.contains(next))
            .and_then(|next| {
                let file = self.disk.open(&next.file_name()).ok()?;
                Scan::open(Arc::new(file), "").ok()?.header.previous
            });
        let hash = claimed.map_or_else(|| hash_file(self.disk, &file_name), Ok)?;
        self.compare_hash(no, hash)?;
        if let Some(&epoch) = files.open.get(&no) {
            self.retire_leftover(&segment, &*file, epoch)?;
        }
        let bytes = file.len().map_err(self.io(&file_name, "reading"))?;
        let trailer = segment.trailer.as_ref();
        self.push(SealedSegment {
            no,
            hash,
            bytes,
            epoch: segment.header.epoch,
            first_lsn: segment.header.first_lsn,
            last_lsn: trailer.and_then(|trailer| trailer.last_lsn),
            file_name,
            sealed_at: Time {
                seconds: trailer
                    .and_then(|trailer| i64::try_from(trailer.sealed_at).ok())
                    .unwrap_or(0),
                nanos: 0,
            },
        });
        Ok(())
    }

    fn push(&mut self, sealed: SealedSegment) {
        self.end.head = Some(sealed.head());
        self.end.sealed.insert(sealed.no, sealed);
    }

    /// A sealed segment beside the open file that it was recovered from: a crash came before that
    /// file was removed. Anything else of the same number is a fork.
    fn retire_leftover(
        &mut self,
        segment: &Segment,
        sealed: &D::File,
        epoch: Epoch,
    ) -> Result<(), SpoolError> {
        let no = segment.header.segment;
        let name = Name::Open(no, epoch);
        let file = self.open_file(&name.to_string())?;
        let fail = || self.io(&name.to_string(), "reading");
        let end = segment
            .trailer
            .as_ref()
            .map_or(0, |trailer| trailer.index_offset);
        let mut same = segment.header.epoch == epoch && file.len().map_err(fail())? >= end;
        if same {
            copy(sealed, end, |bytes, at| {
                let mut other = vec![0; bytes.len()];
                file.read_exact_at(&mut other, at)?;
                same &= other == bytes;
                Ok(())
            })
            .map_err(fail())?;
        }
        if !same {
            return Err(SpoolError::Fork {
                path: self.disk.path().join(name.to_string()),
                what: format!("{} has another content", no.file_name()),
            });
        }
        let examined = examine(&file, &name.to_string(), segment.header.first_lsn)
            .map_err(SpoolError::Segment)?;
        self.retire_open(no, epoch, &examined)
    }

    /// The open file is not needed any more: removed, or set aside where it has whole frames that
    /// were not kept. Nothing is to be done where it was sealed in place.
    fn retire_open(
        &mut self,
        no: SegmentNo,
        epoch: Epoch,
        examined: &Examined,
    ) -> Result<(), SpoolError> {
        let name = Name::Open(no, epoch).to_string();
        match self.disk.open(&name) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(self.io(&name, "opening")(error)),
            Ok(_) if examined.following > 0 => {
                self.set_aside(no, epoch, "whole frames lie behind its torn end")
            }
            Ok(_) => self.remove(&name),
        }
    }

    fn set_aside(&mut self, segment: SegmentNo, epoch: Epoch, why: &str) -> Result<(), SpoolError> {
        let from = Name::Open(segment, epoch).to_string();
        let taken = |count: u32| {
            let name = Name::Void(segment, epoch, count).to_string();
            self.end.voids.iter().any(|void| void.file_name == name)
        };
        let count = (1..u32::MAX)
            .find(|count| !taken(*count))
            .unwrap_or(u32::MAX);
        let file_name = Name::Void(segment, epoch, count).to_string();
        let bytes = self
            .open_file(&from)?
            .len()
            .map_err(self.io(&from, "reading"))?;
        self.disk
            .rename(&from, &file_name)
            .map_err(self.io(&from, "setting aside"))?;
        self.warn(format!(
            "{from} was set aside as {file_name} ({bytes} bytes): {why}; nothing in it was ever acknowledged"
        ));
        self.end.voids.push(Void {
            segment,
            file_name,
            bytes,
        });
        Ok(())
    }
}
