//! Times as people and programs read them: RFC 3339 in UTC.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tierfs::Time;

/// A point in time, in JSON a string like `2026-11-20T17:00:00.25Z`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct When(pub Time);

impl When {
    /// The wall clock.
    pub fn now() -> Self {
        Self(Time::now())
    }

    /// A moment that lies so long before now.
    pub fn ago(span: Duration) -> Self {
        const SECOND: i128 = 1_000_000_000;
        let now = Time::now();
        let now = i128::from(now.seconds) * SECOND + i128::from(now.nanos);
        let then = now - i128::try_from(span.as_nanos()).unwrap_or(0);
        Self(Time {
            seconds: i64::try_from(then.div_euclid(SECOND)).unwrap_or(0),
            nanos: u32::try_from(then.rem_euclid(SECOND)).unwrap_or(0),
        })
    }

    /// Milliseconds from this time to `later`, 0 where that lies before.
    pub fn millis_until(self, later: Self) -> u64 {
        let nanos = |time: Time| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
        let millis = (nanos(later.0) - nanos(self.0)) / 1_000_000;
        u64::try_from(millis).unwrap_or(0)
    }

    /// Whole seconds, for tables.
    #[must_use]
    pub fn to_the_second(self) -> Self {
        Self(Time {
            seconds: self.0.seconds,
            nanos: 0,
        })
    }
}

impl From<Time> for When {
    fn from(time: Time) -> Self {
        Self(time)
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = i32::try_from(self.0.nanos).unwrap_or(0);
        match Timestamp::new(self.0.seconds, nanos) {
            Ok(time) => time.fmt(f),
            // A filesystem can hold times that no calendar has.
            Err(_) => write!(f, "@{}.{:09}", self.0.seconds, self.0.nanos),
        }
    }
}

/// Text that is no time.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no time: write it like 2026-11-20T17:00:00Z or 2026-11-20T18:00:00+01:00")]
pub struct BadTime(String);

impl FromStr for When {
    type Err = BadTime;

    fn from_str(text: &str) -> Result<Self, BadTime> {
        if let Some(raw) = text.strip_prefix('@') {
            return parse_raw(raw).ok_or_else(|| BadTime(text.to_owned()));
        }
        let time: Timestamp = text.parse().map_err(|_| BadTime(text.to_owned()))?;
        // Before 1970 jiff counts nanoseconds backwards, the log never does.
        let (mut seconds, mut nanos) = (time.as_second(), time.subsec_nanosecond());
        if nanos < 0 {
            seconds -= 1;
            nanos += 1_000_000_000;
        }
        let nanos = u32::try_from(nanos).map_err(|_| BadTime(text.to_owned()))?;
        Ok(Self(Time { seconds, nanos }))
    }
}

fn parse_raw(text: &str) -> Option<When> {
    let (seconds, nanos) = text.split_once('.')?;
    let time = Time {
        seconds: seconds.parse().ok()?,
        nanos: nanos.parse().ok().filter(|_| nanos.len() == 9)?,
    };
    Some(When(time))
}

impl Serialize for When {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for When {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn when(seconds: i64, nanos: u32) -> When {
        When(Time { seconds, nanos })
    }

    #[test]
    fn times_come_back() {
        for (time, text) in [
            (when(0, 0), "1970-01-01T00:00:00Z"),
            (when(1_795_000_000, 250_000_000), "2026-11-18T11:06:40.25Z"),
            (when(-1, 999_999_999), "1969-12-31T23:59:59.999999999Z"),
            (when(-2, 0), "1969-12-31T23:59:58Z"),
            (when(i64::MAX, 5), "@9223372036854775807.000000005"),
        ] {
            assert_eq!(time.to_string(), text);
            assert_eq!(text.parse::<When>().unwrap(), time);
            let json = serde_json::to_string(&time).unwrap();
            assert_eq!(serde_json::from_str::<When>(&json).unwrap(), time);
        }
        assert_eq!(
            "1970-01-01T01:00:00+01:00".parse::<When>().unwrap(),
            when(0, 0)
        );
        for bad in ["", "yesterday", "2026-13-01T00:00:00Z", "@1.5", "@", "5"] {
            assert!(bad.parse::<When>().is_err(), "{bad}");
        }
    }

    #[test]
    fn spans_do_not_go_below_zero() {
        assert_eq!(when(1, 0).millis_until(when(3, 500_000_000)), 2500);
        assert_eq!(when(3, 0).millis_until(when(1, 0)), 0);
        assert_eq!(
            when(i64::MIN, 0).millis_until(when(i64::MAX, 0)),
            u64::try_from((i128::from(i64::MAX) - i128::from(i64::MIN)) * 1000).unwrap_or(0)
        );
    }
}
