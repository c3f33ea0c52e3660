//! Durable create and rename beneath an open directory.
//!
//! Everything is relative to a descriptor, so unmounting and mounting something else at the same
//! path cannot redirect an operation under way; no symbolic link is followed. A file comes into
//! being under a temporary name, is synced and read back, and gets its name only then, without ever
//! replacing another file; then the directory is synced. A failed sync discards the file and is not
//! tried again on it. Nothing is cleaned up in `Drop`: what a kill leaves is a `.tmp-` file, which
//! [`Dir::sweep`] removes once its writer is gone (it holds a lock while it lives).

use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::dir::Type;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags};
use nix::sys::stat::Mode;
use nix::unistd::UnlinkatFlags;

use crate::{Error, fault, kernel};

/// Begins the names of files that are not there yet.
pub(crate) const TEMPORARY_PREFIX: &str = ".tmp-";
const READ_ONLY: u32 = 0o444;

/// What a directory entry is, as far as volumes care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Other,
}

/// Whether a file got its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Published {
    New,
    /// The name was taken; nothing was changed.
    NameTaken,
}

/// An open directory. The path is for messages only.
pub(crate) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl Dir {
    /// Opens a directory by path; symbolic links are followed here, and only here.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            fd: nix::fcntl::open(path, flags, Mode::empty())?,
            path: path.to_owned(),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The same directory once more.
    pub(crate) fn again(&self) -> Result<Self, Error> {
        let fd = self
            .fd
            .try_clone()
            .map_err(|e| Error::io(&self.path, "opening the directory", e))?;
        let path = self.path.clone();
        Ok(Self { fd, path })
    }

    /// A directory in this one, or `None` where there is none of the name.
    pub(crate) fn sub(&self, name: &str) -> Result<Option<Self>, Error> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let path = self.join(name);
        match nix::fcntl::openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { fd, path })),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(Error::io(&path, "opening the directory", errno)),
        }
    }

    /// A directory in this one, made durably where there is none.
    pub(crate) fn make_sub(&self, name: &str, mode: u32) -> Result<Self, Error> {
        let path = self.join(name);
        let what = "making the directory";
        fault::at("mkdir").map_err(|e| Error::io(&path, what, e))?;
        match nix::sys::stat::mkdirat(&self.fd, name, Mode::from_bits_truncate(mode)) {
            Ok(()) | Err(Errno::EEXIST) => self.sync()?,
            Err(errno) => return Err(Error::io(&path, what, errno)),
        }
        self.sub(name)?
            .ok_or_else(|| Error::io(&path, what, Errno::ENOENT))
    }

    /// Opens a regular file for reading, or `None` where there is nothing of the name.
    pub(crate) fn file(&self, name: &str) -> Result<Option<File>, Error> {
        self.file_with(name, OFlag::empty())
    }

    fn file_with(&self, name: &str, more: OFlag) -> Result<Option<File>, Error> {
        // Non-blocking, or opening a fifo that somebody put there would wait for ever.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let path = self.join(name);
        let file = match nix::fcntl::openat(&self.fd, name, flags | more, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP) => return Err(not_regular(&path)),
            Err(errno) => return Err(Error::io(&path, "opening", errno)),
        };
        match file.metadata() {
            Ok(meta) if meta.is_file() => Ok(Some(file)),
            Ok(_) => Err(not_regular(&path)),
            Err(e) => Err(Error::io(&path, "examining", e)),
        }
    }

    /// The whole of a small file, or at most `bytes_max + 1` bytes of a larger one.
    pub(crate) fn read_small(
        &self,
        name: &str,
        bytes_max: usize,
    ) -> Result<Option<Vec<u8>>, Error> {
        use std::io::Read;
        let Some(file) = self.file(name)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(bytes_max as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| Error::io(&self.join(name), "reading", e))?;
        Ok(Some(bytes))
    }

    /// Length of a regular file, or `None` where there is nothing of the name.
    pub(crate) fn bytes(&self, name: &str) -> Result<Option<u64>, Error> {
        let path = self.join(name);
        match nix::sys::stat::fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) if stat.st_mode & libc::S_IFMT != libc::S_IFREG => Err(not_regular(&path)),
            Ok(stat) => u64::try_from(stat.st_size)
                .map(Some)
                .map_err(|_| Error::io(&path, "examining", Errno::EINVAL)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(Error::io(&path, "examining", errno)),
        }
    }

    /// All entries but `.` and `..`, sorted by name. Names that are no UTF-8 come with replacement
    /// characters: no name of ours has any.
    pub(crate) fn entries(&self) -> Result<Vec<(String, Kind)>, Error> {
        let failed = |errno: Errno| Error::io(&self.path, "listing", errno);
        // A descriptor of its own, as reading moves its offset.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut stream =
            nix::dir::Dir::openat(&self.fd, ".", flags, Mode::empty()).map_err(failed)?;
        let mut entries = Vec::new();
        for entry in stream.iter() {
            let entry = entry.map_err(failed)?;
            let raw = entry.file_name();
            if matches!(raw.to_bytes(), b"." | b"..") {
                continue;
            }
            let kind = match entry.file_type() {
                Some(Type::File) => Kind::File,
                Some(Type::Directory) => Kind::Directory,
                Some(_) => Kind::Other,
                None => self.kind(raw)?,
            };
            entries.push((raw.to_string_lossy().into_owned(), kind));
        }
        entries.sort_unstable_by(|a: &(String, Kind), b| a.0.cmp(&b.0));
        Ok(entries)
    }

    fn kind(&self, name: &std::ffi::CStr) -> Result<Kind, Error> {
        match nix::sys::stat::fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(match stat.st_mode & libc::S_IFMT {
                libc::S_IFREG => Kind::File,
                libc::S_IFDIR => Kind::Directory,
                _ => Kind::Other,
            }),
            Err(Errno::ENOENT) => Ok(Kind::Other),
            Err(errno) => {
                let path = self.join(&name.to_string_lossy());
                Err(Error::io(&path, "examining", errno))
            }
        }
    }

    /// Makes names in this directory durable.
    pub(crate) fn sync(&self) -> Result<(), Error> {
        let result = fault::at("sync directory").and_then(|()| Ok(nix::unistd::fsync(&self.fd)?));
        match result {
            Ok(()) => Ok(()),
            // Some network and FUSE filesystems have no such call, their names are durable at once.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)
                ) =>
            {
                Ok(())
            }
            Err(e) => Err(Error::io(&self.path, "syncing the directory", e)),
        }
    }

    /// Removes a file of ours that never was part of the volume's content.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Error> {
        match nix::unistd::unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(Error::io(&self.join(name), "removing", errno)),
        }
    }

    /// Free space of the filesystem in bytes, for processes without special rights, and whether it
    /// has an inode left.
    pub(crate) fn free(&self) -> Result<(u64, bool), Error> {
        let stat = nix::sys::statvfs::fstatvfs(&self.fd)
            .map_err(|errno| Error::io(&self.path, "asking for the free space of", errno))?;
        let bytes = stat.blocks_available().saturating_mul(stat.fragment_size());
        // A filesystem that makes inodes as it needs them says 0 of 0.
        Ok((bytes, stat.files() == 0 || stat.files_available() > 0))
    }

    /// Opens or makes an empty file and locks it for as long as it is open; `None` where another
    /// process has it locked.
    pub(crate) fn lock_file(&self, name: &str) -> Result<Option<File>, Error> {
        let path = self.join(name);
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = nix::fcntl::openat(&self.fd, name, flags, Mode::from_bits_truncate(0o600))
            .map(File::from)
            .map_err(|errno| Error::io(&path, "creating", errno))?;
        match lock(&file) {
            Err(TryLockError::WouldBlock) => Ok(None),
            // Without locks on the filesystem, the caller is as exclusive as it can be.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Some(file)),
        }
    }

    /// A new file under a temporary name.
    pub(crate) fn temporary(&self) -> Result<Temporary<'_>, Error> {
        let flags =
            OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        loop {
            let mut raw = [0u8; 8];
            getrandom::fill(&mut raw).map_err(|e| Error::Random { why: e.to_string() })?;
            let name = format!("{TEMPORARY_PREFIX}{}", crate::entry::hex(&raw));
            let path = self.join(&name);
            let failed = |e: io::Error| Error::io(&path, "creating", e);
            fault::at("create").map_err(failed)?;
            let file = nix::fcntl::openat(
                &self.fd,
                name.as_str(),
                flags,
                Mode::from_bits_truncate(0o600),
            )
            .map(File::from)
            .map_err(|errno| failed(errno.into()))?;
            // Where locks do not work, sweeps leave the file alone.
            let _ = file.try_lock();
            // A sweep may have come between creation and lock.
            if file.metadata().map_err(failed)?.nlink() > 0 {
                return Ok(Temporary {
                    dir: self,
                    name,
                    file,
                });
            }
        }
    }

    /// Removes temporary files whose writers are gone; says how many.
    pub(crate) fn sweep(&self) -> Result<usize, Error> {
        let mut removed = 0;
        for (name, kind) in self.entries()? {
            if kind != Kind::File || !name.starts_with(TEMPORARY_PREFIX) {
                continue;
            }
            // NFS gives an exclusive lock only to who may write.
            let Some(file) = self
                .file_with(&name, OFlag::O_RDWR)
                .or_else(|_| self.file(&name))?
            else {
                continue;
            };
            match lock(&file) {
                Ok(()) => match self.remove(&name) {
                    Ok(()) => removed += 1,
                    Err(error) => tracing::warn!(%error, "a temporary file stays"),
                },
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => {
                    tracing::warn!(path = %self.join(&name).display(), %error, "left a temporary file: no lock");
                }
            }
        }
        Ok(removed)
    }

    /// Sets the immutable flag of a file where that works. It is a second fence only, so a failure
    /// is told to the journal and nothing else.
    pub(crate) fn protect(&self, name: &str) -> Result<(), Error> {
        let Some(file) = self.file(name)? else {
            return Ok(());
        };
        if let Err(error) = kernel::set_immutable(&file, true) {
            tracing::warn!(path = %self.join(name).display(), %error, "cannot set the immutable flag");
        }
        Ok(())
    }

    /// Reads a file's bytes from the medium, not from the page cache, and gives count and BLAKE3.
    pub(crate) fn read_back(&self, name: &str) -> Result<Option<(u64, [u8; 32])>, Error> {
        let Some(file) = self.file(name)? else {
            return Ok(None);
        };
        let path = self.join(name);
        fault::at("read back").map_err(|e| Error::io(&path, "reading back", e))?;
        // Not every filesystem can do direct I/O; then dropping the cache must do.
        let direct = self.file_with(name, OFlag::O_DIRECT).ok().flatten();
        crate::readback::hash(&file, direct)
            .map(Some)
            .map_err(|e| Error::io(&path, "reading back", e))
    }
}

