//! The notification group: asking the kernel for events, and reading them.
//!
//! Events are hints. The kernel merges them, forgets their order within a merge, and reports names
//! that may be stale; the mask and the handles only say what to examine. Guaranteed here: every
//! length in a buffer is checked, unknown information records are skipped, unknown mask bits are
//! kept, a descriptor that comes unasked is closed, and a buffer that is not as documented is
//! [`Error::Malformed`] and never a panic. Permission events are not for this module.

#![allow(unsafe_code)] // read(2) by number, FIONREAD, and owning descriptors that the kernel made

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use fanotify::low_level::{
    FAN_CLASS_NOTIF, FAN_CLOEXEC, FAN_MARK_ADD, FAN_MARK_FILESYSTEM, FAN_MARK_ONLYDIR,
    FAN_NONBLOCK, FAN_UNLIMITED_MARKS, FAN_UNLIMITED_QUEUE, FANOTIFY_METADATA_VERSION,
    fanotify_init, fanotify_mark,
};

use super::dir::NAME_MAX;
use super::handle::HandleRef;
use super::{Error, last_error};

const MARK_MOUNT: u32 = 0x10;
const MARK_IGNORED_MASK: u32 = 0x20;
const MARK_IGNORED_SURV_MODIFY: u32 = 0x40;
/// Size of `struct fanotify_event_metadata`.
pub(super) const METADATA_BYTES: usize = 24;
/// Size of `struct fanotify_event_info_header`.
pub(super) const INFO_HEADER_BYTES: usize = 4;
/// Header, filesystem id, and the two numbers before a handle's bytes.
const INFO_HANDLE_BYTES: usize = INFO_HEADER_BYTES + 8 + 8;
/// A buffer of this size holds the longest event several times.
pub const BUFFER_BYTES_MIN: usize = 4096;
/// What a busy filesystem is drained with: 1.1 million events a second were measured so.
pub const BUFFER_BYTES: usize = 1 << 20;

/// What happened to an object, one bit each; events of the same object merge their bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Mask(u64);

impl Mask {
    /// Content was written or the size set (mtime alone, too).
    pub const MODIFY: Self = Self(0x0000_0002);
    /// Metadata changed.
    pub const ATTRIB: Self = Self(0x0000_0004);
    /// A descriptor that was open for writing was closed, or its last mapping went.
    pub const CLOSE_WRITE: Self = Self(0x0000_0008);
    /// A name was made.
    pub const CREATE: Self = Self(0x0000_0100);
    /// A name was removed.
    pub const DELETE: Self = Self(0x0000_0200);
    /// The inode was removed.
    pub const DELETE_SELF: Self = Self(0x0000_0400);
    /// The kernel dropped events: everything must be examined.
    pub const OVERFLOW: Self = Self(0x0000_4000);
    /// A name was moved; the event has both.
    pub const RENAME: Self = Self(0x1000_0000);
    /// The object is a directory.
    pub const ONDIR: Self = Self(0x4000_0000);
    /// What is asked for.
    pub const WANTED: Self = Self(
        Self::MODIFY.0
            | Self::ATTRIB.0
            | Self::CLOSE_WRITE.0
            | Self::CREATE.0
            | Self::DELETE.0
            | Self::DELETE_SELF.0
            | Self::RENAME.0
            | Self::ONDIR.0,
    );

    /// Any bits, unknown ones included.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
    /// All bits as the kernel gave them.
    pub const fn bits(self) -> u64 {
        self.0
    }
    /// Whether all bits of `other` are set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    /// Whether a bit of `other` is set.
    pub const fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
    /// The bits of both.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    /// Whether events were lost.
    pub const fn overflow(self) -> bool {
        self.intersects(Self::OVERFLOW)
    }
    /// Whether the object is a directory.
    pub const fn is_dir(self) -> bool {
        self.intersects(Self::ONDIR)
    }
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const NAMES: [(Mask, &str); 9] = [
            (Mask::CREATE, "create"),
            (Mask::DELETE, "delete"),
            (Mask::RENAME, "rename"),
            (Mask::MODIFY, "modify"),
            (Mask::CLOSE_WRITE, "close_write"),
            (Mask::ATTRIB, "attrib"),
            (Mask::DELETE_SELF, "delete_self"),
            (Mask::OVERFLOW, "overflow"),
            (Mask::ONDIR, "ondir"),
        ];
        let mut rest = self.0;
        let mut words = Vec::new();
        for (bit, name) in NAMES {
            if self.intersects(bit) {
                words.push(name.to_owned());
                rest &= !bit.0;
            }
        }
        if rest != 0 {
            words.push(format!("{rest:#x}"));
        }
        f.write_str(&words.join("|"))
    }
}

