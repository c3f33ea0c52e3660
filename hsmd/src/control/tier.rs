//! Release and recall by name: what became of each path.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tierfs::FileId;

use super::model::{
    Located, Moved, MovedWord, PathFailure, RecallPart, RecallPlan, RecallProgress,
};
use super::needs::{Places, Sum};
use super::path::PathText;
use super::peer::Peer;
use super::varlink::Failure;
use super::{Core, CoreError, files};
use crate::sys::handle::Handle;
use crate::tier::recall::Outcome;
use crate::tier::release::Refused;
use crate::tier::worker::Tier;

/// Paths of one request at most.
pub const PATHS_MAX: usize = 1000;
/// How often who waits for a recall hears how far it is.
const PART_EVERY: Duration = Duration::from_millis(200);

/// Of `PlanRecall`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PlanParameters {
    /// Absolute, on the watched mount; at most [`PATHS_MAX`].
    pub paths: Vec<PathText>,
}

/// Of `Release` and `Recall`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MoveParameters {
    /// Absolute, on the watched mount; at most [`PATHS_MAX`].
    pub paths: Vec<PathText>,
    /// Recall: answer when the files are back, not when they are asked for. Release: have the content compared
    /// of files whose change time says nothing of it; after a sync they can be released.
    #[serde(default)]
    pub wait: bool,
    /// Release: only say what could be released.
    #[serde(default)]
    pub dry_run: bool,
}

pub(super) fn located(
    core: &dyn Core,
    path: &PathText,
    asker: Option<&Peer>,
) -> Result<(PathBuf, Located), Failure> {
    let asked = super::methods::PathParameters { path: path.clone() };
    let path = asked.exact()?;
    let located = files::locate(core, &path, asker)?;
    Ok((path, located))
}

fn moved(path: &PathText, word: MovedWord, bytes: u64, why: Option<String>) -> Moved {
    Moved {
        path: path.clone(),
        word,
        bytes,
        why,
    }
}

pub(super) fn check_paths(paths: &[PathText]) -> Result<(), Failure> {
    if paths.len() > PATHS_MAX {
        return Err(Failure::InvalidParameter {
            parameter: "paths".to_owned(),
            why: format!("give at most {PATHS_MAX} paths at a time"),
        });
    }
    Ok(())
}

/// Releases files.
pub(super) fn release(core: &dyn Core, asked: &MoveParameters) -> Result<Vec<Moved>, Failure> {
    check_paths(&asked.paths)?;
    let tier = core.tier()?;
    let (mut results, mut wanted) = (Vec::new(), Vec::new());
    for path in &asked.paths {
        match located(core, path, None) {
            Ok((
                _,
                Located {
                    file: Some(file), ..
                },
            )) => {
                wanted.extend(FileId::new(file).map(|file| (file, path)));
            }
            Ok(_) => results.push(refused(path, &Refused::Unknown)),
            Err(failure) => {
                results.push(moved(path, MovedWord::Failed, 0, Some(failure.to_string())));
            }
        }
    }
    let mut by_file: HashMap<FileId, Vec<&PathText>> = HashMap::new();
    for (file, path) in &wanted {
        by_file.entry(*file).or_default().push(path);
    }
    let mut files: Vec<FileId> = by_file.keys().copied().collect();
    files.sort_unstable();
    let mut unsettled = Vec::new();
    let mut tell = |file: FileId, result: Result<u64, Refused>| {
        if matches!(result, Err(Refused::Dirty)) {
            unsettled.push(file);
        }
        // A file that was named twice is released once.
        for path in by_file.remove(&file).unwrap_or_default() {
            results.push(match &result {
                Ok(bytes) => moved(path, MovedWord::Released, *bytes, None),
                Err(error) => refused(path, error),
            });
        }
    };
    if asked.dry_run {
        for file in files {
            tell(file, tier.could_release(file));
        }
        return Ok(results);
    }
    tier.release(&files, &mut |file, result| {
        tell(file, result.map(|released| released.freed));
    })
    .map_err(CoreError::from)?;
    if asked.wait {
        core.look_closely(&unsettled)?;
    }
    Ok(results)
}

fn refused(path: &PathText, error: &Refused) -> Moved {
    let word = match error {
        Refused::Already => MovedWord::Already,
        Refused::Nothing => MovedWord::Nothing,
        Refused::Sys(_) | Refused::Disk(_) | Refused::Catalog(_) => MovedWord::Failed,
        _ => MovedWord::Refused,
    };
    moved(path, word, 0, Some(error.to_string()))
}

