//! Whether everything that changed before some moment is in the log: after the start, an overflow or
//! a sweep it is only when what the sweep has found is examined, appended and durable.
//!
//! An examination is asked for at the start and by whoever lost events. It is over once a sweep that
//! began after that has ended, every hint open at that end is settled, every directory that came to
//! light on the way is walked, and the log is durable up to there. Nothing here waits; somebody
//! looks again and again ([`crate::shared::Shared::is_examined`]).

use std::time::Instant;

/// What a sweep covers; from its begin to its end.
#[derive(Clone, Copy, Debug)]
pub struct Covers {
    asked: u64,
    begun: Instant,
}

/// What a sweep has found, until it is dealt with.
#[derive(Clone, Copy, Debug)]
struct Settling {
    covers: Covers,
    /// Hints up to this number belong to it.
    upto: u64,
    /// Directories were still to be walked when they were settled: what that finds belongs to it too.
    walking: bool,
    /// The log must be durable up to here; known once all hints are settled.
    lsn: Option<u64>,
}

/// What is known at a moment.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// The number of the oldest open hint.
    pub oldest: Option<u64>,
    /// The number of the last hint.
    pub last: u64,
    /// Directories that are still to be walked.
    pub walks: usize,
    /// The last transaction appended.
    pub written: u64,
    /// The last one that is durable.
    pub durable: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Examination {
    /// How many were asked for.
    asked: u64,
    /// How many of them a sweep has covered that has ended.
    swept: u64,
    /// How many of them are over.
    over: u64,
    settling: Option<Settling>,
}

impl Default for Examination {
    /// The one at the start is asked for.
    fn default() -> Self {
        Self {
            asked: 1,
            swept: 0,
            over: 0,
            settling: None,
        }
    }
}

impl Examination {
    /// Something was missed: everything must be looked at.
    pub fn ask(&mut self) {
        self.asked += 1;
    }

    /// How many were asked for.
    pub fn asked(&self) -> u64 {
        self.asked
    }

    /// How many of them a sweep has covered, though what it found need not be dealt with.
    pub fn swept(&self) -> u64 {
        self.swept
    }

    /// A sweep begins now.
    pub fn begins(&self) -> Covers {
        Covers {
            asked: self.asked,
            begun: Instant::now(),
        }
    }

    /// It has been everywhere. What an earlier one found and is still open belongs to this one.
    pub fn ends(&mut self, covers: Covers, now: Facts) {
        self.swept = self.swept.max(covers.asked);
        self.settling = Some(Settling {
            covers,
            upto: now.last,
            walking: false,
            lsn: None,
        });
    }

    /// True where everything that was asked for is over.
    pub fn is_over(&self) -> bool {
        self.over == self.asked
    }

    /// Looks how far the findings of the last sweep are. Gives when that sweep began, once, when all
    /// of them are dealt with.
    pub fn look(&mut self, now: Facts) -> Option<Instant> {
        let settling = self.settling.as_mut()?;
        if settling.lsn.is_none() {
            if now.oldest.is_some_and(|oldest| oldest <= settling.upto) {
                return None;
            }
            if now.walks > 0 {
                settling.walking = true;
                return None;
            }
            if std::mem::take(&mut settling.walking) {
                settling.upto = now.last;
                if now.oldest.is_some_and(|oldest| oldest <= settling.upto) {
                    return None;
                }
            }
        }
        let lsn = *settling.lsn.get_or_insert(now.written);
        if now.durable < lsn {
            return None;
        }
        let Covers { asked, begun } = settling.covers;
        self.over = self.over.max(asked);
        self.settling = None;
        Some(begun)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(oldest: Option<u64>, last: u64) -> Facts {
        Facts {
            oldest,
            last,
            walks: 0,
            written: 0,
            durable: 0,
        }
    }

    #[test]
    fn the_first_is_over_when_what_it_found_is_durable() {
        let mut all = Examination::default();
        let covers = all.begins();
        assert!(all.look(facts(None, 0)).is_none() && !all.is_over());
        all.ends(covers, facts(Some(1), 7));
        assert_eq!(all.swept(), 1);
        assert!(all.look(facts(Some(7), 9)).is_none(), "hint 7 is its own");
        let appended = Facts {
            written: 5,
            durable: 4,
            ..facts(Some(8), 9)
        };
        assert!(all.look(appended).is_none() && !all.is_over());
        let more = Facts {
            written: 6,
            durable: 5,
            ..appended
        };
        assert!(all.look(more).is_some() && all.is_over());
        assert!(all.look(more).is_none(), "it is told once");
    }

    #[test]
    fn what_a_directory_on_the_way_leads_to_belongs_to_it() {
        let mut all = Examination::default();
        all.ends(all.begins(), facts(None, 3));
        let walking = Facts {
            walks: 1,
            ..facts(None, 3)
        };
        assert!(all.look(walking).is_none());
        assert!(all.look(facts(Some(4), 5)).is_none(), "4 was found there");
        assert!(all.look(facts(Some(6), 6)).is_some() && all.is_over());
    }

    #[test]
    fn a_sweep_that_began_before_an_overflow_does_not_cover_it() {
        let mut all = Examination::default();
        let first = all.begins();
        all.ask();
        all.ends(first, facts(None, 0));
        assert!(all.look(facts(None, 0)).is_some());
        assert!(!all.is_over() && all.swept() < all.asked());
        all.ends(all.begins(), facts(None, 0));
        assert!(all.look(facts(None, 0)).is_some() && all.is_over());
    }

    #[test]
    fn the_next_sweep_takes_over_what_is_open() {
        let mut all = Examination::default();
        all.ends(all.begins(), facts(Some(2), 4));
        all.ends(all.begins(), facts(Some(2), 6));
        assert!(all.look(facts(Some(5), 6)).is_none());
        assert!(all.look(facts(None, 6)).is_some() && all.is_over());
    }
}
