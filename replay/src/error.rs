//! The crate's errors: what ends a replay. What it goes on after is a [`crate::report::Loss`].

use std::io;
use std::path::PathBuf;

use tierfs::catalog;
use tierfs::ids::{Hash, LogId, Lsn, SegmentNo};
use tierfs::segment::SegmentError;

/// Why replay cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A volume cannot be used.
    #[error(transparent)]
    Media(#[from] media::Error),
    /// A segment cannot be read from any copy.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The fold refused something, or its temporary database failed.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
    /// No source was given.
    #[error("no volume was given: name at least one with --from")]
    NoSource,
    /// A place without a label and without segments.
    #[error(
        "{} is no volume and holds no segments: {found}; give the directory that holds VOLUME.json, or one with *.hsm.zst files",
        path.display()
    )]
    NoLog {
        /// The place.
        path: PathBuf,
        /// What is there instead.
        found: &'static str,
    },
    /// Two places of different logs.
    #[error(
        "{} belongs to log {found}, {} to log {expected}: replay one log at a time",
        path.display(),
        other.display()
    )]
    ForeignLog {
        /// The second place.
        path: PathBuf,
        /// Its log.
        found: LogId,
        /// The first place.
        other: PathBuf,
        /// Its log.
        expected: LogId,
    },
    /// Copies that never were copies of each other.
    #[error(
        "segment {segment} exists twice with different content: {first} and {second}. The log has forked: two daemons wrote it. Give only the volumes of the one that is to be restored"
    )]
    Fork {
        /// The number.
        segment: SegmentNo,
        /// One copy and what tells it.
        first: String,
        /// The other.
        second: String,
    },
    /// A segment that does not continue the one before.
    #[error(
        "the chain is broken: {name} names {named} as the hash of segment {segment}, which is {found} ({place}). One of the two was changed or belongs to another history; give a volume with the right one"
    )]
    Chain {
        /// The segment that names the other.
        name: String,
        /// The hash that it names.
        named: Hash,
        /// The segment before.
        segment: SegmentNo,
        /// Its hash.
        found: Hash,
        /// Where that is.
        place: String,
    },
    /// Segments that no source has, and that are needed.
    #[error(
        "{} needed and on none of the places given ({}): give the volume that has them with --from{}",
        missing_list(segments),
        places.join(", "),
        until_hint(*folded)
    )]
    Missing {
        /// Their numbers.
        segments: Vec<SegmentNo>,
        /// Where was looked.
        places: Vec<String>,
        /// The last transaction before the first of them.
        folded: Option<Lsn>,
    },
    /// No copy of something could be read.
    #[error("no copy of {what} can be read: {}{}", causes.join("; "), until_hint(*folded))]
    AllCopies {
        /// What was read.
        what: String,
        /// What each copy said.
        causes: Vec<String>,
        /// Where it matters, the last transaction that is whole.
        folded: Option<Lsn>,
    },
    /// The log does not hang together.
    #[error("{name} does not continue the log: {why}{}", until_hint(*folded))]
    Log {
        /// The segment.
        name: String,
        /// What is wrong.
        why: String,
        /// The last transaction that is whole.
        folded: Option<Lsn>,
    },
    /// A target that the log has not reached.
    #[error("the log ends with {}, {asked} is not in it: give all volumes, or an earlier moment", last.map_or_else(|| "nothing".to_owned(), |lsn| format!("transaction {lsn}")))]
    NotYet {
        /// What --until said.
        asked: String,
        /// The log's end.
        last: Option<Lsn>,
    },
    /// The log holds no tree at the moment asked for.
    #[error("{0}: there is nothing to restore")]
    Nothing(String),
    /// --path names nothing.
    #[error("{} does not exist at transaction {at}: look at the names with `--path` of a directory above it and `--list`", path.escape_ascii())]
    NoSuchPath {
        /// What was asked for.
        path: Vec<u8>,
        /// When.
        at: Lsn,
    },
    /// The target has something in it.
    #[error(
        "{} is not empty, it holds {found}: give an empty directory or a fresh filesystem; nothing was changed",
        path.display()
    )]
    NotEmpty {
        /// The target.
        path: PathBuf,
        /// One of its names.
        found: String,
    },
    /// The target is half-way through another replay.
    #[error(
        "{} holds an unfinished replay of {found}, asked for is {asked}: give the same --until and --path as then to continue it, or empty the directory to begin anew",
        path.display()
    )]
    OtherReplay {
        /// The target.
        path: PathBuf,
        /// What was begun.
        found: String,
        /// What is asked for.
        asked: String,
    },
    /// The target was changed between two runs.
    #[error(
        "{} was restored in part by an earlier run and is gone now: empty the target and begin anew",
        path.display()
    )]
    Vanished {
        /// The file.
        path: PathBuf,
    },
    /// The target is no place for stubs.
    #[error("stubs cannot be restored to {}: {why}; nothing was changed", path.display())]
    NoStubs {
        /// The target.
        path: PathBuf,
        /// Why, and what to do.
        why: String,
    },
    /// --path with --stubs.
    #[error(
        "--stubs restores the whole tree only: hsmd takes over whole filesystems, and would log everything beside --path as deleted; leave out --path, or leave out --stubs to restore this part with its content"
    )]
    StubsOfPart,
    /// The target's disk fails or is full.
    #[error("{doing} {}: {source}{}", path.display(), target_advice(source))]
    Target {
        /// What was done to it.
        path: PathBuf,
        /// The action.
        doing: String,
        /// What the system said.
        source: io::Error,
    },
    /// Writing what was read somewhere else.
    #[error("writing the content of file {file}: {source}")]
    Output {
        /// The file.
        file: tierfs::FileId,
        /// What the system said.
        source: io::Error,
    },
    /// A worker ended before its work.
    #[error(
        "a worker thread ended early; nothing more was written, run the same command again to continue"
    )]
    Worker,
    /// A moment that cannot be understood.
    #[error(
        "{text:?} is no moment: give an LSN (1042), or a time (2026-01-31T12:00:00Z, or \"2026-01-31 12:00\" in local time)"
    )]
    BadMoment {
        /// What was given.
        text: String,
    },
    /// Someone asked to stop.
    #[error("interrupted; run the same command again to continue")]
    Interrupted,
}

