//! From hints and finished readings to one transaction: what is looked at now, what a worker reads
//! first, what fits together, and what is looked at again.
//!
//! Guarantees: a hint that was given to [`Examiner::turn`] is finished only when what it led to was
//! taken into the log, or nothing had changed; it never gets lost, and never stays open for ever: what
//! fails again and again is named to the administrator and left to the sweep. No reading that is older
//! than a hint settles that hint. Nothing here appends, and nothing waits.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tierfs::catalog::{self, Catalog, InodeRow};
use tierfs::record::{Kind, Op};
use tierfs::{FileId, Lsn, Time};

use super::examine::{self, Known, Outcome};
use super::facts::{Certainty, Facts, time_of};
use super::hints::{Beside, EntryKey, Hint, Hints, Key, Look};
use super::namespace::{self, Namespace, Verdict};
use super::tree::Tree;
use super::unread::Seen;
use super::worker::{Done, Job, JobQueue, WorkError};
use crate::shared::Shared;
use crate::sys;
use crate::sys::handle::Handle;
use crate::sys::mount::PrivateMount;

/// Put-offs after which a file that has no name that can be found stays nameless.
const TRIES_FOR_ORPHANS: u32 = 40;
/// Put-offs after which a hint is left to the sweep: about a minute of a tree that never rests, or of
/// a lack of memory or descriptors.
const TRIES_MAX: u32 = 70;
/// The same where the filesystem fails.
const FAILURES_MAX: u32 = 8;
/// Failed readings after which a file counts as unreadable.
const READINGS_MAX: u32 = 3;
/// How long a hint that met a moving tree waits.
const LATER: Duration = Duration::from_millis(25);
/// How long a hint waits whose entry or inode could not be looked at.
const FAILED: Duration = Duration::from_secs(1);
/// How long a hint that met an examination under way waits.
const BUSY: Duration = Duration::from_millis(20);
/// How long a fuzzy file rests before it is read again.
const REST: Duration = Duration::from_millis(250);
/// A file that took T to read is not read again within this many T.
const PACE: u32 = 5;
/// Nothing is paced for longer than this.
const PACE_MAX: Duration = Duration::from_mins(1);
/// Readings kept for entries that could not be settled at once, and for how long after the next try.
const KEPT_MAX: usize = 1000;
const KEPT_FOR: Duration = Duration::from_secs(3);
/// The same, while another file is read first, which may be large.
const KEPT_FOR_ANOTHER: Duration = Duration::from_mins(10);
/// How long it takes until a change time speaks of a file's content that was not read ([`Certainty::Unread`]): a
/// write that came before its examination has raised its event by then.
const UNREAD_FOR: Duration = Duration::from_mins(2);

/// Why a turn fails; the daemon ends with it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The catalog cannot be read or written.
    #[error(transparent)]
    Catalog(#[from] catalog::Error),
}

/// An examination under way, the hints that asked for it, and when it was asked for.
struct InFlight {
    hints: Vec<Hint>,
    look: Look,
    turn: u64,
    /// Its id, where the log learnt it meanwhile.
    file: Option<FileId>,
}

/// What the caller knows at a turn.
pub struct Now<'n> {
    /// Hints and counters.
    pub shared: &'n Shared,
    /// With everything that was appended.
    pub catalog: &'n mut Catalog,
    /// What the catalog's readers, the workers among them, can see.
    pub folded: Option<Lsn>,
}

/// See the module.
pub struct Examiner {
    mount: Arc<PrivateMount>,
    space: Namespace,
    jobs: Arc<JobQueue>,
    in_flight: HashMap<Handle, InFlight>,
    not_before: HashMap<Handle, Instant>,
    kept: HashMap<Handle, (Arc<Facts>, Instant)>,
    unread_for: Duration,
    turn: u64,
}

