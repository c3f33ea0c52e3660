//! `tierctl catalog`: making the catalog again from the log alone, and comparing catalogs.
//!
//! Rebuilding holds the spool's lock, so no daemon can start meanwhile. It reads the sealed segments
//! on volumes and in the spool, then what a daemon that ended left open there, and changes neither:
//! recovery is the daemon's, at its next start. The new catalog is made beside the old one and takes
//! its place when it is complete and synced; until then nothing changes.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, bail};
use media::directory::{self, Found};
use replay::Moment;
use replay::fold::{Segments, fold};
use replay::report::{Collector, Stage, Watch};
use replay::sources::Sources;
use serde::Serialize;
use tierfs::SegmentNo;
use tierfs::catalog::{Catalog, Reader};
use tierfs::disk::{Disk, Locked, RealDisk, RealLock};
use tierfs::fold::{Before, fold_segment};
use tierfs::scan::Scan;
use tierfs::segment::Segment;

use super::args::Args;
use super::format::some;
use super::{Down, PROGRAM, connect};
use crate::config::Config;
use crate::control::model::CatalogDigest;
use crate::output::{self, Exit};

/// What `catalog rebuild --json` prints.
#[derive(Serialize)]
struct Rebuilt {
    path: String,
    lsn: Option<u64>,
    digest: String,
    segments: u64,
    warnings: Vec<String>,
}

pub(super) fn digest(args: &Args) -> anyhow::Result<Exit> {
    let digest = match connect(args) {
        Ok(mut client) => client.catalog_digest()?,
        // The daemon is down: nobody writes the file, and it can be read as it is.
        Err(error) if error.is::<Down>() => digest_of(&Config::load(&args.config)?.catalog)?,
        Err(error) => return Err(error),
    };
    if args.json {
        output::json(&digest)?;
    } else {
        let lsn = digest
            .lsn
            .map_or_else(|| "none".to_owned(), |lsn| lsn.to_string());
        output::text(&format!("{}  LSN {lsn}\n", digest.digest))?;
    }
    Ok(Exit::Done)
}

fn digest_of(path: &Path) -> anyhow::Result<CatalogDigest> {
    let reader = Reader::open(path)?;
    let digest = reader.snapshot(|queries| {
        Ok::<_, tierfs::catalog::Error>(CatalogDigest {
            lsn: queries.folded()?.map(|(lsn, _)| lsn.get()),
            digest: queries.digest()?.to_string(),
        })
    });
    Ok(digest?)
}

pub(super) fn rebuild(args: &Args) -> anyhow::Result<Exit> {
    let config = Config::load(&args.config)?;
    let _lock = lock_spool(&config.spool)?;
    let mut warnings = Vec::new();
    let log = find_log(&config, &mut warnings)?;
    let fresh = beside(&config.catalog, ".rebuild");
    remove_database(&fresh)?;
    let digest = match fill(&fresh, &log, &mut warnings) {
        Ok(digest) => digest,
        Err(error) => {
            // What is half made is worth nothing; the error that made it so is the one to tell.
            let _ = remove_database(&fresh);
            return Err(error.context("the catalog was not rebuilt, the old one is as it was"));
        }
    };
    replace(&fresh, &config.catalog)?;
    let rebuilt = Rebuilt {
        path: config.catalog.display().to_string(),
        lsn: digest.lsn,
        digest: digest.digest,
        segments: log.segments(),
        warnings,
    };
    report(args, &rebuilt)
}

fn report(args: &Args, rebuilt: &Rebuilt) -> anyhow::Result<Exit> {
    for warning in &rebuilt.warnings {
        output::note(PROGRAM, &format_args!("warning: {warning}"));
    }
    if args.json {
        output::json(rebuilt)?;
    } else {
        let lsn = rebuilt
            .lsn
            .map_or_else(|| "none".to_owned(), |lsn| lsn.to_string());
        output::text(&format!(
            "{} is rebuilt from {}, up to LSN {lsn}\ndigest {}\n",
            rebuilt.path,
            some(rebuilt.segments, "segment", "segments"),
            rebuilt.digest
        ))?;
    }
    Ok(Exit::Done)
}