/// Locks a file unless somebody else has it. A process that forks holds the locks of its parent until it
/// calls exec, so the answer is asked for more than once.
fn lock(file: &File) -> Result<(), TryLockError> {
    const TRIES: u32 = 10;
    const PAUSE: Duration = Duration::from_millis(20);
    for _ in 1..TRIES {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
    file.try_lock()
}

fn not_regular(path: &Path) -> Error {
    Error::Corrupt {
        path: path.to_owned(),
        expected: "a regular file".into(),
        found: "something else".into(),
        advice: "somebody changed the volume; use another copy",
    }
}

/// A file that has no name of its own yet. Writing goes through [`Temporary::file`].
pub(crate) struct Temporary<'d> {
    dir: &'d Dir,
    name: String,
    file: File,
}

impl<'d> Temporary<'d> {
    pub(crate) fn file(&mut self) -> &mut File {
        &mut self.file
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// Removes the file. What the caller reports matters more than a failure of this.
    pub(crate) fn discard(self) {
        if let Err(error) = self.dir.remove(&self.name) {
            tracing::warn!(%error, "a temporary file stays until the next start");
        }
    }

    /// Makes the bytes durable and read-only, and compares what the medium then gives with `hash`.
    pub(crate) fn seal(self, hash: &[u8; 32]) -> Result<Sealed<'d>, Error> {
        match self.sync_and_check(hash) {
            Ok(()) => Ok(Sealed(self)),
            Err(error) => {
                self.discard();
                Err(error)
            }
        }
    }