/// What one turn gathers.
#[derive(Default)]
pub struct Turn {
    /// The transaction; may be empty. Its taker says to [`Examiner::close`] whether it was taken.
    pub ops: Vec<Op>,
    /// The catalog's local tables have changed.
    pub seen: bool,
    facts: HashMap<Handle, Arc<Facts>>,
    /// What was read in this very turn.
    fresh: BTreeSet<Handle>,
    entries: Vec<Hint>,
    /// Hints of files whose inode is gone.
    dead: Vec<(FileId, Hint)>,
    settled: Vec<Hint>,
    retry: Vec<(Hint, Duration)>,
    held: Vec<Hint>,
    paced: Vec<(Hint, Duration)>,
    given_up: Vec<Hint>,
    /// To be examined once more.
    again: Vec<(Key, Duration)>,
    added: Vec<(Handle, FileId)>,
    unwalked: Vec<Handle>,
}

impl Turn {
    /// How many hints depend on the transaction.
    pub fn settled(&self) -> usize {
        self.settled.len()
    }

    /// Hints of an inode are dealt with; those of entries are looked at now.
    fn split(&mut self, hints: Vec<Hint>) {
        for hint in hints {
            if matches!(hint.key, Key::Entry(_)) {
                self.entries.push(hint);
            } else {
                self.settled.push(hint);
            }
        }
    }

    fn fail(&mut self, hint: Hint, what: &str, error: &sys::Error) {
        let short = matches!(
            error.errno(),
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN)
        );
        tracing::warn!(%error, "{what} cannot be examined; it is tried again");
        if hint.tries >= FAILURES_MAX && !short {
            self.given_up.push(hint);
        } else {
            self.retry.push((hint, FAILED));
        }
    }
}

impl Examiner {
    /// Looks through `mount`; regular files are read by whoever takes `jobs`.
    pub fn new(mount: Arc<PrivateMount>, jobs: Arc<JobQueue>) -> Result<Self, sys::Error> {
        Ok(Self {
            space: Namespace::new(mount.clone())?,
            mount,
            jobs,
            in_flight: HashMap::new(),
            not_before: HashMap::new(),
            kept: HashMap::new(),
            unread_for: UNREAD_FOR,
            turn: 0,
        })
    }

    #[cfg(test)]
    pub(super) fn confirm_at_once(&mut self) {
        self.unread_for = Duration::ZERO;
    }

    /// Examinations under way.
    pub fn under_way(&self) -> usize {
        self.in_flight.len()
    }

    /// Makes a transaction of everything that can be settled now.
    pub fn turn(
        &mut self,
        now: &mut Now<'_>,
        done: Vec<Done>,
        hints: Vec<Hint>,
    ) -> Result<Turn, Error> {
        self.turn += 1;
        self.space
            .watched_since(now.shared.watched_since.load(Ordering::Relaxed));
        let mut turn = Turn::default();
        for done in done {
            self.on_done(done, now, &mut turn)?;
        }
        for hint in hints {
            self.on_hint(hint, now, &mut turn)?;
        }
        self.settle(now, &mut turn)?;
        self.confirm(now, &mut turn)?;
        Ok(turn)
    }

    /// The turn's transaction was appended, or refused by the catalog.
    pub fn close(&mut self, shared: &Shared, turn: Turn, taken: bool) {
        let now = Instant::now();
        if taken {
            // Before the hints: who waits for them must see it.
            shared.walk(turn.unwalked);
        }
        let mut hints = shared.hints();
        for (hint, delay) in turn.retry {
            let slower = delay * hint.tries.clamp(1, 40);
            hints.retry(hint, now, slower);
        }
        for hint in turn.held {
            hints.hold(hint, now, BUSY);
        }
        for (hint, delay) in turn.paced {
            hints.postpone(hint, now, delay);
        }
        for hint in turn.settled {
            if taken {
                hints.finish(&hint);
            } else {
                hints.retry(hint, now, LATER);
            }
        }
        for (key, delay) in turn.again {
            hints.note(key, Look::Content, Beside::Nothing, now, delay);
        }
        for hint in turn.given_up {
            give_up(shared, &mut hints, &hint);
        }
        drop(hints);
        if taken {
            for (handle, file) in turn.added {
                if let Some(flight) = self.in_flight.get_mut(&handle) {
                    flight.file = Some(file);
                }
            }
        } else {
            self.space.forget();
            let until = now + KEPT_FOR;
            let room = KEPT_MAX.saturating_sub(self.kept.len());
            let keep = turn.facts.into_iter().take(room);
            self.kept
                .extend(keep.map(|(handle, facts)| (handle, (facts, until))));
        }
        shared.nudge();
    }

