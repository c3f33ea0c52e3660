//! The guard: answers every access to the filesystem, or holds it until the worker has an answer.
//!
//! It is small, stays in memory, and never waits for the worker: what the worker does not take at once
//! lies in a queue here, and when the worker dies, everything unanswered is handed to the next one. It
//! never touches the public mount, and looks at nothing of a file but whether it has a mark, or no data at all
//! ([`super::regain`]).
//!
//! When the keeper is killed and no service manager kills the rest, the guard goes on in its place, until
//! somebody unmounts the filesystem: the next keeper does.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, getppid};

use super::exposure::Place;
use super::regain;
use crate::cli::GuardArgs;
use crate::output;
use crate::shared::lock;
use crate::sys::link::{self, Told, Waits};
use crate::sys::permission::{
    Access, Answer, Asked, Attempt, BUFFER_BYTES, NUMBERS, PermissionGroup,
};
use crate::sys::space::STUB_XATTR;
use crate::sys::{Error, lease, process, xattr};

/// Threads that read the group. A read stalls for up to 45 s where somebody holds a lease on the file in
/// question, and any user may hold as many as he has files: whenever all are in a read, one more starts.
const READERS: usize = 6;
/// With so many stalled, the next accesses wait.
const READERS_MAX: usize = 512;
/// Enough for a reader: no recursion, a small buffer. Locked memory.
const STACK_BYTES: usize = 128 * 1024;
/// Descriptors that are never used for accesses, beside a quarter of all for readers that stall.
const RESERVED: usize = 64;
/// A worker that ran for less is started again after this time.
const BACKOFF: Duration = Duration::from_secs(1);
/// How often a guard without a keeper looks whether the filesystem is mounted still.
const TICK: Duration = Duration::from_millis(500);
/// Says that the keeper may be gone.
const END_OF_KEEPER: Signal = Signal::SIGUSR1;
/// What the worker gives back when it must not be started again.
const REFUSED: i32 = 2;

/// An access that has no answer yet.
struct Waiting {
    access: Access,
    uid: u32,
    since: Instant,
}

#[derive(Default)]
struct Pending {
    /// By the guard's number, which ascends.
    all: BTreeMap<u64, Waiting>,
    /// Numbers that the worker was not told yet.
    untold: VecDeque<u64>,
    by_user: HashMap<u32, usize>,
}

/// How the threads that read the group are.
#[derive(Default)]
struct Readers {
    all: usize,
    /// Those that are in a read.
    reading: usize,
}

struct Guard {
    group: PermissionGroup,
    readers: Mutex<Readers>,
    /// Says that the group can be read, and to one reader, not to all.
    arrivals: Epoll,
    /// For the worker; see [`super::worker::Inherited`].
    events: OwnedFd,
    asked: Asked,
    pending: Mutex<Pending>,
    next: AtomicU64,
    bell: EventFd,
    /// The link to a worker that takes accesses.
    link: Mutex<Option<Arc<OwnedFd>>>,
    worker: AtomicI32,
    /// Every file is asked about, so that whole ones are worth an ignore mark.
    everything: AtomicBool,
    /// There will be no worker: released files cannot be opened, all others can.
    refusing: AtomicBool,
    waiters_max: usize,
}

impl Guard {
    /// Starts a reader.
    fn add_reader(self: &Arc<Self>) -> Result<(), String> {
        lock(&self.readers).all += 1;
        let guard = self.clone();
        let started = std::thread::Builder::new()
            .name("reader".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || guard.read());
        started.map(drop).map_err(|error| {
            lock(&self.readers).all -= 1;
            format!("starting a thread: {error}")
        })
    }

