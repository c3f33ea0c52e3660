//! Whether the catalog says what is on the disk.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use tierfs::catalog::Catalog;
use tierfs::layout;
use tierfs::{FileId, Hash};

use super::rig::Rig;
use crate::capture::facts::{kind_of, time_of};
use crate::sys::dir::DirReader;
use crate::sys::handle::handle_at;
use crate::sys::io;
use crate::sys::stat::{FileKind, stat_of};
use crate::sys::xattr;

/// Panics with the first thing that the catalog has not as it is.
pub(super) fn assert_same(rig: &Rig) {
    let queries = rig.catalog.queries();
    let root = io::open_at(rig.mount.root(), OsStr::new("."), io::READ_DIR)
        .unwrap()
        .unwrap();
    let mut links: HashMap<FileId, u32> = HashMap::new();
    let mut todo = vec![(String::new(), root, FileId::ROOT)];
    let mut files = 1;
    while let Some((path, dir, id)) = todo.pop() {
        let mut found = Vec::new();
        DirReader::new()
            .for_each(dir.as_fd(), |entry| {
                found.push(entry.name.as_bytes().to_vec());
                Ok::<(), crate::sys::Error>(())
            })
            .unwrap();
        let children = queries.children(id, None, 100_000).unwrap();
        let logged: BTreeMap<_, _> = children.into_iter().map(|c| (c.name, c.file)).collect();
        found.sort();
        let names = |list: &mut dyn Iterator<Item = &Vec<u8>>| -> Vec<String> {
            list.map(|name| name.escape_ascii().to_string()).collect()
        };
        assert_eq!(
            names(&mut logged.keys()),
            names(&mut found.iter()),
            "names in /{path} (logged, found)"
        );
        for name in found {
            let file = logged[&name];
            let path = format!("{path}/{}", name.escape_ascii());
            let name = OsStr::from_bytes(&name);
            let held = io::open_at(dir.as_fd(), name, io::HOLD).unwrap().unwrap();
            let stat = stat_of(held.as_fd()).unwrap();
            let seen = links.entry(file).or_default();
            *seen += 1;
            if *seen == 1 {
                files += 1;
            } else if *seen == stat.nlink {
                // Looked at for its first name.
                continue;
            }
            let row = queries
                .inode(file)
                .unwrap()
                .unwrap_or_else(|| panic!("{path} is {file}, which is not there"));
            assert_eq!(row.kind, kind_of(stat.kind), "{path}");
            let handle = handle_at(dir.as_fd(), name).unwrap().unwrap();
            // Each time that it comes into memory, a placeholder has another time.
            if !handle.as_ref().is_btrfs_placeholder() {
                assert_eq!(row.handle, Some(handle.to_bytes()), "{path}: {row:?}");
                assert_eq!(row.mtime, time_of(stat.mtime), "{path}: mtime {row:?}");
            }
            assert_eq!(row.mode, stat.mode, "{path}");
            assert_eq!((row.uid, row.gid), (stat.uid, stat.gid), "{path}");
            let flags = match stat.kind {
                FileKind::Regular | FileKind::Directory
                    if !handle.as_ref().is_btrfs_placeholder() =>
                {
                    let fd = io::open_at(dir.as_fd(), name, io::READ).unwrap().unwrap();
                    crate::sys::flags::read(fd.as_fd())
                        .unwrap()
                        .map_or(0, crate::sys::flags::Flags::bits)
                }
                _ => 0,
            };
            assert_eq!(row.flags.0, flags, "{path}: flags");
            assert_eq!(
                queries.xattrs(file).unwrap(),
                xattr::read_all(held.as_fd()).unwrap(),
                "{path}"
            );
            if stat.kind != FileKind::Directory {
                let names = queries.names_of(file).unwrap().len();
                assert_eq!(names, usize::try_from(stat.nlink).unwrap(), "{path}: links");
            }
            match stat.kind {
                FileKind::Regular => {
                    assert_eq!(row.size, stat.size, "{path}: size (logged, found)");
                    let fd = io::open_at(dir.as_fd(), name, io::READ).unwrap().unwrap();
                    content(&rig.catalog, file, &File::from(fd), stat.size, &path);
                }
                FileKind::Directory => {
                    if let Some(fd) = io::open_at(dir.as_fd(), name, io::READ_DIR).unwrap() {
                        todo.push((path, fd, file));
                    }
                }
                FileKind::Symlink => {
                    let target = io::read_link(held.as_fd()).unwrap().unwrap();
                    assert_eq!(row.target.as_deref(), Some(target.as_bytes()), "{path}");
                }
                _ => {}
            }
        }
    }
    assert_eq!(queries.orphans().unwrap(), [], "files without a name");
    assert_eq!(rig.catalog.counts().files, files, "files (logged, found)");
}

fn content(catalog: &Catalog, file: FileId, found: &File, size: u64, path: &str) {
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    found.read_exact_at(&mut bytes, 0).unwrap();
    let mut at = 0;
    let hole = |from: u64, to: u64| {
        let range = usize::try_from(from).unwrap()..usize::try_from(to).unwrap();
        assert!(
            bytes[range].iter().all(|byte| *byte == 0),
            "{path}: data between {from} and {to} is logged as a hole"
        );
    };
    for row in catalog.queries().extents(file, 0, 1_000_000).unwrap() {
        hole(at, row.range.offset);
        at = row.range.end();
        for (piece, hash) in layout::pieces(row.range).zip(&row.hashes) {
            let range =
                usize::try_from(piece.offset).unwrap()..usize::try_from(piece.end()).unwrap();
            assert_eq!(
                Hash::of(&bytes[range]),
                *hash,
                "{path}: other bytes at {}",
                piece.offset
            );
        }
    }
    hole(at, size);
}
