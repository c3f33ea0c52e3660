//! Examining one inode: attributes, extended attributes, flags, and content where that is needed.
//!
//! Everything here goes through the daemon's private mount and by handle, so that the inode that is
//! examined is the one that was meant. Nothing here decides what is logged; see [`super::facts`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;
use std::time::Instant;

use tierfs::stub::{Stage, StubMark};
use tierfs::{LogId, Lsn};

use super::content::{self, Base, DataSink};
use super::facts::{Certainty, Facts, Version, time_of};
use super::hints::Look;
use crate::sys::handle::{Handle, Opened, open_by_handle};
use crate::sys::stat::{self, FileKind, Stat, stat_of};
use crate::sys::{self, clone, flags, io, lease, pagecache, xattr};
use crate::tier::mark::{self, Marked};

/// A file that is read for longer than this while it changes is not read twice at once.
const AGAIN_BELOW: Duration = Duration::from_millis(50);
/// Two ticks of the slowest clock, in nanoseconds.
const TICKS: i128 = 20_000_000;

/// What the log knows of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Size in bytes.
    pub size: u64,
    /// Modification time.
    pub mtime: tierfs::Time,
    /// Change time when it was examined last.
    pub ctime: Option<tierfs::Time>,
    /// The version in the log; `None` where there is none (the file was empty).
    pub content: Option<Lsn>,
    /// That version is fuzzy.
    pub fuzzy: bool,
}

/// What came of an examination.
#[derive(Debug)]
pub enum Outcome {
    /// The inode is gone, or about to go.
    Gone,
    /// Here it is.
    Facts(Box<Facts>),
}

/// Opens an inode to be looked at but not read. `None`: it is gone.
pub fn hold(mount: BorrowedFd<'_>, handle: &Handle) -> Result<Option<OwnedFd>, sys::Error> {
    match open_by_handle(mount, handle.as_ref(), io::HOLD)? {
        Opened::Fd(fd) => Ok(Some(fd)),
        Opened::Stale => Ok(None),
    }
}

/// Whether an inode is a regular file that is not empty. Nothing is opened that could notice.
pub fn has_content(mount: BorrowedFd<'_>, handle: &Handle) -> Result<bool, sys::Error> {
    let Some(held) = hold(mount, handle)? else {
        return Ok(false);
    };
    let stat = stat_of(held.as_fd())?;
    Ok(stat.kind == FileKind::Regular && stat.size > 0)
}

/// Examines everything but the content of a regular file that has some.
pub fn attributes(mount: BorrowedFd<'_>, handle: &Handle) -> Result<Outcome, sys::Error> {
    let Some(held) = hold(mount, handle)? else {
        return Ok(Outcome::Gone);
    };
    let stat = stat_of(held.as_fd())?;
    if stat.nlink == 0 {
        return Ok(Outcome::Gone);
    }
    let facts = match stat.kind {
        FileKind::Regular | FileKind::Directory => {
            let Some(fd) = open_for_reading(mount, handle, stat.kind)? else {
                return Ok(Outcome::Gone);
            };
            opened(fd.as_fd(), stat)?
        }
        _ => held_only(held.as_fd(), stat)?,
    };
    Ok(Outcome::Facts(Box::new(facts)))
}

/// Attributes of an inode that is not to be opened, `stat` being older than the call.
pub fn held_only(held: BorrowedFd<'_>, stat: Stat) -> Result<Facts, sys::Error> {
    let target = if stat.kind == FileKind::Symlink {
        io::read_link(held)?.map(OsStringExt::into_vec)
    } else {
        None
    };
    let xattrs = xattr::read_all(held)?;
    Ok(facts_of(stat, xattrs, 0, target))
}

/// Attributes of an open regular file or directory, `stat` being older than the call.
fn opened(fd: BorrowedFd<'_>, stat: Stat) -> Result<Facts, sys::Error> {
    let flags = flags::read(fd)?.map_or(0, flags::Flags::bits);
    Ok(facts_of(stat, xattr::read_all(fd)?, flags, None))
}

fn facts_of(stat: Stat, xattrs: Vec<xattr::Xattr>, flags: u32, target: Option<Vec<u8>>) -> Facts {
    Facts {
        stat,
        xattrs,
        flags,
        target,
        content: None,
        certainty: Certainty::Sure,
        unreadable: None,
        hollow: false,
    }
}

