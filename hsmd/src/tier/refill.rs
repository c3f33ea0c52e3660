//! Flowing back: what a disk made of stubs (`replay --stubs`) lacks comes back in the background.
//!
//! Whether that is wanted, and which files it concerns, stands in the list of stubs, durably
//! ([`Residency::take_over`]); a file that is whole leaves it. So a new worker goes on where the one
//! before was killed, and what was released since then stays released.
//!
//! The list is gone through in pages, each in the order of the log, which is that of the media. Recalls that
//! somebody waits for go before ([`super::recall::BACKGROUND`]). Nothing is released for what flows
//! back: it rests where the filesystem is as full as it may become by this, and where files cannot be had
//! now; what was left on the way is tried in the next pass. A file that cannot be recalled at all is told
//! by recall, and not tried again.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, unbounded};
use nix::sys::statvfs::fstatvfs;
use policies::decide::Usage;
use tierfs::catalog::{self, Reader};
use tierfs::residency::Residency;
use tierfs::{FileId, Time};

use super::recall::{BACKGROUND, Outcome, Recall};
use crate::config::Config;
use crate::control::model::RefillStatus;
use crate::policy::space::Space;
use crate::shared::{Shared, lock};
use crate::sys::handle::Handle;
use crate::sys::mount::PrivateMount;

/// Files that are put in order at once, 24 bytes each: the more, the fewer times the media are gone through.
const PAGE: usize = 100_000;
/// As many of them are read from the list at a time, which others want, too.
const PIECE: usize = 10_000;
/// What is asked for at once. Recalled files are made durable together, about once a second: that many
/// small ones flow back in that time at most.
const FILES: usize = 1000;
const BYTES: u64 = 256 << 20;
/// So many files in a row that cannot be had now are reason to rest.
const LEFT_MAX: u32 = 32;
/// The first rest, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(5));
/// So much of the filesystem is used at most; less where the low watermark of a rule is lower, for the rule
/// would release again what goes beyond.
const USED_MAX: u8 = 90;
const TICK: Duration = Duration::from_millis(200);

/// A file that is to flow back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Due {
    /// Where in the log its content is.
    pub place: u64,
    /// Which one.
    pub file: FileId,
    /// Its size.
    pub size: u64,
}

/// What this works on, apart from the list.
pub trait World: Send + Sync {
    /// Where these files are in the log, and how large.
    fn look_up(&self, files: &[FileId]) -> Result<Vec<Due>, catalog::Error>;

    /// How full the filesystem is, and up to how many per cent it may be filled.
    fn room(&self) -> Result<(Usage, u8), String>;

    /// Has a file recalled that nobody waits for.
    fn ask(&self, handle: &Handle, place: u64, tell: Box<dyn FnOnce(Outcome) + Send>);
}

/// The daemon's.
pub struct Daemons {
    /// Recalls.
    pub recall: Arc<Recall>,
    /// The catalog's file.
    pub catalog: PathBuf,
    /// The filesystem.
    pub mount: Arc<PrivateMount>,
    /// Knows the watermarks.
    pub space: Arc<Space>,
}

impl World for Daemons {
    fn look_up(&self, files: &[FileId]) -> Result<Vec<Due>, catalog::Error> {
        let reader = Reader::open(&self.catalog)?;
        let look = |file: &FileId| {
            // Of one that was deleted a moment ago nothing is known: its recall finds nothing to do.
            let row = reader.queries().inode(*file)?;
            let place = row.as_ref().and_then(|row| row.content_lsn);
            Ok(Due {
                place: place.map_or(0, tierfs::Lsn::get),
                file: *file,
                size: row.map_or(0, |row| row.size),
            })
        };
        files.iter().map(look).collect()
    }

    fn room(&self) -> Result<(Usage, u8), String> {
        let stat = fstatvfs(self.mount.root()).map_err(|error| error.to_string())?;
        let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
        let usage = Usage {
            used: bytes(stat.blocks().saturating_sub(stat.blocks_free())),
            available: bytes(stat.blocks_available()),
        };
        let low = self.space.status().map(|status| status.low_watermark);
        Ok((usage, low.map_or(USED_MAX, |low| low.min(USED_MAX))))
    }

