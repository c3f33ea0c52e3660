//! Reading the inventory: one pass over the directories, one small file for each object.
//!
//! Nothing is left out in silence: what is no entry comes as a fault, as an object without an entry,
//! or as a stranger.

use std::collections::BTreeSet;

use super::{LABEL_ENTRY_FILE, LABEL_FILE, LOST_AND_FOUND, README_FILE, read_entry};
use crate::durable::{Dir, Kind, TEMPORARY_PREFIX};
use crate::name::{DEPTH_MAX, ENTRY_SUFFIX, MANUAL_DIRECTORY};
use crate::{Entry, Error, Inventory, ObjectName};

/// The inventory of the volume whose directory is `root`.
pub(super) fn read(root: &Dir) -> Result<Inventory, Error> {
    let mut inventory = Inventory::default();
    walk(root, "", &mut inventory)?;
    inventory
        .entries
        .sort_unstable_by(|a, b| a.name.cmp(&b.name));
    inventory.unlisted.sort_unstable();
    Ok(inventory)
}

/// Adds what is in `dir`, whose objects' names begin with `prefix`.
fn walk(dir: &Dir, prefix: &str, inventory: &mut Inventory) -> Result<(), Error> {
    let depth = prefix.matches('/').count();
    let mut objects = Vec::new();
    let mut entries = BTreeSet::new();
    for (name, kind) in dir.entries()? {
        if is_ours(&name, depth) {
            continue;
        }
        let full = format!("{prefix}{name}");
        match (kind, name.strip_suffix(ENTRY_SUFFIX)) {
            (Kind::File, Some(object)) => {
                entries.insert(object.to_owned());
            }
            (Kind::File, None) => objects.push(name),
            // A directory name is fit where an object's name is.
            (Kind::Directory, _) if depth + 1 < DEPTH_MAX && ObjectName::new(&full).is_ok() => {
                match dir.sub(&name)? {
                    Some(sub) => walk(&sub, &format!("{full}/"), inventory)?,
                    None => inventory.strangers.push(dir.join(&name)),
                }
            }
            (Kind::Directory | Kind::Other, _) => inventory.strangers.push(dir.join(&name)),
        }
    }
    for file_name in objects {
        let has_entry = entries.remove(&file_name);
        add(dir, prefix, &file_name, has_entry, inventory);
    }
    for object in entries {
        inventory.faults.push(object_missing(dir, &object));
    }
    Ok(())
}

fn add(dir: &Dir, prefix: &str, file_name: &str, has_entry: bool, inventory: &mut Inventory) {
    let Ok(name) = ObjectName::new(&format!("{prefix}{file_name}")) else {
        inventory.strangers.push(dir.join(file_name));
        return;
    };
    if !has_entry {
        inventory.unlisted.push(name);
        return;
    }
    match entry_of(dir, file_name) {
        Ok(Some((bytes, hash))) => inventory.entries.push(Entry { name, bytes, hash }),
        Ok(None) => inventory.faults.push(object_missing(dir, file_name)),
        Err(fault) => inventory.faults.push(fault),
    }
}

/// Length by the filesystem and hash by the entry, or `None` when one of them has just gone.
fn entry_of(dir: &Dir, file_name: &str) -> Result<Option<(u64, [u8; 32])>, Error> {
    let (Some(hash), Some(bytes)) = (read_entry(dir, file_name)?, dir.bytes(file_name)?) else {
        return Ok(None);
    };
    Ok(Some((bytes, hash)))
}

/// The error for an entry whose object is not there.
pub(super) fn object_missing(dir: &Dir, file_name: &str) -> Error {
    Error::Corrupt {
        path: dir.join(file_name),
        expected: "the object of an inventory entry".into(),
        found: "nothing".into(),
        advice: "use the copy on another volume; appending the same object puts it back",
    }
}

/// Whether a name belongs to the layout and is no object.
fn is_ours(name: &str, depth: usize) -> bool {
    let top = matches!(
        name,
        LABEL_FILE | LABEL_ENTRY_FILE | README_FILE | MANUAL_DIRECTORY | LOST_AND_FOUND
    );
    name.starts_with(TEMPORARY_PREFIX) || (depth == 0 && top)
}
