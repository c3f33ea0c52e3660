//! The filesystem to watch: whether it can be, and what lies on it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use super::Findings;
use crate::sys::fanotify::Group;
use crate::sys::mount::{Mount, PrivateMount, fs_uuid, mount_of};
use crate::sys::stat::{FileKind, Stat, stat_of};
use crate::sys::{Error, superblock};

/// Below this ext4 has no room for the nanoseconds of times.
const EXT4_INODE_BYTES_MIN: u16 = 256;
/// Loop devices may lie on files on loop devices; deeper is a circle.
const LOOP_DEPTH_MAX: usize = 8;

/// A filesystem that can be watched.
#[derive(Debug)]
pub struct Watched {
    /// Its mount.
    pub mount: Mount,
    /// Its block device.
    pub device: PathBuf,
    /// Its UUID.
    pub uuid: [u8; 16],
    dev: (u32, u32),
}

impl Watched {
    /// Whether an existing path lies on it, links followed: on the same device, on another
    /// subvolume of the same btrfs, or on a loop device over a file that does.
    pub fn holds(&self, path: &Path) -> Result<bool, Error> {
        self.holds_within(path, LOOP_DEPTH_MAX)
    }

    fn holds_within(&self, path: &Path, depth: usize) -> Result<bool, Error> {
        let stat = stat_path(path)?;
        if stat.dev == self.dev {
            return Ok(true);
        }
        let mount = mount_of(path)?;
        if mount.fs_type == "btrfs" && self.mount.fs_type == "btrfs" {
            let at = File::open(&mount.mount_point)
                .map_err(|e| Error::call("open", mount.mount_point.display().to_string(), e))?;
            if fs_uuid(&mount, at.as_fd())? == self.uuid {
                return Ok(true);
            }
        }
        match loop_file(&mount) {
            Some(file) if depth > 0 && file.exists() => self.holds_within(&file, depth - 1),
            _ => Ok(false),
        }
    }
}

