//! How the watched filesystem comes to be seen: mounted out of sight, asked about, then exposed.
//!
//! While nobody holds the permission group, stubs read as zeros. So nothing may reach the filesystem
//! before the group's mark is set, and nothing after the group is closed.

use std::fmt::Display;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use std::time::{Duration, Instant};

use super::others::Other;
use crate::config::Config;
use crate::daemon::{Refusal, refuse};
use crate::sys::mount::{self, Mount, Unexposed, is_device_used, mount_of, mounts};
use crate::sys::permission::{Asked, PermissionGroup};
use crate::sys::superblock;

/// How long a device may stay in use after its last mount is gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// A device, and where everybody sees its filesystem.
#[derive(Clone, Debug)]
pub struct Place {
    device: PathBuf,
    path: PathBuf,
}

/// The filesystem's place, and how it is mounted there.
#[derive(Clone, Debug)]
pub struct Exposure {
    place: Place,
    fs_type: &'static str,
    options: String,
}

impl Exposure {
    /// From the configuration, which names a device; checks that it holds a filesystem that suits.
    pub fn of(config: &Config) -> Result<Option<Self>, Refusal> {
        let Some(named) = &config.device else {
            return Ok(None);
        };
        let advice = "name the block device of an ext4, XFS or btrfs filesystem, best by its path below /dev/disk/by-uuid";
        let device =
            fs::canonicalize(named).map_err(|error| refuse(named.display(), error, advice))?;
        let is_block = fs::metadata(&device).is_ok_and(|meta| meta.file_type().is_block_device());
        if !is_block {
            return Err(refuse(named.display(), "it is no block device", advice));
        }
        let block = superblock::read(&device)
            .map_err(|error| refuse(named.display(), error, advice))?
            .ok_or_else(|| {
                refuse(
                    named.display(),
                    "it holds no ext4, XFS or btrfs filesystem",
                    advice,
                )
            })?;
        if !config.mount.is_dir() {
            return Err(refuse(
                config.mount.display(),
                "there is no such directory",
                "make it: hsmd mounts the filesystem there",
            ));
        }
        Ok(Some(Self {
            place: Place::new(device, config.mount.clone()),
            fs_type: block.fs_type,
            options: config.mount_options.clone(),
        }))
    }

    /// Where everybody sees it.
    pub fn place(&self) -> &Place {
        &self.place
    }

    fn failed(&self, error: crate::sys::Error) -> Refusal {
        refuse(
            self.place.device.display(),
            error,
            "see the kernel's messages (dmesg), and try `mount` by hand",
        )
    }

    /// Mounts it out of sight, and asks about every file of it; [`Self::expose`] is next. A mount that an
    /// hsmd left behind which was killed is taken away first.
    pub fn prepare(
        &self,
        group: &PermissionGroup,
        wanted: Asked,
    ) -> Result<(Unexposed, Asked), Refusal> {
        self.place.clear()?;
        let hidden = Unexposed::mount(&self.place.device, self.fs_type, &self.options)
            .map_err(|error| self.failed(error))?;
        let asked = group
            .mark_filesystem(hidden.root(), wanted)
            .map_err(|error| self.failed(error))?;
        group
            .mark_presence(hidden.root())
            .map_err(|error| self.failed(error))?;
        Ok((hidden, asked))
    }

    /// Lets everybody see it.
    pub fn expose(&self, hidden: Unexposed) -> Result<(), Refusal> {
        hidden
            .expose(&self.place.path)
            .map_err(|error| self.failed(error))
    }

    /// Where it is exposed, and `group` has watched it ever since it was mounted: every access is asked about
    /// again, whatever marks the group has. `None`: it is not exposed, or somebody has unmounted it, and
    /// mounted it again unwatched.
    pub fn take_over(
        &self,
        group: &PermissionGroup,
        wanted: Asked,
    ) -> Result<Option<Asked>, Refusal> {
        let advice = "end all programs that use it, unmount it, and start hsmd again";
        let refused = |error: &dyn Display| refuse(self.place.path.display(), error, advice);
        // While it is open, no other filesystem takes its place.
        let root = fs::File::open(&self.place.path).map_err(|error| refused(&error))?;
        let of_root = format!("/proc/self/fd/{}", root.as_raw_fd());
        let mount = mount_of(Path::new(&of_root)).map_err(|error| refused(&error))?;
        let ours = mount.mount_point == self.place.path && self.place.is_of_device(&mount);
        let watched = group.has_watched(mount.dev);
        if !(ours && watched.map_err(|error| refused(&error))?) {
            return Ok(None);
        }
        let asked = group.mark_filesystem(root.as_fd(), wanted);
        let asked = asked.map_err(|error| refused(&error))?;
        let marked = group.mark_presence(root.as_fd());
        marked.map_err(|error| refused(&error))?;
        Ok(Some(asked))
    }
}