/// Keeps the daemon out; `None` where there is no spool any more.
fn lock_spool(spool: &Path) -> anyhow::Result<Option<RealLock>> {
    let disk = match RealDisk::open(spool) {
        Ok(disk) => disk,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => {
            return Err(error).with_context(|| format!("opening the spool {}", spool.display()));
        }
    };
    let locked = disk
        .lock()
        .with_context(|| format!("locking the spool {}; run as root", spool.display()))?;
    match locked {
        Locked::Ours(lock) => Ok(Some(lock)),
        Locked::Other(pid) => {
            let pid = pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
            bail!(
                "hsmd runs{pid} and holds the spool {}: stop it with `systemctl stop hsmd`, rebuild, and start it again",
                spool.display()
            )
        }
    }
}

/// The log, as far as it is there.
struct Log {
    /// Sealed segments; `None` where there is not one.
    sealed: Option<Sources>,
    /// Files of the spool that are not sealed, in the order of their numbers.
    open: Vec<(SegmentNo, PathBuf)>,
}

impl Log {
    fn segments(&self) -> u64 {
        let sealed = self
            .sealed
            .as_ref()
            .map_or(0, |sources| sources.segments().count());
        (sealed + self.open.len()) as u64
    }
}

fn find_log(config: &Config, warnings: &mut Vec<String>) -> anyhow::Result<Log> {
    let mut places = Vec::new();
    for path in config.volumes() {
        match directory::probe(path) {
            Ok(Found::Labelled(_)) => places.push(path.to_owned()),
            Ok(Found::Absent | Found::Empty) => warnings.push(format!(
                "no volume is at {}: the others were read",
                path.display()
            )),
            // What is missing without it is named by the fold.
            Err(error) => warnings.push(format!("{error}; the other volumes were read")),
        }
    }
    let (mut sealed_in_spool, mut open) = (false, Vec::new());
    match fs::read_dir(&config.spool) {
        Ok(entries) => {
            for entry in entries {
                let entry = entry.with_context(|| config.spool.display().to_string())?;
                let name = entry.file_name().to_string_lossy().into_owned();
                sealed_in_spool |= SegmentNo::from_file_name(&name).is_some();
                if let Some(segment) = open_segment_no(&name) {
                    open.push((segment, entry.path()));
                }
            }
        }
        Err(error) => warnings.push(format!(
            "the spool {} cannot be read: {error}",
            config.spool.display()
        )),
    }
    open.sort();
    if sealed_in_spool {
        places.push(config.spool.clone());
    }
    let sealed = if places.is_empty() {
        None
    } else {
        Some(Sources::open(&places)?)
    };
    if sealed
        .as_ref()
        .is_none_or(|sources| sources.last().is_none())
        && open.is_empty()
    {
        bail!(
            "neither the spool {} nor any volume has a segment: mount the volumes",
            config.spool.display()
        );
    }
    Ok(Log { sealed, open })
}

/// The number in the name of a segment that is not sealed: `NNNNNNNNNN.open-EPOCH`.
fn open_segment_no(name: &str) -> Option<SegmentNo> {
    let (digits, _) = name.split_once(".open-")?;
    SegmentNo::from_file_name(&format!("{digits}.hsm.zst"))
}

/// Folds the whole log into a new catalog, synced.
fn fill(path: &Path, log: &Log, warnings: &mut Vec<String>) -> anyhow::Result<CatalogDigest> {
    let log_id = match (&log.sealed, log.open.first()) {
        (Some(sources), _) => sources.log_id(),
        (None, Some((_, path))) => open_as_segment(path)?.header.log_id,
        (None, None) => bail!("there is no segment"),
    };
    let mut catalog = Catalog::create(path, log_id)?;
    if let Some(sources) = &log.sealed {
        fold_sealed(sources, &mut catalog, warnings)?;
    }
    fold_open(log, &mut catalog, warnings)?;
    let digest = catalog.digest()?.to_string();
    let lsn = catalog.folded().map(tierfs::Lsn::get);
    catalog.sync()?;
    Ok(CatalogDigest { lsn, digest })
}

