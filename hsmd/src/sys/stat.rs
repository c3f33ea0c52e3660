//! statx(2): what an inode is, without following links and without filling caches of its own.

#![allow(unsafe_code)] // statx has no checked wrapper

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;

use nix::NixPath;

use super::{Error, last_error};

/// A point in time: seconds since 1970 (may be negative) and nanoseconds below 1,000,000,000.
pub type Time = (i64, u32);

/// The kinds of inodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A file with content.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A named socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

impl FileKind {
    /// From the `S_IFMT` bits of a mode.
    pub fn from_mode(mode: u32) -> Option<Self> {
        Some(match mode & libc::S_IFMT {
            libc::S_IFREG => Self::Regular,
            libc::S_IFDIR => Self::Directory,
            libc::S_IFLNK => Self::Symlink,
            libc::S_IFIFO => Self::Fifo,
            libc::S_IFSOCK => Self::Socket,
            libc::S_IFCHR => Self::CharDevice,
            libc::S_IFBLK => Self::BlockDevice,
            _ => return None,
        })
    }

    /// From the `d_type` of a directory entry; `None` where the filesystem does not say.
    pub fn from_dirent(d_type: u8) -> Option<Self> {
        Some(match d_type {
            libc::DT_REG => Self::Regular,
            libc::DT_DIR => Self::Directory,
            libc::DT_LNK => Self::Symlink,
            libc::DT_FIFO => Self::Fifo,
            libc::DT_SOCK => Self::Socket,
            libc::DT_CHR => Self::CharDevice,
            libc::DT_BLK => Self::BlockDevice,
            _ => return None,
        })
    }
}

/// The attributes that statx reports (`STATX_ATTR_*`). A bit outside `known` says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    bits: u64,
    known: u64,
}

impl Attributes {
    fn has(self, bit: libc::c_int) -> bool {
        let bit = u64::from(bit.cast_unsigned());
        self.bits & self.known & bit != 0
    }
    /// May not be changed (chattr +i).
    pub fn immutable(self) -> bool {
        self.has(libc::STATX_ATTR_IMMUTABLE)
    }
    /// May only be appended to (chattr +a).
    pub fn append_only(self) -> bool {
        self.has(libc::STATX_ATTR_APPEND)
    }
    /// fscrypt: the plain content cannot be carried away with its policy.
    pub fn encrypted(self) -> bool {
        self.has(libc::STATX_ATTR_ENCRYPTED)
    }
    /// fs-verity: content is sealed with a Merkle tree.
    pub fn verity(self) -> bool {
        self.has(libc::STATX_ATTR_VERITY)
    }
    /// The root of a mount.
    pub fn mount_root(self) -> bool {
        self.has(libc::STATX_ATTR_MOUNT_ROOT)
    }
    /// The raw bits.
    pub fn bits(self) -> u64 {
        self.bits
    }
    /// Which bits the filesystem supports.
    pub fn known(self) -> u64 {
        self.known
    }
}

/// Whether no two changes of an inode, one of them after it was looked at, have the same time: since
/// Linux 6.13 on the supported filesystems. Before, times are those of the last tick of the clock.
pub fn times_are_fine() -> bool {
    static FINE: OnceLock<bool> = OnceLock::new();
    *FINE.get_or_init(|| {
        nix::sys::utsname::uname()
            .is_ok_and(|name| has_fine_times(&name.release().to_string_lossy()))
    })
}

fn has_fine_times(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(13))
}

/// The number of the mount at a path, which no other mount ever gets until the machine starts again. `None`: the kernel
/// does not say it (Linux 6.8).
pub fn mount_number(path: &std::path::Path) -> Option<u64> {
    // STATX_MNT_ID_UNIQUE
    const UNIQUE: u32 = 0x4000;
    path.with_nix_path(|path| {
        let mut raw = MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: `path` is NUL-terminated and `raw` is a whole struct statx; both outlive the call.
        let result = unsafe {
            libc::statx(
                libc::AT_FDCWD,
                path.as_ptr(),
                libc::AT_NO_AUTOMOUNT,
                UNIQUE,
                raw.as_mut_ptr(),
            )
        };
        // SAFETY: all-zero bytes are a valid struct statx, whatever the kernel has filled.
        let raw = unsafe { raw.assume_init() };
        (result == 0 && raw.stx_mask & UNIQUE != 0).then_some(raw.stx_mnt_id)
    })
    .ok()
    .flatten()
}

