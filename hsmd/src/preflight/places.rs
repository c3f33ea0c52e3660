//! The places where the daemon keeps its files: spool, catalog, socket, volumes.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

use super::watched::stat_path;
use super::{Findings, Watched};
use crate::config::Config;
use crate::sys::mount::mount_of;
use crate::sys::stat::{FileKind, Stat};

/// Checks all of them.
pub(super) fn check(config: &Config, watched: Option<&Watched>, found: &mut Findings) {
    let own = [
        ("the spool", &config.spool, FileKind::Directory),
        ("the catalog", &config.catalog, FileKind::Regular),
        ("the control socket", &config.socket, FileKind::Socket),
    ];
    for (what, path, kind) in own {
        if let Some(place) = Place::find(what, path, found) {
            place.check_not_watched(watched, found);
            place.check_kind(kind, found);
            place.check_writable(kind, found);
        }
    }
    check_memory("the spool", &config.spool, found);
    check_spool_room(config, found);
    for volume in config.volumes() {
        check_volume(volume, watched, found);
    }
    check_disks(config, found);
}

/// A path that is or will be: itself where it exists, else the directory that it will be made in.
struct Place<'p> {
    what: &'static str,
    path: &'p Path,
    existing: PathBuf,
    stat: Stat,
}

impl<'p> Place<'p> {
    fn find(what: &'static str, path: &'p Path, found: &mut Findings) -> Option<Self> {
        for existing in path.ancestors() {
            match stat_path(existing) {
                Ok(stat) => {
                    return Some(Self {
                        what,
                        path,
                        existing: existing.to_owned(),
                        stat,
                    });
                }
                Err(e) if e.is_gone() => {
                    if fs::symlink_metadata(existing).is_ok_and(|m| m.is_symlink()) {
                        found.refuse(
                            path.display(),
                            format!(
                                "{what} would lie behind {}, a symbolic link that leads nowhere",
                                existing.display()
                            ),
                            "make what it points to, or remove it",
                        );
                        return None;
                    }
                }
                Err(e) => {
                    found.refuse(
                        path.display(),
                        format!("{what} cannot be reached: {e}"),
                        "choose another place",
                    );
                    return None;
                }
            }
        }
        None
    }

    fn exists(&self) -> bool {
        self.existing == self.path
    }

    fn check_not_watched(&self, watched: Option<&Watched>, found: &mut Findings) {
        let Some(watched) = watched else {
            return;
        };
        let at = watched.mount.mount_point.display();
        match watched.holds(&self.existing) {
            Ok(false) => {}
            Ok(true) => found.refuse(
                self.path.display(),
                format!("{} lies on the watched filesystem ({at}): it would log itself, and be lost with it", self.what),
                "choose a place on another disk",
            ),
            Err(e) => found.refuse(
                self.path.display(),
                format!("whether {} lies on the watched filesystem ({at}) cannot be found out: {e}", self.what),
                "choose a place on another disk",
            ),
        }
    }

    fn check_kind(&self, wanted: FileKind, found: &mut Findings) {
        // Where it does not exist yet, what exists must be a directory to make it in.
        let wanted = if self.exists() {
            wanted
        } else {
            FileKind::Directory
        };
        let name = match wanted {
            FileKind::Directory => "a directory",
            FileKind::Socket => "a socket",
            _ => "a file",
        };
        if self.stat.kind != wanted {
            found.refuse(
                self.path.display(),
                format!(
                    "{} cannot be there: {} exists and is not {name}",
                    self.what,
                    self.existing.display()
                ),
                "move that away, or choose another place",
            );
        }
    }