fn open_for_reading(
    mount: BorrowedFd<'_>,
    handle: &Handle,
    kind: FileKind,
) -> Result<Option<OwnedFd>, sys::Error> {
    let flags = if kind == FileKind::Directory {
        io::READ_DIR
    } else {
        io::READ
    };
    match open_by_handle(mount, handle.as_ref(), flags)? {
        Opened::Fd(fd) => Ok(Some(fd)),
        Opened::Stale => Ok(None),
    }
}

/// Whether a write after `now` may leave a file with the change time that it has. Never where times are
/// `fine`; else all changes within a tick of the clock have the same one.
fn may_come_again(ctime: sys::stat::Time, now: tierfs::Time, fine: bool) -> bool {
    let nanos = |seconds: i64, nanos: u32| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    !fine && nanos(now.seconds, now.nanos) - nanos(ctime.0, ctime.1) < TICKS
}

/// A regular file's examination with its content.
pub struct FileExam<'e, S> {
    /// A readable descriptor on the private mount.
    pub mount: BorrowedFd<'e>,
    /// Which inode. The caller knows that it is a regular file.
    pub handle: &'e Handle,
    /// What the log knows; `None` for a new file.
    pub known: Option<Known>,
    /// Whether to read content that seems unchanged.
    pub look: Look,
    /// Where new content goes.
    pub sink: &'e mut S,
    /// The log, whose stubs are never read: their data is in it already.
    pub log_id: LogId,
}

