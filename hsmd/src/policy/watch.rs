//! The watcher of the free space: rules release what is cold before the disk is full.
//!
//! It looks at the filesystem the more often the nearer the next high watermark is (20 times a second at
//! most, once a second where there is much room). From a rule's high watermark on it releases in batches,
//! the rules in the order of the file, until the low one is reached; in small batches first while space
//! shrinks faster than it is given back, so that some of it is free soon. Which files those are is found
//! before: the list of candidates is made while there is still room. How fast the filesystem fills, how
//! long writers go on until space is given back, and what follows from both ([`policies::space`]) is
//! measured all the time, and shown by status.
//!
//! Recall asks for room here, too: nothing else releases by itself.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use policies::decide::{Usage, gives_up};
use policies::space::{self, BATCH_FILES, LOOK_MAX, Meter, Pace, Releases};
use policies::{Action, Policy, Rule, Watermarks};
use tierfs::FileId;
use tierfs::files::Hit;

use super::candidates::{Candidates, RefusedFiles, Search};
use super::file::PolicyFile;
use super::space::{Made, Request, Space, Whose};
use crate::control::model::{SpaceState, SpaceStatus};
use crate::control::{Core, CoreError};
use crate::shared::Shared;

/// No wait is longer without a look whether the daemon stops.
const TICK: Duration = Duration::from_millis(200);
/// A rule whose files cannot be released, since something is wrong, is not asked for so long.
const REST: Duration = Duration::from_secs(10);
/// When nothing is left to release it is looked again after this.
const NOTHING: Duration = Duration::from_millis(500);
/// The open segment is sealed when nothing is left, after this at first, and later and later.
const SEAL: Duration = Duration::from_secs(5);
const SEAL_MAX: Duration = Duration::from_mins(10);
/// A list of candidates is made when the high watermark would be reached within this.
const PREPARE: Duration = Duration::from_mins(2);
/// A list has files for so many times what a rule frees at once.
const LIST_SPANS: u64 = 4;
/// Room for a recall is made with so much to spare.
const SPARE: u64 = 4 << 20;

/// The notices.
const HEADROOM: &str = "space-headroom";
const LEFT: &str = "space-nothing-left";

/// A rule that is at work.
struct AtWork {
    since: Instant,
    files: u64,
    bytes: u64,
    failed: u64,
    /// The first failure.
    why: Option<String>,
    least: u64,
}

/// A list that is being made.
type Making = JoinHandle<Result<Candidates, CoreError>>;

/// See the module.
pub struct Watch {
    core: Arc<dyn Core>,
    shared: Arc<Shared>,
    file: PolicyFile,
    name: PathBuf,
    space: Arc<Space>,
    requests: Receiver<Request>,
    cancelled: Arc<AtomicBool>,
    begun: Instant,
    looked: Instant,
    meter: Meter,
    releases: Releases,
    /// Since the meter was told.
    freed: u64,
    /// Since when writers go on and nothing is given back.
    gap: Option<Instant>,
    in_need: u32,
    /// When the open segment is sealed next, and after how long again.
    seal: (Instant, Duration),
    /// The policy that the lists are of.
    policy: Option<Arc<Policy>>,
    lists: HashMap<String, Candidates>,
    making: Option<(String, Making)>,
    refused: RefusedFiles,
    at_work: HashMap<String, AtWork>,
    rests: HashMap<String, Instant>,
    total: (u64, u64),
}

/// What the watcher is made of.
pub struct Parts {
    /// Releases, and asks the catalog.
    pub core: Arc<dyn Core>,
    /// Notices, and whether the daemon stops.
    pub shared: Arc<Shared>,
    /// The policy file.
    pub file: PathBuf,
    /// Where it is asked for room, and shows how things are.
    pub space: Arc<Space>,
    /// The requests that come in there.
    pub requests: Receiver<Request>,
    /// Ends searches.
    pub cancelled: Arc<AtomicBool>,
}

impl Watch {
    /// Give it a thread with [`Self::run`].
    pub fn new(parts: Parts) -> Self {
        Self {
            core: parts.core,
            shared: parts.shared,
            name: parts.file.clone(),
            file: PolicyFile::new(parts.file),
            space: parts.space,
            requests: parts.requests,
            cancelled: parts.cancelled,
            begun: Instant::now(),
            looked: Instant::now(),
            meter: Meter::default(),
            releases: Releases::default(),
            freed: 0,
            gap: None,
            in_need: 0,
            seal: (Instant::now(), SEAL),
            policy: None,
            lists: HashMap::new(),
            making: None,
            refused: RefusedFiles::default(),
            at_work: HashMap::new(),
            rests: HashMap::new(),
            total: (0, 0),
        }
    }

