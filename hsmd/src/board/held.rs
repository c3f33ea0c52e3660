//! What a volume holds, as runs of segments: memory grows with the gaps, not with the segments.

use std::collections::{BTreeMap, BTreeSet};

use tierfs::{SegmentNo, Time};

/// A set of segment numbers; neighbours are kept as one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    /// First and last number of each run; runs neither overlap nor touch.
    runs: BTreeMap<SegmentNo, SegmentNo>,
    len: u64,
}

impl Segments {
    /// Whether it has this one.
    pub fn contains(&self, no: SegmentNo) -> bool {
        self.run_of(no).is_some()
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Ascending.
    pub fn iter(&self) -> impl Iterator<Item = SegmentNo> + '_ {
        let run = |(first, last): (&SegmentNo, &SegmentNo)| {
            (first.get()..=last.get()).filter_map(SegmentNo::new)
        };
        self.runs.iter().flat_map(run)
    }

    fn run_of(&self, no: SegmentNo) -> Option<(SegmentNo, SegmentNo)> {
        let (first, last) = self.runs.range(..=no).next_back()?;
        (*last >= no).then_some((*first, *last))
    }

    /// Adds one; false where it was there.
    pub fn insert(&mut self, no: SegmentNo) -> bool {
        if self.contains(no) {
            return false;
        }
        let before = no.prev().and_then(|prev| self.run_of(prev));
        let after = self.runs.remove(&no.next());
        let first = before.map_or(no, |(first, _)| first);
        self.runs.insert(first, after.unwrap_or(no));
        self.len += 1;
        true
    }

    /// Takes one away; false where it was not there.
    pub fn remove(&mut self, no: SegmentNo) -> bool {
        let Some((first, last)) = self.run_of(no) else {
            return false;
        };
        self.runs.remove(&first);
        if let Some(prev) = no.prev().filter(|prev| *prev >= first) {
            self.runs.insert(first, prev);
        }
        if last > no {
            self.runs.insert(no.next(), last);
        }
        self.len -= 1;
        true
    }
}

/// What is known of a volume's copies.
#[derive(Debug, Default)]
pub struct Held {
    good: Segments,
    damaged: BTreeSet<SegmentNo>,
    /// No good copy was read back before this time.
    oldest: Option<Time>,
    /// Those of `good` that are only known to be listed.
    unread: Segments,
    /// It is at one of the pool's places, or was when it was seen last.
    pub counts: bool,
}

impl Held {
    /// Whether the pool has the segment by this volume.
    pub fn has(&self, no: SegmentNo) -> bool {
        self.counts && self.good.contains(no)
    }

    /// Whether the pool has the segment by this volume, and its copy was read back.
    pub fn has_verified(&self, no: SegmentNo) -> bool {
        self.has(no) && !self.unread.contains(no)
    }

    /// Whether a copy is there, good or not.
    pub fn knows(&self, no: SegmentNo) -> bool {
        self.good.contains(no) || self.damaged.contains(&no)
    }

    /// Whether a copy is there and damaged.
    pub fn is_damaged(&self, no: SegmentNo) -> bool {
        self.damaged.contains(&no)
    }

    /// Copies that are damaged.
    pub fn damaged(&self) -> &BTreeSet<SegmentNo> {
        &self.damaged
    }

    /// Copies that are good as far as is known.
    pub fn good(&self) -> &Segments {
        &self.good
    }

    /// How many copies there are, good or not.
    pub fn count(&self) -> u64 {
        self.good.len() + self.damaged.len() as u64
    }

    /// A copy is good: it was read back then, or is only known to be listed.
    pub fn insert_good(&mut self, no: SegmentNo, verified: Option<Time>) {
        self.damaged.remove(&no);
        let first = self.good.len() == 0;
        self.good.insert(no);
        if verified.is_some() {
            self.unread.remove(no);
        } else {
            self.unread.insert(no);
        }
        match verified {
            Some(time) if first => self.oldest = Some(time),
            Some(time) => self.oldest = self.oldest.map(|oldest| oldest.min(time)).or(Some(time)),
            None => {}
        }
    }

    /// A copy is damaged.
    pub fn insert_damaged(&mut self, no: SegmentNo) {
        self.good.remove(no);
        self.unread.remove(no);
        self.damaged.insert(no);
    }

    /// A copy is not there.
    pub fn remove(&mut self, no: SegmentNo) {
        self.good.remove(no);
        self.unread.remove(no);
        self.damaged.remove(&no);
    }

    /// A check that began at `begun` has read all of it.
    pub fn checked(&mut self, begun: Time) {
        self.oldest = Some(begun);
        self.unread = Segments::default();
    }

    /// All good copies were read back at this time or later; `None` where that cannot be said.
    pub fn verified(&self) -> Option<Time> {
        let known = self.good.len() > 0 && self.unread.len() == 0;
        self.oldest.filter(|_| known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no(number: u64) -> SegmentNo {
        SegmentNo::new(number).unwrap()
    }

    fn at(seconds: i64) -> Time {
        Time { seconds, nanos: 0 }
    }

    #[test]
    fn runs_hold_what_a_plain_set_holds() {
        let (mut runs, mut plain) = (Segments::default(), BTreeSet::new());
        let mut state = 12345u64;
        for _ in 0..20_000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let number = no(1 + (state >> 33) % 60);
            if (state >> 20) & 1 == 0 {
                assert_eq!(runs.insert(number), plain.insert(number));
            } else {
                assert_eq!(runs.remove(number), plain.remove(&number));
            }
            assert_eq!(runs.len(), plain.len() as u64);
            assert!(runs.iter().eq(plain.iter().copied()));
            let ends = runs.runs.values().zip(runs.runs.keys().skip(1));
            for (last, first) in ends {
                assert!(last.next() < *first, "runs touch: {runs:?}");
            }
        }
    }

    #[test]
    fn the_oldest_reading_counts() {
        let mut held = Held::default();
        assert_eq!(held.verified(), None);
        held.insert_good(no(1), Some(at(200)));
        held.insert_good(no(2), Some(at(100)));
        held.insert_good(no(3), Some(at(300)));
        assert_eq!(held.verified(), Some(at(100)));
        held.insert_good(no(4), None);
        assert_eq!(held.verified(), None);
        held.counts = true;
        assert!(held.has_verified(no(1)) && held.has(no(4)) && !held.has_verified(no(4)));
        held.checked(at(400));
        assert_eq!(held.verified(), Some(at(400)));
        held.insert_damaged(no(2));
        assert_eq!((held.count(), held.good().len()), (4, 3));
        assert!(held.is_damaged(no(2)) && held.knows(no(2)) && !held.good().contains(no(2)));
        held.remove(no(2));
        assert!(!held.knows(no(2)));
    }
}