fn fold_sealed(
    sources: &Sources,
    catalog: &mut Catalog,
    warnings: &mut Vec<String>,
) -> anyhow::Result<()> {
    let watch = ShowFold::default();
    let collector = Collector::new(&watch);
    let folded = fold(sources, catalog, Moment::End, Segments::Note, &collector);
    output::clear();
    folded?;
    warnings.extend(sources.warnings().iter().cloned());
    let found = collector.finish();
    warnings.extend(found.warnings);
    if found.losses_total > 0 {
        warnings.push(format!(
            "{} cannot be read from any of these places: check them with `tierctl volume verify`",
            some(found.losses_total, "piece of content", "pieces of content")
        ));
    }
    Ok(())
}

/// What the daemon wrote behind the last sealed segment, as far as it is whole.
fn fold_open(log: &Log, catalog: &mut Catalog, warnings: &mut Vec<String>) -> anyhow::Result<()> {
    let last = log.sealed.as_ref().and_then(Sources::last);
    let mut expected = last.map_or(SegmentNo::FIRST, SegmentNo::next);
    for (number, path) in &log.open {
        if *number < expected {
            // Sealed since then, or a second one of its number: recovery tells which holds.
            continue;
        }
        if *number > expected {
            warnings.push(format!(
                "{} was not read: segment {expected} is missing before it; hsmd says at its start what to do",
                path.display()
            ));
            return Ok(());
        }
        let segment = open_as_segment(path)?;
        fold_segment(catalog, &segment, None, Before::Unknown)
            .with_context(|| format!("reading {}", path.display()))?;
        expected = expected.next();
    }
    Ok(())
}

/// The whole frames from a file's front to the first that is not; it has no index.
fn open_as_segment(path: &Path) -> anyhow::Result<Segment> {
    let name = path.display().to_string();
    let file = File::open(path).with_context(|| format!("opening {name}"))?;
    let file = Arc::new(file);
    let mut end = Scan::open(file.clone(), name.clone())?.offset;
    let mut segment = Segment::salvage(file, name)?;
    segment.index.frames.retain(|frame| {
        let next = frame.offset == end;
        if next {
            end = frame.end();
        }
        next
    });
    Ok(segment)
}

/// Shows how many segments were read.
#[derive(Default)]
struct ShowFold {
    done: AtomicU64,
    total: AtomicU64,
}

impl Watch for ShowFold {
    fn begin(&self, _stage: Stage, total: Option<u64>) {
        self.total.store(total.unwrap_or(0), Ordering::Relaxed);
    }

    fn advance(&self, by: u64) {
        let done = self.done.fetch_add(by, Ordering::Relaxed) + by;
        let total = self.total.load(Ordering::Relaxed);
        output::progress(&format_args!(
            "{done} of {} read",
            some(total, "segment", "segments")
        ));
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// Removes an SQLite file and the files that belong to it.
fn remove_database(path: &Path) -> anyhow::Result<()> {
    for suffix in ["", "-wal", "-shm", "-journal"] {
        let file = beside(path, suffix);
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("removing {}", file.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Puts the new catalog in the old one's place. The old one goes first, with its write-ahead log:
/// that of another database would be taken for the new one's.
fn replace(fresh: &Path, path: &Path) -> anyhow::Result<()> {
    let left = beside(fresh, "-wal");
    if fs::metadata(&left).is_ok_and(|meta| meta.len() > 0) {
        bail!(
            "{} is not empty: the new catalog is not whole, nothing was replaced; run the command again",
            left.display()
        );
    }
    remove_database(path)?;
    fs::rename(fresh, path)
        .with_context(|| format!("moving {} to {}", fresh.display(), path.display()))?;
    remove_database(fresh)?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.with_context(|| format!("syncing {}", dir.display()))
}
