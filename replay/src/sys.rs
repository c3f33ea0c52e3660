//! The kernel calls of replay: everything below a directory descriptor, one component at a time.
//!
//! Nothing here follows a symbolic link: each call names an entry of an open directory, and the
//! names come from [`tierfs::record::valid_name`], so no log can lead outside the target.

#![allow(unsafe_code)] // xattr calls, FS_IOC ioctls, statx, handles and sync_file_range have no checked wrapper

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FileStat, Mode, SFlag, UtimensatFlags};
use nix::sys::time::TimeSpec;
use tierfs::Time;
use tierfs::catalog::XattrList;
use tierfs::record::{Device, Kind};
use tierfs::stub::XATTR;

nix::ioctl_read!(fs_ioc_getflags, b'f', 1, libc::c_long);
nix::ioctl_write_ptr!(fs_ioc_setflags, b'f', 2, libc::c_long);

pub use tierfs::record::FLAGS_LOGGED;
/// Flags that forbid changing the file: given last of all.
pub const FLAGS_FREEZING: u32 = 0x0000_0030;
/// Flags that say how content is stored: given while a file is empty.
pub const FLAGS_STORAGE: u32 = 0x0080_0404;
const _: () = assert!(FLAGS_LOGGED & FLAGS_FREEZING == FLAGS_FREEZING);

/// Letters of chattr(1) for the logged flags.
pub fn flag_letters(flags: u32) -> String {
    const LETTERS: [(u32, char); 11] = [
        (0x0000_0004, 'c'),
        (0x0000_0008, 'S'),
        (0x0000_0010, 'i'),
        (0x0000_0020, 'a'),
        (0x0000_0040, 'd'),
        (0x0000_0080, 'A'),
        (0x0000_0400, 'm'),
        (0x0000_4000, 'j'),
        (0x0001_0000, 'D'),
        (0x0002_0000, 'T'),
        (0x0080_0000, 'C'),
    ];
    let set = LETTERS.iter().filter(|(bit, _)| flags & bit != 0);
    set.map(|(_, letter)| letter).collect()
}

fn mode(bits: u32) -> Mode {
    Mode::from_bits_truncate(bits)
}

/// Opens a directory by a path that the user gave (links in it are followed).
pub fn open_root(path: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open(path, flags, Mode::empty())?)
}

/// Opens the directory `name`; fails for a link (ELOOP, ENOTDIR).
pub fn open_dir(dir: impl AsFd, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::openat(dir, name, flags, Mode::empty())?)
}

/// Makes the directory `name`, for its maker only.
pub fn make_dir(dir: impl AsFd, name: &[u8]) -> io::Result<()> {
    Ok(nix::sys::stat::mkdirat(dir, name, mode(0o700))?)
}

/// Makes and opens the new regular file `name`.
pub fn create_file(dir: impl AsFd, name: &[u8], bits: u32) -> io::Result<OwnedFd> {
    let flags =
        OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::openat(dir, name, flags, mode(bits))?)
}

/// Makes a regular file without a name, which is gone when it is closed.
pub fn create_unnamed(dir: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::openat(dir, ".", flags, mode(0o600))?)
}

/// Opens an existing entry; never blocks (a FIFO), never follows a link.
pub fn open_file(dir: impl AsFd, name: &[u8], access: OFlag) -> io::Result<OwnedFd> {
    let flags = access | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    Ok(nix::fcntl::openat(dir, name, flags, Mode::empty())?)
}

/// A descriptor that only names the entry, whatever it is.
pub fn open_path(dir: impl AsFd, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::openat(dir, name, flags, Mode::empty())?)
}

/// Makes the symbolic link `name`.
pub fn make_symlink(dir: impl AsFd, name: &[u8], target: &[u8]) -> io::Result<()> {
    Ok(nix::unistd::symlinkat(target, dir, name)?)
}

