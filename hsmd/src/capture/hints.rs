//! What is to be examined: every event, sweep finding and retry becomes a hint here, and hints for
//! the same thing merge.
//!
//! A hint never says what happened, only where to look; losing its details loses nothing. Each hint
//! has a sequence number from the moment it was first noted until what it led to is in the log (or
//! proved to be nothing), through any number of retries. So "everything noted before this moment is
//! in the log" is one comparison ([`Hints::settled`]), and the oldest number is the lag.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use crate::sys::handle::Handle;

/// A name in a directory.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct EntryKey {
    /// The directory.
    pub dir: Handle,
    /// The name in it.
    pub name: Vec<u8>,
}

/// What to look at.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Key {
    /// An entry: does the name exist, and what does it name?
    Entry(EntryKey),
    /// An inode: attributes, and content where asked for.
    Inode(Handle),
}

/// What else is known of a hint, to save looking it up. It may be out of date.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Beside {
    /// Nothing.
    #[default]
    Nothing,
    /// Of an inode: a name that it had; of use while the log does not know the inode.
    Name(EntryKey),
    /// Of an entry: the inode that it named.
    Inode(Handle),
}

impl Beside {
    /// The newer knowledge, where there is some.
    fn or(self, older: Self) -> Self {
        if self == Self::Nothing { older } else { self }
    }
}

/// How closely an inode must be looked at.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Look {
    /// Attributes; content only where size or modification time differ from what is logged.
    Attributes,
    /// Content too.
    Content,
}

/// A hint on its way to [`Hints::note`].
pub type Noted = (Key, Look, Beside);

/// A hint, taken out to be worked on. It must come back by [`Hints::finish`], [`Hints::retry`],
/// [`Hints::hold`] or [`Hints::postpone`].
#[derive(Clone, Debug)]
pub struct Hint {
    /// What to look at.
    pub key: Key,
    /// Since when, as a number.
    pub seq: u64,
    /// Since when, as a time.
    pub since: Instant,
    /// How closely.
    pub look: Look,
    /// What else is known.
    pub beside: Beside,
    /// How often it came back.
    pub tries: u32,
}

struct Pending {
    hint: Hint,
    due: Instant,
    wait: Wait,
}

/// Whether somebody who is in a hurry ([`Hints::take_due`]) gets a hint before it is due.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// Yes: it only waits for the file to come to rest.
    Rest,
    /// No: it was tried, and would only fail again.
    Failed,
}

/// All hints that are not yet dealt with.
#[derive(Default)]
pub struct Hints {
    seqs: HashMap<Key, u64>,
    pending: BTreeMap<u64, Pending>,
    by_due: BTreeSet<(Instant, u64)>,
    /// Those of [`Wait::Rest`].
    resting: BTreeSet<u64>,
    active: BTreeMap<u64, Instant>,
    last_seq: u64,
    noted: u64,
}

impl Hints {
    /// Notes that something must be looked at, `settle` from now at the latest.
    pub fn note(&mut self, key: Key, look: Look, beside: Beside, now: Instant, settle: Duration) {
        self.noted += 1;
        let known = self.seqs.get(&key);
        if let Some(pending) = known.and_then(|seq| self.pending.get_mut(seq)) {
            pending.hint.look = pending.hint.look.max(look);
            let older = std::mem::take(&mut pending.hint.beside);
            pending.hint.beside = beside.or(older);
            return;
        }
        self.last_seq += 1;
        let hint = Hint {
            key,
            seq: self.last_seq,
            since: now,
            look,
            beside,
            tries: 0,
        };
        self.insert(hint, now + settle, Wait::Rest);
    }

    fn insert(&mut self, hint: Hint, due: Instant, wait: Wait) {
        let seq = hint.seq;
        self.by_due.insert((due, seq));
        if wait == Wait::Rest {
            self.resting.insert(seq);
        }
        self.seqs.insert(hint.key.clone(), seq);
        self.pending.insert(seq, Pending { hint, due, wait });
    }

