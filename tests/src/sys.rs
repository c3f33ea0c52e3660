//! Calls to the kernel that std and nix lack, for the workloads and the comparison.
//!
//! Nothing here is shared with the project's own `sys` module: a mistake there must not be repeated
//! by what checks it. Paths are never followed at their last component.

#![allow(unsafe_code)] // xattr, chattr, mmap, clone and prctl have no safe wrappers among our crates

use std::ffi::{CStr, CString, c_int, c_long, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{Pid, Whence, lseek};

nix::ioctl_read!(fs_ioc_getflags, b'f', 1, c_long);
nix::ioctl_write_ptr!(fs_ioc_setflags, b'f', 2, c_long);
nix::ioctl_write_int_bad!(ficlone, 0x4004_9409);
nix::ioctl_write_int_bad!(fi_freeze, 0xc004_5877);
nix::ioctl_write_int_bad!(fi_thaw, 0xc004_5878);
nix::ioctl_read!(fs_ioc_shutdown, b'X', 125, u32);
nix::ioctl_write_int_bad!(loop_ctl_remove, 0x4c81);
nix::ioctl_read!(btrfs_ioc_start_sync, 0x94, 24, u64);
nix::ioctl_write_ptr!(btrfs_ioc_wait_sync, 0x94, 22, u64);

/// `chattr +S`: write synchronously.
pub const SYNC_FL: u32 = 0x0000_0008;
/// `chattr +i`: immutable.
pub const IMMUTABLE_FL: u32 = 0x0000_0010;
/// `chattr +a`: append only.
pub const APPEND_FL: u32 = 0x0000_0020;
/// `chattr +d`: not for dump(8).
pub const NODUMP_FL: u32 = 0x0000_0040;
/// `chattr +A`: no atime.
pub const NOATIME_FL: u32 = 0x0000_0080;
/// `chattr +D`: synchronous directory.
pub const DIRSYNC_FL: u32 = 0x0001_0000;
/// `chattr +c`: compress (btrfs).
pub const COMPR_FL: u32 = 0x0000_0004;
/// `chattr +m`: never compress (btrfs).
pub const NOCOMP_FL: u32 = 0x0000_0400;
/// `chattr +C`: no copy on write (btrfs).
pub const NOCOW_FL: u32 = 0x0080_0000;
/// `chattr +T`: top of a directory hierarchy (ext4).
pub const TOPDIR_FL: u32 = 0x0002_0000;
/// `chattr +j`: journal the data (ext4).
pub const JOURNAL_DATA_FL: u32 = 0x0000_4000;

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn length(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn done(result: c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets an extended attribute.
pub fn set_xattr(path: &Path, name: &CStr, value: &[u8]) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: both strings end with NUL and the value is as long as is said; all outlive the call.
    done(unsafe {
        libc::lsetxattr(
            path.as_ptr(),
            name.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    })
}

/// Removes an extended attribute.
pub fn remove_xattr(path: &Path, name: &CStr) -> io::Result<()> {
    let path = c_path(path)?;
    // SAFETY: both strings end with NUL and outlive the call.
    done(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) })
}

/// Names and values of all extended attributes, sorted by name.
pub fn xattrs(path: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let path = c_path(path)?;
    let mut names = vec![0u8; 1 << 16];
    // SAFETY: the kernel writes at most names.len() bytes to the live buffer.
    let found = unsafe { libc::llistxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    let found = match length(found) {
        Ok(found) => found,
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    names.truncate(found);
    let mut all = Vec::new();
    for name in names.split_inclusive(|byte| *byte == 0) {
        let name = CStr::from_bytes_with_nul(name).map_err(io::Error::other)?;
        let mut value = vec![0u8; 1 << 16];
        // SAFETY: the kernel writes at most value.len() bytes to the live buffer.
        let got = unsafe {
            libc::lgetxattr(
                path.as_ptr(),
                name.as_ptr(),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        match length(got) {
            Ok(got) => value.truncate(got),
            // Removed since it was listed, by a workload that still runs.
            Err(e) if e.raw_os_error() == Some(libc::ENODATA) => continue,
            Err(e) => return Err(e),
        }
        all.push((name.to_bytes().to_vec(), value));
    }
    all.sort();
    Ok(all)
}

/// The chattr flags of an open file or directory; 0 where the filesystem has none.
pub fn flags(file: &File) -> io::Result<u32> {
    let mut raw: c_long = 0;
    // SAFETY: the kernel writes an int, and a long is live there.
    match unsafe { fs_ioc_getflags(file.as_raw_fd(), &raw mut raw) } {
        Ok(_) => Ok(first_int(raw)),
        Err(Errno::ENOTTY | Errno::EOPNOTSUPP) => Ok(0),
        Err(e) => Err(e.into()),
    }
}

fn first_int(raw: c_long) -> u32 {
    let bytes = raw.to_ne_bytes();
    u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Sets and clears chattr flags of an open file or directory; the others stay.
pub fn change_flags(file: &File, set: u32, clear: u32) -> io::Result<()> {
    let new = (flags(file)? | set) & !clear;
    let mut bytes = [0; size_of::<c_long>()];
    bytes[..4].copy_from_slice(&new.to_ne_bytes());
    let raw = c_long::from_ne_bytes(bytes);
    // SAFETY: the kernel reads an int, and a long is live there.
    unsafe { fs_ioc_setflags(file.as_raw_fd(), &raw const raw) }?;
    Ok(())
}

/// Makes `to` share all extents of `from` (`FICLONE`).
pub fn clone_file(from: &File, to: &File) -> io::Result<()> {
    // SAFETY: the ioctl takes a descriptor number and no pointer.
    unsafe { ficlone(to.as_raw_fd(), from.as_raw_fd()) }?;
    Ok(())
}

/// Cuts a filesystem (ext4, XFS) off from its device at once, as a power loss would: what is not on the
/// disk yet never will be. Everything but unmounting fails from here on.
pub fn cut_off(root: &File) -> io::Result<()> {
    // FS_SHUTDOWN_FLAGS_NOLOGFLUSH
    let mut flags = 2;
    // SAFETY: despite its direction the call only reads an u32, which is live.
    unsafe { fs_ioc_shutdown(root.as_raw_fd(), &raw mut flags) }?;
    Ok(())
}

/// Has the kernel forget a loop device that is free; the next one of this number is a new one.
pub fn forget_loop_device(number: i32) -> io::Result<()> {
    let control = File::open("/dev/loop-control")?;
    // SAFETY: the ioctl takes a number and no pointer.
    unsafe { loop_ctl_remove(control.as_raw_fd(), number) }?;
    Ok(())
}

/// Makes all attributes, names and extents of a btrfs durable as they are now, but no data that is still on
/// its way: what the filesystem does by itself every 30 s.
pub fn commit_btrfs(root: &File) -> io::Result<()> {
    let mut transaction = 0;
    // SAFETY: the calls write and read a u64, which is live.
    unsafe {
        btrfs_ioc_start_sync(root.as_raw_fd(), &raw mut transaction)?;
        btrfs_ioc_wait_sync(root.as_raw_fd(), &raw const transaction)?;
    }
    Ok(())
}

/// A filesystem on which nothing can be changed, as fsfreeze(8) makes it, until this is dropped: whoever tries
/// to waits.
pub struct Frozen(File);

impl Frozen {
    /// Freezes the filesystem of a directory.
    pub fn new(dir: File) -> io::Result<Self> {
        // SAFETY: the kernel looks at no argument.
        unsafe { fi_freeze(dir.as_raw_fd(), 0) }?;
        Ok(Self(dir))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // SAFETY: the kernel looks at no argument.
        let _ = unsafe { fi_thaw(self.0.as_raw_fd(), 0) };
    }
}

/// Takes a write lease on a file that nobody else has open: whoever opens it waits until it is closed, or
/// for 45 s.
pub fn lease(file: &File) -> io::Result<()> {
    // SAFETY: ignoring a signal runs nothing; F_SETLEASE takes an int.
    let done = unsafe {
        libc::signal(libc::SIGIO, libc::SIG_IGN);
        libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK)
    };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes data durable and nothing else: the file's attributes stay in memory.
pub fn write_back(file: &File) -> io::Result<()> {
    let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: a live descriptor and numbers.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, all) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The ranges that hold data, [start, end), as `SEEK_DATA` and `SEEK_HOLE` tell them.
pub fn data_ranges(file: &File, size: u64) -> io::Result<Vec<(u64, u64)>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        let Some(start) = seek(file, at, Whence::SeekData)? else {
            break;
        };
        let end = seek(file, start, Whence::SeekHole)?.unwrap_or(size);
        ranges.push((start, end.min(size)));
        if end <= at {
            return Err(io::Error::other(format!(
                "SEEK_HOLE goes back from {at} to {end}"
            )));
        }
        at = end;
    }
    Ok(ranges)
}

fn seek(file: &File, from: u64, whence: Whence) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(io::Error::other)?;
    match lseek(file.as_fd(), from, whence) {
        Ok(at) => Ok(Some(u64::try_from(at).map_err(io::Error::other)?)),
        Err(Errno::ENXIO) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Bytes of a file, mapped shared and writable.
pub struct SharedMap {
    start: *mut c_void,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; stores need `&mut self`.
unsafe impl Send for SharedMap {}

impl SharedMap {
    /// Maps the first `len` bytes of a file that is open for reading and writing.
    pub fn new(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory of ours.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { start, len })
    }

    /// Stores one byte. The file must be longer than `offset` all the time, or SIGBUS kills the
    /// process: only map files that nobody truncates.
    pub fn store(&mut self, offset: usize, value: u8) {
        assert!(offset < self.len, "store at {offset} of {}", self.len);
        // SAFETY: the offset lies in the mapping, which lives as long as self.
        unsafe {
            self.start.cast::<u8>().add(offset).write_volatile(value);
        }
    }

    /// Writes the stores back, `msync(MS_SYNC)`.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: exactly the mapping that self owns.
        done(unsafe { libc::msync(self.start, self.len, libc::MS_SYNC) })
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that self owns, unmapped once.
        unsafe {
            libc::munmap(self.start, self.len);
        }
    }
}

/// Has this process killed when the thread that started it ends, so that a killed test leaves no
/// daemon behind. To be called between fork and exec.
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: prctl with integer arguments only; async-signal-safe.
    done(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })
}

/// Adds a step of the child between fork and exec that calls [`die_with_parent`].
pub fn kill_with_parent(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: the step makes one system call and allocates nothing.
    unsafe {
        command.pre_exec(die_with_parent);
    }
}

/// Sets the soft limit of open descriptors to the hard one: walks hold one per level.
pub fn raise_descriptor_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls are given a live rlimit.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Limits how many descriptors a running process may have: it makes none with this number or a higher one.
/// Gives the limit of before.
pub fn limit_descriptors(pid: i32, limit: u64) -> io::Result<u64> {
    let mut old = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both limits are live, where they are given.
    unsafe {
        done(libc::prlimit(
            pid,
            libc::RLIMIT_NOFILE,
            ptr::null(),
            &raw mut old,
        ))?;
        let new = libc::rlimit {
            rlim_cur: limit,
            rlim_max: old.rlim_max,
        };
        done(libc::prlimit(
            pid,
            libc::RLIMIT_NOFILE,
            &raw const new,
            ptr::null_mut(),
        ))?;
    }
    Ok(old.rlim_cur)
}

/// Has a signal run a handler that does nothing; `restart`: calls that it interrupts go on.
pub fn handle(signal: Signal, restart: bool) -> io::Result<()> {
    extern "C" fn nothing(_: c_int) {}
    let flags = if restart {
        SaFlags::SA_RESTART
    } else {
        SaFlags::empty()
    };
    let action = SigAction::new(SigHandler::Handler(nothing), flags, SigSet::empty());
    // SAFETY: the handler does nothing, which is safe in a signal's context.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

/// Sends a signal to one thread of this process.
pub fn signal_thread(thread: Pid, signal: Signal) -> io::Result<()> {
    let (own, thread) = (std::process::id(), thread.as_raw());
    // SAFETY: numbers only.
    match unsafe { libc::syscall(libc::SYS_tgkill, own, thread, signal as c_int) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One call of open(2) for reading, and its result as it is: std tries again after a signal.
pub fn open_once(path: &Path) -> io::Result<File> {
    let path = c_path(path)?;
    // SAFETY: the string ends with NUL and outlives the call; the descriptor is new and nobody else's.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(File::from(OwnedFd::from_raw_fd(fd)))
    }
}

/// Gives memory back that was freed: each thread that reads a tree leaves an arena of its own behind, as
/// large as its tree was.
pub fn give_memory_back() {
    // SAFETY: a call without pointers, at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// A path that leads through an open directory, however deep that lies.
pub fn through(dir: RawFd, name: &std::ffi::OsStr) -> std::path::PathBuf {
    let mut path = std::path::PathBuf::from(format!("/proc/self/fd/{dir}"));
    path.push(name);
    path
}
