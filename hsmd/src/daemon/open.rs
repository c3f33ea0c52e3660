//! Opening the log: catalog and spool, and whether volumes and filesystem are this log's.

use std::fs;
use std::path::Path;

use media::Volume;
use media::directory::{self, Found};
use tierfs::catalog::{Catalog, SegmentRow};
use tierfs::disk::RealDisk;
use tierfs::fold::{Before, fold_segment};
use tierfs::record::{Filesystem, Op};
use tierfs::residency::{self, Residency};
use tierfs::spool::{Floor, Head, Spool, SpoolOptions};
use tierfs::{Lsn, SegmentNo};

use super::{Overrides, Refusal, refuse, uuid_text};
use crate::capture::examine::{self, Outcome};
use crate::capture::facts;
use crate::config::Config;
use crate::preflight;
use crate::sys::handle::handle_of;
use crate::sys::mount::PrivateMount;
use crate::tier::mark;

fn make_dir(path: &Path, what: &str) -> Result<(), Refusal> {
    fs::create_dir_all(path).map_err(|error| {
        refuse(
            path.display(),
            error,
            format!("make this directory for {what}, or configure another"),
        )
    })
}

/// Opens catalog and spool, or begins a new log; afterwards the catalog has all that the log has.
pub(super) fn open_log(
    config: &Config,
    report: &preflight::Report,
    overrides: Overrides,
) -> Result<(Spool<RealDisk>, Catalog), Refusal> {
    make_dir(&config.spool, "the spool")?;
    if let Some(dir) = config.catalog.parent() {
        make_dir(dir, "the catalog")?;
    }
    let disk = RealDisk::open(&config.spool)
        .map_err(|error| refuse(config.spool.display(), error, "check the spool's directory"))?;
    let empty = Spool::is_empty(&disk)
        .map_err(|error| refuse(config.spool.display(), error, "check the spool's directory"))?;
    let mut catalog = if config.catalog.exists() {
        let catalog = Catalog::open(&config.catalog).map_err(|error| {
            refuse(
                config.catalog.display(),
                error,
                "run `tierctl catalog rebuild`: spool and volumes hold all of it",
            )
        })?;
        if empty {
            Spool::create(&disk, catalog.log_id(), last_segment(&catalog)?)
                .map_err(|error| refuse(config.spool.display(), error, "see hsm(7)"))?;
        }
        catalog
    } else {
        new_log(config, &disk, empty)?
    };
    let options = SpoolOptions {
        segment_bytes: config.segment_bytes,
        bytes_max: config.spool_bytes_max,
        level: config.compression_level,
        fs_uuid: report.fs_uuid,
        fs_type: report.fs_type.clone(),
        host: nix::unistd::gethostname()
            .ok()
            .map(|name| name.to_string_lossy().into_owned()),
    };
    let floor = Floor {
        log_id: Some(catalog.log_id()),
        folded: catalog.folded(),
        accept_loss_after: overrides.accept_loss_after,
        ..Floor::default()
    };
    let (spool, recovered) = Spool::open(disk, options, &floor).map_err(|error| {
        refuse(
            config.spool.display(),
            error,
            "see hsm(7), \"the daemon refuses to start\"",
        )
    })?;
    tracing::info!(?recovered, "the spool is open");
    fold_tail(&spool, &mut catalog).map_err(|error| {
        refuse(
            config.catalog.display(),
            error,
            "run `tierctl catalog rebuild`: spool and volumes hold all of it",
        )
    })?;
    Ok((spool, catalog))
}

