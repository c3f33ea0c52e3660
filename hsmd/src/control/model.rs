//! What the daemon says of itself: the types behind `--json` and the Varlink interface.
//!
//! Their JSON form is a stable contract: keys are added, never renamed or given another meaning.
//! Sizes are bytes, spans milliseconds, times RFC 3339 strings, LSNs and segment numbers start at 1
//! and are `null` where there is none yet. Paths are absolute and as seen on the watched mount
//! unless said otherwise.

use serde::{Deserialize, Serialize};

use tierfs::Time;

use super::path::PathText;
use super::when::When;

mod policy;
mod queue;
mod space;

pub use policy::{
    Clause, ColumnValue, DirectoryUsage, Explanation, Found, FoundFile, MaybePath, PathFailure,
    PinsDone, PolicyFile, PolicyRun, RuleDone, RuleExplained,
};
pub use space::{SpaceState, SpaceStatus};

pub use queue::{
    CancelDone, Needs, QueueList, QueueStage, QueueWaiter, QueuedFile, RecallPart, RecallPlan,
    RecallProgress, VolumeNeed,
};

/// Everything that `tierctl status` shows.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Its process id.
    pub pid: u32,
    /// The log's id, 32 hex digits.
    pub log_id: String,
    /// Mount point of the watched filesystem.
    pub mount: String,
    /// Its type: "ext4", "xfs", "btrfs".
    pub fs_type: String,
    /// Its UUID.
    pub fs_uuid: String,
    /// What the daemon is at.
    pub state: State,
    /// What a person should know, most severe first. Empty when all is well.
    pub notices: Vec<Notice>,
    /// When this was true.
    pub now: When,
    /// When the daemon was started.
    pub started: When,
    /// How long it runs.
    pub uptime_ms: u64,
    /// How old a change may become before it is durable.
    pub rpo_ms: u64,
    /// The last transaction given to the writer.
    pub written_lsn: Option<u64>,
    /// The last transaction that is durable in the spool.
    pub durable_lsn: Option<u64>,
    /// Its time.
    pub durable_time: Option<When>,
    /// The last transaction that the catalog knows.
    pub folded_lsn: Option<u64>,
    /// The last transaction that every pool has.
    pub copied_lsn: Option<u64>,
    /// What is not in the log yet.
    pub lag: Lag,
    /// The log's newest part.
    pub spool: SpoolStatus,
    /// The copies of the log, in the order of the configuration.
    pub pools: Vec<PoolStatus>,
    /// The search for changes that raise no event.
    pub sweep: SweepStatus,
    /// What the kernel reported since the start.
    pub events: EventCounts,
    /// Files and directories examined since the start.
    pub examined_files: u64,
    /// Bytes by which the log grew since the start, as stored: compressed, content and transactions.
    pub logged_bytes: u64,
    /// Files whose newest version was read while it changed.
    pub fuzzy_files: u64,
    /// Files of which something cannot be restored: encrypted by fscrypt, sealed by verity, not readable.
    pub unrestorable_files: u64,
    /// Release and recall; null where hsmd does not expose the filesystem.
    pub released: Option<ReleasedStatus>,
    /// What flows back onto a disk that was made of stubs; null where nothing is to.
    pub refill: Option<RefillStatus>,
    /// The room on the watched filesystem, and what keeps it; null where no rule has a watermark.
    pub space: Option<SpaceStatus>,
    /// The catalog.
    pub catalog: CatalogStatus,
    /// Resident memory of the daemon.
    pub memory_bytes: u64,
}

/// Released files and who wants them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReleasedStatus {
    /// Files whose data is not on disk.
    pub files: u64,
    /// Files that are to be recalled.
    pub wanted: u64,
    /// Programs that wait for them.
    pub waiting: u64,
    /// The kernel asks about every file that is opened, not only about released ones.
    pub every_file: bool,
}

/// What a disk made of stubs (`replay --stubs`) lacks, and gets in the background.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RefillStatus {
    /// Files that are still to flow back.
    pub files: u64,
    /// Why nothing flows now; null while it does.
    pub rests: Option<String>,
}

/// What the daemon is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Opening log, catalog and filesystem.
    Starting,
    /// Comparing the tree with the log: first adoption, or what changed in the meantime.
    Examining,
    /// Following the changes as they happen.
    Following,
    /// Something does not work; the notices say what.
    Degraded,
    /// Draining before the end.
    Stopping,
}

/// How bad it is. The order is that of severity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Good to know.
    Info,
    /// Will become an error if nobody acts.
    Warning,
    /// Changes are not as safe as they should be.
    Error,
}