/// Makes a FIFO, a socket or a device.
pub fn make_node(
    dir: impl AsFd,
    name: &[u8],
    kind: Kind,
    device: Option<Device>,
) -> io::Result<()> {
    let kind = match kind {
        Kind::Fifo => SFlag::S_IFIFO,
        Kind::Socket => SFlag::S_IFSOCK,
        Kind::CharDevice => SFlag::S_IFCHR,
        Kind::BlockDevice => SFlag::S_IFBLK,
        Kind::Regular | Kind::Directory | Kind::Symlink => {
            return Err(io::ErrorKind::InvalidInput.into());
        }
    };
    let device = device.map_or(0, |device| libc::makedev(device.major, device.minor));
    Ok(nix::sys::stat::mknodat(
        dir,
        name,
        kind,
        mode(0o600),
        device,
    )?)
}

/// Gives the entry `old` a further name; a symbolic link itself is named, not what it points to.
pub fn link(old_dir: impl AsFd, old: &[u8], new_dir: impl AsFd, new: &[u8]) -> io::Result<()> {
    Ok(nix::unistd::linkat(
        old_dir,
        old,
        new_dir,
        new,
        AtFlags::empty(),
    )?)
}

/// Removes an entry that is no directory.
pub fn unlink(dir: impl AsFd, name: &[u8]) -> io::Result<()> {
    let flag = nix::unistd::UnlinkatFlags::NoRemoveDir;
    Ok(nix::unistd::unlinkat(dir, name, flag)?)
}

/// Removes an empty directory.
pub fn remove_dir(dir: impl AsFd, name: &[u8]) -> io::Result<()> {
    let flag = nix::unistd::UnlinkatFlags::RemoveDir;
    Ok(nix::unistd::unlinkat(dir, name, flag)?)
}

/// stat of the entry itself.
pub fn stat_at(dir: impl AsFd, name: &[u8]) -> io::Result<FileStat> {
    Ok(nix::sys::stat::fstatat(
        dir,
        name,
        AtFlags::AT_SYMLINK_NOFOLLOW,
    )?)
}

/// stat of what is open.
pub fn stat(fd: impl AsFd) -> io::Result<FileStat> {
    Ok(nix::sys::stat::fstat(fd)?)
}

/// The kind in a stat, `None` for what the log does not know.
pub fn kind_of(stat: &FileStat) -> Option<Kind> {
    Some(match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG => Kind::Regular,
        libc::S_IFDIR => Kind::Directory,
        libc::S_IFLNK => Kind::Symlink,
        libc::S_IFIFO => Kind::Fifo,
        libc::S_IFSOCK => Kind::Socket,
        libc::S_IFCHR => Kind::CharDevice,
        libc::S_IFBLK => Kind::BlockDevice,
        _ => return None,
    })
}

/// What statx(2) says beside a [`stat`], of any descriptor, those of `O_PATH` too: nothing is opened.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// Those of the chattr flags that statx tells here.
    pub flags: u32,
    /// Which ones those are.
    pub known: u32,
    /// It is the root of its mount.
    pub is_mount_root: bool,
    /// Which mount, as in /proc/self/mountinfo.
    pub mount_id: u64,
}

/// The attributes of what is open.
pub fn attributes(fd: impl AsFd) -> io::Result<Attributes> {
    // Bits of stx_attributes that are those of the chattr flags: c, i, a, d.
    const AS_FLAGS: u64 = 0x0000_0074;
    const MOUNT_ROOT: u64 = 0x0000_2000;
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is empty and ends with NUL, the kernel fills the struct, which is live.
    let result = unsafe {
        libc::statx(
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_MNT_ID,
            found.as_mut_ptr(),
        )
    };
    Errno::result(result)?;
    // SAFETY: a struct of integers, which zeroes fill as well.
    let found = unsafe { found.assume_init() };
    let low = |bits: u64| u32::try_from(bits & AS_FLAGS).unwrap_or(0);
    Ok(Attributes {
        flags: low(found.stx_attributes),
        known: low(found.stx_attributes_mask),
        is_mount_root: found.stx_attributes & MOUNT_ROOT != 0,
        mount_id: found.stx_mnt_id,
    })
}