    /// A reader's body.
    fn read(self: &Arc<Self>) {
        let mut buf = [0; BUFFER_BYTES];
        loop {
            let mut arrived = [EpollEvent::empty()];
            let _ = self.arrivals.wait(&mut arrived, EpollTimeout::NONE);
            if self.begin_read()
                && let Err(error) = self.add_reader()
            {
                tracing::warn!(error, "all readers may stall on leases");
            }
            let read = self.group.read(&mut buf);
            let superfluous = self.end_read();
            match read {
                Ok(accesses) => {
                    for access in accesses {
                        self.decide(access);
                    }
                }
                Err(error) => {
                    // Leaving would let everybody read zeros.
                    tracing::error!(%error, "the permission group cannot be read; accesses wait");
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
            if superfluous {
                return;
            }
        }
    }

    /// True: another reader is needed, for all are in a read now.
    fn begin_read(&self) -> bool {
        let mut readers = lock(&self.readers);
        readers.reading += 1;
        readers.reading == readers.all && readers.all < READERS_MAX
    }

    /// True: there are enough readers without this one.
    fn end_read(&self) -> bool {
        let mut readers = lock(&self.readers);
        readers.reading -= 1;
        let superfluous = readers.all - readers.reading > READERS;
        readers.all -= usize::from(superfluous);
        superfluous
    }

    fn decide(&self, access: Access) {
        let own = i32::try_from(std::process::id()).unwrap_or(0);
        let worker = self.worker.load(Ordering::Relaxed);
        // 0 is somebody of another namespace.
        if access.pid > 0 && (access.pid == own || access.pid == worker) {
            // Nobody may wait for himself.
            return self.answer(access, Answer::Allow);
        }
        match self.is_marked(&access) {
            Ok(false) => self.answer(access, Answer::Allow),
            Ok(true) => self.hold(access),
            Err(error) => {
                tracing::warn!(%error, "a file whose mark cannot be read is not opened");
                self.answer(access, Answer::Deny(libc::EIO));
            }
        }
    }

    /// Whether the worker is to say what becomes of an access. A whole file that is asked about only because all are
    /// is ignored from here on.
    fn is_marked(&self, access: &Access) -> Result<bool, Error> {
        let look = || Ok(xattr::read_one(access.fd.as_fd(), STUB_XATTR)?.is_some());
        // What is open already was whole when it was opened.
        let opens = !matches!(access.attempt, Attempt::Access(Some((_, 1..))));
        if look()? || (opens && regain::is_hollow(access.fd.as_fd())?) {
            return Ok(true);
        }
        if self.everything.load(Ordering::Relaxed) && access.attempt == Attempt::Open {
            if let Err(error) = self.group.ignore_inode(access.fd.as_fd(), self.asked) {
                tracing::debug!(%error, "a whole file is asked about again and again");
                return Ok(false);
            }
            if look()? {
                self.group.unignore_inode(access.fd.as_fd(), self.asked)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn answer(&self, access: Access, answer: Answer) {
        if let Err(error) = self.group.answer(access, answer) {
            tracing::error!(%error, "an access gets no answer");
        }
    }

    /// Keeps an access for the worker.
    fn hold(&self, access: Access) {
        if self.refusing.load(Ordering::Relaxed) {
            let answer = Answer::later(access.attempt);
            return self.answer(access, answer);
        }
        let uid = process::user_of(access.pid).unwrap_or(0);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut pending = lock(&self.pending);
        let of_user = pending.by_user.get(&uid).copied().unwrap_or(0);
        if of_user >= self.waiters_max || pending.all.len() >= held_max() {
            drop(pending);
            tracing::warn!(
                uid,
                of_user,
                "too many programs wait for released files: one more fails with EAGAIN, or EBUSY"
            );
            let answer = Answer::later(access.attempt);
            return self.answer(access, answer);
        }
        *pending.by_user.entry(uid).or_default() += 1;
        let since = Instant::now();
        let waiting = Waiting { access, uid, since };
        pending.all.insert(id, waiting);
        pending.untold.push_back(id);
        drop(pending);
        // At once, where nothing is in the way: each thread that a message goes through costs a wake-up.
        let link = lock(&self.link).clone();
        if !link.is_some_and(|link| matches!(self.tell(link.as_fd()), Ok(false))) {
            let _ = self.bell.write(1);
        }
    }

    /// Tells the worker as much as the link takes. True: there is more.
    fn tell(&self, socket: BorrowedFd<'_>) -> Result<bool, Error> {
        let mut pending = lock(&self.pending);
        while let Some(id) = pending.untold.front().copied() {
            if let Some(Waiting { access, uid, since }) = pending.all.get(&id) {
                let waits = Waits {
                    id,
                    attempt: access.attempt,
                    pid: access.pid,
                    uid: *uid,
                    since: since.elapsed(),
                };
                if !link::hand(socket, &waits, access.fd.as_fd())? {
                    return Ok(true);
                }
            }
            pending.untold.pop_front();
        }
        Ok(false)
    }

    fn answered(&self, id: u64, answer: Answer) {
        let mut pending = lock(&self.pending);
        let Some(waiting) = pending.all.remove(&id) else {
            return;
        };
        if let Some(count) = pending.by_user.get_mut(&waiting.uid) {
            *count -= 1;
            if *count == 0 {
                pending.by_user.remove(&waiting.uid);
            }
        }
        drop(pending);
        self.answer(waiting.access, answer);
    }

    /// The worker is gone: the next one is told everything.
    fn untell(&self) {
        let mut pending = lock(&self.pending);
        pending.untold = pending.all.keys().copied().collect();
    }

    /// Nobody will answer any more.
    fn give_up(&self) {
        let all = std::mem::take(&mut lock(&self.pending).all);
        for (_, waiting) in all {
            let answer = Answer::later(waiting.access.attempt);
            self.answer(waiting.access, answer);
        }
    }
}

/// The worker process and the link to it.
struct Worker {
    child: Child,
    socket: Arc<OwnedFd>,
    started: Instant,
    ready: bool,
    /// There was no room for more.
    full: bool,
}

/// How the worker is started.
struct Recipe<'r> {
    program: PathBuf,
    args: &'r GuardArgs,
    config: &'r Path,
    log_level: &'r str,
}

impl Recipe<'_> {
    fn start(&self, guard: &Guard, first: bool) -> Result<Worker, String> {
        let failed = |error: Error| error.to_string();
        let (socket, theirs) = link::pair().map_err(failed)?;
        let group = process::group_for_child(&guard.group).map_err(failed)?;
        let events = process::for_child(&guard.events).map_err(failed)?;
        let their_end = process::for_child(&theirs).map_err(failed)?;
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(self.config);
        command.args(["--log-level", self.log_level]);
        if first && self.args.adopt_filesystem {
            command.arg("--adopt-filesystem");
        }
        if let Some(lsn) = self.args.accept_loss_after.filter(|_| first) {
            command.arg("--accept-loss-after").arg(lsn.to_string());
        }
        command.arg("worker");
        command.arg("--group-fd").arg(group.as_raw_fd().to_string());
        command
            .arg("--events-fd")
            .arg(events.as_raw_fd().to_string());
        command
            .arg("--link-fd")
            .arg(their_end.as_raw_fd().to_string());
        if guard.asked.pre_access {
            command.arg("--pre-access");
        }
        let child = command
            .spawn()
            .map_err(|error| format!("starting {}: {error}", self.program.display()))?;
        let pid = i32::try_from(child.id()).unwrap_or(0);
        guard.worker.store(pid, Ordering::Relaxed);
        Ok(Worker {
            child,
            socket: Arc::new(socket),
            started: Instant::now(),
            ready: false,
            full: false,
        })
    }
}

/// How many accesses can be held. Without a descriptor for the next one the kernel denies it with EPERM, whatever
/// it is of; and above [`NUMBERS`] nobody would sweep after us.
fn held_max() -> usize {
    let all = process::descriptors_max().min(NUMBERS.unsigned_abs() as usize);
    (all - all / 4).saturating_sub(RESERVED)
}

/// Tells of what the group has to read as long as it has: a reader that is held up in reading leaves the rest
/// to the others.
fn arrivals(group: &PermissionGroup) -> nix::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(group, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    Ok(epoll)
}

/// This program's file, or the one that has taken its place.
pub fn program() -> PathBuf {
    let path = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("hsmd"));
    // After an upgrade the file that this process runs is gone, and another lies in its place.
    match path
        .to_str()
        .and_then(|path| path.strip_suffix(" (deleted)"))
    {
        Some(path) => PathBuf::from(path),
        None => path,
    }
}

/// `hsmd guard`: until the keeper ends it.
pub fn run(config: &Path, log_level: &str, args: &GuardArgs) -> ExitCode {
    match Supervisor::new(args).and_then(|mut supervisor| supervisor.run(config, log_level, args)) {
        Ok(code) => code,
        Err(error) => {
            output::error("hsmd guard", &error);
            ExitCode::from(1)
        }
    }
}

/// The guard's main thread: the worker's life, and the link to it.
struct Supervisor {
    guard: Arc<Guard>,
    signals: SignalFd,
    /// `None`: it is gone, and that was told.
    keeper: Option<i32>,
    place: Place,
    ready_once: bool,
    stopping: bool,
    restarting: bool,
}

impl Supervisor {
    fn new(args: &GuardArgs) -> Result<Self, String> {
        let failed = |error: Error| error.to_string();
        let mut set = SigSet::empty();
        for signal in [
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
            Signal::SIGCHLD,
            END_OF_KEEPER,
        ] {
            set.add(signal);
        }
        set.thread_block().map_err(|error| error.to_string())?;
        process::tell_end_of_parent(END_OF_KEEPER).map_err(failed)?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals =
            SignalFd::with_flags(&set, flags).map_err(|error| format!("signalfd: {error}"))?;
        lease::ignore_sigio().map_err(failed)?;
        let group = PermissionGroup::from_fd(process::inherit(args.group_fd).map_err(failed)?);
        let events = process::inherit(args.events_fd).map_err(failed)?;
        for (what, done) in [
            ("memory is not locked", process::lock_memory()),
            (
                "the kernel may kill the guard for its memory",
                process::set_oom_score(-1000),
            ),
        ] {
            if let Err(error) = done {
                tracing::warn!(%error, "{what}");
            }
        }
        crate::daemon::raise_open_files();
        let left_behind = group.sweep();
        if left_behind > 0 {
            tracing::warn!(
                left_behind,
                "programs that waited for the guard before this one got EBUSY"
            );
        }
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|error| format!("eventfd: {error}"))?;
        let arrivals = arrivals(&group).map_err(|error| format!("epoll: {error}"))?;
        let guard = Arc::new(Guard {
            group,
            readers: Mutex::default(),
            arrivals,
            events,
            asked: Asked {
                pre_access: args.pre_access,
            },
            pending: Mutex::default(),
            next: AtomicU64::new(1),
            bell,
            link: Mutex::default(),
            worker: AtomicI32::new(0),
            everything: AtomicBool::new(true),
            refusing: AtomicBool::new(false),
            waiters_max: args.waiters_max,
        });
        for _ in 0..READERS {
            guard.add_reader()?;
        }
        Ok(Self {
            guard,
            signals,
            keeper: Some(args.keeper),
            place: Place::new(args.device.clone(), args.place.clone()),
            ready_once: args.again,
            stopping: false,
            restarting: false,
        })
    }

    fn run(
        &mut self,
        config: &Path,
        log_level: &str,
        args: &GuardArgs,
    ) -> Result<ExitCode, String> {
        let recipe = Recipe {
            program: program(),
            args,
            config,
            log_level,
        };
        loop {
            let mut worker = match recipe.start(&self.guard, !self.ready_once) {
                Ok(worker) => worker,
                Err(error) => {
                    tracing::error!(error, "no worker can be started; it is tried again");
                    self.rest(BACKOFF);
                    if self.stopping {
                        return Ok(self.end());
                    }
                    continue;
                }
            };
            let code = self.serve(&mut worker)?;
            self.guard.worker.store(0, Ordering::Relaxed);
            *lock(&self.guard.link) = None;
            self.guard.untell();
            if self.stopping {
                return Ok(self.end());
            }
            if code == Some(REFUSED) && !self.ready_once {
                // It has said why. Until the filesystem is unmounted, somebody must answer.
                self.guard.refusing.store(true, Ordering::Relaxed);
                self.guard.give_up();
                self.tell_keeper(Signal::SIGUSR2);
                while !self.stopping {
                    self.rest(BACKOFF);
                }
                return Ok(self.end());
            }
            if std::mem::take(&mut self.restarting) {
                tracing::info!("the worker is started again");
                continue;
            }
            tracing::error!(
                ?code,
                "the worker ended; programs that open released files wait for the next one"
            );
            if worker.started.elapsed() < BACKOFF {
                self.rest(BACKOFF);
                if self.stopping {
                    return Ok(self.end());
                }
            }
        }
    }

    /// The worker is gone, and there will be no other.
    fn end(&self) -> ExitCode {
        self.guard.refusing.store(true, Ordering::Relaxed);
        self.guard.give_up();
        // Where there is a keeper, it holds the group as long as this is so.
        while self.keeper_is_gone() && !self.place.is_closed() {
            std::thread::sleep(TICK);
        }
        ExitCode::SUCCESS
    }

    /// Until the worker is gone; gives its exit status.
    fn serve(&mut self, worker: &mut Worker) -> Result<Option<i32>, String> {
        let mut linked = true;
        loop {
            let wants = if worker.full {
                PollFlags::POLLIN | PollFlags::POLLOUT
            } else {
                PollFlags::POLLIN
            };
            let mut fds = vec![
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.guard.bell.as_fd(), PollFlags::POLLIN),
            ];
            if linked {
                fds.push(PollFd::new(worker.socket.as_fd(), wants));
            }
            let patience = if self.keeper_is_gone() {
                PollTimeout::try_from(TICK).unwrap_or(PollTimeout::ZERO)
            } else {
                PollTimeout::NONE
            };
            let _ = poll(&mut fds, patience);
            let readable = linked && fds[2].any().unwrap_or(false);
            drop(fds);
            let _ = self.guard.bell.read();
            if readable {
                linked = self.hear(worker)?;
            }
            if linked && worker.ready {
                match self.guard.tell(worker.socket.as_fd()) {
                    Ok(full) => worker.full = full,
                    Err(error) => {
                        // Its answers would not be heard any more either: the next one gets everything.
                        tracing::error!(%error, "the worker cannot be told of accesses, and is started anew");
                        let _ = worker.child.kill();
                        linked = false;
                    }
                }
            }
            self.obey(Some(worker));
            self.stand_in(Some(worker));
            if let Ok(Some(status)) = worker.child.try_wait() {
                return Ok(status.code());
            }
        }
    }

