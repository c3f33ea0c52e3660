//! Which filesystem lies where, and the daemon's own view of the watched one.
//!
//! The daemon works through a private mount: nothing mounted over directories of the public one
//! hides files from it, atime stays as it is, and devices, programs and links on it have no effect.
//! On btrfs it shows the whole filesystem (subvolid=5), which is also what can be marked.

#![allow(unsafe_code)] // open_tree, mount_setattr, fsopen and their like have no checked wrapper

use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::Mode;

use super::{Error, last_error, superblock};

const MOUNTINFO: &str = "/proc/self/mountinfo";

// From linux/mount.h; libc has them only for some targets.
const OPEN_TREE_CLONE: libc::c_uint = 1;
const OPEN_TREE_CLOEXEC: libc::c_uint = 0o2_000_000;
const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_SET_FLAG: libc::c_uint = 0;
const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
const ATTR_NOSUID: u64 = 0x2;
const ATTR_NODEV: u64 = 0x4;
const ATTR_NOEXEC: u64 = 0x8;
const ATTR_ATIME_MASK: u64 = 0x70;
const ATTR_RDONLY: u64 = 0x1;
const ATTR_NOATIME: u64 = 0x10;
const ATTR_STRICTATIME: u64 = 0x20;
const ATTR_NODIRATIME: u64 = 0x80;
const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
const ATTRS: u64 = ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC | ATTR_NOATIME;

/// A line of /proc/self/mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The mount's number, as in [`super::stat::Stat::mount_id`].
    pub id: u64,
    /// Device number of the filesystem; not that of btrfs subvolumes.
    pub dev: (u32, u32),
    /// Which directory of the filesystem is mounted; "/" for all of it.
    pub root: PathBuf,
    /// Where.
    pub mount_point: PathBuf,
    /// Options of this mount.
    pub options: String,
    /// `ext4`, `xfs`, `btrfs`, ...
    pub fs_type: String,
    /// The device, usually.
    pub source: OsString,
    /// Options of the filesystem.
    pub super_options: String,
}

impl Mount {
    /// Whether the mount or the filesystem is read-only.
    pub fn read_only(&self) -> bool {
        has_option(&self.options, "ro") || has_option(&self.super_options, "ro")
    }

    /// The path of the block device.
    pub fn device(&self) -> Result<PathBuf, Error> {
        let is_block =
            |path: &Path| fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
        let source = PathBuf::from(&self.source);
        let matches = |path: &Path| {
            self.fs_type == "btrfs"
                || fs::metadata(path).is_ok_and(|m| {
                    let rdev = m.rdev();
                    (libc::major(rdev), libc::minor(rdev)) == self.dev
                })
        };
        if source.is_absolute() && is_block(&source) && matches(&source) {
            return Ok(source);
        }
        let (major, minor) = self.dev;
        let by_number = PathBuf::from(format!("/dev/block/{major}:{minor}"));
        let by_name = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))
            .ok()
            .and_then(|text| {
                let name = text
                    .lines()
                    .find_map(|line| line.strip_prefix("DEVNAME="))?;
                Some(Path::new("/dev").join(name))
            });
        if let Some(path) = [Some(by_number), by_name]
            .into_iter()
            .flatten()
            .find(|p| is_block(p))
        {
            return Ok(path);
        }
        Err(Error::Unsupported {
            object: self.mount_point.display().to_string(),
            what: "finding its block device",
            why: format!(
                "{} is none, and no node for {major}:{minor} is in /dev; make one visible there",
                source.display()
            ),
        })
    }
}

fn has_option(options: &str, wanted: &str) -> bool {
    options.split(',').any(|option| option == wanted)
}

/// All mounts that this process sees.
pub fn mounts() -> Result<Vec<Mount>, Error> {
    let text = fs::read(MOUNTINFO).map_err(|e| Error::call("read", MOUNTINFO, e))?;
    parse_mountinfo(&text)
}

/// The mount that `path` lies on, after following links.
pub fn mount_of(path: &Path) -> Result<Mount, Error> {
    let fd = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|e| Error::call("open", path.display().to_string(), e))?;
    let id = super::stat::stat_of(fd.as_fd())?.mount_id;
    let unknown = || Error::Unsupported {
        object: path.display().to_string(),
        what: "finding its mount",
        why: format!("the kernel does not say it, or {MOUNTINFO} lacks it; it needs Linux 5.8"),
    };
    let id = id.ok_or_else(unknown)?;
    mounts()?
        .into_iter()
        .find(|mount| mount.id == id)
        .ok_or_else(unknown)
}