/// The kernel's `struct file_handle` with room for the longest handle.
#[repr(C)]
struct RawHandle {
    handle_bytes: libc::c_uint,
    handle_type: libc::c_int,
    f_handle: [u8; libc::MAX_HANDLE_SZ as usize],
}

/// The handle of what is open (`O_PATH` too), the kernel's lasting name of the inode: its type (i32,
/// little endian), then its bytes.
pub fn handle(fd: impl AsFd) -> io::Result<Vec<u8>> {
    let mut raw = RawHandle {
        handle_bytes: libc::MAX_HANDLE_SZ.cast_unsigned(),
        handle_type: 0,
        f_handle: [0; libc::MAX_HANDLE_SZ as usize],
    };
    let mut mount_id: libc::c_int = 0;
    // SAFETY: `raw` has the layout of struct file_handle and the bytes that its handle_bytes promises;
    // the path ends with NUL; all pointers outlive the call.
    let result = unsafe {
        libc::name_to_handle_at(
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            (&raw mut raw).cast(),
            &raw mut mount_id,
            libc::AT_EMPTY_PATH,
        )
    };
    Errno::result(result)?;
    let bytes = usize::try_from(raw.handle_bytes)
        .ok()
        .and_then(|len| raw.f_handle.get(..len))
        .filter(|bytes| !bytes.is_empty())
        .ok_or_else(|| io::Error::other("the kernel gave a handle without bytes"))?;
    let mut handle = raw.handle_type.to_le_bytes().to_vec();
    handle.extend(bytes);
    Ok(handle)
}

/// What is mounted at a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The directory of the filesystem that is shown there; `/` where it is all of it. Octal escapes
    /// are left as they are.
    pub root: String,
    /// "ext4" and so on.
    pub fs_type: String,
}

/// Looks a mount up by its id.
pub fn mount(id: u64) -> io::Result<Option<Mount>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(mount_in(&String::from_utf8_lossy(&text), id))
}

/// Of a line "36 35 98:0 /root /where options optional... - type source options".
fn mount_in(text: &str, id: u64) -> Option<Mount> {
    text.lines().find_map(|line| {
        let mut fields = line.split(' ');
        if fields.next()?.parse() != Ok(id) {
            return None;
        }
        let root = fields.nth(2)?.to_owned();
        let fs_type = fields.skip_while(|field| *field != "-").nth(1)?.to_owned();
        Some(Mount { root, fs_type })
    })
}

/// Where a symbolic link points.
pub fn read_link(dir: impl AsFd, name: &[u8]) -> io::Result<Vec<u8>> {
    use std::os::unix::ffi::OsStringExt;
    Ok(nix::fcntl::readlinkat(dir, name)?.into_vec())
}

