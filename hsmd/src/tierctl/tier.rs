//! `tierctl release` and `recall`: many files, a few hundred at a time.

use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use super::args::{Args, Files};
use super::format::{add, name, size, some};
use super::progress::Progress;
use super::{PROGRAM, absolute, connect, needs};
use crate::control::client::Client;
use crate::control::model::{Moved, MovedWord, Needs, PathFailure, RecallPlan, SyncRequest};
use crate::control::path::PathText;
use crate::control::tier::{MoveParameters, PATHS_MAX, PlanParameters};
use crate::output::{self, Exit};

/// Files of one request, at most.
const AT_ONCE: usize = PATHS_MAX;
/// Bytes of their paths, at most: in JSON a byte may take six, and a request has a megabyte.
const PATH_BYTES: usize = 128 << 10;

/// What `--json` prints.
#[derive(Serialize, Default)]
struct Report {
    files: u64,
    bytes: u64,
    /// Of a recall.
    #[serde(skip_serializing_if = "Option::is_none")]
    needs: Option<Needs>,
    results: Vec<Moved>,
    /// Files with which nothing had to be done, and files that have no data.
    #[serde(skip)]
    already: u64,
    #[serde(skip)]
    nothing: u64,
    /// The daemon was asked of something, or would have been.
    #[serde(skip)]
    asked: bool,
}

pub(super) fn release(args: &Args, files: &Files) -> anyhow::Result<Exit> {
    let mut client = connect(args)?;
    let media = SyncRequest {
        media: true,
        sweep: false,
    };
    if files.wait && !files.dry_run {
        output::progress(&"waiting until everything is on every pool ...");
        client.sync(media)?;
        output::clear();
    }
    let done = if files.dry_run {
        "would be released"
    } else {
        "released"
    };
    let freed = if files.dry_run { "large" } else { "freed" };
    let mut report = Report::default();
    let mut again = Vec::new();
    let failures = for_each_batch(files, &mut |paths| {
        report.asked = true;
        let parameters = MoveParameters {
            paths,
            wait: files.wait,
            dry_run: files.dry_run,
        };
        for result in client.release(&parameters)? {
            if files.wait && result.word == MovedWord::Refused {
                again.push(result.path);
            } else {
                note(args, &mut report, result);
            }
        }
        show_released(&report, done, freed);
        Ok(())
    })?;
    if !again.is_empty() && !files.dry_run {
        // What was changed a moment ago is being compared with the log now.
        client.sync(media)?;
    }
    let mut once_more = |paths| {
        let parameters = MoveParameters {
            paths,
            wait: false,
            dry_run: files.dry_run,
        };
        for result in client.release(&parameters)? {
            note(args, &mut report, result);
        }
        show_released(&report, done, freed);
        Ok(())
    };
    let mut batches = Batches::new(&mut once_more);
    for path in again.iter().filter_map(PathText::exact) {
        batches.add(&path)?;
    }
    batches.finish()?;
    note_all(args, &mut report, failures);
    output::clear();
    finish(args, &report, done, freed, "")
}

fn show_released(report: &Report, done: &str, freed: &str) {
    output::progress(&format_args!(
        "{} {done}, {} {freed}",
        some(report.files, "file", "files"),
        size(report.bytes)
    ));
}

/// First what it needs, for an operator who may have to fetch tapes; then how far it is.
pub(super) fn recall(args: &Args, files: &Files) -> anyhow::Result<Exit> {
    let mut client = connect(args)?;
    let (batches, failures) = batches(files)?;
    let plan = plan_recall(&mut client, &batches)?;
    let mut report = Report {
        needs: Some(plan.needs.clone()),
        asked: !batches.is_empty(),
        ..Report::default()
    };
    note_all(args, &mut report, failures);
    if files.dry_run {
        report.files = plan.files;
        report.bytes = plan.needs.bytes;
        note_all(args, &mut report, plan.failures);
        let first = "would be recalled";
        return finish(
            args,
            &report,
            first,
            "of content",
            &needs::render(&plan.needs),
        );
    }
    if !args.json && plan.files > 0 {
        let text = format!(
            "{} to recall, {} of content\n{}",
            some(plan.files, "file", "files"),
            size(plan.needs.bytes),
            needs::render(&plan.needs)
        );
        output::aside(&text.trim_end());
    }
    let done = if files.wait { "recalled" } else { "asked for" };
    let mut progress = Progress::new(args, done, (plan.files, plan.needs.bytes));
    let mut seen = (0, 0);
    for paths in batches {
        let parameters = MoveParameters {
            paths,
            wait: files.wait,
            dry_run: false,
        };
        let (files, bytes) = seen;
        let heard = client.recall(&parameters, &mut |part| {
            for result in part.results {
                note(args, &mut report, result);
            }
            if let Some(now) = part.progress {
                seen = (files + now.files, bytes + now.bytes);
                progress.show(seen.0, seen.1);
            }
            Ok(())
        });
        heard??;
    }
    output::clear();
    finish(args, &report, done, "brought back", "")
}