/// Something that a person should know, in plain words.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Notice {
    /// How bad it is.
    pub severity: Severity,
    /// What it is, naming the object.
    pub what: String,
    /// The cause.
    pub why: String,
    /// What to do; empty where there is nothing to do.
    #[serde(rename = "do")]
    pub advice: String,
    /// Since when.
    pub since: Option<When>,
}

/// What is not in the log yet.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Lag {
    /// How many files wait for examination.
    pub pending: u64,
    /// How long the oldest change has been waiting that is not yet durable in the spool.
    pub oldest_age_ms: Option<u64>,
    /// Which one that is.
    pub oldest_path: Option<String>,
    /// Those that wait longest, a few.
    pub worst: Vec<LagFile>,
    /// How far the examination of the tree is, at the start or after events were lost.
    pub examination: Option<Progress>,
}

/// A file that waits for examination.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LagFile {
    /// Which one.
    pub path: String,
    /// How long it has been waiting.
    pub age_ms: u64,
    /// Why it is not in the log yet.
    pub why: String,
    /// Its size.
    pub bytes: u64,
}

/// How far something is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// Since when it runs.
    pub since: When,
    /// Files done.
    pub done: u64,
    /// Files in all, where that is known.
    pub total: Option<u64>,
}

/// The log's newest part.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SpoolStatus {
    /// Where it is.
    pub path: String,
    /// Bytes of its segments.
    pub bytes: u64,
    /// How many it may have.
    pub bytes_max: u64,
    /// Free bytes of its disk.
    pub free_bytes: u64,
    /// Sealed segments in it.
    pub segments: u64,
    /// The open segment's number.
    pub open_segment: Option<u64>,
    /// Its size.
    pub open_segment_bytes: u64,
    /// No more fits: changes wait on the disk, unlogged.
    pub full: bool,
}

/// One copy of the log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Its name.
    pub name: String,
    /// Everything up to this transaction is on its volumes, read back and checked.
    pub copied_lsn: Option<u64>,
    /// Since when changes may be missing on it; `null` when it has all that is durable.
    pub lacks_since: Option<When>,
    /// Sealed segments that it lacks.
    pub lacks_segments: u64,
    /// Their bytes.
    pub lacks_bytes: u64,
    /// What keeps it from getting them.
    pub waiting: Option<Waiting>,
    /// Its volumes, in the order of the configuration.
    pub volumes: Vec<VolumeStatus>,
}

/// What a pool waits for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Waiting {
    /// Why it cannot go on.
    pub reason: WaitingReason,
    /// The volume's serial, where it is known.
    pub serial: Option<String>,
    /// Where the volume is expected.
    pub path: String,
    /// Since when.
    pub since: When,
    /// The error in plain words.
    pub why: String,
}

/// Why a pool waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitingReason {
    /// The volume is not there.
    Absent,
    /// Nothing more fits on any of the pool's volumes.
    Full,
    /// Writing or reading back failed.
    Failed,
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Serial as on its label; `null` before it has one.
    pub serial: Option<String>,
    /// Where it is expected.
    pub path: String,
    /// "directory".
    pub backend: String,
    /// As seen last.
    pub state: VolumeState,
    /// Segments on it.
    pub segments: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What fits on it yet; `null` while it is absent.
    pub free_bytes: Option<u64>,
    /// Every segment on it was read back and compared then or later, when it was written or by a check;
    /// `null`: of some it is only known that the volume's inventory lists them.
    pub last_verified: Option<When>,
    /// Segments on it that are known to be damaged.
    pub damaged: u64,
}

/// A volume's state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// Not labelled yet: an empty directory.
    Scratch,
    /// Takes segments.
    Filling,
    /// Nothing more fits.
    Full,
    /// Not there.
    Absent,
    /// Can be read, not written.
    ReadOnly,
    /// Something on it is damaged.
    Damaged,
    /// Another log's, or something else altogether.
    Foreign,
}

/// The search for changes that raise no event.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SweepStatus {
    /// When the last one ended.
    pub last_finished: Option<When>,
    /// Changes that it found.
    pub last_found: u64,
    /// Changes found by sweeps since the start.
    pub found: u64,
    /// The one that runs now.
    pub running: Option<Progress>,
    /// When the next one begins.
    pub next: Option<When>,
}

/// A volume and the copy of the log that it is part of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PoolVolume {
    /// Name of the pool.
    pub pool: String,
    /// The volume.
    #[serde(flatten)]
    pub volume: VolumeStatus,
}

/// What the kernel reported since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct EventCounts {
    /// Events read.
    pub read: u64,
    /// How often its queue overflowed; a sweep follows each time.
    pub overflows: u64,
}