    /// Watches until the daemon stops.
    pub fn run(mut self) {
        while !self.shared.stopping() {
            let next = Instant::now() + self.turn();
            while !self.shared.stopping() {
                let left = next.saturating_duration_since(Instant::now());
                match self.requests.recv_timeout(left.min(TICK)) {
                    Ok(request) => {
                        self.serve(&request);
                        break;
                    }
                    Err(RecvTimeoutError::Timeout) if left > TICK => {}
                    Err(_) => break,
                }
            }
        }
        self.cancelled.store(true, Ordering::Relaxed);
        if let Some((_, making)) = self.making.take() {
            let _ = making.join();
        }
    }

    /// Looks, and releases one batch where that is needed; gives when to look again.
    fn turn(&mut self) -> Duration {
        let Some(policy) = self.read() else {
            self.space.show(None);
            return LOOK_MAX;
        };
        let Some(usage) = self.look() else {
            return LOOK_MAX;
        };
        let rules: Vec<(&Rule, Watermarks)> = policy
            .rules
            .iter()
            .filter_map(|rule| Some((rule, rule.watermarks?)))
            .collect();
        let Some((first, marks)) = rules.iter().min_by_key(|(_, marks)| marks.high).copied() else {
            self.space.show(None);
            return LOOK_MAX;
        };
        let before = std::mem::replace(&mut self.looked, Instant::now());
        for (rule, marks) in &rules {
            self.begin_or_end(rule, *marks, usage, before);
        }
        let (state, wait) = if self.at_work.is_empty() {
            (self.gap, self.in_need, self.seal.1) = (None, 0, SEAL);
            self.shared.well(LEFT);
            let distance = to_mark(usage, marks.high);
            self.prepare(&policy, first, usage, distance);
            let wait = space::look_again(distance, self.meter.rate());
            (SpaceState::Enough, wait)
        } else {
            self.release_one(&policy, &rules, usage)
        };
        self.show(first, marks, usage, state);
        wait
    }

    /// The policy; its lists are not those of the one before.
    fn read(&mut self) -> Option<Arc<Policy>> {
        let policy = self.file.read(&self.shared);
        let same = match (&policy, &self.policy) {
            (Some(new), Some(old)) => Arc::ptr_eq(new, old),
            (None, None) => true,
            _ => false,
        };
        if !same {
            self.lists.clear();
            self.at_work.clear();
            self.rests.clear();
            self.policy.clone_from(&policy);
        }
        policy
    }

    fn look(&mut self) -> Option<Usage> {
        let usage = self.core.usage().ok()?;
        let freed = std::mem::take(&mut self.freed);
        self.meter.note(self.begun.elapsed(), usage, freed);
        Some(usage)
    }

    fn begin_or_end(&mut self, rule: &Rule, marks: Watermarks, usage: Usage, before: Instant) {
        if let Some(work) = self.at_work.get_mut(&rule.name) {
            work.least = work.least.min(usage.available);
            if to_free(usage, marks) == 0
                && let Some(work) = self.at_work.remove(&rule.name)
            {
                self.ended(rule, &work);
            }
        } else if usage.to_free(marks).is_some() {
            // What was written since the look before counts from then on.
            self.gap.get_or_insert(before);
            let work = AtWork {
                since: Instant::now(),
                files: 0,
                bytes: 0,
                failed: 0,
                why: None,
                least: usage.available,
            };
            self.at_work.insert(rule.name.clone(), work);
        }
    }

    fn ended(&self, rule: &Rule, work: &AtWork) {
        let seconds = work.since.elapsed().as_secs_f64();
        tracing::info!(
            rule = rule.name,
            files = work.files,
            bytes = work.bytes,
            seconds,
            least_available = work.least,
            "the low watermark is reached"
        );
        if work.failed == 0 {
            self.shared.well(&format!("policy-{}", rule.name));
        }
    }

    // ---- candidates ---------------------------------------------------------------------------------

