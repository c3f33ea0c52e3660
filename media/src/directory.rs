//! Volumes that are directories: a removable disk, an NFS or LTFS mount.
//!
//! man/hsm-volume.5 is the normative description of the layout. A volume may vanish between any two
//! operations and another filesystem be mounted in its place, or none. So no descriptor is kept, and
//! the medium can be unmounted at any time; each operation opens the directory anew, reads the label
//! through that descriptor, refuses when it is not this volume's ([`Error::Absent`]), and does all
//! the rest relative to the descriptor. Reading changes nothing on the medium, which may be mounted
//! read-only.

mod append;
mod inventory;
mod labelling;

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::durable::{Dir, Kind};
use crate::label::LABEL_BYTES_MAX;
use crate::name::ENTRY_SUFFIX;
use crate::{Entry, Error, Inventory, Label, Object, ObjectName, Volume, Written};
use crate::{entry, kernel};

pub use labelling::label;

pub(crate) const LABEL_FILE: &str = "VOLUME.json";
const README_FILE: &str = "README.txt";
/// BLAKE3 of the label, in the form of an inventory entry.
const LABEL_ENTRY_FILE: &str = "VOLUME.json.b3";
const LOST_AND_FOUND: &str = "lost+found";
/// Kept free for inventory entries, directories and whatever the filesystem needs.
pub const RESERVE_BYTES: u64 = 1024 * 1024;
/// How many names a message about foreign content gives.
const NAMED_MAX: usize = 5;

/// What is at a place where a volume may be.
#[derive(Debug)]
pub enum Found {
    Labelled(DirectoryVolume),
    /// The directory is there and holds nothing, or only what an interrupted labelling left. It may
    /// be the mount point of a medium that is not mounted: that is for the caller to tell.
    Empty,
    /// There is no such directory.
    Absent,
}

/// Says what is at `path`, without changing anything. Content without a label is
/// [`Error::Foreign`], a damaged label an error of its own.
pub fn probe(path: &Path) -> Result<Found, Error> {
    let dir = match Dir::open(path) {
        Ok(dir) => dir,
        Err(e) if is_gone(&e) => return Ok(Found::Absent),
        Err(e) => return Err(Error::io(path, "opening the directory", e)),
    };
    if let Some(label) = read_label(&dir)? {
        return Ok(Found::Labelled(DirectoryVolume::new(path, label)));
    }
    labelling::require_unused(&dir)?;
    Ok(Found::Empty)
}

/// Clears the immutable flag of everything on a labelled volume, so that it can be recycled or thrown
/// away by ordinary means. Says how many files had it. Proving that nothing needs the volume any more
/// is the caller's.
pub fn unprotect(path: &Path) -> Result<usize, Error> {
    match probe(path)? {
        Found::Labelled(volume) => unprotect_below(&volume.root()?, crate::name::DEPTH_MAX),
        Found::Empty | Found::Absent => Err(Error::Absent {
            path: path.to_owned(),
            why: "there is no label".into(),
        }),
    }
}

fn unprotect_below(dir: &Dir, depth: usize) -> Result<usize, Error> {
    let mut cleared = 0;
    for (name, kind) in dir.entries()? {
        match kind {
            Kind::File => cleared += unprotect_file(dir, &name)?,
            Kind::Directory if depth > 1 => {
                if let Some(sub) = dir.sub(&name)? {
                    cleared += unprotect_below(&sub, depth - 1)?;
                }
            }
            Kind::Directory | Kind::Other => {}
        }
    }
    Ok(cleared)
}

fn unprotect_file(dir: &Dir, name: &str) -> Result<usize, Error> {
    let Some(file) = dir.file(name)? else {
        return Ok(0);
    };
    let failed = |e| Error::io(&dir.join(name), "clearing the immutable flag of", e);
    if kernel::protection(&file).map_err(failed)? != kernel::Protection::Immutable {
        return Ok(0);
    }
    kernel::set_immutable(&file, false).map_err(failed)?;
    Ok(1)
}

