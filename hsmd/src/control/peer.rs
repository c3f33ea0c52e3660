//! Who asks, and what they may ask.
//!
//! The kernel says who is at the other end of the socket (`SO_PEERCRED`, `SO_PEERGROUPS`). Root and
//! the members of the control group may do everything. Others may ask only about files that they may
//! read: the file is opened on a thread that has their rights and nothing else, and never by path
//! with the daemon's own rights. What they may not see and what does not exist look the same.

#![allow(unsafe_code)] // per-thread credentials and SO_PEERGROUPS have no checked wrapper

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::socket::{getsockopt, sockopt};

/// More groups than any account has; the kernel's own limit.
const GROUPS_MAX: usize = 65_536;

/// The process at the other end, as the kernel knew it when it connected.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Its process id.
    pub pid: i32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// What a peer may ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rights {
    /// Everything.
    All,
    /// The state of files that it may read.
    OwnFiles,
}

/// Why a path could not be opened with the peer's rights.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Not below the mount, or written with "..".
    #[error("the path is not below the watched mount")]
    Outside,
    /// The peer may not read it, or it does not exist: both look the same.
    #[error("no file that you may read")]
    Refused,
    /// Something else failed.
    #[error("opening it with your rights failed: {0}")]
    Failed(io::Error),
    /// The daemon could not take the peer's rights.
    #[error("taking the rights of user {uid} failed: {source}")]
    Rights {
        /// Whose.
        uid: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Peer {
    /// Of a connected socket.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        Ok(Self {
            pid: credentials.pid(),
            uid: credentials.uid(),
            gid: credentials.gid(),
            groups: peer_groups(socket)?,
        })
    }

    /// What it may ask, where `control_group` may do everything.
    pub fn rights(&self, control_group: Option<u32>) -> Rights {
        let member = |group| self.gid == group || self.groups.contains(&group);
        if self.uid == 0 || control_group.is_some_and(member) {
            Rights::All
        } else {
            Rights::OwnFiles
        }
    }

    /// A descriptor (`O_PATH`) of what `path`, below `mount`, names for this peer, if it may read it.
    /// Symbolic links and other mounts on the way are refused, so nobody can make the daemon wait.
    pub fn open(&self, mount: &Path, path: &Path) -> Result<OwnedFd, OpenError> {
        let below = path.strip_prefix(mount).map_err(|_| OpenError::Outside)?;
        if below
            .components()
            .any(|part| !matches!(part, std::path::Component::Normal(_)))
        {
            return Err(OpenError::Outside);
        }
        let (peer, mount, below) = (self.clone(), mount.to_owned(), below.to_owned());
        // The thread ends with the rights that it took: they never come back to another use.
        let worker = std::thread::Builder::new()
            .name(format!("open-as-{}", self.uid))
            .spawn(move || {
                peer.become_it().map_err(|source| OpenError::Rights {
                    uid: peer.uid,
                    source,
                })?;
                open_readable(&mount, &below).map_err(refused)
            });
        let failed = |source| OpenError::Rights {
            uid: self.uid,
            source,
        };
        match worker.map_err(failed)?.join() {
            Ok(opened) => opened,
            Err(_) => Err(failed(io::Error::other("the thread ended early"))),
        }
    }

    /// Gives the calling thread the peer's rights to files. The raw calls: libc's wrappers would
    /// change every thread of the process.
    fn become_it(&self) -> io::Result<()> {
        let groups: &[libc::gid_t] = &self.groups;
        // SAFETY: pointer and length are those of a slice that outlives the call.
        let done = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        set_fs_id(libc::SYS_setfsgid, self.gid)?;
        // From 0 to another: the kernel also takes the capabilities that override permissions.
        set_fs_id(libc::SYS_setfsuid, self.uid)
    }
}

/// Tells what the peer's own rights do not give from what fails for everybody.
fn refused(error: io::Error) -> OpenError {
    match error.raw_os_error() {
        Some(
            libc::ENOENT
            | libc::EACCES
            | libc::EPERM
            | libc::ENOTDIR
            | libc::ELOOP
            | libc::EXDEV
            | libc::ENAMETOOLONG,
        ) => OpenError::Refused,
        _ => OpenError::Failed(error),
    }
}

