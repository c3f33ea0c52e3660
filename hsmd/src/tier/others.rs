//! Another hsmd of the same filesystem: one that runs, or the guard of one whose keeper was killed.
//!
//! A guard names its device on its command line, and its keeper is its parent as long as that lives.

use std::fs;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::sys::process;

/// A guard that another hsmd has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Other {
    /// Its process.
    pub guard: i32,
    /// The process of its keeper, which may be gone.
    keeper: i32,
}

impl Other {
    /// The guard of this device, if there is one.
    pub fn of(device: &Path) -> Option<Self> {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
        pids.filter(|pid| process::user_of(*pid) == Some(0))
            .find_map(|guard| {
                let line = fs::read(format!("/proc/{guard}/cmdline")).ok()?;
                let keeper = keeper_in(&line, device)?;
                Some(Self { guard, keeper })
            })
    }

    /// The keeper, if it lives.
    pub fn keeper(self) -> Option<i32> {
        (process::parent_of(self.guard) == Some(self.keeper)).then_some(self.keeper)
    }

    /// Whether the guard runs still.
    pub fn lives(self) -> bool {
        process::is_alive(self.guard)
    }

    /// Kills the guard, and its worker with it; they are gone a moment later.
    pub fn kill(self) {
        let _ = kill(Pid::from_raw(self.guard), Signal::SIGKILL);
    }
}

/// The keeper that a command line names, if it is that of a guard of this device.
fn keeper_in(line: &[u8], device: &Path) -> Option<i32> {
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    let after = |key: &str| {
        let at = words.iter().position(|word| *word == key.as_bytes())?;
        words.get(at + 1).copied()
    };
    let is_guard = words.contains(&b"guard".as_slice())
        && after("--device") == Some(device.as_os_str().as_encoded_bytes());
    let keeper = after("--keeper").filter(|_| is_guard)?;
    std::str::from_utf8(keeper).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_is_known_by_its_command_line() {
        let line = |words: &str| words.replace(' ', "\0").into_bytes();
        let device = Path::new("/dev/sdb1");
        let guard = line("/usr/sbin/hsmd --config c guard --device /dev/sdb1 --keeper 77");
        assert_eq!(keeper_in(&guard, device), Some(77));
        assert_eq!(keeper_in(&guard, Path::new("/dev/sdb")), None);
        for other in [
            "/usr/sbin/hsmd --config c worker --device /dev/sdb1 --keeper 77",
            "/usr/sbin/hsmd --config c guard --device /dev/sdb1",
            "guard",
            "",
        ] {
            assert_eq!(keeper_in(&line(other), device), None, "{other}");
        }
    }
}