    // ---- the tree ------------------------------------------------------------------------------

    fn settle(&mut self, now: &mut Now<'_>, turn: &mut Turn) -> Result<(), Error> {
        let time = Instant::now();
        self.kept.retain(|_, (_, until)| *until > time);
        for (handle, (facts, _)) in &self.kept {
            turn.facts
                .entry(handle.clone())
                .or_insert_with(|| facts.clone());
        }
        let catalog: &Catalog = now.catalog;
        let mut tree = Tree::new(catalog);
        let (mut waiting, mut dirs) = (Vec::new(), BTreeSet::new());
        for (file, hint) in std::mem::take(&mut turn.dead) {
            let verdict = self.space.bury(&mut tree, file, &turn.facts);
            self.place(verdict, hint, turn, &mut waiting)?;
        }
        for hint in std::mem::take(&mut turn.entries) {
            let Some(entry) = entry_of(&hint).cloned() else {
                turn.settled.push(hint);
                continue;
            };
            let orphans = hint.tries >= TRIES_FOR_ORPHANS;
            let verdict = self.space.settle(&mut tree, &entry, &turn.facts, orphans);
            if matches!(verdict, Ok(Verdict::Settled)) {
                dirs.insert(entry.dir);
            }
            self.place(verdict, hint, turn, &mut waiting)?;
        }
        let bound: Vec<_> = tree
            .bound()
            .map(|(file, handle)| (handle.clone(), file))
            .collect();
        let directories = self.directories(catalog, &mut tree, &dirs, turn)?;
        for (file, new) in tree.added() {
            if let Some(handle) = &new.handle {
                turn.added.push((handle.clone(), file));
            }
        }
        turn.again.extend(
            bound
                .iter()
                .map(|(handle, _)| (Key::Inode(handle.clone()), Duration::ZERO)),
        );
        turn.added.extend(bound);
        let ops = tree.into_ops();
        if ops.iter().any(|op| matches!(op, Op::Delete(_))) {
            self.space.forget();
        }
        // After what was examined, some of which this may delete.
        turn.ops.extend(ops);
        turn.ops.extend(directories);
        for (handle, hint) in waiting {
            self.examine(handle, None, Look::Content, hint);
        }
        Ok(())
    }

    /// What becomes of a hint after its entry was looked at.
    fn place(
        &mut self,
        verdict: Result<Verdict, namespace::Error>,
        hint: Hint,
        turn: &mut Turn,
        waiting: &mut Vec<(Handle, Hint)>,
    ) -> Result<(), Error> {
        let seen = self.space.take_seen();
        match verdict {
            Ok(Verdict::Settled) => {
                turn.unwalked.extend(seen.unwalked);
                if hint.look == Look::Content {
                    // A sweep found a file elsewhere: no event says whether it was also written.
                    let keys = seen.renamed.into_iter().map(Key::Inode);
                    turn.again.extend(keys.map(|key| (key, Duration::ZERO)));
                }
                turn.settled.push(hint);
            }
            Ok(Verdict::Examine(handle)) => {
                // Else two new files whose places depend on each other would be read in turn for ever.
                self.keep(seen.used, turn, KEPT_FOR_ANOTHER);
                waiting.push((handle, hint));
            }
            Ok(Verdict::Later) if hint.tries >= TRIES_MAX => turn.given_up.push(hint),
            Ok(Verdict::Later) => {
                // What waits for its place in the tree is not read again for that.
                let time = LATER * hint.tries.clamp(1, 40) + KEPT_FOR;
                self.keep(seen.used, turn, time);
                turn.retry.push((hint, LATER));
            }
            Err(namespace::Error::Sys(error)) => turn.fail(hint, "an entry", &error),
            Err(namespace::Error::Catalog(error)) => return Err(error.into()),
        }
        Ok(())
    }

