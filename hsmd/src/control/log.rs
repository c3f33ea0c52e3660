//! The log's history: the versions of a path, and what a transaction did.

use std::path::Path;

use tierfs::catalog::{NameRow, Queries, VersionRow};
use tierfs::ids::{Lsn, SegmentNo};
use tierfs::record::{Extent, Inode, Op, Record};
use tierfs::scan::Step;

use super::files::kind_word;
use super::methods::PathParameters;
use super::model::{Operation, Transaction, Version, Versions};
use super::varlink::Failure;
use super::when::When;
use super::{Core, CoreError};
use crate::tierctl::format::add;

/// More versions of one path are not given at once.
const VERSIONS_MAX: usize = 100_000;
/// More operations of one transaction are not given.
const OPERATIONS_MAX: usize = 10_000;

/// A path on the mount as the log names it, whether it exists now or not.
pub(super) fn log_path(core: &dyn Core, path: &Path) -> Result<Vec<u8>, CoreError> {
    use std::os::unix::ffi::OsStrExt;
    let mount = std::path::PathBuf::from(core.status().mount);
    let below = path
        .strip_prefix(&mount)
        .map_err(|_| CoreError::NotWatched {
            path: path.to_owned(),
            mount: mount.clone(),
        })?;
    // What is mounted need not be the root of the log's tree.
    let mut bytes = core.resolve(&mount)?.path;
    for name in below.components() {
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name.as_os_str().as_bytes());
    }
    Ok(bytes)
}

/// The versions of whatever bore the path, in the order of time.
pub(super) fn versions(core: &dyn Core, asked: &PathParameters) -> Result<Versions, Failure> {
    let path = asked.exact()?;
    let name = log_path(core, &path)?;
    let catalog = core.catalog()?;
    let mut list = catalog.snapshot(|queries| {
        let mut list = Vec::new();
        for bearer in queries.files_at_path(&name)? {
            while_named(queries, bearer, &mut list)?;
        }
        Ok::<_, CoreError>(list)
    })?;
    if list.is_empty() {
        return Err(never_was(&path).into());
    }
    list.sort_by_key(|version| (version.lsn, version.file));
    let omitted = list.len().saturating_sub(VERSIONS_MAX);
    list.drain(..omitted);
    Ok(Versions {
        list,
        omitted: omitted as u64,
    })
}

pub(super) fn never_was(path: &Path) -> CoreError {
    CoreError::NotFound(format!(
        "the log has never had a file at {}: check the spelling, or ask `tierctl state` whether it waits to be logged",
        path.display()
    ))
}

/// What happened to a file while it bore the name.
fn while_named(
    queries: Queries<'_>,
    bearer: NameRow,
    list: &mut Vec<Version>,
) -> Result<(), CoreError> {
    let mut named = false;
    for row in queries.versions_of(bearer.file)? {
        let lost_name = Some(row.lsn) == bearer.to;
        if row.lsn < bearer.from || bearer.to.is_some_and(|to| row.lsn > to) {
            continue;
        }
        named |= row.lsn == bearer.from;
        list.push(version(bearer, row, lost_name));
    }
    if !named && bearer.from > Lsn::FIRST {
        // A directory above was renamed: nothing of the file itself changed.
        push_step(queries, bearer, bearer.from, "appeared", list)?;
    }
    if let Some(to) = bearer.to
        && list
            .last()
            .is_none_or(|last| last.lsn != to.get() || last.file != bearer.file.get())
    {
        push_step(queries, bearer, to, "disappeared", list)?;
    }
    Ok(())
}

fn version(bearer: NameRow, row: VersionRow, lost_name: bool) -> Version {
    let changes = row.changes;
    let appeared = row.lsn == bearer.from && changes.names && !changes.created;
    let words = [
        (changes.created, "created"),
        (appeared, "appeared"),
        (changes.content, "content"),
        (changes.attributes && !changes.created, "attributes"),
        (changes.xattrs, "xattrs"),
        (
            changes.names && !changes.created && !appeared && !lost_name,
            "names",
        ),
        (lost_name && !changes.deleted, "disappeared"),
        (changes.deleted, "deleted"),
    ];
    let set = words.iter().filter(|(set, _)| *set);
    Version {
        file: bearer.file.get(),
        lsn: row.lsn.get(),
        time: When(row.time),
        changes: set.map(|(_, word)| (*word).to_owned()).collect(),
        size: row.size.filter(|_| !lost_name),
        fuzzy: row.fuzzy,
    }
}

