//! Recalled bytes that did not reach the disk.
//!
//! The kernel tells of a failed write-back once, and drops the pages' dirt all the same: from then on memory
//! has the right bytes, the disk zeros, and the next sync succeeds. So after a failed sync nothing is believed
//! that was written before it: every file that is not finished yet is written once more, all of it, until a
//! sync after that succeeds. The syncs are of a descriptor of our own, which has every error told once,
//! whoever else syncs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use tierfs::stub::{Stage, StubMark};

use super::finish::is_used;
use super::queue::{Filling, OnDisk, State, Waiter};
use super::{FillError, Filler, Recall};
use crate::shared::lock;
use crate::sys::handle::{Handle, Opened, open_by_handle};
use crate::sys::{Error, io, pagecache, space};
use crate::tier::mark::{self, Marked};

/// How often it is looked whether those who were refused are gone, and after how long.
const GO_AWAY_TRIES: usize = 20;
const GO_AWAY: Duration = Duration::from_millis(5);

/// Opens a directory once more: errors are told to each open file.
pub(super) fn opened_anew(root: BorrowedFd<'_>) -> Result<OwnedFd, Error> {
    let opened = io::open_at(root, ".", io::READ_DIR)?;
    opened.ok_or_else(|| Error::on_fd("openat", root, nix::Error::ENOENT))
}

impl Recall {
    /// Syncs the filesystem, and hears of every error since the last time.
    pub(super) fn sync(&self) -> Result<(), Error> {
        io::syncfs(self.sync_root.as_fd()).inspect_err(|_| self.doubt_all())
    }

    /// A sync has failed.
    pub(super) fn doubt_all(&self) {
        self.sync_errors.fetch_add(1, Ordering::SeqCst);
        for state in lock(&self.queue).states.values_mut() {
            if let State::There { there, .. } = state {
                there.disk.doubt();
            }
        }
    }

    /// Whether a file is to be written once more before it is finished.
    pub(super) fn is_doubtful(&self, handle: &Handle) -> bool {
        let queue = lock(&self.queue);
        matches!(queue.states.get(handle), Some(State::There { there, .. }) if there.disk != OnDisk::Told)
    }

    /// Writes a file once more that is there, with the same bytes. Who reads it notices nothing.
    pub(super) fn write_again(&self, handle: &Handle) -> Result<(), FillError> {
        let _held = self.parts.busy.hold(handle);
        let errors = self.sync_errors.load(Ordering::SeqCst);
        let root = self.parts.mount.root();
        let write = libc::O_RDWR | libc::O_NOFOLLOW | libc::O_NOATIME;
        let Opened::Fd(held) = open_by_handle(root, handle.as_ref(), io::READ)? else {
            return Ok(());
        };
        if let Marked::Stub(mut mark) = mark::look(held.as_fd(), self.parts.log_id)? {
            mark.seals.0 |= self.unseal(handle, held.as_fd())?;
            space::set_mark(held.as_fd(), &mark.to_bytes())?;
            if mark.stage == Stage::There {
                // Should we end now, its bytes are not on the disk.
                mark.stage = Stage::Filled;
            }
            let filler = Filler {
                fetcher: &self.parts.fetcher,
                catalog: &self.parts.catalog,
                filling: &Filling::new(0),
            };
            let fd = open_by_handle(root, handle.as_ref(), write)?;
            let direct = open_by_handle(root, handle.as_ref(), write | libc::O_DIRECT)?;
            if let (Opened::Fd(fd), Opened::Fd(direct)) = (fd, direct) {
                filler.write_again(fd.as_fd(), direct.as_fd(), &mark)?;
                space::sync_file(fd.as_fd())?;
                if !filler.is_filled(direct.as_fd(), &mark)? {
                    drop((fd, direct));
                    self.forget_cached(handle, &held)?;
                    return Err(FillError::Unwritten);
                }
            }
        }
        let mut queue = lock(&self.queue);
        if let Some(State::There { there, .. }) = queue.states.get_mut(handle) {
            let told = self.sync_errors.load(Ordering::SeqCst) == errors;
            there.disk = if told { OnDisk::Told } else { OnDisk::Doubtful };
            there.sealed |= self.parts_sealed(handle);
        }
        Ok(())
    }

    /// Memory lets go of what the disk does not have and never will while memory has it; the next try writes it.
    /// Whoever has it open would see that, and who waits to open it counts as one who has: he is refused.
    fn forget_cached(&self, handle: &Handle, held: &OwnedFd) -> Result<(), Error> {
        let mut in_the_way = Vec::new();
        if let Some(State::There { there, waiters, .. }) = lock(&self.queue).states.get_mut(handle)
        {
            there.disk = OnDisk::Missing;
            let opens = |waiter: &mut Waiter| matches!(waiter, Waiter::Access { .. });
            in_the_way.extend(waiters.extract_if(.., opens));
        }
        for waiter in in_the_way {
            self.refuse(waiter, libc::EIO, &FillError::Unwritten.to_string());
        }
        for _ in 0..GO_AWAY_TRIES {
            if !is_used(held) {
                // Who opens it now is refused, so nobody sees what the disk has.
                return pagecache::drop_cached(held.as_fd(), 0, 0);
            }
            thread::sleep(GO_AWAY);
        }
        Ok(())
    }

    fn parts_sealed(&self, handle: &Handle) -> bool {
        lock(&self.parts.residency).seals_of(&handle.to_bytes()) != 0
    }

    /// Whether all logged bytes are on the disk: a worker before this one wrote them, and what it was told of
    /// errors is not known.
    pub(super) fn is_on_disk(
        &self,
        handle: &Handle,
        filler: &Filler<'_>,
        mark: &StubMark,
    ) -> Result<bool, FillError> {
        let root = self.parts.mount.root();
        match open_by_handle(root, handle.as_ref(), io::READ | libc::O_DIRECT)? {
            Opened::Fd(fd) => filler.is_filled(fd.as_fd(), mark),
            Opened::Stale => Ok(false),
        }
    }
}