    /// Makes the list before it is needed.
    fn prepare(&mut self, policy: &Arc<Policy>, rule: &Rule, usage: Usage, distance: u64) {
        if let Some((name, made)) = self.making.take_if(|(_, made)| made.is_finished())
            && let Ok(Ok(list)) = made.join()
        {
            self.lists.insert(name, list);
        }
        let soon = space::look_again(distance, self.meter.rate()) < LOOK_MAX
            || distance < self.meter.rate().saturating_mul(PREPARE.as_secs());
        let stale = self.lists.get(&rule.name).is_none_or(Candidates::is_stale);
        if !soon || !stale || self.making.is_some() {
            return;
        }
        let search = self.search(policy, rule, usage, String::new());
        let made = std::thread::Builder::new()
            .name("candidates".to_owned())
            .spawn(move || search.run());
        if let Ok(made) = made {
            self.making = Some((rule.name.clone(), made));
        }
    }

    fn search(&self, policy: &Arc<Policy>, rule: &Rule, usage: Usage, more: String) -> Search {
        let span = rule.watermarks.map_or(u64::MAX, |marks| {
            to_mark(usage, marks.high).saturating_sub(to_mark(usage, marks.low))
        });
        Search {
            core: self.core.clone(),
            policy: policy.clone(),
            rule: rule.name.clone(),
            more,
            bytes: span.saturating_mul(LIST_SPANS).max(1 << 30),
            cancelled: self.cancelled.clone(),
        }
    }

    /// The rule's next files.
    fn next(
        &mut self,
        policy: &Arc<Policy>,
        rule: &Rule,
        usage: Usage,
        files: usize,
        bytes: u64,
    ) -> Result<Vec<Hit>, CoreError> {
        let tier = self.core.tier()?;
        let recalled = |file: FileId| tier.recalled(file);
        let list = self.lists.entry(rule.name.clone()).or_default();
        let hits = list.next(files, bytes, &self.refused, &recalled);
        if !hits.is_empty() || !list.is_stale() {
            return Ok(hits);
        }
        // There may be one already.
        let made = match self.making.take() {
            Some((name, made)) if name == rule.name => made.join().ok().and_then(Result::ok),
            other => {
                self.making = other;
                None
            }
        };
        let made = match made {
            Some(made) if !made.is_empty() => made,
            _ => self.search(policy, rule, usage, String::new()).run()?,
        };
        let list = self.lists.entry(rule.name.clone()).or_default();
        *list = made;
        Ok(list.next(files, bytes, &self.refused, &recalled))
    }

    // ---- releasing ----------------------------------------------------------------------------------

    /// One batch of the first rule that finds something.
    fn release_one(
        &mut self,
        policy: &Arc<Policy>,
        rules: &[(&Rule, Watermarks)],
        usage: Usage,
    ) -> (SpaceState, Duration) {
        for (rule, marks) in rules {
            if !self.at_work.contains_key(&rule.name) || self.is_resting(rule) {
                continue;
            }
            let headroom = space::headroom(usage, *marks);
            let rate = self.meter.rate();
            let pace = Pace::of(usage, headroom, rate, self.releases.latency());
            let files = pace.batch_files(self.in_need);
            let bytes = to_free(usage, *marks);
            let files = files.min(most_files(rule));
            let bytes = bytes.min(rule.max_bytes.unwrap_or(u64::MAX));
            match self.next(policy, rule, usage, files, bytes) {
                Ok(hits) if hits.is_empty() => {}
                Ok(hits) => {
                    let state = match pace {
                        Pace::Calm => SpaceState::Releasing,
                        Pace::InNeed => SpaceState::InNeed,
                    };
                    self.in_need = match pace {
                        Pace::Calm => 0,
                        Pace::InNeed => self.in_need.saturating_add(1),
                    };
                    self.release(policy, rule, &hits);
                    return (state, Duration::ZERO);
                }
                Err(error) => self.cannot(rule, &error),
            }
        }
        // The gap is not that of release.
        self.gap = Some(Instant::now());
        // Else another notice says what is wrong.
        if !rules.iter().any(|(rule, _)| self.is_resting(rule)) {
            self.nothing_left(usage);
        }
        (SpaceState::NothingLeft, NOTHING)
    }

    fn is_resting(&self, rule: &Rule) -> bool {
        let until = self.rests.get(&rule.name);
        until.is_some_and(|until| Instant::now() < *until)
    }

