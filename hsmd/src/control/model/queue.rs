//! What recall has to do, and what it needs for that.

use serde::{Deserialize, Serialize};

use super::{MaybePath, Moved, PathFailure, When};

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

impl Needs {
    /// Adds what other files need.
    pub fn add(&mut self, other: Self) {
        self.files += other.files;
        self.bytes += other.bytes;
        self.spool_bytes += other.spool_bytes;
        self.nowhere_bytes += other.nowhere_bytes;
        for volume in other.volumes {
            let same = |known: &&mut VolumeNeed| known.volume == volume.volume;
            let Some(known) = self.volumes.iter_mut().find(same) else {
                self.volumes.push(volume);
                continue;
            };
            known.present |= volume.present;
            known.files += volume.files;
            known.bytes += volume.bytes;
            known.segments.extend(volume.segments);
            known.segments.sort_unstable();
            known.segments.dedup();
        }
        self.sort();
    }

    /// Those that are away come first.
    pub fn sort(&mut self) {
        self.volumes
            .sort_by(|a, b| (a.present, &a.pool, &a.volume).cmp(&(b.present, &b.pool, &b.volume)));
    }
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

/// What recalling files needs.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RecallPlan {
    /// Files that are released, or in part.
    pub files: u64,
    /// Their content.
    pub needs: Needs,
    /// Paths of which that cannot be told.
    pub failures: Vec<PathFailure>,
}

/// A part of what a recall answers.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RecallPart {
    /// What became of files since the last part.
    pub results: Vec<Moved>,
    /// How far the whole request is.
    pub progress: Option<RecallProgress>,
}

/// How far a recall is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RecallProgress {
    /// Files of which it is known what became of them.
    pub files: u64,
    /// Bytes that came back, those of files that are not complete among them.
    pub bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(serial: &str, present: bool, segments: &[u64]) -> VolumeNeed {
        VolumeNeed {
            pool: "a".to_owned(),
            volume: serial.to_owned(),
            path: None,
            present,
            files: 1,
            bytes: 10,
            segments: segments.to_vec(),
        }
    }

    #[test]
    fn needs_add_up_and_a_segment_counts_once() {
        let mut all = Needs::default();
        for volumes in [
            vec![volume("1", true, &[1, 3])],
            vec![volume("2", false, &[7]), volume("1", true, &[2, 3])],
        ] {
            all.add(Needs {
                files: 1,
                bytes: 20,
                volumes,
                ..Needs::default()
            });
        }
        assert_eq!((all.files, all.bytes), (2, 40));
        let shown: Vec<_> = all
            .volumes
            .iter()
            .map(|one| {
                (
                    one.volume.as_str(),
                    one.files,
                    one.bytes,
                    one.segments.as_slice(),
                )
            })
            .collect();
        assert_eq!(shown, [("2", 1, 10, &[7][..]), ("1", 2, 20, &[1, 2, 3])]);
    }
}
