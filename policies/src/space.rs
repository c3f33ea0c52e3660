//! How fast a filesystem fills, how fast release gives space back, and what follows from both: when to
//! look again, how much to release at once, and how fast writers may be without meeting a full disk.
//!
//! Writers have the *headroom*, what is free when the high watermark is reached, until release has given
//! back something: that takes the *latency*. From then on they must not be faster than release. So the
//! limit is the smaller one of headroom / latency and the speed of release. All of it is measured; what has
//! not been measured yet is `None`. Times are spans since any fixed moment.

use std::collections::VecDeque;
use std::time::Duration;

use crate::decide::Usage;
use crate::rules::Watermarks;

/// The filesystem is looked at at least this often.
pub const LOOK_MAX: Duration = Duration::from_secs(1);
/// And never more often.
const LOOK_MIN: Duration = Duration::from_millis(50);
/// A writer who was quiet may begin with so much a second, as far as looking in time goes.
const BURST_BYTES_PER_S: f64 = (512 << 20) as f64;
/// The distance to the mark is looked at so many times on the way.
const LOOKS: f64 = 4.0;
/// The rate of the moment is an average over about this.
const RATE_OVER: Duration = Duration::from_secs(1);
/// The highest rate is that of a span of this length.
const PEAK_OVER: Duration = Duration::from_secs(5);
/// And of the last hour.
const PEAK_WITHIN: Duration = Duration::from_hours(1);
/// Batches that latency and speed are taken from.
const BATCHES: usize = 32;
/// A batch takes so long as long as none was measured.
const GAP_UNKNOWN: Duration = Duration::from_secs(1);
/// What would be full within so many batches is in need.
const GAPS_IN_NEED: f64 = 4.0;
/// At least this is taken for the time until space is given back. A batch that was measured on a quiet disk takes a
/// tenth of what it takes while a writer has all of his bytes in memory, which the same syncs must write.
const LATENCY_LEAST: Duration = Duration::from_secs(2);
/// Files of one batch.
pub const BATCH_FILES: usize = 256;
/// Files of the first batch in need: its space is free soon, and each further batch is twice as large.
const BATCH_FILES_IN_NEED: usize = 16;

/// Bytes a second.
pub type Rate = u64;

#[allow(clippy::cast_precision_loss)] // rates and times need no more than 52 bits
fn float(bytes: u64) -> f64 {
    bytes as f64
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates, and is never negative
fn whole(bytes: f64) -> u64 {
    bytes.max(0.0) as u64
}

fn per_second(bytes: u64, time: Duration) -> Rate {
    whole(float(bytes) / time.as_secs_f64().max(1e-6))
}

/// Measures how fast a filesystem fills.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    last: Option<(Duration, u64)>,
    rate: f64,
    /// Since when, and bytes since then.
    span: Option<(Duration, u64)>,
    /// Ascending times, descending rates.
    peaks: VecDeque<(Duration, Rate)>,
}

impl Meter {
    /// Notes what is in use at a moment, and what release gave back since the last call.
    pub fn note(&mut self, at: Duration, usage: Usage, freed: u64) {
        let Some((before, used)) = self.last.replace((at, usage.used)) else {
            return;
        };
        let time = at.saturating_sub(before);
        if time.is_zero() {
            self.last = Some((before, used.saturating_sub(freed)));
            return;
        }
        // What others deleted is nobody's write.
        let grown = usage.used.saturating_add(freed).saturating_sub(used);
        let now = float(grown) / time.as_secs_f64();
        let weight = 1.0 - (-time.as_secs_f64() / RATE_OVER.as_secs_f64()).exp();
        self.rate += (now - self.rate) * weight;
        let (since, bytes) = self.span.unwrap_or((before, 0));
        let bytes = bytes.saturating_add(grown);
        let long = at.saturating_sub(since);
        self.span = Some((since, bytes));
        if long >= PEAK_OVER {
            self.span = Some((at, 0));
            self.note_peak(at, per_second(bytes, long));
        }
    }

    fn note_peak(&mut self, at: Duration, rate: Rate) {
        while self
            .peaks
            .pop_back_if(|(_, other)| *other <= rate)
            .is_some()
        {}
        self.peaks.push_back((at, rate));
        let oldest = at.saturating_sub(PEAK_WITHIN);
        while self
            .peaks
            .pop_front_if(|(then, _)| *then < oldest)
            .is_some()
        {}
    }