/// The names in a directory, without "." and "..", sorted.
pub fn names(dir: impl AsFd) -> io::Result<Vec<Vec<u8>>> {
    // A descriptor of its own, so that the offset of `dir` stays at the beginning.
    let own = open_dir(dir, b".")?;
    let mut listing = nix::dir::Dir::from_fd(own)?;
    let mut names = Vec::new();
    for entry in listing.iter() {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Owner and group of what is open.
pub fn chown(fd: impl AsFd, uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (uid.into(), gid.into());
    Ok(nix::unistd::fchown(fd, Some(uid), Some(gid))?)
}

/// Owner and group of an entry itself.
pub fn chown_at(dir: impl AsFd, name: &[u8], uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Some(uid.into()), Some(gid.into()));
    let flags = AtFlags::AT_SYMLINK_NOFOLLOW;
    Ok(nix::unistd::fchownat(dir, name, uid, gid, flags)?)
}

/// Permission bits of what is open.
pub fn chmod(fd: impl AsFd, bits: u32) -> io::Result<()> {
    Ok(nix::sys::stat::fchmod(fd, mode(bits))?)
}

/// Permission bits of an entry that is no symbolic link (nobody else can change the directory:
/// it is closed to others while replay works).
pub fn chmod_at(dir: impl AsFd, name: &[u8], bits: u32) -> io::Result<()> {
    let follow = nix::sys::stat::FchmodatFlags::FollowSymlink;
    Ok(nix::sys::stat::fchmodat(dir, name, mode(bits), follow)?)
}

fn timespec(time: Time) -> TimeSpec {
    TimeSpec::new(time.seconds, i64::from(time.nanos))
}

/// Modification time of what is open; the access time stays.
pub fn set_mtime(fd: impl AsFd, mtime: Time) -> io::Result<()> {
    let omit = TimeSpec::UTIME_OMIT;
    Ok(nix::sys::stat::futimens(fd, &omit, &timespec(mtime))?)
}

/// Modification time of an entry itself.
pub fn set_mtime_at(dir: impl AsFd, name: &[u8], mtime: Time) -> io::Result<()> {
    Ok(nix::sys::stat::utimensat(
        dir,
        name,
        &TimeSpec::UTIME_OMIT,
        &timespec(mtime),
        UtimensatFlags::NoFollowSymlink,
    )?)
}

/// Sets the size.
pub fn truncate(fd: impl AsFd, size: u64) -> io::Result<()> {
    let size = i64::try_from(size).map_err(|_| Errno::EFBIG)?;
    Ok(nix::unistd::ftruncate(fd, size)?)
}

/// Writes all of `bytes` at `offset`.
pub fn write_at(fd: impl AsFd, mut bytes: &[u8], offset: u64) -> io::Result<()> {
    let mut offset = i64::try_from(offset).map_err(|_| Errno::EFBIG)?;
    while !bytes.is_empty() {
        match nix::sys::uio::pwrite(fd.as_fd(), bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(done) => {
                bytes = &bytes[done..];
                offset = i64::try_from(done)
                    .ok()
                    .and_then(|done| offset.checked_add(done))
                    .ok_or(Errno::EFBIG)?;
            }
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads up to `buf.len()` bytes at `offset`; fewer only at the end.
pub fn read_at(fd: impl AsFd, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        let at = i64::try_from(offset.saturating_add(done as u64)).map_err(|_| Errno::EFBIG)?;
        match nix::sys::uio::pread(fd.as_fd(), &mut buf[done..], at) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}

/// The next data at or after `offset`, `None` where only a hole follows.
pub fn seek_data(fd: impl AsFd, offset: u64) -> io::Result<Option<u64>> {
    seek(fd, offset, nix::unistd::Whence::SeekData)
}

/// The next hole at or after `offset` (the end of the file is one), `None` beyond the end.
pub fn seek_hole(fd: impl AsFd, offset: u64) -> io::Result<Option<u64>> {
    seek(fd, offset, nix::unistd::Whence::SeekHole)
}

fn seek(fd: impl AsFd, offset: u64, whence: nix::unistd::Whence) -> io::Result<Option<u64>> {
    let offset = i64::try_from(offset).map_err(|_| Errno::EFBIG)?;
    match nix::unistd::lseek(fd, offset, whence) {
        Ok(at) => Ok(u64::try_from(at).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Asks the kernel to begin writing a range back; advice, so failures mean nothing.
pub fn start_writeback(fd: impl AsFd, offset: u64, len: u64) {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return;
    };
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: no memory is passed; the descriptor is open for the length of the call.
    unsafe { libc::sync_file_range(fd, offset, len, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Waits until what [`start_writeback`] began is written, and gives back the memory in which the kernel
/// keeps it. Advice as well: an error of the disk is what [`sync_filesystem`] tells.
pub fn end_writeback(fd: impl AsFd, offset: u64, len: u64) {
    let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
        return;
    };
    let wait = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: no memory is passed; the descriptor is open for the length of the call.
    unsafe { libc::sync_file_range(fd.as_fd().as_raw_fd(), offset, len, wait) };
    let _ = nix::fcntl::posix_fadvise(
        fd,
        offset,
        len,
        nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
    );
}

/// Makes the whole filesystem of `fd` durable.
pub fn sync_filesystem(fd: impl AsFd) -> io::Result<()> {
    Ok(nix::unistd::syncfs(fd)?)
}

/// How an inode is reached by the xattr calls: its descriptor, or (for links and special files,
/// which are not opened) its descriptor's name in /proc, which leads to the inode itself.
pub enum Inode<'f> {
    /// Open for reading or writing.
    Open(BorrowedFd<'f>),
    /// Opened with `O_PATH`.
    Named(BorrowedFd<'f>),
}

impl Inode<'_> {
    fn proc_path(fd: BorrowedFd<'_>) -> io::Result<CString> {
        CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(io::Error::other)
    }

    /// Sets one extended attribute.
    pub fn set_xattr(&self, name: &[u8], value: &[u8]) -> io::Result<()> {
        let name = CString::new(name)?;
        let (name, data, len) = (name.as_ptr(), value.as_ptr().cast(), value.len());
        let result = match self {
            // SAFETY: the name ends with NUL, the value is `len` readable bytes.
            Self::Open(fd) => unsafe { libc::fsetxattr(fd.as_raw_fd(), name, data, len, 0) },
            Self::Named(fd) => {
                let path = Self::proc_path(*fd)?;
                // SAFETY: as above, and the path ends with NUL.
                unsafe { libc::setxattr(path.as_ptr(), name, data, len, 0) }
            }
        };
        Errno::result(result).map(drop).map_err(Into::into)
    }

    /// Removes one extended attribute; one that is not there is removed.
    pub fn remove_xattr(&self, name: &[u8]) -> io::Result<()> {
        let name = CString::new(name)?;
        let result = match self {
            // SAFETY: the name ends with NUL.
            Self::Open(fd) => unsafe { libc::fremovexattr(fd.as_raw_fd(), name.as_ptr()) },
            Self::Named(fd) => {
                let path = Self::proc_path(*fd)?;
                // SAFETY: both end with NUL.
                unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) }
            }
        };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ENODATA | Errno::EOPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The names of all extended attributes; none where the filesystem has no such thing.
    fn xattr_names(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut buf = vec![0_u8; 64 * 1024];
        let (data, len) = (buf.as_mut_ptr().cast(), buf.len());
        let result = match self {
            // SAFETY: the buffer is `len` writable bytes.
            Self::Open(fd) => unsafe { libc::flistxattr(fd.as_raw_fd(), data, len) },
            Self::Named(fd) => {
                let path = Self::proc_path(*fd)?;
                // SAFETY: as above, and the path ends with NUL.
                unsafe { libc::listxattr(path.as_ptr(), data, len) }
            }
        };
        let len = match Errno::result(result) {
            Ok(len) => usize::try_from(len).unwrap_or(0).min(buf.len()),
            Err(Errno::EOPNOTSUPP) => 0,
            Err(error) => return Err(error.into()),
        };
        let names = buf[..len].split(|byte| *byte == 0);
        Ok(names
            .filter(|name| !name.is_empty())
            .map(<[u8]>::to_vec)
            .collect())
    }

    /// All extended attributes, sorted by name, but the daemon's own and what XFS shows twice.
    pub fn xattrs(&self) -> io::Result<XattrList> {
        self.xattrs_and_mark().map(|(all, _)| all)
    }

    /// The same, and beside them the stub mark, as it stands there.
    pub fn xattrs_and_mark(&self) -> io::Result<(XattrList, Option<Vec<u8>>)> {
        const SHOWN_TWICE: [&[u8]; 2] = [b"trusted.SGI_ACL_FILE", b"trusted.SGI_ACL_DEFAULT"];
        let (mut all, mut mark) = (Vec::new(), None);
        for name in self.xattr_names()? {
            if name == XATTR.as_bytes() {
                mark = Some(self.xattr(&name)?);
            } else if !SHOWN_TWICE.contains(&name.as_slice()) {
                all.push((name.clone(), self.xattr(&name)?));
            }
        }
        all.sort_unstable();
        Ok((all, mark))
    }

    fn xattr(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        let name = CString::new(name)?;
        let mut buf = vec![0_u8; 64 * 1024];
        let (data, len) = (buf.as_mut_ptr().cast(), buf.len());
        let result = match self {
            // SAFETY: the name ends with NUL, the buffer is `len` writable bytes.
            Self::Open(fd) => unsafe { libc::fgetxattr(fd.as_raw_fd(), name.as_ptr(), data, len) },
            Self::Named(fd) => {
                let path = Self::proc_path(*fd)?;
                // SAFETY: as above, and the path ends with NUL.
                unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), data, len) }
            }
        };
        let len = usize::try_from(Errno::result(result)?).unwrap_or(0);
        buf.truncate(len);
        Ok(buf)
    }
}

/// The chattr flags of an open file or directory; `None` where the filesystem has none.
pub fn flags(fd: impl AsFd) -> io::Result<Option<u32>> {
    let mut raw: libc::c_long = 0;
    // SAFETY: the kernel writes at most a long through the pointer, which is live.
    match unsafe { fs_ioc_getflags(fd.as_fd().as_raw_fd(), &raw mut raw) } {
        Ok(_) => {}
        Err(Errno::ENOTTY | Errno::EOPNOTSUPP | Errno::EINVAL) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    // The ioctl's number says long, but every filesystem writes an int.
    let bytes = raw.to_ne_bytes();
    Ok(bytes.first_chunk::<4>().map(|int| u32::from_ne_bytes(*int)))
}

/// Sets those of the logged flags that `mask` has to `bits`, and leaves all others.
pub fn set_flags(fd: impl AsFd, bits: u32, mask: u32) -> io::Result<()> {
    let mask = mask & FLAGS_LOGGED;
    let Some(old) = flags(fd.as_fd())? else {
        return if bits & mask == 0 {
            Ok(())
        } else {
            Err(Errno::EOPNOTSUPP.into())
        };
    };
    let new = (old & !mask) | (bits & mask);
    if new == old {
        return Ok(());
    }
    let mut bytes = [0; size_of::<libc::c_long>()];
    bytes[..4].copy_from_slice(&new.to_ne_bytes());
    let raw = libc::c_long::from_ne_bytes(bytes);
    // SAFETY: the kernel reads an int through the pointer, which points to a larger live value.
    unsafe { fs_ioc_setflags(fd.as_fd().as_raw_fd(), &raw const raw) }?;
    Ok(())
}

/// Raises the limit of open descriptors to what is allowed; gives the limit.
pub fn raise_open_files() -> u64 {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 256;
    };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_by_their_ids() {
        let text = "36 35 8:1 / / rw - ext4 /dev/a rw\n\
                    136 36 0:4 /sub /mnt/with\\040space rw shared:1 master:2 - btrfs /dev/b rw\n";
        let found = |id| mount_in(text, id).map(|mount| (mount.root, mount.fs_type));
        assert_eq!(found(36), Some(("/".into(), "ext4".into())));
        assert_eq!(found(136), Some(("/sub".into(), "btrfs".into())));
        assert_eq!(found(3), None);
    }

    #[test]
    fn a_handle_is_of_its_inode_whatever_descriptor_asks() {
        let dir = open_root(std::path::Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap();
        let of = |name: &[u8]| handle(open_path(&dir, name).unwrap()).unwrap();
        let open = open_file(&dir, b"Cargo.toml", OFlag::O_RDONLY).unwrap();
        assert_eq!(of(b"Cargo.toml"), handle(open).unwrap());
        assert_ne!(of(b"Cargo.toml"), of(b"src"));
    }
}