fn push_step(
    queries: Queries<'_>,
    bearer: NameRow,
    lsn: Lsn,
    word: &str,
    list: &mut Vec<Version>,
) -> Result<(), CoreError> {
    let Some(txn) = queries.txn(lsn)? else {
        return Ok(());
    };
    let inode = if word == "appeared" {
        queries.at(lsn)?.inode(bearer.file)?
    } else {
        None
    };
    list.push(Version {
        file: bearer.file.get(),
        lsn: lsn.get(),
        time: When(txn.time),
        changes: vec![word.to_owned()],
        size: inode.as_ref().map(|inode| inode.size),
        fuzzy: inode.is_some_and(|inode| inode.fuzzy),
    });
    Ok(())
}

/// What a transaction did, read from the log itself.
pub(super) fn transaction(core: &dyn Core, lsn: u64) -> Result<Transaction, Failure> {
    let asked = Lsn::new(lsn).ok_or_else(|| Failure::InvalidParameter {
        parameter: "lsn".to_owned(),
        why: "LSNs begin with 1".to_owned(),
    })?;
    let catalog = core.catalog()?;
    let queries = catalog.queries();
    let Some(txn) = queries.txn(asked)? else {
        let last = queries.folded()?.map_or(0, |(last, _)| last.get());
        return Err(CoreError::NotFound(format!(
            "there is no transaction {asked}: the log has 1 to {last}"
        ))
        .into());
    };
    // A young log has only its open segment, which can be read all the same.
    let sources = core.sources();
    let (segment, offset) = (txn.place.segment, txn.place.frame_offset);
    let ops = match sources {
        Ok(sources) if !sources.copies(segment).is_empty() => {
            operations(&sources, segment, offset, asked)?
        }
        sources => {
            let spool = core.status().spool.path;
            operations_in_open(&spool, segment, offset, asked).map_err(|found| match sources {
                Err(error) => CoreError::Failed(format!("{found} ({error})")),
                Ok(_) => found,
            })?
        }
    };
    if ops.len() as u64 != txn.ops {
        return Err(CoreError::Failed(format!(
            "segment {segment} has {} operations of transaction {asked}, its commit counts {}: check the volumes with `tierctl volume verify`",
            ops.len(),
            txn.ops
        ))
        .into());
    }
    Ok(Transaction {
        lsn,
        time: When(txn.time),
        wall: When(txn.wall),
        segment: segment.get(),
        frame_offset: offset,
        operations_total: txn.ops,
        operations: ops.iter().take(OPERATIONS_MAX).map(operation).collect(),
    })
}

fn damaged(lsn: Lsn, segment: SegmentNo, why: &str) -> CoreError {
    CoreError::Failed(format!(
        "transaction {lsn} cannot be read from segment {segment}: {why}; check the volumes with `tierctl volume verify`"
    ))
}

/// The same as [`operations`], from the spool's open segment, which has no index: read from its front.
fn operations_in_open(
    spool: &str,
    number: SegmentNo,
    offset: u64,
    lsn: Lsn,
) -> Result<Vec<Op>, CoreError> {
    let damaged = |why: &str| damaged(lsn, number, why);
    let opened =
        crate::fetch::open_segment(Path::new(spool), number).map_err(|why| damaged(&why))?;
    let (mut scan, name) =
        opened.ok_or_else(|| damaged("neither the spool nor a volume has it"))?;
    let mut ops = Vec::new();
    while scan.offset <= offset {
        let step = scan
            .next_frame()
            .map_err(|error| damaged(&error.to_string()))?;
        let Step::Frame(found) = step else {
            break;
        };
        for record in found.records {
            match record {
                Record::Commit(commit) if commit.lsn == lsn => return Ok(ops),
                Record::Commit(_) => ops.clear(),
                Record::Op(op) => ops.push(op),
                _ => {}
            }
        }
    }
    Err(damaged(&format!(
        "{name} has no such commit at byte {offset}"
    )))
}