    fn ask(&self, handle: &Handle, place: u64, tell: Box<dyn FnOnce(Outcome) + Send>) {
        self.recall.ask(handle, BACKGROUND, place, tell);
    }
}

/// See the module.
pub struct Refill {
    shared: Arc<Shared>,
    residency: Arc<Mutex<Residency>>,
    world: Box<dyn World>,
    pauses: (Duration, Duration),
    shown: Mutex<Option<RefillStatus>>,
}

/// How a pass through the list goes.
struct Pass {
    /// The next rest.
    pause: Duration,
    /// Files in a row that could not be had.
    left: u32,
    /// Why the last of them.
    why: String,
    /// Files that are not tried again.
    over: Vec<FileId>,
}

impl Refill {
    /// For a thread with [`Self::run`]; `None` where the configuration says that nothing is to flow back.
    pub fn wanted(
        config: &Config,
        shared: Arc<Shared>,
        residency: Arc<Mutex<Residency>>,
        world: Daemons,
    ) -> Option<Arc<Self>> {
        let new = || Arc::new(Self::new(shared, residency, Box::new(world)));
        config.refill.then(new)
    }

    /// For a thread with [`Self::run`].
    pub fn new(
        shared: Arc<Shared>,
        residency: Arc<Mutex<Residency>>,
        world: Box<dyn World>,
    ) -> Self {
        Self {
            shared,
            residency,
            world,
            pauses: PAUSES,
            shown: Mutex::default(),
        }
    }

    /// How far it is; `None` where nothing is to flow back.
    pub fn status(&self) -> Option<RefillStatus> {
        lock(&self.shown).clone()
    }

    /// The thread's body: until all has flowed back, or the daemon stops. Begins when `ready`.
    pub fn run(&self, ready: &dyn Fn() -> bool) {
        let mut pass = Pass {
            pause: self.pauses.0,
            left: 0,
            why: String::new(),
            over: Vec::new(),
        };
        while !self.shared.stopping() {
            match self.turn(ready, &mut pass) {
                Ok(true) => {
                    *lock(&self.shown) = None;
                    return;
                }
                Ok(false) => {}
                Err(error) => pass.why = error.to_string(),
            }
            self.rest(&mut pass);
        }
    }

    /// Goes through the list once; true where nothing is left to be done.
    fn turn(&self, ready: &dyn Fn() -> bool, pass: &mut Pass) -> Result<bool, catalog::Error> {
        if !lock(&self.residency).wants_refill()? {
            return Ok(true);
        }
        while !ready() {
            self.show(Some("every file is examined first"))?;
            if self.wait(TICK) {
                return Ok(false);
            }
        }
        self.show(None)?;
        let mut after = None;
        while !self.shared.stopping() {
            let page = self.page(&mut after)?;
            if page.is_empty() {
                break;
            }
            self.flow(page, pass)?;
        }
        // Those that became whole last may be on the list still, but are not counted any more.
        let over = !self.shared.stopping() && lock(&self.residency).count_found()? == 0;
        if over {
            lock(&self.residency).end_refill()?;
            tracing::info!("all that was to flow back has flowed back");
        }
        Ok(over)
    }

    /// The next files beyond `after`, in the order of the log.
    fn page(&self, after: &mut Option<FileId>) -> Result<Vec<Due>, catalog::Error> {
        let mut page = Vec::new();
        while page.len() < PAGE && !self.shared.stopping() {
            let files = lock(&self.residency).found(*after, PIECE)?;
            let Some(last) = files.last() else { break };
            *after = Some(*last);
            page.extend(self.world.look_up(&files)?);
        }
        page.sort_unstable();
        Ok(page)
    }

