//! Keeping a file's modification time over writes of our own, without swallowing somebody else's.
//!
//! A write sets the time to now; afterwards it is put back. Somebody may set it in between. So each
//! write is bracketed: the file is looked at before and after, and a time that is not what our own last
//! write left is somebody else's, and becomes the one that is put back. What remains is the moment
//! between a look and the call behind it, about a microsecond.

use std::os::fd::BorrowedFd;

use nix::time::{ClockId, clock_gettime};

use crate::sys::stat::{Time, stat_of};
use crate::sys::{Error, space};

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

/// What a clock says. Times of files come from the coarse one, or are finer: it lags by a tick, and in a virtual machine
/// by as long as the tick is late.
fn now(clock: ClockId) -> i128 {
    clock_gettime(clock).map_or(0, |now| {
        nanos((now.tv_sec(), 0)) + i128::from(now.tv_nsec())
    })
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
        let before = now(ClockId::CLOCK_REALTIME_COARSE);
        let done = act();
        let after = now(ClockId::CLOCK_REALTIME);
        let found = stat_of(fd)?.mtime;
        // What writes nothing leaves the time of our write before.
        if found != self.wanted && Some(found) != self.ours {
            let ours = (before..=after).contains(&nanos(found));
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::time::{Duration, SystemTime};

    use super::*;

    /// A write, and much later one of nothing.
    #[test]
    fn what_writes_nothing_does_not_make_our_time_somebody_elses() {
        let file = tempfile::tempfile().unwrap();
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        file.set_modified(old).unwrap();
        let fd = file.as_fd();
        let mut mtime = Mtime::keep(fd).unwrap();
        mtime.over(fd, || space::write_at(fd, b"bytes", 0)).unwrap();
        std::thread::sleep(Duration::from_millis(60));
        mtime.over(fd, || Ok(())).unwrap();
        mtime.restore(fd).unwrap();
        assert_eq!(file.metadata().unwrap().modified().unwrap(), old);
    }

    #[test]
    fn somebody_elses_time_is_kept() {
        let file: File = tempfile::tempfile().unwrap();
        let theirs = SystemTime::UNIX_EPOCH + Duration::from_secs(1_100_000_000);
        let fd = file.as_fd();
        let mut mtime = Mtime::keep(fd).unwrap();
        mtime.over(fd, || space::write_at(fd, b"bytes", 0)).unwrap();
        file.set_modified(theirs).unwrap();
        mtime.over(fd, || space::write_at(fd, b"more", 9)).unwrap();
        mtime.restore(fd).unwrap();
        assert_eq!(file.metadata().unwrap().modified().unwrap(), theirs);
    }
}
