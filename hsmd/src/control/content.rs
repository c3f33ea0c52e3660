//! Earlier content: which version a path had at a moment, and its bytes, checked, piece by piece.
//!
//! The client pulls: between two requests the daemon holds a cursor and one frame, so a client that
//! stops reading stalls nothing. The bytes come from [`crate::fetch`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tierfs::catalog::{AsOf, Queries, Reader};
use tierfs::ids::{FileId, Lsn};
use tierfs::record::Kind;

use super::log::{log_path, never_was};
use super::methods::{ContentParameters, ReadParameters, blocking};
use super::model::{Content, Piece};
use super::varlink::Failure;
use super::{Core, CoreError, base64};
use crate::fetch::Fetcher;

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
    fetcher: Fetcher,
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
            let open = match open {
                Some(open) => open,
                None => Open {
                    catalog: core.catalog()?,
                    fetcher: fetcher(&core),
                },
            };
            let piece = open.piece(asked)?;
            Ok((open, piece))
        })
        .await?;
        self.0 = Some(open);
        super::methods::value("piece", &piece)
    }
}

/// One frame is kept: a client reads on where it was.
fn fetcher(core: &Arc<dyn Core>) -> Fetcher {
    let spool = PathBuf::from(core.status().spool.path);
    let copies = core.copies();
    let core = core.clone();
    let look = move || core.sources().map_err(|error| error.to_string());
    Fetcher::new(spool, Box::new(look), copies, 1)
}

impl Open {
    fn piece(&self, asked: ReadParameters) -> Result<Piece, CoreError> {
        let Self { catalog, fetcher } = self;
        let (file, lsn) = FileId::new(asked.file)
            .zip(Lsn::new(asked.lsn))
            .ok_or_else(|| CoreError::NotFound("there is no file or transaction 0".to_owned()))?;
        catalog.snapshot(|queries| piece(queries.at(lsn)?, queries, fetcher, file, asked))
    }
}

fn piece(
    then: AsOf<'_>,
    queries: Queries<'_>,
    fetcher: &Fetcher,
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
        let whole = fetcher
            .extent(queries, file, extent)
            .map_err(|error| CoreError::Failed(error.to_string()))?;
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