/// What recalling files needs; with the rights of `asker`, where that is given.
pub(super) fn plan(
    core: &dyn Core,
    asked: &PlanParameters,
    asker: Option<&Peer>,
) -> Result<RecallPlan, Failure> {
    check_paths(&asked.paths)?;
    let (tier, catalog) = (core.tier()?, core.catalog()?);
    let queries = catalog.queries();
    let mut places = Places::look(core, queries)?;
    let (mut plan, mut sum) = (RecallPlan::default(), Sum::default());
    for path in &asked.paths {
        let mut look = || -> Result<bool, Failure> {
            let (_, located) = located(core, path, asker)?;
            if stub(&tier, &located)?.is_none() {
                return Ok(false);
            }
            let file = located.file.and_then(FileId::new).ok_or_else(|| {
                CoreError::NotFound("the log does not know what it contains".to_owned())
            })?;
            places.add(queries, &queries.segments_of(file)?, &mut sum)?;
            Ok(true)
        };
        match look() {
            Ok(released) => plan.files += u64::from(released),
            Err(failure) => plan.failures.push(PathFailure {
                path: path.clone(),
                error: failure.to_string(),
            }),
        }
    }
    plan.needs = places.name(sum);
    Ok(plan)
}

/// Recalls files; with the rights of `asker`, where that is given.
pub(super) fn recall(
    core: &dyn Core,
    asked: &MoveParameters,
    asker: Option<&Peer>,
) -> Result<Vec<Moved>, Failure> {
    let mut results = Vec::new();
    let last = recall_in_parts(core, asked, asker, &AtomicBool::new(false), &mut |part| {
        results.extend(part.results);
        ControlFlow::Continue(())
    })?;
    results.extend(last.results);
    Ok(results)
}

/// The same, with how far it is. Who does not listen to the end leaves the files in the queue.
pub(super) fn recall_in_parts(
    core: &dyn Core,
    asked: &MoveParameters,
    asker: Option<&Peer>,
    cancelled: &AtomicBool,
    part: &mut dyn FnMut(RecallPart) -> ControlFlow<()>,
) -> Result<RecallPart, Failure> {
    check_paths(&asked.paths)?;
    let tier = core.tier()?;
    let uid = asker.map_or(0, |peer| peer.uid);
    let mut now = RecallPart::default();
    let (mut files, mut bytes, mut coming) = (0, 0, HashSet::new());
    let (tell, told) = mpsc::channel();
    for path in &asked.paths {
        match located(core, path, asker).and_then(|(_, located)| stub(&tier, &located)) {
            Ok(Some((handle, place))) => {
                let (tell, path_asked, file) = (tell.clone(), path.clone(), handle.clone());
                tier.recall(&handle, uid, place, move |outcome| {
                    let _ = tell.send((path_asked, file, outcome));
                });
                coming.insert(handle);
                if !asked.wait {
                    now.results.push(moved(path, MovedWord::Queued, 0, None));
                }
            }
            Ok(None) => now.results.push(moved(path, MovedWord::Already, 0, None)),
            Err(failure) => {
                let why = Some(failure.to_string());
                now.results.push(moved(path, MovedWord::Failed, 0, why));
            }
        }
    }
    drop(tell);
    if !asked.wait {
        return Ok(now);
    }
    let mut said = Instant::now();
    loop {
        match told.recv_timeout(PART_EVERY) {
            Ok((path, handle, outcome)) => {
                coming.remove(&handle);
                files += 1;
                now.results.push(recalled(&path, &outcome));
                bytes += now.results.last().map_or(0, |moved| moved.bytes);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
        if cancelled.load(Ordering::Relaxed) {
            return Err(CoreError::Cancelled("waiting for the recall").into());
        }
        if said.elapsed() >= PART_EVERY {
            said = Instant::now();
            let bytes = bytes + tier.filled(&coming);
            now.progress = Some(RecallProgress { files, bytes });
            if part(std::mem::take(&mut now)).is_break() {
                return Err(CoreError::Cancelled("waiting for the recall").into());
            }
        }
    }
    now.progress = Some(RecallProgress { files, bytes });
    Ok(now)
}

fn recalled(path: &PathText, outcome: &Outcome) -> Moved {
    match outcome {
        Outcome::Whole { bytes } => moved(path, MovedWord::Recalled, *bytes, None),
        Outcome::Failed(_, why) => moved(path, MovedWord::Failed, 0, Some(why.clone())),
        Outcome::Cancelled(_) => moved(path, MovedWord::Cancelled, 0, Some(outcome.to_string())),
    }
}

/// The inode and the place in the log of a file that is a stub.
fn stub(tier: &Tier, located: &Located) -> Result<Option<(Handle, u64)>, Failure> {
    let handle = Handle::from_bytes(&located.handle)
        .map_err(|error| CoreError::Failed(error.to_string()))?;
    let place = tier
        .place_of_stub(&handle)
        .map_err(|error| CoreError::Failed(error.to_string()))?;
    Ok(place.map(|place| (handle, place)))
}
