//! `tierctl migrate`: files onto every pool.

use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::PROGRAM;
use super::args::{Args, Files};
use super::connect;
use super::format::{add, name, size, some};
use super::path_parameters;
use super::progress::Progress;
use super::tier::batches;
use crate::control::client::{Client, ClientError};
use crate::control::model::{
    FileStateWord, PathFailure, PoolStatus, Status, SyncRequest, VolumeState,
};
use crate::control::path::PathText;
use crate::output::{self, Exit};

/// Files that are named because they are not on every pool.
const NAMED: usize = 100;
/// How often it is looked how far it is.
const LOOK: Duration = Duration::from_millis(300);

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    /// Files on every pool, at the end.
    files: u64,
    /// Files that are not.
    missing: u64,
    /// The first of these.
    missing_paths: Vec<PathText>,
    /// What had to be copied when it began.
    pools: Vec<PoolNeed>,
    /// What could not be looked at.
    failures: Vec<PathFailure>,
}

/// What a pool lacks of the files, and where that goes.
#[derive(Serialize)]
struct PoolNeed {
    pool: String,
    files: u64,
    bytes: u64,
    volume: Option<String>,
    path: Option<String>,
    present: bool,
    /// Why the pool waits; null where it does not.
    waits: Option<String>,
}

/// A file: its newest transaction in the log (`None`: not all of it is in the log yet), and its size.
#[derive(Clone, Copy)]
struct Known {
    lsn: Option<u64>,
    bytes: u64,
}

impl Known {
    fn is_on(self, copied_lsn: Option<u64>) -> bool {
        self.lsn.is_some() && self.lsn <= copied_lsn
    }
}

#[derive(Default)]
struct Found {
    known: Vec<Known>,
    there: u64,
    missing: u64,
    missing_paths: Vec<PathText>,
    failures: Vec<PathFailure>,
}

pub(super) fn migrate(args: &Args, files: &Files) -> anyhow::Result<Exit> {
    let mut client = connect(args)?;
    let (batches, mut failures) = batches(files)?;
    let mut found = look(&mut client, &batches)?;
    let status = client.status()?;
    let needs: Vec<PoolNeed> = status
        .pools
        .iter()
        .map(|pool| need(pool, &found.known))
        .collect();
    if !args.json {
        let shown = needs.iter().map(need_text).collect::<String>();
        if files.dry_run {
            output::text(&shown)?;
        } else {
            output::aside(&shown.trim_end());
        }
    }
    if !files.dry_run {
        wait(args, &mut client, &found.known)?;
        found = look(&mut client, &batches)?;
    }
    let known = !found.known.is_empty();
    failures.append(&mut found.failures);
    for failure in failures.iter().filter(|_| !args.json) {
        let what = format!("{}: {}", name(&failure.path.path), name(&failure.error));
        output::error(PROGRAM, &what);
    }
    let exit = match (found.there, found.missing, failures.is_empty()) {
        (_, 0, true) => Exit::Done,
        (0, _, _) if known => Exit::No,
        (0, _, false) => Exit::Error,
        _ => Exit::Partly,
    };
    if args.json {
        output::json(&Report {
            files: found.there,
            missing: found.missing,
            missing_paths: found.missing_paths,
            pools: needs,
            failures,
        })?;
    } else {
        for path in &found.missing_paths {
            let what = format!(
                "{}: not on every pool: see `tierctl state` of it",
                name(&path.path)
            );
            output::note(PROGRAM, &what);
        }
        let there = some(found.there, "file is", "files are");
        let missing = some(found.missing, "is", "are");
        output::text(&format!("{there} on every pool, {missing} not\n"))?;
    }
    Ok(exit)
}

