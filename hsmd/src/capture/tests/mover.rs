//! Random operations on a tree.

use std::ffi::{CString, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2};
use nix::sys::stat::Mode;
use nix::sys::time::TimeSpec;
use nix::unistd::{linkat, mkfifo};
use tierfs::disk::sim::Rng;

use super::rig::below;

/// Does random things below a directory.
pub(super) struct Mover {
    root: PathBuf,
    pub(super) rng: Rng,
    names: u64,
    /// Kept open for writing, names or not.
    held: Vec<File>,
    /// What was done, newest last.
    pub(super) story: Vec<String>,
}

type Done = io::Result<String>;
type Operation = (u64, fn(&mut Mover) -> Done);

const OPERATIONS: &[Operation] = &[
    (12, Mover::create),
    (3, Mover::create_empty),
    (8, Mover::mkdir),
    (3, Mover::mkdir_deep),
    (8, Mover::write),
    (3, Mover::write_as_before),
    (3, Mover::truncate),
    (3, Mover::attributes),
    (3, Mover::xattr),
    (10, Mover::rename),
    (8, Mover::rename_over),
    (6, Mover::exchange),
    (8, Mover::move_directory),
    (4, Mover::rotate),
    (6, Mover::link),
    (8, Mover::unlink),
    (3, Mover::unlink_and_again),
    (4, Mover::rmdir),
    (2, Mover::remove_tree),
    (2, Mover::replace_kind),
    (3, Mover::special),
    (3, Mover::tmpfile),
    (4, Mover::hold),
    (4, Mover::let_go),
    (3, Mover::atomic_save),
];

impl Mover {
    pub(super) fn new(root: &Path, rng: Rng) -> Self {
        Self {
            root: root.to_owned(),
            rng,
            names: 0,
            held: Vec::new(),
            story: Vec::new(),
        }
    }

    /// One operation; that it may be impossible is no failure.
    pub(super) fn step(&mut self) {
        let all: u64 = OPERATIONS.iter().map(|(weight, _)| weight).sum();
        let mut at = self.rng.below(all);
        for (weight, operation) in OPERATIONS {
            if at < *weight {
                if let Ok(told) = operation(self) {
                    self.story.push(told);
                }
                return;
            }
            at -= weight;
        }
    }

    /// Closes everything.
    pub(super) fn end(&mut self) {
        self.held.clear();
    }

    // ---- choices -------------------------------------------------------------------------------

    fn one_in(&mut self, count: u64) -> bool {
        self.rng.below(count) == 0
    }

    fn bytes(&mut self) -> Vec<u8> {
        let len = [1, 100, 4096, 70_000, 150_000][below(&mut self.rng, 5)];
        let mut byte = self.rng.number().to_le_bytes()[0] | 1;
        let mut next = || {
            byte = byte.wrapping_mul(5).wrapping_add(2);
            byte
        };
        (0..len).map(|_| next()).collect()
    }

    fn entries(&mut self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let (mut dirs, mut leaves) = (vec![self.root.clone()], Vec::new());
        let mut at = 0;
        while at < dirs.len() {
            let mut list: Vec<_> = fs::read_dir(&dirs[at])
                .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
                .unwrap_or_default();
            list.sort();
            for path in list {
                if path.is_dir() && !path.is_symlink() {
                    dirs.push(path);
                } else {
                    leaves.push(path);
                }
            }
            at += 1;
        }
        (dirs, leaves)
    }

    fn pick(&mut self, list: &[PathBuf]) -> io::Result<PathBuf> {
        if list.is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(list[below(&mut self.rng, list.len())].clone())
    }

    fn leaf(&mut self) -> io::Result<PathBuf> {
        let leaves = self.entries().1;
        self.pick(&leaves)
    }

    fn regular(&mut self) -> io::Result<PathBuf> {
        let mut leaves = self.entries().1;
        leaves.retain(|path| path.symlink_metadata().is_ok_and(|data| data.is_file()));
        self.pick(&leaves)
    }

    fn dir(&mut self) -> PathBuf {
        let dirs = self.entries().0;
        dirs[below(&mut self.rng, dirs.len())].clone()
    }

    fn subdir(&mut self) -> io::Result<PathBuf> {
        let dirs = self.entries().0;
        self.pick(&dirs[1..])
    }

    fn place(&mut self) -> PathBuf {
        self.names += 1;
        let number = self.names;
        let name = match self.rng.below(12) {
            0 => OsString::from_vec(
                format!("n{number}-\u{ff}")
                    .into_bytes()
                    .into_iter()
                    .map(|b| b | (b & 64) << 1)
                    .collect(),
            ),
            1 => OsString::from(format!("{number}-{}", "x".repeat(240))),
            // Names that come back.
            2..6 => OsString::from(format!("again{}", self.rng.below(6))),
            _ => OsString::from(format!("n{number}")),
        };
        self.dir().join(name)
    }

