//! Keeping a file's modification time over writes of our own, without swallowing somebody else's.
//!
//! A write sets the time to now; afterwards it is put back. Somebody may set it in between. So each
//! write is bracketed: the file is looked at before and after, and a time that is not what our own last
//! write left is somebody else's, and becomes the one that is put back. What remains is the moment
//! between a look and the call behind it, about a microsecond.

use std::os::fd::BorrowedFd;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::sys::stat::{Time, stat_of};
use crate::sys::{Error, space};

/// A tick of the slowest clock, twice: times of files may be so much behind the clock.
const TICKS: i128 = 20_000_000;

/// See the module.
#[derive(Debug)]
pub struct Mtime {
    /// What the file is to have.
    wanted: Time,
    /// What it has since our own last write.
    ours: Option<Time>,
}

fn nanos(time: Time) -> i128 {
    i128::from(time.0) * 1_000_000_000 + i128::from(time.1)
}

fn now() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| i128::try_from(since.as_nanos()).unwrap_or(0))
}

impl Mtime {
    /// Of a file that is to have the time that it has now.
    pub fn keep(fd: BorrowedFd<'_>) -> Result<Self, Error> {
        Ok(Self {
            wanted: stat_of(fd)?.mtime,
            ours: None,
        })
    }

    /// Of a file that is to have another time: what it has is from our own work, which was interrupted.
    pub fn regain(fd: BorrowedFd<'_>, wanted: Time) -> Result<Self, Error> {
        let found = stat_of(fd)?.mtime;
        Ok(Self {
            wanted,
            ours: (found != wanted).then_some(found),
        })
    }

    /// What the file is to have, as far as is known.
    pub fn wanted(&self) -> Time {
        self.wanted
    }

    fn look(&mut self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let found = stat_of(fd)?.mtime;
        if found != self.ours.unwrap_or(self.wanted) {
            (self.wanted, self.ours) = (found, None);
        }
        Ok(())
    }

    /// Does something that changes the time.
    pub fn over<T>(
        &mut self,
        fd: BorrowedFd<'_>,
        act: impl FnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        self.look(fd)?;
        let before = now();
        let done = act();
        let after = now();
        let found = stat_of(fd)?.mtime;
        if found != self.wanted {
            let ours = (before - TICKS..=after).contains(&nanos(found));
            if ours {
                self.ours = Some(found);
            } else {
                (self.wanted, self.ours) = (found, None);
            }
        }
        done
    }

    /// Puts the time back.
    pub fn restore(mut self, fd: BorrowedFd<'_>) -> Result<Time, Error> {
        self.look(fd)?;
        if self.ours.is_some() {
            space::set_mtime(fd, self.wanted)?;
        }
        Ok(self.wanted)
    }
}
