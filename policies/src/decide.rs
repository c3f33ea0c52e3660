//! Decisions: what is due, how much is to be freed, when a run ends. Pure functions of what the caller
//! found out; times are unix seconds.

use crate::rules::{Rule, Schedule, Watermarks};

/// The stop rule judges no fewer tries than this.
const TRIES_MIN: u64 = 20;
const DAY: i64 = 86_400;

/// How full a filesystem is, for a user who is not root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in use.
    pub used: u64,
    /// Bytes that can still be written.
    pub available: u64,
}

impl Usage {
    fn capacity(self) -> u128 {
        u128::from(self.used) + u128::from(self.available)
    }

    /// Per cent in use, rounded up, as df prints it.
    pub fn percent(self) -> u64 {
        let capacity = self.capacity();
        let percent = (u128::from(self.used) * 100).checked_div(capacity);
        let exact = percent.unwrap_or(0);
        let up = u128::from(exact * capacity < u128::from(self.used) * 100);
        u64::try_from(exact + up).unwrap_or(100)
    }

    /// How many bytes are to be freed to get down to the low watermark; `None` below the high one.
    pub fn to_free(self, marks: Watermarks) -> Option<u64> {
        let at = |percent: u8| self.capacity() * u128::from(percent);
        let used = u128::from(self.used) * 100;
        if self.capacity() == 0 || used < at(marks.high) {
            return None;
        }
        let over = used.saturating_sub(at(marks.low)).div_ceil(100);
        u64::try_from(over).ok()
    }
}

/// When a schedule is due next after it ran at `last`, or was first seen then. `offset` is what local time is
/// ahead of UTC, seconds.
pub fn next_run(schedule: Schedule, last: i64, offset: i64) -> i64 {
    match schedule {
        // Not at once after each start: a daemon that restarts often would do nothing else.
        Schedule::Every { seconds } => {
            let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
            last.saturating_add(seconds)
        }
        Schedule::Daily(at) => {
            let local = last.saturating_add(offset);
            let today = local.div_euclid(DAY) * DAY + i64::from(at.minutes()) * 60;
            let next = if today > local { today } else { today + DAY };
            next - offset
        }
    }
}

/// What one run may still do. It may take several passes: what a file's size promises to free is not always
/// what becomes free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    files: u64,
    bytes: u64,
    taken: (u64, u64),
    /// Of this pass: bytes wanted and taken.
    pass: (u64, u64),
}

impl Budget {
    /// Of a rule, for a first pass in which `to_free` bytes are wanted (`None`: all that it finds).
    pub fn new(rule: &Rule, to_free: Option<u64>) -> Self {
        Self {
            files: rule.max_files.unwrap_or(u64::MAX),
            bytes: rule.max_bytes.unwrap_or(u64::MAX),
            taken: (0, 0),
            pass: (to_free.unwrap_or(u64::MAX), 0),
        }
    }

    /// Begins another pass, in which `to_free` bytes are wanted.
    pub fn again(&mut self, to_free: u64) {
        self.pass = (to_free, 0);
    }

    /// Whether another file belongs to the pass.
    pub fn wants_more(&self) -> bool {
        self.may_go_on() && self.pass.1 < self.pass.0
    }

    /// Whether the run's own limits allow another file.
    pub fn may_go_on(&self) -> bool {
        self.taken.0 < self.files && self.taken.1 < self.bytes
    }

    /// Takes a file of so many bytes.
    pub fn take(&mut self, bytes: u64) {
        self.taken.0 += 1;
        self.taken.1 = self.taken.1.saturating_add(bytes);
        self.pass.1 = self.pass.1.saturating_add(bytes);
    }

    /// Files and bytes taken.
    pub fn taken(&self) -> (u64, u64) {
        self.taken
    }
}

/// Whether a run ends because too much of it fails: what makes a tenth of the files fail is a fault of
/// the system, and trying the rest only makes noise.
pub fn gives_up(tried: u64, failed: u64, percent_max: u8) -> bool {
    tried >= TRIES_MIN && u128::from(failed) * 100 > u128::from(tried) * u128::from(percent_max)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rules::TimeOfDay;

    #[test]
    fn watermarks() {
        let marks = Watermarks { high: 90, low: 80 };
        let usage = |used, available| Usage { used, available };
        assert_eq!(usage(89, 11).to_free(marks), None);
        assert_eq!(usage(90, 10).to_free(marks), Some(10));
        assert_eq!(usage(100, 0).to_free(marks), Some(20));
        assert_eq!(usage(0, 0).to_free(marks), None);
        assert_eq!(usage(901, 99).percent(), 91);
        assert_eq!(usage(0, 0).percent(), 0);
        assert_eq!(usage(u64::MAX, 0).percent(), 100);
    }

    #[test]
    fn schedules() {
        let every = Schedule::Every { seconds: 3600 };
        assert_eq!(next_run(every, 1000, 0), 4600);
        assert_eq!(next_run(every, i64::MAX, 0), i64::MAX);
        // 1970-01-02, 03:30 local time, an hour ahead of UTC.
        let daily = Schedule::Daily(TimeOfDay::parse("03:30").unwrap());
        let due = DAY + 2 * 3600 + 1800;
        assert_eq!(next_run(daily, DAY, 3600), due);
        assert_eq!(next_run(daily, due, 3600), due + DAY);
        assert_eq!(next_run(daily, due - 1, 3600), due);
    }

    #[test]
    fn a_run_gives_up_where_much_fails() {
        assert!(!gives_up(19, 19, 10));
        assert!(gives_up(20, 3, 10));
        assert!(!gives_up(20, 2, 10));
        assert!(!gives_up(1000, 1000, 100));
    }

    proptest! {
        /// What is freed brings the usage to the low watermark, and not a byte further than needed.
        #[test]
        fn freeing_reaches_the_low_watermark(
            used in 0..1_u64 << 50, available in 0..1_u64 << 50, low in 1..98_u8, more in 1..50_u8,
        ) {
            let marks = Watermarks { high: low.saturating_add(more).min(99), low };
            let usage = Usage { used, available };
            match usage.to_free(marks) {
                None => prop_assert!(usage.percent() <= u64::from(marks.high)),
                Some(bytes) => {
                    prop_assert!(bytes <= used);
                    let after = Usage { used: used - bytes, available: available + bytes };
                    prop_assert!(after.percent() <= u64::from(low));
                    let less = Usage { used: used - bytes + 1, available: available + bytes - 1 };
                    prop_assert!(less.percent() > u64::from(low));
                }
            }
        }

        #[test]
        fn the_next_run_lies_ahead(
            last in 0..1_i64 << 40, minutes in 0..1440_u16, offset in -50_000..50_000_i64,
        ) {
            let at = TimeOfDay::parse(&format!("{:02}:{:02}", minutes / 60, minutes % 60)).unwrap();
            let next = next_run(Schedule::Daily(at), last, offset);
            prop_assert!(next > last && next <= last + DAY);
            prop_assert_eq!((next + offset).rem_euclid(DAY), i64::from(minutes) * 60);
        }
    }
}
