//! Making durable what was appended, on a thread of its own.

use std::io;
use std::sync::Arc;

use super::{SealedSegment, Unsealed, WriterError};
use crate::disk::{Disk, DiskFile, RealDisk};
use crate::ids::{Epoch, Lsn, SegmentNo};
use crate::spool::Shared;
use crate::spool::mark::Durable;

/// A segment that has its index and trailer, and lacks its sync and its name.
pub(crate) struct Finish<D: Disk> {
    pub(crate) reader: Arc<Unsealed<D>>,
    pub(crate) sealed: SealedSegment,
}

/// Everything that was appended up to a moment, to be made durable. May run on any thread.
#[must_use = "nothing is durable until the job has run"]
pub struct SyncJob<D: Disk = RealDisk> {
    pub(super) shared: Arc<Shared<D>>,
    pub(super) epoch: Epoch,
    pub(super) finish: Vec<Finish<D>>,
    pub(super) names_changed: bool,
    pub(super) open: Option<(Arc<Unsealed<D>>, u64)>,
    pub(super) next_lsn: Lsn,
    pub(super) written_bytes: u64,
}

/// What a job made durable.
#[derive(Debug)]
pub struct Synced {
    /// The last durable transaction.
    pub durable: Option<Lsn>,
    /// The segments that got their final form, in order.
    pub sealed: Vec<SealedSegment>,
    /// The open segment and its durable bytes.
    pub(super) open: Option<(SegmentNo, u64)>,
    /// Durable bytes since the writer's start.
    pub(super) written_bytes: u64,
}

impl<D: Disk> SyncJob<D> {
    /// Syncs. To be followed by [`super::Writer::done`] with the result, whatever it is.
    ///
    /// Full segments first and in order, so that no segment has its final name, and nothing in a
    /// later one counts as durable, before all of them are durable.
    pub fn run(self) -> Result<Synced, WriterError> {
        for full in &self.finish {
            self.finish(full)?;
        }
        if self.names_changed || !self.finish.is_empty() {
            let path = self.shared.disk.path().to_owned();
            self.shared
                .disk
                .sync_dir()
                .map_err(|source| WriterError::Failed {
                    path,
                    doing: "syncing the directory",
                    source,
                })?;
        }
        if let Some((open, _)) = &self.open {
            open.file.sync().map_err(self.fail(&open.name, "syncing"))?;
        }
        self.record();
        Ok(Synced {
            durable: self.next_lsn.prev(),
            sealed: self.finish.iter().map(|full| full.sealed.clone()).collect(),
            open: self
                .open
                .as_ref()
                .map(|(open, bytes)| (open.header.segment, *bytes)),
            written_bytes: self.written_bytes,
        })
    }

    fn finish(&self, full: &Finish<D>) -> Result<(), WriterError> {
        let (file, name) = (&full.reader.file, &full.reader.name);
        // Gives back what was reserved beyond the end.
        file.truncate(full.sealed.bytes)
            .and_then(|()| file.set_read_only())
            .map_err(self.fail(name, "finishing"))?;
        file.sync().map_err(self.fail(name, "syncing"))?;
        self.shared
            .disk
            .rename(name, &full.sealed.file_name)
            .map_err(self.fail(name, "giving its final name to"))
    }

    fn fail(&self, name: &str, doing: &'static str) -> impl FnOnce(io::Error) -> WriterError {
        let path = self.shared.disk.path().join(name);
        move |source| WriterError::Failed {
            path,
            doing,
            source,
        }
    }

    /// Notes in the spool's own file what is durable now. A failure costs nothing but that record.
    fn record(&self) {
        let durable = match (&self.open, self.finish.last()) {
            (Some((open, bytes)), _) => Some((open.header.segment, *bytes)),
            (None, Some(full)) => Some((full.sealed.no, full.sealed.bytes)),
            (None, None) => None,
        };
        let boot = self.shared.boot;
        let done = self.shared.mark.update(|mark| {
            if let Some((segment, bytes)) = durable {
                mark.durable = Some(Durable {
                    epoch: self.epoch,
                    segment,
                    bytes,
                    next_lsn: self.next_lsn,
                });
            }
            if let Some(full) = self.finish.last() {
                mark.sealed = Some(full.sealed.head());
            }
            mark.boot = boot;
        });
        if let Err(error) = done {
            tracing::warn!(
                "{} the spool's file in {} failed: {}; the log itself is durable",
                error.doing,
                self.shared.disk.path().display(),
                error.source
            );
        }
    }
}
