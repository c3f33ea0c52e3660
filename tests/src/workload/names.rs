//! Operations on names.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};

use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::linkat;

use super::worker::{Worker, options};
use super::{Operation, operation};

pub(super) const OPERATIONS: &[Operation] = &[
    operation("create", 120, create),
    operation("mkdir", 40, mkdir),
    operation("rename", 50, rename),
    operation("rename_over", 40, rename_over),
    operation("rename_directory", 25, rename_directory),
    operation("exchange", 20, exchange),
    operation("exchange_any", 8, exchange_any),
    operation("swap_by_renames", 15, swap_by_renames),
    operation("link", 25, link),
    operation("unlink", 45, unlink),
    operation("rmdir", 10, rmdir),
    operation("remove_tree", 3, remove_tree),
    operation("symlink", 15, make_symlink),
    operation("mknod", 10, make_node),
    operation("tmpfile_link", 15, tmpfile_link),
    operation("atomic_save", 25, atomic_save),
];

fn create(w: &mut Worker) -> io::Result<()> {
    let path = w.file_place();
    let len = w.length(100_000);
    let bytes = w.bytes(len);
    options().create_new(true).open(path)?.write_all(&bytes)
}

fn mkdir(w: &mut Worker) -> io::Result<()> {
    let path = w.directory_place();
    let mode = [0o755, 0o700, 0o2775, 0o1777][usize::from(w.below(4).to_le_bytes()[0])];
    fs::DirBuilder::new().mode(mode).create(path)
}

fn rename(w: &mut Worker) -> io::Result<()> {
    let (from, to) = (w.leaf()?, w.file_place());
    Ok(renameat2(
        AT_FDCWD,
        &from,
        AT_FDCWD,
        &to,
        RenameFlags::RENAME_NOREPLACE,
    )?)
}

fn rename_over(w: &mut Worker) -> io::Result<()> {
    let (from, to) = (w.leaf()?, w.leaf()?);
    fs::rename(from, to)
}

fn rename_directory(w: &mut Worker) -> io::Result<()> {
    let (from, to) = (w.some_directory()?, w.directory_place());
    fs::rename(from, to)
}

fn exchange(w: &mut Worker) -> io::Result<()> {
    let (one, other) = (w.leaf()?, w.leaf()?);
    Ok(renameat2(
        AT_FDCWD,
        &one,
        AT_FDCWD,
        &other,
        RenameFlags::RENAME_EXCHANGE,
    )?)
}

/// Directories with directories, and with files: a directory may come to bear a file's name.
fn exchange_any(w: &mut Worker) -> io::Result<()> {
    let (one, other) = (w.something()?, w.something()?);
    Ok(renameat2(
        AT_FDCWD,
        &one,
        AT_FDCWD,
        &other,
        RenameFlags::RENAME_EXCHANGE,
    )?)
}

fn swap_by_renames(w: &mut Worker) -> io::Result<()> {
    let (one, other) = (w.something()?, w.something()?);
    let between = w.root.join(format!("swap{}", w.number));
    fs::rename(&one, &between)?;
    // Whatever fails on the way, the middle place is free again afterwards, if at all possible.
    let moved = fs::rename(&other, &one);
    let place = if moved.is_ok() { &other } else { &one };
    if fs::rename(&between, place).is_err() {
        let _ = fs::remove_dir_all(&between).or_else(|_| fs::remove_file(&between));
    }
    moved
}

fn link(w: &mut Worker) -> io::Result<()> {
    let (from, to) = (w.leaf()?, w.file_place());
    fs::hard_link(from, to)
}

fn unlink(w: &mut Worker) -> io::Result<()> {
    fs::remove_file(w.leaf()?)
}

fn rmdir(w: &mut Worker) -> io::Result<()> {
    fs::remove_dir(w.some_directory()?)
}

fn remove_tree(w: &mut Worker) -> io::Result<()> {
    fs::remove_dir_all(w.some_directory()?)
}

fn make_symlink(w: &mut Worker) -> io::Result<()> {
    let target = match w.below(3) {
        0 => w.file_name(),
        1 => format!("../{}", w.directory_name()),
        _ => "/nowhere/at all".to_owned(),
    };
    symlink(target, w.file_place())
}

fn make_node(w: &mut Worker) -> io::Result<()> {
    let (kind, device) = match w.below(4) {
        0 => (SFlag::S_IFIFO, 0),
        1 => (SFlag::S_IFSOCK, 0),
        2 => (SFlag::S_IFCHR, makedev(1, 3)),
        _ => (SFlag::S_IFCHR, makedev(0, 0)),
    };
    let mode = Mode::from_bits_truncate(0o644);
    Ok(mknod(&w.file_place(), kind, mode, device)?)
}

fn tmpfile_link(w: &mut Worker) -> io::Result<()> {
    let (directory, to) = (w.directory(), w.file_place());
    let mut file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(directory)?;
    let len = w.length(100_000);
    file.write_all(&w.bytes(len))?;
    let at = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(
        AT_FDCWD,
        at.as_str(),
        AT_FDCWD,
        &to,
        AtFlags::AT_SYMLINK_FOLLOW,
    )?;
    if w.below(2) == 0 {
        let more = w.bytes(10);
        file.write_all(&more)?;
    }
    Ok(())
}

fn atomic_save(w: &mut Worker) -> io::Result<()> {
    let to = w.leaf()?;
    let directory = to.parent().expect("below the root").to_owned();
    let temporary = directory.join(format!(".save{}", w.number));
    let len = w.length(200_000);
    let bytes = w.bytes(len);
    let written = options()
        .create(true)
        .truncate(true)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(&bytes)?;
            if bytes.len().is_multiple_of(2) {
                file.sync_all()?;
            }
            Ok(())
        });
    let saved = written.and_then(|()| fs::rename(&temporary, to));
    if saved.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    saved
}
