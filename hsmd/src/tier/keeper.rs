//! The keeper: exposes the filesystem, holds the permission group, and starts the guard, again if need be.
//!
//! It is the process that an administrator starts and stops. It does next to nothing, so that it has no
//! reason to die; while it lives the group stays open whatever becomes of guard and worker, and accesses
//! to released files wait. If it dies all the same, the service manager still has the group (tier/store.rs).

use std::os::fd::AsRawFd;
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;
use std::os::fd::AsFd;

use super::exposure::Exposure;
use super::others::Other;
use super::store::{self, Stored};
use crate::cli::Hsmd;
use crate::config::Config;
use crate::daemon::{Refusal, refuse};
use crate::output;
use crate::sys::fanotify::Group;
use crate::sys::permission::{Asked, PermissionGroup};
use crate::sys::process;

/// How often it is looked whether a process is gone.
const TICK: Duration = Duration::from_millis(5);
/// How often a filesystem that is in use is tried to be unmounted.
const TRY_AGAIN: Duration = Duration::from_millis(500);
/// How often the journal says what it is in use by.
const TELL_AGAIN: Duration = Duration::from_secs(10);
/// A guard that ended at once is started again after this time.
const BACKOFF: Duration = Duration::from_millis(500);

struct Keeper<'k> {
    exposure: Exposure,
    group: PermissionGroup,
    /// The worker's; see [`super::worker::Inherited`].
    events: Group,
    asked: Asked,
    config: &'k Config,
    args: &'k Hsmd,
    signals: SignalFd,
    ready: bool,
    stopping: bool,
    refused: bool,
}

/// `hsmd` with a `device` in its configuration.
pub fn run(config: &Config, args: &Hsmd) -> ExitCode {
    match keep(config, args) {
        Ok(code) => code,
        Err(refusal) => {
            output::error("hsmd", &refusal);
            ExitCode::from(2)
        }
    }
}

fn keep(config: &Config, args: &Hsmd) -> Result<ExitCode, Refusal> {
    let mut set = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGCHLD,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ] {
        set.add(signal);
    }
    let failed =
        |error: &dyn std::fmt::Display| refuse("hsmd", error, "see the kernel's messages (dmesg)");
    set.thread_block().map_err(|error| failed(&error))?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&set, flags).map_err(|error| failed(&error))?;
    // The permission group has a high number.
    crate::daemon::raise_open_files();
    let exposure =
        Exposure::of(config)?.ok_or_else(|| refuse("device", "it is not configured", "add it"))?;
    if let Err(error) = process::set_oom_score(-1000) {
        tracing::warn!(%error, "the kernel may kill the keeper for its memory");
    }
    let wanted = Asked {
        pre_access: config.pre_access,
    };
    let (group, events, asked) = expose(&exposure, wanted)?;
    if wanted != asked {
        tracing::warn!(
            "this kernel or filesystem has no pre-access events (Linux 6.14): a released file that is cut by its path without being opened is recalled only afterwards, see hsm(7)"
        );
    }
    let mut keeper = Keeper {
        exposure,
        group,
        events,
        asked,
        config,
        args,
        signals,
        ready: false,
        stopping: false,
        refused: false,
    };
    // From here on nothing ends this process before the filesystem is hidden again.
    let code = keeper.watch_over();
    keeper.close();
    store::drop_all();
    Ok(code)
}

/// The filesystem is exposed when this returns, and asked about. Both groups, and what is asked.
fn expose(exposure: &Exposure, wanted: Asked) -> Result<(PermissionGroup, Group, Asked), Refusal> {
    let failed =
        |error: crate::sys::Error| refuse("hsmd", error, "see the kernel's messages (dmesg)");
    let place = exposure.place();
    let other = place.other().map_err(failed)?;
    if let Some(keeper) = other.and_then(Other::keeper) {
        return Err(refuse(
            place.device().display(),
            format!("hsmd runs already for this filesystem (process {keeper})"),
            "stop that one first",
        ));
    }
    let Some(stored) = store::take() else {
        return expose_anew(exposure, wanted, None);
    };
    let Some(asked) = exposure.take_over(&stored.group, wanted)? else {
        return expose_anew(exposure, wanted, Some(stored));
    };
    tracing::warn!(
        "hsmd was killed: the service manager has held the accesses since, and they go on"
    );
    // Nobody else must read the group: an answer of his would be given to whom he does not know.
    if let Some(other) = other {
        other.kill();
        while other.lives() {
            std::thread::sleep(TICK);
        }
    }
    Ok((stored.group, stored.events, asked))
}

fn expose_anew(
    exposure: &Exposure,
    wanted: Asked,
    stored: Option<Stored>,
) -> Result<(PermissionGroup, Group, Asked), Refusal> {
    let failed =
        |error: crate::sys::Error| refuse("hsmd", error, "see the kernel's messages (dmesg)");
    let group = PermissionGroup::new().map_err(failed)?;
    let events = Group::new_notification().map_err(failed)?;
    let (hidden, asked) = exposure.prepare(&group, wanted)?;
    // Not before: where this is refused because another namespace has the filesystem, the old group
    // keeps its accesses.
    drop(stored);
    store::drop_all();
    // And this before anybody can reach the filesystem.
    store::keep(&group, &events);
    exposure.expose(hidden)?;
    Ok((group, events, asked))
}

