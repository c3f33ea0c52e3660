//! Earlier content: which version a path had at a moment, and its bytes, checked, piece by piece.
//!
//! The client pulls: between two requests the daemon holds a cursor and one frame, so a client that
//! stops reading stalls nothing. Every piece is compared with the hash that was logged; of a frame
//! that is damaged on one copy, another copy is read. What lies in the spool's open segment, which
//! no list of segments names, is read there.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;

use replay::sources::Sources;
use serde_json::Value;
use tierfs::catalog::{AsOf, DataLocation, ExtentRow, Queries, Reader};
use tierfs::ids::{DataId, FileId, Hash, Lsn, SegmentNo};
use tierfs::layout;
use tierfs::record::{Kind, Record};
use tierfs::scan::{Scan, Step};

use super::log::{log_path, never_was};
use super::methods::{ContentParameters, ReadParameters, blocking};
use super::model::{Content, Piece};
use super::varlink::Failure;
use super::{Core, CoreError, base64};

/// The most bytes of data in one answer.
const BYTES_MAX: u64 = 4 << 20;
/// Extents looked at for one answer.
const EXTENTS_MAX: usize = 256;

/// Which version a path had.
pub(super) fn find(core: &dyn Core, asked: &ContentParameters) -> Result<Content, Failure> {
    let path = asked.path.exact()?;
    let name = log_path(core, &path)?;
    let catalog = core.catalog()?;
    let found = catalog.snapshot(|queries| {
        let lsn = moment(queries, asked)?;
        let then = queries.at(lsn)?;
        let Some(file) = then.resolve(&name)? else {
            return Err(absent(queries, &path, &name, lsn)?);
        };
        let inode = then.inode(file)?.ok_or_else(|| never_was(&path))?;
        if inode.kind != Kind::Regular {
            let kind = super::files::kind_word(inode.kind);
            return Err(CoreError::NotFound(format!(
                "{} was a {kind} at transaction {lsn}, it has no content: name a regular file",
                path.display()
            )));
        }
        Ok(Content {
            file: file.get(),
            lsn: lsn.get(),
            content_lsn: inode.content_lsn.map(Lsn::get),
            size: inode.size,
            fuzzy: inode.fuzzy,
        })
    })?;
    Ok(found)
}

fn moment(queries: Queries<'_>, asked: &ContentParameters) -> Result<Lsn, CoreError> {
    let folded = queries.folded()?;
    match (asked.lsn, asked.time) {
        (Some(lsn), _) => Lsn::new(lsn).ok_or_else(|| {
            CoreError::NotFound("there is no transaction 0: LSNs begin with 1".to_owned())
        }),
        (None, Some(time)) => queries.lsn_at_time(time.0)?.ok_or_else(|| {
            CoreError::NotFound(format!("the log begins after {time}: give a later moment"))
        }),
        (None, None) => folded.map(|(lsn, _)| lsn).ok_or_else(|| {
            CoreError::NotFound(
                "the log is empty yet: wait until hsmd has examined the tree".to_owned(),
            )
        }),
    }
}

/// Says when there was such a file, if ever.
fn absent(
    queries: Queries<'_>,
    path: &Path,
    name: &[u8],
    lsn: Lsn,
) -> Result<CoreError, CoreError> {
    let rows = queries.files_at_path(name)?;
    let Some(last) = rows.last() else {
        return Ok(never_was(path));
    };
    let before = rows
        .iter()
        .rev()
        .find(|row| row.to.is_some_and(|to| to <= lsn));
    let hint = match before.and_then(|row| row.to.and_then(Lsn::prev)) {
        Some(alive) => {
            format!("the last one before was there until transaction {alive}: give --at {alive}")
        }
        None => format!(
            "the first one came with transaction {}",
            rows.first().unwrap_or(last).from
        ),
    };
    Ok(CoreError::NotFound(format!(
        "there was no {} at transaction {lsn}; {hint}",
        path.display()
    )))
}

/// What a connection keeps between two requests for content.
#[derive(Default)]
pub(super) struct Reading(Option<Open>);

struct Open {
    catalog: Reader,
    places: Places,
}

impl Reading {
    /// The bytes at an offset of a version.
    pub(super) async fn read(
        &mut self,
        core: &Arc<dyn Core>,
        asked: ReadParameters,
    ) -> Result<Value, Failure> {
        let (core, open) = (core.clone(), self.0.take());
        let (open, piece) = blocking(move || {
            let mut open = match open {
                Some(open) => open,
                None => Open {
                    catalog: core.catalog()?,
                    places: Places::of(&*core),
                },
            };
            let piece = match open.piece(asked) {
                // Segments move from the spool to the volumes: look again where they are.
                Err(_) => {
                    open.places = Places::of(&*core);
                    open.piece(asked)?
                }
                piece => piece?,
            };
            Ok((open, piece))
        })
        .await?;
        self.0 = Some(open);
        super::methods::value("piece", &piece)
    }
}

impl Open {
    fn piece(&mut self, asked: ReadParameters) -> Result<Piece, CoreError> {
        let Self { catalog, places } = self;
        let (file, lsn) = FileId::new(asked.file)
            .zip(Lsn::new(asked.lsn))
            .ok_or_else(|| CoreError::NotFound("there is no file or transaction 0".to_owned()))?;
        catalog.snapshot(|queries| piece(queries.at(lsn)?, queries, places, file, asked))
    }
}

