//! Making an empty directory a volume: manuals, README, and last of all the label.
//!
//! A marker file tells an interrupted labelling, which may be begun anew, from somebody else's
//! files, which are never touched.

use std::path::Path;

use super::append::{put_entry, put_file};
use super::{DirectoryVolume, Found, LABEL_FILE, LOST_AND_FOUND, NAMED_MAX, README_FILE, probe};
use crate::durable::{Dir, Kind, Published, TEMPORARY_PREFIX};
use crate::name::{ENTRY_SUFFIX, MANUAL_DIRECTORY, printable};
use crate::{Error, Label};

/// Made first and removed last.
const MARKER: &str = ".tmp-labelling";
const MANUAL_NAME_BYTES_MAX: usize = 200;

/// Labels an empty directory, or one whose labelling was interrupted. `manuals` are names and texts of
/// the files under `manual/`. The volume is what a later [`probe`] finds: all of it is durable.
pub fn label(
    path: &Path,
    label: &Label,
    manuals: &[(&str, &str)],
) -> Result<DirectoryVolume, Error> {
    let text = label.encode(&path.join(LABEL_FILE))?;
    for (name, _) in manuals {
        check_manual_name(name)?;
    }
    match probe(path)? {
        Found::Empty => {}
        Found::Absent => {
            return Err(Error::Absent {
                path: path.to_owned(),
                why: "there is no such directory".into(),
            });
        }
        // Interrupted after the label itself: only the immutable flags may lack.
        Found::Labelled(volume) if volume.label == *label => return finish(volume, manuals),
        Found::Labelled(volume) => return Err(already(path, &volume.label)),
    }
    let dir = Dir::open(path).map_err(|e| Error::io(path, "opening the directory", e))?;
    write_all(&dir, label, &text, manuals)?;
    match probe(path)? {
        Found::Labelled(volume) if volume.label == *label => finish(volume, manuals),
        Found::Labelled(volume) => Err(already(path, &volume.label)),
        Found::Empty | Found::Absent => Err(Error::Absent {
            path: path.to_owned(),
            why: "it vanished while it was labelled".into(),
        }),
    }
}

fn write_all(dir: &Dir, label: &Label, text: &str, manuals: &[(&str, &str)]) -> Result<(), Error> {
    let Some(marker) = dir.lock_file(MARKER)? else {
        return Err(Error::Busy {
            path: dir.path().to_owned(),
        });
    };
    // Another process may have been here between the look and the lock.
    if let Err(error) = require_unused(dir) {
        dir.remove(MARKER)?;
        return Err(error);
    }
    dir.sync()?;
    clear(dir)?;
    let manual = dir.make_sub(MANUAL_DIRECTORY, 0o755)?;
    for (name, content) in manuals {
        put_new(&manual, name, content)?;
    }
    put_new(dir, README_FILE, &readme(label))?;
    put_entry(dir, LABEL_FILE, blake3::hash(text.as_bytes()).as_bytes())?;
    put_new(dir, LABEL_FILE, text)?;
    drop(marker);
    Ok(())
}

/// Protects what is written and removes the marker.
fn finish(volume: DirectoryVolume, manuals: &[(&str, &str)]) -> Result<DirectoryVolume, Error> {
    let dir = volume.root()?;
    if let Some(manual) = dir.sub(MANUAL_DIRECTORY)? {
        for (name, _) in manuals {
            manual.protect(name)?;
        }
    }
    dir.protect(README_FILE)?;
    super::append::protect(&dir, LABEL_FILE)?;
    dir.remove(MARKER)?;
    dir.sync()?;
    Ok(volume)
}

fn put_new(dir: &Dir, name: &str, content: &str) -> Result<(), Error> {
    match put_file(dir, name, content.as_bytes())? {
        Published::New => Ok(()),
        Published::NameTaken => Err(foreign(
            dir,
            format!("a {name} that somebody has just made"),
        )),
    }
}

/// Removes what an interrupted labelling left. None of it was ever part of a volume.
fn clear(dir: &Dir) -> Result<(), Error> {
    if let Some(manual) = dir.sub(MANUAL_DIRECTORY)? {
        for (name, _) in manual.entries()? {
            manual.remove(&name)?;
        }
    }
    for (name, kind) in dir.entries()? {
        if kind == Kind::File && name != MARKER {
            dir.remove(&name)?;
        }
    }
    Ok(())
}

/// Refuses a directory without a label that holds anything but the rest of a labelling.
pub(super) fn require_unused(dir: &Dir) -> Result<(), Error> {
    let mut names: Vec<String> = dir
        .entries()?
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name != LOST_AND_FOUND)
        .collect();
    if names.iter().any(|name| name == MARKER) {
        names.retain(|name| !is_rest(name));
    }
    if names.is_empty() {
        return Ok(());
    }
    let more = names.len().saturating_sub(NAMED_MAX);
    names.truncate(NAMED_MAX);
    let mut found: Vec<String> = names.iter().map(|name| printable(name)).collect();
    if more > 0 {
        found.push(format!("and {more} more"));
    }
    Err(foreign(dir, found.join(", ")))
}

fn is_rest(name: &str) -> bool {
    name.starts_with(TEMPORARY_PREFIX)
        || matches!(name, README_FILE | MANUAL_DIRECTORY)
        || name.strip_suffix(ENTRY_SUFFIX) == Some(LABEL_FILE)
}

fn foreign(dir: &Dir, found: String) -> Error {
    Error::Foreign {
        path: dir.path().to_owned(),
        found,
    }
}

fn already(path: &Path, label: &Label) -> Error {
    Error::BadLabel {
        path: path.join(LABEL_FILE),
        why: format!(
            "the directory is labelled already, as volume {} of pool {}",
            label.serial,
            printable(&label.pool)
        ),
    }
}

fn check_manual_name(name: &str) -> Result<(), Error> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let fine = !name.is_empty()
        && name.len() <= MANUAL_NAME_BYTES_MAX
        && !name.starts_with('.')
        && name.bytes().all(allowed);
    if fine {
        return Ok(());
    }
    Err(Error::BadName {
        name: printable(name),
        why: "a manual's name is 1 to 200 letters, digits, '.', '_' or '-', the first no '.'",
    })
}

/// What a person finds who has nothing but the medium.
fn readme(label: &Label) -> String {
    let log_id = crate::entry::hex(&label.log_id);
    let barcode = label.barcode.as_deref().unwrap_or("(none)");
    format!(
        "\
This is a volume of an hsm log: a complete history of every change that was
made on a filesystem, from which that filesystem can be built again.

    volume   {serial}
    pool     {pool}
    barcode  {barcode}
    log      {log_id}
    labelled {created}

Nothing here may be changed or removed. Each object is written once and checked
by reading it back; beside it lies a file with its BLAKE3 hash.

To check the objects of a directory, with b3sum alone:

    cd segments/000000 && b3sum -c *.b3

To rebuild the filesystem, with the hsm software:

    replay --from THIS_DIRECTORY --to AN_EMPTY_DIRECTORY

To read it without that software, with zstd alone:

    zstd -dc segments/000000/0000000001.hsm.zst > records.cbor

gives the records of a segment as a CBOR sequence (RFC 8742). What they mean,
and the layout of this volume, is described in plain text under manual/.
",
        serial = label.serial,
        pool = label.pool,
        created = label.created,
    )
}