impl Place {
    /// The device's path is the real one, without links.
    pub fn new(device: PathBuf, path: PathBuf) -> Self {
        Self { device, path }
    }

    /// The block device.
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// The mount point.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is mounted there.
    pub fn is_exposed(&self) -> Result<bool, crate::sys::Error> {
        let seen = self.seen()?;
        Ok(seen.iter().any(|mount| mount.mount_point == self.path))
    }

    /// The mounts of the device that this process sees.
    fn seen(&self) -> Result<Vec<Mount>, crate::sys::Error> {
        let all = mounts()?.into_iter();
        Ok(all.filter(|mount| self.is_of_device(mount)).collect())
    }

    fn is_of_device(&self, mount: &Mount) -> bool {
        let device = mount.device().ok();
        let device = device.and_then(|device| fs::canonicalize(device).ok());
        device.is_some_and(|device| device == self.device)
    }

    /// The guard of another hsmd that has the device.
    pub fn other(&self) -> Result<Option<Other>, crate::sys::Error> {
        // One that has not is about to end.
        let used = is_device_used(&self.device)?;
        Ok(used.then(|| Other::of(&self.device)).flatten())
    }

    fn clear(&self) -> Result<(), Refusal> {
        let sys = |error: crate::sys::Error| {
            refuse(self.device.display(), error, "hsmd must be able to open it")
        };
        if !is_device_used(&self.device).map_err(sys)? {
            return Ok(());
        }
        let other = self.other().map_err(sys)?;
        let (here, elsewhere): (Vec<Mount>, Vec<Mount>) = self
            .seen()
            .map_err(sys)?
            .into_iter()
            .partition(|mount| mount.mount_point == self.path);
        if !elsewhere.is_empty() {
            let places = elsewhere.iter().map(|mount| mount.mount_point.display());
            return Err(refuse(
                self.device.display(),
                format!(
                    "it is mounted at {}, where nobody keeps released files from being read as zeros",
                    places
                        .map(|place| place.to_string())
                        .collect::<Vec<_>>()
                        .join(" and ")
                ),
                format!(
                    "unmount it there, and take it out of /etc/fstab: hsmd mounts it at {}",
                    self.path.display()
                ),
            ));
        }
        for mount in &here {
            tracing::warn!(place = %mount.mount_point.display(), "a mount that was left behind is taken away");
            if !self.unmount_left_behind(&mount.mount_point).map_err(sys)? {
                return Err(self.is_used(other.is_some()));
            }
        }
        self.wait_until_closed(other)
    }

    /// Why it cannot be exposed anew.
    fn is_used(&self, guarded: bool) -> Refusal {
        let (how, but) = if guarded {
            ("by an hsmd whose keeper was killed", "")
        } else {
            (
                "without hsmd",
                " (they may have read zeros in place of released files)",
            )
        };
        refuse(
            self.path.display(),
            format!(
                "the filesystem is mounted there already, {how}, and in use by {}",
                self.users()
            ),
            format!("end these programs{but}, unmount it, and start hsmd again"),
        )
    }

