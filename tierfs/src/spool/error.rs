//! Why the spool cannot be used. Every message names the file and says what to do.

use std::io;
use std::path::{Path, PathBuf};

use crate::frame::FrameError;
use crate::ids::{Hash, LogId, Lsn, SegmentNo};
use crate::segment::SegmentError;

/// What stands behind a refusal to go on with a damaged log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Evidence {
    /// Whole frames of the same writer lie behind the damage.
    Frames {
        /// How many.
        count: u64,
    },
    /// A later frame, or the spool's own file, says that this many bytes were durable.
    DurableBytes {
        /// Of the damaged file.
        bytes: u64,
    },
    /// The catalog, the spool's own file or the caller knows later transactions.
    KnownLsn {
        /// The last one.
        last: Lsn,
    },
    /// A later segment was sealed.
    SealedLater {
        /// Its number.
        segment: SegmentNo,
    },
    /// A later segment was begun, and nothing that was written can have been lost since.
    BegunLater {
        /// Its number.
        segment: SegmentNo,
    },
    /// A segment that the spool's own file names is not there.
    Missing {
        /// The segment that the record names.
        segment: SegmentNo,
    },
}

impl std::fmt::Display for Evidence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Frames { count } => write!(f, "{count} whole frames follow it"),
            Self::DurableBytes { bytes } => write!(f, "{bytes} bytes were on record as durable"),
            Self::KnownLsn { last } => {
                write!(f, "transactions up to {last} are on record as durable")
            }
            Self::SealedLater { segment } => write!(f, "segment {segment} was sealed after it"),
            Self::BegunLater { segment } => write!(f, "segment {segment} was begun after it"),
            Self::Missing { segment } => write!(f, "segment {segment} was on record as durable"),
        }
    }
}

/// Why the spool cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The disk failed.
    #[error("{doing} {} failed: {source}{}", path.display(), advice(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Another process writes this log.
    #[error("the spool {} is in use by another hsmd{}: stop that one first", path.display(), pid.map_or_else(String::new, |pid| format!(" (pid {pid})")))]
    Locked {
        /// The spool.
        path: PathBuf,
        /// The other process.
        pid: Option<u32>,
    },
    /// The directory was never a spool.
    #[error("{} is no spool: {what}; check `spool` in the configuration", path.display())]
    NotASpool {
        /// The directory.
        path: PathBuf,
        /// What is missing.
        what: &'static str,
    },
    /// A new spool is only made in an empty directory.
    #[error("{} is not empty (it has {name:?}), so no new spool is made there: give an empty directory", path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// Something in it.
        name: String,
    },
    /// A file that is not the spool's.
    #[error("{} is not a file of the spool: move it elsewhere, hsmd removes nothing that it does not know", path.display())]
    UnknownFile {
        /// The file.
        path: PathBuf,
    },
    /// The spool's own file was written by a later version.
    #[error("{} was written by a newer version ({what}): use that one", name.display())]
    NewerMark {
        /// The file.
        name: PathBuf,
        /// What this version does not know.
        what: String,
    },
    /// Another log's spool, or another log's segment in it.
    #[error("{} belongs to the log {found}, but {expected} is expected: check the paths in the configuration, and where the file comes from", path.display())]
    WrongLog {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: LogId,
        /// Whose it should be.
        expected: LogId,
    },
    /// Segments are missing in the middle or at the beginning.
    #[error("the spool {} lacks the segments {first} to {last}: copy them back from a volume, named as there", path.display())]
    Gap {
        /// The spool.
        path: PathBuf,
        /// The first that is missing.
        first: SegmentNo,
        /// The last that is missing.
        last: SegmentNo,
    },
    /// The log goes on elsewhere.
    #[error("the log is known up to segment {known}, the spool {} ends with {}: it is an old copy, or its files were removed. Copy the missing segments back from a volume", path.display(), last.map_or_else(|| "none".to_owned(), |no| no.to_string()))]
    Behind {
        /// The spool.
        path: PathBuf,
        /// The last segment in it.
        last: Option<SegmentNo>,
        /// The last one that is known.
        known: SegmentNo,
    },
    /// Two segments of the same number, or one that does not continue the one before.
    #[error("{} does not belong to this history of the log ({what}): two daemons wrote it, or an old copy came back. Nothing is overwritten; find out which of the files belongs here and move the other one away", path.display())]
    Fork {
        /// The file.
        path: PathBuf,
        /// What contradicts what.
        what: String,
    },
    /// A sealed segment cannot be read.
    #[error("{0}. Copy the segment back into the spool from a volume")]
    Sealed(#[source] SegmentError),
    /// A segment cannot be read because the disk fails or a newer version wrote it.
    #[error(transparent)]
    Segment(SegmentError),
    /// The open segment is damaged where it was durable.
    #[error("{} is damaged at byte {offset} ({what}), and {evidence}: this is no torn end of a crash. Restore the file from a copy if there is one; to go on without what is lost, start once with --accept-loss-after {} (the last transaction that is whole)", path.display(), end.map_or(0, Lsn::get))]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        what: String,
        /// How it is known to be damage.
        evidence: Evidence,
        /// The last whole transaction before it.
        end: Option<Lsn>,
    },
    /// The log ends before what is known to have been durable.
    #[error("the log in {} ends with transaction {}, but {evidence}: files were lost or replaced. Restore them if there is a copy; to go on without what is lost, start once with --accept-loss-after {}", path.display(), end.map_or(0, Lsn::get), end.map_or(0, Lsn::get))]
    Lost {
        /// The spool.
        path: PathBuf,
        /// The last transaction that is there.
        end: Option<Lsn>,
        /// How it is known.
        evidence: Evidence,
    },
    /// A sealed segment has another hash than the one on record.
    #[error("{} has the hash {found}, on record is {expected}: it was changed or replaced. Copy it back from a volume", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// Its hash.
        found: Hash,
        /// What it should be.
        expected: Hash,
    },
    /// Segments leave in order.
    #[error("segment {asked} is not the oldest in the spool ({}): segments are removed in order", oldest.map_or_else(|| "it has none".to_owned(), |no| no.to_string()))]
    NotOldest {
        /// What was to be removed.
        asked: SegmentNo,
        /// The one that is next.
        oldest: Option<SegmentNo>,
    },
    /// Not in the spool.
    #[error("segment {segment} is not in the spool {}: read it from a volume", path.display())]
    NoSuchSegment {
        /// The spool.
        path: PathBuf,
        /// What was asked for.
        segment: SegmentNo,
    },
    /// There is one writer.
    #[error("the spool {} has a writer already", path.display())]
    WriterTaken {
        /// The spool.
        path: PathBuf,
    },
    /// The options or what survived do not fit the format.
    #[error("the log's format cannot hold this: {0}")]
    Format(#[from] FrameError),
}

fn advice(source: &io::Error) -> &'static str {
    if crate::writer::is_full(source) {
        "; make room on its filesystem"
    } else {
        ""
    }
}

impl SpoolError {
    pub(crate) fn io(dir: &Path, name: &str, doing: &'static str, source: io::Error) -> Self {
        Self::Io {
            path: dir.join(name),
            doing,
            source,
        }
    }
}