/// An inode as statx saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits, `0..=0o7777`.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names.
    pub nlink: u32,
    /// Device number (major, minor) of a device inode; (0, 0) of others.
    pub rdev: (u32, u32),
    /// Bytes.
    pub size: u64,
    /// Allocated units of 512 bytes.
    pub blocks: u64,
    /// Inode number; not unique across btrfs subvolumes.
    pub ino: u64,
    /// Last change of content.
    pub mtime: Time,
    /// Last change of the inode.
    pub ctime: Time,
    /// Last access, as coarse as the mount's relatime.
    pub atime: Time,
    /// Creation, where the filesystem keeps it.
    pub btime: Option<Time>,
    /// Device number (major, minor) of the filesystem; of the subvolume on btrfs.
    pub dev: (u32, u32),
    /// Attribute bits.
    pub attributes: Attributes,
    /// The mount's id as in /proc/self/mountinfo, on kernels that say it.
    pub mount_id: Option<u64>,
}

/// Of an entry, not following a symbolic link. `None`: there is no such entry.
pub fn stat_at<P>(dir: BorrowedFd<'_>, name: &P) -> Result<Option<Stat>, Error>
where
    P: ?Sized + NixPath,
{
    match statx(dir, name, libc::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(e) if matches!(e.errno(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Of an open file (`O_PATH` descriptors included).
pub fn stat_of(fd: BorrowedFd<'_>) -> Result<Stat, Error> {
    statx(fd, c"", libc::AT_EMPTY_PATH)
}

fn statx<P>(dir: BorrowedFd<'_>, name: &P, flags: libc::c_int) -> Result<Stat, Error>
where
    P: ?Sized + NixPath,
{
    let failed = |source: std::io::Error| {
        let mut shown = Vec::new();
        let _ = name.with_nix_path(|c| shown.extend_from_slice(c.to_bytes()));
        Error::on_entry("statx", dir, &shown, source)
    };
    let mut raw = MaybeUninit::<libc::statx>::zeroed();
    let result = name
        .with_nix_path(|c| {
            // SAFETY: `c` is NUL-terminated and `raw` is a whole struct statx; both outlive the
            // call.
            unsafe {
                libc::statx(
                    dir.as_raw_fd(),
                    c.as_ptr(),
                    flags | libc::AT_NO_AUTOMOUNT,
                    libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID,
                    raw.as_mut_ptr(),
                )
            }
        })
        .map_err(|e| failed(e.into()))?;
    if result != 0 {
        return Err(failed(last_error()));
    }
    // SAFETY: all-zero bytes are a valid struct statx, and the kernel has filled it.
    let raw = unsafe { raw.assume_init() };
    let mode = u32::from(raw.stx_mode);
    let kind = FileKind::from_mode(mode).ok_or(Error::Malformed {
        what: "the answer of statx",
        offset: std::mem::offset_of!(libc::statx, stx_mode),
        why: "it has no known file type",
    })?;
    let time = |t: libc::statx_timestamp| (t.tv_sec, t.tv_nsec);
    Ok(Stat {
        kind,
        mode: mode & 0o7777,
        uid: raw.stx_uid,
        gid: raw.stx_gid,
        nlink: raw.stx_nlink,
        rdev: match kind {
            FileKind::CharDevice | FileKind::BlockDevice => {
                (raw.stx_rdev_major, raw.stx_rdev_minor)
            }
            _ => (0, 0),
        },
        size: raw.stx_size,
        blocks: raw.stx_blocks,
        ino: raw.stx_ino,
        mtime: time(raw.stx_mtime),
        ctime: time(raw.stx_ctime),
        atime: time(raw.stx_atime),
        btime: (raw.stx_mask & libc::STATX_BTIME != 0).then(|| time(raw.stx_btime)),
        dev: (raw.stx_dev_major, raw.stx_dev_minor),
        attributes: Attributes {
            bits: raw.stx_attributes,
            known: raw.stx_attributes_mask,
        },
        mount_id: (raw.stx_mask & libc::STATX_MNT_ID != 0).then_some(raw.stx_mnt_id),
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn fine_times_came_with_linux_6_13() {
        for (release, fine) in [
            ("6.12.9-amd64", false),
            ("6.13.0", true),
            ("6.18-rc1", true),
            ("5.17", false),
            ("7.0.1", true),
            ("unknown", false),
        ] {
            assert_eq!(super::has_fine_times(release), fine, "{release}");
        }
    }
}
