//! The inode flags of chattr(1) that belong to a file and can be given to it again.
//!
//! Only regular files and directories have flags; asking needs a descriptor that is open (not
//! `O_PATH`). A flag that a filesystem does not know is never set there. Project ids (and the
//! inheritance flag `P` that goes with them) are not handled.

#![allow(unsafe_code)] // the FS_IOC ioctls

use std::os::fd::{AsRawFd, BorrowedFd};

use super::Error;

nix::ioctl_read!(fs_ioc_getflags, b'f', 1, libc::c_long);
nix::ioctl_write_ptr!(fs_ioc_setflags, b'f', 2, libc::c_long);

/// One flag that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamedFlag {
    /// chattr's letter.
    pub letter: char,
    /// The bit, the same on all filesystems (`FS_*_FL`).
    pub bit: u32,
    /// What it means, and where.
    pub meaning: &'static str,
}

const fn flag(letter: char, bit: u32, meaning: &'static str) -> NamedFlag {
    NamedFlag {
        letter,
        bit,
        meaning,
    }
}

/// Every flag that is logged and restored.
///
/// Left out: `s` `u` `t` (no supported filesystem acts on them); `e` `I` `N` `h` (how the
/// filesystem stores it); `E` `V` (fscrypt, verity: reported by statx, cannot be restored); `F`
/// (casefold: needs a filesystem made with it); `P` (project ids); `x` (DAX: a property of the
/// machine's memory).
pub const LOGGED: [NamedFlag; 11] = [
    flag('c', 0x0000_0004, "compress (btrfs)"),
    flag('S', 0x0000_0008, "write synchronously"),
    flag('i', 0x0000_0010, "immutable"),
    flag('a', 0x0000_0020, "append only"),
    flag('d', 0x0000_0040, "not for dump(8)"),
    flag('A', 0x0000_0080, "no atime"),
    flag('m', 0x0000_0400, "do not compress (btrfs)"),
    flag('j', 0x0000_4000, "journal the data (ext4)"),
    flag('D', 0x0001_0000, "write directory entries synchronously"),
    flag('T', 0x0002_0000, "top of a directory hierarchy (ext4)"),
    flag('C', 0x0080_0000, "no copy on write (btrfs)"),
];

const _: () = assert!(Flags::ALL.0 == tierfs::record::FLAGS_LOGGED);

/// A set of the flags in [`LOGGED`]; it cannot hold others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Flags(u32);

impl Flags {
    /// All flags of [`LOGGED`].
    pub const ALL: Self = {
        let mut bits = 0;
        let mut i = 0;
        while i < LOGGED.len() {
            bits |= LOGGED[i].bit;
            i += 1;
        }
        Self(bits)
    };

    /// Keeps the logged ones of any bits.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits & Self::ALL.0)
    }
    /// The bits, `FS_*_FL`.
    pub const fn bits(self) -> u32 {
        self.0
    }
    /// Whether none is set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl std::fmt::Display for Flags {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        LOGGED
            .iter()
            .filter(|flag| self.0 & flag.bit != 0)
            .try_for_each(|flag| write!(f, "{}", flag.letter))
    }
}

/// The flags of an open file or directory; `None` where the filesystem has none.
pub fn read(fd: BorrowedFd<'_>) -> Result<Option<Flags>, Error> {
    Ok(read_raw(fd)?.map(Flags::from_bits))
}

/// Gives an open file or directory these flags, and leaves all that are not in [`LOGGED`].
pub fn write(fd: BorrowedFd<'_>, flags: Flags) -> Result<(), Error> {
    let failed = |e: nix::Error| Error::on_fd("ioctl FS_IOC_SETFLAGS", fd, e);
    let old = read_raw(fd)?.ok_or_else(|| failed(nix::Error::EOPNOTSUPP))?;
    let new = (old & !Flags::ALL.0) | flags.0;
    if new == old {
        return Ok(());
    }
    // The ioctl's number says long, but the kernel reads an int.
    let mut bytes = [0; size_of::<libc::c_long>()];
    bytes[..4].copy_from_slice(&new.to_ne_bytes());
    let raw = libc::c_long::from_ne_bytes(bytes);
    // SAFETY: the kernel reads an int through the pointer, which points to a larger live value.
    unsafe { fs_ioc_setflags(fd.as_raw_fd(), &raw const raw) }
        .map(drop)
        .map_err(failed)
}

fn read_raw(fd: BorrowedFd<'_>) -> Result<Option<u32>, Error> {
    // The ioctl's number says long, but every filesystem writes an int.
    let mut raw: libc::c_long = 0;
    // SAFETY: the kernel writes at most a long through the pointer, which is live.
    match unsafe { fs_ioc_getflags(fd.as_raw_fd(), &raw mut raw) } {
        Ok(_) => {}
        Err(nix::Error::ENOTTY | nix::Error::EOPNOTSUPP | nix::Error::EINVAL) => return Ok(None),
        Err(e) => return Err(Error::on_fd("ioctl FS_IOC_GETFLAGS", fd, e)),
    }
    let bytes = raw.to_ne_bytes();
    Ok(bytes.first_chunk::<4>().map(|int| u32::from_ne_bytes(*int)))
}

/// The flags that keep a file from being changed: immutable, append-only.
const SEALS: u32 = 0x30;

/// The flags of an open file that keep it from being changed.
pub fn seals(fd: BorrowedFd<'_>) -> Result<u32, Error> {
    Ok(read(fd)?.map_or(0, |flags| flags.0 & SEALS))
}

/// Takes them off.
pub fn unseal(fd: BorrowedFd<'_>) -> Result<(), Error> {
    match read(fd)? {
        Some(flags) if flags.0 & SEALS != 0 => write(fd, Flags(flags.0 & !SEALS)),
        _ => Ok(()),
    }
}

/// Puts flags back that [`unseal`] took off.
pub fn seal(fd: BorrowedFd<'_>, seals: u32) -> Result<(), Error> {
    match read(fd)? {
        Some(flags) if seals & SEALS != 0 => write(fd, Flags(flags.0 | seals & SEALS)),
        _ => Ok(()),
    }
}
