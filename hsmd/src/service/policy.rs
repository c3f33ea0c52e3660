//! What policies, searches and pins ask of the daemon.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};
use nix::sys::statvfs::fstatvfs;
use policies::Action;
use policies::decide::Usage;
use tierfs::catalog::Reader;
use tierfs::files::{self, Files, View};
use tierfs::{FileId, Lsn, Time};

use super::{Service, TICK};
use crate::committer::Asked;
use crate::control::{Core, CoreError, Freed};
use crate::sys::handle::Handle;
use crate::sys::{io, space};
use crate::tier::recall::Outcome;
use crate::tier::release::Refused;

/// A rule that migrates waits so long for the volumes; then its files count as failed.
const MIGRATE_PATIENCE: Duration = Duration::from_mins(10);

impl Service {
    pub(super) fn open_files(&self) -> Result<Files, CoreError> {
        let copied = self.board.pools().iter().map(|pool| pool.copied_lsn).min();
        let view = View {
            prefix: self.prefix.clone(),
            copied: copied.and_then(Lsn::new),
            now: Time::now().seconds,
        };
        Ok(Files::open(&self.config.catalog, &view)?)
    }

    pub(super) fn open_sums(&self) -> Result<files::usage::Usage, CoreError> {
        Ok(files::usage::Usage::open(&self.config.catalog)?)
    }

    pub(super) fn filesystem_usage(&self) -> Result<Usage, CoreError> {
        let stat = fstatvfs(self.mount.root()).map_err(|error| {
            CoreError::Failed(format!(
                "how full {} is cannot be found out: {error}; look for I/O errors in dmesg",
                self.config.mount.display()
            ))
        })?;
        let block = stat.fragment_size();
        let used = stat.blocks().saturating_sub(stat.blocks_free());
        let available = stat.blocks_available().saturating_mul(block);
        // What writers have in memory only has its space on ext4 and XFS. btrfs says nothing of it, and it
        // may be all that is free.
        let unwritten = match self.fs_type.as_str() {
            "btrfs" => space::unwritten_on_btrfs(&self.fs_uuid).min(available),
            _ => 0,
        };
        Ok(Usage {
            used: used.saturating_mul(block).saturating_add(unwritten),
            available: available - unwritten,
        })
    }

    pub(super) fn remember_rule(&self, name: &str, at: i64) {
        let (key, value) = (rule_key(name), at.to_be_bytes().to_vec());
        // Where nobody hears, the daemon stops.
        let _ = self.asked.send(Asked::Local { key, value });
        self.shared.wake();
    }

    pub(super) fn remembered_rule(&self, name: &str) -> Option<i64> {
        let reader = Reader::open(&self.config.catalog).ok()?;
        let value = reader.queries().meta(&rule_key(name)).ok()??;
        Some(i64::from_be_bytes(value.try_into().ok()?))
    }

    pub(super) fn log_pins(
        &self,
        files: &[FileId],
        pinned: bool,
    ) -> Result<(Option<u64>, u64), CoreError> {
        let stops =
            || CoreError::Unavailable("the daemon stops: ask again when it runs".to_owned());
        let (told, done) = bounded(1);
        let files = files.to_vec();
        let asked = Asked::Pins {
            files,
            pinned,
            told,
        };
        self.asked.send(asked).map_err(|_| stops())?;
        self.shared.wake();
        let (lsn, changed) = loop {
            match done.recv_timeout(TICK) {
                Ok(told) => break told,
                Err(RecvTimeoutError::Timeout) if !self.shared.stopping() => {}
                Err(_) => return Err(stops()),
            }
        };
        if let Some(lsn) = lsn {
            // Until the catalog's readers see it, too: whoever asks next must find what was answered.
            let never = AtomicBool::new(false);
            self.wait_until(&never, || {
                let progress = self.shared.progress();
                progress.durable >= lsn.get() && progress.folded >= lsn.get()
            })?;
        }
        Ok((lsn.map(Lsn::get), changed))
    }