/// The operations of the transaction whose commit lies in the frame at `offset`; earlier frames are
/// read as far as it reaches back.
fn operations(
    sources: &replay::sources::Sources,
    number: SegmentNo,
    offset: u64,
    lsn: Lsn,
) -> Result<Vec<Op>, CoreError> {
    let damaged = |why: String| damaged(lsn, number, &why);
    let (segment, _) = sources.open_segment(number)?;
    let frames = &segment.index.frames;
    let mut at = frames
        .iter()
        .position(|frame| frame.offset == offset)
        .ok_or_else(|| damaged(format!("no frame lies at byte {offset}")))?;
    let mut newest_first: Vec<Op> = Vec::new();
    let mut found = false;
    loop {
        let records = segment
            .read_records(at)
            .map_err(|error| damaged(error.to_string()))?;
        for record in records.into_iter().rev() {
            match record {
                Record::Commit(commit) if commit.lsn == lsn => found = true,
                Record::Commit(_) if found => {
                    newest_first.reverse();
                    return Ok(newest_first);
                }
                Record::Op(op) if found => newest_first.push(op),
                _ => {}
            }
        }
        if !found {
            return Err(damaged(format!(
                "its commit is not in the frame at byte {offset}"
            )));
        }
        if at == 0 {
            newest_first.reverse();
            return Ok(newest_first);
        }
        at -= 1;
    }
}

fn operation(op: &Op) -> Operation {
    let blank = |kind: &str, text: String| Operation {
        kind: kind.to_owned(),
        file: None,
        parent: None,
        name: None,
        text,
    };
    let of = |kind: &str, file: tierfs::FileId, text: String| Operation {
        file: Some(file.get()),
        ..blank(kind, text)
    };
    let entry = |kind: &str, parent: tierfs::FileId, name: &[u8]| Operation {
        parent: Some(parent.get()),
        name: Some(String::from_utf8_lossy(name).into_owned()),
        ..blank(kind, String::new())
    };
    match op {
        Op::Filesystem(fs) => {
            let mut uuid = String::new();
            fs.uuid.iter().for_each(|byte| add!(uuid, "{byte:02x}"));
            blank("filesystem", format!("{} {uuid}", fs.fs_type))
        }
        Op::Inode(inode) => of("inode", inode.file, inode_text(inode)),
        Op::Bind(bind) => of(
            "bind",
            bind.file,
            bind.ino
                .map_or_else(String::new, |ino| format!("inode {ino}")),
        ),
        Op::Xattrs(xattrs) => {
            let names = xattrs
                .list
                .iter()
                .map(|(name, _)| name.escape_ascii().to_string());
            of("xattrs", xattrs.file, names.collect::<Vec<_>>().join(" "))
        }
        Op::Extents(extents) => of("extents", extents.file, extents_text(&extents.list)),
        Op::Content(content) => {
            let fuzzy = if content.fuzzy { ", fuzzy" } else { "" };
            let text = format!("{} bytes, root {}{fuzzy}", content.size, content.root);
            of("content", content.file, text)
        }
        Op::Link(link) => Operation {
            file: Some(link.file.get()),
            ..entry("link", link.parent, &link.name)
        },
        Op::Unlink(unlink) => entry("unlink", unlink.parent, &unlink.name),
        Op::Delete(delete) => of("delete", delete.file, String::new()),
        Op::Pin(pin) => {
            let kind = if pin.pinned { "pin" } else { "unpin" };
            of(kind, pin.file, String::new())
        }
        Op::Volume(volume) => blank(
            "volume",
            format!(
                "{} of pool {}: {}",
                volume.serial, volume.pool, volume.state
            ),
        ),
    }
}

fn inode_text(inode: &Inode) -> String {
    let mut text = format!(
        "{} mode {:04o} owner {}:{} mtime {}",
        kind_word(inode.kind),
        inode.mode,
        inode.uid,
        inode.gid,
        When(inode.mtime)
    );
    if let Some(device) = inode.rdev {
        add!(text, " device {}:{}", device.major, device.minor);
    }
    if let Some(target) = &inode.target {
        add!(text, " -> {}", target.escape_ascii());
    }
    text
}

fn extents_text(list: &[Extent]) -> String {
    let (mut data, mut hole, mut same) = (0_u64, 0_u64, 0_u64);
    for extent in list {
        let sum = match extent {
            Extent::Data { .. } => &mut data,
            Extent::Hole(_) => &mut hole,
            Extent::Same(_) => &mut same,
        };
        *sum = sum.saturating_add(extent.range().len);
    }
    format!("{data} bytes of data, {hole} of holes, {same} unchanged")
}
