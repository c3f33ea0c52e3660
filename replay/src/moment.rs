//! The moment that is restored: the log's end, a transaction, or a time.

use std::fmt;
use std::str::FromStr;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use tierfs::{Lsn, Time};

use crate::error::Error;

/// A moment of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The log's end.
    End,
    /// The end of a transaction.
    Lsn(Lsn),
    /// The end of the last transaction whose time is not later.
    Time(Time),
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End => f.write_str("the log's end"),
            Self::Lsn(lsn) => write!(f, "transaction {lsn}"),
            Self::Time(time) => f.write_str(&rfc3339(*time)),
        }
    }
}

/// A time as RFC 3339 has it, in UTC.
pub fn rfc3339(time: Time) -> String {
    let nanos = i32::try_from(time.nanos).unwrap_or(0);
    Timestamp::new(time.seconds, nanos).map_or_else(
        |_| format!("{} s since 1970", time.seconds),
        |stamp| stamp.to_string(),
    )
}

impl FromStr for Moment {
    type Err = Error;

    /// An LSN, an RFC 3339 time, or a date with or without a time of day in local time.
    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text.trim(), &TimeZone::system()).ok_or_else(|| Error::BadMoment {
            text: text.to_owned(),
        })
    }
}

fn parse(text: &str, zone: &TimeZone) -> Option<Moment> {
    if text == "end" {
        return Some(Moment::End);
    }
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().ok().and_then(Lsn::new).map(Moment::Lsn);
    }
    let stamp = text
        .parse::<Timestamp>()
        .or_else(|_| text.parse::<Zoned>().map(|zoned| zoned.timestamp()))
        .or_else(|_| {
            let civil = text.parse::<DateTime>()?;
            civil.to_zoned(zone.clone()).map(|zoned| zoned.timestamp())
        })
        .ok()?;
    let nanos =
        i128::from(stamp.as_second()) * 1_000_000_000 + i128::from(stamp.subsec_nanosecond());
    Some(Moment::Time(Time {
        seconds: i64::try_from(nanos.div_euclid(1_000_000_000)).ok()?,
        nanos: u32::try_from(nanos.rem_euclid(1_000_000_000)).ok()?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Option<(i64, u32)> {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        match parse(text, &zone)? {
            Moment::Time(time) => Some((time.seconds, time.nanos)),
            _ => None,
        }
    }

    #[test]
    fn numbers_are_transactions() {
        assert_eq!(
            "1042".parse::<Moment>().unwrap(),
            Moment::Lsn(Lsn::new(1042).unwrap())
        );
        for bad in ["0", "", "-1", "x", "99999999999999999999999", "2026-13-01"] {
            assert!(bad.parse::<Moment>().is_err(), "{bad}");
        }
    }

    #[test]
    fn times_are_rfc_3339_or_local() {
        assert_eq!(time("1970-01-01T00:00:10Z"), Some((10, 0)));
        assert_eq!(time("1970-01-01T02:00:10.5+02:00"), Some((10, 500_000_000)));
        assert_eq!(time("1970-01-01 02:01"), Some((60, 0)));
        assert_eq!(time("1970-01-02"), Some((22 * 3600, 0)));
        assert_eq!(time("1969-12-31T23:59:59.25Z"), Some((-1, 250_000_000)));
    }
}
