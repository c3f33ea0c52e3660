//! What content needs, as people read it: which volumes, and how much of them.

use super::format::{add, name, size, some};
use crate::control::model::{Needs, VolumeNeed};

/// "volume 4f00aa11bb22cc33 of pool a at /archive/a1, which is away".
pub(super) fn volume_name(volume: &VolumeNeed) -> String {
    let mut text = format!("volume {} of pool {}", volume.volume, name(&volume.pool));
    if let Some(path) = &volume.path {
        add!(text, " at {}", name(path));
    }
    text.push_str(if volume.present {
        ", which is here"
    } else {
        ", which is AWAY"
    });
    text
}

/// Several lines; nothing where nothing is needed.
pub(super) fn render(needs: &Needs) -> String {
    let mut text = String::new();
    if needs.spool_bytes > 0 {
        add!(
            text,
            "{} are in the spool and need no volume\n",
            size(needs.spool_bytes)
        );
    }
    for volume in &needs.volumes {
        add!(
            text,
            "{}: {}, {} in {}\n",
            volume_name(volume),
            some(volume.files, "file", "files"),
            size(volume.bytes),
            some(volume.segments.len() as u64, "segment", "segments")
        );
    }
    let away = needs.volumes.iter().filter(|volume| !volume.present);
    let mut pools: Vec<&str> = away.map(|volume| volume.pool.as_str()).collect();
    pools.dedup();
    match pools.len() {
        0 => {}
        1 => text.push_str("bring the volumes that are away\n"),
        _ => text.push_str("bring the volumes that are away; those of one pool suffice\n"),
    }
    if needs.nowhere_bytes > 0 {
        add!(
            text,
            "no good copy is known of {}\n",
            size(needs.nowhere_bytes)
        );
    }
    text
}