/// The catalog.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CatalogStatus {
    /// Where it is.
    pub path: String,
    /// Its size on disk.
    pub bytes: u64,
    /// Files in it.
    pub files: u64,
    /// The sum of their sizes.
    pub files_bytes: u64,
    /// Versions of content in it.
    pub versions: u64,
    /// Its digest, where it was asked for.
    pub digest: Option<String>,
}

/// Something that happened, as `tierctl events` prints it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Transactions are safe in the spool.
    Durable {
        /// When.
        time: When,
        /// Up to this one.
        lsn: u64,
        /// The files that they changed, as many as fit.
        paths: Vec<String>,
        /// How many there are.
        paths_total: u64,
    },
    /// A segment is complete and will never change again.
    Sealed {
        /// When.
        time: When,
        /// Which.
        segment: u64,
        /// Its size.
        bytes: u64,
        /// The last transaction in it.
        lsn: Option<u64>,
    },
    /// A segment is on a volume, read back and checked.
    Copied {
        /// When.
        time: When,
        /// The copy of the log.
        pool: String,
        /// Serial of the volume.
        volume: String,
        /// Which segment.
        segment: u64,
        /// The last transaction in it.
        lsn: Option<u64>,
    },
    /// A volume's state changed.
    Volume {
        /// When.
        time: When,
        /// Its pool.
        pool: String,
        /// Its serial, where it is known.
        volume: Option<String>,
        /// Where it is expected.
        path: String,
        /// The new state.
        state: VolumeState,
    },
    /// Something that a person should know.
    Notice {
        /// When.
        time: When,
        /// What.
        #[serde(flatten)]
        notice: Notice,
    },
    /// The kernel's queue overflowed; everything is compared again.
    Overflow {
        /// When.
        time: When,
        /// How often since the start.
        total: u64,
    },
    /// A sweep began or ended.
    Sweep {
        /// When.
        time: When,
        /// Whether it ended.
        finished: bool,
        /// Files looked at.
        files: u64,
        /// Changes found.
        found: u64,
    },
    /// The daemon is at something else.
    State {
        /// When.
        time: When,
        /// At what.
        state: State,
    },
    /// The reader was too slow: so many events were left out here.
    Missed {
        /// How many.
        count: u64,
    },
}

/// What `tierctl sync` asks for. Everything changed before is durable in the spool at its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SyncRequest {
    /// On every pool too.
    #[serde(default)]
    pub media: bool,
    /// Changes that raise no event too.
    #[serde(default)]
    pub sweep: bool,
}

/// A sync is done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SyncDone {
    /// Everything up to this transaction; `null` while the log is empty.
    pub lsn: Option<u64>,
    /// How long it took.
    pub waited_ms: u64,
}

/// How far the check of a volume is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VerifyProgress {
    /// Objects read.
    pub objects: u64,
    /// Objects on the volume.
    pub objects_total: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Bytes on the volume.
    pub bytes_total: u64,
}

/// A volume was checked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VerifyDone {
    /// Its serial.
    pub serial: String,
    /// Its pool.
    pub pool: String,
    /// Where it is.
    pub path: String,
    /// Objects read and compared.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What is wrong, each naming the object; empty when all is well.
    pub faults: Vec<String>,
}

/// Where a path is in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Located {
    /// The file's id; `None` when the log does not know the inode yet.
    pub file: Option<u64>,
    /// The kernel's handle of the inode that the path named, as `sys::handle::Handle::to_bytes`
    /// gives it. The caller may compare it with that of a descriptor of its own.
    pub handle: Vec<u8>,
    /// Names from the root of the log's tree, joined by "/"; empty for the root.
    pub path: Vec<u8>,
    /// The inode's ctime as it is on disk now; `None` where the caller shall not compare.
    pub ctime: Option<Time>,
}

/// Why a file is dirty.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pending {
    /// Since when it waits.
    pub since: When,
    /// For what.
    pub why: String,
}

/// What `tierctl state` prints of one path.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileState {
    /// The path as it was asked for.
    #[serde(flatten)]
    pub path: PathText,
    /// The answer in one word.
    pub state: FileStateWord,
    /// The file's id in the log.
    pub file: Option<u64>,
    /// What it is: `regular`, `directory`, `symlink`, `fifo`, `socket`, `char_device`, `block_device`.
    pub kind: Option<String>,
    /// Size as logged.
    pub size: Option<u64>,
    /// Modification time as logged.
    pub mtime: Option<When>,
    /// The transaction of its newest version in the log.
    pub lsn: Option<u64>,
    /// The time of that transaction.
    pub time: Option<When>,
    /// The newest version was read while it changed.
    pub fuzzy: bool,
    /// Its data is never released.
    pub pinned: bool,
    /// What of it replay cannot bring back: "fscrypt", "verity", "unreadable".
    pub unrestorable: Vec<String>,
    /// Why it is dirty.
    pub pending: Option<Pending>,
    /// How many pools have all of it.
    pub pools_having: u64,
    /// How many there are.
    pub pools: u64,
    /// The volumes that hold something of its newest version.
    pub copies: Vec<FileCopy>,
    /// Bytes of its content of which no good copy is known, neither in the spool nor on a volume.
    #[serde(default)]
    pub nowhere_bytes: u64,
}

