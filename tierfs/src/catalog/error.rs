//! What can go wrong with the catalog: with its file, or with a transaction that the fold refuses.

use std::path::{Path, PathBuf};

use crate::ids::{FileId, Hash, Lsn, SegmentNo, Time};
use crate::record::Kind;

/// Why the catalog did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Creating a catalog over something.
    #[error(
        "{} exists already, a new catalog is not made over it: open it, or move it away",
        path.display()
    )]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Opening a catalog that is not there.
    #[error(
        "there is no catalog at {}: run `tierctl catalog rebuild`, or start hsmd, which makes it from the log",
        path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file is something else.
    #[error(
        "{} is not a catalog of hsmd ({found}): check the path in the configuration, the file is left as it is",
        path.display()
    )]
    NotACatalog {
        /// The file.
        path: PathBuf,
        /// What it seems to be.
        found: String,
    },
    /// Written by a later version.
    #[error(
        "the catalog {} has schema version {found}, this program knows {known}: use the newer program, or run `tierctl catalog rebuild` with this one",
        path.display()
    )]
    NewerSchema {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// Written by an earlier version. A catalog is derived, so it is rebuilt, not converted.
    #[error(
        "the catalog {} has the old schema version {found}, this program writes {known}: run `tierctl catalog rebuild`",
        path.display()
    )]
    OlderSchema {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: i64,
        /// Ours.
        known: i64,
    },
    /// The file's content contradicts itself.
    #[error(
        "the catalog {} is damaged ({what}): run `tierctl catalog rebuild`, which makes it again from the log",
        path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// SQLite could not do something.
    #[error("{doing} in the catalog {} failed: {source}{}", path.display(), advice(source))]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// SQLite's answer.
        source: rusqlite::Error,
    },
    /// The operating system refused.
    #[error("{doing} {} failed: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The answer.
        source: std::io::Error,
    },
    /// A transaction that no correct writer makes. Nothing of it was applied.
    #[error(
        "transaction {lsn} is refused{}: {why}; the catalog stays as of the transaction before. The log is damaged or was made by a faulty writer: check it with `tierctl volume verify`",
        place_of(*op)
    )]
    Refused {
        /// Its number.
        lsn: Lsn,
        /// Index of the operation, `None` where the whole is meant.
        op: Option<usize>,
        /// What is wrong.
        why: Box<Refusal>,
    },
    /// The same segment number with another hash.
    #[error(
        "segment {segment} is known with hash {known}, and now comes with {found}: the log has forked, one of the two was written by another daemon. Nothing is overwritten; keep both files and find out which belongs to this log"
    )]
    Fork {
        /// The number.
        segment: SegmentNo,
        /// The hash in the catalog.
        known: Hash,
        /// The other one.
        found: Hash,
    },
    /// Asked for a moment that the catalog does not know.
    #[error("the catalog knows the log up to {}, transaction {asked} is not in it (yet)", last(*folded))]
    NotYet {
        /// The moment.
        asked: Lsn,
        /// The last one that is known.
        folded: Option<Lsn>,
    },
}

fn place_of(op: Option<usize>) -> String {
    op.map_or_else(String::new, |op| format!(" at its operation {op}"))
}

fn last(folded: Option<Lsn>) -> String {
    folded.map_or_else(
        || "its beginning".to_owned(),
        |lsn| format!("transaction {lsn}"),
    )
}

fn advice(source: &rusqlite::Error) -> &'static str {
    match source.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => ": make room on its filesystem",
        Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
            ": another process holds it, try again when that has ended"
        }
        Some(rusqlite::ErrorCode::ReadOnly | rusqlite::ErrorCode::PermissionDenied) => {
            ": run as root, or look at the permissions of the file and its directory"
        }
        _ => "",
    }
}

