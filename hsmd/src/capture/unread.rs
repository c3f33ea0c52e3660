//! Files whose names or attributes were examined, and their content was not.
//!
//! What was found of such a file is in the log, but its change time says nothing of its content: a write just
//! before it may be what changed it, and is told by an event of its own. So the change time counts only when
//! that event must have come; until then the file is known here, and is not taken for a changed one.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tierfs::{FileId, Time};

use crate::shared::lock;

/// Files remembered at most; of others the next sweep reads the content.
const FILES_MAX: usize = 100_000;
/// How often they are looked through.
const EVERY: Duration = Duration::from_secs(5);

/// A file's change time and size when its attributes were examined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The change time.
    pub ctime: Time,
    /// The size.
    pub size: u64,
}

/// See the module.
#[derive(Default)]
pub struct Unread(Mutex<Files>);

#[derive(Default)]
struct Files {
    by_id: HashMap<FileId, (Seen, Instant)>,
    looked_at: Option<Instant>,
}

impl Unread {
    /// A file's attributes were examined; from `until` on its change time speaks of its content, too.
    pub fn note(&self, file: FileId, seen: Seen, until: Instant) {
        let mut files = lock(&self.0);
        if files.by_id.len() < FILES_MAX || files.by_id.contains_key(&file) {
            files.by_id.insert(file, (seen, until));
        }
    }

    /// More is known of a file, or less.
    pub fn forget(&self, file: FileId) {
        lock(&self.0).by_id.remove(&file);
    }

    /// Whether a file was examined, less its content, when it had this change time.
    pub fn knows(&self, file: FileId, ctime: Time) -> bool {
        let files = lock(&self.0);
        files
            .by_id
            .get(&file)
            .is_some_and(|(seen, _)| seen.ctime == ctime)
    }

    /// Takes out those whose time has come, where nothing waits since before it (`oldest`): whatever raised
    /// an event by then was examined, and that would have had the file forgotten.
    pub fn take_ripe(
        &self,
        wait: Duration,
        oldest: impl FnOnce() -> Option<Instant>,
    ) -> Vec<(FileId, Seen)> {
        let now = Instant::now();
        let mut files = lock(&self.0);
        let looked = files
            .looked_at
            .is_some_and(|at| now.duration_since(at) < EVERY.min(wait));
        if files.by_id.is_empty() || looked {
            return Vec::new();
        }
        files.looked_at = Some(now);
        let oldest = oldest();
        let ripe = |until: Instant| until <= now && oldest.is_none_or(|since| since > until);
        let taken = files.by_id.extract_if(|_, (_, until)| ripe(*until));
        taken.map(|(file, (seen, _))| (file, seen)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Time {
        Time { seconds, nanos: 0 }
    }

    fn id(number: u64) -> FileId {
        FileId::new(number).unwrap()
    }

    #[test]
    fn a_change_time_is_known_until_it_is_ripe() {
        let (unread, now) = (Unread::default(), Instant::now());
        let seen = Seen {
            ctime: at(7),
            size: 3,
        };
        unread.note(id(1), seen, now);
        unread.note(id(2), seen, now + Duration::from_hours(1));
        assert!(unread.knows(id(1), at(7)));
        assert!(!unread.knows(id(1), at(8)));
        assert!(!unread.knows(id(3), at(7)));
        // A hint from before may be about it.
        assert!(unread.take_ripe(Duration::ZERO, || Some(now)).is_empty());
        assert_eq!(
            unread.take_ripe(Duration::ZERO, || None),
            vec![(id(1), seen)]
        );
        assert!(!unread.knows(id(1), at(7)) && unread.knows(id(2), at(7)));
        unread.forget(id(2));
        assert!(!unread.knows(id(2), at(7)));
    }
}