    /// Has the files of a page recalled, as many at once as is good.
    fn flow(&self, page: Vec<Due>, pass: &mut Pass) -> Result<(), catalog::Error> {
        let (tell, told) = unbounded();
        let mut page = page.into_iter();
        let mut next = page.next();
        let (mut asked, mut bytes) = (HashMap::new(), 0u64);
        while !self.shared.stopping() {
            let more = asked.len() < FILES && bytes < BYTES && pass.left < LEFT_MAX;
            if more && let Some(due) = next {
                next = page.next();
                if let Err(why) = self.fits(bytes.saturating_add(due.size)) {
                    pass.leave(why);
                } else if let Some(handle) = self.handle_of(due.file)? {
                    asked.insert(due.file, due.size);
                    bytes = bytes.saturating_add(due.size);
                    let (tell, file) = (tell.clone(), due.file);
                    let tell = move |outcome| drop(tell.send((file, outcome)));
                    self.world.ask(&handle, due.place, Box::new(tell));
                }
                continue;
            }
            if asked.is_empty() {
                if next.is_none() {
                    break;
                }
                self.rest(pass);
                continue;
            }
            match told.recv_timeout(TICK) {
                Ok((file, outcome)) => {
                    bytes = bytes.saturating_sub(asked.remove(&file).unwrap_or(0));
                    self.note(pass, file, outcome);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        lock(&self.residency).pass_over(&pass.over, Time::now().seconds)?;
        pass.over.clear();
        self.show(None)
    }

    /// The inode of a file that is to flow back still: nobody recalled it, or released it meanwhile.
    fn handle_of(&self, file: FileId) -> Result<Option<Handle>, catalog::Error> {
        let found = lock(&self.residency).get_found(file)?;
        Ok(found.and_then(|stub| Handle::from_bytes(&stub.handle).ok()))
    }

    fn note(&self, pass: &mut Pass, file: FileId, outcome: Outcome) {
        match outcome {
            Outcome::Failed(libc::EAGAIN, why) => return pass.leave(why),
            Outcome::Whole { bytes } => {
                if bytes == 0 {
                    pass.over.push(file);
                }
                (pass.pause, pass.left) = (self.pauses.0, 0);
            }
            Outcome::Failed(..) | Outcome::Cancelled(_) => {
                tracing::warn!(file = file.get(), %outcome, "a file does not flow back");
                pass.over.push(file);
            }
        }
        if let Some(shown) = lock(&self.shown).as_mut() {
            shown.files = shown.files.saturating_sub(1);
            shown.rests = None;
        }
    }

    /// Whether so many more bytes have room.
    fn fits(&self, bytes: u64) -> Result<(), String> {
        let (usage, percent) = self.world.room()?;
        let all = u128::from(usage.used) + u128::from(usage.available);
        let then = u128::from(usage.used) + u128::from(bytes);
        if then * 100 <= all * u128::from(percent) {
            return Ok(());
        }
        Err(format!(
            "{} % of the filesystem are in use, and it is filled up to {percent} % only",
            usage.percent()
        ))
    }

    /// Nothing is asked for during the next while, and a longer one next time.
    fn rest(&self, pass: &mut Pass) {
        let why = std::mem::take(&mut pass.why);
        if !why.is_empty() {
            tracing::info!(why, pause = ?pass.pause, "what is to flow back rests");
            let _ = self.show(Some(&why));
        }
        self.wait(pass.pause);
        pass.pause = (pass.pause * 2).min(self.pauses.1);
        pass.left = 0;
    }

    /// True where the daemon stops.
    fn wait(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        while !self.shared.stopping() && Instant::now() < end {
            self.shared.wait_for_progress(TICK.min(time));
        }
        self.shared.stopping()
    }

    fn show(&self, rests: Option<&str>) -> Result<(), catalog::Error> {
        let files = lock(&self.residency).count_found()?;
        *lock(&self.shown) = Some(RefillStatus {
            files,
            rests: rests.map(ToOwned::to_owned),
        });
        Ok(())
    }
}

impl Pass {
    /// A file cannot be had now.
    fn leave(&mut self, why: String) {
        self.left += 1;
        self.why = why;
    }
}

#[cfg(test)]
mod tests;