    fn remove(&mut self, seq: u64) -> Option<Pending> {
        let pending = self.pending.remove(&seq)?;
        self.by_due.remove(&(pending.due, seq));
        self.resting.remove(&seq);
        self.seqs.remove(&pending.hint.key);
        Some(pending)
    }

    /// Takes up to `max` hints that are due, and those up to sequence number `urgent` that only
    /// rest, oldest first.
    pub fn take_due(&mut self, now: Instant, max: usize, urgent: u64) -> Vec<Hint> {
        let mut seqs: Vec<u64> = self.resting.range(..=urgent).take(max).copied().collect();
        for (due, seq) in &self.by_due {
            if *due > now || seqs.len() >= max {
                break;
            }
            if *seq > urgent || !self.resting.contains(seq) {
                seqs.push(*seq);
            }
        }
        seqs.sort_unstable();
        let hints: Vec<Hint> = seqs
            .iter()
            .filter_map(|seq| self.remove(*seq))
            .map(|pending| pending.hint)
            .collect();
        self.active
            .extend(hints.iter().map(|hint| (hint.seq, hint.since)));
        hints
    }

    /// The hint is dealt with: what it led to has been appended to the log.
    pub fn finish(&mut self, hint: &Hint) {
        self.active.remove(&hint.seq);
    }

    /// The hint could not be dealt with, and must be looked at again after `delay`.
    pub fn retry(&mut self, mut hint: Hint, now: Instant, delay: Duration) {
        hint.tries = hint.tries.saturating_add(1);
        self.put_back(hint, now + delay, Wait::Failed);
    }

    /// The hint met something under way, and is looked at again after `delay`.
    pub fn hold(&mut self, hint: Hint, now: Instant, delay: Duration) {
        self.put_back(hint, now + delay, Wait::Failed);
    }

    /// The hint is to be looked at not before `delay` from now, unless somebody is in a hurry.
    pub fn postpone(&mut self, hint: Hint, now: Instant, delay: Duration) {
        self.put_back(hint, now + delay, Wait::Rest);
    }

    fn put_back(&mut self, mut hint: Hint, mut due: Instant, mut wait: Wait) {
        self.active.remove(&hint.seq);
        let newer = self.seqs.get(&hint.key).copied();
        if let Some(newer) = newer.and_then(|seq| self.remove(seq)) {
            hint.look = hint.look.max(newer.hint.look);
            hint.beside = newer.hint.beside.or(hint.beside);
            due = due.max(newer.due);
            if newer.wait == Wait::Failed {
                wait = newer.wait;
            }
        }
        self.insert(hint, due, wait);
    }

    /// When the next hint can be taken by [`Self::take_due`].
    pub fn next_due(&self, urgent: u64) -> Option<Instant> {
        let resting = self.resting.first().filter(|seq| **seq <= urgent);
        let at_once = resting.and_then(|seq| self.pending.get(seq));
        match at_once {
            Some(pending) => Some(pending.hint.since),
            None => self.by_due.first().map(|(due, _)| *due),
        }
    }

    /// The number of the last hint noted so far.
    pub fn last_seq(&self) -> u64 {
        self.last_seq
    }

    /// True where nothing noted up to `seq` is open any more.
    pub fn settled(&self, seq: u64) -> bool {
        self.oldest_seq().is_none_or(|oldest| oldest > seq)
    }

    /// The number of the oldest open hint.
    pub fn oldest_seq(&self) -> Option<u64> {
        let pending = self.pending.keys().next();
        pending
            .into_iter()
            .chain(self.active.keys().next())
            .min()
            .copied()
    }

    /// How many hints are open, being worked on included.
    pub fn open(&self) -> usize {
        self.pending.len() + self.active.len()
    }

    /// Since when the oldest open hint waits, and what it is where it still waits here.
    pub fn oldest(&self) -> Option<(Instant, Option<&Hint>)> {
        let seq = self.oldest_seq()?;
        match self.pending.get(&seq) {
            Some(pending) => Some((pending.hint.since, Some(&pending.hint))),
            None => self.active.get(&seq).map(|since| (*since, None)),
        }
    }

    /// Those that wait longest, the oldest first.
    pub fn longest(&self, max: usize) -> impl Iterator<Item = &Hint> {
        self.pending.values().take(max).map(|pending| &pending.hint)
    }