impl Keeper<'_> {
    fn start_guard(&self) -> Result<Child, Refusal> {
        let failed =
            |error: &dyn std::fmt::Display| refuse("the guard", error, "see the messages before");
        let group = process::group_for_child(&self.group).map_err(|error| failed(&error))?;
        let events = process::for_child(&self.events).map_err(|error| failed(&error))?;
        let mut command = Command::new(super::guard::program());
        command.arg("--config").arg(&self.config.file);
        command.args(["--log-level", &self.args.log_level]);
        command.arg("guard");
        command
            .arg("--events-fd")
            .arg(events.as_raw_fd().to_string());
        command.arg("--group-fd").arg(group.as_raw_fd().to_string());
        command.arg("--keeper").arg(std::process::id().to_string());
        let place = self.exposure.place();
        command.arg("--device").arg(place.device());
        command.arg("--place").arg(place.path());
        command
            .arg("--waiters-max")
            .arg(self.config.recall_waiters_max.to_string());
        if self.asked.pre_access {
            command.arg("--pre-access");
        }
        if self.ready {
            command.arg("--again");
        }
        if !self.ready && self.args.adopt_filesystem {
            command.arg("--adopt-filesystem");
        }
        if let Some(lsn) = self.args.accept_loss_after.filter(|_| !self.ready) {
            command.arg("--accept-loss-after").arg(lsn.to_string());
        }
        command.spawn().map_err(|error| failed(&error))
    }

    /// Until the filesystem is not exposed any more, and the guard is gone.
    fn watch_over(&mut self) -> ExitCode {
        let mut guard = self.some_guard();
        let mut started = Instant::now();
        let mut told: Option<Instant> = None;
        let mut hidden = false;
        loop {
            let patience = if self.stopping && !hidden {
                PollTimeout::try_from(TRY_AGAIN).unwrap_or(PollTimeout::ZERO)
            } else {
                PollTimeout::NONE
            };
            let mut fds = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            let _ = poll(&mut fds, patience);
            self.obey(&guard);
            if let Ok(Some(status)) = guard.try_wait() {
                if hidden {
                    break;
                }
                tracing::error!(%status, "the guard ended; accesses to released files wait for the next one");
                if started.elapsed() < BACKOFF {
                    std::thread::sleep(BACKOFF);
                }
                guard = self.some_guard();
                started = Instant::now();
            }
            if self.stopping && !hidden {
                match self.exposure.place().hide() {
                    Ok(true) => {
                        hidden = true;
                        // Nothing can change any more: what did is examined, and the log closed.
                        signal_child(&guard, Signal::SIGTERM);
                    }
                    Ok(false) if told.is_none_or(|told| told.elapsed() >= TELL_AGAIN) => {
                        told = Some(Instant::now());
                        tracing::warn!(
                            "{} is in use by {}: hsmd goes on until they are done, and stops then",
                            self.exposure.place().path().display(),
                            self.exposure.place().users()
                        );
                    }
                    Ok(false) => {}
                    Err(error) => tracing::error!(%error, "the filesystem cannot be unmounted"),
                }
            }
        }
        if self.refused {
            ExitCode::from(2)
        } else {
            ExitCode::SUCCESS
        }
    }

    /// Starts a guard, however long that takes: without one, accesses wait.
    fn some_guard(&self) -> Child {
        loop {
            match self.start_guard() {
                Ok(guard) => return guard,
                Err(error) => {
                    tracing::error!(%error, "no guard can be started; it is tried again");
                    std::thread::sleep(BACKOFF);
                }
            }
        }
    }

    fn obey(&mut self, guard: &Child) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let signal = i32::try_from(info.ssi_signo).unwrap_or(0);
            match Signal::try_from(signal) {
                Ok(Signal::SIGTERM | Signal::SIGINT) => {
                    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
                    self.stopping = true;
                }
                // The worker has said why it does not start.
                Ok(Signal::SIGUSR2) if !self.ready => {
                    (self.stopping, self.refused) = (true, true);
                }
                Ok(Signal::SIGHUP) => signal_child(guard, Signal::SIGHUP),
                Ok(Signal::SIGUSR1) => {
                    self.ready = true;
                    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
                }
                _ => {}
            }
        }
    }

    /// The group is closed only where nothing can reach the filesystem any more.
    fn close(&self) {
        let mut told = String::new();
        while !self.exposure.place().is_closed() {
            let left = self.exposure.place().left();
            if left != told {
                tracing::warn!(
                    "the filesystem is unmounted here, but it is mounted still {left}: hsmd ends when it is gone there, until then its released files cannot be opened, and what is changed is not logged before hsmd runs again"
                );
                told = left;
            }
            std::thread::sleep(TRY_AGAIN);
        }
    }
}

fn signal_child(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id()).unwrap_or(0);
    let _ = kill(Pid::from_raw(pid), signal);
}
