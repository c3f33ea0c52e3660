//! The control socket: how people and programs ask the daemon, and how it answers.
//!
//! [`server`] speaks Varlink on a Unix socket and reaches the daemon through [`Core`]; [`client`] is
//! the other end, used by tierctl. [`model`] holds what goes over the wire, its JSON form is a stable
//! contract, described by [`varlink::INTERFACE_TEXT`]. Who may ask what is decided by [`peer`].
//!
//! A client can neither stall nor outlive the daemon: requests are bounded, each connection works on
//! one request at a time, what blocks runs on threads of its own, and ends when the client goes away.

pub mod base64;
pub mod client;
mod content;
mod files;
mod log;
pub mod methods;
pub mod model;
mod needs;
pub mod path;
pub mod peer;
pub mod policies;
pub mod queue;
pub mod search;
pub mod server;
pub mod tier;
pub mod varlink;
mod volumes;
pub mod when;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::fetch::{self, Copies};
use crate::sys::handle::Handle;
use model::{Event, Located, Pending, Status, SyncDone, SyncRequest, VerifyDone, VerifyProgress};

/// The daemon, as the control socket sees it. Calls come from any thread, and may block.
pub trait Core: Send + Sync + 'static {
    /// What the daemon is at. Must answer within milliseconds, whatever else goes on.
    fn status(&self) -> Status;

    /// Returns when everything that was changed before is as safe as asked for. Gives up soon after
    /// `cancelled` is set.
    fn sync(&self, request: SyncRequest, cancelled: &AtomicBool) -> Result<SyncDone, CoreError>;

    /// A view of the catalog, for the caller's thread.
    fn catalog(&self) -> Result<tierfs::catalog::Reader, CoreError>;

    /// Where segments can be read now: spool and volumes.
    fn sources(&self) -> Result<Arc<replay::sources::Sources>, CoreError>;

    /// What is known of the segments' copies.
    fn copies(&self) -> Arc<dyn Copies> {
        Arc::new(fetch::Nobodys)
    }

    /// What happens from now on. Bounded: a slow reader gets [`Event::Missed`] instead.
    fn subscribe(&self) -> crossbeam_channel::Receiver<Event>;

    /// The inode that an absolute path on the watched mount names, its last component not followed.
    fn resolve(&self, path: &Path) -> Result<Located, CoreError>;

    /// Why the file is dirty; `None` when it is not.
    fn pending(&self, file: u64) -> Option<Pending>;

    /// Whether a file with this change time is known to be in the log as it is, though the catalog does not
    /// have that change time yet.
    fn is_examined(&self, _file: tierfs::FileId, _handle: &Handle, _ctime: tierfs::Time) -> bool {
        false
    }

    /// Has the content of files compared with the log; a sync waits for that.
    fn look_closely(&self, _files: &[tierfs::FileId]) -> Result<(), CoreError> {
        Ok(())
    }

    /// Reads all of a volume back and compares it with its inventory; stops on `Break`.
    fn verify_volume(
        &self,
        serial_or_path: &str,
        progress: &mut dyn FnMut(VerifyProgress) -> ControlFlow<()>,
    ) -> Result<VerifyDone, CoreError>;

    /// The last folded transaction and the digest of the catalog's logical tables.
    fn catalog_digest(&self) -> Result<(Option<u64>, String), CoreError>;

    /// The view of files, for the caller's thread.
    fn files(&self) -> Result<tierfs::files::Files, CoreError>;

    /// What adds up directories, for the caller's thread.
    fn sums(&self) -> Result<tierfs::files::usage::Usage, CoreError>;

    /// The policy file, where the configuration names one.
    fn policy_file(&self) -> Option<PathBuf>;

    /// Remembers that a rule ran at this time (seconds of Unix time), beyond the daemon's end.
    fn note_rule(&self, _name: &str, _at: i64) {}

    /// When a rule ran last, as far as that is remembered.
    fn rule_ran(&self, _name: &str) -> Option<i64> {
        None
    }

    /// How full the watched filesystem is.
    fn usage(&self) -> Result<::policies::decide::Usage, CoreError>;

    /// Logs that files are pinned, or are not any more. Gives the transaction (`None` where nothing
    /// changed) and how many files it changed, when that is durable.
    fn pin(&self, files: &[tierfs::FileId], pinned: bool) -> Result<(Option<u64>, u64), CoreError>;

    /// Does to files what a rule says, all of them at once. Gives those that failed, and why; an error
    /// where nothing can be done to any of them now.
    fn act(
        &self,
        action: ::policies::Action,
        files: &[tierfs::FileId],
        cancelled: &Arc<AtomicBool>,
    ) -> Result<Vec<(tierfs::FileId, String)>, CoreError>;

    /// Releases files.
    fn release(&self, _files: &[tierfs::FileId]) -> Result<Freed, CoreError> {
        Err(self
            .tier()
            .err()
            .unwrap_or_else(|| CoreError::Unavailable("files cannot be released here".to_owned())))
    }

    /// Begins to stop the daemon; does not wait for it.
    fn stop(&self);

    /// Where the watched filesystem is mounted.
    fn mount(&self) -> PathBuf {
        PathBuf::from(self.status().mount)
    }

    /// Release and recall, where hsmd exposes the filesystem.
    fn tier(&self) -> Result<Arc<crate::tier::worker::Tier>, CoreError> {
        Err(CoreError::Unavailable(
            "hsmd does not mount this filesystem itself, so that files can be logged but not released: set `device` in its configuration, see hsmd.toml(5)".to_owned(),
        ))
    }
}

/// What a release of files gave.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Freed {
    /// Bytes of the disk that are free now.
    pub bytes: u64,
    /// Files that stay for now, and why: they are in use, changed, pinned.
    pub refused: Vec<(tierfs::FileId, String)>,
    /// Files that could not be released, and why: that is a fault of something.
    pub failed: Vec<(tierfs::FileId, String)>,
}

/// Why the daemon did not do what it was asked for. Each message names the object, the cause and
/// what to do.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// The path is somewhere else.
    #[error(
        "{} is not on the watched filesystem: give a path below {}",
        path.display(),
        mount.display()
    )]
    NotWatched {
        /// The path.
        path: PathBuf,
        /// What is watched.
        mount: PathBuf,
    },
    /// There is no such thing: a path, a version, a transaction, a volume.
    #[error("{0}")]
    NotFound(String),
    /// Cannot be done now: the daemon starts or stops, a volume is not there.
    #[error("{0}")]
    Unavailable(String),
    /// The caller went away or asked to stop.
    #[error("{0} was cancelled")]
    Cancelled(&'static str),
    /// It was tried and failed.
    #[error("{0}")]
    Failed(String),
}

impl From<tierfs::catalog::Error> for CoreError {
    fn from(error: tierfs::catalog::Error) -> Self {
        match error {
            tierfs::catalog::Error::NotYet { .. } => Self::NotFound(error.to_string()),
            error => Self::Failed(error.to_string()),
        }
    }
}

impl From<replay::Error> for CoreError {
    fn from(error: replay::Error) -> Self {
        Self::Failed(error.to_string())
    }
}
