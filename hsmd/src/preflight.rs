//! What must be true of the machine before the daemon starts, examined without changing anything.
//!
//! [`check`] finds all that would keep the daemon from working, not only the first: each
//! [`Refusal`] names the object, the reason, and what to do. A [`Warning`] is what works but may
//! surprise. That volumes belong to this log and pool is found out by opening them, not here.

mod places;
mod process;
#[cfg(test)]
mod tests;
mod watched;

use std::fmt;
use std::path::PathBuf;

use crate::config::Config;

pub use watched::Watched;

/// Something that keeps the daemon from starting.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {reason}; {advice}")]
pub struct Refusal {
    /// What it is about: a path, a capability, a key.
    pub object: String,
    /// What is wrong with it.
    pub reason: String,
    /// What to do.
    pub advice: String,
}

/// Something that works but is probably not meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// What it is about.
    pub object: String,
    /// What may surprise.
    pub reason: String,
    /// What could be done.
    pub advice: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.object, self.reason, self.advice)
    }
}

/// What was found, where nothing stands against starting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Where the watched filesystem is mounted.
    pub mount_point: PathBuf,
    /// `ext4`, `xfs` or `btrfs`.
    pub fs_type: String,
    /// Its block device.
    pub device: PathBuf,
    /// Its UUID.
    pub fs_uuid: [u8; 16],
    /// What is worth knowing.
    pub warnings: Vec<Warning>,
}

/// Collects while the checks go on.
#[derive(Default)]
struct Findings {
    refusals: Vec<Refusal>,
    warnings: Vec<Warning>,
}

impl Findings {
    fn refuse(
        &mut self,
        object: impl fmt::Display,
        reason: impl Into<String>,
        advice: impl Into<String>,
    ) {
        self.refusals.push(Refusal {
            object: object.to_string(),
            reason: reason.into(),
            advice: advice.into(),
        });
    }

    fn warn(
        &mut self,
        object: impl fmt::Display,
        reason: impl Into<String>,
        advice: impl Into<String>,
    ) {
        self.warnings.push(Warning {
            object: object.to_string(),
            reason: reason.into(),
            advice: advice.into(),
        });
    }
}

/// Examines everything that the configuration names, the kernel, and this process.
pub fn check(config: &Config) -> Result<Report, Vec<Refusal>> {
    let mut found = Findings::default();
    let privileged = process::check_capabilities(&mut found);
    process::check_config_file(&config.file, &mut found);
    // One that is missing or faulty keeps rules from running, not the daemon from logging.
    if let Some(policies) = config.policies.as_deref().filter(|path| path.exists()) {
        process::check_config_file(policies, &mut found);
    }
    process::check_group(config, &mut found);
    let watched = watched::examine(&config.mount, privileged, &mut found);
    if let Some(watched) = &watched {
        process::check_swap(watched, &mut found);
        process::check_own_files(config, watched, &mut found);
    }
    places::check(config, watched.as_ref(), &mut found);
    match watched {
        Some(watched) if found.refusals.is_empty() => Ok(Report {
            mount_point: watched.mount.mount_point,
            fs_type: watched.mount.fs_type,
            device: watched.device,
            fs_uuid: watched.uuid,
            warnings: found.warnings,
        }),
        _ => Err(found.refusals),
    }
}