    /// Keeps what was found out about files whose entries could not be settled now.
    fn keep(&mut self, used: impl IntoIterator<Item = Handle>, turn: &Turn, time: Duration) {
        let until = Instant::now() + time;
        for handle in used {
            if let Some(facts) = turn.facts.get(&handle)
                && self.kept.len() < KEPT_MAX
            {
                self.kept.insert(handle, (facts.clone(), until));
            }
        }
    }

    /// The attributes of the directories whose entries change, or may have changed and changed back
    /// (`looked`): their times change with every entry, and no event says so.
    fn directories(
        &mut self,
        catalog: &Catalog,
        tree: &mut Tree<'_>,
        looked: &BTreeSet<Handle>,
        turn: &mut Turn,
    ) -> Result<Vec<Op>, Error> {
        let (mut ops, mut dirs) = (Vec::new(), tree.touched());
        for handle in looked {
            if let Some(dir) = tree.file_of(handle)?
                && !dirs.contains(&dir)
                && self.has_new_times(catalog, dir, handle)?
            {
                dirs.insert(dir);
            }
        }
        for dir in dirs {
            let Some(handle) = tree.handle_of(dir)? else {
                continue;
            };
            let facts = match examine::attributes(self.mount.root(), &handle) {
                Ok(Outcome::Facts(facts)) => facts,
                Ok(Outcome::Gone) => continue,
                Err(error) => {
                    tracing::warn!(%error, "a directory cannot be examined; it is tried again");
                    turn.again.push((Key::Inode(handle), FAILED));
                    continue;
                }
            };
            if tree.is_new(dir) {
                tree.refresh(dir, *facts);
            } else if let Some(row) = catalog.queries().inode(dir)? {
                let xattrs = catalog.queries().xattrs(dir)?;
                ops.extend(facts.ops_of_known(&row, &xattrs));
            }
        }
        Ok(ops)
    }

    fn has_new_times(
        &mut self,
        catalog: &Catalog,
        dir: FileId,
        handle: &Handle,
    ) -> Result<bool, Error> {
        let Some(row) = catalog.queries().inode(dir)? else {
            // New in this transaction, and examined a moment ago.
            return Ok(true);
        };
        Ok(match self.space.stat(handle) {
            Ok(Some(stat)) => row.ctime != Some(time_of(stat.ctime)),
            Ok(None) => false,
            Err(_) => true,
        })
    }

    // ---- hints ---------------------------------------------------------------------------------

    /// Asks a worker to examine an inode, or lets the hint wait for the one that does already.
    fn examine(&mut self, handle: Handle, known: Option<(FileId, Known)>, look: Look, hint: Hint) {
        if let Some(flight) = self.in_flight.get_mut(&handle) {
            flight.hints.push(hint);
            return;
        }
        let flight = InFlight {
            hints: vec![hint],
            look,
            turn: self.turn,
            file: None,
        };
        self.in_flight.insert(handle.clone(), flight);
        self.jobs.push(Job {
            handle,
            known,
            look,
        });
    }