    /// Does to files what a rule says: the one place where policies reach the rest of the daemon.
    pub(super) fn act_on(
        &self,
        action: Action,
        files: &[FileId],
        cancelled: &Arc<AtomicBool>,
    ) -> Result<Vec<(FileId, String)>, CoreError> {
        match action {
            Action::Pin => self.log_pins(files, true).map(|_| Vec::new()),
            Action::Migrate => self.migrate(files, cancelled),
            Action::Release => {
                let Freed {
                    mut refused,
                    failed,
                    ..
                } = self.release_files(files)?;
                refused.extend(failed);
                Ok(refused)
            }
            Action::Recall => self.recall(files, cancelled),
        }
    }

    pub(super) fn release_files(&self, files: &[FileId]) -> Result<Freed, CoreError> {
        let mut freed = Freed::default();
        self.tier()?
            .release(files, &mut |file, result| match result {
                Ok(released) => freed.bytes += released.freed,
                // Somebody else was quicker.
                Err(Refused::Already) => {}
                Err(refused) if refused.is_fault() => {
                    freed.failed.push((file, refused.to_string()));
                }
                Err(refused) => freed.refused.push((file, refused.to_string())),
            })?;
        // btrfs counts space as free when the transaction that gave it back is committed, up to half a
        // minute later: until then it would seem that more must be released.
        if self.fs_type == "btrfs"
            && let Err(error) = io::syncfs(self.mount.root())
        {
            tracing::warn!(%error, "released space is not free yet");
        }
        Ok(freed)
    }

    /// Recalls files, and waits for them.
    fn recall(
        &self,
        files: &[FileId],
        cancelled: &AtomicBool,
    ) -> Result<Vec<(FileId, String)>, CoreError> {
        let (tier, reader) = (self.tier()?, self.catalog()?);
        let (tell, told) = mpsc::channel();
        let mut failed = Vec::new();
        for file in files {
            let handle = reader.queries().inode(*file)?.and_then(|row| row.handle);
            let Some(Ok(handle)) = handle.map(|bytes| Handle::from_bytes(&bytes)) else {
                failed.push((*file, "it is gone".to_owned()));
                continue;
            };
            match tier.place_of_stub(&handle) {
                Ok(Some(place)) => {
                    let (tell, file) = (tell.clone(), *file);
                    // As root: the bound on who waits is for users.
                    tier.recall(&handle, 0, place, move |outcome| {
                        let _ = tell.send((file, outcome));
                    });
                }
                Ok(None) => {}
                Err(error) => failed.push((*file, error.to_string())),
            }
        }
        drop(tell);
        loop {
            match told.recv_timeout(TICK) {
                Ok((_, Outcome::Whole { .. })) => {}
                Ok((file, outcome)) => failed.push((file, outcome.to_string())),
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(failed),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    if cancelled.load(Ordering::Relaxed) {
                        return Err(CoreError::Cancelled("the recall"));
                    }
                }
            }
        }
    }

    /// Waits until every pool has the files as the catalog knows them.
    fn migrate(
        &self,
        files: &[FileId],
        cancelled: &AtomicBool,
    ) -> Result<Vec<(FileId, String)>, CoreError> {
        let reader = self.catalog()?;
        let mut last = 0;
        for file in files {
            let row = reader.queries().inode(*file)?;
            last = last.max(row.map_or(0, |row| row.lsn.get()));
        }
        self.shared.seal_wanted.store(true, Ordering::Relaxed);
        self.shared.wake();
        let until = Instant::now() + MIGRATE_PATIENCE;
        self.wait_until(cancelled, || {
            self.board.copied(last) || Instant::now() >= until
        })?;
        if self.board.copied(last) {
            return Ok(Vec::new());
        }
        let why = "not on every pool yet: `tierctl status` says which volume is wanted";
        Ok(files.iter().map(|file| (*file, why.to_owned())).collect())
    }
}

/// The name of the local value that says when a rule ran last.
fn rule_key(name: &str) -> String {
    format!("rule-ran/{name}")
}
