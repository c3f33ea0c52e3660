//! What the `hsmd` program does: check a configuration, or run the daemon until a signal ends it.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tracing_subscriber::EnvFilter;

use crate::cli::{GuardArgs, Hsmd, WorkerArgs};
use crate::config::Config;
use crate::daemon::{Daemon, Overrides, Refusal};
use crate::sys::process;
use crate::tier::exposure::{Exposure, Place};
use crate::tier::worker::Inherited;
use crate::tier::{self, keeper};
use crate::{output, preflight};

/// Exit status of every refusal and error.
const FAILED: u8 = 2;

fn refused(refusals: &[Refusal]) -> ExitCode {
    for refusal in refusals {
        output::error("hsmd", &refusal);
    }
    ExitCode::from(FAILED)
}

/// `hsmd check-config`.
pub fn check_config(file: &Path) -> ExitCode {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(error) => {
            output::error("hsmd", &error);
            return ExitCode::from(FAILED);
        }
    };
    match Exposure::of(&config) {
        Ok(Some(exposure)) if !exposure.place().is_exposed().unwrap_or(false) => {
            return not_exposed(file, exposure.place());
        }
        Ok(_) => {}
        Err(refusal) => return refused(&[refusal]),
    }
    match preflight::check(&config) {
        Ok(report) => {
            for warning in &report.warnings {
                output::note(
                    "hsmd",
                    &format!(
                        "warning: {}: {}; {}",
                        warning.object, warning.reason, warning.advice
                    ),
                );
            }
            let text = format!(
                "{} is good: {} ({}) is watched, the log goes to {} pool(s)\n",
                file.display(),
                report.mount_point.display(),
                report.fs_type,
                config.pools.len()
            );
            if output::text(&text).is_ok() {
                ExitCode::SUCCESS
            } else {
                ExitCode::from(FAILED)
            }
        }
        Err(refusals) => {
            let refusals: Vec<Refusal> = refusals
                .into_iter()
                .map(|refusal| Refusal {
                    object: refusal.object,
                    reason: refusal.reason,
                    advice: refusal.advice,
                })
                .collect();
            refused(&refusals)
        }
    }
}

/// What can be said of a filesystem that hsmd mounts when it starts.
fn not_exposed(file: &Path, place: &Place) -> ExitCode {
    let text = format!(
        "{} is good as far as can be told before {} is mounted: hsmd mounts it at {}, and checks then what lies where\n",
        file.display(),
        place.device().display(),
        place.path().display()
    );
    if output::text(&text).is_ok() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FAILED)
    }
}

fn start_journal(args: &Hsmd) {
    let filter = EnvFilter::try_new(&args.log_level).unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        // Else a journal that cannot be written makes whoever speaks panic, the keeper among them.
        .log_internal_errors(false)
        .init();
}

/// `hsmd`: runs until SIGTERM or SIGINT.
pub fn daemon(args: &Hsmd) -> ExitCode {
    start_journal(args);
    let config = match Config::load(&args.config) {
        Ok(config) => config,
        Err(error) => {
            output::error("hsmd", &error);
            return ExitCode::from(FAILED);
        }
    };
    if config.device.is_some() {
        return keeper::run(&config, args);
    }
    run(config, args, None)
}

/// `hsmd guard`: started by the keeper.
pub fn guard(args: &Hsmd, guard: &GuardArgs) -> ExitCode {
    start_journal(args);
    tier::guard::run(&args.config, &args.log_level, guard)
}

/// `hsmd worker`: started by the guard.
pub fn worker(args: &Hsmd, worker: &WorkerArgs) -> ExitCode {
    start_journal(args);
    let config = match Config::load(&args.config) {
        Ok(config) => config,
        Err(error) => {
            output::error("hsmd", &error);
            return ExitCode::from(FAILED);
        }
    };
    // A worker without its guard can answer nobody, and would be in the way of the next one.
    let inherited = process::die_with_parent()
        .and_then(|()| process::set_oom_score(0))
        .and_then(|()| {
            Ok(Inherited {
                group: process::inherit(worker.group_fd)?,
                events: process::inherit(worker.events_fd)?,
                link: process::inherit(worker.link_fd)?,
                pre_access: worker.pre_access,
            })
        });
    match inherited {
        Ok(inherited) => run(config, args, Some(inherited)),
        Err(error) => {
            output::error("hsmd worker", &error);
            ExitCode::from(FAILED)
        }
    }
}

fn run(config: Config, args: &Hsmd, inherited: Option<Inherited>) -> ExitCode {
    // Blocked before any thread starts, so that only the one that waits for them gets them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    // A service manager's reload must not end what it would not start again.
    let alone = inherited.is_none();
    if alone {
        signals.add(Signal::SIGHUP);
    }
    if let Err(error) = signals.thread_block() {
        output::error("hsmd", &format!("cannot block signals: {error}"));
        return ExitCode::from(FAILED);
    }
    let overrides = Overrides {
        adopt_filesystem: args.adopt_filesystem,
        accept_loss_after: args.accept_loss_after,
    };
    let daemon = match Daemon::start(config, overrides, inherited) {
        Ok(daemon) => daemon,
        Err(refusals) => return refused(&refusals),
    };
    let stopper = daemon.stopper();
    std::thread::spawn(move || {
        if let Err(error) = wait_for_end(&signals, alone) {
            tracing::error!(%error, "signals cannot be read, the daemon stops");
        }
        stopper.stop();
    });
    // Not under systemd there is nobody to tell; of a worker the keeper tells.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    watchdog();
    let ended = daemon.run();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(refusal) => refused(&[refusal]),
    }
}

/// Waits for the signal that ends the daemon. A worker is ended by its guard only: a terminal's Ctrl-C, `killall`
/// and the shutdown of many systems go to everybody, and what changes until the filesystem is unmounted is to
/// be logged.
fn wait_for_end(signals: &SigSet, alone: bool) -> nix::Result<()> {
    let guard = std::os::unix::process::parent_id();
    let fd = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC)?;
    loop {
        let info = match fd.read_signal() {
            Ok(Some(info)) => info,
            Ok(None) | Err(nix::Error::EINTR) => continue,
            Err(error) => return Err(error),
        };
        let signal =
            i32::try_from(info.ssi_signo).map_or(Err(nix::Error::EINVAL), Signal::try_from)?;
        match signal {
            Signal::SIGHUP => tracing::warn!(
                "SIGHUP does nothing without `device` in the configuration: for an upgrade or another configuration, restart hsmd"
            ),
            _ if alone || info.ssi_pid == guard => return Ok(()),
            _ => {
                tracing::info!(%signal, "only the keeper stops this: signal that, or use `systemctl stop`");
            }
        }
    }
}

/// Tells systemd's watchdog that the process lives, where it listens.
fn watchdog() {
    if let Some(interval) = sd_notify::watchdog_enabled() {
        let half = (interval / 2).max(Duration::from_millis(100));
        std::thread::spawn(move || {
            while sd_notify::notify(&[sd_notify::NotifyState::Watchdog]).is_ok() {
                std::thread::sleep(half);
            }
        });
    }
}
