//! The state of one file: is it in the log, and on which copies?
//!
//! Asked by somebody without full rights, the file is first opened with theirs, and the answer is
//! about the inode that they opened, not about whatever the path names a moment later.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::path::Path;

use tierfs::catalog::{CopyRow, InodeRow, Queries};
use tierfs::ids::{FileId, Lsn, SegmentNo};
use tierfs::record::{Kind, UNRESTORABLE_FSCRYPT, UNRESTORABLE_UNREADABLE, UNRESTORABLE_VERITY};

use super::methods::PathParameters;
use super::model::{FileCopy, FileState, FileStateWord, Located, Pending, Status};
use super::needs::{Places, Sum};
use super::peer::{OpenError, Peer};
use super::varlink::Failure;
use super::when::When;
use super::{Core, CoreError};
use crate::sys::handle::Handle;
use crate::tier::worker::Residency;

/// The state of a path; with the rights of `asker`, where that is given.
pub(super) fn state(
    core: &dyn Core,
    asked: &PathParameters,
    asker: Option<&Peer>,
) -> Result<FileState, Failure> {
    let path = asked.exact()?;
    let status = core.status();
    let located = locate(core, &path, asker)?;
    let mut state = blank(asked, &status, &located);
    if let Some(file) = located.file.and_then(FileId::new) {
        let catalog = core.catalog()?;
        catalog.snapshot(|queries| fill(&mut state, queries, file, &located, &status))?;
        if let (Ok(handle), Some(ctime)) = (Handle::from_bytes(&located.handle), located.ctime)
            && core.is_examined(file, &handle, ctime)
        {
            state.pending = None;
        }
        let residency = residency(core, &located)?;
        // While a file has a stub's mark nobody writes to it: its change time is of our own doing.
        if residency != Residency::Resident {
            state.pending = None;
        }
        state.pending = core.pending(file.get()).or(state.pending);
        if state.pending.is_some() {
            state.state = FileStateWord::Dirty;
        }
        state.nowhere_bytes = nowhere(core, catalog.queries(), file)?;
        state.state = match residency {
            Residency::Resident | Residency::Filled => state.state,
            Residency::Partial | Residency::Stub if state.nowhere_bytes > 0 => FileStateWord::Lost,
            Residency::Partial => FileStateWord::Partial,
            Residency::Stub => FileStateWord::Migrated,
            Residency::Suspect(why) => {
                state.unrestorable.push(why);
                FileStateWord::Suspect
            }
        };
    }
    Ok(state)
}

/// How much of a file's bytes is on disk.
fn residency(core: &dyn Core, located: &Located) -> Result<Residency, CoreError> {
    let (Ok(tier), Ok(handle)) = (core.tier(), Handle::from_bytes(&located.handle)) else {
        return Ok(Residency::Resident);
    };
    let residency = tier.residency_of(&handle);
    residency.map_err(|error| CoreError::Failed(error.to_string()))
}

/// Bytes of a file's content of which no good copy is known, neither in the spool nor on a volume.
fn nowhere(core: &dyn Core, queries: Queries<'_>, file: FileId) -> Result<u64, CoreError> {
    let content = queries.segments_of(file)?;
    let mut lacked = false;
    for segment in content.iter().map(|needed| needed.segment) {
        let copies = segment.map_or_else(|| Ok(Vec::new()), |no| queries.copies(no))?;
        lacked |= !copies.iter().any(|copy| crate::board::is_good(&copy.state));
    }
    // Only then it costs a look at all places.
    if !lacked {
        return Ok(0);
    }
    let (mut places, mut sum) = (Places::look(core, queries)?, Sum::default());
    places.add(queries, &content, &mut sum)?;
    Ok(places.name(sum).nowhere_bytes)
}

/// The inode that a path names, which `asker` may read, where that is given.
pub(super) fn locate(
    core: &dyn Core,
    path: &Path,
    asker: Option<&Peer>,
) -> Result<Located, Failure> {
    let opened = match asker {
        Some(peer) => Some(open_as(peer, &core.mount(), path)?),
        None => None,
    };
    let located = core.resolve(path)?;
    if let (Some(opened), Some(peer)) = (opened, asker) {
        let handle = crate::sys::handle::handle_of(opened.as_fd())
            .map_err(|error| CoreError::Failed(error.to_string()))?;
        if handle.to_bytes() != located.handle {
            return Err(refuse(
                peer,
                path,
                "it was replaced while it was looked at, ask again",
            ));
        }
    }
    Ok(located)
}

fn open_as(peer: &Peer, mount: &Path, path: &Path) -> Result<std::os::fd::OwnedFd, Failure> {
    peer.open(mount, path).map_err(|error| match error {
        OpenError::Outside => CoreError::NotWatched {
            path: path.to_owned(),
            mount: mount.to_owned(),
        }
        .into(),
        OpenError::Refused => refuse(peer, path, "it does not exist, or you may not read it"),
        error @ (OpenError::Rights { .. } | OpenError::Failed(_)) => {
            CoreError::Failed(format!("{}: {error}", path.display())).into()
        }
    })
}

fn refuse(peer: &Peer, path: &Path, why: &str) -> Failure {
    Failure::PermissionDenied(format!(
        "user {} is told nothing of {}: {why}; root and the configuration's control_group may ask about every file",
        peer.uid,
        path.display()
    ))
}