    // ---- operations ----------------------------------------------------------------------------

    fn create(&mut self) -> Done {
        let (path, bytes) = (self.place(), self.bytes());
        write_new(&path, bytes)?;
        Ok(format!("create {}", path.display()))
    }

    fn create_empty(&mut self) -> Done {
        let path = self.place();
        File::create_new(&path)?;
        Ok(format!("create empty {}", path.display()))
    }

    fn mkdir(&mut self) -> Done {
        let path = self.place();
        fs::create_dir(&path)?;
        Ok(format!("mkdir {}", path.display()))
    }

    fn mkdir_deep(&mut self) -> Done {
        let path = self.place();
        fs::create_dir_all(path.join("a/b/c"))?;
        write_new(path.join("a/b/c/file"), "deep")?;
        Ok(format!("mkdir -p {}/a/b/c", path.display()))
    }

    fn write(&mut self) -> Done {
        let (path, bytes) = (self.regular()?, self.bytes());
        let at = self.rng.below(300_000);
        File::options()
            .write(true)
            .open(&path)?
            .write_all_at(&bytes, at)?;
        Ok(format!("write {} at {at}", path.display()))
    }

    /// Other bytes, and the size and time of before: as rsync --inplace --times does.
    fn write_as_before(&mut self) -> Done {
        let path = self.regular()?;
        let file = File::options().write(true).open(&path)?;
        let before = file.metadata()?;
        if self.one_in(2) {
            file.set_permissions(fs::Permissions::from_mode(0o640))?;
        }
        if before.len() > 0 {
            file.write_all_at(
                &[self.rng.number().to_le_bytes()[0]],
                self.rng.below(before.len()),
            )?;
        }
        file.set_modified(before.modified()?)?;
        Ok(format!("write as before {}", path.display()))
    }

    fn truncate(&mut self) -> Done {
        let path = self.regular()?;
        let size = [0, 1, 5000, 200_000][below(&mut self.rng, 4)];
        File::options().write(true).open(&path)?.set_len(size)?;
        Ok(format!("truncate {} to {size}", path.display()))
    }

    fn attributes(&mut self) -> Done {
        let path = if self.one_in(3) {
            self.dir()
        } else {
            self.leaf()?
        };
        if path.is_symlink() {
            let long_ago = TimeSpec::new(1_000_000, 5);
            nix::sys::stat::utimensat(
                AT_FDCWD,
                &path,
                &long_ago,
                &long_ago,
                nix::sys::stat::UtimensatFlags::NoFollowSymlink,
            )?;
        } else {
            let mode = [0o755, 0o700, 0o1777][below(&mut self.rng, 3)];
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        }
        Ok(format!("attributes {}", path.display()))
    }

    fn xattr(&mut self) -> Done {
        let path = if self.one_in(3) {
            self.dir()
        } else {
            self.regular()?
        };
        let value = self.rng.number().to_le_bytes();
        let c = CString::new(path.as_os_str().as_bytes())?;
        super::rig::set_xattr(&c, c"user.test", &value)?;
        Ok(format!("setxattr {}", path.display()))
    }

    fn rename(&mut self) -> Done {
        let (from, to) = (self.leaf()?, self.place());
        renameat2(
            AT_FDCWD,
            &from,
            AT_FDCWD,
            &to,
            RenameFlags::RENAME_NOREPLACE,
        )?;
        Ok(format!("rename {} {}", from.display(), to.display()))
    }

    fn rename_over(&mut self) -> Done {
        let (from, to) = (self.leaf()?, self.leaf()?);
        fs::rename(&from, &to)?;
        Ok(format!("rename over {} {}", from.display(), to.display()))
    }

    fn exchange(&mut self) -> Done {
        let (dirs, leaves) = self.entries();
        let all = [&dirs[1..], &leaves].concat();
        let (a, b) = (self.pick(&all)?, self.pick(&all)?);
        renameat2(AT_FDCWD, &a, AT_FDCWD, &b, RenameFlags::RENAME_EXCHANGE)?;
        Ok(format!("exchange {} {}", a.display(), b.display()))
    }

    fn move_directory(&mut self) -> Done {
        let from = self.subdir()?;
        let to = if self.one_in(4) {
            self.subdir()?
        } else {
            self.place()
        };
        fs::rename(&from, &to)?;
        Ok(format!(
            "move directory {} {}",
            from.display(),
            to.display()
        ))
    }

