//! The thread that reads the kernel's events and notes what they name.
//!
//! It does nothing else, so that the queue in the kernel stays short: no file is opened here.

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::capture::hints::{Beside, EntryKey, Key, Look, Noted};
use crate::control::model::Event as Told;
use crate::control::when::When;
use crate::shared::Shared;
use crate::sys;
use crate::sys::fanotify::{BUFFER_BYTES, EntryRef, Event, Group, Mask};

/// How long events gather before they are read. A reader that sleeps on the queue is woken by every
/// event, at the cost of the program that caused it.
const GATHER: Duration = Duration::from_millis(4);

/// How to ask the reader for something.
#[derive(Clone)]
pub struct EventsHandle {
    bell: Arc<EventFd>,
    requests: Sender<Sender<()>>,
}

impl EventsHandle {
    /// Returns once everything that was in the kernel's queue at the call has been noted. False
    /// where the reader has ended.
    pub fn drain(&self) -> bool {
        let (done, wait) = bounded(1);
        self.requests.send(done).is_ok() && self.bell.write(1).is_ok() && wait.recv().is_ok()
    }

    /// [`Self::drain`], but not longer than `patience`; false where the reader is not that far.
    pub fn drain_within(&self, patience: Duration) -> bool {
        let (done, wait) = bounded(1);
        self.requests.try_send(done).is_ok()
            && self.bell.write(1).is_ok()
            && wait.recv_timeout(patience).is_ok()
    }

    /// Makes the reader look whether it is to end.
    pub fn ring(&self) {
        let _ = self.bell.write(1);
    }
}

/// Reads events until the daemon stops.
pub struct EventReader {
    group: Group,
    shared: Arc<Shared>,
    bell: Arc<EventFd>,
    requests: Receiver<Sender<()>>,
    sweep: Sender<()>,
    pid: i32,
}

impl EventReader {
    /// Reads `group`'s events; after an overflow it asks for a sweep.
    pub fn new(
        group: Group,
        shared: Arc<Shared>,
        sweep: Sender<()>,
    ) -> Result<(Self, EventsHandle), sys::Error> {
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|error| sys::Error::call("eventfd", "the event reader", error))?;
        let bell = Arc::new(bell);
        let (requests, taken) = bounded(64);
        let handle = EventsHandle {
            bell: bell.clone(),
            requests,
        };
        let pid = nix::unistd::getpid().as_raw();
        Ok((
            Self {
                group,
                shared,
                bell,
                requests: taken,
                sweep,
                pid,
            },
            handle,
        ))
    }

    /// The thread's body.
    pub fn run(self) -> Result<(), sys::Error> {
        let mut buf = vec![0; BUFFER_BYTES];
        while !self.shared.stopping() {
            self.wait()?;
            self.shared.reads_events(true);
            let _ = self.bell.read();
            let waiting: Vec<Sender<()>> = self.requests.try_iter().collect();
            // What comes after this count was not there when they asked.
            let pending = self.group.pending_events()?;
            let mut read = 0;
            loop {
                let more = self.read(&mut buf)?;
                read += more;
                if more == 0 || (read >= pending && !waiting.is_empty()) {
                    break;
                }
            }
            // What is there now came after all that was read.
            self.shared.reads_events(false);
            if self.group.pending_events()? > 0 {
                self.shared.reads_events(true);
            }
            for done in waiting {
                let _ = done.send(());
            }
        }
        Ok(())
    }

    /// Waits for an event, and then for more of them; a request ends both.
    fn wait(&self) -> Result<(), sys::Error> {
        let bell = || PollFd::new(self.bell.as_fd(), PollFlags::POLLIN);
        let group = PollFd::new(self.group.as_fd(), PollFlags::POLLIN);
        let gather = PollTimeout::try_from(GATHER).unwrap_or(PollTimeout::ZERO);
        poll_for(&mut [group, bell()], PollTimeout::NONE)?;
        poll_for(&mut [bell()], gather)
    }

    /// Reads once; gives the number of events.
    fn read(&self, buf: &mut [u8]) -> Result<u64, sys::Error> {
        let Some(events) = self.group.read(buf)? else {
            return Ok(0);
        };
        let (mut count, mut noted) = (0, Vec::new());
        for event in events {
            count += 1;
            match event {
                Ok(event) if event.mask.overflow() => self.overflow(),
                Ok(event) if event.pid == self.pid => {}
                Ok(event) => note(&event, &mut noted),
                Err(error) => {
                    tracing::error!(%error, "an event cannot be read; everything is examined");
                    self.overflow();
                }
            }
        }
        self.shared
            .counters
            .events
            .fetch_add(count, Ordering::Relaxed);
        self.shared.note(noted);
        // A read of only unreadable bytes must not look like an empty queue.
        Ok(count.max(1))
    }

    fn overflow(&self) {
        let now = tierfs::Time::now().seconds;
        self.shared.watched_since.store(now, Ordering::Relaxed);
        // Before the sweep is asked for: it must cover this.
        self.shared.ask_examination();
        let total = self
            .shared
            .counters
            .overflows
            .fetch_add(1, Ordering::Relaxed)
            + 1;
        self.shared.tell(&Told::Overflow {
            time: When::now(),
            total,
        });
        let _ = self.sweep.try_send(());
    }
}

fn poll_for(fds: &mut [PollFd<'_>], timeout: PollTimeout) -> Result<(), sys::Error> {
    match poll(fds, timeout) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(error) => Err(sys::Error::call("poll", "the fanotify group", error)),
    }
}

fn entry_of(entry: EntryRef<'_>) -> Option<EntryKey> {
    let name = entry.name?.as_bytes().to_vec();
    Some(EntryKey {
        dir: entry.dir.to_handle(),
        name,
    })
}

/// What an event says to look at.
pub(crate) fn note(event: &Event<'_>, noted: &mut Vec<Noted>) {
    let names = Mask::CREATE.union(Mask::DELETE).union(Mask::RENAME);
    let entry = event.entry.and_then(entry_of);
    if event.mask.intersects(names) {
        let made = match event.target {
            Some(target) if event.mask.intersects(Mask::CREATE) && !event.mask.is_dir() => {
                Beside::Inode(target.to_handle())
            }
            _ => Beside::Nothing,
        };
        let places = [
            // The new one first: it leads to the old one, and both are settled at once.
            event.new_entry.and_then(entry_of),
            event.old_entry.and_then(entry_of),
            entry.clone(),
        ];
        noted.extend(
            places
                .into_iter()
                .flatten()
                .map(|place| (Key::Entry(place), Look::Attributes, made.clone())),
        );
    }
    let content = Mask::MODIFY.union(Mask::CLOSE_WRITE);
    let look = if event.mask.intersects(content) {
        Look::Content
    } else {
        Look::Attributes
    };
    if let Some(object) = event.object() {
        // A name that is gone is of no use, and a file that was just made comes with its name.
        let useful = event
            .mask
            .intersects(content.union(Mask::ATTRIB).union(Mask::RENAME));
        if useful {
            let entry = event.new_entry.and_then(entry_of).or(entry);
            let beside = entry.map_or(Beside::Nothing, Beside::Name);
            noted.push((Key::Inode(object.to_handle()), look, beside));
        }
    }
}
