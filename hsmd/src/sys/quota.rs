//! Quotas as their owners have them, not as root has them.

#![allow(unsafe_code)] // capget, capset and quotactl_fd have no checked wrapper

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{Error, last_error};

const VERSION_3: u32 = 0x2008_0522;
/// capabilities(7): with it the kernel lets quotas be exceeded.
const CAP_SYS_RESOURCE: u32 = 24;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Set {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Of the calling thread.
fn get() -> Result<[Set; 2], io::Error> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    let mut sets = [Set::default(); 2];
    // SAFETY: a header and two sets, as version 3 has them, which outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_capget,
            &raw mut header,
            (&raw mut sets).cast::<Set>(),
        )
    };
    if result == 0 {
        Ok(sets)
    } else {
        Err(last_error())
    }
}

fn set(sets: [Set; 2]) -> Result<(), io::Error> {
    let mut header = Header {
        version: VERSION_3,
        pid: 0,
    };
    // SAFETY: as in `get`; the kernel only reads the sets.
    let result = unsafe {
        libc::syscall(
            libc::SYS_capset,
            &raw mut header,
            (&raw const sets).cast::<Set>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(last_error())
    }
}

/// A unit of the limits, bytes.
const BLOCK: u64 = 1024;

/// Bytes that the hard limits of a user and a group leave them on the filesystem of `fd`, the smaller
/// number; `None` where neither has a limit, or the kernel does not say.
pub fn left(fd: BorrowedFd<'_>, uid: u32, gid: u32) -> Option<u64> {
    let user = left_of(fd, libc::USRQUOTA, uid);
    let group = left_of(fd, libc::GRPQUOTA, gid);
    user.into_iter().chain(group).min()
}

fn left_of(fd: BorrowedFd<'_>, kind: libc::c_int, id: u32) -> Option<u64> {
    // SAFETY: all zeros is a value of this structure of numbers.
    let mut quota: libc::dqblk = unsafe { std::mem::zeroed() };
    let command = libc::QCMD(libc::Q_GETQUOTA, kind);
    // SAFETY: a live descriptor, numbers, and a structure of the size that this command writes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_quotactl_fd,
            fd.as_raw_fd(),
            command,
            id,
            &raw mut quota,
        )
    };
    (result == 0 && quota.dqb_bhardlimit > 0).then(|| {
        let hard = quota.dqb_bhardlimit.saturating_mul(BLOCK);
        hard.saturating_sub(quota.dqb_curspace)
    })
}

/// Does something on this thread that the kernel holds to the quotas of the files' owners, as it would if
/// the owner did it: root is let past them otherwise (ext4), without a word.
pub fn held_to<T>(action: impl FnOnce() -> T) -> Result<T, Error> {
    let failed = |call| move |error| Error::call(call, "CAP_SYS_RESOURCE of a thread", error);
    let before = get().map_err(failed("capget"))?;
    let mut less = before;
    less[0].effective &= !(1 << CAP_SYS_RESOURCE);
    if less == before {
        return Ok(action());
    }
    set(less).map_err(failed("capset"))?;
    let done = action();
    // It is still permitted, so this does not fail.
    set(before).map_err(failed("capset"))?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limit_is_none() {
        let here = std::fs::File::open("/").expect("the root");
        assert_eq!(left(std::os::fd::AsFd::as_fd(&here), 54_321, 54_321), None);
    }

    #[test]
    fn the_capability_is_away_meanwhile_and_comes_back() {
        let has = || get().is_ok_and(|sets| sets[0].effective & (1 << CAP_SYS_RESOURCE) != 0);
        let before = has();
        let within = held_to(has).expect("to be held to quotas");
        assert!(!within);
        assert_eq!(has(), before);
    }
}
