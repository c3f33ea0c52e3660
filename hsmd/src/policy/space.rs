//! What the watcher of the free space ([`super::watch`]) and the rest of the daemon say to each other:
//! recall asks it for room, status asks it how things are.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use crate::control::model::SpaceStatus;
use crate::shared::lock;

/// How often whoever waits for room looks whether he still wants it.
const TICK: Duration = Duration::from_millis(100);

/// Whose files give the room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Anybody's: the disk is full.
    Anybodys,
    /// Those of a user, or of a group: the quota of one of them is used up.
    Of {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
    },
}

/// What came of a request for room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Made {
    /// There is room, or was a moment ago.
    Room,
    /// No room can be made; why.
    None(String),
}

/// Somebody wants room.
pub struct Request {
    /// So many bytes.
    pub bytes: u64,
    /// From whom.
    pub whose: Whose,
    /// Nobody waits any more.
    pub given_up: Arc<AtomicBool>,
    /// Hears what came of it.
    pub told: Sender<Made>,
}

/// See the module.
pub struct Space {
    ask: Sender<Request>,
    asked: Mutex<Option<Receiver<Request>>>,
    shown: Mutex<Option<SpaceStatus>>,
}

impl Default for Space {
    fn default() -> Self {
        let (ask, asked) = unbounded();
        Self {
            ask,
            asked: Mutex::new(Some(asked)),
            shown: Mutex::default(),
        }
    }
}

impl Space {
    /// Where the requests come in, for the one who serves them. Once it is dropped nobody gets room.
    pub fn requests(&self) -> Option<Receiver<Request>> {
        lock(&self.asked).take()
    }

    /// Has so much room made, by releasing what rules say; waits for that, as long as `stops` says no.
    pub fn make(&self, bytes: u64, whose: Whose, stops: &dyn Fn() -> bool) -> Made {
        let nobody = || {
            Made::None("no rule releases anything, since there is no policy (hsm-policy(5))".into())
        };
        let given_up = Arc::new(AtomicBool::new(false));
        let (told, hears) = bounded(1);
        let request = Request {
            bytes,
            whose,
            given_up: given_up.clone(),
            told,
        };
        if self.ask.send(request).is_err() {
            return nobody();
        }
        loop {
            match hears.recv_timeout(TICK) {
                Ok(made) => return made,
                Err(RecvTimeoutError::Disconnected) => return nobody(),
                Err(RecvTimeoutError::Timeout) if stops() => {
                    given_up.store(true, Ordering::Relaxed);
                    return Made::None("nobody waits for it any more".to_owned());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Shows how things are.
    pub fn show(&self, status: Option<SpaceStatus>) {
        *lock(&self.shown) = status;
    }

    /// How things are; `None` where no rule has a watermark.
    pub fn status(&self) -> Option<SpaceStatus> {
        lock(&self.shown).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_room_never_waits_for_nobody() {
        let space = Space::default();
        // The watcher has not begun: whoever gives up is gone.
        let made = space.make(1, Whose::Anybodys, &|| true);
        assert!(matches!(made, Made::None(_)), "{made:?}");
        let requests = space.requests().expect("once");
        assert!(space.requests().is_none());
        let old = requests.recv().expect("the one that was given up");
        assert!(old.given_up.load(Ordering::Relaxed));
        std::thread::scope(|scope| {
            let asks = scope.spawn(|| space.make(7, Whose::Of { uid: 1, gid: 2 }, &|| false));
            let request = requests.recv().expect("a request");
            assert_eq!(
                (request.bytes, request.whose),
                (7, Whose::Of { uid: 1, gid: 2 })
            );
            let _ = request.told.send(Made::Room);
            assert_eq!(asks.join().expect("told"), Made::Room);
            // The watcher ends.
            let asks = scope.spawn(|| space.make(7, Whose::Anybodys, &|| false));
            drop(requests.recv().expect("a request"));
            assert!(matches!(asks.join().expect("told"), Made::None(_)));
        });
        drop(requests);
        assert!(matches!(
            space.make(1, Whose::Anybodys, &|| false),
            Made::None(_)
        ));
    }
}
