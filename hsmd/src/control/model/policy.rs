//! What searches, policies and pins say.

use serde::{Deserialize, Serialize};
use tierfs::files::FileRow;

use super::{PathText, When};
use crate::control::path::below;

/// A path that a file may not have.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct MaybePath {
    /// The path, with U+FFFD for what is not UTF-8; `None` where it has none at the mount point.
    pub path: Option<String>,
    /// Its bytes in base64; only there where `path` is not exact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_base64: Option<String>,
}

impl From<Option<PathText>> for MaybePath {
    fn from(path: Option<PathText>) -> Self {
        path.map_or_else(Self::default, |path| Self {
            path: Some(path.path),
            path_base64: path.path_base64,
        })
    }
}

/// A file that a search found: the columns of hsm-policy(5).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct FoundFile {
    pub file: u64,
    #[serde(flatten)]
    pub path: MaybePath,
    pub size: u64,
    pub mtime: When,
    pub atime: When,
    pub ctime: Option<When>,
    pub uid: u32,
    pub gid: u32,
    pub user: Option<String>,
    pub group: Option<String>,
    pub mode: u32,
    pub links: u64,
    pub state: String,
    pub pinned: bool,
    pub lsn: u64,
    pub version: Option<u64>,
    pub logged: Option<When>,
}

/// A time of whole seconds.
fn when(seconds: i64) -> When {
    tierfs::Time { seconds, nanos: 0 }.into()
}

impl FoundFile {
    /// Of a row of the view; paths lie below `mount`.
    pub fn of(row: FileRow, mount: &std::path::Path) -> Self {
        Self {
            file: row.file.get(),
            path: row.path.map(|path| below(mount, &path)).into(),
            size: row.size,
            mtime: when(row.mtime),
            atime: when(row.atime),
            ctime: row.ctime.map(when),
            uid: row.uid,
            gid: row.gid,
            user: row.user,
            group: row.group,
            mode: row.mode,
            links: row.links,
            state: row.state,
            pinned: row.pinned,
            lsn: row.lsn.get(),
            version: row.version.map(tierfs::Lsn::get),
            logged: row.logged.map(when),
        }
    }
}

/// A part of what a search found.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Found {
    /// Where only paths were asked for.
    pub paths: Vec<PathText>,
    /// Where all columns were.
    pub files: Vec<FoundFile>,
    /// Files that have no path at the mount point, so far; they are in `files` only.
    pub pathless: u64,
}

/// How much lies below a directory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DirectoryUsage {
    /// The directory, or the file that was asked for.
    #[serde(flatten)]
    pub path: PathText,
    /// Files of every kind but directories.
    pub files: u64,
    /// Bytes of content, holes included.
    pub logical_bytes: u64,
    /// Bytes of content on disk, without holes.
    pub resident_bytes: u64,
    /// Bytes of content that were given back.
    pub released_bytes: u64,
    /// Files whose data was given back.
    pub stubs: u64,
}

/// What became of pins.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PinsDone {
    /// Files that are pinned now and were not, or the other way round.
    pub changed: u64,
    /// Files that were so before.
    pub unchanged: u64,
    /// The transaction that says so; `None` where nothing changed.
    pub lsn: Option<u64>,
    /// Paths where nothing could be done.
    pub failures: Vec<PathFailure>,
}

/// A path where something failed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PathFailure {
    /// The path.
    #[serde(flatten)]
    pub path: PathText,
    /// Why, and what to do.
    pub error: String,
}

/// A file that a rule acts on.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PolicyFile {
    /// The rule.
    pub rule: String,
    /// What is done: "migrate", "release", "recall", "pin".
    pub action: String,
    /// The file's id.
    pub file: u64,
    /// Its path.
    #[serde(flatten)]
    pub path: MaybePath,
    /// Its bytes.
    pub size: u64,
    /// What it weighs, where the rule has a weight.
    pub weight: Option<f64>,
    /// Why it failed.
    pub error: Option<String>,
}

/// What became of a rule.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RuleDone {
    /// The rule.
    pub rule: String,
    /// What it does.
    pub action: String,
    /// Why it ran, or did nothing.
    pub why: String,
    /// Files it was about in this run.
    pub files: u64,
    /// Bytes of those that did not fail.
    pub bytes: u64,
    /// Files that failed.
    pub failed: u64,
    /// It ended early, since too many failed.
    pub gave_up: bool,
    /// Files are left for another run.
    pub left: bool,
    /// Why it could not run at all.
    pub error: Option<String>,
}

/// A part of what a run of policies did.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct PolicyRun {
    /// The next files.
    pub files: Vec<PolicyFile>,
    /// Rules that have ended.
    pub rules: Vec<RuleDone>,
}

/// Which rules are about a file.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// The file.
    pub file: FoundFile,
    /// In the order of the policy.
    pub rules: Vec<RuleExplained>,
}

/// Why a rule is or is not about a file.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RuleExplained {
    /// The rule.
    pub rule: String,
    /// What it does.
    pub action: String,
    /// Whether it is about the file now.
    pub applies: bool,
    /// What the file weighs there.
    pub weight: Option<f64>,
    /// What must hold, in its order.
    pub clauses: Vec<Clause>,
}

/// A part of a condition.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Clause {
    /// Its text.
    pub text: String,
    /// Whether it holds; `None` where it is NULL, which counts as no.
    pub holds: Option<bool>,
    /// The columns that it mentions, and what the file has there.
    pub values: Vec<ColumnValue>,
}

/// What a file has in a column.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ColumnValue {
    /// The column.
    pub column: String,
    /// Its value as text; `None` for NULL.
    pub value: Option<String>,
}