fn new_log(config: &Config, disk: &RealDisk, empty: bool) -> Result<Catalog, Refusal> {
    let advice = "run `tierctl catalog rebuild` to make the catalog again from spool and volumes";
    if !empty {
        return Err(refuse(
            config.catalog.display(),
            "the catalog is missing, but the spool holds a log",
            advice,
        ));
    }
    for path in config.volumes() {
        if let Ok(Found::Labelled(volume)) = directory::probe(path) {
            let log = tierfs::LogId(volume.label().log_id);
            return Err(refuse(
                path.display(),
                format!("catalog and spool are missing, but this volume holds log {log}"),
                format!("{advice}; or configure empty volumes to begin a new log"),
            ));
        }
    }
    let mut id = [0; 16];
    getrandom::fill(&mut id)
        .map_err(|error| refuse("the kernel's random numbers", error, "try again"))?;
    let log_id = tierfs::LogId(id);
    Spool::create(disk, log_id, None)
        .map_err(|error| refuse(config.spool.display(), error, "see hsm(7)"))?;
    tracing::info!(%log_id, "begins a new log");
    Catalog::create(&config.catalog, log_id).map_err(|error| {
        refuse(
            config.catalog.display(),
            error,
            "remove what is there, or configure another place",
        )
    })
}

/// A volume that is there must be of this log and its pool; one that is absent is waited for.
pub(super) fn check_volumes(config: &Config, log_id: tierfs::LogId) -> Result<(), Refusal> {
    for pool in &config.pools {
        for path in &pool.volumes {
            let advice = "configure the right place, or an empty directory";
            match directory::probe(path) {
                Ok(Found::Labelled(volume)) => {
                    let label = volume.label();
                    if label.log_id != log_id.0 {
                        let other = tierfs::LogId(label.log_id);
                        let reason = format!(
                            "it holds volume {} of another log, {other}; this log is {log_id}",
                            label.serial
                        );
                        return Err(refuse(path.display(), reason, advice));
                    }
                    if label.pool != pool.name {
                        let reason = format!(
                            "it holds volume {} of pool {}, not of pool {}",
                            label.serial, label.pool, pool.name
                        );
                        return Err(refuse(path.display(), reason, advice));
                    }
                }
                Err(error) if !error.is_absent() && !matches!(error, media::Error::Io { .. }) => {
                    return Err(refuse(path.display(), error, advice));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// The end of the log as the catalog knows it: for a spool whose disk was lost.
fn last_segment(catalog: &Catalog) -> Result<Option<Head>, Refusal> {
    let fail = |error| refuse("the catalog", error, "run `tierctl catalog rebuild`");
    let (mut last, mut from) = (None::<SegmentRow>, SegmentNo::FIRST);
    loop {
        let page = catalog.queries().segments(from, 10_000).map_err(fail)?;
        let Some(row) = page.last() else { break };
        (last, from) = (Some(*row), row.segment.next());
    }
    Ok(last.map(|row| Head {
        epoch: row.epoch,
        segment: row.segment,
        hash: row.hash,
        next_lsn: row.last_lsn.map_or(row.first_lsn, Lsn::next),
    }))
}

/// Folds what the spool has beyond the catalog.
fn fold_tail(spool: &Spool<RealDisk>, catalog: &mut Catalog) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    for sealed in spool.segments() {
        let known = catalog
            .queries()
            .segments(sealed.no, 1)
            .map_err(|error| text(&error))?;
        if known
            .first()
            .is_some_and(|row| row.segment == sealed.no && row.hash == sealed.hash)
            && sealed.last_lsn <= catalog.folded()
        {
            continue;
        }
        let segment = spool
            .open_segment(sealed.no)
            .map_err(|error| text(&error))?;
        catalog
            .forget_data(sealed.no)
            .map_err(|error| text(&error))?;
        let folded =
            fold_segment(catalog, &segment, None, Before::Unknown).map_err(|error| text(&error))?;
        catalog
            .add_segment(&sealed.row())
            .map_err(|error| text(&error))?;
        tracing::info!(segment = %sealed.no, transactions = folded.transactions, "folded a segment of the spool");
    }
    catalog.commit().map_err(|error| text(&error))
}

/// What a daemon begins with.
pub(super) struct Beginning {
    /// What must be logged before anything else: whose disk this is, where it is not the known one.
    pub first: Vec<Op>,
    /// This disk takes the place of the one before. Not all of its inodes may be known by their handles yet.
    pub taken_over: bool,
}

/// What to begin with on this filesystem.
pub(super) fn begin_with(
    config: &Config,
    catalog: &mut Catalog,
    mount: &PrivateMount,
    report: &preflight::Report,
    overrides: Overrides,
) -> Result<Beginning, Refusal> {
    let sys = |error: crate::sys::Error| refuse(config.mount.display(), error, "check the mount");
    let known = catalog
        .filesystem()
        .map_err(|error| bad_catalog(config, &error))?;
    let made_of_stubs = mark::of_disk(mount.root())
        .map_err(sys)?
        .is_some_and(|mark| mark.generation == catalog.log_id().0);
    let same = known
        .as_ref()
        .is_some_and(|known| known.uuid == report.fs_uuid);
    let goes_on = same && is_being_taken_over(config, catalog, &report.fs_uuid, made_of_stubs)?;
    if goes_on || (same && !made_of_stubs) {
        return Ok(Beginning {
            first: Vec::new(),
            taken_over: goes_on,
        });
    }
    let root = handle_of(mount.root()).map_err(sys)?;
    let Outcome::Facts(found) = examine::attributes(mount.root(), &root).map_err(sys)? else {
        return Err(refuse(
            config.mount.display(),
            "its root directory is gone",
            "mount it again",
        ));
    };
    let mut first = vec![Op::Filesystem(Filesystem {
        uuid: report.fs_uuid,
        fs_type: report.fs_type.clone(),
        mount: Some(std::os::unix::ffi::OsStrExt::as_bytes(config.mount.as_os_str()).to_vec()),
    })];
    let Some(known) = known else {
        first.extend(found.ops_of_new(tierfs::FileId::ROOT, Some(&root)));
        return Ok(Beginning {
            first,
            taken_over: false,
        });
    };
    check_rebuilt(config, catalog, mount, &known, overrides, same)?;
    tracing::info!("goes on with the log on a filesystem that was made anew");
    first.push(facts::bind(tierfs::FileId::ROOT, &root, found.stat.ino));
    // Before the log says so: a daemon that is killed in between takes it over once more.
    if let Some(folded) = catalog.folded().filter(|_| config.device.is_some()) {
        Residency::open(&residency::path_beside(&config.catalog))
            .and_then(|mut list| list.take_over(&report.fs_uuid, folded))
            .map_err(|error| bad_list(config, &error))?;
    }
    Ok(Beginning {
        first,
        taken_over: true,
    })
}

/// Whether a daemon before this one took over the known filesystem as it is, and the log says so. One that was made
/// of stubs since (`made_of_stubs`) has no list of them yet.
fn is_being_taken_over(
    config: &Config,
    catalog: &Catalog,
    fs_uuid: &[u8; 16],
    made_of_stubs: bool,
) -> Result<bool, Refusal> {
    let path = residency::path_beside(&config.catalog);
    if config.device.is_none() || !path.exists() {
        return Ok(false);
    }
    let noted = |list: &Residency| Ok((list.taken_over()?, list.was_complete(fs_uuid)?));
    let noted = Residency::open(&path).and_then(|list| noted(&list));
    let (taken_over, was_complete) = noted.map_err(|error| bad_list(config, &error))?;
    let said = catalog.queries().filesystem_since();
    let said = said.map_err(|error| bad_catalog(config, &error))?;
    Ok(taken_over.is_some() && said > taken_over && !(made_of_stubs && was_complete))
}

fn bad_list(config: &Config, error: &tierfs::catalog::Error) -> Refusal {
    let path = residency::path_beside(&config.catalog);
    refuse(path.display(), error, "check the catalog's disk")
}

fn bad_catalog(config: &Config, error: &tierfs::catalog::Error) -> Refusal {
    let advice = "run `tierctl catalog rebuild`";
    refuse(config.catalog.display(), error, advice)
}

/// Whether replay built this filesystem: its root directory has, to the nanosecond, the modification
/// time of a root directory that the log has. Replay gives it that time as the last thing it does; a
/// filesystem that was just made, or that holds something else, has its own.
fn is_rebuilt(config: &Config, catalog: &Catalog, mount: &PrivateMount) -> Result<bool, Refusal> {
    let fail = |error| bad_catalog(config, &error);
    let stat = crate::sys::stat::stat_of(mount.root())
        .map_err(|error| refuse(config.mount.display(), error, "check the mount"))?;
    let found = facts::time_of(stat.mtime);
    let root = tierfs::FileId::ROOT;
    for version in catalog
        .queries()
        .versions_of(root)
        .map_err(fail)?
        .iter()
        .rev()
    {
        let then = catalog
            .queries()
            .at(version.lsn)
            .and_then(|then| then.inode(root))
            .map_err(fail)?;
        if then.is_some_and(|row| row.mtime == found) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn check_rebuilt(
    config: &Config,
    catalog: &Catalog,
    mount: &PrivateMount,
    known: &Filesystem,
    overrides: Overrides,
    same: bool,
) -> Result<(), Refusal> {
    let log = catalog.log_id().to_string();
    if overrides.adopt_filesystem || is_rebuilt(config, catalog, mount)? {
        return Ok(());
    }
    if same {
        return Err(refuse(
            config.mount.display(),
            "`replay --stubs` has begun to make this filesystem anew and has not finished, or its top directory was changed since",
            "if hsmd has not run on it since, mount it, give the same replay once more, which goes on where it was, unmount it and start hsmd again; \
             if it has, or it is to stay as it is, start hsmd once with --adopt-filesystem: \
             what it does not hold is then logged as deleted (earlier moments stay), and what was changed on it is kept",
        ));
    }
    Err(refuse(
        config.mount.display(),
        format!(
            "this filesystem is not the one that log {log} was written from (that was {} {})",
            known.fs_type,
            uuid_text(&known.uuid)
        ),
        "mount the right one, or rebuild it with `replay --to` on the root of a fresh filesystem (and change nothing in its top directory before hsmd runs); \
         start hsmd once with --adopt-filesystem if this one really takes its place: \
         what it does not hold is then logged as deleted (earlier moments stay)",
    ))
}

/// Without `device` nobody guards released files: they would read as zeros.
pub(super) fn refuse_stubs(
    config: &Config,
    mount: &PrivateMount,
    fs_uuid: &[u8; 16],
) -> Result<(), Refusal> {
    let failed = |error: &dyn std::fmt::Display| {
        refuse(
            config.mount.display(),
            format!("whether released files lie on it is not known: {error}"),
            "see to the disk",
        )
    };
    let mark = mark::of_disk(mount.root()).map_err(|error| failed(&error))?;
    let path = residency::path_beside(&config.catalog);
    let released = match (&mark, path.exists()) {
        (None, false) => false,
        (Some(_), false) => true,
        (mark, true) => {
            let mut list = Residency::open(&path).map_err(|error| failed(&error))?;
            list.keep_for(fs_uuid).map_err(|error| failed(&error))?;
            let complete = list.is_complete(fs_uuid, mark.as_ref());
            let complete = complete.map_err(|error| failed(&error))?;
            let count = list.count().map_err(|error| failed(&error))?;
            count > 0 || (mark.is_some() && !complete)
        }
    };
    if released {
        return Err(refuse(
            config.mount.display(),
            "released files lie on it, which read as zeros where hsmd does not guard them",
            "unmount it, and set `device` in the configuration again; to do without release for good, recall everything first: \
             `tierctl recall --recursive --wait` on the mount point",
        ));
    }
    Ok(())
}
