//! What a process is and has: its memory, its patience with the kernel, descriptors from its parent.

#![allow(unsafe_code)] // mlockall, prctl and owning inherited descriptors have no checked wrapper

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use super::{Error, last_error};

/// Permission groups have this number at least; see [`above_others`].
const GROUP_FROM: RawFd = 512;

/// Takes a descriptor over that the parent left open under this number.
pub fn inherit(number: RawFd) -> Result<OwnedFd, Error> {
    let object = || format!("descriptor {number} of the parent process");
    if number <= 2 {
        let source = std::io::Error::from_raw_os_error(libc::EBADF);
        return Err(Error::call("inheriting", object(), source));
    }
    // SAFETY: the number comes from our own parent's command line and is used once; where nothing is
    // open under it, the next call says so, and the value is not dropped.
    let fd = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(number) });
    fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|error| Error::call("inheriting", object(), error))?;
    Ok(std::mem::ManuallyDrop::into_inner(fd))
}

/// A duplicate that a child keeps over exec; drop it after the child was started.
pub fn for_child(fd: &impl AsFd) -> Result<OwnedFd, Error> {
    duplicate(fd.as_fd(), FcntlArg::F_DUPFD(3))
}

/// [`for_child`] of a permission group; see [`above_others`].
pub fn group_for_child(group: &impl AsFd) -> Result<OwnedFd, Error> {
    duplicate(group.as_fd(), FcntlArg::F_DUPFD(GROUP_FROM))
}

/// The permission group under a number above those of all that is opened at start. A process that is
/// killed closes what has the highest number first (Linux 6.18: the last one put on the list of work to
/// do at its end is done first). It must be this group, whose end lets waiting accesses go: closing the
/// notification group before would wait for them, for ever.
pub fn above_others(group: &OwnedFd) -> Result<OwnedFd, Error> {
    duplicate(group.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(GROUP_FROM))
}

fn duplicate(fd: BorrowedFd<'_>, how: FcntlArg<'_>) -> Result<OwnedFd, Error> {
    let number = fcntl(fd, how).map_err(|error| Error::on_fd("fcntl F_DUPFD", fd, error))?;
    // SAFETY: fcntl just made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// How many descriptors this process may have now.
pub fn descriptors_max() -> usize {
    use nix::sys::resource::{Resource, getrlimit};
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// Keeps all of this process in memory: it must answer while the machine swaps.
pub fn lock_memory() -> Result<(), Error> {
    // SAFETY: flags only.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) } == 0 {
        Ok(())
    } else {
        Err(Error::call("mlockall", "this process", last_error()))
    }
}

/// How ready the kernel is to kill this process when memory runs out: -1000 never, 0 as any other.
pub fn set_oom_score(score: i32) -> Result<(), Error> {
    let file = "/proc/self/oom_score_adj";
    fs::write(file, score.to_string()).map_err(|error| Error::call("write", file, error))
}

/// Ends this process at once when the thread that started it ends.
pub fn die_with_parent() -> Result<(), Error> {
    tell_end_of_parent(nix::sys::signal::Signal::SIGKILL)
}

/// Has this process told with a signal when the thread that started it ends. Afterwards see whether it had
/// ended before ([`nix::unistd::getppid`]).
pub fn tell_end_of_parent(signal: nix::sys::signal::Signal) -> Result<(), Error> {
    // SAFETY: numbers only.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_int) } == 0 {
        Ok(())
    } else {
        Err(Error::call(
            "prctl PR_SET_PDEATHSIG",
            "this process",
            last_error(),
        ))
    }
}

/// State and parent of a process, from the text of its stat.
fn state_and_parent(stat: &str) -> Option<(&str, i32)> {
    // The name may have parentheses and spaces in it.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    Some((fields.next()?, fields.next()?.parse().ok()?))
}

/// The parent of a process; `None` where it is gone.
pub fn parent_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    state_and_parent(&stat).map(|(_, parent)| parent)
}

/// Whether a process exists, and is not dead and unburied.
pub fn is_alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    state_and_parent(&stat).is_some_and(|(state, _)| !matches!(state, "Z" | "X"))
}

/// The user of a process; `None` where it is gone.
pub fn user_of(pid: i32) -> Option<u32> {
    fs::metadata(format!("/proc/{pid}"))
        .ok()
        .map(|meta| meta.uid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_of_stat_is_understood() {
        let stat = "12 (a) b (c)) S 1 12 12 0 -1";
        assert_eq!(state_and_parent(stat), Some(("S", 1)));
        assert_eq!(state_and_parent("12 (a"), None);
        let own = i32::try_from(std::process::id()).expect("a pid");
        assert_eq!(parent_of(own), Some(nix::unistd::getppid().as_raw()));
        assert!(is_alive(own));
        assert_eq!(parent_of(-1), None);
        assert!(!is_alive(-1));
    }
}