    /// The open hint for a key, while it waits.
    pub fn waiting(&self, key: &Key) -> Option<&Hint> {
        let pending = self.pending.get(self.seqs.get(key)?)?;
        Some(&pending.hint)
    }

    /// How many times anything was noted.
    pub fn noted(&self) -> u64 {
        self.noted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode(byte: u8) -> Key {
        Key::Inode(Handle::from_bytes(&[1, 0, 0, 0, byte, 0, 0, 0, 9, 9, 9, 9]).unwrap())
    }

    const SETTLE: Duration = Duration::from_millis(100);

    #[test]
    fn hints_for_one_thing_merge_and_keep_the_first_number() {
        let (mut hints, now) = (Hints::default(), Instant::now());
        hints.note(inode(1), Look::Attributes, Beside::Nothing, now, SETTLE);
        hints.note(inode(2), Look::Attributes, Beside::Nothing, now, SETTLE);
        hints.note(inode(1), Look::Content, Beside::Nothing, now, SETTLE);
        assert!(hints.take_due(now, 10, 0).is_empty());
        let due = hints.take_due(now + SETTLE, 10, 0);
        assert_eq!(
            due.iter()
                .map(|hint| (hint.seq, hint.look))
                .collect::<Vec<_>>(),
            [(1, Look::Content), (2, Look::Attributes)]
        );
        assert!(!hints.settled(1) && hints.settled(0));
        hints.finish(&due[0]);
        assert!(hints.settled(1) && !hints.settled(2));
    }

    #[test]
    fn what_comes_while_a_hint_is_worked_on_is_a_new_one() {
        let (mut hints, now) = (Hints::default(), Instant::now());
        hints.note(inode(1), Look::Content, Beside::Nothing, now, SETTLE);
        let first = hints.take_due(now + SETTLE, 10, 0).remove(0);
        hints.note(inode(1), Look::Content, Beside::Nothing, now, SETTLE);
        assert_eq!(hints.open(), 2);
        // Taken back, the older one swallows the newer, and keeps its number.
        hints.retry(first, now, SETTLE);
        assert_eq!(hints.open(), 1);
        let again = hints.take_due(now + 2 * SETTLE, 10, 0).remove(0);
        assert_eq!((again.seq, again.tries), (1, 1));
        hints.finish(&again);
        assert!(hints.settled(u64::MAX));
    }

    #[test]
    fn urgent_hints_do_not_wait() {
        let (mut hints, now) = (Hints::default(), Instant::now());
        for byte in 0..5 {
            hints.note(inode(byte), Look::Attributes, Beside::Nothing, now, SETTLE);
        }
        assert_eq!(hints.take_due(now, 10, 3).len(), 3);
        assert_eq!(hints.open(), 5);
        assert_eq!(hints.next_due(3), Some(now + SETTLE));
        assert_eq!(hints.next_due(4), Some(now));
    }

    #[test]
    fn what_failed_leaves_room_for_what_it_waits_for() {
        let (mut hints, now) = (Hints::default(), Instant::now());
        for byte in 0..4 {
            hints.note(inode(byte), Look::Attributes, Beside::Nothing, now, SETTLE);
        }
        for hint in hints.take_due(now, 2, 4) {
            hints.retry(hint, now, SETTLE);
        }
        let rest = hints.take_due(now, 2, 4);
        assert_eq!(rest.iter().map(|h| h.seq).collect::<Vec<_>>(), [3, 4]);
        // What is paced comes at once when somebody is in a hurry, what failed does not.
        for hint in rest {
            hints.postpone(hint, now, SETTLE * 100);
        }
        assert_eq!(hints.next_due(0), Some(now + SETTLE));
        let seqs = |taken: Vec<Hint>| taken.iter().map(|hint| hint.seq).collect::<Vec<_>>();
        assert_eq!(seqs(hints.take_due(now, 9, 4)), [3, 4]);
        assert_eq!(seqs(hints.take_due(now + SETTLE, 9, 4)), [1, 2]);
        assert_eq!(hints.open(), 4);
    }
}