/// An entry that an event names. It may be stale when it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryRef<'b> {
    /// The directory.
    pub dir: HandleRef<'b>,
    /// The name in it; `None` where the event is about the directory itself.
    pub name: Option<&'b OsStr>,
}

/// One event, in the buffer that it was read into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event<'b> {
    /// What happened.
    pub mask: Mask,
    /// The process that did it (0: the kernel, or a process of another namespace).
    pub pid: i32,
    /// The object itself; absent where the event is about a directory as such, see
    /// [`Event::object`].
    pub target: Option<HandleRef<'b>>,
    /// Its place, where the kernel knew one.
    pub entry: Option<EntryRef<'b>>,
    /// Where a rename came from.
    pub old_entry: Option<EntryRef<'b>>,
    /// Where a rename went to.
    pub new_entry: Option<EntryRef<'b>>,
}

/// A notification group. Closing it ends the watch.
#[derive(Debug)]
pub struct Group {
    fd: OwnedFd,
}

impl Group {
    /// A group that reports directory handle, name and target handle of each event. Never blocks.
    pub fn new_notification() -> Result<Self, Error> {
        const REPORT_DFID_NAME_TARGET: u32 = libc::FAN_REPORT_DFID_NAME_TARGET;
        let flags = FAN_CLASS_NOTIF
            | REPORT_DFID_NAME_TARGET
            | FAN_UNLIMITED_QUEUE
            | FAN_UNLIMITED_MARKS
            | FAN_CLOEXEC
            | FAN_NONBLOCK;
        let event_flags = libc::O_RDONLY | libc::O_LARGEFILE | libc::O_CLOEXEC | libc::O_NOATIME;
        let fd =
            fanotify_init(flags, event_flags.cast_unsigned()).map_err(|source| {
                match source.raw_os_error() {
                    Some(libc::EINVAL | libc::ENOSYS) => Error::Unsupported {
                        object: "this kernel".into(),
                        what: "a fanotify group that reports names and handles",
                        why:
                            "it needs Linux 5.17 or later with CONFIG_FANOTIFY=y; update the kernel"
                                .into(),
                    },
                    _ => Error::call("fanotify_init", "a new notification group", source),
                }
            })?;
        // SAFETY: fanotify_init just made this descriptor; nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// A duplicate of a group's descriptor that another process made.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Watches the whole filesystem that `dir` lies on, through all of its mounts. On btrfs `dir`
    /// must lie in the top-level subvolume (EXDEV otherwise).
    pub fn mark_filesystem(&self, dir: BorrowedFd<'_>) -> Result<(), Error> {
        let flags = FAN_MARK_ADD | FAN_MARK_FILESYSTEM | FAN_MARK_ONLYDIR;
        fanotify_mark(
            self.fd.as_raw_fd(),
            flags,
            Mask::WANTED.bits(),
            dir.as_raw_fd(),
            ".",
        )
        .map_err(|source| mark_error(dir, source))
    }

    /// Reports nothing of what is written through the mount that `root` lies on. Changes of attributes
    /// show all the same.
    pub fn ignore_mount(&self, root: BorrowedFd<'_>) -> Result<(), Error> {
        let written = Mask::MODIFY.union(Mask::CLOSE_WRITE);
        let flags = FAN_MARK_ADD | MARK_MOUNT | MARK_IGNORED_MASK | MARK_IGNORED_SURV_MODIFY;
        fanotify_mark(
            self.fd.as_raw_fd(),
            flags,
            written.bits(),
            root.as_raw_fd(),
            ".",
        )
        .map_err(|source| Error::on_fd("fanotify_mark FAN_MARK_MOUNT", root, source))
    }

    /// Reads what is queued, as much as `buf` holds (at least [`BUFFER_BYTES_MIN`]). `None`:
    /// nothing is queued.
    pub fn read<'b>(&self, buf: &'b mut [u8]) -> Result<Option<Events<'b>>, Error> {
        let length = loop {
            match nix::unistd::read(&self.fd, buf) {
                Ok(0) | Err(nix::Error::EAGAIN) => return Ok(None),
                Ok(n) => break n,
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(Error::call("read", "the notification group", e)),
            }
        };
        let bytes = buf.get(..length).unwrap_or_default();
        close_descriptors(bytes);
        Ok(Some(Events::parse(bytes)))
    }

    /// How many events are queued. The kernel walks the queue for it, so not on every turn.
    pub fn pending_events(&self) -> Result<u64, Error> {
        let mut bytes: libc::c_int = 0;
        // SAFETY: FIONREAD writes one int through the pointer, which is valid for the call.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        if result != 0 {
            return Err(Error::call(
                "ioctl FIONREAD",
                "the notification group",
                last_error(),
            ));
        }
        // The sum is an int in the kernel too; beyond 89 million events it wraps.
        let bytes = u64::try_from(bytes).unwrap_or(u64::from(u32::MAX));
        Ok(bytes / 24)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn mark_error(dir: BorrowedFd<'_>, source: io::Error) -> Error {
    let why = match source.raw_os_error() {
        Some(libc::EXDEV) => {
            "it is a btrfs subvolume, and only the top-level one can be marked; \
             mount the filesystem with subvolid=5 for this"
        }
        Some(libc::ENODEV) => {
            "the filesystem has no file system id, so that events cannot say where they happened; \
             use ext4, XFS or btrfs"
        }
        Some(libc::EOPNOTSUPP) => {
            "the filesystem gives no file handles (overlayfs, FUSE and network filesystems do \
             not); use ext4, XFS or btrfs"
        }
        Some(libc::EINVAL) => "the kernel does not know these marks; it needs Linux 5.17 or later",
        _ => return Error::on_fd("fanotify_mark", dir, source),
    };
    Error::Unsupported {
        object: super::describe(dir),
        what: "watching the filesystem",
        why: why.into(),
    }
}

