//! Immutable and append-only stubs: their flags are off while they are recalled, and come back.
//!
//! With such a flag nobody can write a file or its mark. So the flags are noted in the list of stubs before
//! they are taken off, and stay there until the file has them again, durably: wherever a crash comes between,
//! the next worker puts them back.

use std::os::fd::{AsFd, BorrowedFd};

use tierfs::record::Bits;
use tierfs::stub::{Stage, StubMark};

use super::{FillError, Recall};
use crate::shared::lock;
use crate::sys::handle::{Handle, Opened, open_by_handle};
use crate::sys::{flags, io, space};
use crate::tier::mark::{self, Marked};

impl Recall {
    /// Takes the flags of an inode off; gives all that it is to get again.
    pub(super) fn unseal(&self, handle: &Handle, fd: BorrowedFd<'_>) -> Result<u32, FillError> {
        let seals = flags::seals(fd)?;
        let key = handle.to_bytes();
        if seals != 0 {
            lock(&self.parts.residency).note_unsealed(&key, seals)?;
            flags::unseal(fd)?;
        }
        Ok(lock(&self.parts.residency).seals_of(&key))
    }

    /// Gives an inode its flags again.
    pub(super) fn seal(
        &self,
        handle: &Handle,
        fd: BorrowedFd<'_>,
        seals: u32,
    ) -> Result<(), FillError> {
        if seals != 0 {
            flags::seal(fd, seals)?;
            space::sync_file(fd)?;
            lock(&self.parts.residency).note_sealed(&handle.to_bytes())?;
        }
        Ok(())
    }

    /// The file stays a stub.
    pub(super) fn seal_again(&self, handle: &Handle, fd: BorrowedFd<'_>) -> Result<(), FillError> {
        if let Marked::Stub(mut mark) = mark::look(fd, self.parts.log_id)? {
            let seals = std::mem::replace(&mut mark.seals, Bits(0));
            space::set_mark(fd, &mark.to_bytes())?;
            self.seal(handle, fd, seals.0)?;
        }
        Ok(())
    }

    /// A recall ended early: the file has its flags again, and is the stub that it was.
    pub(super) fn seal_after_failure(&self, handle: &Handle) {
        if lock(&self.parts.residency).seals_of(&handle.to_bytes()) == 0 {
            return;
        }
        let root = self.parts.mount.root();
        let sealed = match open_by_handle(root, handle.as_ref(), io::READ) {
            Ok(Opened::Fd(fd)) => self.seal_again(handle, fd.as_fd()),
            Ok(Opened::Stale) => Ok(()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = sealed {
            tracing::warn!(%error, "a file that was immutable or append-only is not, until hsmd starts again");
        }
    }

    /// Puts back what a worker before this one took off. Before anything is recalled or examined.
    pub fn settle_seals(&self) {
        let all = lock(&self.parts.residency).unsealed();
        for (handle, seals) in all {
            if let Err(error) = self.settle_one(&handle, seals) {
                tracing::warn!(%error, "a file that was immutable or append-only is not, as yet");
            }
        }
    }

    fn settle_one(&self, key: &[u8], seals: u32) -> Result<(), FillError> {
        let root = self.parts.mount.root();
        let Ok(handle) = Handle::from_bytes(key) else {
            return Ok(lock(&self.parts.residency).note_sealed(key)?);
        };
        let Opened::Fd(fd) = open_by_handle(root, handle.as_ref(), io::READ)? else {
            return Ok(lock(&self.parts.residency).note_sealed(key)?);
        };
        let fd = fd.as_fd();
        match mark::look(fd, self.parts.log_id)? {
            Marked::Stub(mark) if mark.stage == Stage::Rests && mark.seals.0 != 0 => {
                self.seal_again(&handle, fd)?;
                self.seal(&handle, fd, seals)
            }
            // Its recall goes on, and puts them back at its end.
            Marked::Stub(mark) if mark.stage != Stage::Rests => {
                let seals = Bits(mark.seals.0 | seals);
                if seals != mark.seals && flags::seals(fd)? == 0 {
                    space::set_mark(fd, &StubMark { seals, ..mark }.to_bytes())?;
                }
                Ok(())
            }
            _ => self.seal(&handle, fd, seals),
        }
    }
}