/// A labelled directory. See the module for what it does and does not hold on to.
#[derive(Debug)]
pub struct DirectoryVolume {
    path: PathBuf,
    label: Label,
    settled: Mutex<Settled>,
}

/// What this process has done to the volume once, before its first append.
#[derive(Debug, Default)]
struct Settled {
    /// Stale temporary files are removed.
    swept: bool,
    /// Directories of objects whose names are known to be durable.
    synced: BTreeSet<String>,
}

impl DirectoryVolume {
    fn new(path: &Path, label: Label) -> Self {
        Self {
            path: path.to_owned(),
            label,
            settled: Mutex::default(),
        }
    }

    /// Opens the directory and makes sure that it is this volume.
    fn root(&self) -> Result<Dir, Error> {
        let dir = match Dir::open(&self.path) {
            Ok(dir) => dir,
            Err(e) if is_gone(&e) => return Err(self.absent(&e.to_string())),
            Err(e) => return Err(Error::io(&self.path, "opening the directory", e)),
        };
        match read_label(&dir)? {
            Some(label) if label == self.label => Ok(dir),
            Some(label) if label.serial == self.label.serial => Err(Error::BadLabel {
                path: dir.join(LABEL_FILE),
                why: "it has changed since the volume was opened".into(),
            }),
            Some(label) => Err(self.absent(&format!("volume {} is in its place", label.serial))),
            None => Err(self.absent(&format!("there is no {LABEL_FILE}"))),
        }
    }

    fn absent(&self, why: &str) -> Error {
        Error::Absent {
            path: self.path.clone(),
            why: format!("volume {} is expected, but {why}", self.label.serial),
        }
    }

    fn no_object(&self, name: &ObjectName) -> Error {
        Error::NoObject {
            path: self.path.clone(),
            name: name.to_string(),
        }
    }

    /// The directory of an object, where it exists.
    fn directory_of(root: &Dir, name: &ObjectName) -> Result<Option<Dir>, Error> {
        let mut parents = name.parents().into_iter();
        let Some(first) = parents.next() else {
            return root.again().map(Some);
        };
        let mut dir = root.sub(first)?;
        for part in parents {
            let Some(above) = dir else { return Ok(None) };
            dir = above.sub(part)?;
        }
        Ok(dir)
    }

    /// The directory of an object that somebody asks for.
    fn directory_with(&self, root: &Dir, name: &ObjectName) -> Result<Dir, Error> {
        match Self::directory_of(root, name) {
            Ok(Some(dir)) => Ok(dir),
            Ok(None) => Err(self.no_object(name)),
            // One of the directories is another object's file.
            Err(error) if error.errno() == Some(libc::ENOTDIR) => Err(self.no_object(name)),
            Err(error) => Err(error),
        }
    }

