//! `tierctl volume`: the media.

use std::path::Path;

use anyhow::{Context, bail};
use media::Volume as _;
use media::directory::{self, Found};

use super::args::Args;
use super::format::{Side, Table, add, percent, size, some};
use super::status::{volume_cells, volume_table};
use super::{PROGRAM, connect};
use crate::control::client::ClientError;
use crate::control::model::{PoolVolume, VerifyDone, VerifyProgress, VolumeStatus};
use crate::output::{self, Exit};

pub(super) fn list(args: &Args) -> anyhow::Result<Exit> {
    let volumes = connect(args)?.volumes()?;
    if args.json {
        output::json(&volumes)?;
    } else {
        output::text(&render_list(&volumes))?;
    }
    Ok(Exit::Done)
}

pub(super) fn render_list(volumes: &[PoolVolume]) -> String {
    let mut table = Table::new(
        0,
        &[
            ("POOL", Side::Left),
            ("VOLUME", Side::Left),
            ("STATE", Side::Left),
            ("SEGMENTS", Side::Right),
            ("SIZE", Side::Right),
            ("FREE", Side::Right),
            ("VERIFIED", Side::Left),
            ("PATH", Side::Left),
        ],
    );
    for PoolVolume { pool, volume } in volumes {
        table.row(std::iter::once(pool.clone()).chain(volume_cells(volume)));
    }
    let damage = volumes.iter().map(|one| damage_text(&one.volume));
    table.text() + &damage.collect::<String>()
}

/// What to do about a damaged volume; nothing about a whole one.
fn damage_text(volume: &VolumeStatus) -> String {
    match volume.damaged {
        0 => String::new(),
        damaged => format!(
            "volume {}: {} damaged; `tierctl status` says what to do, `tierctl volume verify` reads it again\n",
            volume.serial.as_deref().unwrap_or("without a serial"),
            some(damaged, "segment is", "segments are")
        ),
    }
}

pub(super) fn show(args: &Args, serial: &str) -> anyhow::Result<Exit> {
    let volumes = connect(args)?.volumes()?;
    let found = volumes
        .iter()
        .find(|one| one.volume.serial.as_deref() == Some(serial) || one.volume.path == serial);
    let Some(found) = found else {
        output::error(
            PROGRAM,
            &format_args!("no pool has a volume {serial}: `tierctl volume list` names them all"),
        );
        return Ok(Exit::No);
    };
    if args.json {
        output::json(found)?;
    } else {
        let mut table = volume_table(0);
        table.row(volume_cells(&found.volume));
        let of_pool = format!(
            "volume of pool {}, kind {}\n",
            found.pool, found.volume.backend
        );
        output::text(&(of_pool + &table.text() + &damage_text(&found.volume)))?;
    }
    Ok(Exit::Done)
}

pub(super) fn verify(args: &Args, volume: &str) -> anyhow::Result<Exit> {
    let by_path = volume.parse::<media::Serial>().is_err();
    let name = if by_path {
        let path = Path::new(volume);
        path.canonicalize()
            .with_context(|| format!("{volume}: no such directory"))?
            .display()
            .to_string()
    } else {
        volume.to_owned()
    };
    let done = match connect(args) {
        Ok(mut client) => client.verify_volume(&name, &mut show_progress),
        Err(_) if by_path => return report(args, &verify_alone(Path::new(&name))?),
        Err(error) => bail!(
            "{error:#}; or name the volume's directory instead of its serial, which needs no daemon"
        ),
    };
    output::clear();
    match done {
        Ok(done) => report(args, &done),
        // A volume of no configured pool can be checked all the same.
        Err(ClientError::Answered { name: error, .. }) if by_path && error == "NotFound" => {
            report(args, &verify_alone(Path::new(&name))?)
        }
        Err(error) => Err(error.into()),
    }
}

fn show_progress(progress: VerifyProgress) {
    let VerifyProgress {
        objects,
        objects_total,
        bytes,
        bytes_total,
    } = progress;
    output::progress(&format_args!(
        "{objects} of {} checked, {} of {} {}",
        some(objects_total, "object", "objects"),
        size(bytes),
        size(bytes_total),
        percent(bytes, bytes_total)
    ));
}

fn report(args: &Args, done: &VerifyDone) -> anyhow::Result<Exit> {
    if args.json {
        output::json(done)?;
    } else {
        output::text(&render_verified(done))?;
    }
    Ok(if done.faults.is_empty() {
        Exit::Done
    } else {
        Exit::No
    })
}

pub(super) fn render_verified(done: &VerifyDone) -> String {
    let mut text = format!(
        "volume {} of pool {} at {}: {} ({}) read back",
        done.serial,
        done.pool,
        done.path,
        some(done.objects, "object", "objects"),
        size(done.bytes)
    );
    if done.faults.is_empty() {
        return text + ", all as when they were written\n";
    }
    add!(
        text,
        ", {}:\n",
        some(done.faults.len() as u64, "fault", "faults")
    );
    for fault in &done.faults {
        add!(text, "  {fault}\n");
    }
    text
}

/// Checks a volume without the daemon.
fn verify_alone(path: &Path) -> anyhow::Result<VerifyDone> {
    let volume = match directory::probe(path)? {
        Found::Labelled(volume) => volume,
        Found::Empty => bail!(
            "{} is empty: no volume has been made there yet",
            path.display()
        ),
        Found::Absent => bail!("{} is not there: mount it", path.display()),
    };
    let inventory = volume.inventory()?;
    let mut faults: Vec<String> = inventory.faults.iter().map(ToString::to_string).collect();
    let bytes_total = inventory.entries.iter().map(|entry| entry.bytes).sum();
    let mut progress = VerifyProgress {
        objects_total: inventory.entries.len() as u64,
        bytes_total,
        ..VerifyProgress::default()
    };
    for entry in &inventory.entries {
        if let Err(error) = volume.verify(&entry.name) {
            faults.push(error.to_string());
        }
        progress.objects += 1;
        progress.bytes += entry.bytes;
        show_progress(progress);
    }
    output::clear();
    let label = volume.label();
    Ok(VerifyDone {
        serial: label.serial.to_string(),
        pool: label.pool.clone(),
        path: path.display().to_string(),
        objects: progress.objects,
        bytes: progress.bytes,
        faults,
    })
}