/// setfsuid and setfsgid report no error: they give the id that was there before.
fn set_fs_id(call: libc::c_long, id: u32) -> io::Result<()> {
    // SAFETY: both calls take a number and touch no memory.
    let now = unsafe {
        libc::syscall(call, id);
        libc::syscall(call, u32::MAX)
    };
    if u32::try_from(now) == Ok(id) {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }
}

/// Opens without touching the file itself, then asks whether the calling thread may read it.
fn open_readable(mount: &Path, below: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let no_links = ResolveFlag::RESOLVE_NO_SYMLINKS;
    let how = OpenHow::new()
        .flags(flags | OFlag::O_DIRECTORY)
        .resolve(no_links);
    // nix wants a descriptor; with an absolute path it means nothing.
    let root = openat2(nix::fcntl::AT_FDCWD, mount, how)?;
    if below.as_os_str().is_empty() {
        return readable(root);
    }
    let resolve = no_links | ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_BENEATH;
    let how = OpenHow::new().flags(flags).resolve(resolve);
    readable(openat2(&root, below, how)?)
}

fn readable(fd: OwnedFd) -> io::Result<OwnedFd> {
    let mode = nix::sys::stat::fstat(&fd)?.st_mode;
    if mode & libc::S_IFMT == libc::S_IFLNK {
        // Whoever could come here can read where it points.
        return Ok(fd);
    }
    let flags = libc::AT_EACCESS | libc::AT_EMPTY_PATH;
    let empty = CString::default();
    // SAFETY: the descriptor is open, and the path an empty C string that outlives the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            fd.as_raw_fd(),
            empty.as_ptr(),
            libc::R_OK,
            flags,
        )
    };
    if done == 0 {
        Ok(fd)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn peer_groups(socket: &impl AsFd) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let item = std::mem::size_of::<libc::gid_t>();
        let mut bytes = libc::socklen_t::try_from(groups.len() * item).map_err(io::Error::other)?;
        // SAFETY: pointer and length are those of `groups`; the kernel writes at most that much.
        let done = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let len = usize::try_from(bytes).map_err(io::Error::other)? / item;
        if done == 0 {
            groups.truncate(len);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || len <= groups.len() || len > GROUPS_MAX {
            return Err(error);
        }
        groups.resize(len, 0);
    }
}

/// A group's number, by the name in the configuration.
pub fn group_id(name: &str) -> io::Result<u32> {
    match nix::unistd::Group::from_name(name)? {
        Some(group) => Ok(group.gid.as_raw()),
        None => Err(io::Error::other(format!(
            "there is no group {name}: make it with `groupadd --system {name}`, or correct control_group"
        ))),
    }
}

/// Whether a path is absolute and has nothing in it that means another one: neither "." nor "..",
/// nor a slash too many.
pub fn is_plain(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    let Some(below) = bytes.strip_prefix(b"/") else {
        return false;
    };
    let wrong = |name: &[u8]| name.is_empty() || name == b"." || name == b"..";
    !bytes.contains(&0) && (below.is_empty() || !below.split(|byte| *byte == b'/').any(wrong))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_paths() {
        for good in ["/", "/a", "/a/b", "/a/..b", "/a/b.c"] {
            assert!(is_plain(Path::new(good)), "{good}");
        }
        for bad in [
            "", "a", "/a/", "/a//b", "//a", "/./a", "/a/..", "/a/../b", "/a\0b",
        ] {
            let bad = bad.replace("\\0", "\0");
            assert!(!is_plain(Path::new(&bad)), "{bad}");
        }
    }

    #[test]
    fn rights_come_from_user_and_groups() {
        let peer = |uid, gid, groups: &[u32]| Peer {
            pid: 1,
            uid,
            gid,
            groups: groups.to_vec(),
        };
        assert_eq!(peer(0, 0, &[]).rights(None), Rights::All);
        assert_eq!(peer(1000, 0, &[0]).rights(None), Rights::OwnFiles);
        assert_eq!(peer(1000, 7, &[]).rights(Some(7)), Rights::All);
        assert_eq!(peer(1000, 1000, &[5, 7]).rights(Some(7)), Rights::All);
        assert_eq!(peer(1000, 1000, &[5]).rights(Some(7)), Rights::OwnFiles);
    }
}