/// Parses the text of mountinfo, proc(5).
pub fn parse_mountinfo(text: &[u8]) -> Result<Vec<Mount>, Error> {
    let mut offset = 0;
    let mut all = Vec::new();
    for line in text.split(|&b| b == b'\n') {
        if !line.is_empty() {
            all.push(parse_line(line).ok_or(Error::Malformed {
                what: MOUNTINFO,
                offset,
                why: "a line has not the fields that proc(5) describes",
            })?);
        }
        offset += line.len() + 1;
    }
    Ok(all)
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let mut next = || fields.next();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let id = std::str::from_utf8(next()?).ok()?.parse().ok()?;
    let _parent = next()?;
    let (major, minor) = std::str::from_utf8(next()?).ok()?.split_once(':')?;
    let dev = (major.parse().ok()?, minor.parse().ok()?);
    let root = PathBuf::from(unescape(next()?));
    let mount_point = PathBuf::from(unescape(next()?));
    let options = text(next()?);
    while next()? != b"-" {}
    Some(Mount {
        id,
        dev,
        root,
        mount_point,
        options,
        fs_type: text(next()?),
        source: unescape(next()?),
        super_options: text(next()?),
    })
}

/// Undoes the octal escapes of space, tab, newline, backslash and hash.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.first_chunk::<3>().filter(|_| first == b'\\');
        let value =
            octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        if let Some(value) = value {
            out.push(value);
            rest = &tail[3..];
        } else {
            out.push(first);
            rest = tail;
        }
    }
    OsString::from_vec(out)
}

/// The daemon's own mount of the watched filesystem; it ends when this is dropped.
#[derive(Debug)]
pub struct PrivateMount {
    tree: OwnedFd,
    root: OwnedFd,
}

impl PrivateMount {
    /// Of the whole filesystem that is mounted at `mount`.
    pub fn open(mount: &Mount) -> Result<Self, Error> {
        let tree = if mount.fs_type == "btrfs" {
            mount_btrfs(mount)?
        } else {
            clone_tree(mount)?
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = openat(&tree, ".", flags, Mode::empty())
            .map_err(|e| Error::call("openat", "the root of the private mount", e))?;
        Ok(Self { tree, root })
    }

    /// The root directory, open for reading: to list, to open handles below, to mark.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The root directory as `O_PATH`.
    pub fn tree(&self) -> BorrowedFd<'_> {
        self.tree.as_fd()
    }
}

/// The descriptor that a mount call made, or its error.
fn owned(result: libc::c_long, call: &'static str, object: &Path) -> Result<OwnedFd, Error> {
    match i32::try_from(result) {
        // SAFETY: the call has just made this descriptor for us; nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(Error::call(
            call,
            object.display().to_string(),
            last_error(),
        )),
    }
}

fn clone_tree(mount: &Mount) -> Result<OwnedFd, Error> {
    let path = &mount.mount_point;
    if mount.root != Path::new("/") {
        return Err(Error::Unsupported {
            object: path.display().to_string(),
            what: "watching it",
            why: format!(
                "only the directory {} of its filesystem is mounted there; mount the whole \
                 filesystem and name that mount point",
                mount.root.display()
            ),
        });
    }
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let public = open(path, flags, Mode::empty())
        .map_err(|e| Error::call("open", path.display().to_string(), e))?;
    let at_empty = libc::AT_EMPTY_PATH.cast_unsigned();
    // SAFETY: a live descriptor, an empty NUL-terminated path and flags.
    let tree = unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            public.as_raw_fd(),
            c"".as_ptr(),
            OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | at_empty,
        )
    };
    let tree = owned(tree, "open_tree", path)?;
    set_attributes(&tree, path)?;
    Ok(tree)
}

/// The kernel's `struct mount_attr`.
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

fn set_attributes(tree: &OwnedFd, path: &Path) -> Result<(), Error> {
    let attr = MountAttr {
        attr_set: ATTRS,
        // The public mount may be read-only, recall writes all the same.
        attr_clr: ATTR_ATIME_MASK | ATTR_RDONLY,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: a live descriptor, an empty NUL-terminated path, and a structure whose size is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH.cast_unsigned(),
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result != 0 {
        let object = path.display().to_string();
        return Err(Error::call("mount_setattr", object, last_error()));
    }
    Ok(())
}

fn mount_btrfs(mount: &Mount) -> Result<OwnedFd, Error> {
    let device = mount.device()?;
    let mut options = vec!["subvolid=5"];
    if has_option(&mount.super_options, "ro") {
        options.push("ro");
    }
    new_mount(&device, "btrfs", &options, ATTRS)
}

/// A new mount that nobody sees yet, with options of the filesystem (`name` or `name=value`).
fn new_mount(
    device: &Path,
    fs_type: &str,
    options: &[&str],
    attributes: u64,
) -> Result<OwnedFd, Error> {
    let text = |bytes: &[u8]| {
        CString::new(bytes)
            .map_err(|e| Error::call("fsconfig", device.display().to_string(), io::Error::from(e)))
    };
    let name = text(fs_type.as_bytes())?;
    // SAFETY: a NUL-terminated name and flags.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) };
    let context = owned(context, "fsopen", device)?;
    let source = text(device.as_os_str().as_bytes())?;
    let set = |command, key: Option<&CStr>, value: Option<&CStr>| {
        configure(&context, command, key, value).map_err(|e| context_error(&context, device, e))
    };
    set(FSCONFIG_SET_STRING, Some(c"source"), Some(&source))?;
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => set(
                FSCONFIG_SET_STRING,
                Some(&text(key.as_bytes())?),
                Some(&text(value.as_bytes())?),
            )?,
            None => set(FSCONFIG_SET_FLAG, Some(&text(option.as_bytes())?), None)?,
        }
    }
    set(FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: a live descriptor and flags.
    let tree = unsafe {
        libc::syscall(
            libc::SYS_fsmount,
            context.as_raw_fd(),
            FSMOUNT_CLOEXEC,
            attributes,
        )
    };
    owned(tree, "fsmount", device)
}

