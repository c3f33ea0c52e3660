//! The wire between guard and worker: accesses go one way, each with its descriptor, answers the other.
//!
//! A pair of `SOCK_SEQPACKET` sockets, so that a message arrives whole or not at all, and the end of one
//! side shows at the other. The guard never waits for it: what does not fit stays with the guard.

#![allow(unsafe_code)] // owning descriptors that came over the link

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    recvmsg, sendmsg, socketpair,
};

use super::Error;
use super::permission::{Answer, Attempt};

/// All messages are of this size: a kind, and up to four numbers.
const BYTES: usize = 40;
/// Of an access's first number; above them it says for how many milliseconds it waits.
const KIND_BITS: u32 = 8;

/// An access that waits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Waits {
    /// The guard's name for it, never used again.
    pub id: u64,
    /// What is attempted.
    pub attempt: Attempt,
    /// Who attempts it.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// For so long already: an earlier worker may have had it. Whole milliseconds arrive.
    pub since: Duration,
}

/// What the guard tells the worker.
#[derive(Debug)]
pub struct Handed {
    /// Who waits.
    pub waits: Waits,
    /// The file.
    pub fd: OwnedFd,
}

/// What the worker tells the guard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Told {
    /// It serves accesses from now on.
    Ready,
    /// An access's answer.
    Answer(u64, Answer),
    /// Whether every file is asked about, not only stubs.
    Everything(bool),
}

/// Both ends.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Error> {
    socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|error| Error::call("socketpair", "guard and worker", error))
}

type Words = [u64; 5];

fn encode(words: Words) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    for (at, word) in words.iter().enumerate() {
        bytes[at * 8..at * 8 + 8].copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

fn decode(bytes: &[u8]) -> Option<Words> {
    let mut words = [0; 5];
    if bytes.len() != BYTES {
        return None;
    }
    for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(chunk.try_into().ok()?);
    }
    Some(words)
}

/// Sends without waiting. False: there is no room now.
fn send(socket: BorrowedFd<'_>, words: Words, fd: Option<BorrowedFd<'_>>) -> Result<bool, Error> {
    let bytes = encode(words);
    let numbers = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = numbers
        .as_ref()
        .map(|numbers| ControlMessage::ScmRights(numbers));
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    loop {
        return match sendmsg::<UnixAddr>(
            socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            rights.as_slice(),
            flags,
            None,
        ) {
            Ok(_) => Ok(true),
            Err(nix::Error::EINTR) => continue,
            // ETOOMANYREFS: too many descriptors are under way.
            Err(nix::Error::EAGAIN | nix::Error::ENOBUFS | nix::Error::ETOOMANYREFS) => Ok(false),
            Err(error) => Err(Error::call(
                "sendmsg",
                "the link of guard and worker",
                error,
            )),
        };
    }
}

/// The next message; `None` at the other side's end.
fn receive(socket: BorrowedFd<'_>) -> Result<Option<(Words, Option<OwnedFd>)>, Error> {
    let failed = |error| Error::call("recvmsg", "the link of guard and worker", error);
    let mut bytes = [0; BYTES];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
    loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let received =
            recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags);
        let received = match received {
            Err(nix::Error::EINTR) => continue,
            Err(nix::Error::ECONNRESET) => return Ok(None),
            received => received.map_err(failed)?,
        };
        let length = received.bytes;
        let mut fd = None;
        for message in received.cmsgs().map_err(failed)? {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                for number in numbers {
                    // SAFETY: the kernel installed it for us with this message, and this is the one
                    // place that takes it.
                    fd = Some(unsafe { OwnedFd::from_raw_fd(number) });
                }
            }
        }
        if length == 0 {
            return Ok(None);
        }
        return match decode(&bytes[..length]) {
            Some(words) => Ok(Some((words, fd))),
            None => Err(Error::Malformed {
                what: "a message between guard and worker",
                offset: 0,
                why: "its length is another: both must be of one version, restart hsmd",
            }),
        };
    }
}

/// The guard's side of an access. False: there is no room now.
pub fn hand(socket: BorrowedFd<'_>, waits: &Waits, fd: BorrowedFd<'_>) -> Result<bool, Error> {
    let (kind, range) = match waits.attempt {
        Attempt::Open => (1, (0, 0)),
        Attempt::Exec => (2, (0, 0)),
        Attempt::Access(None) => (3, (0, 0)),
        Attempt::Access(Some(range)) => (4, range),
    };
    let who = u64::from(waits.pid.cast_unsigned()) << 32 | u64::from(waits.uid);
    let since = u64::try_from(waits.since.as_millis()).unwrap_or(0) << KIND_BITS;
    send(
        socket,
        [kind | since, waits.id, who, range.0, range.1],
        Some(fd),
    )
}