    fn sync_and_check(&self, hash: &[u8; 32]) -> Result<(), Error> {
        let failed = |what| move |e| Error::io(&self.path(), what, e);
        // The mode first, so that the sync covers it.
        self.file
            .set_permissions(std::fs::Permissions::from_mode(READ_ONLY))
            .map_err(failed("making read-only"))?;
        fault::at("sync file")
            .and_then(|()| self.file.sync_all())
            .map_err(failed("syncing"))?;
        match self.dir.read_back(&self.name)? {
            Some((_, found)) if found == *hash => Ok(()),
            Some((_, found)) => Err(Error::Corrupt {
                path: self.path(),
                expected: format!("BLAKE3 {}", crate::entry::hex(hash)),
                found: format!("{} right after it was written", crate::entry::hex(&found)),
                advice: "the medium or its drive is failing; replace it",
            }),
            None => Err(failed("reading back")(Errno::ENOENT.into())),
        }
    }
}

/// A durable, checked file that lacks its name.
pub(crate) struct Sealed<'d>(Temporary<'d>);

impl Sealed<'_> {
    /// Gives the file its name, durably, unless the name is taken.
    pub(crate) fn publish(self, name: &str) -> Result<Published, Error> {
        let dir = self.0.dir;
        let renamed = fault::at("rename").and_then(|()| rename_noreplace(dir, &self.0.name, name));
        match renamed {
            Ok(Published::New) => {
                dir.sync()?;
                Ok(Published::New)
            }
            Ok(Published::NameTaken) => {
                self.0.discard();
                Ok(Published::NameTaken)
            }
            Err(e) => {
                self.0.discard();
                Err(Error::io(&dir.join(name), "naming", e))
            }
        }
    }
}