/// What the recall of all these needs.
pub(super) fn plan_recall(
    client: &mut Client,
    batches: &[Vec<PathText>],
) -> anyhow::Result<RecallPlan> {
    let (mut all, mut looked) = (RecallPlan::default(), 0);
    for batch in batches {
        let paths = batch.clone();
        let plan = client.plan_recall(&PlanParameters { paths })?;
        all.files += plan.files;
        all.needs.add(plan.needs);
        all.failures.extend(plan.failures);
        looked += batch.len();
        output::progress(&format_args!("{looked} files looked at"));
    }
    output::clear();
    Ok(all)
}

/// What could not even be asked for.
fn note_all(args: &Args, report: &mut Report, failures: Vec<PathFailure>) {
    for failure in failures {
        let moved = Moved {
            path: failure.path,
            word: MovedWord::Failed,
            bytes: 0,
            why: Some(failure.error),
        };
        note(args, report, moved);
    }
}

/// Prints what was done, or would be; `more` stands below it.
fn finish(
    args: &Args,
    report: &Report,
    done: &str,
    moved: &str,
    more: &str,
) -> anyhow::Result<Exit> {
    let failed = report.results.iter().any(|result| !is_well(result.word));
    if args.json {
        output::json(report)?;
    } else {
        let amount = if report.bytes > 0 {
            format!(", {} {moved}", size(report.bytes))
        } else {
            String::new()
        };
        let files = some(report.files, "file", "files");
        let rest = left_alone(report);
        output::text(&format!("{files} {done}{amount}{rest}\n{more}"))?;
    }
    Ok(match (report.files, failed) {
        (_, false) => Exit::Done,
        (0, true) if !report.asked => Exit::Error,
        (0, true) => Exit::No,
        (_, true) => Exit::Partly,
    })
}

/// Files with which nothing was done because nothing had to be.
fn left_alone(report: &Report) -> String {
    let mut text = String::new();
    if report.already > 0 {
        let already = some(report.already, "is", "are");
        let so = if report.needs.is_some() {
            "on disk"
        } else {
            "released"
        };
        add!(text, "; {already} {so} already");
    }
    if report.nothing > 0 {
        add!(
            text,
            "; {} no data that could be released",
            some(report.nothing, "has", "have")
        );
    }
    text
}

fn is_well(word: MovedWord) -> bool {
    matches!(
        word,
        MovedWord::Released
            | MovedWord::Recalled
            | MovedWord::Queued
            | MovedWord::Already
            | MovedWord::Nothing
    )
}

fn note(args: &Args, report: &mut Report, result: Moved) {
    match result.word {
        MovedWord::Released | MovedWord::Recalled | MovedWord::Queued => {
            report.files += 1;
            report.bytes += result.bytes;
        }
        MovedWord::Already => report.already += 1,
        MovedWord::Nothing => report.nothing += 1,
        MovedWord::Refused | MovedWord::Failed | MovedWord::Cancelled => {
            if !args.json {
                let why = result.why.as_deref().unwrap_or("it failed");
                output::note(
                    PROGRAM,
                    &format!("{}: not done: {}", name(&result.path.path), name(why)),
                );
            }
        }
    }
    // Of many files only those that need a word are kept.
    if args.json || !is_well(result.word) {
        report.results.push(result);
    }
}

