//! Places for volumes that clean up after themselves, also when a test fails.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::directory::{DirectoryVolume, Found, label, probe};
use crate::{FORMAT, Label, Serial, kernel};

/// A temporary directory whose immutable files can be removed.
pub(super) struct Place(tempfile::TempDir);

impl Place {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        unlock(self.0.path());
    }
}

/// Clears immutable flags, whatever state the volume is in.
pub(super) fn unlock(path: &Path) {
    let Ok(entries) = fs::read_dir(path) else {
        return;
    };
    for entry in entries.flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => unlock(&entry.path()),
            Ok(kind) if kind.is_file() => unlock_file(&entry.path()),
            _ => {}
        }
    }
}

fn unlock_file(path: &Path) {
    if let Ok(file) = File::open(path) {
        let _ = kernel::set_immutable(&file, false);
    }
}

/// A filesystem of its own in a file or in memory.
pub(super) struct Mounted {
    place: tempfile::TempDir,
}

impl Mounted {
    /// `None`, with a message, where this process may not mount or has no mkfs.
    pub(super) fn new(kind: &str, mib: u64, options: &[&str]) -> Option<Self> {
        let place = tempfile::tempdir().unwrap();
        let image = place.path().join("image");
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        let quiet = if kind == "ext4" {
            &["-q", "-m", "0"][..]
        } else {
            &["-q"]
        };
        let made = Command::new(format!("mkfs.{kind}"))
            .args(quiet)
            .args(options)
            .arg(&image)
            .status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("skipped: no mkfs.{kind}");
            return None;
        }
        let mounted = Self { place };
        mounted.prepare().then_some(mounted)
    }

    pub(super) fn tmpfs(mib: u64) -> Option<Self> {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("mount")).unwrap();
        let size = format!("size={mib}m");
        let mounted = Self { place };
        let done = mount(&["-t", "tmpfs", "-o", &size, "none"], &mounted.path());
        done.then_some(mounted)
    }

    fn prepare(&self) -> bool {
        fs::create_dir(self.path()).unwrap();
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return false;
        }
        self.mount();
        // xfs and btrfs have nothing in a new filesystem, ext4 has lost+found.
        true
    }

    pub(super) fn mount(&self) {
        assert!(self.mount_at(&self.path()));
    }

    pub(super) fn mount_at(&self, path: &Path) -> bool {
        let image = self.place.path().join("image");
        mount(&["-o", "loop", image.to_str().unwrap()], path)
    }

    /// Fails where something on it is open.
    pub(super) fn unmount(&self) {
        assert!(
            unmount(&self.path(), &[]),
            "{} is busy",
            self.path().display()
        );
    }

    pub(super) fn remount(&self, options: &str) {
        assert!(mount(
            &["-o", &format!("remount,{options}"), "none"],
            &self.path()
        ));
    }

    /// Goes on with what the disk holds now: what was not synced is gone.
    pub(super) fn lose_power(&self) {
        let (image, copy) = (
            self.place.path().join("image"),
            self.place.path().join("copy"),
        );
        let copied = Command::new("cp")
            .arg("--sparse=always")
            .args([&image, &copy])
            .status();
        assert!(copied.unwrap().success());
        self.unmount();
        fs::rename(copy, image).unwrap();
        self.mount();
    }

    pub(super) fn path(&self) -> PathBuf {
        self.place.path().join("mount")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        while unmount(&self.path(), &["-l", "-q"]) {}
    }
}

fn mount(arguments: &[&str], path: &Path) -> bool {
    let status = Command::new("mount").args(arguments).arg(path).status();
    status.is_ok_and(|status| status.success())
}

pub(super) fn unmount(path: &Path, options: &[&str]) -> bool {
    let output = Command::new("umount").args(options).arg(path).output();
    output.is_ok_and(|output| output.status.success())
}

pub(super) const MANUALS: [(&str, &str); 2] = [
    ("hsm-log.5.txt", "the log\n"),
    ("hsm-volume.5.txt", "the volume\n"),
];

pub(super) fn new_label() -> Label {
    Label {
        format: FORMAT,
        log_id: [0x5a; 16],
        pool: "archive".into(),
        serial: Serial::random().unwrap(),
        barcode: None,
        created: "2026-01-02T03:04:05Z".into(),
    }
}

pub(super) fn labelled(path: &Path) -> DirectoryVolume {
    label(path, &new_label(), &MANUALS).unwrap()
}

pub(super) fn open(path: &Path) -> DirectoryVolume {
    match probe(path).unwrap() {
        Found::Labelled(volume) => volume,
        other => panic!("{other:?} at {}", path.display()),
    }
}

/// Makes a stored file writable, as a person with root's rights can.
pub(super) fn writable(path: &Path) -> File {
    unlock_file(path);
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

pub(super) fn flip(path: &Path, at: u64) {
    let file = writable(path);
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// Names below a directory, with `/` after directories, sorted.
pub(super) fn tree(path: &Path) -> Vec<String> {
    fn walk(path: &Path, prefix: &str, names: &mut Vec<String>) {
        for entry in fs::read_dir(path).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.file_type().unwrap().is_dir() {
                walk(&entry.path(), &format!("{name}/"), names);
                names.push(format!("{name}/"));
            } else {
                names.push(name);
            }
        }
    }
    let mut names = Vec::new();
    walk(path, "", &mut names);
    names.sort();
    names
}

pub(super) fn temporaries(path: &Path) -> Vec<String> {
    let mut names = tree(path);
    names.retain(|name| name.contains(".tmp-"));
    names
}