/// Renames within a directory without replacing: by the kernel's flag; where the filesystem lacks
/// it (NFS) by a hard link; where it lacks those too (LTFS) after a look, as one daemon owns a log.
fn rename_noreplace(dir: &Dir, from: &str, to: &str) -> io::Result<Published> {
    let fd = dir.fd.as_fd();
    match nix::fcntl::renameat2(fd, from, fd, to, RenameFlags::RENAME_NOREPLACE) {
        Ok(()) => return Ok(Published::New),
        Err(Errno::EEXIST) => return Ok(Published::NameTaken),
        Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => {}
        Err(errno) => return Err(errno.into()),
    }
    link_noreplace(dir, from, to)
}

fn link_noreplace(dir: &Dir, from: &str, to: &str) -> io::Result<Published> {
    let fd = dir.fd.as_fd();
    match nix::unistd::linkat(fd, from, fd, to, AtFlags::empty()) {
        Ok(()) => {
            nix::unistd::unlinkat(fd, from, UnlinkatFlags::NoRemoveDir)?;
            return Ok(Published::New);
        }
        Err(Errno::EEXIST) => return Ok(Published::NameTaken),
        Err(Errno::EPERM | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EMLINK) => {}
        Err(errno) => return Err(errno.into()),
    }
    look_and_rename(dir, from, to)
}

fn look_and_rename(dir: &Dir, from: &str, to: &str) -> io::Result<Published> {
    let fd = dir.fd.as_fd();
    match nix::sys::stat::fstatat(fd, to, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(Published::NameTaken),
        Err(Errno::ENOENT) => {
            nix::fcntl::renameat(fd, from, fd, to)?;
            Ok(Published::New)
        }
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    type Rename = fn(&Dir, &str, &str) -> io::Result<Published>;
    const WAYS: [Rename; 3] = [rename_noreplace, link_noreplace, look_and_rename];

    #[test]
    fn no_way_of_naming_replaces_a_file() {
        for way in WAYS {
            let place = tempfile::tempdir().unwrap();
            let dir = Dir::open(place.path()).unwrap();
            fs::write(dir.join("from"), "new").unwrap();
            fs::write(dir.join("taken"), "old").unwrap();
            assert_eq!(way(&dir, "from", "taken").unwrap(), Published::NameTaken);
            assert_eq!(fs::read(dir.join("taken")).unwrap(), b"old");
            assert_eq!(way(&dir, "from", "free").unwrap(), Published::New);
            assert_eq!(fs::read(dir.join("free")).unwrap(), b"new");
            assert!(!dir.join("from").exists());
        }
    }

    #[test]
    fn a_sweep_takes_only_what_nobody_writes() {
        let place = tempfile::tempdir().unwrap();
        let dir = Dir::open(place.path()).unwrap();
        fs::write(dir.join(".tmp-stale"), "x").unwrap();
        fs::write(dir.join("kept"), "x").unwrap();
        fs::create_dir(dir.join(".tmp-directory")).unwrap();
        let live = dir.temporary().unwrap();
        assert_eq!(dir.sweep().unwrap(), 1);
        assert!(live.path().exists() && dir.join("kept").exists());
        live.discard();
        assert_eq!(dir.sweep().unwrap(), 0);
    }

    #[test]
    fn links_and_fifos_are_never_opened() {
        let place = tempfile::tempdir().unwrap();
        let dir = Dir::open(place.path()).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.join("link")).unwrap();
        std::os::unix::fs::symlink("/etc", dir.join("dir")).unwrap();
        nix::unistd::mkfifo(&dir.join("fifo"), Mode::S_IRWXU).unwrap();
        for name in ["link", "fifo"] {
            let error = dir.file(name).unwrap_err();
            assert!(matches!(error, Error::Corrupt { .. }), "{error}");
            assert!(dir.bytes(name).is_err() && dir.read_back(name).is_err());
        }
        assert!(dir.sub("dir").is_err());
        assert!(dir.make_sub("dir", 0o700).is_err());
    }

    #[test]
    fn a_sealed_file_that_the_medium_changed_is_discarded() {
        let place = tempfile::tempdir().unwrap();
        let dir = Dir::open(place.path()).unwrap();
        let mut temporary = dir.temporary().unwrap();
        io::Write::write_all(temporary.file(), b"what the medium made of it").unwrap();
        let error = temporary
            .seal(blake3::hash(b"what was sent").as_bytes())
            .err()
            .unwrap();
        assert!(matches!(error, Error::Corrupt { .. }), "{error}");
        assert!(dir.entries().unwrap().is_empty());
    }
}
