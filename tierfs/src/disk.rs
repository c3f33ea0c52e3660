//! The few disk operations that the spool needs, as a trait, so that tests can own the disk.
//!
//! [`RealDisk`] is a directory, held by descriptor: nothing that is mounted or renamed at its path
//! later redirects an operation. [`sim::SimDisk`] lives in memory, fails and tears on demand, and
//! loses power. Nothing here decides anything: order and meaning of the operations are the business
//! of [`crate::writer`], [`crate::spool`] and [`crate::recovery`].

pub mod sim;

use std::fs::{File, TryLockError};
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FallocateFlags, OFlag, RenameFlags};
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::UnlinkatFlags;

use crate::segment::ReadAt;

/// The name of the file whose lock keeps a second daemon out.
pub const LOCK_NAME: &str = "lock";

/// An open file of a [`Disk`]. All methods may be called by several threads.
pub trait DiskFile: ReadAt + 'static {
    /// Writes all of `parts`, one after another, from `offset` on. After an error any part of the
    /// bytes may have been written.
    fn write_all_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()>;
    /// Cuts the file off.
    fn truncate(&self, len: u64) -> io::Result<()>;
    /// Makes sure that the first `len` bytes have their space, without changing the file's size.
    fn reserve(&self, len: u64) -> io::Result<()>;
    /// Makes the content durable (not the name).
    fn sync(&self) -> io::Result<()>;
    /// Takes the write permission away for everybody.
    fn set_read_only(&self) -> io::Result<()>;
}

/// Whether the lock was taken.
pub enum Locked<L> {
    /// Held until it is dropped.
    Ours(L),
    /// Another process has it; its pid where it could be read.
    Other(Option<u32>),
}

/// A directory with plain files.
pub trait Disk: Clone + Send + Sync + 'static {
    /// Its open files.
    type File: DiskFile;
    /// What holds the lock.
    type Lock: Send + Sync + 'static;

    /// The directory's path, for messages.
    fn path(&self) -> &Path;
    /// Takes the lock that keeps a second process out.
    fn lock(&self) -> io::Result<Locked<Self::Lock>>;
    /// The names of everything in the directory, in no order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Creates a file for reading and writing; fails where the name exists.
    fn create(&self, name: &str) -> io::Result<Self::File>;
    /// Opens a file for reading.
    fn open(&self, name: &str) -> io::Result<Self::File>;
    /// Opens a file for reading and writing.
    fn open_write(&self, name: &str) -> io::Result<Self::File>;
    /// Renames; fails where `to` exists.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes all names durable.
    fn sync_dir(&self) -> io::Result<()>;
    /// Bytes that a privileged process can still write.
    fn free(&self) -> io::Result<u64>;
    /// What is the same as long as nothing that was written can have been lost: the kernel's boot id.
    fn boot(&self) -> Option<[u8; 16]>;
}

/// A directory of a real filesystem.
#[derive(Clone)]
pub struct RealDisk {
    dir: Arc<OwnedFd>,
    path: Arc<PathBuf>,
}

impl RealDisk {
    /// Opens an existing directory.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            dir: Arc::new(nix::fcntl::open(path, flags, Mode::empty())?),
            path: Arc::new(path.to_owned()),
        })
    }

    fn open_at(&self, name: &str, flags: OFlag, mode: u32) -> io::Result<File> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let mode = Mode::from_bits_truncate(mode);
        let file = File::from(nix::fcntl::openat(&*self.dir, name, flags, mode)?);
        // A fifo or a device under one of our names would block or surprise.
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::other("it is not a regular file"))
        }
    }
}

/// A file of a [`RealDisk`].
pub struct RealFile(File);

impl ReadAt for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(&self.0, buf, offset)
    }
}

impl DiskFile for RealFile {
    fn write_all_at(&self, parts: &[&[u8]], mut offset: u64) -> io::Result<()> {
        let mut slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut left = &mut slices[..];
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            // Linux takes at most 1024 parts at once.
            let now = &left[..left.len().min(1024)];
            let at = i64::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
            match nix::sys::uio::pwritev(&self.0, now, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => {
                    IoSlice::advance_slices(&mut left, len);
                    offset += len as u64;
                }
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn reserve(&self, len: u64) -> io::Result<()> {
        let len = i64::try_from(len).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        loop {
            match nix::fcntl::fallocate(&self.0, keep, 0, len) {
                Err(Errno::EINTR) => {}
                // A filesystem that cannot reserve: a full disk is then noticed by the write.
                Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn set_read_only(&self) -> io::Result<()> {
        self.0
            .set_permissions(std::fs::Permissions::from_mode(0o444))
    }
}

/// The lock of a [`RealDisk`]: let go when it is dropped or the process ends.
pub struct RealLock {
    _file: File,
}

impl Disk for RealDisk {
    type File = RealFile;
    type Lock = RealLock;

    fn path(&self) -> &Path {
        &self.path
    }

    fn lock(&self) -> io::Result<Locked<RealLock>> {
        let mut file = self.open_at(LOCK_NAME, OFlag::O_RDWR | OFlag::O_CREAT, 0o600)?;
        match file.try_lock() {
            Ok(()) => {
                file.set_len(0)?;
                writeln!(file, "{}", std::process::id())?;
                Ok(Locked::Ours(RealLock { _file: file }))
            }
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                (&mut file).take(32).read_to_string(&mut text)?;
                Ok(Locked::Other(text.trim().parse().ok()))
            }
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = nix::dir::Dir::openat(&*self.dir, ".", flags, Mode::empty())?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn create(&self, name: &str) -> io::Result<RealFile> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        self.open_at(name, flags, 0o600).map(RealFile)
    }

    fn open(&self, name: &str) -> io::Result<RealFile> {
        self.open_at(name, OFlag::O_RDONLY | OFlag::O_NONBLOCK, 0)
            .map(RealFile)
    }

    fn open_write(&self, name: &str) -> io::Result<RealFile> {
        self.open_at(name, OFlag::O_RDWR | OFlag::O_NONBLOCK, 0)
            .map(RealFile)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let keep = RenameFlags::RENAME_NOREPLACE;
        match nix::fcntl::renameat2(&*self.dir, from, &*self.dir, to, keep) {
            // A filesystem without that flag: a second name, then without the first.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                nix::unistd::linkat(&*self.dir, from, &*self.dir, to, AtFlags::empty())?;
                self.remove(from)
            }
            done => Ok(done?),
        }
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let stat = nix::sys::stat::fstatat(&*self.dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(io::Error::other("it is not a regular file"));
        }
        Ok(nix::unistd::unlinkat(
            &*self.dir,
            name,
            UnlinkatFlags::NoRemoveDir,
        )?)
    }

    fn sync_dir(&self) -> io::Result<()> {
        Ok(nix::unistd::fsync(self.dir.as_fd())?)
    }

    fn free(&self) -> io::Result<u64> {
        let stat = nix::sys::statvfs::fstatvfs(&*self.dir)?;
        Ok(stat.blocks_free().saturating_mul(stat.fragment_size()))
    }

    fn boot(&self) -> Option<[u8; 16]> {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let id: crate::LogId = text.trim().replace('-', "").parse().ok()?;
        Some(id.0)
    }
}
