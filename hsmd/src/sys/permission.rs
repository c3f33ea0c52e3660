//! The permission group: being asked before a program opens or reads a file, and answering.
//!
//! As long as one process holds the group, whoever opens a marked file waits for an answer. When the
//! last descriptor of the group is closed, all who wait go on unasked: for stubs that means zeros. So
//! reading fails only where nothing else is possible, every descriptor of a batch is owned before
//! anything is looked at, and an access that cannot be understood is denied, never forgotten.
//!
//! The kernel matches an answer by the *number* of the event's descriptor; so an [`Access`] is
//! answered while its descriptor is open, and the process that reads the group is the only one that
//! makes such descriptors.

#![allow(unsafe_code)] // owning descriptors that the kernel made

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use fanotify::low_level::{fanotify_init, fanotify_mark};

use super::fanotify::{INFO_HEADER_BYTES, METADATA_BYTES, Metadata, chunk, malformed};
use super::{Error, process};

const CLASS_PRE_CONTENT: u32 = 0x8;
const UNLIMITED_QUEUE: u32 = 0x10;
const UNLIMITED_MARKS: u32 = 0x20;
const CLOEXEC: u32 = 0x1;
const NONBLOCK: u32 = 0x2;

const MARK_ADD: u32 = 0x1;
const MARK_REMOVE: u32 = 0x2;
const MARK_IGNORED_MASK: u32 = 0x20;
const MARK_IGNORED_SURV_MODIFY: u32 = 0x40;
const MARK_MOUNT: u32 = 0x10;
const MARK_FILESYSTEM: u32 = 0x100;
const MARK_EVICTABLE: u32 = 0x200;

/// That something was executed, which no mark of this group asks about. It is rare: of what a mark ignores the
/// kernel looks the mark up, and for reading or opening that would be at each call.
const OPEN_EXEC: u64 = 0x1000;
const OPEN_PERM: u64 = 0x1_0000;
const OPEN_EXEC_PERM: u64 = 0x4_0000;
const PRE_ACCESS: u64 = 0x10_0000;
const Q_OVERFLOW: u64 = 0x4000;

const INFO_TYPE_RANGE: u8 = 6;
const ALLOW: u32 = 1;
const DENY: u32 = 2;
/// The numbers that an event's descriptor can have: the most that a process may have open here.
pub const NUMBERS: i32 = 524_288;
/// For any event.
pub const BUFFER_BYTES: usize = 4096;
/// The sizes of events as they are known, without and with a range; and room for what is not known yet.
const EVENT_BYTES: [usize; 3] = [METADATA_BYTES, METADATA_BYTES + RANGE_BYTES, BUFFER_BYTES];
/// Size of `struct fanotify_event_info_range`.
const RANGE_BYTES: usize = 24;

/// What a program is about to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attempt {
    /// To open a file.
    Open,
    /// To execute it.
    Exec,
    /// To read, write, map or cut it, having opened it or not. The range is a hint (some calls give
    /// none, and appending gives a wrong one); `None` where the kernel gave none.
    Access(Option<(u64, u64)>),
}

/// A program that waits for an answer. Dropped unanswered, it waits until the group is closed or the
/// answers are swept.
#[derive(Debug)]
pub struct Access {
    /// The file, opened for reading; it raises no events.
    pub fd: OwnedFd,
    /// What is attempted.
    pub attempt: Attempt,
    /// The process, 0 where it is of another namespace.
    pub pid: i32,
}

/// What a program gets to hear.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Go on.
    Allow,
    /// Fail with this error. Those that the kernel does not take become EIO.
    Deny(i32),
}

impl Answer {
    /// Fails for a reason that will pass. Not EAGAIN for what is open already: programs take that of a `read`
    /// for the end of the file (GNU tail, Python) and go on with half of it.
    pub fn later(attempt: Attempt) -> Self {
        Self::Deny(match attempt {
            Attempt::Open | Attempt::Exec => libc::EAGAIN,
            Attempt::Access(_) => libc::EBUSY,
        })
    }

