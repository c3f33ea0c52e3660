//! Reading a tree. The walk goes from directory to directory by open descriptors, so that paths
//! longer than `PATH_MAX` can be compared too.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::{BLOCK, Entry, HOLE_UNIT, Options, Tree};
use crate::sys;

struct Walk {
    options: Options,
    entries: BTreeMap<Vec<u8>, Entry>,
    /// First path of each inode with several links.
    groups: HashMap<(u64, u64), Vec<u8>>,
}

/// The walk descends by recursion, into trees of any depth.
const STACK: usize = 1 << 30;

pub(super) fn tree(root: &Path, options: Options) -> io::Result<Tree> {
    std::thread::scope(|scope| {
        let walker = std::thread::Builder::new()
            .stack_size(STACK)
            .spawn_scoped(scope, || walk(root, options))?;
        walker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn walk(root: &Path, options: Options) -> io::Result<Tree> {
    sys::raise_descriptor_limit();
    let dir = open(root)?;
    nix::unistd::syncfs(&dir)?;
    let mut walk = Walk {
        options,
        entries: BTreeMap::new(),
        groups: HashMap::new(),
    };
    if options.root {
        // "/." has it taken for a directory even where the last component is a symlink.
        let entry = walk.entry(&root.join("."), b"")?;
        walk.entries.insert(Vec::new(), entry);
    }
    walk.directory(&dir, b"")?;
    // Names were not met in their order, so the first path of each group is only known now.
    let mut walked = walk.entries;
    regroup(&mut walked);
    Ok(Tree { entries: walked })
}

/// Names each group by its first path in the order of names.
fn regroup(entries: &mut BTreeMap<Vec<u8>, Entry>) {
    let mut first: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
    for (path, entry) in entries.iter_mut() {
        let name = first
            .entry(entry.group.clone())
            .or_insert_with(|| path.clone());
        entry.group.clone_from(name);
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOATIME | libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

fn join(dir: &[u8], name: &OsStr) -> Vec<u8> {
    if dir.is_empty() {
        return name.as_bytes().to_vec();
    }
    [dir, b"/", name.as_bytes()].concat()
}

fn named(path: &[u8], e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{}: {e}", path.escape_ascii()))
}

impl Walk {
    fn directory(&mut self, dir: &File, path: &[u8]) -> io::Result<()> {
        let fd = dir.as_raw_fd();
        let mut names: Vec<OsString> = fs::read_dir(sys::through(fd, OsStr::new("")))
            .and_then(|entries| entries.map(|entry| entry.map(|e| e.file_name())).collect())
            .map_err(|e| named(path, &e))?;
        names.sort();
        for name in names {
            if path.is_empty() && name == "lost+found" && !self.options.lost_found {
                continue;
            }
            let at = sys::through(fd, &name);
            let below = join(path, &name);
            let entry = self.entry(&at, &below).map_err(|e| named(&below, &e))?;
            let is_dir = entry.kind == libc::S_IFDIR;
            self.entries.insert(below.clone(), entry);
            if is_dir {
                let dir = open(&at).map_err(|e| named(&below, &e))?;
                self.directory(&dir, &below)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, at: &Path, path: &[u8]) -> io::Result<Entry> {
        let meta = fs::symlink_metadata(at)?;
        let kind = meta.mode() & libc::S_IFMT;
        let group = if kind != libc::S_IFDIR && meta.nlink() > 1 {
            self.groups
                .entry((meta.dev(), meta.ino()))
                .or_insert_with(|| path.to_vec())
                .clone()
        } else {
            path.to_vec()
        };
        let mut entry = Entry {
            kind,
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            xattrs: sys::xattrs(at)?
                .into_iter()
                .filter(|(name, _)| name != b"trusted.hsm" && !name.starts_with(b"trusted.SGI_ACL"))
                .collect(),
            flags: 0,
            target: Vec::new(),
            rdev: 0,
            size: 0,
            blocks: Vec::new(),
            data: Vec::new(),
            group,
            unreadable: None,
        };
        match kind {
            libc::S_IFREG => self.content(at, meta.size(), &mut entry)?,
            libc::S_IFDIR => entry.flags = sys::flags(&open(at)?)? & self.options.flags,
            libc::S_IFLNK => entry.target = fs::read_link(at)?.into_os_string().into_vec(),
            libc::S_IFCHR | libc::S_IFBLK => entry.rdev = meta.rdev(),
            _ => {}
        }
        Ok(entry)
    }

    fn content(&self, at: &Path, size: u64, entry: &mut Entry) -> io::Result<()> {
        entry.size = size;
        let file = open(at)?;
        entry.flags = sys::flags(&file)? & self.options.flags;
        forget(&file)?;
        let ranges = match sys::data_ranges(&file, size) {
            Ok(ranges) => ranges,
            Err(e) => {
                entry.unreadable = Some(e.to_string());
                return Ok(());
            }
        };
        match hashes(&file, size, &ranges) {
            Ok(blocks) => entry.blocks = blocks,
            Err(e) => entry.unreadable = Some(e.to_string()),
        }
        forget(&file)?;
        if self.options.holes {
            entry.data = widened(&ranges, size);
        }
        Ok(())
    }
}

/// Drops the file's clean pages. `SEEK_DATA` takes preallocated space that was merely read (or read
/// ahead) into the cache for data; only without the cache it tells what is on disk.
fn forget(file: &File) -> io::Result<()> {
    Ok(posix_fadvise(
        file,
        0,
        0,
        PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    )?)
}

/// Hashes of the blocks that are not all zeros. Holes are not read: they are zeros.
fn hashes(file: &File, size: u64, ranges: &[(u64, u64)]) -> io::Result<Vec<(u64, [u8; 32])>> {
    let mut blocks = Vec::new();
    let mut buffer = vec![0u8; usize::try_from(BLOCK).map_err(io::Error::other)?];
    let mut next = 0;
    for &(start, end) in ranges {
        for number in (start / BLOCK).max(next)..end.div_ceil(BLOCK) {
            let len =
                usize::try_from(BLOCK.min(size - number * BLOCK)).map_err(io::Error::other)?;
            let block = &mut buffer[..len];
            file.read_exact_at(block, number * BLOCK)?;
            if block.iter().any(|byte| *byte != 0) {
                blocks.push((number, *blake3::hash(block).as_bytes()));
            }
            next = number + 1;
        }
    }
    Ok(blocks)
}

/// The ranges widened to whole units, those that then touch made one.
fn widened(ranges: &[(u64, u64)], size: u64) -> Vec<(u64, u64)> {
    let mut wide: Vec<(u64, u64)> = Vec::new();
    for &(start, end) in ranges {
        let start = start / HOLE_UNIT * HOLE_UNIT;
        let end = end.next_multiple_of(HOLE_UNIT).min(size);
        match wide.last_mut() {
            Some(last) if last.1 >= start => last.1 = last.1.max(end),
            _ => wide.push((start, end)),
        }
    }
    wide
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_widened_and_joined() {
        assert_eq!(widened(&[], 10), vec![]);
        assert_eq!(
            widened(&[(1, 2), (4097, 4098), (20000, 20001)], 20001),
            vec![(0, 8192), (16384, 20001)]
        );
    }
}