    fn on_hint(&mut self, hint: Hint, now: &mut Now<'_>, turn: &mut Turn) -> Result<(), Error> {
        let Key::Inode(handle) = &hint.key else {
            return self.on_entry(hint, now, turn);
        };
        if let Some(flight) = self.in_flight.get_mut(handle) {
            // Asked for in this turn, it begins after all that this hint stands for.
            if flight.turn == self.turn && flight.look >= hint.look {
                flight.hints.push(hint);
            } else {
                turn.held.push(hint);
            }
            return Ok(());
        }
        if turn.fresh.contains(handle) {
            // What was read may be older than what the hint stands for.
            turn.held.push(hint);
            return Ok(());
        }
        let queries = now.catalog.queries();
        let Some(file) = queries.file_by_handle(&handle.to_bytes())? else {
            return {
                let by_name = now.shared.taken_over.load(Ordering::Relaxed);
                self.on_unknown(hint, by_name, turn);
                Ok(())
            };
        };
        let Some(row) = queries.inode(file)? else {
            turn.settled.push(hint);
            return Ok(());
        };
        if row.kind == Kind::Regular {
            self.on_file(hint, &row, now, turn);
            Ok(())
        } else {
            self.on_other(hint, &row, now.catalog, turn)
        }
    }

    /// An inode that the log does not know. It matters if it has a name: of that there is, or will be,
    /// a hint, which leads to an examination that begins later than this moment.
    /// On a disk that was taken over (`by_name`) it may be the one that the log has under its name: a sweep that began
    /// before the log said so took it for known, where it has the number that the other disk's had.
    fn on_unknown(&mut self, hint: Hint, by_name: bool, turn: &mut Turn) {
        let Key::Inode(handle) = &hint.key else {
            return;
        };
        self.kept.remove(handle);
        let has_name = matches!(hint.beside, Beside::Name(_));
        if has_name && by_name {
            turn.entries.push(hint);
        } else if has_name {
            let handle = handle.clone();
            self.examine(handle, None, Look::Content, hint);
        } else {
            turn.settled.push(hint);
        }
    }

    /// An entry. Where it is likely to name a file that the log does not know, that is examined first.
    fn on_entry(&mut self, hint: Hint, now: &mut Now<'_>, turn: &mut Turn) -> Result<(), Error> {
        if let Beside::Inode(handle) = &hint.beside {
            let read = turn.fresh.contains(handle) || self.kept.contains_key(handle);
            let new = self.in_flight.contains_key(handle)
                || now
                    .catalog
                    .queries()
                    .file_by_handle(&handle.to_bytes())?
                    .is_none();
            if new && !read {
                let handle = handle.clone();
                self.examine(handle, None, Look::Content, hint);
                return Ok(());
            }
        }
        turn.entries.push(hint);
        Ok(())
    }

    /// A regular file that the log knows: the workers look at it.
    fn on_file(&mut self, hint: Hint, row: &InodeRow, now: &Now<'_>, turn: &mut Turn) {
        let Key::Inode(handle) = hint.key.clone() else {
            return;
        };
        let time = Instant::now();
        if let Some(at) = self
            .not_before
            .get(&handle)
            .copied()
            .filter(|at| *at > time)
            && hint.seq > now.shared.urgent.load(Ordering::Relaxed)
        {
            turn.paced.push((hint, at - time));
            return;
        }
        // Workers read the version that the log has from what is committed.
        if row.content_lsn > now.folded {
            turn.held.push(hint);
            return;
        }
        let known = Known {
            size: row.size,
            mtime: row.mtime,
            ctime: row.ctime,
            content: row.content_lsn,
            fuzzy: row.fuzzy,
        };
        self.examine(handle, Some((row.file, known)), hint.look, hint);
    }

    /// A file without content: looked at here and now.
    fn on_other(
        &mut self,
        hint: Hint,
        row: &InodeRow,
        catalog: &mut Catalog,
        turn: &mut Turn,
    ) -> Result<(), Error> {
        let Key::Inode(handle) = &hint.key else {
            return Ok(());
        };
        match examine::attributes(self.mount.root(), handle) {
            Ok(Outcome::Facts(facts)) => {
                changes(catalog, row, &facts, turn)?;
                turn.settled.push(hint);
            }
            Ok(Outcome::Gone) => turn.dead.push((row.file, hint)),
            Err(error) => turn.fail(hint, "an inode", &error),
        }
        Ok(())
    }

