//! The spool's own file, `spool.hsm`: whose log this is, and how far it is known to be durable.
//!
//! Two slots, written in turn, each with a hash: one that is torn leaves the other. The file is
//! written after every sync of the log and not synced itself, so it costs one small write: after a
//! kill it is exact, after a power loss it may be some seconds old. It never claims what is not
//! true: everything in it was durable before it was written. Before a segment leaves the spool, the
//! file is synced, so that the end of the log is known when no segment is left.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::names::{MARK_NAME, NEW_MARK_NAME};
use super::{Head, SpoolError};
use crate::cbor::{self, CborError};
use crate::cbor_map;
use crate::disk::{Disk, DiskFile};
use crate::ids::{Epoch, Hash, LogId, Lsn, SegmentNo};
use crate::segment::ReadAt;

const SLOT: u64 = 4096;
const MAGIC: [u8; 8] = *b"HSM-SPL\n";
/// The version that this program writes; it reads every version up to it.
const VERSION: u32 = 1;
const FIXED: usize = MAGIC.len() + 4;

cbor_map! {
    /// How far the log is durable.
    Durable {
        /// The writer.
        0 => epoch: Epoch,
        /// Its open segment.
        2 => segment: SegmentNo,
        /// Durable bytes of that segment.
        4 => bytes: u64,
        /// The LSN after the last durable commit.
        6 => next_lsn: Lsn,
    }
}

cbor_map! {
    /// What the spool's own file says.
    Mark {
        /// Version of this file's format.
        0 => version: u32,
        /// The kernel's boot id when this was written.
        1 => boot: Option<[u8; 16]>,
        /// The log.
        2 => log_id: LogId,
        /// Ascends with each writing: the slot with the larger one holds.
        4 => sequence: u64,
        /// The last segment that left the spool.
        6 => removed: Option<Head>,
        /// The last segment that was sealed.
        8 => sealed: Option<Head>,
        /// How far the log is durable.
        10 => durable: Option<Durable>,
    }
}

fn encode(mark: &Mark) -> Vec<u8> {
    let body = cbor::to_bytes(mark);
    let mut out = MAGIC.to_vec();
    out.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(body);
    let hash = Hash::of(&out);
    out.extend(hash.0);
    out
}

/// A slot's content: `None` where it was never written or is torn.
fn decode(slot: &[u8]) -> Option<Result<Mark, CborError>> {
    if slot.get(..MAGIC.len())? != MAGIC {
        return None;
    }
    let len = u32::from_le_bytes(slot.get(MAGIC.len()..FIXED)?.try_into().ok()?);
    let end = FIXED.checked_add(usize::try_from(len).ok()?)?;
    let hash = slot.get(end..end.checked_add(Hash::LEN)?)?;
    (Hash::of(&slot[..end]).0 == hash).then(|| cbor::whole(&slot[FIXED..end], "the spool's mark"))
}

/// Where the spool's file failed, for the caller to turn into an error with the path.
pub(crate) struct MarkError {
    pub(crate) doing: &'static str,
    pub(crate) source: io::Error,
}

/// The open file and what it holds.
pub(crate) struct MarkFile<D: Disk> {
    file: D::File,
    mark: Mutex<Mark>,
}

/// What was found of the file.
pub(crate) enum ReadMark<D: Disk> {
    Good(MarkFile<D>),
    /// Neither slot is whole.
    Damaged,
    Absent,
}

impl<D: Disk> MarkFile<D> {
    /// Makes the file under its temporary name, synced, and gives it its own: it is never half there.
    /// The caller has removed what was there, and syncs the directory.
    pub(crate) fn create(disk: &D, mark: Mark) -> Result<Self, MarkError> {
        let fail = |doing| move |source| MarkError { doing, source };
        let file = disk.create(NEW_MARK_NAME).map_err(fail("creating"))?;
        file.write_all_at(&[&vec![0; 2 * 4096]], 0)
            .map_err(fail("writing"))?;
        let made = Self {
            file,
            mark: Mutex::new(mark),
        };
        made.update(|_| ())?;
        made.sync()?;
        disk.rename(NEW_MARK_NAME, MARK_NAME)
            .map_err(fail("giving its final name to"))?;
        Ok(made)
    }