/// The options of a mount, as opposed to those of its filesystem.
const MOUNT_OPTIONS: [(&str, u64); 8] = [
    ("nosuid", ATTR_NOSUID),
    ("nodev", ATTR_NODEV),
    ("noexec", ATTR_NOEXEC),
    ("noatime", ATTR_NOATIME),
    ("strictatime", ATTR_STRICTATIME),
    ("nodiratime", ATTR_NODIRATIME),
    ("relatime", 0),
    ("defaults", 0),
];

/// A mount of the watched filesystem that nobody sees before [`Unexposed::expose`].
#[derive(Debug)]
pub struct Unexposed {
    tree: OwnedFd,
    root: OwnedFd,
}

impl Unexposed {
    /// Mounts a device. `options` are separated by commas, as in fstab(5).
    pub fn mount(device: &Path, fs_type: &str, options: &str) -> Result<Self, Error> {
        let (mut of_filesystem, mut attributes) = (Vec::new(), 0);
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match MOUNT_OPTIONS.iter().find(|(name, _)| *name == option) {
                Some((_, attribute)) => attributes |= attribute,
                None => of_filesystem.push(option),
            }
        }
        let tree = new_mount(device, fs_type, &of_filesystem, attributes)?;
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = openat(&tree, ".", flags, Mode::empty())
            .map_err(|e| Error::call("openat", device.display().to_string(), e))?;
        Ok(Self { tree, root })
    }

    /// The root directory.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Lets everybody see it at `place`.
    pub fn expose(self, place: &Path) -> Result<(), Error> {
        let path = CString::new(place.as_os_str().as_bytes()).map_err(|e| {
            Error::call(
                "move_mount",
                place.display().to_string(),
                io::Error::from(e),
            )
        })?;
        // SAFETY: a live descriptor, NUL-terminated paths and flags.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_mount,
                self.tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                path.as_ptr(),
                MOVE_MOUNT_F_EMPTY_PATH,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(Error::call(
                "move_mount",
                place.display().to_string(),
                last_error(),
            ))
        }
    }
}

/// Takes the topmost mount at `place` away. False: somebody uses it.
pub fn unmount(place: &Path) -> Result<bool, Error> {
    match nix::mount::umount2(place, nix::mount::MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(true),
        Err(nix::Error::EBUSY) => Ok(false),
        Err(e) => Err(Error::call("umount", place.display().to_string(), e)),
    }
}

/// Whether anything has the block device mounted, in whatever mount namespace.
pub fn is_device_used(device: &Path) -> Result<bool, Error> {
    let flags = OFlag::O_RDONLY | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    match open(device, flags, Mode::empty()) {
        Ok(_) => Ok(false),
        Err(nix::Error::EBUSY) => Ok(true),
        Err(e) => Err(Error::call("open", device.display().to_string(), e)),
    }
}

fn configure(
    context: &OwnedFd,
    command: libc::c_uint,
    key: Option<&CStr>,
    value: Option<&CStr>,
) -> Result<(), io::Error> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: a live descriptor, and NUL-terminated strings or null where the command has none.
    let result = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            pointer(key),
            pointer(value),
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(last_error())
    }
}

/// The error with what the kernel wrote about it into the context.
fn context_error(context: &OwnedFd, device: &Path, source: io::Error) -> Error {
    let mut message = [0; 512];
    let length = nix::unistd::read(context, &mut message).unwrap_or(0);
    let said = OsStr::from_bytes(message.get(..length).unwrap_or_default());
    let object = format!("{} (subvolid=5) {}", device.display(), said.display());
    Error::call("fsconfig", object.trim_end().to_owned(), source)
}

/// The kernel's `struct fsuuid2`.
#[repr(C)]
pub struct FsUuid {
    len: u8,
    uuid: [u8; 16],
}

nix::ioctl_read!(fs_ioc_getfsuuid, 0x15, 0, FsUuid);

/// The filesystem's UUID, which unlike its device number stays the same. `dir` is any open
/// directory of it.
pub fn fs_uuid(mount: &Mount, dir: BorrowedFd<'_>) -> Result<[u8; 16], Error> {
    let mut answer = FsUuid {
        len: 0,
        uuid: [0; 16],
    };
    // SAFETY: the kernel writes a struct fsuuid2 through the pointer, which is live.
    if unsafe { fs_ioc_getfsuuid(dir.as_raw_fd(), &raw mut answer) }.is_ok() && answer.len == 16 {
        return Ok(answer.uuid);
    }
    let device = mount.device()?;
    superblock::read(&device)?
        .map(|block| block.uuid)
        .ok_or_else(|| Error::Unsupported {
            object: device.display().to_string(),
            what: "reading the filesystem's UUID",
            why: "it has no superblock of ext4, XFS or btrfs".into(),
        })
}
