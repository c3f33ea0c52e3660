//! The queue of recalls: who waits for what, what that needs, and calling it off.
//!
//! A user without full rights sees and cancels what he waits for himself, and nobody else's.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use tierfs::catalog::Queries;

use super::model::{CancelDone, PathFailure, QueueList, QueueStage, QueueWaiter, QueuedFile};
use super::needs::{Places, Sum};
use super::path::{PathText, below};
use super::peer::Peer;
use super::tier::{check_paths, located};
use super::varlink::Failure;
use super::when::When;
use super::{Core, CoreError};
use crate::sys::handle::Handle;
use crate::tier::recall::{Queued, Reached, Waits};

/// Files that are listed at most.
const FILES_MAX: usize = 10_000;
/// Who waits for one file, as far as they are named.
const WAITERS_MAX: usize = 100;

/// Of `CancelRecalls`: paths, or everything.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CancelParameters {
    /// Absolute, on the watched mount; at most [`super::tier::PATHS_MAX`].
    #[serde(default)]
    pub paths: Vec<PathText>,
    /// Instead of paths: everything.
    #[serde(default)]
    pub all: bool,
    /// Only what this user waits for.
    #[serde(default)]
    pub user: Option<u32>,
}

/// What recall has to do; for `asker`, where that is given, what he waits for.
pub(super) fn list(core: &dyn Core, asker: Option<&Peer>) -> Result<QueueList, Failure> {
    let tier = core.tier()?;
    let mut queued = tier.queued(asker.map(|peer| peer.uid));
    let omitted = queued.len().saturating_sub(FILES_MAX) as u64;
    queued.truncate(FILES_MAX);
    let mut list = QueueList {
        omitted,
        ..QueueList::default()
    };
    if queued.is_empty() {
        return Ok(list);
    }
    let catalog = core.catalog()?;
    let queries = catalog.queries();
    let mut lister = Lister {
        core,
        asker,
        prefix: core.resolve(&core.mount())?.path,
        places: Places::look(core, queries)?,
        sum: Sum::default(),
    };
    for file in queued {
        list.files.push(lister.file(queries, file)?);
    }
    list.needs = lister.places.name(lister.sum);
    Ok(list)
}

struct Lister<'c> {
    core: &'c dyn Core,
    asker: Option<&'c Peer>,
    /// The mount point in the log's tree.
    prefix: Vec<u8>,
    places: Places,
    sum: Sum,
}

impl Lister<'_> {
    fn file(&mut self, queries: Queries<'_>, queued: Queued) -> Result<QueuedFile, CoreError> {
        let file = queries.file_by_handle(&queued.handle.to_bytes())?;
        let (mut size, mut path, mut needs) = (None, None, Sum::default());
        if let Some(file) = file {
            size = queries.inode(file)?.map(|row| row.size);
            path = queries.path_of(file)?.and_then(|path| self.visible(&path));
            if queued.reached != Reached::There {
                let content = queries.segments_of(file)?;
                self.places.add(queries, &content, &mut needs)?;
                self.places.add(queries, &content, &mut self.sum)?;
            }
        }
        let (stage, filled) = match queued.reached {
            Reached::Wanted => (QueueStage::Wanted, 0),
            Reached::Filling(bytes) => (QueueStage::Filling, bytes),
            Reached::There => (QueueStage::There, 0),
        };
        let mut waiters = queued.waiters;
        waiters.sort_by_key(|waits| std::cmp::Reverse(waits.since));
        let programs = waiters.iter().filter(|waits| waits.program).count() as u64;
        Ok(QueuedFile {
            path: path.into(),
            file: file.map(tierfs::FileId::get),
            size,
            stage,
            filled,
            since: waiters.first().map(|waits| When::ago(waits.since)),
            programs,
            requests: waiters.len() as u64 - programs,
            waiters: waiters.iter().take(WAITERS_MAX).map(waiter).collect(),
            needs: self.places.name(needs),
            error: queued.error,
        })
    }

    /// A path of the log as it is seen on the mount. Who waits for a file need not be told that it was
    /// moved to where he may not look.
    fn visible(&self, path: &[u8]) -> Option<PathText> {
        let rest = path.strip_prefix(self.prefix.as_slice())?;
        let rest = match rest {
            rest if self.prefix.is_empty() || rest.is_empty() => rest,
            rest => rest.strip_prefix(b"/")?,
        };
        let mount = self.core.mount();
        let text = below(&mount, rest);
        match self.asker {
            Some(peer) => peer.open(&mount, &text.exact()?).ok().map(|_| text),
            None => Some(text),
        }
    }
}

fn waiter(waits: &Waits) -> QueueWaiter {
    QueueWaiter {
        uid: waits.uid,
        program: waits.program,
        pid: waits.pid,
        since: When::ago(waits.since),
    }
}

/// Cancels recalls: all of them, or those of these files; only what one user waits for, where he is named.
pub(super) fn cancel(
    core: &dyn Core,
    asked: &CancelParameters,
    asker: Option<&Peer>,
    by: u32,
) -> Result<CancelDone, Failure> {
    check_paths(&asked.paths)?;
    if asked.all != asked.paths.is_empty() {
        return Err(Failure::InvalidParameter {
            parameter: "paths".to_owned(),
            why: "give either paths or \"all\"".to_owned(),
        });
    }
    let uid = whose(asked, asker)?;
    let tier = core.tier()?;
    let mut done = CancelDone::default();
    let add = |done: &mut CancelDone, files: Option<&HashSet<Handle>>| {
        let cancelled = tier.cancel(files, uid, by);
        done.files += cancelled.files;
        done.programs += cancelled.programs;
        done.requests += cancelled.requests;
        cancelled.files
    };
    if asked.all {
        add(&mut done, None);
    }
    for path in &asked.paths {
        let found = located(core, path, asker).and_then(|(_, located)| {
            Handle::from_bytes(&located.handle)
                .map_err(|error| CoreError::Failed(error.to_string()).into())
        });
        let error = match found.map(|handle| add(&mut done, Some(&HashSet::from([handle])))) {
            Ok(0) => {
                "it is not in the queue, or others wait for it: see `tierctl queue list`".to_owned()
            }
            Ok(_) => continue,
            Err(failure) => failure.to_string(),
        };
        done.failures.push(PathFailure {
            path: path.clone(),
            error,
        });
    }
    if done.files > 0 {
        tracing::info!(
            by,
            files = done.files,
            programs = done.programs,
            requests = done.requests,
            "recalls were cancelled"
        );
    }
    Ok(done)
}

/// The user whose recalls are cancelled; `None`: anybody's.
fn whose(asked: &CancelParameters, asker: Option<&Peer>) -> Result<Option<u32>, Failure> {
    match (asker, asked.user) {
        (None, user) => Ok(user),
        (Some(peer), Some(user)) if user != peer.uid => Err(Failure::PermissionDenied(format!(
            "user {} may not cancel what user {user} waits for, only what he waits for himself: run tierctl as root or as a member of the configuration's control_group",
            peer.uid
        ))),
        (Some(peer), _) => Ok(Some(peer.uid)),
    }
}