fn blank(asked: &PathParameters, status: &Status, located: &Located) -> FileState {
    FileState {
        path: asked.path.clone(),
        state: FileStateWord::Untracked,
        file: located.file,
        kind: None,
        size: None,
        mtime: None,
        lsn: None,
        time: None,
        fuzzy: false,
        pinned: false,
        unrestorable: Vec::new(),
        pending: None,
        pools_having: 0,
        pools: status.pools.len() as u64,
        copies: Vec::new(),
        nowhere_bytes: 0,
    }
}

fn fill(
    state: &mut FileState,
    queries: Queries<'_>,
    file: FileId,
    located: &Located,
    status: &Status,
) -> Result<(), CoreError> {
    let Some(inode) = queries.inode(file)? else {
        return Ok(());
    };
    let last = queries.versions_of(file)?.pop();
    let lsn = last
        .as_ref()
        .map_or(inode.lsn, |version| version.lsn.max(inode.lsn));
    state.kind = Some(kind_word(inode.kind).to_owned());
    state.size = Some(inode.size);
    state.mtime = Some(When(inode.mtime));
    state.lsn = Some(lsn.get());
    state.time = queries.txn(lsn)?.map(|txn| When(txn.time));
    state.fuzzy = inode.fuzzy;
    state.pinned = queries.is_pinned(file)?;
    state.unrestorable = unrestorable_words(inode.unrestorable.0);
    if let (Some(now), Some(logged)) = (located.ctime, inode.ctime)
        && now != logged
    {
        state.pending = Some(Pending {
            since: When(now),
            why: "changed since it was logged, not examined yet".to_owned(),
        });
    }
    let having = status
        .pools
        .iter()
        .filter(|pool| pool.copied_lsn >= Some(lsn.get()));
    state.pools_having = having.count() as u64;
    state.state = if state.pools_having == state.pools && state.pools > 0 {
        FileStateWord::Premigrated
    } else {
        FileStateWord::Logged
    };
    let needed = segments_of(queries, &inode, lsn)?;
    state.copies = copies(queries, &needed, status)?;
    Ok(())
}

/// The segments that replaying the file's newest version reads.
fn segments_of(
    queries: Queries<'_>,
    inode: &InodeRow,
    last: Lsn,
) -> Result<BTreeSet<SegmentNo>, CoreError> {
    let mut segments = BTreeSet::new();
    for lsn in [Some(last), Some(inode.lsn), inode.content_lsn]
        .into_iter()
        .flatten()
    {
        if let Some(txn) = queries.txn(lsn)? {
            segments.insert(txn.place.segment);
        }
    }
    let content = queries.segments_of(inode.file)?;
    segments.extend(content.iter().filter_map(|needed| needed.segment));
    Ok(segments)
}

/// What the volumes have of these segments.
fn copies(
    queries: Queries<'_>,
    needed: &BTreeSet<SegmentNo>,
    status: &Status,
) -> Result<Vec<FileCopy>, CoreError> {
    let mut by_serial: BTreeMap<String, Vec<CopyRow>> = BTreeMap::new();
    for segment in needed {
        for copy in queries.copies(*segment)? {
            if crate::board::is_good(&copy.state) {
                by_serial.entry(copy.serial.clone()).or_default().push(copy);
            }
        }
    }
    let named = |serial: &str| {
        let all = status
            .pools
            .iter()
            .flat_map(|pool| pool.volumes.iter().map(move |volume| (pool, volume)));
        let mut found = all.filter(|(_, volume)| volume.serial.as_deref() == Some(serial));
        found
            .next()
            .map(|(pool, volume)| (pool.name.clone(), volume.path.clone()))
    };
    let logged = queries.volumes()?;
    let mut list = Vec::new();
    for (serial, rows) in by_serial {
        let place = named(&serial);
        let pool = place.as_ref().map(|(pool, _)| pool.clone()).or_else(|| {
            let row = logged.iter().find(|row| row.volume.serial == serial);
            row.map(|row| row.volume.pool.clone())
        });
        let verified = rows.iter().map(|row| row.verified).min().flatten();
        list.push(FileCopy {
            pool: pool.unwrap_or_default(),
            volume: serial,
            path: place.map(|(_, path)| path),
            segments: rows.len() as u64,
            segments_needed: needed.len() as u64,
            verified: verified.map(When),
        });
    }
    list.sort_by(|a, b| (&a.pool, &a.volume).cmp(&(&b.pool, &b.volume)));
    Ok(list)
}

/// A file's kind in one word.
pub(super) fn kind_word(kind: Kind) -> &'static str {
    match kind {
        Kind::Regular => "regular",
        Kind::Directory => "directory",
        Kind::Symlink => "symlink",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
        Kind::CharDevice => "char_device",
        Kind::BlockDevice => "block_device",
    }
}

fn unrestorable_words(bits: u32) -> Vec<String> {
    let words = [
        (UNRESTORABLE_FSCRYPT, "fscrypt"),
        (UNRESTORABLE_VERITY, "verity"),
        (UNRESTORABLE_UNREADABLE, "unreadable"),
    ];
    let set = words.iter().filter(|(bit, _)| bits & bit != 0);
    set.map(|(_, word)| (*word).to_owned()).collect()
}