    /// What a killed daemon had of it goes a moment after the daemon; the guard of a killed keeper ends its
    /// worker first.
    fn wait_until_closed(&self, other: Option<Other>) -> Result<(), Refusal> {
        let sys = |error: crate::sys::Error| {
            refuse(self.device.display(), error, "hsmd must be able to open it")
        };
        let (mut patience, mut told) = (Instant::now() + PATIENCE, false);
        while is_device_used(&self.device).map_err(sys)? {
            if let Some(other) = other.filter(|other| other.lives()) {
                if !std::mem::replace(&mut told, true) {
                    let guard = other.guard;
                    tracing::warn!(
                        guard,
                        "the hsmd before this one is ending; it is waited for"
                    );
                }
                patience = Instant::now() + PATIENCE;
            }
            if Instant::now() >= patience {
                return Err(refuse(
                    self.device.display(),
                    "it is in use: mounted in another mount namespace (a container), or held by another program",
                    "end what uses it (`lsof` on the device, `findmnt -N PID` for containers), then start hsmd again",
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// False: it is in use. What a killed guard had open there goes a moment after the guard, so nobody has to be
    /// seen using it.
    fn unmount_left_behind(&self, place: &Path) -> Result<bool, crate::sys::Error> {
        let patience = Instant::now() + PATIENCE;
        loop {
            if mount::unmount(place)? {
                return Ok(true);
            }
            if !self.known_users().is_empty() || Instant::now() >= patience {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Takes the public mount away. False: it is in use.
    pub fn hide(&self) -> Result<bool, crate::sys::Error> {
        if !self.is_exposed()? {
            return Ok(true);
        }
        // Somebody may have mounted over it, and that came off first.
        Ok(mount::unmount(&self.path)? && !self.is_exposed()?)
    }

    /// Whether no mount is left anywhere.
    pub fn is_closed(&self) -> bool {
        !is_device_used(&self.device).unwrap_or(true)
    }

    /// Where it is mounted still when the public mount is gone, for messages.
    pub fn left(&self) -> String {
        let here = self.seen().unwrap_or_default();
        let here: Vec<String> = here
            .iter()
            .map(|mount| mount.mount_point.display().to_string())
            .collect();
        if !here.is_empty() {
            return format!("at {}", here.join(" and "));
        }
        let others = self.namespaces();
        if others.is_empty() {
            return "where no process can be told of, or its device is open".to_owned();
        }
        format!("in the mount namespace of {}", named(&others))
    }

    /// Of each other mount namespace that has a mount of the device a process with its id.
    fn namespaces(&self) -> Vec<String> {
        let namespace = |process: &Path| fs::read_link(process.join("ns/mnt")).ok();
        let mut known = vec![namespace(Path::new("/proc/self"))];
        let mut found = Vec::new();
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let path = process.path();
            let its = namespace(&path);
            if its.is_none() || known.contains(&its) {
                continue;
            }
            known.push(its);
            let table = fs::read(path.join("mountinfo")).unwrap_or_default();
            let all = mount::parse_mountinfo(&table).unwrap_or_default();
            if all.iter().any(|mount| self.is_of_device(mount)) {
                let command = fs::read_to_string(path.join("comm")).unwrap_or_default();
                let pid = process.file_name();
                found.push(format!("{} ({})", command.trim_end(), pid.display()));
            }
        }
        found
    }

    /// Which processes, and mounts below it, use the public mount, for messages.
    pub fn users(&self) -> String {
        let users = self.known_users();
        if users.is_empty() {
            return "something that no process can be told of (a loop device, an overlay, an exported or swap file)"
                .to_owned();
        }
        named(&users)
    }

    /// Processes that use the public mount, with their ids, and mounts below it.
    fn known_users(&self) -> Vec<String> {
        let mut users = Vec::new();
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let name = process.file_name();
            let Some(pid) = name
                .to_str()
                .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
            else {
                continue;
            };
            let path = process.path();
            let fds = fs::read_dir(path.join("fd"))
                .into_iter()
                .flatten()
                .flatten();
            let links = fds
                .map(|fd| fd.path())
                .chain(["cwd", "root", "exe"].map(|link| path.join(link)));
            let uses = links
                .filter_map(|link| fs::read_link(link).ok())
                .any(|target| target.starts_with(&self.path));
            if uses {
                let command = fs::read_to_string(path.join("comm")).unwrap_or_default();
                users.push(format!("{} ({pid})", command.trim_end()));
            }
        }
        let below = mounts().unwrap_or_default().into_iter();
        let below = below.filter(|mount| {
            mount.mount_point != self.path && mount.mount_point.starts_with(&self.path)
        });
        users.extend(below.map(|mount| format!("the mount {}", mount.mount_point.display())));
        users
    }
}

/// Some of many, for messages.
fn named(all: &[String]) -> String {
    const NAMED: usize = 8;
    match all.len().saturating_sub(NAMED) {
        0 => all.join(", "),
        more => format!("{} and {more} more", all[..NAMED].join(", ")),
    }
}