/// Owns and so closes every descriptor that came with the events. None should: a group that
/// reports handles gets none. Ownership is taken before anything else can fail.
fn close_descriptors(buf: &[u8]) {
    let mut offset = 0;
    while let Ok(Some(metadata)) = Metadata::decode(buf, offset) {
        if metadata.fd >= 0 {
            // SAFETY: the bytes are what read(2) on the group left, so the kernel installed this
            // descriptor for us, and this is the one place that takes it.
            drop(unsafe { OwnedFd::from_raw_fd(metadata.fd) });
        }
        offset += metadata.event_len;
    }
}

/// The fixed part of an event, with its lengths checked against the buffer.
pub(super) struct Metadata {
    pub(super) event_len: usize,
    /// Where the information records begin.
    pub(super) info: usize,
    pub(super) mask: u64,
    pub(super) fd: i32,
    pub(super) pid: i32,
}

pub(super) fn malformed(offset: usize, why: &'static str) -> Error {
    Error::Malformed {
        what: "a buffer of fanotify events",
        offset,
        why,
    }
}

/// `N` bytes at `offset`.
pub(super) fn chunk<const N: usize>(buf: &[u8], offset: usize) -> Result<[u8; N], Error> {
    offset
        .checked_add(N)
        .and_then(|end| buf.get(offset..end))
        .and_then(|b| b.try_into().ok())
        .ok_or_else(|| malformed(offset, "it ends within a field"))
}

fn usize_at(buf: &[u8], offset: usize) -> Result<usize, Error> {
    usize::try_from(u32::from_ne_bytes(chunk(buf, offset)?))
        .map_err(|_| malformed(offset, "a length is too large"))
}

impl Metadata {
    /// The event at `offset`; `None` at the buffer's end.
    pub(super) fn decode(buf: &[u8], offset: usize) -> Result<Option<Self>, Error> {
        if offset == buf.len() {
            return Ok(None);
        }
        let event = buf
            .get(offset..)
            .filter(|rest| rest.len() >= METADATA_BYTES)
            .ok_or_else(|| malformed(offset, "it ends within an event"))?;
        let event_len = usize_at(event, 0)?;
        let metadata_len = usize::from(u16::from_ne_bytes(chunk(event, 6)?));
        if event[4] != FANOTIFY_METADATA_VERSION {
            return Err(malformed(
                offset + 4,
                "the metadata's version is not 3: this kernel is newer than this program",
            ));
        }
        if metadata_len < METADATA_BYTES || event_len < metadata_len || event_len > event.len() {
            return Err(malformed(offset, "an event's lengths do not fit"));
        }
        Ok(Some(Self {
            event_len,
            info: metadata_len,
            mask: u64::from_ne_bytes(chunk(event, 8)?),
            fd: i32::from_ne_bytes(chunk(event, 16)?),
            pid: i32::from_ne_bytes(chunk(event, 20)?),
        }))
    }
}