    /// Reads what the worker says. False: it is gone.
    fn hear(&mut self, worker: &mut Worker) -> Result<bool, String> {
        loop {
            let mut fds = [PollFd::new(worker.socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::ZERO).unwrap_or(0) == 0 {
                return Ok(true);
            }
            match link::hear(worker.socket.as_fd()) {
                Ok(Some(Told::Answer(id, answer))) => self.guard.answered(id, answer),
                Ok(Some(Told::Everything(all))) => {
                    self.guard.everything.store(all, Ordering::Relaxed);
                }
                Ok(Some(Told::Ready)) => {
                    worker.ready = true;
                    *lock(&self.guard.link) = Some(worker.socket.clone());
                    if !std::mem::replace(&mut self.ready_once, true) {
                        self.tell_keeper(Signal::SIGUSR1);
                    }
                }
                Ok(None) => return Ok(false),
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    /// What signals ask for.
    fn obey(&mut self, worker: Option<&Worker>) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let signal = i32::try_from(info.ssi_signo).unwrap_or(0);
            // Only the keeper knows when nobody can reach the filesystem any more; a terminal's Ctrl-C
            // goes to everybody.
            let sender = i32::try_from(info.ssi_pid).ok();
            let from_keeper = sender.is_some() && sender == self.keeper;
            match Signal::try_from(signal) {
                Ok(Signal::SIGTERM) if from_keeper => self.stopping = true,
                Ok(Signal::SIGHUP) if from_keeper => self.restarting = true,
                _ => continue,
            }
            stop(worker);
        }
    }

    fn keeper_is_gone(&self) -> bool {
        self.keeper != Some(getppid().as_raw())
    }

    fn tell_keeper(&self, signal: Signal) {
        if let Some(keeper) = self.keeper.filter(|_| !self.keeper_is_gone()) {
            let _ = kill(Pid::from_raw(keeper), signal);
        }
    }

    /// Does what the keeper would do when the filesystem is unmounted, where that is gone.
    fn stand_in(&mut self, worker: Option<&Worker>) {
        if self.stopping || !self.keeper_is_gone() {
            return;
        }
        if self.keeper.take().is_some() {
            tracing::error!(
                "the keeper is gone; released files are guarded until the filesystem is unmounted: start hsmd again, which does that and exposes it anew"
            );
        }
        if matches!(self.place.is_exposed(), Ok(false)) {
            self.stopping = true;
            stop(worker);
        }
    }

    fn rest(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while !self.stopping && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(50));
            self.obey(None);
            self.stand_in(None);
        }
    }
}

fn stop(worker: Option<&Worker>) {
    if let Some(worker) = worker {
        let pid = i32::try_from(worker.child.id()).unwrap_or(0);
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
}
