//! Operations on what files hold.

use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use nix::fcntl::{FallocateFlags, fallocate};

use super::worker::{FILE_BYTES, Worker, open, options};
use super::{Operation, operation};
use crate::sys::{SharedMap, clone_file};

pub(super) const OPERATIONS: &[Operation] = &[
    operation("write_at", 120, write_at),
    operation("append", 40, append),
    operation("rewrite", 25, rewrite),
    operation("truncate", 30, truncate),
    operation("extend", 20, extend),
    operation("truncate_and_extend", 10, truncate_and_extend),
    operation("punch", 20, |w| {
        allocate(
            w,
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
        )
    }),
    operation("zero_range", 8, |w| {
        allocate(w, FallocateFlags::FALLOC_FL_ZERO_RANGE)
    }),
    operation("preallocate", 8, |w| allocate(w, FallocateFlags::empty())),
    operation("collapse_range", 4, |w| {
        allocate(w, FallocateFlags::FALLOC_FL_COLLAPSE_RANGE)
    }),
    operation("insert_range", 4, |w| {
        allocate(w, FallocateFlags::FALLOC_FL_INSERT_RANGE)
    }),
    operation("copy", 10, copy),
    operation("clone", 8, clone),
    operation("fsync", 10, |w| open(&w.regular()?)?.sync_all()),
    operation("hold_open", 15, hold_open),
    operation("write_held", 30, write_held),
    operation("close_held", 12, |w| {
        w.open.pop_front().map(drop).ok_or_else(none)
    }),
    operation("map", 10, map),
    operation("map_store", 40, map_store),
    operation("map_sync", 10, |w| {
        w.maps.front().ok_or_else(none)?.0.sync()
    }),
    operation("unmap", 8, |w| {
        w.maps.pop_front().map(drop).ok_or_else(none)
    }),
];

/// There is nothing to work on.
fn none() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOENT)
}

/// Files that have grown large are not made larger.
fn grown(len: u64) -> io::Result<()> {
    if len < 4 * FILE_BYTES {
        Ok(())
    } else {
        Err(none())
    }
}

fn write_at(w: &mut Worker) -> io::Result<()> {
    let file = open(&w.regular()?)?;
    let (offset, len) = (w.below(FILE_BYTES), w.length(100_000));
    file.write_all_at(&w.bytes(len), offset)
}

fn append(w: &mut Worker) -> io::Result<()> {
    let path = w.regular()?;
    let len = w.length(20_000);
    let bytes = w.bytes(len);
    options().append(true).open(path)?.write_all(&bytes)
}

fn rewrite(w: &mut Worker) -> io::Result<()> {
    let path = w.regular()?;
    let len = w.length(100_000);
    let bytes = w.bytes(len);
    options().truncate(true).open(path)?.write_all(&bytes)
}

fn truncate(w: &mut Worker) -> io::Result<()> {
    let file = open(&w.regular()?)?;
    let len = file.metadata()?.len();
    file.set_len(w.below(len + 1))
}

fn extend(w: &mut Worker) -> io::Result<()> {
    let file = open(&w.regular()?)?;
    let len = file.metadata()?.len();
    grown(len)?;
    file.set_len(len + w.length(FILE_BYTES))
}

fn truncate_and_extend(w: &mut Worker) -> io::Result<()> {
    let file = open(&w.regular()?)?;
    let len = file.metadata()?.len();
    file.set_len(w.below(len + 1))?;
    file.set_len(len)
}

/// Most on whole blocks, as some modes need it.
fn allocate(w: &mut Worker, flags: FallocateFlags) -> io::Result<()> {
    let file = open(&w.regular()?)?;
    grown(file.metadata()?.len())?;
    let (mut offset, mut len) = (w.below(FILE_BYTES), w.length(200_000));
    if w.below(4) != 0 {
        offset = offset / 4096 * 4096;
        len = len.next_multiple_of(4096);
    }
    let signed = |number| i64::try_from(number).expect("a small number");
    Ok(fallocate(&file, flags, signed(offset), signed(len))?)
}

fn copy(w: &mut Worker) -> io::Result<()> {
    let (from, to) = (open(&w.regular()?)?, w.file_place());
    let len = from.metadata()?.len();
    grown(len)?;
    let mut to = options().create(true).truncate(false).open(to)?;
    let place = to.metadata()?.len().min(w.below(FILE_BYTES));
    to.seek(SeekFrom::Start(place))?;
    // Without a limit, a copy of a file into itself has no end.
    io::copy(&mut from.take(len), &mut to).map(drop)
}

fn clone(w: &mut Worker) -> io::Result<()> {
    let (from, to) = (open(&w.regular()?)?, w.file_place());
    clone_file(&from, &options().create(true).truncate(true).open(to)?)
}

fn hold_open(w: &mut Worker) -> io::Result<()> {
    let file = open(&w.regular()?)?;
    w.open.push_back(file);
    if w.open.len() > 5 {
        w.open.pop_front();
    }
    Ok(())
}

fn write_held(w: &mut Worker) -> io::Result<()> {
    let (offset, len) = (w.below(FILE_BYTES), w.length(30_000));
    let bytes = w.bytes(len);
    w.open.back().ok_or_else(none)?.write_all_at(&bytes, offset)
}

/// Maps a file of this thread's own.
fn map(w: &mut Worker) -> io::Result<()> {
    let number = w.below(4);
    let name = format!("map{}-{number}", w.number);
    let path = w.directory().join(name);
    let file = options().create(true).truncate(false).open(path)?;
    let len = w.length(300_000);
    if file.metadata()?.len() < len {
        file.set_len(len)?;
    }
    let len = usize::try_from(len).expect("a small number");
    w.maps.push_back((SharedMap::new(&file, len)?, len));
    if w.maps.len() > 4 {
        w.maps.pop_front();
    }
    Ok(())
}

fn map_store(w: &mut Worker) -> io::Result<()> {
    if !w.has_room() {
        w.maps.clear();
    }
    let (_, len) = w.maps.back().ok_or_else(none)?;
    let len = u64::try_from(*len).expect("a small number");
    let places: Vec<u64> = (0..w.length(20)).map(|_| w.below(len)).collect();
    let value = w.below(256).to_le_bytes()[0];
    let (map, _) = w.maps.back_mut().ok_or_else(none)?;
    for place in places {
        map.store(usize::try_from(place).expect("a small number"), value);
    }
    Ok(())
}
