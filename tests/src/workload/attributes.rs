//! Operations on attributes.

use std::ffi::CStr;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, lchown};
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;

use super::worker::Worker;
use super::{Operation, operation};
use crate::sys::{self, change_flags, remove_xattr, set_xattr};

pub(super) const OPERATIONS: &[Operation] = &[
    operation("chmod", 30, chmod),
    operation("chown", 20, chown),
    operation("set_xattr", 30, |w| {
        let path = w.something()?;
        let len = w.length(300);
        let value = w.bytes(len);
        set_xattr(&path, xattr_name(w), &value)
    }),
    operation("remove_xattr", 12, |w| {
        let path = w.something()?;
        remove_xattr(&path, xattr_name(w))
    }),
    operation("acl", 12, acl),
    operation("acl_default", 6, acl_default),
    operation("remove_acl", 5, |w| {
        remove_xattr(&w.something()?, c"system.posix_acl_access")
    }),
    operation("utimens", 20, utimens),
    operation("set_flag", 8, |w| flags(w, true)),
    // More often, so that not everything is immutable in the end.
    operation("clear_flags", 40, |w| flags(w, false)),
];

fn open_to_look(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

fn chmod(w: &mut Worker) -> io::Result<()> {
    let path = w.something()?;
    let mode = u32::try_from(w.below(0o10000)).expect("a small number");
    // Not by path: that would follow symlinks.
    open_to_look(&path)?.set_permissions(Permissions::from_mode(mode))
}

fn chown(w: &mut Worker) -> io::Result<()> {
    let path = w.something()?;
    let id = |w: &mut Worker| u32::try_from(w.below(70_000)).expect("a small number");
    lchown(path, Some(id(w)), Some(id(w)))
}

fn xattr_name(w: &mut Worker) -> &'static CStr {
    const NAMES: [&CStr; 5] = [
        c"user.a",
        c"user.b",
        c"user.longer name",
        c"trusted.c",
        c"security.d",
    ];
    NAMES[usize::from(w.below(5).to_le_bytes()[0])]
}

/// An ACL as the kernel takes it: version 2, then entries of tag, permissions and id.
fn acl_bytes(w: &mut Worker) -> Vec<u8> {
    let id = u32::try_from(w.below(5000)).expect("a small number");
    let entries: [(u16, u16, u32); 5] = [
        (0x01, 7, u32::MAX),
        (0x02, 6, id),
        (0x04, 5, u32::MAX),
        (0x10, 7, u32::MAX),
        (0x20, 1, u32::MAX),
    ];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn acl(w: &mut Worker) -> io::Result<()> {
    let value = acl_bytes(w);
    set_xattr(&w.something()?, c"system.posix_acl_access", &value)
}

fn acl_default(w: &mut Worker) -> io::Result<()> {
    let value = acl_bytes(w);
    set_xattr(&w.some_directory()?, c"system.posix_acl_default", &value)
}

fn utimens(w: &mut Worker) -> io::Result<()> {
    let path = w.something()?;
    let seconds = i64::try_from(w.below(4_000_000_000)).expect("a small number") - 1_000_000_000;
    let nanoseconds = i64::try_from(w.below(1_000_000_000)).expect("a small number");
    Ok(utimensat(
        AT_FDCWD,
        &path,
        &TimeSpec::new(0, libc::UTIME_OMIT),
        &TimeSpec::new(seconds, nanoseconds),
        UtimensatFlags::NoFollowSymlink,
    )?)
}

fn flags(w: &mut Worker, set: bool) -> io::Result<()> {
    const FLAGS: [u32; 5] = [
        sys::IMMUTABLE_FL,
        sys::APPEND_FL,
        sys::NODUMP_FL,
        sys::NOATIME_FL,
        sys::SYNC_FL,
    ];
    let path = w.something()?;
    let file = open_to_look(&path)?;
    // A device's driver would get the ioctl.
    let meta = file.metadata()?;
    if !meta.is_file() && !meta.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    if set {
        let flag = FLAGS[usize::from(w.below(5).to_le_bytes()[0])];
        change_flags(&file, flag, 0)
    } else {
        change_flags(&file, 0, FLAGS.iter().fold(0, |all, flag| all | flag))
    }
}