/// The events of one read. After an error it ends.
#[derive(Debug, Clone)]
pub struct Events<'b> {
    buf: &'b [u8],
    offset: usize,
}

impl<'b> Events<'b> {
    /// Parses the bytes of a read.
    pub fn parse(buf: &'b [u8]) -> Self {
        Self { buf, offset: 0 }
    }

    fn decode(&mut self) -> Result<Option<Event<'b>>, Error> {
        let Some(metadata) = Metadata::decode(self.buf, self.offset)? else {
            return Ok(None);
        };
        let end = self.offset + metadata.event_len;
        let mut at = self.offset + metadata.info;
        let mut event = Event {
            mask: Mask(metadata.mask),
            pid: metadata.pid,
            target: None,
            entry: None,
            old_entry: None,
            new_entry: None,
        };
        while at < end {
            let record = self.buf.get(at..end).unwrap_or_default();
            let length =
                usize::from(u16::from_ne_bytes(chunk(record, 2).map_err(|_| {
                    malformed(at, "it ends within an information record")
                })?));
            let record = record
                .get(..length)
                .filter(|r| r.len() >= INFO_HEADER_BYTES)
                .ok_or_else(|| malformed(at, "an information record's length does not fit"))?;
            event.add(record, at)?;
            at += length;
        }
        self.offset = end;
        Ok(Some(event))
    }
}

impl<'b> Event<'b> {
    /// What the event is about: the target, or the directory where it names no entry in it.
    pub fn object(&self) -> Option<HandleRef<'b>> {
        let itself = |entry: EntryRef<'b>| entry.name.is_none().then_some(entry.dir);
        self.target.or_else(|| self.entry.and_then(itself))
    }

    fn add(&mut self, record: &'b [u8], at: usize) -> Result<(), Error> {
        match record[0] {
            libc::FAN_EVENT_INFO_TYPE_FID => {
                self.target = read_handle(record, at)?.map(|(handle, _)| handle);
            }
            libc::FAN_EVENT_INFO_TYPE_DFID_NAME => self.entry = read_entry(record, at, true)?,
            libc::FAN_EVENT_INFO_TYPE_DFID => self.entry = read_entry(record, at, false)?,
            libc::FAN_EVENT_INFO_TYPE_OLD_DFID_NAME => {
                self.old_entry = read_entry(record, at, true)?;
            }
            libc::FAN_EVENT_INFO_TYPE_NEW_DFID_NAME => {
                self.new_entry = read_entry(record, at, true)?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// The handle of a record, and what follows it. `None`: the kernel could not make one.
fn read_handle(record: &[u8], at: usize) -> Result<Option<(HandleRef<'_>, &[u8])>, Error> {
    let length = usize_at(record, INFO_HEADER_BYTES + 8)
        .map_err(|_| malformed(at, "a handle's record is too short"))?;
    let kind = i32::from_ne_bytes(
        chunk(record, INFO_HEADER_BYTES + 12)
            .map_err(|_| malformed(at, "a handle's record is too short"))?,
    );
    let (bytes, rest) = record
        .get(INFO_HANDLE_BYTES..)
        .and_then(|b| b.split_at_checked(length))
        .ok_or_else(|| malformed(at, "a handle's length does not fit its record"))?;
    if bytes.is_empty() {
        return Ok(None);
    }
    HandleRef::new(kind, bytes)
        .map(|handle| Some((handle, rest)))
        .ok_or_else(|| malformed(at, "a handle is longer than 128 bytes"))
}

fn read_entry(record: &[u8], at: usize, named: bool) -> Result<Option<EntryRef<'_>>, Error> {
    let Some((dir, rest)) = read_handle(record, at)? else {
        return Ok(None);
    };
    if !named {
        return Ok(Some(EntryRef { dir, name: None }));
    }
    let end = rest
        .iter()
        .position(|&b| b == 0)
        .ok_or_else(|| malformed(at, "a name has no end"))?;
    let name = &rest[..end];
    if name.len() > NAME_MAX || name.contains(&b'/') {
        return Err(malformed(at, "a name is too long or has a slash"));
    }
    let name = (!matches!(name, b"" | b".")).then(|| OsStr::from_bytes(name));
    Ok(Some(EntryRef { dir, name }))
}

impl<'b> Iterator for Events<'b> {
    type Item = Result<Event<'b>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.decode().transpose();
        if matches!(item, Some(Err(_))) {
            self.offset = self.buf.len();
        }
        item
    }
}