    /// That it, or the directory that it will be made in, can be written.
    fn check_writable(&self, kind: FileKind, found: &mut Findings) {
        let made_within = match (self.exists(), kind) {
            (true, FileKind::Directory) | (false, _) => self.existing.as_path(),
            // SQLite puts files beside the catalog; the socket is made anew.
            (true, _) => self.existing.parent().unwrap_or(&self.existing),
        };
        let wanted = AccessFlags::W_OK | AccessFlags::X_OK;
        let result = access(made_within, wanted).and_then(|()| match (self.exists(), kind) {
            (true, FileKind::Regular) => access(self.path, AccessFlags::W_OK | AccessFlags::R_OK),
            _ => Ok(()),
        });
        let Err(error) = result else {
            return;
        };
        let why = match error {
            nix::Error::EROFS => "its filesystem is mounted read-only".to_owned(),
            nix::Error::EPERM => "it is immutable (lsattr shows i)".to_owned(),
            nix::Error::EACCES => "this process may not write there".to_owned(),
            other => other.desc().to_owned(),
        };
        found.refuse(
            self.path.display(),
            format!(
                "{} cannot be written below {}: {why}",
                self.what,
                made_within.display()
            ),
            "make that writable, or choose another place",
        );
    }
}

/// Whether what is synced there survives.
fn check_memory(what: &str, path: &Path, found: &mut Findings) {
    let Some(existing) = path.ancestors().find(|p| p.exists()) else {
        return;
    };
    if mount_of(existing).is_ok_and(|m| matches!(m.fs_type.as_str(), "tmpfs" | "ramfs")) {
        found.warn(
            path.display(),
            format!("{what} lies in memory (tmpfs): what is logged there is lost with the power"),
            "choose a place on a disk",
        );
    }
}

fn check_spool_room(config: &Config, found: &mut Findings) {
    let Some(existing) = config.spool.ancestors().find(|p| p.exists()) else {
        return;
    };
    let Ok(stat) = nix::sys::statvfs::statvfs(existing) else {
        return;
    };
    let size = stat.blocks().saturating_mul(stat.fragment_size());
    if size < config.spool_bytes_max {
        found.warn(
            config.spool.display(),
            format!(
                "its filesystem has {size} bytes in all, less than spool_bytes_max ({})",
                config.spool_bytes_max
            ),
            "lower spool_bytes_max, so that the daemon sees the end coming, or use a larger disk",
        );
    }
}

/// A volume may be away; where it is there, it must be a directory elsewhere.
fn check_volume(volume: &Path, watched: Option<&Watched>, found: &mut Findings) {
    let Some(place) = Place::find("the volume", volume, found) else {
        return;
    };
    place.check_not_watched(watched, found);
    if !place.exists() {
        found.warn(
            volume.display(),
            "the volume is absent",
            "mount or make it; until then it is waited for",
        );
        return;
    }
    place.check_kind(FileKind::Directory, found);
    if access(volume, AccessFlags::W_OK) == Err(nix::Error::EROFS) {
        found.warn(
            volume.display(),
            "the volume is mounted read-only",
            "mount it for writing, unless it is full",
        );
    }
    check_memory("the volume", volume, found);
}

/// Copies on one disk die together.
fn check_disks(config: &Config, found: &mut Findings) {
    let dev = |path: &Path| {
        let existing = path.ancestors().find(|p| p.exists())?;
        stat_path(existing).ok().map(|stat| stat.dev)
    };
    let spool = dev(&config.spool);
    let mut seen: Vec<((u32, u32), &str)> = Vec::new();
    for pool in &config.pools {
        let mut named = false;
        for volume in pool.volumes.iter().filter(|volume| volume.exists()) {
            let Some(at) = dev(volume) else {
                continue;
            };
            if Some(at) == spool {
                found.warn(volume.display(), "the volume lies on the same filesystem as the spool, so that both are lost together", "put it on a disk of its own");
            }
            let other = seen.iter().find(|(d, name)| *d == at && *name != pool.name);
            if let Some((_, other)) = other.filter(|_| !named) {
                let reason = format!(
                    "pools {other} and {} have volumes on the same filesystem, so that both copies are lost together",
                    pool.name
                );
                found.warn(volume.display(), reason, "put them on different disks");
                named = true;
            }
            seen.push((at, &pool.name));
        }
    }
}