fn piece(
    then: AsOf<'_>,
    queries: Queries<'_>,
    places: &mut Places,
    file: FileId,
    asked: ReadParameters,
) -> Result<Piece, CoreError> {
    let size = then.inode(file)?.map_or(0, |inode| inode.size);
    let nothing = Piece {
        data: None,
        zeros: None,
    };
    if asked.offset >= size {
        return Ok(nothing);
    }
    let extents = then.extents(file, asked.offset, EXTENTS_MAX)?;
    let next = extents.first().map_or(size, |extent| extent.range.offset);
    if next > asked.offset {
        return Ok(Piece {
            zeros: Some(next.min(size) - asked.offset),
            ..nothing
        });
    }
    let wanted = asked.bytes_max.clamp(1, BYTES_MAX);
    let (mut at, mut bytes) = (asked.offset, Vec::new());
    for extent in &extents {
        let missing = wanted.saturating_sub(bytes.len() as u64);
        if extent.range.offset > at || missing == 0 {
            break;
        }
        let whole = extent_bytes(queries, places, file, extent)?;
        let skip = usize::try_from(at - extent.range.offset).unwrap_or(usize::MAX);
        let rest = whole.get(skip..).unwrap_or_default();
        let take = rest
            .len()
            .min(usize::try_from(missing).unwrap_or(usize::MAX));
        bytes.extend_from_slice(&rest[..take]);
        at += take as u64;
    }
    Ok(Piece {
        data: Some(base64::encode(&bytes)),
        ..nothing
    })
}

/// The bytes of an extent, each piece compared with its hash.
fn extent_bytes(
    queries: Queries<'_>,
    places: &mut Places,
    file: FileId,
    extent: &ExtentRow,
) -> Result<Vec<u8>, CoreError> {
    let failed = |why: String| {
        CoreError::Failed(format!(
            "the content of file {file} at byte {} cannot be read: {why}; bring the volume that has another copy, or check with `tierctl volume verify`",
            extent.range.offset
        ))
    };
    let place = queries
        .data(extent.data)?
        .ok_or_else(|| failed(format!("no segment has data record {}", extent.data)))?;
    let raw = places.record(extent.data, place).map_err(failed)?;
    let bytes =
        slice(&raw, extent).ok_or_else(|| failed("the data record is too short".to_owned()))?;
    check(extent, bytes).map_err(failed)?;
    Ok(bytes.to_vec())
}

fn slice<'r>(record: &'r [u8], extent: &ExtentRow) -> Option<&'r [u8]> {
    let start = usize::try_from(extent.data_offset).ok()?;
    let len = usize::try_from(extent.range.len).ok()?;
    record.get(start..)?.get(..len)
}

fn check(extent: &ExtentRow, mut bytes: &[u8]) -> Result<(), String> {
    let mut hashes = extent.hashes.iter();
    for piece in layout::pieces(extent.range) {
        let len = usize::try_from(piece.len).unwrap_or(usize::MAX);
        let (head, rest) = bytes.split_at_checked(len).ok_or("it is too short")?;
        if hashes.next() != Some(&Hash::of(head)) {
            return Err(format!(
                "the bytes at {} do not have the hash that was logged",
                piece.offset
            ));
        }
        bytes = rest;
    }
    Ok(())
}

/// Where segments can be read, and the frame that was read last.
struct Places {
    /// Sealed segments; or why there are none to be read.
    sources: Result<Arc<Sources>, String>,
    spool: String,
    frame: Option<Frame>,
}

struct Frame {
    segment: SegmentNo,
    offset: u64,
    records: Vec<Record>,
}

impl Places {
    fn of(core: &dyn Core) -> Self {
        Self {
            // A young log has only its open segment, which can be read all the same.
            sources: core.sources().map_err(|error| error.to_string()),
            spool: core.status().spool.path,
            frame: None,
        }
    }

    /// The bytes of a data record.
    fn record(&mut self, id: DataId, place: DataLocation) -> Result<Vec<u8>, String> {
        let (segment, offset) = (place.segment, place.frame_offset);
        let known = |frame: &Frame| frame.segment == segment && frame.offset == offset;
        if !self.frame.as_ref().is_some_and(known) {
            self.frame = Some(Frame {
                segment,
                offset,
                records: self.frame_at(segment, offset)?,
            });
        }
        let records = self.frame.as_ref().map_or(&[][..], |frame| &frame.records);
        let data = records.iter().find_map(|record| match record {
            Record::Data(data) if data.id == id => Some(data.bytes.clone()),
            _ => None,
        });
        data.ok_or_else(|| format!("data record {id} is not in segment {segment} at byte {offset}"))
    }

    fn frame_at(&self, segment: SegmentNo, offset: u64) -> Result<Vec<Record>, String> {
        let sealed = self.sources.as_ref().ok();
        if sealed.is_none_or(|sources| sources.copies(segment).is_empty())
            && let Some(records) = open_frame(Path::new(&self.spool), segment, offset)?
        {
            return Ok(records);
        }
        let sources = self.sources.as_ref().map_err(Clone::clone)?;
        let copies = sources
            .open_copies(segment)
            .map_err(|error| error.to_string())?;
        let decode = |raw: Vec<u8>| Record::decode_all(&raw).map_err(|error| error.to_string());
        copies
            .frame_checked(offset, decode)
            .map(|(records, _)| records)
    }
}

/// The records of a frame in the spool's open segment; `None` where there is no such file.
pub(super) fn open_frame(
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
pub(super) fn open_segment(
    spool: &Path,
    segment: SegmentNo,
) -> Result<Option<(Scan, String)>, String> {
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
