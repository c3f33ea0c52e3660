//! How full the watched filesystem is, and how fast it may be filled.

use serde::{Deserialize, Serialize};

/// The room on the watched filesystem, as the rules with watermarks keep it. Rates are bytes a second.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SpaceStatus {
    /// What is going on.
    pub state: SpaceState,
    /// Per cent in use, as df prints it.
    pub used_percent: u64,
    /// Bytes that can still be written.
    pub available_bytes: u64,
    /// The rule that releases first.
    pub rule: String,
    /// Its marks, per cent.
    pub high_watermark: u8,
    /// Likewise.
    pub low_watermark: u8,
    /// Bytes that are free when its high watermark is reached.
    pub headroom_bytes: u64,
    /// How fast the filesystem is filled now.
    pub write_bytes_per_s: u64,
    /// The most over five seconds in the last hour.
    pub write_bytes_per_s_max: u64,
    /// The longest time that writers went on before space was given back; null: not measured yet.
    pub release_latency_ms: Option<u64>,
    /// How fast space is given back.
    pub release_bytes_per_s: Option<u64>,
    /// So fast writers may be without meeting a full disk.
    pub limit_bytes_per_s: Option<u64>,
    /// Released by watermarks and for recalls since the daemon began: files.
    pub released_files: u64,
    /// Bytes of the disk.
    pub released_bytes: u64,
}

/// What goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpaceState {
    /// There is room.
    Enough,
    /// Files are released, down to the low watermark.
    Releasing,
    /// The same, and space shrinks faster than is healthy.
    InNeed,
    /// It is above the high watermark, and no rule finds a file that can be released.
    NothingLeft,
}
