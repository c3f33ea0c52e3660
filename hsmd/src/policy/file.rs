//! The policy file as a thread of the daemon has it: read again when it changes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use policies::Policy;

use super::load;
use crate::shared::Shared;

/// How often it is asked whether the file is another one.
const LOOK: Duration = Duration::from_secs(1);

/// See the module.
pub struct PolicyFile {
    path: PathBuf,
    looked: Option<Instant>,
    stamp: Option<(SystemTime, u64)>,
    policy: Option<Arc<Policy>>,
}

impl PolicyFile {
    /// Nothing is read yet.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            looked: None,
            stamp: None,
            policy: None,
        }
    }

    /// The policy; `None` while the file has a fault, which status tells.
    pub fn read(&mut self, shared: &Shared) -> Option<Arc<Policy>> {
        if self.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            self.looked = Some(Instant::now());
            self.look(shared);
        }
        self.policy.clone()
    }

    fn look(&mut self, shared: &Shared) {
        let stamp = stamp(&self.path);
        if stamp.is_some() && stamp == self.stamp {
            return;
        }
        self.stamp = stamp;
        match load(&self.path) {
            Ok(policy) => {
                tracing::info!(rules = policy.rules.len(), file = %self.path.display(), "policy read");
                shared.well("policy");
                self.policy = Some(Arc::new(policy));
            }
            Err(error) => {
                self.policy = None;
                shared.trouble(
                    "policy",
                    true,
                    "no rule runs: the policy has a fault",
                    error.to_string(),
                    "mend it, check it with `tierctl policy check`; it is read again when it changes",
                );
            }
        }
    }
}

fn stamp(file: &Path) -> Option<(SystemTime, u64)> {
    let meta = std::fs::metadata(file).ok()?;
    Some((meta.modified().ok()?, meta.len()))
}
