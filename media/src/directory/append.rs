//! Storing an object: written, synced, read back, named, and only then entered into the inventory.
//!
//! The order makes each state after a kill one that the next append of the same object recognises:
//! a temporary file (swept), an object without an entry (checked, then completed), or the whole.

use std::io::{self, Read, Write};

use nix::fcntl::FallocateFlags;

use super::{DirectoryVolume, LABEL_ENTRY_FILE, LABEL_FILE, README_FILE, RESERVE_BYTES};
use super::{object_damaged, read_entry};
use crate::durable::{Dir, Kind, Published, Temporary};
use crate::name::{ENTRY_SUFFIX, MANUAL_DIRECTORY};
use crate::{Error, ObjectName, Written, entry, fault};

const BUFFER: usize = 1024 * 1024;
/// Of the outermost directories of objects. Objects hold the content of private files, and a volume's
/// own directory may be open to everybody.
const OUTER_MODE: u32 = 0o700;
const INNER_MODE: u32 = 0o755;

/// An object as it is announced.
pub(super) struct New<'a> {
    pub(super) name: &'a ObjectName,
    pub(super) bytes: u64,
    pub(super) hash: &'a [u8; 32],
}

impl DirectoryVolume {
    pub(super) fn append_object(
        &self,
        new: &New<'_>,
        source: &mut dyn Read,
    ) -> Result<Written, Error> {
        let root = self.root()?;
        self.settle(&root)?;
        self.append_below(&root, new, source)
            .map_err(|error| match error.errno() {
                Some(libc::ENOSPC | libc::EDQUOT) => self.full(&root, new.bytes),
                _ => error,
            })
    }

    fn append_below(
        &self,
        root: &Dir,
        new: &New<'_>,
        source: &mut dyn Read,
    ) -> Result<Written, Error> {
        let file_name = new.name.file_name();
        if let Some(dir) = Self::directory_of(root, new.name)? {
            if dir.file(file_name)?.is_some() {
                return self.complete(&self.make_directory_of(root, new.name)?, new);
            }
            // The object is gone from the medium, its entry is not: only the same may come back.
            match read_entry(&dir, file_name)? {
                Some(hash) if hash != *new.hash => return Err(exists(&dir, new, &hash)),
                Some(_) | None => {}
            }
        }
        self.require_room(root, new.bytes)?;
        let dir = self.make_directory_of(root, new.name)?;
        match store(&dir, new, source)? {
            Published::NameTaken => self.complete(&dir, new),
            Published::New => {
                put_entry(&dir, file_name, new.hash)?;
                protect(&dir, file_name)?;
                Ok(Written::Stored)
            }
        }
    }

    /// The name is there already: checks that it holds the announced bytes, and completes what an
    /// interrupted append left undone.
    fn complete(&self, dir: &Dir, new: &New<'_>) -> Result<Written, Error> {
        let file_name = new.name.file_name();
        let entry = read_entry(dir, file_name)?;
        // A kill may have come before the file's name was durable.
        dir.sync()?;
        let Some((bytes, found)) = dir.read_back(file_name)? else {
            return Err(self.no_object(new.name));
        };
        match entry {
            Some(hash) if hash == *new.hash && found != hash => {
                Err(object_damaged(dir, file_name, &hash, bytes, &found))
            }
            Some(hash) if hash != *new.hash && found == *new.hash => Err(Error::Corrupt {
                path: dir.join(&format!("{file_name}{ENTRY_SUFFIX}")),
                expected: format!("BLAKE3 {}", entry::hex(new.hash)),
                found: entry::hex(&hash),
                advice: "the object is whole; write its entry again with b3sum",
            }),
            _ if found != *new.hash => Err(exists(dir, new, &found)),
            entry => {
                if entry.is_none() {
                    put_entry(dir, file_name, new.hash)?;
                }
                protect(dir, file_name)?;
                Ok(Written::AlreadyThere)
            }
        }
    }

    /// Once for each value, before the first write: removes what killed writers left.
    fn settle(&self, root: &Dir) -> Result<(), Error> {
        let mut settled = self.settled();
        if settled.swept {
            return Ok(());
        }
        let removed = sweep_below(root, crate::name::DEPTH_MAX)?;
        if removed > 0 {
            tracing::info!(volume = %self.label.serial, removed, "removed temporary files of interrupted writes");
        }
        for name in [LABEL_FILE, LABEL_ENTRY_FILE, README_FILE] {
            root.protect(name)?;
        }
        settled.swept = true;
        Ok(())
    }

    /// The directory of an object, made where it lacks, its name and those above it durable.
    fn make_directory_of(&self, root: &Dir, name: &ObjectName) -> Result<Dir, Error> {
        let mut above: Option<Dir> = None;
        let mut known = String::new();
        for part in name.parents() {
            let parent = above.as_ref().unwrap_or(root);
            known.push('/');
            known.push_str(part);
            let mode = if above.is_none() {
                OUTER_MODE
            } else {
                INNER_MODE
            };
            let is_synced = self.settled().synced.contains(&known);
            let there = if is_synced { parent.sub(part)? } else { None };
            let dir = match there {
                Some(dir) => dir,
                None => parent.make_sub(part, mode)?,
            };
            self.settled().synced.insert(known.clone());
            above = Some(dir);
        }
        match above {
            Some(dir) => Ok(dir),
            None => root.again(),
        }
    }

