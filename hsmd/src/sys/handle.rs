//! File handles: the kernel's lasting names of inodes.
//!
//! A handle (inode number and generation, on btrfs also the subvolume) survives renames and
//! remounts and is never valid for another inode. Handles from [`handle_at`], [`handle_of`] and
//! fanotify events are equal for equal inodes. That a handle is stale does not prove deletion: an
//! unreadable inode answers the same, so [`Opened::Stale`] is a fact about opening, not more.

#![allow(unsafe_code)] // name_to_handle_at and open_by_handle_at have no checked wrapper

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::NixPath;

use super::{Error, last_error};

/// The most bytes that a handle may have (`MAX_HANDLE_SZ`).
pub const HANDLE_BYTES_MAX: usize = 128;
/// Bytes held without an allocation: enough for ext4 (8), XFS (12) and btrfs (20).
const INLINE_BYTES: usize = 20;
/// btrfs: object id, root id, generation; without and with the parent's.
const BTRFS_KINDS: std::ops::RangeInclusive<i32> = 0x4d..=0x4f;
const BTRFS_OBJECT: std::ops::Range<usize> = 0..8;
const BTRFS_ROOT: std::ops::Range<usize> = 8..16;
/// `BTRFS_EMPTY_SUBVOL_DIR_OBJECTID`: what stands in a snapshot for a subvolume of the original.
const BTRFS_PLACEHOLDER: u64 = 2;
/// ext4 (and all that use the kernel's generic form): inode number and generation, 32 bits each.
const INO32_GEN: i32 = 1;
const INO32_GEN_NONE: [u8; 4] = [0; 4];

/// A handle of its own.
#[derive(Clone)]
pub struct Handle {
    kind: i32,
    bytes: Bytes,
}

#[derive(Clone)]
enum Bytes {
    Inline(u8, [u8; INLINE_BYTES]),
    Heap(Box<[u8]>),
}

/// A handle that lies in somebody else's buffer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HandleRef<'b> {
    kind: i32,
    bytes: &'b [u8],
}

impl<'b> HandleRef<'b> {
    /// `None` where there are no bytes, or more than the kernel ever makes.
    pub fn new(kind: i32, bytes: &'b [u8]) -> Option<Self> {
        (1..=HANDLE_BYTES_MAX)
            .contains(&bytes.len())
            .then_some(Self { kind, bytes })
    }

    /// The filesystem's type number of the handle.
    pub fn kind(self) -> i32 {
        self.kind
    }

    /// The opaque bytes.
    pub fn bytes(self) -> &'b [u8] {
        self.bytes
    }

    /// A copy that outlives the buffer.
    pub fn to_handle(self) -> Handle {
        let bytes = match u8::try_from(self.bytes.len()) {
            Ok(len) if self.bytes.len() <= INLINE_BYTES => {
                let mut inline = [0; INLINE_BYTES];
                inline[..self.bytes.len()].copy_from_slice(self.bytes);
                Bytes::Inline(len, inline)
            }
            _ => Bytes::Heap(self.bytes.into()),
        };
        Handle {
            kind: self.kind,
            bytes,
        }
    }

    /// The form that the log and the catalog keep; see [`Handle::to_bytes`].
    pub fn to_bytes(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(4 + self.bytes.len());
        out.extend_from_slice(&self.kind.to_le_bytes());
        out.extend_from_slice(self.bytes);
        out
    }

    /// Whether the kernel would open any inode with this number: it does not compare a generation of 0,
    /// which ext4's inodes have that mkfs made (`lost+found`, and all files with `mke2fs -d`).
    fn has_no_generation(self) -> bool {
        self.kind == INO32_GEN && self.bytes.get(4..8) == Some(&INO32_GEN_NONE)
    }

    /// On btrfs, the id of the subvolume.
    pub fn btrfs_root(self) -> Option<u64> {
        self.btrfs_field(BTRFS_ROOT)
    }

    /// Whether this is the empty directory that stands in a btrfs snapshot where the original has
    /// another subvolume. All of them in one snapshot have this same handle, and opening it says
    /// stale: it can be examined by name only.
    pub fn is_btrfs_placeholder(self) -> bool {
        self.btrfs_field(BTRFS_OBJECT) == Some(BTRFS_PLACEHOLDER)
    }

    fn btrfs_field(self, place: std::ops::Range<usize>) -> Option<u64> {
        if !BTRFS_KINDS.contains(&self.kind) {
            return None;
        }
        let bytes = self.bytes.get(place)?;
        // The kernel copies its own integers.
        Some(u64::from_ne_bytes(bytes.try_into().ok()?))
    }
}

impl Handle {
    /// A borrowed view.
    pub fn as_ref(&self) -> HandleRef<'_> {
        HandleRef {
            kind: self.kind,
            bytes: self.bytes(),
        }
    }

    /// The filesystem's type number of the handle.
    pub fn kind(&self) -> i32 {
        self.kind
    }

    /// The opaque bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Inline(len, bytes) => &bytes[..usize::from(*len)],
            Bytes::Heap(bytes) => bytes,
        }
    }

    /// The type as 4 bytes, little-endian, followed by the opaque bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.as_ref().to_bytes()
    }

    /// The inverse of [`Handle::to_bytes`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let malformed = |why| Error::Malformed {
            what: "a stored file handle",
            offset: 0,
            why,
        };
        let (kind, rest) = bytes
            .split_first_chunk::<4>()
            .ok_or_else(|| malformed("shorter than its type"))?;
        HandleRef::new(i32::from_le_bytes(*kind), rest)
            .map(HandleRef::to_handle)
            .ok_or_else(|| malformed("its length is not 1 to 128 bytes"))
    }
}

