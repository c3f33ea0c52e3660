//! What recall has to do, and what it needs for that.

use serde::{Deserialize, Serialize};

use super::{MaybePath, PathFailure, When};

/// What `tierctl queue list` shows.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct QueueList {
    /// Who waits longest comes first.
    pub files: Vec<QueuedFile>,
    /// How many files more there are than are listed.
    pub omitted: u64,
    /// What the listed files need together.
    pub needs: Needs,
}

/// A file that is to be recalled.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct QueuedFile {
    /// Where it is now; null where it has no name, or one that the asker may not see.
    #[serde(flatten)]
    pub path: MaybePath,
    /// The file's id in the log.
    pub file: Option<u64>,
    /// Its size as logged.
    pub size: Option<u64>,
    /// How far it is.
    pub stage: QueueStage,
    /// Bytes that are on the disk already, while it is being filled.
    pub filled: u64,
    /// Since when somebody waits; null where nobody does: an interrupted recall goes on by itself.
    pub since: Option<When>,
    /// Programs that wait to open or to read it.
    pub programs: u64,
    /// Requests for its recall that are not answered.
    pub requests: u64,
    /// Who they are, who waits longest first; of very many not all.
    pub waiters: Vec<QueueWaiter>,
    /// What its content needs; nothing where it is there.
    pub needs: Needs,
    /// Why it could not be recalled when that was tried last; it is tried again.
    pub error: Option<String>,
}

/// How far a file in the queue is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QueueStage {
    /// It waits for its turn, or for a volume.
    Wanted,
    /// Its bytes are coming.
    Filling,
    /// All its bytes are there, but not yet durable: who reads it waits no more.
    There,
}

/// Somebody who waits for a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct QueueWaiter {
    /// The user.
    pub uid: u32,
    /// It is a program; else a request.
    pub program: bool,
    /// The program's process id, where it is known.
    pub pid: Option<i32>,
    /// Since when.
    pub since: When,
}

/// What content needs to be read.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Needs {
    /// Files with content that is not on the disk.
    pub files: u64,
    /// Bytes of that content.
    pub bytes: u64,
    /// Bytes of it that are in the spool, for which no volume is needed.
    pub spool_bytes: u64,
    /// Bytes of which no good copy is known.
    pub nowhere_bytes: u64,
    /// Volumes that are needed. Of what is on several, the one that is present counts; where none is
    /// present, all of them stand here, and those of one pool suffice.
    pub volumes: Vec<VolumeNeed>,
}

/// What a volume is needed for.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeNeed {
    /// The copy of the log.
    pub pool: String,
    /// Serial of the volume.
    pub volume: String,
    /// Where it is, or is expected.
    pub path: Option<String>,
    /// It can be read now.
    pub present: bool,
    /// Files with content on it.
    pub files: u64,
    /// Bytes of that content.
    pub bytes: u64,
    /// The segments that hold it.
    pub segments: Vec<u64>,
}

/// What `tierctl queue cancel` did.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct CancelDone {
    /// Files whose recall was cancelled.
    pub files: u64,
    /// Programs that got an error instead.
    pub programs: u64,
    /// Requests that were answered with "cancelled".
    pub requests: u64,
    /// Paths of which nothing was cancelled.
    pub failures: Vec<PathFailure>,
}