    fn settled(&self) -> MutexGuard<'_, Settled> {
        // What a panicking thread left there is still true.
        self.settled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Volume for DirectoryVolume {
    fn label(&self) -> &Label {
        &self.label
    }

    fn location(&self) -> &Path {
        &self.path
    }

    fn free_bytes(&self) -> Result<u64, Error> {
        match self.root()?.free()? {
            (bytes, true) => Ok(bytes.saturating_sub(RESERVE_BYTES)),
            (_, false) => Ok(0),
        }
    }

    fn append(
        &self,
        name: &ObjectName,
        bytes: u64,
        hash: &[u8; 32],
        source: &mut dyn Read,
    ) -> Result<Written, Error> {
        let new = append::New { name, bytes, hash };
        self.append_object(&new, source)
    }

    fn open(&self, name: &ObjectName) -> Result<Arc<dyn Object>, Error> {
        let root = self.root()?;
        let dir = self.directory_with(&root, name)?;
        let file = dir
            .file(name.file_name())?
            .ok_or_else(|| self.no_object(name))?;
        let path = dir.join(name.file_name());
        let bytes = file
            .metadata()
            .map_err(|e| Error::io(&path, "examining", e))?
            .len();
        Ok(Arc::new(FileObject { file, bytes, path }))
    }

    fn list(&self) -> Result<Vec<Entry>, Error> {
        let inventory = self.inventory()?;
        match inventory.faults.into_iter().next() {
            Some(fault) => Err(fault),
            None => Ok(inventory.entries),
        }
    }

    fn inventory(&self) -> Result<Inventory, Error> {
        inventory::read(&self.root()?)
    }

    fn verify(&self, name: &ObjectName) -> Result<Entry, Error> {
        let root = self.root()?;
        let dir = self.directory_with(&root, name)?;
        let hash = read_entry(&dir, name.file_name())?.ok_or_else(|| self.no_object(name))?;
        let Some((bytes, found)) = dir.read_back(name.file_name())? else {
            return Err(inventory::object_missing(&dir, name.file_name()));
        };
        if found != hash {
            return Err(object_damaged(&dir, name.file_name(), &hash, bytes, &found));
        }
        let name = name.clone();
        Ok(Entry { name, bytes, hash })
    }
}

/// An object that is a file.
struct FileObject {
    file: File,
    bytes: u64,
    path: PathBuf,
}

impl Object for FileObject {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Error> {
        loop {
            match self.file.read_at(buf, offset) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let what = format!("reading {} bytes at {offset} of", buf.len());
                    return Err(Error::io(&self.path, what, e));
                }
                Ok(n) => return Ok(n),
            }
        }
    }
}

/// The label in a directory, or `None` where there is none.
fn read_label(dir: &Dir) -> Result<Option<Label>, Error> {
    let path = dir.join(LABEL_FILE);
    let Some(text) = dir.read_small(LABEL_FILE, LABEL_BYTES_MAX)? else {
        return Ok(None);
    };
    if let Some(hash) = read_entry(dir, LABEL_FILE)? {
        let found = *blake3::hash(&text).as_bytes();
        if found != hash {
            return Err(Error::Corrupt {
                path,
                expected: format!("BLAKE3 {}", entry::hex(&hash)),
                found: entry::hex(&found),
                advice: "restore it; if it reads right, remove VOLUME.json.b3 (chattr -i first)",
            });
        }
    }
    Label::decode(&path, &text).map(Some)
}

/// The hash in the entry beside the file `name`, or `None` where there is no entry.
fn read_entry(dir: &Dir, name: &str) -> Result<Option<[u8; 32]>, Error> {
    let entry_name = format!("{name}{ENTRY_SUFFIX}");
    let Some(line) = dir.read_small(&entry_name, entry::LINE_BYTES_MAX)? else {
        return Ok(None);
    };
    match entry::decode(name, &line) {
        Ok(hash) => Ok(Some(hash)),
        Err(found) => Err(Error::Corrupt {
            path: dir.join(&entry_name),
            expected: "the line that b3sum prints".into(),
            found: found.into(),
            advice: "compare the object with another copy, then write its entry again with b3sum",
        }),
    }
}

fn object_damaged(dir: &Dir, name: &str, hash: &[u8; 32], bytes: u64, found: &[u8; 32]) -> Error {
    Error::Corrupt {
        path: dir.join(name),
        expected: format!("BLAKE3 {}", entry::hex(hash)),
        found: format!("{} in {bytes} bytes", entry::hex(found)),
        advice: "use the copy on another volume; the volume is damaged, replace it",
    }
}

/// Says that nothing is mounted or inserted there, or that it was pulled out.
fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ENOENT
                | libc::ENOTDIR
                | libc::ENODEV
                | libc::ENXIO
                | libc::ESTALE
                | libc::ENOTCONN
                | libc::ENOMEDIUM
        )
    )
}
