//! This process: its privileges, and its own files.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Findings, Watched};
use crate::config::Config;

/// Number, name, and what for.
const CAPABILITIES: [(u32, &str, &str); 5] = [
    (
        21,
        "CAP_SYS_ADMIN",
        "to watch a filesystem and to mount it privately",
    ),
    (2, "CAP_DAC_READ_SEARCH", "to open files by their handles"),
    (1, "CAP_DAC_OVERRIDE", "to read everybody's files"),
    (
        3,
        "CAP_FOWNER",
        "to read files of others without changing their atime",
    ),
    (
        28,
        "CAP_LEASE",
        "to see whether a file of somebody else is open for writing",
    ),
];
const CAP_CHOWN: (u32, &str, &str) = (
    0,
    "CAP_CHOWN",
    "to give the control socket to control_group",
);

/// The effective capabilities, from the text of /proc/self/status.
fn effective(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

fn own_capabilities() -> u64 {
    fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|text| effective(&text))
        .unwrap_or(0)
}

/// Whether all are there that a watch needs; a refusal says which are not.
pub(super) fn check_capabilities(found: &mut Findings) -> bool {
    let own = own_capabilities();
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(number, ..)| own & (1 << number) == 0)
        .map(|(_, name, purpose)| format!("{name} ({purpose})"))
        .collect();
    if missing.is_empty() {
        return true;
    }
    let reason = format!("it lacks {}", missing.join(", "));
    let advice = if nix::unistd::geteuid().is_root() {
        "give them to the container or unit that it runs in; the shipped hsmd.service has them"
    } else {
        "run it as root"
    };
    found.refuse("this process", reason, advice);
    false
}

/// That nobody but root can tell a root process what to do.
pub(super) fn check_config_file(file: &Path, found: &mut Findings) {
    let metadata = match fs::metadata(file) {
        Ok(metadata) => metadata,
        Err(e) => {
            found.refuse(
                file.display(),
                format!("the configuration cannot be read: {e}"),
                "make it readable for root",
            );
            return;
        }
    };
    if metadata.uid() != 0 && nix::unistd::geteuid().is_root() {
        found.refuse(
            file.display(),
            format!(
                "the configuration belongs to user {}, who could so make root do things",
                metadata.uid()
            ),
            format!("chown root {}", file.display()),
        );
    }
    if metadata.mode() & 0o022 != 0 {
        found.refuse(
            file.display(),
            format!(
                "others than its owner may write the configuration (mode {:04o})",
                metadata.mode() & 0o7777
            ),
            format!("chmod go-w {}", file.display()),
        );
    }
}

/// That the group which may control the daemon exists, and can be given the socket.
pub(super) fn check_group(config: &Config, found: &mut Findings) {
    let Some(name) = &config.control_group else {
        return;
    };
    let object = format!("control_group = {name:?}");
    match nix::unistd::Group::from_name(name) {
        Ok(Some(_)) => {}
        Ok(None) => found.refuse(
            &object,
            "there is no such group",
            format!("groupadd --system {name}, or remove the key"),
        ),
        Err(e) => found.refuse(
            &object,
            format!("groups cannot be looked up: {e}"),
            "repair nsswitch.conf(5), or remove the key",
        ),
    }
    let (number, capability, purpose) = CAP_CHOWN;
    if own_capabilities() & (1 << number) == 0 {
        found.refuse(
            object,
            format!("this process lacks {capability} ({purpose})"),
            "run it as root, or remove the key",
        );
    }
}

/// Files and partitions in the text of /proc/swaps.
fn swaps(text: &str) -> impl Iterator<Item = PathBuf> {
    text.lines().skip(1).filter_map(|line| {
        let (path, rest) = line.split_once(char::is_whitespace)?;
        rest.trim_start()
            .starts_with("file")
            .then(|| PathBuf::from(path.replace("\\040", " ")))
    })
}

/// A swap file changes all the time, says nothing, and is of no use in a log.
pub(super) fn check_swap(watched: &Watched, found: &mut Findings) {
    let text = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for path in swaps(&text) {
        if watched.holds(&path).unwrap_or(false) {
            found.refuse(
                path.display(),
                "it is a swap file on the watched filesystem",
                format!("swapoff {}, and put it elsewhere", path.display()),
            );
        }
    }
}

/// The daemon's program and configuration must be there when the watched filesystem is not.
pub(super) fn check_own_files(config: &Config, watched: &Watched, found: &mut Findings) {
    let advice = "put it on another filesystem: it is needed to rebuild this one";
    let held = |path: &Path| watched.holds(path).unwrap_or(false);
    if held(&config.file) {
        found.refuse(
            config.file.display(),
            "the configuration lies on the watched filesystem",
            advice,
        );
    }
    if let Some(policies) = config.policies.as_deref().filter(|path| held(path)) {
        found.refuse(
            policies.display(),
            "the policy lies on the watched filesystem",
            advice,
        );
    }
    let running = Path::new("/proc/self/exe");
    if held(running) {
        let shown = fs::read_link(running).unwrap_or_else(|_| running.to_owned());
        found.refuse(
            shown.display(),
            "this program lies on the watched filesystem",
            advice,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::{effective, swaps};

    #[test]
    fn the_text_of_proc_is_understood() {
        assert_eq!(
            effective("Name:\tx\nCapInh:\t0\nCapEff:\t000001fffeffffff\n"),
            Some(0x1ff_feff_ffff)
        );
        assert_eq!(effective("Name:\tx\n"), None);
        assert_eq!(effective("CapEff:\tzz\n"), None);
        let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
                    /swap\\040file                              file\t\t1048572\t\t0\t\t-2\n\
                    /dev/sda2                               partition\t1048572\t\t0\t\t-3\n";
        let found: Vec<_> = swaps(text).collect();
        assert_eq!(found, [std::path::Path::new("/swap file")]);
        assert_eq!(swaps("").count(), 0);
    }
}