    /// Bytes a second by which writers fill it now.
    pub fn rate(&self) -> Rate {
        whole(self.rate)
    }

    /// The most that they did over five seconds of the last hour.
    pub fn peak(&self) -> Rate {
        self.peaks.front().map_or(0, |(_, rate)| *rate)
    }
}

/// Measures how fast space is given back.
#[derive(Clone, Debug, Default)]
pub struct Releases {
    /// How long nothing was given back before, what was then, and how long the batch itself took.
    batches: VecDeque<(Duration, u64, Duration)>,
}

impl Releases {
    /// A batch gave back `bytes` in `time`, after `gap` (which `time` is a part of) without any.
    pub fn note(&mut self, gap: Duration, bytes: u64, time: Duration) {
        if self.batches.len() >= BATCHES {
            self.batches.pop_front();
        }
        self.batches.push_back((gap, bytes, time));
    }

    /// The longest time that writers went on and nothing was given back.
    pub fn latency(&self) -> Option<Duration> {
        self.batches.iter().map(|(gap, ..)| *gap).max()
    }

    /// Bytes a second of the batch that gave back most: small ones say nothing of what is possible.
    pub fn speed(&self) -> Option<Rate> {
        let most = self.batches.iter().max_by_key(|(_, bytes, _)| *bytes)?;
        Some(per_second(most.1, most.2))
    }

    /// How fast writers may be who have so much room from the high watermark on.
    pub fn limit(&self, headroom: u64) -> Option<Rate> {
        let by_room = per_second(headroom, counted(self.latency()?));
        Some(by_room.min(self.speed()?))
    }
}

/// What is taken for the time until space is given back, when this was measured.
fn counted(latency: Duration) -> Duration {
    latency.max(LATENCY_LEAST)
}

/// What is free when the high watermark is reached.
pub fn headroom(usage: Usage, marks: Watermarks) -> u64 {
    let capacity = u128::from(usage.used) + u128::from(usage.available);
    let free = capacity * u128::from(100_u8.saturating_sub(marks.high)) / 100;
    u64::try_from(free).unwrap_or(u64::MAX)
}

/// The highest high watermark that leaves enough room for writers of this rate, with half as much to spare;
/// `None` where none does.
pub fn high_for(usage: Usage, rate: Rate, latency: Duration) -> Option<u8> {
    let capacity = float(usage.used) + float(usage.available);
    let wanted = float(rate) * counted(latency).as_secs_f64() * 1.5;
    let percent = 100.0 - wanted * 100.0 / capacity.max(1.0);
    u8::try_from(whole(percent)).ok().filter(|high| *high >= 2)
}

/// When to look again at a filesystem whose next mark is so far away (bytes).
pub fn look_again(distance: u64, rate: Rate) -> Duration {
    let rate = float(rate).max(BURST_BYTES_PER_S);
    Duration::try_from_secs_f64(float(distance) / rate / LOOKS)
        .unwrap_or(LOOK_MAX)
        .clamp(LOOK_MIN, LOOK_MAX)
}

/// How release goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// In large batches, which cost least.
    Calm,
    /// In small ones first: space shrinks faster than it is given back.
    InNeed,
}

impl Pace {
    /// For a filesystem above its high watermark, with so much room from there on.
    pub fn of(usage: Usage, headroom: u64, rate: Rate, gap: Option<Duration>) -> Self {
        let gap = gap.unwrap_or(GAP_UNKNOWN).as_secs_f64();
        let soon = float(usage.available) < float(rate) * gap * GAPS_IN_NEED;
        if soon || usage.available < headroom / 2 {
            Self::InNeed
        } else {
            Self::Calm
        }
    }