    fn code(self) -> u32 {
        match self {
            Self::Allow => ALLOW,
            Self::Deny(errno) => {
                let taken = [
                    libc::EPERM,
                    libc::EIO,
                    libc::EAGAIN,
                    libc::EBUSY,
                    libc::ETXTBSY,
                    libc::ENOSPC,
                    libc::EDQUOT,
                ];
                let errno = if taken.contains(&errno) {
                    errno
                } else {
                    libc::EIO
                };
                DENY | (errno.cast_unsigned() & 0xff) << 24
            }
        }
    }
}

/// How much is asked before programs go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Asked {
    /// Beside opening also each access of what is open (Linux 6.14).
    pub pre_access: bool,
}

impl Asked {
    fn mask(self) -> u64 {
        let access = if self.pre_access { PRE_ACCESS } else { 0 };
        OPEN_PERM | OPEN_EXEC_PERM | access
    }
}

/// A group of permission events. Closing the last descriptor of it lets everybody go on.
#[derive(Debug)]
pub struct PermissionGroup {
    fd: OwnedFd,
}

impl PermissionGroup {
    /// A new group without marks.
    pub fn new() -> Result<Self, Error> {
        let flags = CLASS_PRE_CONTENT | UNLIMITED_QUEUE | UNLIMITED_MARKS | CLOEXEC | NONBLOCK;
        let event_flags = libc::O_RDONLY | libc::O_LARGEFILE | libc::O_CLOEXEC | libc::O_NOATIME;
        let fd =
            fanotify_init(flags, event_flags.cast_unsigned()).map_err(|source| {
                match source.raw_os_error() {
                    Some(libc::EINVAL | libc::ENOSYS) => Error::Unsupported {
                        object: "this kernel".into(),
                        what: "a fanotify group of permission events",
                        why: "it needs CONFIG_FANOTIFY_ACCESS_PERMISSIONS=y".into(),
                    },
                    _ => Error::call("fanotify_init", "a new permission group", source),
                }
            })?;
        // SAFETY: fanotify_init just made this descriptor; nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            fd: process::above_others(&fd)?,
        })
    }

    /// A duplicate of a group's descriptor that another process made.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    fn mark(&self, flags: u32, mask: u64, at: BorrowedFd<'_>) -> Result<(), io::Error> {
        // "." of a directory is the directory; a file is named through its descriptor.
        let path = format!("/proc/self/fd/{}", at.as_raw_fd());
        fanotify_mark(self.fd.as_raw_fd(), flags, mask, libc::AT_FDCWD, &path)
    }

    fn marked(
        &self,
        flags: u32,
        mask: u64,
        at: BorrowedFd<'_>,
        call: &'static str,
    ) -> Result<(), Error> {
        self.mark(flags, mask, at)
            .map_err(|source| Error::on_fd(call, at, source))
    }

    /// Asks about every file of the filesystem that `root` lies on. Gives how much can be asked:
    /// without pre-access events where `wanted` has none, or the kernel or filesystem cannot.
    pub fn mark_filesystem(&self, root: BorrowedFd<'_>, wanted: Asked) -> Result<Asked, Error> {
        let less = Asked { pre_access: false };
        if wanted.pre_access {
            match self.mark(MARK_ADD | MARK_FILESYSTEM, wanted.mask(), root) {
                Ok(()) => return Ok(wanted),
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {}
                Err(error) => return Err(Error::on_fd("fanotify_mark", root, error)),
            }
        }
        self.marked(
            MARK_ADD | MARK_FILESYSTEM,
            less.mask(),
            root,
            "fanotify_mark",
        )?;
        Ok(less)
    }

    /// Marks a directory so that nobody is ever asked because of it (who executes a directory?), and other
    /// files cost nothing. The mark is there as long as the filesystem is mounted without a break, and so
    /// [`Self::has_watched`].
    pub fn mark_presence(&self, dir: BorrowedFd<'_>) -> Result<(), Error> {
        self.marked(MARK_ADD, OPEN_EXEC_PERM, dir, "fanotify_mark")
    }

    /// Whether the group has any mark on files of the filesystem with this device number, as in mountinfo.
    /// All of them go when its last mount goes.
    pub fn has_watched(&self, device: (u32, u32)) -> Result<bool, Error> {
        let info = format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd());
        let text = std::fs::read_to_string(&info).map_err(|e| Error::call("read", info, e))?;
        Ok(names_device(&text, device))
    }

    /// Ends [`Self::mark_filesystem`]; inodes that are marked stay so.
    ///
    /// The kernel's mark itself stays, and ignores an event that nobody asked for. One that was removed would
    /// stay in the kernel's list as long as an access waits that was asked about because of it, and until then
    /// every other access would pass without being asked about, whatever marks its inode has (Linux 6.18,
    /// `fsnotify_prepare_user_wait`).
    pub fn unmark_filesystem(&self, root: BorrowedFd<'_>, asked: Asked) -> Result<(), Error> {
        let keep = MARK_ADD | MARK_FILESYSTEM | MARK_IGNORED_MASK | MARK_IGNORED_SURV_MODIFY;
        self.marked(keep, OPEN_EXEC, root, "fanotify_mark FAN_MARK_IGNORED_MASK")?;
        let flags = MARK_REMOVE | MARK_FILESYSTEM;
        match self.mark(flags, asked.mask(), root) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                Err(Error::on_fd("fanotify_mark FAN_MARK_REMOVE", root, error))
            }
            _ => Ok(()),
        }
    }

    /// Asks about one inode, under whatever name it is opened.
    pub fn mark_inode(&self, file: BorrowedFd<'_>, asked: Asked) -> Result<(), Error> {
        self.marked(MARK_ADD, asked.mask(), file, "fanotify_mark")
    }

    /// Ends [`Self::mark_inode`]. An inode that has no mark is fine.
    pub fn unmark_inode(&self, file: BorrowedFd<'_>, asked: Asked) -> Result<(), Error> {
        match self.mark(MARK_REMOVE, asked.mask(), file) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                Err(Error::on_fd("fanotify_mark FAN_MARK_REMOVE", file, error))
            }
            _ => Ok(()),
        }
    }

    /// Asks nothing about what is done through the mount that `root` lies on.
    pub fn ignore_mount(&self, root: BorrowedFd<'_>, asked: Asked) -> Result<(), Error> {
        let flags = MARK_ADD | MARK_MOUNT | MARK_IGNORED_MASK | MARK_IGNORED_SURV_MODIFY;
        self.marked(flags, asked.mask(), root, "fanotify_mark FAN_MARK_MOUNT")
    }

    /// Asks nothing about an inode that is whole, until it leaves the kernel's memory. Whoever calls
    /// this must look at the file's mark again afterwards, and undo it where there is one.
    pub fn ignore_inode(&self, file: BorrowedFd<'_>, asked: Asked) -> Result<(), Error> {
        let flags = MARK_ADD | MARK_IGNORED_MASK | MARK_IGNORED_SURV_MODIFY | MARK_EVICTABLE;
        self.marked(
            flags,
            asked.mask(),
            file,
            "fanotify_mark FAN_MARK_EVICTABLE",
        )
    }

    /// Ends [`Self::ignore_inode`]. An inode that is not ignored is fine.
    pub fn unignore_inode(&self, file: BorrowedFd<'_>, asked: Asked) -> Result<(), Error> {
        match self.mark(MARK_REMOVE | MARK_IGNORED_MASK, asked.mask(), file) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                Err(Error::on_fd("fanotify_mark FAN_MARK_REMOVE", file, error))
            }
            _ => Ok(()),
        }
    }

    /// Reads who waits, one program at a time: the call stalls while somebody holds a lease on the file, and
    /// whoever was read before by the same call would have no answer until then. Empty: nobody, or nobody
    /// who could be told of. An error means that the group cannot be read at all; every other failure concerns
    /// a single access, which the kernel has denied.
    pub fn read(&self, buf: &mut [u8; BUFFER_BYTES]) -> Result<Vec<Access>, Error> {
        let mut read = Err(nix::Error::EINVAL);
        for bytes in EVENT_BYTES {
            let room = buf.get_mut(..bytes).unwrap_or_default();
            read = nix::unistd::read(&self.fd, room);
            // EINVAL: the next event is longer.
            if read != Err(nix::Error::EINVAL) {
                break;
            }
        }
        match read {
            Ok(length) => Ok(parse(buf.get(..length).unwrap_or_default())),
            Err(e @ (nix::Error::EBADF | nix::Error::EINVAL | nix::Error::EFAULT)) => {
                Err(Error::call("read", "the permission group", e))
            }
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(Vec::new()),
            Err(error) => {
                tracing::warn!(%error, "an access could not be told of, the kernel has denied it");
                Ok(Vec::new())
            }
        }
    }

    /// Lets the program go on or fail, and closes the descriptor.
    // The descriptor's number is the access's name until it is answered; then it must go.
    #[allow(clippy::needless_pass_by_value)]
    pub fn answer(&self, access: Access, answer: Answer) -> Result<(), Error> {
        let result = self.answer_number(access.fd.as_raw_fd(), answer.code());
        let result = match result {
            Err(nix::Error::EINVAL) => self.answer_number(access.fd.as_raw_fd(), DENY),
            result => result,
        };
        match result {
            // ENOENT: the program was killed while it waited.
            Ok(()) | Err(nix::Error::ENOENT) => Ok(()),
            Err(error) => Err(Error::on_fd(
                "answering an access of",
                access.fd.as_fd(),
                error,
            )),
        }
    }

    fn answer_number(&self, number: i32, code: u32) -> Result<(), nix::Error> {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&number.to_ne_bytes());
        bytes[4..].copy_from_slice(&code.to_ne_bytes());
        loop {
            match nix::unistd::write(&self.fd, &bytes) {
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Answers all that a process which is gone has read and not answered, with EBUSY, since nobody knows what
    /// was attempted ([`Answer::later`]). Before the first read: afterwards the same numbers are this process's
    /// own. Gives how many there were.
    pub fn sweep(&self) -> usize {
        let code = Answer::Deny(libc::EBUSY).code();
        (0..NUMBERS)
            .filter(|number| self.answer_number(*number, code).is_ok())
            .count()
    }
}

impl AsFd for PermissionGroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether a group's fdinfo has a mark on an inode or the whole of this filesystem.
fn names_device(fdinfo: &str, (major, minor): (u32, u32)) -> bool {
    // As the kernel keeps it.
    let device = format!("sdev:{:x}", u64::from(major) << 20 | u64::from(minor));
    let has_mark = |line: &str| {
        let mut words = line.split(' ');
        words.next() == Some("fanotify") && words.any(|word| word == device)
    };
    fdinfo.lines().any(has_mark)
}

/// The accesses in a buffer that the kernel filled. What follows bytes that are not as documented is
/// lost: their programs wait until somebody sweeps, and read no zeros.
fn parse(buf: &[u8]) -> Vec<Access> {
    let (mut all, mut offset) = (Vec::new(), 0);
    loop {
        match Metadata::decode(buf, offset) {
            Ok(None) => return all,
            Ok(Some(metadata)) => {
                let event = buf
                    .get(offset..offset + metadata.event_len)
                    .unwrap_or_default();
                if metadata.fd >= 0 {
                    // SAFETY: the bytes are what read(2) on the group left, so the kernel installed
                    // this descriptor for us, and this is the one place that takes it.
                    let fd = unsafe { OwnedFd::from_raw_fd(metadata.fd) };
                    all.push(Access {
                        fd,
                        attempt: attempt(
                            metadata.mask,
                            event.get(metadata.info..).unwrap_or_default(),
                        ),
                        pid: metadata.pid,
                    });
                } else if metadata.mask & Q_OVERFLOW != 0 {
                    tracing::error!(
                        "the queue of permission events overflowed though it has no limit"
                    );
                }
                offset += metadata.event_len;
            }
            Err(error) => {
                tracing::error!(%error, "permission events cannot be read");
                return all;
            }
        }
    }
}

fn attempt(mask: u64, info: &[u8]) -> Attempt {
    if mask & OPEN_EXEC_PERM != 0 {
        Attempt::Exec
    } else if mask & OPEN_PERM != 0 {
        Attempt::Open
    } else {
        Attempt::Access(range(info).ok().flatten())
    }
}

/// The range among the information records of an event.
fn range(mut info: &[u8]) -> Result<Option<(u64, u64)>, Error> {
    while !info.is_empty() {
        let length = usize::from(u16::from_ne_bytes(chunk(info, 2)?));
        let record = info
            .get(..length)
            .filter(|record| record.len() >= INFO_HEADER_BYTES)
            .ok_or_else(|| malformed(0, "an information record's length does not fit"))?;
        if record.first() == Some(&INFO_TYPE_RANGE) {
            let offset = u64::from_ne_bytes(chunk(record, 8)?);
            let count = u64::from_ne_bytes(chunk(record, 16)?);
            return Ok(Some((offset, count)));
        }
        info = info.get(length..).unwrap_or_default();
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_found_in_fdinfo() {
        let info = "pos:\t0\nflags:\t02004002\nmnt_id:\t16\nino:\t1057\n\
                    fanotify flags:3a event-flags:58000\n\
                    fanotify mnt_id:2f mflags:40 mask:0 ignored_mask:150000\n\
                    fanotify ino:2 sdev:700007 mflags:0 mask:40000 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:02\n\
                    fanotify sdev:28 mflags:0 mask:150000 ignored_mask:0\n";
        assert!(names_device(info, (7, 7)));
        assert!(names_device(info, (0, 40)));
        for other in [(7, 0), (0, 7), (0, 2), (112, 7), (0, 0)] {
            assert!(!names_device(info, other), "{other:?}");
        }
        assert!(!names_device("", (7, 7)));
    }

    #[test]
    fn only_errors_that_the_kernel_takes_are_given() {
        assert_eq!(Answer::Allow.code(), 1);
        assert_eq!(Answer::Deny(libc::EAGAIN).code(), 2 | 11 << 24);
        assert_eq!(Answer::Deny(libc::ENOENT).code(), 2 | 5 << 24);
    }

    #[test]
    fn a_range_is_found_among_other_records() {
        let mut info = vec![9, 0, 8, 0, 1, 2, 3, 4];
        info.extend([INFO_TYPE_RANGE, 0, 24, 0, 0, 0, 0, 0]);
        info.extend(4096_u64.to_ne_bytes());
        info.extend(512_u64.to_ne_bytes());
        assert_eq!(range(&info).ok(), Some(Some((4096, 512))));
        assert_eq!(range(&info[..8]).ok(), Some(None));
        assert!(range(&info[..20]).is_err());
        assert!(range(&[6, 0, 2, 0]).is_err());
        assert_eq!(
            attempt(PRE_ACCESS, &info),
            Attempt::Access(Some((4096, 512)))
        );
        assert_eq!(attempt(OPEN_PERM, &[]), Attempt::Open);
        assert_eq!(attempt(OPEN_EXEC_PERM | OPEN_PERM, &[]), Attempt::Exec);
    }
}