    /// Releases these files; gives the bytes that are free now.
    fn release(&mut self, policy: &Policy, rule: &Rule, hits: &[Hit]) -> u64 {
        let files: Vec<FileId> = hits.iter().map(|hit| hit.file).collect();
        let begun = Instant::now();
        let freed = match self.core.release(&files) {
            Ok(freed) => freed,
            Err(error) => {
                self.cannot(rule, &error);
                return 0;
            }
        };
        if freed.bytes > 0 {
            let now = Instant::now();
            let from = self.gap.replace(now).unwrap_or(begun);
            self.releases.note(now - from, freed.bytes, now - begun);
        }
        self.freed += freed.bytes;
        let stay = freed.refused.len() + freed.failed.len();
        let done = (files.len() - stay.min(files.len())) as u64;
        self.total = (self.total.0 + done, self.total.1 + freed.bytes);
        for (file, _) in freed.refused.iter().chain(&freed.failed) {
            self.refused.note(*file);
        }
        let Some(work) = self.at_work.get_mut(&rule.name) else {
            return freed.bytes;
        };
        work.files += done;
        work.bytes += freed.bytes;
        work.failed += freed.failed.len() as u64;
        if let Some((file, why)) = freed.failed.first() {
            tracing::warn!(
                rule = rule.name,
                file = file.get(),
                why,
                "a rule failed on a file"
            );
            work.why.get_or_insert_with(|| why.clone());
        }
        let tried = work.files + work.failed;
        if gives_up(tried, work.failed, policy.failures_max_percent) {
            let (failed, why) = (work.failed, work.why.take().unwrap_or_default());
            (work.files, work.failed) = (0, 0);
            let what = format!(
                "rule {} failed on {failed} of {tried} files, and rests for {} s",
                rule.name,
                REST.as_secs()
            );
            self.rest(rule, what, why);
        }
        freed.bytes
    }

    fn cannot(&mut self, rule: &Rule, error: &CoreError) {
        let what = format!("rule {} could not run", rule.name);
        self.rest(rule, what, error.to_string());
    }

    fn rest(&mut self, rule: &Rule, what: String, why: String) {
        self.rests.insert(rule.name.clone(), Instant::now() + REST);
        let todo = format!("try it with `tierctl policy run {}`", rule.name);
        let key = format!("policy-{}", rule.name);
        self.shared.trouble(&key, false, what, why, todo);
    }

    fn nothing_left(&mut self, usage: Usage) {
        let (next, after) = self.seal;
        if Instant::now() >= next {
            // What was written since then may be the next to go, once it is copied.
            self.shared.seal_wanted.store(true, Ordering::Relaxed);
            self.shared.wake();
            self.seal = (Instant::now() + after, (after * 2).min(SEAL_MAX));
        }
        self.shared.trouble(
            LEFT,
            false,
            format!("{} is fuller than its rules want it", self.core.mount().display()),
            format!(
                "{} % are in use, and no rule finds a file that can be released: what is there is pinned, in use, not on every pool yet, or not what the rules are about",
                usage.percent()
            ),
            "see `tierctl find \"state = 'premigrated'\"` and `tierctl policy explain FILE`; make the conditions wider, add a rule for times of need, or make the filesystem larger",
        );
    }

    // ---- room for recalls ---------------------------------------------------------------------------

    fn serve(&mut self, request: &Request) {
        let made = self.make_room(request);
        let _ = request.told.send(made);
    }

