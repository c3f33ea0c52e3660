//! Extended attributes of any inode, ACLs and capabilities included.
//!
//! Works on ordinary and on `O_PATH` descriptors, so that symbolic links and special files can be
//! read without opening them. The stub mark [`STUB_XATTR`] is the daemon's own and is left out, and
//! so are the names under which XFS shows ACLs for a second time.

#![allow(unsafe_code)] // the xattr calls have no checked wrapper

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd};

use super::{Error, last_error};

/// The mark of a released file; never part of what the user sees or the log keeps.
pub const STUB_XATTR: &[u8] = tierfs::stub::XATTR.as_bytes();
/// XFS stores ACLs under these names, in a form of its own, and lists them beside
/// `system.posix_acl_*`, which say the same on every filesystem.
const XFS_ACLS: [&[u8]; 2] = [b"trusted.SGI_ACL_FILE", b"trusted.SGI_ACL_DEFAULT"];
/// The most bytes of a value (`XATTR_SIZE_MAX`).
pub const VALUE_BYTES_MAX: usize = 64 * 1024;
/// The most bytes of the list of names (`XATTR_LIST_MAX`).
const LIST_BYTES_MAX: usize = 64 * 1024;
/// First tries; almost all inodes fit.
const LIST_BYTES_FIRST: usize = 512;
const VALUE_BYTES_FIRST: usize = 1024;

/// Name and value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// All attributes, sorted by name. One that is removed while they are read is left out.
pub fn read_all(fd: BorrowedFd<'_>) -> Result<Vec<Xattr>, Error> {
    let access = Access::of(fd);
    let Some(names) = access.list()? else {
        return Ok(Vec::new());
    };
    let mut all = Vec::new();
    for name in names.split_inclusive(|&b| b == 0) {
        let name = CStr::from_bytes_with_nul(name).map_err(|_| Error::Malformed {
            what: "a list of attribute names",
            offset: 0,
            why: "its last name has no end",
        })?;
        let bytes = name.to_bytes();
        if bytes.is_empty() || bytes == STUB_XATTR || XFS_ACLS.contains(&bytes) {
            continue;
        }
        if let Some(value) = access.get(name)? {
            all.push((bytes.to_vec(), value));
        }
    }
    all.sort_unstable();
    all.dedup_by(|a, b| a.0 == b.0);
    Ok(all)
}

/// One attribute (the stub mark, too). `None`: it is not there.
pub fn read_one(fd: BorrowedFd<'_>, name: &CStr) -> Result<Option<Vec<u8>>, Error> {
    Access::of(fd).get(name)
}

/// By descriptor, or through /proc for `O_PATH` descriptors, which the f-calls refuse.
enum Access<'f> {
    Direct(BorrowedFd<'f>),
    Path(BorrowedFd<'f>, CString),
}

impl<'f> Access<'f> {
    fn of(fd: BorrowedFd<'f>) -> Self {
        let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFL).unwrap_or(0);
        if flags & libc::O_PATH == 0 {
            return Self::Direct(fd);
        }
        // The link leads to the inode itself, and is not followed any further.
        CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .map_or(Self::Direct(fd), |path| Self::Path(fd, path))
    }

    fn fd(&self) -> BorrowedFd<'f> {
        match self {
            Self::Direct(fd) | Self::Path(fd, _) => *fd,
        }
    }

    /// The names, each ended by NUL; `None`: the inode can have none.
    fn list(&self) -> Result<Option<Vec<u8>>, Error> {
        let call = |buf: &mut [u8]| {
            // SAFETY: pointer and length are those of `buf`; the path is NUL-terminated; both
            // outlive the call.
            unsafe {
                match self {
                    Self::Direct(fd) => {
                        libc::flistxattr(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len())
                    }
                    Self::Path(_, path) => {
                        libc::listxattr(path.as_ptr(), buf.as_mut_ptr().cast(), buf.len())
                    }
                }
            }
        };
        match grow(LIST_BYTES_FIRST, LIST_BYTES_MAX, call) {
            Ok(list) => Ok(Some(list)),
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(None),
            Err(e) => Err(Error::on_fd("listxattr", self.fd(), e)),
        }
    }

    fn get(&self, name: &CStr) -> Result<Option<Vec<u8>>, Error> {
        let call = |buf: &mut [u8]| {
            // SAFETY: pointer and length are those of `buf`; name and path are NUL-terminated;
            // all outlive the call.
            unsafe {
                match self {
                    Self::Direct(fd) => libc::fgetxattr(
                        fd.as_raw_fd(),
                        name.as_ptr(),
                        buf.as_mut_ptr().cast(),
                        buf.len(),
                    ),
                    Self::Path(_, path) => libc::getxattr(
                        path.as_ptr(),
                        name.as_ptr(),
                        buf.as_mut_ptr().cast(),
                        buf.len(),
                    ),
                }
            }
        };
        match grow(VALUE_BYTES_FIRST, VALUE_BYTES_MAX, call) {
            Ok(value) => Ok(Some(value)),
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP)) => {
                Ok(None)
            }
            Err(e) => {
                let object = format!(
                    "{} of {}",
                    name.to_bytes().escape_ascii(),
                    super::describe(self.fd())
                );
                Err(Error::call("getxattr", object, e))
            }
        }
    }
}

/// Calls with a larger buffer until the answer fits; `max` is what the kernel itself allows.
fn grow(
    first: usize,
    max: usize,
    call: impl Fn(&mut [u8]) -> libc::ssize_t,
) -> Result<Vec<u8>, std::io::Error> {
    let mut size = first;
    loop {
        let mut buf = vec![0; size];
        if let Ok(length) = usize::try_from(call(&mut buf)) {
            buf.truncate(length);
            buf.shrink_to_fit();
            return Ok(buf);
        }
        let source = last_error();
        if source.raw_os_error() != Some(libc::ERANGE) || size >= max {
            return Err(source);
        }
        size = (size * 8).min(max);
    }
}
