//! The room on the watched filesystem, in words.

use super::format::{name, size, span};
use crate::control::model::{SpaceState, SpaceStatus};

/// What `tierctl status` says of it: how full it is, and how fast it may be filled.
pub(super) fn text(space: &SpaceStatus) -> [String; 2] {
    let doing = match space.state {
        SpaceState::Enough => String::new(),
        SpaceState::Releasing => ", files are being released".to_owned(),
        SpaceState::InNeed => {
            ", files are being released, and space shrinks faster than it should".to_owned()
        }
        SpaceState::NothingLeft => ", and nothing is left that could be released".to_owned(),
    };
    let full = format!(
        "{} % in use, {} left; rule {} releases from {} % on, down to {} %{doing}",
        space.used_percent,
        size(space.available_bytes),
        name(&space.rule),
        space.high_watermark,
        space.low_watermark
    );
    let written = format!(
        "{}/s are written now, {}/s at most in the last hour",
        size(space.write_bytes_per_s),
        size(space.write_bytes_per_s_max)
    );
    let limit = match (
        space.limit_bytes_per_s,
        space.release_latency_ms,
        space.release_bytes_per_s,
    ) {
        (Some(limit), Some(latency), Some(speed)) => format!(
            "writers may fill it by {}/s: they have {} until space is given back, which takes {}, at {}/s; {written}",
            size(limit),
            size(space.headroom_bytes),
            span(latency),
            size(speed)
        ),
        _ => {
            format!("how fast writers may fill it is known once a watermark was reached; {written}")
        }
    };
    [full, limit]
}