    fn make_room(&mut self, request: &Request) -> Made {
        let Some(policy) = self.read() else {
            return Made::None("the policy has a fault, so that no rule releases anything".into());
        };
        let mut rules: Vec<&Rule> = policy
            .rules
            .iter()
            .filter(|rule| rule.action == Action::Release)
            .collect();
        // Those with watermarks are meant for this.
        rules.sort_by_key(|rule| rule.watermarks.is_none());
        let (mut freed, wanted) = (0, request.bytes.saturating_add(SPARE));
        let mut own: HashMap<&str, Candidates> = HashMap::new();
        loop {
            let Some(usage) = self.look() else {
                return Made::None("how full the filesystem is cannot be found out".to_owned());
            };
            let missing = match request.whose {
                Whose::Anybodys => wanted.saturating_sub(usage.available),
                Whose::Of { .. } => wanted.saturating_sub(freed),
            };
            if missing == 0 {
                return Made::Room;
            }
            if request.given_up.load(Ordering::Relaxed) || self.shared.stopping() {
                return Made::None("nobody waits for it any more".to_owned());
            }
            let mut batch = None;
            for rule in &rules {
                if self.is_resting(rule) {
                    continue;
                }
                let files = BATCH_FILES.min(most_files(rule));
                let hits = match request.whose {
                    Whose::Anybodys => self.next(&policy, rule, usage, files, missing),
                    Whose::Of { uid, gid } => {
                        let more = format!("and (uid = {uid} or gid = {gid})");
                        let search = || self.search(&policy, rule, usage, more).run();
                        self.next_of(&mut own, &rule.name, search, files, missing)
                    }
                };
                match hits {
                    Ok(hits) if hits.is_empty() => {}
                    Ok(hits) => {
                        batch = Some((*rule, hits));
                        break;
                    }
                    Err(error) => self.cannot(rule, &error),
                }
            }
            let Some((rule, hits)) = batch else {
                return Made::None(match request.whose {
                    Whose::Anybodys => "no rule finds another file that can be released".to_owned(),
                    Whose::Of { uid, gid } => format!(
                        "no rule finds another file of user {uid} or group {gid} that can be released"
                    ),
                });
            };
            freed += self.release(&policy, rule, &hits);
        }
    }

    /// Of a list for one request.
    fn next_of<'n>(
        &self,
        own: &mut HashMap<&'n str, Candidates>,
        rule: &'n str,
        search: impl FnOnce() -> Result<Candidates, CoreError>,
        files: usize,
        bytes: u64,
    ) -> Result<Vec<Hit>, CoreError> {
        let tier = self.core.tier()?;
        if !own.contains_key(rule) {
            own.insert(rule, search()?);
        }
        let list = own.entry(rule).or_default();
        Ok(list.next(files, bytes, &self.refused, &|file| tier.recalled(file)))
    }

    // ---- what is shown ------------------------------------------------------------------------------

    fn show(&self, rule: &Rule, marks: Watermarks, usage: Usage, state: SpaceState) {
        let headroom = space::headroom(usage, marks);
        let (latency, speed) = (self.releases.latency(), self.releases.speed());
        let limit = self.releases.limit(headroom);
        let peak = self.meter.peak();
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.space.show(Some(SpaceStatus {
            state,
            used_percent: usage.percent(),
            available_bytes: usage.available,
            rule: rule.name.clone(),
            high_watermark: marks.high,
            low_watermark: marks.low,
            headroom_bytes: headroom,
            write_bytes_per_s: self.meter.rate(),
            write_bytes_per_s_max: peak,
            release_latency_ms: latency.map(ms),
            release_bytes_per_s: speed,
            limit_bytes_per_s: limit,
            released_files: self.total.0,
            released_bytes: self.total.1,
        }));
        let (Some(latency), Some(speed), Some(limit)) = (latency, speed, limit) else {
            return;
        };
        if peak <= limit {
            self.shared.well(HEADROOM);
            return;
        }
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let todo = match space::high_for(usage, peak, latency) {
            Some(high) if high < marks.high && peak <= speed => format!(
                "set high_watermark of rule {} to {high} or less in {}",
                rule.name,
                self.name.display()
            ),
            _ => "let rules release larger files first, write more slowly, or make the filesystem larger".to_owned(),
        };
        self.shared.trouble(
            HEADROOM,
            false,
            format!("writers may meet a full disk on {}", self.core.mount().display()),
            format!(
                "up to {} MiB/s were written in the last hour, and release keeps ahead of {} MiB/s: rule {} leaves {} MiB of room, space is given back within {} ms, at {} MiB/s",
                mib(peak),
                mib(limit),
                rule.name,
                mib(headroom),
                ms(latency),
                mib(speed)
            ),
            todo,
        );
    }
}

/// Bytes until so many per cent are in use.
fn to_mark(usage: Usage, percent: u8) -> u64 {
    let marks = Watermarks {
        high: percent,
        low: percent,
    };
    usage
        .available
        .saturating_sub(space::headroom(usage, marks))
}

/// Bytes that are in use above the low watermark.
fn to_free(usage: Usage, marks: Watermarks) -> u64 {
    let low = Watermarks {
        high: marks.low,
        low: marks.low,
    };
    usage.to_free(low).unwrap_or(0)
}

fn most_files(rule: &Rule) -> usize {
    let most = rule.max_files.unwrap_or(u64::MAX);
    usize::try_from(most).unwrap_or(usize::MAX).max(1)
}
