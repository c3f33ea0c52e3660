//! A directory of its own for each fixture, and the clearing away of what killed test runs left.
//!
//! The directory's name says which process made it (pid and start time), so that a later run can
//! tell a leftover from the directory of a test that runs beside it. Mounts and loop devices are
//! only touched if they lie in such a directory of a process that is dead.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Once;

use nix::mount::{MntFlags, umount2};

use crate::report::say;
use crate::sys;

const PREFIX: &str = "hsm-test.";
/// The usual tmpfs.
const MEMORY: &str = "/dev/shm";
/// It is only used while so much is free.
const MEMORY_WANTED: u64 = 8 << 30;

/// A directory that is removed on drop with all that is mounted in it, also after a panic.
pub struct Home {
    dir: PathBuf,
}

impl Home {
    /// Makes a new one in the directory for temporary files (`TMPDIR`).
    pub fn new() -> Self {
        Self::below(&std::env::temp_dir())
    }

    /// Makes a new one in memory if there is plenty, so that images of disks need no disk.
    pub fn for_images() -> Self {
        let memory = Path::new(MEMORY);
        let free = nix::sys::statvfs::statvfs(memory)
            .map_or(0, |fs| fs.blocks_available() * fs.fragment_size());
        if free > MEMORY_WANTED {
            Self::below(memory)
        } else {
            Self::new()
        }
    }

    fn below(base: &Path) -> Self {
        static REAPED: Once = Once::new();
        REAPED.call_once(reap);
        let me = std::process::id();
        let born = start_time(me).expect("/proc/self/stat");
        let dir = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{me}.{born}."))
            .tempdir_in(base)
            .expect("a temporary directory")
            .keep();
        // What the daemon sees has no symbolic links in it.
        let dir = dir.canonicalize().expect("the temporary directory");
        Self { dir }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// A path in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes a directory in it.
    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.at(name);
        fs::create_dir_all(&path).expect("a directory");
        path
    }
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if std::env::var_os("HSM_KEEP").is_some() {
            say(format_args!("kept: {}", self.dir.display()));
            return;
        }
        if let Err(e) = clear_away(&self.dir) {
            say(format_args!("{} stays: {e}", self.dir.display()));
        }
    }
}

/// Clears away the homes of processes that are dead.
pub fn reap() {
    let bases = [std::env::temp_dir(), PathBuf::from(MEMORY)];
    for entry in bases.iter().flat_map(fs::read_dir).flatten().flatten() {
        let name = entry.file_name();
        let Some((pid, born)) = owner(&name.to_string_lossy()) else {
            continue;
        };
        if start_time(pid) == Some(born) {
            continue;
        }
        let Ok(dir) = entry.path().canonicalize() else {
            continue;
        };
        say(format_args!(
            "clearing away {}, left by a killed test",
            dir.display()
        ));
        if let Err(e) = clear_away(&dir) {
            say(format_args!("{} stays: {e}", dir.display()));
        }
    }
}

/// The process that the name of a home tells: pid and start time.
fn owner(name: &str) -> Option<(u32, u64)> {
    let mut parts = name.strip_prefix(PREFIX)?.split('.');
    let pid = parts.next()?.parse().ok()?;
    let born = parts.next()?.parse().ok()?;
    Some((pid, born))
}

/// When a process was started, in clock ticks since boot; `None` if there is no such process.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; 20 fields after it comes the start time.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn clear_away(dir: &Path) -> io::Result<()> {
    // Those of images on what is unmounted now cannot be told by their paths afterwards.
    detach_loops(dir);
    for mounted in mounts_below(dir)?.iter().rev() {
        match umount2(mounted, MntFlags::MNT_DETACH) {
            // Another process may clear the same leftover away.
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(e) => say(format_args!("{} stays mounted: {e}", mounted.display())),
        }
    }
    detach_loops(dir);
    make_removable(dir);
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// Mount points at or below a directory, in the order in which they were mounted.
pub fn mounts_below(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|escaped| PathBuf::from(escaped.replace("\\040", " ")))
        .filter(|at| at.starts_with(dir))
        .collect())
}

/// Detaches loop devices whose image lies below `dir`. A lazily unmounted one goes by itself.
fn detach_loops(dir: &Path) {
    let Ok(blocks) = fs::read_dir("/sys/block") else {
        return;
    };
    for block in blocks.flatten() {
        let Ok(backing) = fs::read_to_string(block.path().join("loop/backing_file")) else {
            continue;
        };
        let backing = backing.trim_end().trim_end_matches(" (deleted)");
        if Path::new(backing).starts_with(dir) {
            let device = Path::new("/dev").join(block.file_name());
            let _ = std::process::Command::new("losetup")
                .arg("-d")
                .arg(device)
                .output();
        }
    }
}

/// Takes immutable and append-only flags off everything below `dir`; volumes set them.
fn make_removable(dir: &Path) {
    let wanted = |kind: fs::FileType| kind.is_file() || kind.is_dir();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        if let Ok(file) = File::open(&path) {
            let _ = sys::change_flags(&file, 0, sys::IMMUTABLE_FL | sys::APPEND_FL);
        }
        if let Ok(entries) = fs::read_dir(&path) {
            left.extend(
                entries
                    .flatten()
                    .filter(|entry| entry.file_type().is_ok_and(wanted))
                    .map(|entry| entry.path()),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_process() {
        assert_eq!(owner("hsm-test.12.345.abc"), Some((12, 345)));
        assert_eq!(owner("hsm-test.12.abc"), None);
        assert_eq!(owner("other.12.345.abc"), None);
        let me = std::process::id();
        assert!(start_time(me).is_some());
        let home = Home::new();
        let name = home.path().file_name().expect("a name");
        assert_eq!(
            owner(&name.to_string_lossy()),
            Some((me, start_time(me).expect("my start")))
        );
    }

    #[test]
    fn leftovers_of_the_dead_are_reaped_and_those_of_the_living_are_not() {
        let mine = Home::new();
        fs::write(mine.at("file"), "x").expect("a file");
        let made = mine.at("leftover");
        fs::create_dir_all(made.join("sub")).expect("a leftover");
        let stuck = File::create(made.join("sub/stuck")).expect("a file");
        sys::change_flags(&stuck, sys::IMMUTABLE_FL, 0).expect("chattr +i");
        // Pid 1 lives, but was not born at tick 0 + u64::MAX: a pid used again. From here on other tests clear it
        // away, too.
        let dead = std::env::temp_dir().join(format!("{PREFIX}1.{}.x", u64::MAX));
        fs::rename(&made, &dead).expect("it is whole at once");
        reap();
        // Another test may be at it.
        for _ in 0..100 {
            if dead.exists() {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        assert!(!dead.exists());
        assert!(mine.at("file").exists());
    }
}
