//! Real filesystems on loop devices for tests; root is needed. Unmounted and removed on drop, also
//! when a test panics.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};

use super::mount::{Mount, PrivateMount, mount_of};

/// The filesystems that are supported.
pub(crate) const KINDS: [&str; 3] = ["ext4", "xfs", "btrfs"];
/// Large enough for mkfs.xfs; the image is sparse.
const IMAGE_BYTES: u64 = 320 << 20;

/// A mounted filesystem of its own.
pub(crate) struct TestFs {
    dir: tempfile::TempDir,
    /// Newest last.
    mounted: Vec<PathBuf>,
}

impl TestFs {
    /// Made with the usual options of `kind`.
    pub(crate) fn new(kind: &'static str) -> Self {
        Self::with_options(kind, &[])
    }

    /// Made with further arguments of mkfs.
    pub(crate) fn with_options(kind: &'static str, options: &[&str]) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("hsmd-test-")
            .tempdir()
            .expect("a temporary directory");
        let mut fs = Self {
            dir,
            mounted: Vec::new(),
        };
        File::create(fs.image())
            .and_then(|f| f.set_len(IMAGE_BYTES))
            .expect("an image");
        let force = if kind == "ext4" { "-F" } else { "-f" };
        let image = fs.image();
        let mut arguments = vec![force, "-q"];
        if kind == "ext4" {
            // What larger disks get.
            arguments.extend(["-b", "4096"]);
        }
        arguments.extend(options);
        arguments.push(image.to_str().expect("an ASCII path"));
        run(&format!("mkfs.{kind}"), &arguments);
        let root = fs.dir.path().join("mnt");
        fs::create_dir(&root).expect("a mount point");
        run(
            "mount",
            &["-o", "loop", image.to_str().expect("ASCII"), path(&root)],
        );
        fs.mounted.push(root);
        fs
    }

    pub(crate) fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// A directory beside the filesystem, not on it.
    pub(crate) fn outside(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn root(&self) -> &Path {
        &self.mounted[0]
    }

    /// A path on the filesystem.
    pub(crate) fn at(&self, name: impl AsRef<Path>) -> PathBuf {
        self.root().join(name)
    }

    pub(crate) fn mount(&self) -> Mount {
        mount_of(self.root()).expect("its mount")
    }

    pub(crate) fn private(&self) -> PrivateMount {
        PrivateMount::open(&self.mount()).expect("a private mount")
    }

    /// Mounts something more, to be unmounted before the rest.
    pub(crate) fn mount_also(&mut self, arguments: &[&str], at: &Path) {
        fs::create_dir_all(at).expect("a mount point");
        let mut all = arguments.to_vec();
        all.push(path(at));
        run("mount", &all);
        self.mounted.push(at.to_owned());
    }

    /// The block device under it.
    pub(crate) fn device(&self) -> String {
        self.mount().source.into_string().expect("ASCII")
    }

    /// Unmounts and mounts again, so that nothing of it is in memory.
    pub(crate) fn remount(&self) {
        self.remount_changed(|| {});
    }

    /// Changes the image while it is not mounted.
    pub(crate) fn remount_changed(&self, change: impl FnOnce()) {
        nix::mount::umount(self.root()).expect("unmount");
        change();
        run(
            "mount",
            &["-o", "loop", path(&self.image()), path(self.root())],
        );
    }
}

impl Drop for TestFs {
    fn drop(&mut self) {
        for at in self.mounted.iter().rev() {
            if let Err(e) = umount2(at, MntFlags::MNT_DETACH) {
                eprintln!("{} stays mounted: {e}", at.display());
            }
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

/// Runs a program that must succeed; gives its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}: install it"));
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let _ = write!(text, "{}", String::from_utf8_lossy(&output.stderr));
        panic!("{program} {arguments:?} (root is needed): {text}");
    }
    text
}

/// An open directory.
pub(crate) fn open_dir(path: &Path) -> impl AsFd + use<> {
    File::open(path).expect("a directory")
}