    fn require_room(&self, root: &Dir, bytes: u64) -> Result<(), Error> {
        let (free, inodes) = root.free()?;
        let needed = bytes.saturating_add(RESERVE_BYTES);
        let (needed, free, of) = match inodes {
            false => (2, 0, "inodes"),
            true if free < needed => (needed, free, "bytes"),
            true => return Ok(()),
        };
        let path = self.path.clone();
        Err(Error::Full {
            path,
            needed,
            free,
            of,
        })
    }

    /// The disk said that it is full, whatever it said of its free space.
    fn full(&self, root: &Dir, bytes: u64) -> Error {
        let (free, inodes) = root.free().unwrap_or((0, true));
        Error::Full {
            path: self.path.clone(),
            needed: if inodes {
                bytes.saturating_add(RESERVE_BYTES)
            } else {
                2
            },
            free: if inodes { free } else { 0 },
            of: if inodes { "bytes" } else { "inodes" },
        }
    }
}

fn exists(dir: &Dir, new: &New<'_>, found: &[u8; 32]) -> Error {
    Error::Exists {
        path: dir.join(new.name.file_name()),
        expected: entry::hex(new.hash),
        found: entry::hex(found),
    }
}

fn sweep_below(dir: &Dir, depth: usize) -> Result<usize, Error> {
    let mut removed = dir.sweep()?;
    if depth > 1 {
        for (name, kind) in dir.entries()? {
            if kind != Kind::Directory || name == MANUAL_DIRECTORY || name == super::LOST_AND_FOUND
            {
                continue;
            }
            if let Some(sub) = dir.sub(&name)? {
                removed += sweep_below(&sub, depth - 1)?;
            }
        }
    }
    Ok(removed)
}

/// Puts the bytes on the medium under the object's name.
fn store(dir: &Dir, new: &New<'_>, source: &mut dyn Read) -> Result<Published, Error> {
    let mut temporary = dir.temporary()?;
    if let Err(error) = fill(&mut temporary, new, source) {
        temporary.discard();
        return Err(error);
    }
    temporary.seal(new.hash)?.publish(new.name.file_name())
}

/// Copies exactly the announced bytes, which must have the announced hash.
fn fill(temporary: &mut Temporary<'_>, new: &New<'_>, source: &mut dyn Read) -> Result<(), Error> {
    let path = temporary.path();
    reserve(temporary, new.bytes).map_err(|e| Error::io(&path, "reserving space for", e))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0u8; BUFFER];
    let mut done = 0u64;
    loop {
        let n = read(source, &mut buffer).map_err(|source| Error::Source {
            name: new.name.to_string(),
            source,
        })?;
        done = done.saturating_add(n as u64);
        if n == 0 || done > new.bytes {
            break;
        }
        hasher.update(&buffer[..n]);
        fault::at("write")
            .and_then(|()| temporary.file().write_all(&buffer[..n]))
            .map_err(|e| Error::io(&path, "writing", e))?;
    }
    let found = *hasher.finalize().as_bytes();
    let (expected, found) = if done == new.bytes {
        (entry::hex(new.hash), entry::hex(&found))
    } else {
        let least = if done > new.bytes { "at least " } else { "" };
        (format!("{} bytes", new.bytes), format!("{least}{done}"))
    };
    if expected == found {
        return Ok(());
    }
    Err(Error::BadSource {
        name: new.name.to_string(),
        expected,
        found,
    })
}

/// Keeps the object in one piece and finds a full disk before anything is written. Filesystems that
/// cannot do it go without.
fn reserve(temporary: &mut Temporary<'_>, bytes: u64) -> io::Result<()> {
    use nix::errno::Errno;
    let Ok(bytes) = libc::off_t::try_from(bytes) else {
        return Err(Errno::EFBIG.into());
    };
    if bytes == 0 {
        return Ok(());
    }
    fault::at("reserve")?;
    match nix::fcntl::fallocate(
        temporary.file(),
        FallocateFlags::FALLOC_FL_KEEP_SIZE,
        0,
        bytes,
    ) {
        Err(errno @ (Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG | Errno::EIO)) => {
            Err(errno.into())
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn read(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match source.read(buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Puts a small file of ours on the medium, the way objects go there.
pub(super) fn put_file(dir: &Dir, name: &str, content: &[u8]) -> Result<Published, Error> {
    let mut temporary = dir.temporary()?;
    let written = fault::at("write").and_then(|()| temporary.file().write_all(content));
    if let Err(e) = written {
        let error = Error::io(&temporary.path(), "writing", e);
        temporary.discard();
        return Err(error);
    }
    temporary
        .seal(blake3::hash(content).as_bytes())?
        .publish(name)
}

/// Enters an object into the inventory.
pub(super) fn put_entry(dir: &Dir, name: &str, hash: &[u8; 32]) -> Result<(), Error> {
    let entry_name = format!("{name}{ENTRY_SUFFIX}");
    match put_file(dir, &entry_name, entry::encode(name, hash).as_bytes())? {
        Published::New => Ok(()),
        // Another writer was faster, or the entry outlived its object. It must say the same.
        Published::NameTaken => match read_entry(dir, name)? {
            Some(found) if found == *hash => dir.sync(),
            found => Err(Error::Exists {
                path: dir.join(&entry_name),
                expected: entry::hex(hash),
                found: found.map_or_else(|| "gone".into(), |hash| entry::hex(&hash)),
            }),
        },
    }
}

pub(super) fn protect(dir: &Dir, name: &str) -> Result<(), Error> {
    fault::at("protect").map_err(|e| Error::io(&dir.join(name), "protecting", e))?;
    dir.protect(name)?;
    dir.protect(&format!("{name}{ENTRY_SUFFIX}"))
}
