//! How the log's numbers are kept in SQLite's: checked on the way in and on the way out.
//!
//! SQLite's integers are signed. Offsets, sizes and ids fit, or are refused ([`Int`]); numbers of
//! which every bit counts (inode numbers, epochs) keep their bits ([`Bits64`]).

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};

use crate::ids::{FileId, Hash, Lsn, SegmentNo, Time};
use crate::record::{Device, Kind};

/// A number below 2^63.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Int(pub u64);

impl ToSql for Int {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        i64::try_from(self.0)
            .map(ToSqlOutput::from)
            .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
    }
}

impl FromSql for Int {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let value = value.as_i64()?;
        u64::try_from(value)
            .map(Self)
            .map_err(|_| FromSqlError::OutOfRange(value))
    }
}

/// A number of 64 bits, kept as the signed number with the same bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Bits64(pub u64);

impl ToSql for Bits64 {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(i64::from_le_bytes(self.0.to_le_bytes()).into())
    }
}

impl FromSql for Bits64 {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        Ok(Self(u64::from_le_bytes(value.as_i64()?.to_le_bytes())))
    }
}

macro_rules! numbered {
    ($($name:ty),*) => {$(
        impl ToSql for $name {
            fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
                i64::try_from(self.get())
                    .map(ToSqlOutput::from)
                    .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
            }
        }

        impl FromSql for $name {
            fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
                let Int(number) = Int::column_result(value)?;
                Self::new(number).ok_or(FromSqlError::OutOfRange(0))
            }
        }
    )*};
}

numbered!(Lsn, FileId, SegmentNo);

impl ToSql for Hash {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(ValueRef::Blob(&self.0)))
    }
}

impl FromSql for Hash {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        <[u8; Self::LEN]>::column_result(value).map(Self)
    }
}

impl ToSql for Kind {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        i64::try_from(self.number())
            .map(ToSqlOutput::from)
            .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
    }
}

impl FromSql for Kind {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let number = value.as_i64()?;
        u64::try_from(number)
            .ok()
            .and_then(Self::from_number)
            .ok_or(FromSqlError::OutOfRange(number))
    }
}

/// A device number in one integer.
pub(super) fn device_bits(device: Device) -> Bits64 {
    Bits64(u64::from(device.major) << 32 | u64::from(device.minor))
}

/// The device number in one integer.
pub(super) fn device_of(Bits64(bits): Bits64) -> Device {
    let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or_default();
    Device {
        major: half(bits >> 32),
        minor: half(bits),
    }
}

/// The time in two neighbouring columns, `None` where they are NULL.
pub(super) fn time_at(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Option<Time>> {
    let seconds: Option<i64> = row.get(column)?;
    let nanos: Option<u32> = row.get(column + 1)?;
    Ok(seconds
        .zip(nanos)
        .map(|(seconds, nanos)| Time { seconds, nanos }))
}

/// The time in two neighbouring columns that are not NULL.
pub(super) fn time(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Time> {
    Ok(Time {
        seconds: row.get(column)?,
        nanos: row.get(column + 1)?,
    })
}

/// A number below 2^63.
pub(super) fn int(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<u64> {
    row.get(column).map(|Int(number)| number)
}
