//! Making recalls last: data durable, the mark says so durably, the mark goes.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use tierfs::FileId;
use tierfs::residency::Stub;
use tierfs::stub::Stage;

use super::{AGAIN, FillError, Outcome, Queue, Recall, STUCK, State, Waiter};
use crate::capture::hints::{Beside, Key, Look};
use crate::shared::lock;
use crate::sys::handle::{Handle, Opened, open_by_handle};
use crate::sys::stat::stat_of;
use crate::sys::{flags, io, lease, space};
use crate::tier::mark::{self, Marked};
use crate::tier::residents::ResidentsError;

/// Files whose data is made durable one by one; more are synced with the whole filesystem.
pub(super) const ONE_BY_ONE: usize = 8;
/// How long files that lost their marks stay on the list of stubs at least.
const FORGET: Duration = Duration::from_secs(5);
/// How often it is asked whether a recalled file is still in use.
const IN_USE: Duration = Duration::from_millis(200);
/// Files that finish at once.
const FINISH_MAX: usize = 2000;

/// A file on its way from *there* to whole.
struct Finishing {
    handle: Handle,
    fd: OwnedFd,
    /// It was open before its bytes were written: a sync of it tells every error.
    told: bool,
}

impl Recall {
    /// The finishing thread's body: makes recalled files durable and takes their marks away.
    pub fn finish(&self) {
        let mut forgot = Instant::now();
        while let Some(batch) = self.next_batch() {
            let closed = lock(&self.queue).closed;
            if !batch.is_empty() {
                self.finish_batch(batch);
                lock(&self.queue).finished = Some(Instant::now());
            }
            if closed || forgot.elapsed() >= FORGET {
                forgot = Instant::now();
                self.forget();
            }
            if closed {
                return;
            }
        }
        self.forget();
    }

    /// Takes files off the list whose marks are gone for good.
    fn forget(&self) {
        if let Err(error) = self.forget_deleted().and_then(|()| self.try_forget()) {
            tracing::warn!(%error, "the list of stubs keeps files that are none");
        }
    }

    /// Files have lost their marks otherwise.
    pub fn something_leaves(&self) {
        self.finish.notify_one();
    }

    /// The log says that these are deleted.
    pub fn note_deleted(&self, files: impl Iterator<Item = FileId>) {
        let mut deleted = lock(&self.deleted);
        let before = deleted.len();
        deleted.extend(files);
        if deleted.len() > before {
            self.finish.notify_one();
        }
    }

    /// Deleted stubs leave the list, too.
    fn forget_deleted(&self) -> Result<(), ResidentsError> {
        let mut files = std::mem::take(&mut *lock(&self.deleted));
        let mut result = Ok(());
        files.retain(|file| match self.is_settled(*file) {
            Ok(settled) => !settled,
            Err(error) => {
                result = Err(error);
                true
            }
        });
        lock(&self.deleted).append(&mut files);
        self.parts.suspects.tell_if_any();
        result
    }