/// The worker's side of an access; `None` when the guard is gone.
pub fn take(socket: BorrowedFd<'_>) -> Result<Option<Handed>, Error> {
    let Some(([first, id, who, offset, count], fd)) = receive(socket)? else {
        return Ok(None);
    };
    let malformed = |why| Error::Malformed {
        what: "a message from the guard",
        offset: 0,
        why,
    };
    let attempt = match first & ((1 << KIND_BITS) - 1) {
        1 => Attempt::Open,
        2 => Attempt::Exec,
        3 => Attempt::Access(None),
        4 => Attempt::Access(Some((offset, count))),
        _ => return Err(malformed("its kind is unknown")),
    };
    let low = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0);
    Ok(Some(Handed {
        waits: Waits {
            id,
            attempt,
            pid: low(who >> 32).cast_signed(),
            uid: low(who),
            since: Duration::from_millis(first >> KIND_BITS),
        },
        fd: fd.ok_or_else(|| malformed("it has no descriptor"))?,
    }))
}

/// The worker's side of an answer. Waits for room: the guard always reads.
pub fn tell(socket: BorrowedFd<'_>, told: Told) -> Result<(), Error> {
    let words = match told {
        Told::Ready => [1, 0, 0, 0, 0],
        Told::Everything(all) => [3, u64::from(all), 0, 0, 0],
        Told::Answer(id, Answer::Allow) => [2, id, 0, 0, 0],
        Told::Answer(id, Answer::Deny(errno)) => [2, id, 1, u64::from(errno.unsigned_abs()), 0],
    };
    while !send(socket, words, None)? {
        let mut fds = [nix::poll::PollFd::new(
            socket.as_fd(),
            nix::poll::PollFlags::POLLOUT,
        )];
        let _ = nix::poll::poll(&mut fds, nix::poll::PollTimeout::from(100_u16));
    }
    Ok(())
}

/// The guard's side of an answer; `None` when the worker is gone.
pub fn hear(socket: BorrowedFd<'_>) -> Result<Option<Told>, Error> {
    let Some((words, _)) = receive(socket)? else {
        return Ok(None);
    };
    match words {
        [1, ..] => Ok(Some(Told::Ready)),
        [3, all, ..] => Ok(Some(Told::Everything(all != 0))),
        [2, id, 0, ..] => Ok(Some(Told::Answer(id, Answer::Allow))),
        [2, id, _, errno, _] => {
            let errno = i32::try_from(errno).unwrap_or(libc::EIO);
            Ok(Some(Told::Answer(id, Answer::Deny(errno))))
        }
        _ => Err(Error::Malformed {
            what: "a message from the worker",
            offset: 0,
            why: "its kind is unknown",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn opens(id: u64) -> Waits {
        Waits {
            id,
            attempt: Attempt::Open,
            pid: 1,
            uid: 0,
            since: Duration::ZERO,
        }
    }

    #[test]
    fn accesses_and_answers_arrive() {
        let (guard, worker) = pair().expect("a link");
        let mut file = tempfile::tempfile().expect("a file");
        std::io::Write::write_all(&mut file, b"here").expect("written");
        std::io::Seek::rewind(&mut file).expect("rewound");
        for attempt in [
            Attempt::Open,
            Attempt::Exec,
            Attempt::Access(None),
            Attempt::Access(Some((7, u64::MAX))),
        ] {
            let waits = Waits {
                id: 9,
                attempt,
                pid: -1,
                uid: 1000,
                since: Duration::from_hours(100),
            };
            assert!(hand(guard.as_fd(), &waits, file.as_fd()).expect("sent"));
            let handed = take(worker.as_fd()).expect("read").expect("there");
            assert_eq!(handed.waits, waits);
        }
        hand(guard.as_fd(), &opens(1), file.as_fd()).expect("sent");
        let handed = take(worker.as_fd()).expect("read").expect("there");
        let mut text = String::new();
        std::fs::File::from(handed.fd)
            .read_to_string(&mut text)
            .expect("read");
        assert_eq!(text, "here");
        for told in [
            Told::Ready,
            Told::Everything(true),
            Told::Answer(u64::MAX, Answer::Allow),
            Told::Answer(3, Answer::Deny(libc::ENOSPC)),
        ] {
            tell(worker.as_fd(), told).expect("sent");
            assert_eq!(hear(guard.as_fd()).expect("read"), Some(told));
        }
        drop(worker);
        assert_eq!(hear(guard.as_fd()).expect("read"), None);
    }

    #[test]
    fn a_full_link_is_not_waited_for() {
        let (guard, worker) = pair().expect("a link");
        let file = tempfile::tempfile().expect("a file");
        let mut sent = 0;
        while hand(guard.as_fd(), &opens(sent), file.as_fd()).expect("sent") {
            sent += 1;
            assert!(sent < 1_000_000, "there is no end to it");
        }
        for id in 0..sent {
            let handed = take(worker.as_fd()).expect("read").expect("there");
            assert_eq!(handed.waits.id, id);
        }
    }
}