/// The states of hsm(7).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileStateWord {
    /// Not in the log at all.
    Untracked,
    /// Changed, and not yet in the log.
    Dirty,
    /// In the spool, not on every copy.
    Logged,
    /// On every required copy and on disk.
    Premigrated,
    /// On every required copy, and in part on disk.
    Partial,
    /// Released: on every required copy, and not on disk.
    Migrated,
    /// It reads as nothing that the log has: a mark of another file, and no data.
    Suspect,
    /// Released, and of some of its content no good copy is known.
    Lost,
}

/// What became of a file that was to be released or recalled.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Moved {
    /// As it was asked for.
    #[serde(flatten)]
    pub path: PathText,
    /// In a word.
    pub word: MovedWord,
    /// Bytes freed on the disk, or brought back.
    pub bytes: u64,
    /// Why not.
    pub why: Option<String>,
}

/// What became of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MovedWord {
    /// Its space is free (or would be).
    Released,
    /// Its data is back.
    Recalled,
    /// It is asked for.
    Queued,
    /// It was so already.
    Already,
    /// It has no data.
    Nothing,
    /// Not now; it is what it was.
    Refused,
    /// It was tried and failed.
    Failed,
    /// Its recall was cancelled.
    Cancelled,
}

/// What a volume holds of a file's newest version.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FileCopy {
    /// The copy of the log.
    pub pool: String,
    /// Serial of the volume.
    pub volume: String,
    /// Where it is expected.
    pub path: Option<String>,
    /// Segments of the file's that are there.
    pub segments: u64,
    /// Segments that the file needs.
    pub segments_needed: u64,
    /// When the one that was read back longest ago was read back; `null`: never.
    pub verified: Option<When>,
}

/// What `tierctl log list` prints of a path.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Versions {
    /// In the order of time; of very many the newest.
    pub list: Vec<Version>,
    /// How many older ones were left out.
    pub omitted: u64,
}

/// One step of a file's life.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Version {
    /// The file that bore the path then.
    pub file: u64,
    /// The transaction.
    pub lsn: u64,
    /// Its time.
    pub time: When,
    /// What changed: "created", "content", "attributes", "xattrs", "names", "deleted", and
    /// "appeared" or "disappeared" of the path itself.
    pub changes: Vec<String>,
    /// The size after it, `null` after a deletion.
    pub size: Option<u64>,
    /// The content was read while it changed.
    pub fuzzy: bool,
}

/// What a transaction did, as `tierctl log show` prints it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Transaction {
    /// Its number.
    pub lsn: u64,
    /// Its time, never earlier than that of the one before.
    pub time: When,
    /// What the wall clock said.
    pub wall: When,
    /// The segment that its commit lies in.
    pub segment: u64,
    /// Offset of the commit's frame in the plain segment.
    pub frame_offset: u64,
    /// How many operations it has.
    pub operations_total: u64,
    /// The operations in order, the first ten thousand.
    pub operations: Vec<Operation>,
}

/// One operation of a transaction.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Operation {
    /// "inode", "link" and so on, as in hsm-log(5).
    pub kind: String,
    /// The file that it is about.
    pub file: Option<u64>,
    /// The directory, for "link" and "unlink".
    pub parent: Option<u64>,
    /// The name, for "link" and "unlink".
    pub name: Option<String>,
    /// The rest, in words.
    pub text: String,
}

/// A version of a file's content that can be read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Content {
    /// The file's id.
    pub file: u64,
    /// As of this transaction.
    pub lsn: u64,
    /// The transaction that gave this content; `null`: the file was empty from the start.
    pub content_lsn: Option<u64>,
    /// Bytes.
    pub size: u64,
    /// The content was read while it changed.
    pub fuzzy: bool,
}

/// A piece of content: bytes or zeros.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Piece {
    /// Bytes in base64.
    pub data: Option<String>,
    /// So many zeros: a hole.
    pub zeros: Option<u64>,
}

/// The catalog's digest.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CatalogDigest {
    /// Of the log up to this transaction.
    pub lsn: Option<u64>,
    /// BLAKE3 over the logical tables, 64 hex digits.
    pub digest: String,
}