/// The file under a loop device, or under the one that this is a partition of.
fn loop_file(mount: &Mount) -> Option<PathBuf> {
    let name = Path::new(&mount.source).file_name()?;
    let block = Path::new("/sys/class/block")
        .join(name)
        .canonicalize()
        .ok()?;
    let text = [block.as_path(), block.parent()?]
        .iter()
        .find_map(|at| std::fs::read_to_string(at.join("loop/backing_file")).ok())?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

/// statx of a path, following links.
pub(super) fn stat_path(path: &Path) -> Result<Stat, Error> {
    use nix::fcntl::{OFlag, open};
    let fd = open(
        path,
        OFlag::O_PATH | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .map_err(|e| Error::call("open", path.display().to_string(), e))?;
    stat_of(fd.as_fd())
}

/// Examines the configured mount. `None` where it cannot be watched; then a refusal says why.
pub(super) fn examine(path: &Path, privileged: bool, found: &mut Findings) -> Option<Watched> {
    let mount = examine_mount(path, found)?;
    let stat = match stat_path(path) {
        Ok(stat) => stat,
        Err(e) => {
            found.refuse(path.display(), e.to_string(), "see the kernel log");
            return None;
        }
    };
    let device = match mount.device() {
        Ok(device) => device,
        Err(e) => {
            found.refuse(path.display(), e.to_string(), "check /dev");
            return None;
        }
    };
    if mount.read_only() {
        found.warn(
            path.display(),
            "it is mounted read-only, so that nothing can change",
            "mount it for writing, unless that is meant (the kernel log says if a disk error did it)",
        );
    }
    let uuid = examine_identity(path, &mount, &device, found)?;
    if privileged {
        try_to_watch(path, &mount, found);
    }
    Some(Watched {
        dev: stat.dev,
        mount,
        device,
        uuid,
    })
}

/// That it is the mount point of a suitable filesystem.
fn examine_mount(path: &Path, found: &mut Findings) -> Option<Mount> {
    let advice = "name the mount point of an ext4, XFS or btrfs filesystem";
    let stat = match stat_path(path) {
        Ok(stat) => stat,
        Err(e) if e.is_gone() => {
            found.refuse(
                path.display(),
                "there is no such directory",
                format!("make and mount it, or {advice}"),
            );
            return None;
        }
        Err(e) => {
            found.refuse(path.display(), e.to_string(), advice);
            return None;
        }
    };
    if stat.kind != FileKind::Directory {
        found.refuse(path.display(), "it is not a directory", advice);
        return None;
    }
    let mount = match mount_of(path) {
        Ok(mount) => mount,
        Err(e) => {
            found.refuse(path.display(), e.to_string(), advice);
            return None;
        }
    };
    if let Some((reason, advice)) = unsuitable(&mount.fs_type) {
        let reason = format!("it is {}, {reason}", mount.fs_type);
        found.refuse(path.display(), reason, advice);
        return None;
    }
    let canonical = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    if canonical != mount.mount_point {
        found.refuse(
            path.display(),
            format!("it is not a mount point, but a directory of the filesystem at {}", mount.mount_point.display()),
            format!("mount the filesystem to watch there, or name {}: a filesystem is watched as a whole", mount.mount_point.display()),
        );
        return None;
    }
    if mount.fs_type != "btrfs" && mount.root != Path::new("/") {
        found.refuse(
            path.display(),
            format!(
                "only the directory {} of its filesystem is mounted there",
                mount.root.display()
            ),
            "mount the whole filesystem, and name that mount point",
        );
        return None;
    }
    Some(mount)
}

/// Why a type of filesystem cannot be watched, and what to do.
pub(super) fn unsuitable(fs_type: &str) -> Option<(&'static str, &'static str)> {
    const USE: &str = "use a filesystem of type ext4, XFS or btrfs";
    Some(match fs_type {
        "ext4" | "xfs" | "btrfs" => return None,
        "ext2" | "ext3" => (
            "which keeps times of whole seconds only, so that two changes within a second cannot be told apart",
            "convert it to ext4 with inodes of 256 bytes (a fresh mkfs.ext4), or use XFS or btrfs",
        ),
        "tmpfs" | "ramfs" | "devtmpfs" | "hugetlbfs" => (
            "which lives in memory: its file handles do not outlive a mount, and nothing could be rebuilt where it was",
            USE,
        ),
        "overlay" => (
            "which shows other filesystems in layers: its handles are not lasting, and changes in the layers are not reported",
            "watch the filesystem that holds the upper directory, or use ext4, XFS or btrfs",
        ),
        "nfs" | "nfs4" | "cifs" | "smb3" | "9p" | "virtiofs" | "ceph" | "afs" | "lustre"
        | "glusterfs" => (
            "which is on a network: what other machines change there raises no event here",
            "run hsmd on the machine that has the disk",
        ),
        "fuse" | "fuseblk" => (
            "a filesystem in user space (FUSE), which reports no events with handles",
            USE,
        ),
        other if other.starts_with("fuse.") => (
            "a filesystem in user space (FUSE), which reports no events with handles",
            USE,
        ),
        "squashfs" | "iso9660" | "udf" | "erofs" | "cramfs" => (
            "which cannot change, so that there is nothing to log",
            "copy it to ext4, XFS or btrfs, or keep it as it is",
        ),
        "proc" | "sysfs" | "cgroup" | "cgroup2" | "devpts" | "debugfs" | "tracefs"
        | "securityfs" => ("which has no files but the kernel's own", USE),
        _ => ("which hsmd was not made for or tested with", USE),
    })
}

/// Its UUID, and on ext4 the size of its inodes.
fn examine_identity(
    path: &Path,
    mount: &Mount,
    device: &Path,
    found: &mut Findings,
) -> Option<[u8; 16]> {
    let uuid = File::open(path)
        .map_err(|e: io::Error| Error::call("open", path.display().to_string(), e))
        .and_then(|dir| fs_uuid(mount, dir.as_fd()));
    let uuid = match uuid {
        Ok(uuid) => uuid,
        Err(e) => {
            found.refuse(
                path.display(),
                e.to_string(),
                "hsmd must be able to read its block device",
            );
            return None;
        }
    };
    if mount.fs_type != "ext4" {
        return Some(uuid);
    }
    match superblock::read(device) {
        Ok(block) => {
            let bytes = block.and_then(|b| b.ext4_inode_bytes).unwrap_or(0);
            if bytes < EXT4_INODE_BYTES_MIN {
                found.refuse(
                    path.display(),
                    format!("it is ext4 with inodes of {bytes} bytes, which keep times of whole seconds only, so that two changes within a second cannot be told apart"),
                    "make it anew with mkfs.ext4 -I 256 and copy the files over, or use XFS or btrfs",
                );
            }
        }
        Err(e) => found.refuse(
            device.display(),
            e.to_string(),
            "hsmd must be able to read its block device",
        ),
    }
    Some(uuid)
}

/// Does what the daemon will do first, and undoes it.
fn try_to_watch(path: &Path, mount: &Mount, found: &mut Findings) {
    let tried = PrivateMount::open(mount)
        .and_then(|private| Group::new_notification()?.mark_filesystem(private.root()));
    if let Err(e) = tried {
        let advice = "hsmd needs Linux 5.17 or later with CONFIG_FANOTIFY=y, and this filesystem's support of it";
        found.refuse(path.display(), format!("it cannot be watched: {e}"), advice);
    }
}
