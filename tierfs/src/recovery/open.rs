//! A segment that was never sealed: is its end the end of the log, or damage; and its final form.

use super::scan::{Examined, examine};
use super::{Files, RecoveredSegment, Recovery, copy};
use crate::disk::{Disk, DiskFile};
use crate::ids::{Epoch, Hash, Lsn, SegmentNo, Time};
use crate::record::SegmentHeader;
use crate::segment::{self, Index, Segment, Trailer};
use crate::spool::SealedSegment;
use crate::spool::error::{Evidence, SpoolError};
use crate::spool::names::Name;
use crate::writer::is_full;

/// Whether the log may go on in the next file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tail {
    Whole,
    Torn,
}

impl<D: Disk> Recovery<'_, D> {
    /// Takes a segment that was never sealed.
    pub(super) fn take_open(
        &mut self,
        files: &Files,
        no: SegmentNo,
        epoch: Epoch,
        rest: &[SegmentNo],
    ) -> Result<Tail, SpoolError> {
        let name = Name::Open(no, epoch);
        let file = self.open_file(&name.to_string())?;
        let path = self.disk.path().join(name.to_string());
        let examined = examine(&file, &path.display().to_string(), self.next_lsn())
            .map_err(SpoolError::Segment)?;
        if let Some(header) = &examined.header {
            self.check_header(&name, header)?;
        }
        if examined.complete {
            self.seal(&name, &*file, &examined)?;
            self.retire_open(no, epoch, &examined)?;
            return Ok(Tail::Whole);
        }
        if let Some(evidence) = self.evidence(files, no, epoch, &examined, rest)? {
            self.refuse_or_accept(SpoolError::Damaged {
                path,
                offset: examined.valid_end,
                what: examined.why.clone(),
                evidence,
                end: examined.next_lsn(self.next_lsn()).prev(),
            })?;
        }
        // First what comes after, so that it is never found behind a segment it does not continue.
        for later in rest {
            if let Some(&epoch) = files.open.get(later) {
                self.set_aside(*later, epoch, "the segment before it was not whole")?;
            }
        }
        if !rest.is_empty() {
            self.sync_dir()?;
        }
        if examined.frames.len() > 1 {
            self.seal(&name, &*file, &examined)?;
            self.retire_open(no, epoch, &examined)?;
        } else if examined.header.is_some() || examined.len == 0 {
            self.retire_open(no, epoch, &examined)?;
        } else {
            self.set_aside(no, epoch, "it has no whole header")?;
        }
        Ok(Tail::Torn)
    }

    /// Is there a sign that this was durable, so that its end is no torn end of a crash?
    fn evidence(
        &self,
        files: &Files,
        no: SegmentNo,
        epoch: Epoch,
        examined: &Examined,
        rest: &[SegmentNo],
    ) -> Result<Option<Evidence>, SpoolError> {
        if let Some(&segment) = rest.iter().find(|later| files.sealed.contains(later)) {
            return Ok(Some(Evidence::SealedLater { segment }));
        }
        if examined.following > 0 && self.nothing_lost {
            let count = examined.following;
            return Ok(Some(Evidence::Frames { count }));
        }
        if let Some(segment) = self.on_record(no) {
            return Ok(Some(Evidence::Missing { segment }));
        }
        let recorded = self.mark.and_then(|mark| mark.durable.as_ref());
        let recorded = recorded.filter(|durable| (durable.segment, durable.epoch) == (no, epoch));
        let bytes = recorded
            .map_or(0, |durable| durable.bytes)
            .max(examined.durable);
        if bytes > examined.valid_end {
            return Ok(Some(Evidence::DurableBytes { bytes }));
        }
        for &segment in rest {
            let bytes = self.durable_in(files, segment)?;
            if bytes > 0 {
                return Ok(Some(Evidence::DurableBytes { bytes }));
            }
            if self.nothing_lost {
                return Ok(Some(Evidence::BegunLater { segment }));
            }
        }
        Ok(None)
    }

    /// A segment on record that was durable only after this one was whole.
    fn on_record(&self, no: SegmentNo) -> Option<SegmentNo> {
        let mark = self.mark?;
        let sealed = mark.sealed.as_ref().map(|head| head.segment);
        let later = mark.durable.as_ref().map(|durable| durable.segment);
        let later = later.filter(|segment| *segment > no);
        sealed.filter(|segment| *segment >= no).or(later)
    }

    /// How much of an open segment was ever durable, by its own words. More than nothing means that
    /// the segments before it were synced and sealed.
    pub(super) fn durable_in(&self, files: &Files, segment: SegmentNo) -> Result<u64, SpoolError> {
        let epoch = files.open.get(&segment).copied().unwrap_or(Epoch(0));
        let name = Name::Open(segment, epoch).to_string();
        let file = self.open_file(&name)?;
        let examined = examine(&file, &name, Lsn::FIRST).map_err(SpoolError::Segment)?;
        Ok(examined.durable)
    }

    /// The operator may say that the log shall end here nevertheless.
    fn refuse_or_accept(&mut self, error: SpoolError) -> Result<(), SpoolError> {
        let (SpoolError::Damaged { end, evidence, .. } | SpoolError::Lost { end, evidence, .. }) =
            &error
        else {
            return Err(error);
        };
        let accepted = self.floor.accept_loss_after == Some(end.map_or(0, Lsn::get));
        // What was sealed is on its way to volumes, or there: never contradicted.
        if !accepted || matches!(evidence, Evidence::SealedLater { .. }) {
            return Err(error);
        }
        self.report.loss_accepted = true;
        self.warn(format!("accepted by the operator: {error}"));
        Ok(())
    }

    /// Brings what survives of an open segment to its final place.
    fn seal(&mut self, name: &Name, file: &D::File, examined: &Examined) -> Result<(), SpoolError> {
        let Some(header) = &examined.header else {
            return Ok(());
        };
        let temporary = Name::Temporary(header.segment, header.epoch).to_string();
        let file_name = header.segment.file_name();
        let (from, (hash, bytes)) = match self.write_copy(&temporary, file, examined, header) {
            Ok(copied) => (temporary, copied),
            Err(SpoolError::Io { source, .. }) if is_full(&source) && examined.following == 0 => {
                self.remove(&temporary)?;
                self.warn(format!(
                    "there was no space for a copy of {name}, so it was sealed where it lies"
                ));
                (
                    name.to_string(),
                    self.seal_in_place(name, examined, header)?,
                )
            }
            Err(error) => return Err(error),
        };
        self.compare_hash(header.segment, hash)?;
        self.disk
            .rename(&from, &file_name)
            .map_err(self.io(&from, "giving its final name to"))?;
        self.sync_dir()?;
        self.report.segments.push(RecoveredSegment {
            no: header.segment,
            last_lsn: examined.last_lsn,
            kept: examined.cut,
            dropped: if examined.complete {
                0
            } else {
                examined.len - examined.cut
            },
        });
        tracing::info!("recovered {name} as {file_name}");
        self.push(SealedSegment {
            no: header.segment,
            hash,
            bytes,
            epoch: header.epoch,
            first_lsn: header.first_lsn,
            last_lsn: examined.last_lsn,
            file_name,
            sealed_at: self.now,
        });
        Ok(())
    }

    /// On a full disk: index and trailer go into the space that the writer reserved for them.
    ///
    /// What is kept is written over itself, byte for byte, so that a sync writes it again even where
    /// an earlier one failed and left its pages clean. A crash in between finds the same bytes.
    fn seal_in_place(
        &self,
        name: &Name,
        examined: &Examined,
        header: &SegmentHeader,
    ) -> Result<(Hash, u64), SpoolError> {
        let name = name.to_string();
        let fail = |doing| self.io(&name, doing);
        let file = self.disk.open_write(&name).map_err(fail("opening"))?;
        let mut hasher = blake3::Hasher::new();
        let mut bytes = examined.kept();
        copy(&file, bytes, |part, at| {
            hasher.update(part);
            file.write_all_at(&[part], at)
        })
        .map_err(fail("writing again"))?;
        if !examined.complete {
            if examined.cut < examined.len {
                file.truncate(examined.cut)
                    .map_err(fail("cutting off the torn end of"))?;
            }
            let end = end_of(header, examined, self.now)?;
            hasher.update(&end);
            file.write_all_at(&[&end], bytes)
                .map_err(fail("writing the index of"))?;
            bytes += end.len() as u64;
        }
        file.set_read_only()
            .and_then(|()| file.sync())
            .map_err(fail("syncing"))?;
        Ok((hasher.finalize().into(), bytes))
    }

    fn write_copy(
        &self,
        temporary: &str,
        from: &D::File,
        examined: &Examined,
        header: &SegmentHeader,
    ) -> Result<(Hash, u64), SpoolError> {
        let fail = |doing| self.io(temporary, doing);
        let to = self.disk.create(temporary).map_err(fail("creating"))?;
        let mut hasher = blake3::Hasher::new();
        let len = examined.kept();
        copy(from, len, |bytes, at| {
            hasher.update(bytes);
            to.write_all_at(&[bytes], at)
        })
        .map_err(fail("copying what survived to"))?;
        let mut bytes = len;
        if !examined.complete {
            let end = end_of(header, examined, self.now)?;
            hasher.update(&end);
            to.write_all_at(&[&end], len).map_err(fail("writing"))?;
            bytes += end.len() as u64;
        }
        to.set_read_only()
            .and_then(|()| to.sync())
            .map_err(fail("syncing"))?;
        // What is to be trusted from now on is read once as every reader will.
        let path = self.disk.path().join(temporary).display().to_string();
        let file = self.open_file(temporary)?;
        Segment::open(file, path).map_err(SpoolError::Segment)?;
        Ok((hasher.finalize().into(), bytes))
    }

    /// Does the log reach as far as everybody remembers?
    pub(super) fn check_floor(&mut self) -> Result<(), SpoolError> {
        let last = self.end.head.as_ref().map(|head| head.segment);
        let path = self.disk.path().to_owned();
        let sealed = self.mark.and_then(|mark| mark.sealed.as_ref());
        for known in [sealed, self.floor.sealed.as_ref()].into_iter().flatten() {
            if last < Some(known.segment) {
                let known = known.segment;
                return Err(SpoolError::Behind { path, last, known });
            }
        }
        let end = self.next_lsn().prev();
        let recorded = self.mark.and_then(|mark| mark.durable.as_ref());
        if let Some(durable) = recorded
            && self.seen.max(last) < Some(durable.segment)
        {
            let evidence = Evidence::Missing {
                segment: durable.segment,
            };
            let path = path.clone();
            self.refuse_or_accept(SpoolError::Lost {
                path,
                end,
                evidence,
            })?;
        }
        let recorded = recorded.and_then(|durable| durable.next_lsn.prev());
        let known = [self.floor.folded, self.floor.durable, recorded]
            .into_iter()
            .flatten()
            .max();
        if let Some(known) = known.filter(|known| Some(*known) > end) {
            let evidence = Evidence::KnownLsn { last: known };
            self.refuse_or_accept(SpoolError::Lost {
                path,
                end,
                evidence,
            })?;
        }
        Ok(())
    }
}

/// Index and trailer for the frames that survive.
fn end_of(header: &SegmentHeader, examined: &Examined, now: Time) -> Result<Vec<u8>, SpoolError> {
    let trailer = Trailer {
        epoch: header.epoch,
        segment: header.segment,
        index_offset: examined.cut,
        index_len: 0,
        frames: u32::try_from(examined.frames.len()).unwrap_or(u32::MAX),
        first_lsn: examined.last_lsn.map(|_| header.first_lsn),
        last_lsn: examined.last_lsn,
        sealed_at: u64::try_from(now.seconds).unwrap_or(0),
    };
    let index = Index {
        frames: examined.frames.clone(),
    };
    Ok(segment::encode_end(&index, trailer)?)
}