impl PartialEq for Handle {
    fn eq(&self, other: &Self) -> bool {
        self.as_ref() == other.as_ref()
    }
}
impl Eq for Handle {}
impl Hash for Handle {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.as_ref().hash(state);
    }
}
impl PartialOrd for Handle {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Handle {
    fn cmp(&self, other: &Self) -> Ordering {
        self.as_ref().cmp(&other.as_ref())
    }
}
impl fmt::Debug for HandleRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}:", self.kind)?;
        self.bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}
impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_ref().fmt(f)
    }
}

/// The kernel's `struct file_handle` with room for the longest handle.
#[repr(C)]
struct Raw {
    handle_bytes: libc::c_uint,
    handle_type: libc::c_int,
    f_handle: [u8; HANDLE_BYTES_MAX],
}

/// The handle of an entry; symbolic links are not followed. `None`: there is no such entry.
pub fn handle_at<P>(dir: BorrowedFd<'_>, name: &P) -> Result<Option<Handle>, Error>
where
    P: ?Sized + NixPath,
{
    lookup(dir, name, 0)
}

/// The handle of an open file (`O_PATH` descriptors included).
pub fn handle_of(fd: BorrowedFd<'_>) -> Result<Handle, Error> {
    lookup(fd, c"", libc::AT_EMPTY_PATH)?.ok_or_else(|| {
        let source = std::io::Error::from_raw_os_error(libc::ENOENT);
        Error::on_fd("name_to_handle_at", fd, source)
    })
}

fn lookup<P>(dir: BorrowedFd<'_>, name: &P, flags: libc::c_int) -> Result<Option<Handle>, Error>
where
    P: ?Sized + NixPath,
{
    let mut raw = Raw {
        handle_bytes: 128,
        handle_type: 0,
        f_handle: [0; HANDLE_BYTES_MAX],
    };
    let mut mount_id: libc::c_int = 0;
    let failed = |source: std::io::Error| {
        let mut shown = Vec::new();
        let _ = name.with_nix_path(|c| shown.extend_from_slice(c.to_bytes()));
        Error::on_entry("name_to_handle_at", dir, &shown, source)
    };
    let result = name
        .with_nix_path(|c| {
            // SAFETY: `c` is NUL-terminated, `raw` has the layout of struct file_handle and the
            // 128 bytes that its handle_bytes promises, and all pointers outlive the call.
            unsafe {
                libc::name_to_handle_at(
                    dir.as_raw_fd(),
                    c.as_ptr(),
                    (&raw mut raw).cast(),
                    &raw mut mount_id,
                    flags,
                )
            }
        })
        .map_err(|e| failed(e.into()))?;
    if result == 0 {
        let handle = usize::try_from(raw.handle_bytes)
            .ok()
            .and_then(|len| raw.f_handle.get(..len))
            .and_then(|bytes| HandleRef::new(raw.handle_type, bytes));
        return handle.map(|h| Some(h.to_handle())).ok_or(Error::Malformed {
            what: "the handle from name_to_handle_at",
            offset: 0,
            why: "its length is not 1 to 128 bytes",
        });
    }
    let source = last_error();
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => Ok(None),
        _ => Err(failed(source)),
    }
}

/// What came of opening a handle.
#[derive(Debug)]
pub enum Opened {
    /// The inode is there.
    Fd(OwnedFd),
    /// ESTALE: the inode is gone, or cannot be read.
    Stale,
}

/// Opens an inode by its handle. `mount` is any readable descriptor on the wanted mount (not an
/// `O_PATH` one); `flags` are those of open(2), `O_CLOEXEC` is added.
pub fn open_by_handle(
    mount: BorrowedFd<'_>,
    handle: HandleRef<'_>,
    flags: libc::c_int,
) -> Result<Opened, Error> {
    if !handle.has_no_generation() {
        return open_by_number(mount, handle, flags);
    }
    // Whatever has the number now may be of another kind, so that opening it fails, or does harm.
    let Opened::Fd(held) = open_by_number(mount, handle, libc::O_PATH)? else {
        return Ok(Opened::Stale);
    };
    if handle_of(held.as_fd())?.as_ref() != handle {
        return Ok(Opened::Stale);
    }
    // As long as it is held, no other inode gets the number.
    open_by_number(mount, handle, flags)
}

fn open_by_number(
    mount: BorrowedFd<'_>,
    handle: HandleRef<'_>,
    flags: libc::c_int,
) -> Result<Opened, Error> {
    let mut raw = Raw {
        handle_bytes: 0,
        handle_type: handle.kind,
        f_handle: [0; HANDLE_BYTES_MAX],
    };
    // HandleRef::new bounds the length, so neither step can miss.
    raw.handle_bytes = libc::c_uint::try_from(handle.bytes.len()).unwrap_or(0);
    raw.f_handle[..handle.bytes.len()].copy_from_slice(handle.bytes);
    loop {
        // SAFETY: `raw` has the layout of struct file_handle with handle_bytes bytes behind the
        // header, and outlives the call, which does not keep the pointer.
        let fd = unsafe {
            libc::open_by_handle_at(
                mount.as_raw_fd(),
                (&raw mut raw).cast(),
                flags | libc::O_CLOEXEC,
            )
        };
        if fd >= 0 {
            // SAFETY: the kernel just made this descriptor for us; nobody else owns it.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            return Ok(Opened::Fd(fd));
        }
        let source = last_error();
        match source.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::ESTALE) => return Ok(Opened::Stale),
            _ => {
                let object = format!("handle {handle:?} below {}", super::describe(mount));
                return Err(Error::call("open_by_handle_at", object, source));
            }
        }
    }
}