impl Error {
    /// A failure of the target's filesystem.
    pub fn target(
        path: impl Into<PathBuf>,
        doing: impl Into<String>,
        source: impl Into<io::Error>,
    ) -> Self {
        Self::Target {
            path: path.into(),
            doing: doing.into(),
            source: source.into(),
        }
    }
}

fn target_advice(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => {
            "; make room or enlarge the filesystem, then run the same command again to continue"
        }
        Some(libc::EROFS) => "; mount it writable",
        Some(libc::EIO) => "; the disk fails, use another one",
        Some(libc::ENOENT | libc::ENOTDIR) => "; make the directory, or mount the filesystem there",
        _ => "",
    }
}

fn until_hint(folded: Option<Lsn>) -> String {
    folded.map_or_else(String::new, |lsn| {
        format!("; the tree as of transaction {lsn} can be restored with --until {lsn}")
    })
}

/// "segments 3, 7 to 9 are", for a message.
pub fn missing_list(segments: &[SegmentNo]) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for number in segments.iter().map(|segment| segment.get()) {
        match runs.last_mut() {
            Some((_, end)) if *end + 1 == number => *end = number,
            _ => runs.push((number, number)),
        }
    }
    let shown = runs.iter().take(20).map(|(start, end)| {
        if start == end {
            start.to_string()
        } else {
            format!("{start} to {end}")
        }
    });
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if runs.len() > 20 {
        text.push_str(" and more");
    }
    if segments.len() == 1 {
        format!("segment {text} is")
    } else {
        format!("segments {text} are")
    }
}