impl<S: DataSink> FileExam<'_, S> {
    /// Examines the file. `base` gives the pieces of the version that the log has, once for each reading.
    pub fn run<'b>(
        mut self,
        base: &mut dyn FnMut(Lsn) -> Result<Base<'b>, S::Error>,
    ) -> Result<Outcome, S::Error> {
        let Some(fd) = open_for_reading(self.mount, self.handle, FileKind::Regular)? else {
            return Ok(Outcome::Gone);
        };
        let fd = fd.as_fd();
        let stat = stat_of(fd)?;
        if stat.nlink == 0 || stat.kind != FileKind::Regular {
            return Ok(Outcome::Gone);
        }
        // Before anything else: once it is open and found whole, nobody can release it.
        let marked = mark::tidy(fd, self.log_id)?;
        let mut facts = opened(fd, stat)?;
        match marked {
            Marked::Whole => {}
            Marked::Stub(mark) => {
                self.stub(&mark, &mut facts);
                return Ok(Outcome::Facts(Box::new(facts)));
            }
            Marked::Snapshot(_) => {
                facts.certainty = Certainty::Unread;
                facts.unreadable = Some(
                    "it is the like of a released file in a snapshot; its bytes come when it is opened".to_owned(),
                );
                return Ok(Outcome::Facts(Box::new(facts)));
            }
            Marked::Suspect(why) => {
                facts.certainty = Certainty::Unread;
                facts.unreadable = Some(why);
                return Ok(Outcome::Facts(Box::new(facts)));
            }
        }
        if self.must_read(&facts.stat) {
            self.version(fd, &mut facts, base)?;
        } else if let Some(known) = self.known {
            let same = known.ctime == Some(time_of(facts.stat.ctime));
            facts.certainty = if same {
                Certainty::Same
            } else {
                Certainty::Unread
            };
        }
        Ok(Outcome::Facts(Box::new(facts)))
    }

    /// A stub has the content that its mark names, if that is the log's version.
    fn stub(&self, mark: &StubMark, facts: &mut Facts) {
        const CAPABILITY: &[u8] = b"security.capability";
        let is_logged = self.known.is_some_and(|known| {
            known.content == Some(mark.version)
                && known.size == facts.stat.size
                && mark.size == facts.stat.size
        });
        if mark.stage == Stage::Moving {
            // The time is that of a release's or recall's last step.
            facts.stat.mtime = (mark.mtime.seconds, mark.mtime.nanos);
            let at = facts
                .xattrs
                .binary_search_by(|(name, _)| name.as_slice().cmp(CAPABILITY));
            if let (Err(at), Some(value)) = (at, &mark.capability) {
                facts
                    .xattrs
                    .insert(at, (CAPABILITY.to_vec(), value.clone()));
            }
        }
        facts.flags |= mark.seals.0;
        facts.hollow = !is_logged;
        facts.certainty = if is_logged {
            Certainty::Sure
        } else {
            Certainty::Unread
        };
    }

    fn must_read(&self, stat: &Stat) -> bool {
        let Some(known) = self.known else {
            return stat.size > 0;
        };
        let settled = known.ctime == Some(time_of(stat.ctime)) && !known.fuzzy;
        let moved = known.size != stat.size || known.mtime != time_of(stat.mtime) || known.fuzzy;
        moved || (self.look == Look::Content && !settled)
    }

    /// Reads until a reading is whole: once, again where that is cheap, from a reflinked copy where
    /// there can be one, and else takes what was read and marks it fuzzy.
    fn version<'b>(
        &mut self,
        fd: BorrowedFd<'_>,
        facts: &mut Facts,
        base: &mut dyn FnMut(Lsn) -> Result<Base<'b>, S::Error>,
    ) -> Result<(), S::Error> {
        let started = Instant::now();
        if self.whole(fd, facts, base)? {
            return Ok(());
        }
        if started.elapsed() < AGAIN_BELOW {
            *facts = opened(fd, stat_of(fd)?)?;
            if self.whole(fd, facts, base)? {
                return Ok(());
            }
        }
        // Attributes from before the copy: what changes after them is found by what it raises.
        let before = opened(fd, stat_of(fd)?)?;
        let copy = clone::clone_file(fd, self.mount).unwrap_or_else(|error| {
            // No room, or a quota: not the file's fault.
            tracing::debug!(%error, "no momentary copy of a file that keeps changing");
            None
        });
        let Some(copy) = copy else {
            if let Some(version) = &mut facts.content {
                version.fuzzy = true;
            }
            return Ok(());
        };
        let size = stat_of(copy.as_fd())?.size;
        let read = content::read(copy.as_fd(), size, self.base(base)?, true, self.sink)?;
        *facts = before;
        facts.stat.size = size;
        facts.certainty = Certainty::Written;
        facts.content = Some(Version {
            fuzzy: read.changed,
            ..read.version
        });
        Ok(())
    }

    /// One reading. True where nobody changed the file meanwhile. `facts` are from just before it.
    fn whole<'b>(
        &mut self,
        fd: BorrowedFd<'_>,
        facts: &mut Facts,
        base: &mut dyn FnMut(Lsn) -> Result<Base<'b>, S::Error>,
    ) -> Result<bool, S::Error> {
        let alone = match lease::stat_unwritten(fd) {
            Ok(Some(stat)) if stat.ctime == facts.stat.ctime => true,
            Ok(Some(stat)) => {
                *facts = opened(fd, stat)?;
                true
            }
            Ok(None) | Err(_) => false,
        };
        if !alone {
            // A store through mmap into a page that is dirty already leaves ctime as it is.
            if let Err(error) = io::flush_range(fd, 0, 0) {
                tracing::debug!(%error, "a file that is being written cannot be flushed");
            }
            *facts = opened(fd, stat_of(fd)?)?;
        }
        let before = (facts.stat.ctime, facts.stat.size);
        let may_come_again = may_come_again(before.0, tierfs::Time::now(), stat::times_are_fine());
        let cached = pagecache::CacheState::of(fd, before.1);
        // Asking for holes, which comes first, waits for writes that are under way.
        let mut read = content::read(fd, before.1, self.base(base)?, false, self.sink)?;
        if read.doubtful {
            read = content::read(fd, before.1, self.base(base)?, true, self.sink)?;
        }
        cached.restore(fd)?;
        let after = stat_of(fd)?;
        let whole = !read.changed && before == (after.ctime, after.size);
        facts.content = Some(read.version);
        facts.certainty = if whole && alone && !may_come_again {
            Certainty::Sure
        } else {
            Certainty::Written
        };
        Ok(whole)
    }

    fn base<'b>(
        &self,
        base: &mut dyn FnMut(Lsn) -> Result<Base<'b>, S::Error>,
    ) -> Result<Option<(Lsn, Base<'b>)>, S::Error> {
        match self.known.and_then(|known| known.content) {
            Some(lsn) => Ok(Some((lsn, base(lsn)?))),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::may_come_again;

    #[test]
    fn a_young_change_time_may_come_again_where_the_clock_ticks() {
        let now = tierfs::Time {
            seconds: 10,
            nanos: 5_000_000,
        };
        assert!(may_come_again((9, 990_000_000), now, false));
        assert!(!may_come_again((9, 980_000_000), now, false));
        assert!(may_come_again((11, 0), now, false));
        assert!(!may_come_again((10, 5_000_000), now, true));
    }
}