    /// Files of the next batch, when so many batches were made in need one after the other.
    pub fn batch_files(self, in_need: u32) -> usize {
        match self {
            Self::Calm => BATCH_FILES,
            Self::InNeed => {
                let twice = BATCH_FILES_IN_NEED.checked_shl(in_need);
                twice.map_or(BATCH_FILES, |files| {
                    files.clamp(BATCH_FILES_IN_NEED, BATCH_FILES)
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;
    const MARKS: Watermarks = Watermarks { high: 90, low: 80 };

    fn usage(used: u64, available: u64) -> Usage {
        Usage { used, available }
    }

    fn millis(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_steady_writer_is_measured_through_what_is_given_back() {
        let mut meter = Meter::default();
        let mut used = 800 * MIB;
        for tick in 0..200_u64 {
            used += 5 * MIB;
            let freed = if tick.is_multiple_of(10) { 50 * MIB } else { 0 };
            used -= freed;
            meter.note(millis(tick * 100), usage(used, 2000 * MIB - used), freed);
        }
        let rate = meter.rate() / MIB;
        assert!((48..=52).contains(&rate), "{rate} MiB/s");
        let peak = meter.peak() / MIB;
        assert!((49..=51).contains(&peak), "{peak} MiB/s");
        // It stops: the rate falls at once, the peak is kept for an hour.
        for tick in 200..300_u64 {
            meter.note(millis(tick * 100), usage(used, 2000 * MIB - used), 0);
        }
        assert!(meter.rate() < MIB);
        assert!(meter.peak() > 48 * MIB);
        for hours in 1..4 {
            meter.note(millis(hours * 3_700_000), usage(used, 0), 0);
        }
        assert_eq!(meter.peak(), 0);
    }

    #[test]
    fn what_is_deleted_is_no_write() {
        let mut meter = Meter::default();
        meter.note(millis(0), usage(900, 100), 0);
        meter.note(millis(100), usage(100, 900), 0);
        assert_eq!(meter.rate(), 0);
        // Two looks at the same moment are one.
        meter.note(millis(100), usage(100, 900), 50);
        meter.note(millis(200), usage(100, 900), 0);
        assert!(meter.rate() <= 500);
    }

    #[test]
    fn the_limit_is_the_smaller_one_of_room_and_speed() {
        let mut releases = Releases::default();
        assert_eq!(releases.limit(MIB), None);
        releases.note(millis(500), 100 * MIB, millis(250));
        assert_eq!(releases.latency(), Some(millis(500)));
        assert_eq!(releases.speed(), Some(400 * MIB));
        // Little room: its writers are stopped by the latency, of which at least two seconds count.
        assert_eq!(releases.limit(50 * MIB), Some(25 * MIB));
        // Much room: by the speed.
        assert_eq!(releases.limit(5000 * MIB), Some(400 * MIB));
        // A small batch says nothing of the speed, but its gap counts.
        releases.note(millis(4000), MIB, millis(3900));
        assert_eq!(releases.speed(), Some(400 * MIB));
        assert_eq!(releases.limit(50 * MIB), Some(50 * MIB / 4));
        for _ in 0..BATCHES {
            releases.note(millis(100), 100 * MIB, millis(100));
        }
        assert_eq!(releases.limit(50 * MIB), Some(25 * MIB));
    }

    #[test]
    fn it_looks_more_often_the_nearer_the_mark_is() {
        assert_eq!(look_again(1 << 40, 0), LOOK_MAX);
        assert_eq!(look_again(0, 0), LOOK_MIN);
        assert_eq!(look_again(512 * MIB, 0), millis(250));
        assert_eq!(look_again(512 * MIB, 1024 * MIB), millis(125));
    }

    #[test]
    fn in_need_the_first_batches_are_small() {
        let room = headroom(usage(900, 100), MARKS);
        assert_eq!(room, 100);
        assert_eq!(Pace::of(usage(900, 100), room, 0, None), Pace::Calm);
        assert_eq!(Pace::of(usage(960, 40), room, 0, None), Pace::InNeed);
        assert_eq!(Pace::of(usage(900, 100), room, 30, None), Pace::InNeed);
        assert_eq!(
            Pace::of(usage(900, 100), room, 30, Some(millis(100))),
            Pace::Calm
        );
        let sizes: Vec<usize> = (0..6).map(|n| Pace::InNeed.batch_files(n)).collect();
        assert_eq!(sizes, [16, 32, 64, 128, 256, 256]);
        assert_eq!(Pace::InNeed.batch_files(1000), BATCH_FILES);
        assert_eq!(Pace::Calm.batch_files(3), BATCH_FILES);
    }

    proptest! {
        /// A watermark that is proposed leaves room for what it was proposed for.
        #[test]
        fn the_proposed_watermark_suffices(
            capacity in 1_u64 << 30..1 << 50, rate in 0..1_u64 << 40, latency in 1..100_000_u64,
        ) {
            let (latency, all) = (millis(latency), usage(capacity / 2, capacity - capacity / 2));
            if let Some(high) = high_for(all, rate, latency) {
                let room = headroom(all, Watermarks { high, low: 1 });
                prop_assert!(float(room) * 1.0001 + 1.0 >= float(rate) * latency.as_secs_f64());
            }
        }
    }
}