/// All files that were named, in batches: what they need is shown before the first is touched. And what
/// could not be looked at.
pub(super) fn batches(files: &Files) -> anyhow::Result<(Vec<Vec<PathText>>, Vec<PathFailure>)> {
    let mut all = Vec::new();
    let failures = for_each_batch(files, &mut |batch| {
        all.push(batch);
        Ok(())
    })?;
    Ok((all, failures))
}

/// Paths in batches that fit into a request.
pub(super) struct Batches<'e> {
    batch: Vec<PathText>,
    bytes: usize,
    each: &'e mut dyn FnMut(Vec<PathText>) -> anyhow::Result<()>,
}

impl<'e> Batches<'e> {
    pub(super) fn new(each: &'e mut dyn FnMut(Vec<PathText>) -> anyhow::Result<()>) -> Self {
        Self {
            batch: Vec::new(),
            bytes: 0,
            each,
        }
    }

    pub(super) fn add(&mut self, path: &Path) -> anyhow::Result<()> {
        self.batch.push(PathText::of_path(path));
        self.bytes += path.as_os_str().len();
        if self.batch.len() >= AT_ONCE || self.bytes >= PATH_BYTES {
            self.bytes = 0;
            (self.each)(std::mem::take(&mut self.batch))?;
        }
        Ok(())
    }

    pub(super) fn finish(self) -> anyhow::Result<()> {
        if self.batch.is_empty() {
            return Ok(());
        }
        (self.each)(self.batch)
    }
}

/// What was named on the command line and in a list, as the daemon wants it.
pub(super) fn named(paths: &[PathBuf], list: Option<&Path>) -> anyhow::Result<Vec<PathBuf>> {
    let listed = match list {
        Some(list) => read_list(list)?,
        None => Vec::new(),
    };
    paths
        .iter()
        .chain(&listed)
        .map(|path| absolute(path))
        .collect()
}

/// All files that were named, a batch at a time. Gives what could not be looked at: the others do not
/// suffer for it.
fn for_each_batch(
    files: &Files,
    each: &mut dyn FnMut(Vec<PathText>) -> anyhow::Result<()>,
) -> anyhow::Result<Vec<PathFailure>> {
    let (mut batches, mut failures) = (Batches::new(each), Vec::new());
    for path in named(&files.paths, files.from_file.as_deref())? {
        match fs::symlink_metadata(&path) {
            Err(error) => failures.push(failure(&path, error.to_string())),
            Ok(meta) if !meta.is_dir() => batches.add(&path)?,
            Ok(meta) if files.recursive => {
                walk(&path, meta.dev(), &mut failures, &mut |file| {
                    batches.add(file)
                })?;
            }
            Ok(_) => {
                let why = "it is a directory: give --recursive for everything below it";
                failures.push(failure(&path, why.to_owned()));
            }
        }
    }
    batches.finish()?;
    Ok(failures)
}

fn failure(path: &Path, error: String) -> PathFailure {
    PathFailure {
        path: PathText::of_path(path),
        error,
    }
}

/// Regular files below a directory of the filesystem `device`. Nothing is opened but directories.
fn walk(
    top: &Path,
    device: u64,
    failures: &mut Vec<PathFailure>,
    add: &mut dyn FnMut(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut todo = vec![top.to_owned()];
    while let Some(dir) = todo.pop() {
        let mut failed = |error: io::Error| {
            failures.push(failure(&dir, format!("it cannot be listed: {error}")));
        };
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            // It was deleted meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                failed(error);
                continue;
            }
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) => {
                    failed(error);
                    break;
                }
            };
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_dir() && meta.dev() == device {
                todo.push(entry.path());
            } else if meta.is_file() {
                add(&entry.path())?;
            }
        }
    }
    Ok(())
}

fn read_list(list: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut bytes = Vec::new();
    if list == Path::new("-") {
        io::stdin().lock().read_to_end(&mut bytes)
    } else {
        fs::File::open(list).and_then(|mut file| file.read_to_end(&mut bytes))
    }
    .with_context(|| format!("reading the list of files {}", list.display()))?;
    let end = if bytes.contains(&0) { 0 } else { b'\n' };
    Ok(bytes
        .split(|byte| *byte == end)
        .filter(|path| !path.is_empty())
        .map(|path| PathBuf::from(std::ffi::OsString::from_vec(path.to_vec())))
        .collect())
}
