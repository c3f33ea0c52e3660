//! Real filesystems on loop devices; root is needed. Unmounted on drop, also when a test panics.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted filesystem of its own.
pub struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    pub fn new(kind: &str) -> Self {
        Self::sized(kind, 400 << 20)
    }

    pub fn sized(kind: &str, bytes: u64) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("replay-test-")
            .tempdir()
            .unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(bytes).unwrap();
        let force = if kind == "ext4" { "-F" } else { "-f" };
        run(&format!("mkfs.{kind}"), &[force, "-q", text(&image)]);
        let root = dir.path().join("mnt");
        std::fs::create_dir(&root).unwrap();
        run("mount", &["-o", "loop", text(&image), text(&root)]);
        Self { dir }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// A place that is not on it.
    pub fn outside(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let flags = nix::mount::MntFlags::MNT_DETACH;
        if let Err(error) = nix::mount::umount2(&self.root(), flags) {
            eprintln!("{} stays mounted: {error}", self.root().display());
        }
        // Objects of volumes beside the mount are immutable.
        let _ = Command::new("chattr")
            .args(["-R", "-f", "-i", "-a"])
            .arg(self.dir.path())
            .output();
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a program that must succeed; gives its output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}: install it"));
    assert!(
        output.status.success(),
        "{program} {arguments:?} (root is needed): {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