impl Error {
    /// What SQLite said about the file, damage told apart from all other failures.
    pub(crate) fn sqlite(path: &Path, doing: &'static str, source: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode;
        let path = path.to_owned();
        let damaged = matches!(
            source,
            rusqlite::Error::FromSqlConversionFailure(..)
                | rusqlite::Error::IntegralValueOutOfRange(..)
                | rusqlite::Error::InvalidColumnType(..)
        );
        match source.sqlite_error_code() {
            Some(ErrorCode::NotADatabase) => Self::NotACatalog {
                path,
                found: "not an SQLite database".to_owned(),
            },
            Some(ErrorCode::CannotOpen) if !path.exists() => Self::Missing { path },
            code if damaged || code == Some(ErrorCode::DatabaseCorrupt) => Self::Corrupt {
                path,
                what: format!("{doing}: {source}"),
            },
            _ => Self::Sqlite {
                path,
                doing,
                source,
            },
        }
    }
}

/// What a transaction does that no valid one may.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum Refusal {
    #[error("transaction {expected} should come here")]
    NotDense { expected: Lsn },
    #[error("its time {found:?} is before that of the transaction before it, {last:?}")]
    TimeBack { last: Time, found: Time },
    #[error("file {0} does not exist")]
    NoSuchFile(FileId),
    #[error("file {0} was deleted, and ids are never used again")]
    Reused(FileId),
    #[error("file {file} is a {was:?} and cannot become a {becomes:?}")]
    KindChanged {
        file: FileId,
        was: Kind,
        becomes: Kind,
    },
    #[error("the attributes of file {file} are invalid: {what}")]
    BadInode { file: FileId, what: &'static str },
    #[error("file {0} is no directory")]
    NotADirectory(FileId),
    #[error("file {0} is no regular file and has no content")]
    NotRegular(FileId),
    #[error("{} is no name of a directory entry", name.escape_ascii())]
    BadName { name: Vec<u8> },
    #[error("directory {parent} has an entry {} already", name.escape_ascii())]
    NameTaken { parent: FileId, name: Vec<u8> },
    #[error("directory {parent} has no entry {}", name.escape_ascii())]
    NoSuchName { parent: FileId, name: Vec<u8> },
    #[error("directory {0} would have two names")]
    DirectoryNamedTwice(FileId),
    #[error("directory {0} would lie within itself")]
    Cycle(FileId),
    #[error("the root directory cannot have a name or be deleted")]
    Root,
    #[error("file {0} is deleted while it has a name")]
    DeleteNamed(FileId),
    #[error("directory {0} is deleted while it has entries")]
    DeleteNotEmpty(FileId),
    #[error("the extents of file {file} go on at {found}, where {expected} is expected")]
    ExtentsGap {
        file: FileId,
        expected: u64,
        found: u64,
    },
    #[error("the extents of file {file} end at {covered}, its size is {size}")]
    ExtentsShort {
        file: FileId,
        covered: u64,
        size: u64,
    },
    #[error("the extents of file {0} belong to no version")]
    ExtentsWithoutContent(FileId),
    #[error("file {file}: an extent at {offset} has {found} hashes, {expected} belong there")]
    HashCount {
        file: FileId,
        offset: u64,
        expected: u64,
        found: u64,
    },
    #[error("file {file}: the version refers to {}, its current version is {}", or_none(*base), or_none(*current))]
    BaseNotCurrent {
        file: FileId,
        base: Option<Lsn>,
        current: Option<Lsn>,
    },
    #[error("file {file}: what is unchanged ends at {end}, the base version at {base_size}")]
    SameBeyondBase {
        file: FileId,
        end: u64,
        base_size: u64,
    },
    #[error("file {file}: what is unchanged begins or ends at {offset}, in the middle of a piece")]
    NotAtAPiece { file: FileId, offset: u64 },
    #[error("file {file}: the content's root hash is {found}, the commit says {expected}")]
    RootHash {
        file: FileId,
        expected: Hash,
        found: Hash,
    },
    #[error("the extended attributes of file {file} are invalid: {what}")]
    BadXattrs { file: FileId, what: &'static str },
    #[error("{what} is {value}, more than can be")]
    TooLarge { what: &'static str, value: u64 },
}

fn or_none(lsn: Option<Lsn>) -> String {
    lsn.map_or_else(
        || "none".to_owned(),
        |lsn| format!("that of transaction {lsn}"),
    )
}