    /// Reads the file.
    pub(crate) fn open(disk: &D) -> Result<ReadMark<D>, SpoolError> {
        let fail = |doing| move |source| SpoolError::io(disk.path(), MARK_NAME, doing, source);
        let file = match disk.open_write(MARK_NAME) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ReadMark::Absent),
            opened => opened.map_err(fail("opening"))?,
        };
        let len = file.len().map_err(fail("reading"))?.min(2 * SLOT);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0).map_err(fail("reading"))?;
        let mut best: Option<Mark> = None;
        for slot in bytes.chunks(4096) {
            let Some(mark) = decode(slot) else { continue };
            let mark = mark.map_err(|error| SpoolError::NewerMark {
                name: disk.path().join(MARK_NAME),
                what: error.to_string(),
            })?;
            if mark.version > VERSION {
                return Err(SpoolError::NewerMark {
                    name: disk.path().join(MARK_NAME),
                    what: format!("its version is {}", mark.version),
                });
            }
            if best
                .as_ref()
                .is_none_or(|best| best.sequence < mark.sequence)
            {
                best = Some(mark);
            }
        }
        Ok(best.map_or(ReadMark::Damaged, |mark| {
            ReadMark::Good(Self {
                file,
                mark: Mutex::new(mark),
            })
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Mark> {
        self.mark.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self) -> Mark {
        self.lock().clone()
    }

    /// Changes what the file says and writes it, without a sync.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Mark)) -> Result<(), MarkError> {
        let mut mark = self.lock();
        change(&mut mark);
        mark.sequence += 1;
        mark.version = VERSION;
        let offset = mark.sequence % 2 * SLOT;
        self.file
            .write_all_at(&[&encode(&mark)], offset)
            .map_err(|source| MarkError {
                doing: "writing",
                source,
            })
    }

    /// Makes it durable.
    pub(crate) fn sync(&self) -> Result<(), MarkError> {
        self.file.sync().map_err(|source| MarkError {
            doing: "syncing",
            source,
        })
    }
}

/// A new mark.
pub(crate) fn fresh(log_id: LogId, head: Option<Head>, boot: Option<[u8; 16]>) -> Mark {
    Mark {
        version: VERSION,
        log_id,
        sequence: 0,
        removed: head.clone(),
        sealed: head,
        durable: None,
        boot,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::sim::SimDisk;

    fn log_id() -> LogId {
        LogId([3; 16])
    }

    #[test]
    fn one_torn_slot_leaves_the_other() {
        let disk = SimDisk::new();
        let file = MarkFile::create(&disk, fresh(log_id(), None, Some([1; 16])));
        let file = file.unwrap_or_else(|error| panic!("{}", error.source));
        for _ in 0..3 {
            assert!(file.update(|_| ()).is_ok());
        }
        let (now, bytes) = (file.get(), disk.bytes(MARK_NAME).unwrap());
        let read = |bytes: Vec<u8>| {
            disk.tamper(MARK_NAME, Some(bytes));
            match MarkFile::open(&disk).unwrap() {
                ReadMark::Good(file) => Some(file.get()),
                ReadMark::Damaged => None,
                ReadMark::Absent => panic!("it is there"),
            }
        };
        assert_eq!(read(bytes.clone()), Some(now.clone()));
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            let found = read(bad).unwrap();
            assert!(found.sequence == now.sequence || found.sequence + 1 == now.sequence);
        }
        let mut bad = bytes;
        bad[20] ^= 1;
        bad[4096 + 20] ^= 1;
        assert_eq!(read(bad), None);
        assert_eq!(read(Vec::new()), None);
    }
}