/// The files' states, one by one.
fn look(client: &mut Client, batches: &[Vec<PathText>]) -> anyhow::Result<Found> {
    let mut found = Found::default();
    for path in batches.iter().flatten() {
        let Some(path) = path.exact() else { continue };
        let state = match client.file_state(&path_parameters(&path)?) {
            Ok(state) => state,
            Err(ClientError::Answered { message, .. }) => {
                found.failures.push(PathFailure {
                    path: PathText::of_path(&path),
                    error: message,
                });
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let logged = !matches!(
            state.state,
            FileStateWord::Untracked
                | FileStateWord::Dirty
                | FileStateWord::Suspect
                | FileStateWord::Lost
        );
        found.known.push(Known {
            lsn: state.lsn.filter(|_| logged),
            bytes: state.size.unwrap_or(0),
        });
        match state.state {
            FileStateWord::Premigrated | FileStateWord::Partial | FileStateWord::Migrated => {
                found.there += 1;
            }
            _ => {
                found.missing += 1;
                if found.missing_paths.len() < NAMED {
                    found.missing_paths.push(state.path);
                }
            }
        }
        if found.known.len().is_multiple_of(1000) {
            output::progress(&format_args!("{} files looked at", found.known.len()));
        }
    }
    output::clear();
    Ok(found)
}

/// Files of these that a place up to here has, and their bytes.
fn sum(known: &[Known], is_wanted: impl Fn(&Known) -> bool) -> (u64, u64) {
    let wanted = known.iter().filter(|one| is_wanted(one));
    wanted.fold((0, 0), |(files, bytes), one| (files + 1, bytes + one.bytes))
}

fn need(pool: &PoolStatus, known: &[Known]) -> PoolNeed {
    let (files, bytes) = sum(known, |one| !one.is_on(pool.copied_lsn));
    let takes = |state: VolumeState| matches!(state, VolumeState::Filling | VolumeState::Scratch);
    let next = pool.volumes.iter().find(|volume| takes(volume.state));
    let (volume, path) = match (&pool.waiting, next) {
        (Some(waits), _) => (waits.serial.clone(), Some(waits.path.clone())),
        (None, Some(volume)) => (volume.serial.clone(), Some(volume.path.clone())),
        (None, None) => (None, None),
    };
    PoolNeed {
        pool: pool.name.clone(),
        files,
        bytes,
        volume,
        path,
        present: pool.waiting.is_none() && next.is_some(),
        waits: pool.waiting.as_ref().map(|waits| waits.why.clone()),
    }
}

fn need_text(need: &PoolNeed) -> String {
    let pool = name(&need.pool);
    if need.files == 0 {
        return format!("pool {pool}: has everything\n");
    }
    let mut text = format!(
        "pool {pool}: lacks {}, {}",
        some(need.files, "file", "files"),
        size(need.bytes)
    );
    let serial = need.volume.as_deref().unwrap_or("without a serial yet");
    let at = need.path.as_deref().map_or_else(String::new, |path| {
        format!(" volume {serial} at {}", name(path))
    });
    match &need.waits {
        Some(why) => add!(text, "; it waits for{at}: {}", name(why)),
        None if !at.is_empty() => add!(text, ", which go to{at}"),
        None => {}
    }
    text.push('\n');
    text
}

/// Waits until everything is on every pool, and shows how far it is.
fn wait(args: &Args, client: &mut Client, known: &[Known]) -> anyhow::Result<()> {
    let mut syncing = connect(args)?;
    let request = SyncRequest {
        media: true,
        sweep: false,
    };
    let sync = thread::spawn(move || syncing.sync(request));
    let mut progress = Progress::new(args, "on every pool:", sum(known, |_| true));
    while !sync.is_finished() {
        let (files, bytes) = done(&client.status()?, known);
        progress.show(files, bytes);
        thread::sleep(LOOK);
    }
    output::clear();
    match sync.join() {
        Ok(done) => done.map(drop).map_err(Into::into),
        Err(_) => anyhow::bail!("waiting for the pools ended early: ask `tierctl status`"),
    }
}

/// What every pool has.
fn done(status: &Status, known: &[Known]) -> (u64, u64) {
    let copied = status.pools.iter().map(|pool| pool.copied_lsn).min();
    sum(known, |one| one.is_on(copied.flatten()))
}
