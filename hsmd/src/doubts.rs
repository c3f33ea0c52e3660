//! Doubts about copies: what somebody read of a segment was not what was logged, so its copies are read back.
//!
//! Whoever reads says only which segment; whether a copy is damaged is found out here, by comparing all of it
//! with its volume's inventory. So an error that passes does not condemn a copy, and damage that was met by
//! chance counts like damage that `tierctl volume verify` finds.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use media::directory::{self, Found};
use media::{ObjectName, Volume};
use tierfs::ids::SegmentNo;

use crate::board::{self, Board};
use crate::committer::Asked;
use crate::fetch::Copies;
use crate::shared::{Shared, lock};

/// Doubts that wait; more are dropped, whoever meets the damage again says so again.
const WAITING: usize = 64;
/// A segment is not read back again before this time.
const AGAIN: Duration = Duration::from_mins(5);
const TICK: Duration = Duration::from_millis(500);

/// See the module.
pub struct Doubts {
    shared: Arc<Shared>,
    board: Arc<Board>,
    asked: Sender<Asked>,
    put: Sender<SegmentNo>,
    take: Receiver<SegmentNo>,
    when: Mutex<HashMap<SegmentNo, Instant>>,
}

impl Doubts {
    /// There are none yet; [`Self::run`] is for a thread of the caller.
    pub fn new(shared: Arc<Shared>, board: Arc<Board>, asked: Sender<Asked>) -> Self {
        let (put, take) = bounded(WAITING);
        Self {
            shared,
            board,
            asked,
            put,
            take,
            when: Mutex::default(),
        }
    }

    /// Reads copies back that were doubted, until the daemon stops.
    pub fn run(&self) {
        while !self.shared.stopping() {
            match self.take.recv_timeout(TICK) {
                Ok(segment) => self.check(segment),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn check(&self, segment: SegmentNo) {
        for place in self.board.places(segment) {
            if let Some((serial, found)) = read_back(&place, segment) {
                let copy = self.board.verified(&serial, segment, found);
                let _ = self.asked.send(Asked::Copy(copy));
            }
        }
        self.shared.nudge();
    }
}

/// The volume's serial, and what its copy is; `None` where it cannot be read now.
fn read_back(place: &Path, segment: SegmentNo) -> Option<(String, board::Found)> {
    let Ok(Found::Labelled(volume)) = directory::probe(place) else {
        return None;
    };
    let name = ObjectName::new(&segment.object_name()).ok()?;
    let found = match volume.verify(&name) {
        Ok(_) => board::Found::Good,
        Err(error) if error.is_absent() => return None,
        Err(_) if volume.open(&name).is_err() => board::Found::Gone,
        Err(error) => {
            tracing::error!(%error, place = %place.display(), "a copy is damaged");
            board::Found::Damaged
        }
    };
    Some((volume.label().serial.to_string(), found))
}

impl Copies for Doubts {
    fn holders(&self, segment: SegmentNo) -> Vec<(String, PathBuf)> {
        self.board.holders(segment)
    }

    fn doubt(&self, segment: SegmentNo, why: &str) {
        let mut when = lock(&self.when);
        when.retain(|_, since| since.elapsed() < AGAIN);
        if when.contains_key(&segment) {
            return;
        }
        tracing::warn!(%segment, why, "not every copy could be read as it was logged; all that are here are read back");
        if self.put.try_send(segment).is_ok() {
            when.insert(segment, Instant::now());
        }
    }
}