    // ---- readings ------------------------------------------------------------------------------

    fn on_done(&mut self, done: Done, now: &mut Now<'_>, turn: &mut Turn) -> Result<(), Error> {
        let (hints, file) = self
            .in_flight
            .remove(&done.handle)
            .map_or((Vec::new(), None), |flight| (flight.hints, flight.file));
        now.shared.counters.examined.fetch_add(1, Ordering::Relaxed);
        self.pace(&done);
        let hints = own_hints(hints, &done.handle, now.catalog, turn)?;
        turn.fresh.insert(done.handle.clone());
        let row = match done.file.or(file) {
            Some(file) => now.catalog.queries().inode(file)?,
            None => None,
        };
        match (done.outcome, row) {
            (Ok(Outcome::Facts(facts)), row) => {
                if facts.content.as_ref().is_some_and(|version| version.fuzzy) {
                    now.shared.counters.fuzzy.fetch_add(1, Ordering::Relaxed);
                    turn.again.push((Key::Inode(done.handle.clone()), REST));
                }
                self.on_facts(*facts, done.handle, row, hints, now, turn)?;
            }
            (Ok(Outcome::Gone), Some(row)) => {
                for hint in hints {
                    match hint.key {
                        Key::Entry(_) => turn.entries.push(hint),
                        Key::Inode(_) => turn.dead.push((row.file, hint)),
                    }
                }
            }
            (Ok(Outcome::Gone), None) => turn.split(hints),
            (Err(error), row) => self.on_failure(&error, done.handle, row, hints, now, turn)?,
        }
        Ok(())
    }

    fn on_facts(
        &mut self,
        facts: Facts,
        handle: Handle,
        row: Option<InodeRow>,
        hints: Vec<Hint>,
        now: &mut Now<'_>,
        turn: &mut Turn,
    ) -> Result<(), Error> {
        if let Some(row) = row {
            self.remember(row.file, &facts, now.shared);
            changes(now.catalog, &row, &facts, turn)?;
            turn.split(hints);
        } else if facts
            .content
            .as_ref()
            .is_some_and(|version| version.base.is_some())
        {
            // Of a file that was deleted meanwhile: what it refers to is deleted, too.
            turn.split(hints);
        } else {
            turn.facts.insert(handle, Arc::new(facts));
            turn.entries.extend(hints);
        }
        Ok(())
    }

    /// What cannot be read is logged as far as it can be, marked, and named.
    fn on_failure(
        &mut self,
        error: &WorkError,
        handle: Handle,
        row: Option<InodeRow>,
        hints: Vec<Hint>,
        now: &mut Now<'_>,
        turn: &mut Turn,
    ) -> Result<(), Error> {
        let tried = hints.iter().map(|hint| hint.tries).max().unwrap_or(0);
        let again = |hint| (hint, FAILED);
        if tried < READINGS_MAX {
            tracing::warn!(%error, "a file cannot be examined; it is tried again");
            turn.retry.extend(hints.into_iter().map(again));
            return Ok(());
        }
        now.shared.trouble(
            "unreadable",
            true,
            "a file cannot be read",
            error.to_string(),
            "check the disk (dmesg, smartctl); the file's last good version stays in the log, every sweep tries it again",
        );
        match examine::attributes(self.mount.root(), &handle) {
            Ok(Outcome::Facts(mut facts)) => {
                facts.unreadable = Some(error.to_string());
                facts.certainty = Certainty::Unread;
                self.on_facts(*facts, handle, row, hints, now, turn)?;
            }
            Ok(Outcome::Gone) => turn.split(hints),
            Err(_) if tried < FAILURES_MAX => turn.retry.extend(hints.into_iter().map(again)),
            Err(_) => turn.given_up.extend(hints),
        }
        Ok(())
    }

