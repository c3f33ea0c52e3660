//! The one error type of the crate. Every message says what was tried on what, why it failed and,
//! where a person can do something, what.

use std::io;
use std::path::{Path, PathBuf};

/// Why an operation on a volume failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{what} {}: {source}", path.display())]
    Io {
        path: PathBuf,
        /// What was tried, as a verb in -ing form.
        what: String,
        source: io::Error,
    },

    #[error("no volume at {}: {why}; mount or insert it, nothing was written", path.display())]
    Absent { path: PathBuf, why: String },

    #[error(
        "{} has no VOLUME.json but is not empty, it holds {found}; give an empty directory, or put \
         the volume's VOLUME.json back if it was lost",
        path.display()
    )]
    Foreign { path: PathBuf, found: String },

    #[error(
        "the volume at {} has format {found}, this program knows up to {known}; use a newer version",
        path.display()
    )]
    NewerFormat {
        path: PathBuf,
        found: u64,
        known: u32,
    },

    #[error(
        "{} exists with other bytes (BLAKE3 {found}, to be stored {expected}); volumes are write \
         once, it was left as it is: two logs use this volume, or the log has forked",
        path.display()
    )]
    Exists {
        path: PathBuf,
        expected: String,
        found: String,
    },

    #[error("the volume at {} is full: {needed} {of} needed, {free} free; add a volume to the pool", path.display())]
    Full {
        path: PathBuf,
        needed: u64,
        free: u64,
        /// `bytes` or `inodes`.
        of: &'static str,
    },

    #[error("{} is damaged: expected {expected}, found {found}; {advice}", path.display())]
    Corrupt {
        path: PathBuf,
        expected: String,
        found: String,
        advice: &'static str,
    },

    #[error("{} ends at byte {bytes}, {missing} more were to be read at {at}; use another copy", path.display())]
    Short {
        path: PathBuf,
        at: u64,
        missing: u64,
        bytes: u64,
    },

    #[error("no object {name} in the inventory of the volume at {}; use another volume", path.display())]
    NoObject { path: PathBuf, name: String },

    #[error("bad volume label {}: {why}; restore it from a copy, or use another volume", path.display())]
    BadLabel { path: PathBuf, why: String },

    #[error("`{name}` is no name for an object: {why}")]
    BadName { name: String, why: &'static str },

    #[error("`{text}` is no volume serial: it has 16 lower-case hexadecimal digits")]
    BadSerial { text: String },

    #[error("{what} {}: it is read-only; mount it writable, or use another volume", path.display())]
    ReadOnly { path: PathBuf, what: String },

    #[error("{} is being labelled by another process; wait until that ends", path.display())]
    Busy { path: PathBuf },

    #[error("reading the bytes to be stored as {name}: {source}; nothing was stored")]
    Source { name: String, source: io::Error },

    #[error(
        "the bytes to be stored as {name} are not the announced ones: expected {expected}, got \
         {found}; nothing was stored, check the file they come from"
    )]
    BadSource {
        name: String,
        expected: String,
        found: String,
    },

    #[error("no random numbers from the kernel: {why}")]
    Random { why: String },
}

impl Error {
    /// No room is left on the volume; another one of the pool may have some.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }

    /// The volume is not there (any more); it may come back.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Absent { .. })
    }

    /// The system call `what` on `path` failed with `source`.
    pub(crate) fn io(path: &Path, what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        let (path, what, source) = (path.to_owned(), what.into(), source.into());
        if source.raw_os_error() == Some(libc::EROFS) {
            return Self::ReadOnly { path, what };
        }
        Self::Io { path, what, source }
    }

    /// The kernel's error number beneath, where there is one.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
