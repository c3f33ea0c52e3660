//! `tierctl release` and `recall`: many files, a few hundred at a time.

use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

use super::args::{Args, Files};
use super::format::{name, size, some};
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
}

pub(super) fn release(args: &Args, files: &Files) -> anyhow::Result<Exit> {
    if files.wait && !files.dry_run {
        let request = SyncRequest {
            media: true,
            sweep: false,
        };
        output::progress(&"waiting until everything is on every pool ...");
        connect(args)?.sync(request)?;
        output::clear();
    }
    let done = if files.dry_run {
        "would be released"
    } else {
        "released"
    };
    let freed = if files.dry_run { "large" } else { "freed" };
    act(args, files, (done, freed), Client::release)
}

/// First what it needs, for an operator who may have to fetch tapes; then how far it is.
pub(super) fn recall(args: &Args, files: &Files) -> anyhow::Result<Exit> {
    let mut client = connect(args)?;
    let batches = batches(files)?;
    let plan = plan_recall(&mut client, &batches)?;
    let mut report = Report {
        needs: Some(plan.needs.clone()),
        ..Report::default()
    };
    if files.dry_run {
        report.files = plan.files;
        report.bytes = plan.needs.bytes;
        for failure in plan.failures {
            note(args, &mut report, failed(failure));
        }
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

fn failed(failure: PathFailure) -> Moved {
    Moved {
        path: failure.path,
        word: MovedWord::Failed,
        bytes: 0,
        why: Some(failure.error),
    }
}

fn act(
    args: &Args,
    files: &Files,
    (done, moved): (&str, &str),
    ask: impl Fn(
        &mut Client,
        &MoveParameters,
    ) -> Result<Vec<Moved>, crate::control::client::ClientError>,
) -> anyhow::Result<Exit> {
    let mut client = connect(args)?;
    let mut report = Report::default();
    let mut asked = 0;
    for_each_batch(files, &mut |paths| {
        asked += paths.len();
        let parameters = MoveParameters {
            paths,
            wait: files.wait,
            dry_run: files.dry_run,
        };
        for result in ask(&mut client, &parameters)? {
            note(args, &mut report, result);
        }
        output::progress(&format_args!(
            "{} of {asked} files {done}, {} {moved}",
            report.files,
            size(report.bytes)
        ));
        Ok(())
    })?;
    output::clear();
    finish(args, &report, done, moved, "")
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
        output::text(&format!("{} files {done}{amount}\n{more}", report.files))?;
    }
    Ok(match (report.files, failed) {
        (_, false) => Exit::Done,
        (0, true) => Exit::No,
        (_, true) => Exit::Partly,
    })
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
        MovedWord::Already | MovedWord::Nothing => {}
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

/// All files that were named, in batches: what they need is shown before the first is touched.
pub(super) fn batches(files: &Files) -> anyhow::Result<Vec<Vec<PathText>>> {
    let mut all = Vec::new();
    for_each_batch(files, &mut |batch| {
        all.push(batch);
        Ok(())
    })?;
    Ok(all)
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

/// All files that were named, a batch at a time.
fn for_each_batch(
    files: &Files,
    each: &mut dyn FnMut(Vec<PathText>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut batches = Batches::new(each);
    for path in named(&files.paths, files.from_file.as_deref())? {
        let is_dir = std::fs::symlink_metadata(&path)
            .with_context(|| path.display().to_string())?
            .is_dir();
        if is_dir && files.recursive {
            walk(&path, &mut |file| batches.add(file))?;
        } else if is_dir {
            anyhow::bail!(
                "{} is a directory: give --recursive for everything below it",
                path.display()
            );
        } else {
            batches.add(&path)?;
        }
    }
    batches.finish()
}

/// Regular files below a directory of the same filesystem. Nothing is opened but directories.
fn walk(top: &Path, add: &mut dyn FnMut(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let device = std::fs::metadata(top)?.dev();
    let mut todo = vec![top.to_owned()];
    while let Some(dir) = todo.pop() {
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                return Err(error).with_context(|| format!("listing {}", dir.display()));
            }
        };
        for entry in entries {
            let entry = entry.with_context(|| format!("listing {}", dir.display()))?;
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
        std::io::stdin().lock().read_to_end(&mut bytes)
    } else {
        std::fs::File::open(list).and_then(|mut file| file.read_to_end(&mut bytes))
    }
    .with_context(|| format!("reading the list of files {}", list.display()))?;
    let end = if bytes.contains(&0) { 0 } else { b'\n' };
    Ok(bytes
        .split(|byte| *byte == end)
        .filter(|path| !path.is_empty())
        .map(|path| PathBuf::from(std::ffi::OsString::from_vec(path.to_vec())))
        .collect())
}