    /// A file that took long to read is not read again at once.
    fn pace(&mut self, done: &Done) {
        let now = Instant::now();
        if self.not_before.len() > 4096 {
            self.not_before.retain(|_, at| *at > now);
        }
        if done.took > BUSY {
            let pause = (done.took * PACE).min(PACE_MAX);
            self.not_before.insert(done.handle.clone(), now + pause);
        }
    }

    /// What a change time that was found says about a file's content.
    fn remember(&self, file: FileId, facts: &Facts, shared: &Shared) {
        match facts.certainty {
            Certainty::Same => {}
            Certainty::Unread if facts.unreadable.is_none() => {
                let seen = Seen {
                    ctime: time_of(facts.stat.ctime),
                    size: facts.stat.size,
                };
                let until = Instant::now() + self.unread_for;
                shared.unread.note(file, seen, until);
            }
            _ => shared.unread.forget(file),
        }
    }

    /// Notes change times that say something of the content by now.
    fn confirm(&mut self, now: &mut Now<'_>, turn: &mut Turn) -> Result<(), Error> {
        let oldest = || now.shared.hints().oldest().map(|(since, _)| since);
        for (file, seen) in now.shared.unread.take_ripe(self.unread_for, oldest) {
            let row = now.catalog.queries().inode(file)?;
            if row.is_some_and(|row| row.size == seen.size && !row.fuzzy) {
                now.catalog
                    .set_seen(file, seen.ctime, seen.size, Time::now())?;
                turn.seen = true;
            }
        }
        Ok(())
    }
}

/// What the log is to say anew of a file; a change time that means nothing else is only remembered.
fn changes(
    catalog: &mut Catalog,
    row: &InodeRow,
    facts: &Facts,
    turn: &mut Turn,
) -> Result<(), Error> {
    let xattrs = catalog.queries().xattrs(row.file)?;
    let ops = facts.ops_of_known(row, &xattrs);
    let logs_ctime = ops.iter().any(|op| matches!(op, Op::Inode(_)));
    if let Some(ctime) = facts.newer_ctime(row).filter(|_| !logs_ctime) {
        catalog.set_seen(row.file, ctime, facts.stat.size, Time::now())?;
        turn.seen = true;
    }
    turn.ops.extend(ops);
    Ok(())
}

/// Those that asked for this inode. Others only waited for it: what they ask for is still to be done.
fn own_hints(
    hints: Vec<Hint>,
    handle: &Handle,
    catalog: &Catalog,
    turn: &mut Turn,
) -> Result<Vec<Hint>, Error> {
    let mut own = Vec::new();
    for hint in hints {
        match &hint.key {
            Key::Inode(other) if other != handle => {
                let file = catalog.queries().file_by_handle(&other.to_bytes())?;
                match (entry_of(&hint), file) {
                    (Some(_), _) => turn.entries.push(hint),
                    (None, Some(file)) => turn.dead.push((file, hint)),
                    (None, None) => turn.settled.push(hint),
                }
            }
            _ => own.push(hint),
        }
    }
    Ok(own)
}

fn entry_of(hint: &Hint) -> Option<&EntryKey> {
    match (&hint.key, &hint.beside) {
        (Key::Entry(entry), _) | (Key::Inode(_), Beside::Name(entry)) => Some(entry),
        (Key::Inode(_), _) => None,
    }
}

/// A hint that cannot be dealt with must not hold up everything that waits for it.
fn give_up(shared: &Shared, hints: &mut Hints, hint: &Hint) {
    let what = match (entry_of(hint), &hint.key) {
        (Some(entry), _) => format!(
            "the entry {} in the directory {:?}",
            entry.name.escape_ascii(),
            entry.dir
        ),
        (None, Key::Inode(handle)) => format!("the inode {handle:?}"),
        (None, Key::Entry(_)) => String::new(),
    };
    shared.trouble(
        "unexamined",
        true,
        "something cannot be examined, and is not in the log as it is now",
        what,
        "see the messages before; check the filesystem (dmesg, fsck); every sweep tries it again",
    );
    hints.finish(hint);
}
