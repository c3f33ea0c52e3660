//! Logs an existing tree: what the daemon's adoption does, in a few lines, for tests.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use replay::sys::{self, Inode};
use tierfs::ids::{FileId, Time};
use tierfs::record::{self, Bits, Device, Kind, Link, Op, Xattrs};

use super::log::LogWriter;

/// Logs everything below `root`; each entry is a transaction of its own.
pub fn adopt(log: &mut LogWriter, root: &Path) {
    let mut seen = HashMap::new();
    let id = log.file();
    let mut ops = vec![LogWriter::filesystem()];
    ops.extend(describe(log, id, root));
    log.commit(ops);
    directory(log, id, root, &mut seen);
}

fn directory(log: &mut LogWriter, parent: FileId, path: &Path, seen: &mut HashMap<u64, FileId>) {
    let mut names: Vec<_> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort_unstable();
    for name in names {
        let path = path.join(&name);
        let meta = path.symlink_metadata().unwrap();
        let (mut ops, known) = (Vec::new(), seen.get(&meta.ino()).copied());
        let id = known.unwrap_or_else(|| log.file());
        if known.is_none() {
            seen.insert(meta.ino(), id);
            ops = describe(log, id, &path);
        }
        ops.push(Op::Link(Link {
            parent,
            name: name.as_bytes().to_vec(),
            file: id,
        }));
        log.commit(ops);
        if meta.is_dir() {
            directory(log, id, &path, seen);
        }
    }
}

fn describe(log: &mut LogWriter, file: FileId, path: &Path) -> Vec<Op> {
    let meta = path.symlink_metadata().unwrap();
    let dir = sys::open_root(path.parent().unwrap()).unwrap();
    let name = path.file_name().unwrap().as_bytes();
    let node = sys::open_path(&dir, name).unwrap();
    let kind = sys::kind_of(&sys::stat(&node).unwrap()).unwrap();
    let flags = match kind {
        Kind::Regular | Kind::Directory => {
            let open = std::fs::File::open(path).unwrap();
            sys::flags(&open).unwrap().unwrap_or(0) & sys::FLAGS_LOGGED
        }
        _ => 0,
    };
    let mut ops = vec![Op::Inode(record::Inode {
        file,
        kind,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: Time {
            seconds: meta.mtime(),
            nanos: u32::try_from(meta.mtime_nsec()).unwrap(),
        },
        rdev: matches!(kind, Kind::CharDevice | Kind::BlockDevice).then(|| Device {
            major: libc::major(meta.rdev()),
            minor: libc::minor(meta.rdev()),
        }),
        target: (kind == Kind::Symlink).then(|| {
            std::fs::read_link(path)
                .unwrap()
                .as_os_str()
                .as_bytes()
                .to_vec()
        }),
        flags: Bits(flags),
        unrestorable: Bits(0),
        ctime: None,
        btime: None,
    })];
    let list = Inode::Named(node.as_fd()).xattrs().unwrap();
    if !list.is_empty() {
        ops.push(Op::Xattrs(Xattrs {
            file,
            list,
            more: false,
        }));
    }
    if kind == Kind::Regular && meta.len() > 0 {
        ops.extend(content(log, file, path, meta.len()));
    }
    ops
}

/// Holes as `SEEK_DATA` gives them.
fn content(log: &mut LogWriter, file: FileId, path: &Path, size: u64) -> Vec<Op> {
    let open = std::fs::File::open(path).unwrap();
    let mut parts: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut at = 0;
    while let Some(start) = sys::seek_data(&open, at).unwrap() {
        let end = sys::seek_hole(&open, start).unwrap().unwrap_or(size);
        at = end;
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        assert_eq!(sys::read_at(&open, &mut bytes, start).unwrap(), bytes.len());
        parts.push((start, bytes));
    }
    let parts: Vec<(u64, &[u8])> = parts
        .iter()
        .map(|(at, bytes)| (*at, bytes.as_slice()))
        .collect();
    log.content(file, size, &parts)
}