    /// Whether a deleted file has nothing to do with the list any more; while a program has it open it has.
    fn is_settled(&self, file: FileId) -> Result<bool, ResidentsError> {
        let Some(stub) = lock(&self.parts.residency).get(file)? else {
            return Ok(true);
        };
        let handle = Handle::from_bytes(&stub.handle);
        let opened = handle.map(|handle| {
            let root = self.parts.mount.root();
            open_by_handle(root, handle.as_ref(), io::HOLD)
        });
        match opened {
            // It got a name again.
            Ok(Ok(Opened::Fd(fd))) => Ok(stat_of(fd.as_fd())?.nlink > 0),
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(Opened::Stale)) | Err(_) => {
                if let Ok(handle) = Handle::from_bytes(&stub.handle) {
                    self.is_well(&handle);
                }
                self.parts.residents.is_gone();
                lock(&self.parts.residency).note_unmarked(stub);
                Ok(true)
            }
        }
    }

    fn try_forget(&self) -> Result<(), ResidentsError> {
        let root = self.parts.mount.root();
        let Some(mark) = lock(&self.parts.residency).prepare_to_leave()? else {
            return Ok(());
        };
        space::set_mark(root, &mark.to_bytes())?;
        io::syncfs(root)?;
        Ok(lock(&self.parts.residency).leave()?)
    }

    /// Files to finish, each with whether somebody waits for it.
    fn next_batch(&self) -> Option<Vec<(Handle, bool)>> {
        let mut queue = lock(&self.queue);
        let begun = Instant::now();
        loop {
            let now = Instant::now();
            let waited = begun.elapsed() >= FORGET;
            let closed = queue.closed;
            let Queue { there, states, .. } = &mut *queue;
            let awaited = |handle: &Handle| states.get(handle).is_some_and(State::is_awaited);
            let mut batch = Vec::new();
            let due = |(handle, due, sooner): &mut (Handle, Instant, bool)| {
                closed || *due <= now || (*sooner && awaited(handle))
            };
            for (handle, ..) in there.extract_if(.., due).take(FINISH_MAX) {
                let waits = awaited(&handle);
                batch.push((handle, waits));
            }
            if closed || !batch.is_empty() {
                // Once more after the end: the next worker is to find whole files where nobody uses them.
                return Some(batch).filter(|batch| !batch.is_empty());
            }
            let next = queue.there.iter().map(|(_, due, _)| *due).min();
            let mut patience = next.map_or(Duration::from_mins(1), |due| due - now);
            let leaving = lock(&self.parts.residency).has_leaving();
            if leaving || !lock(&self.deleted).is_empty() {
                patience = patience.min(FORGET);
                if waited {
                    return Some(Vec::new());
                }
            }
            queue = self
                .finish
                .wait_timeout(queue, patience)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(queue, _)| queue);
        }
    }

    fn finish_batch(&self, batch: Vec<(Handle, bool)>) {
        let root = self.parts.mount.root();
        let mut open = Vec::new();
        for (handle, awaited) in batch {
            let mut before = self.open_since(&handle);
            // Also where it is in use: what memory lets go of would be read from the disk.
            if self.is_doubtful(&handle) {
                // It would hear of what is mended now, and count as a user.
                before = None;
                if let Err(error) = self.write_again(&handle) {
                    self.put_off(handle, &error);
                    continue;
                }
            }
            let told = before.is_some();
            let opened = match before {
                Some(fd) => Ok(Opened::Fd(fd)),
                None => open_by_handle(root, handle.as_ref(), io::READ),
            };
            if let Ok(Opened::Fd(fd)) = &opened {
                self.hold_back_from_sealed(&handle, fd);
            }
            match opened {
                // Taking the mark away changes the file's change time, and programs that read it (tar)
                // take that for a change of the file: not before they are done.
                Ok(Opened::Fd(fd)) if !awaited && is_used(&fd) => self.rest(handle, true),
                // A user holds a lease on it.
                Err(error) if error.errno() == Some(libc::EAGAIN) => {
                    self.rest(handle, false);
                }
                Ok(Opened::Fd(fd)) => open.push(Finishing { handle, fd, told }),
                // Deleted meanwhile.
                Ok(Opened::Stale) => {
                    self.is_well(&handle);
                    self.is_whole(&handle, 0);
                }
                Err(error) => self.put_off(handle, &error.into()),
            }
        }
        let mut there = Vec::new();
        for file in self.make_durable(open) {
            match self.set_there(&file) {
                Ok(()) => there.push(file),
                Err(error) => self.put_off(file.handle, &error),
            }
        }
        for file in self.make_durable(there) {
            match self.finish_one(&file) {
                Ok(finished) => {
                    let Finishing { handle, fd, .. } = file;
                    // Who hears of it may release it at once, and then nobody is to have it open.
                    drop(fd);
                    self.finished(&handle, finished);
                }
                Err(error) => self.put_off(file.handle, &error),
            }
        }
    }

    /// A file that got flags since its bytes are there has them off while it is finished: who opens it from here on
    /// waits until it has them again.
    fn hold_back_from_sealed(&self, handle: &Handle, fd: &OwnedFd) {
        let sealed = flags::seals(fd.as_fd()).is_ok_and(|seals| seals != 0);
        if sealed && let Some(State::There { there, .. }) = lock(&self.queue).states.get_mut(handle)
        {
            there.sealed = true;
        }
    }

    /// It is in use: once more later, or as soon as somebody waits for it.
    fn rest(&self, handle: Handle, sooner: bool) {
        let at = Instant::now() + IN_USE;
        let mut by_the_way = Vec::new();
        let mut queue = lock(&self.queue);
        if let Some(State::There { waiters, .. }) = queue.states.get_mut(&handle) {
            // That may take days, and its bytes are there.
            by_the_way.extend(waiters.extract_if(.., |waiter| waiter.is_background()));
        }
        queue.there.push((handle, at, sooner));
        drop(queue);
        for waiter in by_the_way {
            if let Waiter::Asked { tell, .. } = waiter {
                tell(Outcome::Whole { bytes: 0 });
            }
        }
    }

    /// The file as it was opened before it was filled; the next one to ask gets nothing.
    fn open_since(&self, handle: &Handle) -> Option<OwnedFd> {
        match lock(&self.queue).states.get_mut(handle) {
            Some(State::There { open, .. }) => open.take(),
            _ => None,
        }
    }

    /// Gives the files that are durable as they are now.
    fn make_durable(&self, files: Vec<Finishing>) -> Vec<Finishing> {
        // Where inodes are not held by marks of their own, one may be forgotten with its error.
        let (everything, _) = self.parts.residents.mode();
        // And another program may have been told what a sync of a file opened later is not told again.
        if files.len() > ONE_BY_ONE || everything || files.iter().any(|file| !file.told) {
            return match self.sync() {
                Ok(()) => files,
                Err(error) => {
                    let error = error.into();
                    for file in files {
                        self.put_off(file.handle, &error);
                    }
                    Vec::new()
                }
            };
        }
        let mut durable = Vec::new();
        for file in files {
            match space::sync_file(file.fd.as_fd()) {
                Ok(()) => durable.push(file),
                Err(error) => {
                    self.doubt_all();
                    self.put_off(file.handle, &error.into());
                }
            }
        }
        // Those whose turn was before the one that failed, too.
        durable.retain(|file| {
            let doubtful = self.is_doubtful(&file.handle);
            if doubtful {
                self.rest(file.handle.clone(), true);
            }
            !doubtful
        });
        durable
    }

    /// The file is durable: its mark says so. From here on its flags are off.
    fn set_there(&self, file: &Finishing) -> Result<(), FillError> {
        let _held = self.parts.busy.hold(&file.handle);
        let fd = file.fd.as_fd();
        let Marked::Stub(mut mark) = mark::look(fd, self.parts.log_id)? else {
            return Ok(());
        };
        let sealed = flags::seals(fd)? != 0;
        if mark.stage == Stage::There && !sealed {
            return Ok(());
        }
        if !mark.stage.is_filled() {
            return Err(FillError::Suspect(
                "it is not all there any more".to_owned(),
            ));
        }
        mark.stage = Stage::There;
        mark.seals.0 |= self.unseal(&file.handle, fd)?;
        let set = space::set_mark(fd, &mark.to_bytes());
        if set.is_err() && sealed {
            self.seal(&file.handle, fd, mark.seals.0)?;
        }
        Ok(set?)
    }

    /// The file is durable, and its mark says so durably. It leaves the queue while it is held, so that no release
    /// of it comes between: what is *there* in memory is never a stub again on the disk.
    fn finish_one(
        &self,
        Finishing { handle, fd, .. }: &Finishing,
    ) -> Result<Option<State>, FillError> {
        let _held = self.parts.busy.hold(handle);
        let marked = mark::look(fd.as_fd(), self.parts.log_id)?;
        // While it has its mark nobody writes; with the lease nobody does before the look at its time.
        let alone = lease::ReadLease::take(fd.as_fd())?;
        let mut seals = self.unseal(handle, fd.as_fd())?;
        let removed = space::remove_mark(fd.as_fd());
        if let Marked::Stub(mark) = &marked {
            seals |= mark.seals.0;
        }
        self.seal(handle, fd.as_fd(), seals)?;
        removed?;
        if let Marked::Stub(mark) = marked {
            lock(&self.parts.residency).note_unmarked(Stub {
                file: mark.file,
                handle: mark.handle,
            });
        }
        let news = matches!(lock(&self.queue).states.get(handle), Some(State::There { there, .. }) if there.news);
        if alone.is_some() && !news {
            self.parts.vouched.note(handle, stat_of(fd.as_fd())?.ctime);
        }
        drop(alone);
        self.parts.residents.unprotect(fd.as_fd())?;
        Ok(lock(&self.queue).remove(handle))
    }

    fn finished(&self, handle: &Handle, state: Option<State>) {
        let (bytes, news) = match &state {
            Some(State::There { there, .. }) => (there.bytes, there.news),
            _ => (0, true),
        };
        self.is_well(handle);
        // Its change time is a new one, by our own doing: what else it says is found by looking.
        let look = if news {
            Look::Content
        } else {
            Look::Attributes
        };
        let key = Key::Inode(handle.clone());
        self.parts.shared.note([(key, look, Beside::Nothing)]);
        self.all_go_on(state, bytes);
    }

    /// The file is right but cannot be made durable, or its mark not be taken away: tried again. Who waits
    /// to change it hears of it in the end.
    fn put_off(&self, handle: Handle, error: &FillError) {
        let why = format!("{}: {error}", self.name_of(&handle));
        self.parts.shared.trouble(
            STUCK,
            true,
            "recalled files can be read, but not changed",
            &why,
            "who opens one for writing waits as long as `recall_wait` says, and gets an error then; see to the disk",
        );
        lock(&self.stuck).insert(handle.clone());
        let late = |waiter: &mut Waiter| waiter.since().elapsed() >= self.parts.wait;
        let mut over = Vec::new();
        let mut queue = lock(&self.queue);
        if let Some(State::There { waiters, .. }) = queue.states.get_mut(&handle) {
            over = waiters.extract_if(.., late).collect();
        }
        let at = Instant::now() + AGAIN;
        queue.there.push((handle, at, false));
        drop(queue);
        let errno = match error {
            FillError::Sys(error) => error.errno(),
            _ => None,
        };
        for waiter in over {
            self.refuse(waiter, errno.unwrap_or(libc::EIO), &why);
        }
    }
}

/// Whether anybody but us has the file open.
pub(super) fn is_used(fd: &OwnedFd) -> bool {
    !matches!(lease::WriteLease::take(fd.as_fd()), Ok(Some(_)))
}