    /// Two trade names by a third.
    fn rotate(&mut self) -> Done {
        let (dirs, leaves) = self.entries();
        let all = if self.one_in(2) {
            dirs[1..].to_vec()
        } else {
            leaves
        };
        let (a, b, c) = (self.pick(&all)?, self.pick(&all)?, self.place());
        if a == b || a.starts_with(&b) || b.starts_with(&a) || c.starts_with(&a) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        renameat2(AT_FDCWD, &a, AT_FDCWD, &c, RenameFlags::RENAME_NOREPLACE)?;
        let _ = renameat2(AT_FDCWD, &b, AT_FDCWD, &a, RenameFlags::RENAME_NOREPLACE);
        let _ = renameat2(AT_FDCWD, &c, AT_FDCWD, &b, RenameFlags::RENAME_NOREPLACE);
        Ok(format!(
            "rotate {} {} by {}",
            a.display(),
            b.display(),
            c.display()
        ))
    }

    fn link(&mut self) -> Done {
        let (from, to) = (self.leaf()?, self.place());
        fs::hard_link(&from, &to)?;
        Ok(format!("link {} {}", from.display(), to.display()))
    }

    fn unlink(&mut self) -> Done {
        let path = self.leaf()?;
        fs::remove_file(&path)?;
        Ok(format!("unlink {}", path.display()))
    }

    /// The inode is used again at once, for another kind of file now and then.
    fn unlink_and_again(&mut self) -> Done {
        let (path, bytes) = (self.leaf()?, self.bytes());
        let to = if self.one_in(2) {
            path.clone()
        } else {
            self.place()
        };
        fs::remove_file(&path)?;
        if self.one_in(3) {
            fs::create_dir(&to)?;
        } else {
            write_new(&to, bytes)?;
        }
        Ok(format!(
            "unlink {} and make {}",
            path.display(),
            to.display()
        ))
    }

    fn rmdir(&mut self) -> Done {
        let path = self.subdir()?;
        fs::remove_dir(&path)?;
        Ok(format!("rmdir {}", path.display()))
    }

    fn remove_tree(&mut self) -> Done {
        let path = self.subdir()?;
        fs::remove_dir_all(&path)?;
        Ok(format!("rm -r {}", path.display()))
    }

    fn replace_kind(&mut self) -> Done {
        if self.one_in(2) {
            let path = self.leaf()?;
            fs::remove_file(&path)?;
            fs::create_dir(&path)?;
            write_new(path.join("in"), "was a file")?;
            Ok(format!("{} becomes a directory", path.display()))
        } else {
            let path = self.subdir()?;
            fs::remove_dir_all(&path)?;
            write_new(&path, "was a directory")?;
            Ok(format!("{} becomes a file", path.display()))
        }
    }

    fn special(&mut self) -> Done {
        let path = self.place();
        if self.one_in(2) {
            symlink("somewhere/else", &path)?;
        } else {
            mkfifo(&path, Mode::from_bits_truncate(0o600))?;
        }
        Ok(format!("special {}", path.display()))
    }

    fn tmpfile(&mut self) -> Done {
        let (dir, to, bytes) = (self.dir(), self.place(), self.bytes());
        let file = File::options()
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .open(dir)?;
        file.write_all_at(&bytes, 0)?;
        let from = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        linkat(AT_FDCWD, &from, AT_FDCWD, &to, AtFlags::AT_SYMLINK_FOLLOW)?;
        Ok(format!("O_TMPFILE and link {}", to.display()))
    }

    /// Opens a file for writing, and leaves it open.
    fn hold(&mut self) -> Done {
        let path = self.regular()?;
        self.held.push(File::options().write(true).open(&path)?);
        Ok(format!("hold {}", path.display()))
    }

    /// Writes to what is held, with or without a name, and closes it now and then.
    fn let_go(&mut self) -> Done {
        if self.held.is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let (at, bytes) = (below(&mut self.rng, self.held.len()), self.bytes());
        let offset = self.rng.below(100_000);
        self.held[at].write_all_at(&bytes, offset)?;
        if self.one_in(2) {
            self.held.swap_remove(at);
        }
        Ok("write to what is held".to_owned())
    }

    fn atomic_save(&mut self) -> Done {
        let (path, bytes) = (self.regular()?, self.bytes());
        let beside = path.with_file_name("saved");
        write_new(&beside, bytes)?;
        fs::rename(&beside, &path)?;
        Ok(format!("save {}", path.display()))
    }
}

/// As [`fs::write`], but never waits for the reader of a pipe.
fn write_new(path: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> io::Result<()> {
    let mut options = File::options();
    options.write(true).create(true).truncate(true);
    let file = options.custom_flags(libc::O_NONBLOCK).open(path)?;
    file.write_all_at(bytes.as_ref(), 0)
}
