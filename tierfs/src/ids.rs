//! The names of things in the log: newtypes with only the arithmetic that means something.
//!
//! None of these is ever reused: an LSN belongs to one commit, a file id to one file, a data id to
//! one piece of content, a segment number (within one log) to one sealed file.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

/// LSNs and segment numbers go up to here, so that every database can hold them.
const NUMBER_LAST: u64 = i64::MAX.unsigned_abs();

/// A number that is dense from 1 and below 2^63.
macro_rules! dense {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(NonZeroU64);

        impl $name {
            /// The first one of every log.
            pub const FIRST: Self = Self(NonZeroU64::MIN);

            /// `None` for 0 and beyond 2^63 - 1, which name nothing.
            pub fn new(value: u64) -> Option<Self> {
                NonZeroU64::new(value)
                    .filter(|value| value.get() <= NUMBER_LAST)
                    .map(Self)
            }

            /// The one that comes next.
            #[must_use]
            pub fn next(self) -> Self {
                Self::new(self.0.get() + 1).unwrap_or(self)
            }

            /// The one before, `None` before the first.
            pub fn prev(self) -> Option<Self> {
                Self::new(self.0.get() - 1)
            }

            /// The plain number.
            pub fn get(self) -> u64 {
                self.0.get()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

dense! {
    /// A transaction's number, given at its commit.
    Lsn
}

impl Lsn {
    /// What comes after `last` (the first LSN where nothing came yet).
    pub fn after(last: Option<Self>) -> Self {
        last.map_or(Self::FIRST, Self::next)
    }
}

/// A file's name in the log: given once, never used again. The root directory is [`FileId::ROOT`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FileId(NonZeroU64);

impl FileId {
    /// The root directory of the watched filesystem.
    pub const ROOT: Self = Self(NonZeroU64::MIN);

    /// `None` for 0, which names no file.
    pub fn new(value: u64) -> Option<Self> {
        NonZeroU64::new(value).map(Self)
    }

    /// The id given after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The plain number.
    pub fn get(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A writer's random number, new at each start of a writer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Epoch({self})")
    }
}

/// The name of a piece of file content in the log: (writer epoch, number within it).
///
/// Where it lies (segment, frame) is found through the segments' indexes, never through the name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DataId {
    /// The writer that named it.
    pub epoch: Epoch,
    /// Below [`DataId::NUMBER_MAX`], ascending within the epoch, not dense.
    pub number: u64,
}

impl DataId {
    /// Numbers stay below 2^40, so that the catalog can keep a data id in one integer.
    pub const NUMBER_MAX: u64 = 1 << 40;
}

impl fmt::Display for DataId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.number)
    }
}

dense! {
    /// A segment's number within a log.
    SegmentNo
}

impl SegmentNo {
    /// The name of the sealed file: ten digits (more where needed) and `.hsm.zst`.
    pub fn file_name(self) -> String {
        format!("{:010}.hsm.zst", self.0)
    }

    /// The number in a name made by [`Self::file_name`], `None` for any other name.
    pub fn from_file_name(name: &str) -> Option<Self> {
        let digits = name.strip_suffix(".hsm.zst")?;
        let no = Self::new(digits.parse().ok()?)?;
        (no.file_name() == name).then_some(no)
    }

    /// Where a volume keeps it: `segments/DDDDDD/NNNNNNNNNN.hsm.zst`, a thousand to a directory.
    pub fn object_name(self) -> String {
        format!("segments/{:06}/{}", self.get() / 1000, self.file_name())
    }

    /// The number in a name made by [`Self::object_name`], `None` for any other name.
    pub fn from_object_name(name: &str) -> Option<Self> {
        let no = Self::from_file_name(name.rsplit('/').next()?)?;
        (no.object_name() == name).then_some(no)
    }
}

/// The log's own name, random, given when the log begins. Printed as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogId(pub [u8; 16]);

impl fmt::Display for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for LogId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LogId({self})")
    }
}

/// Text that is not the 32 hex digits of a log id.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no log id: 32 hex digits are expected")]
pub struct BadLogId(String);

impl FromStr for LogId {
    type Err = BadLogId;

    fn from_str(text: &str) -> Result<Self, BadLogId> {
        let bad = || BadLogId(text.to_owned());
        let mut bytes = [0; 16];
        if text.len() != 32 || !text.is_ascii() {
            return Err(bad());
        }
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}

/// A BLAKE3 hash (32 bytes, unkeyed).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// The size of a hash in bytes.
    pub const LEN: usize = 32;

    /// The hash of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hash({self})")
    }
}

impl From<blake3::Hash> for Hash {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// A point in time: seconds since 1970-01-01T00:00:00Z (negative before) and nanoseconds below 10^9.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Time {
    /// Whole seconds, rounded towards the past.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

impl Time {
    /// The wall clock.
    pub fn now() -> Self {
        let now = std::time::SystemTime::now();
        match now.duration_since(std::time::UNIX_EPOCH) {
            Ok(since) => Self {
                seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
                nanos: since.subsec_nanos(),
            },
            Err(_) => Self::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_segments_come_back() {
        for number in [1, 999, 1000, 9_999_999_999, 10_000_000_000] {
            let no = SegmentNo::new(number).unwrap();
            assert_eq!(SegmentNo::from_file_name(&no.file_name()), Some(no));
            assert_eq!(SegmentNo::from_object_name(&no.object_name()), Some(no));
        }
        for name in [
            "1.hsm.zst",
            "0000000000.hsm.zst",
            "0000000001.zst",
            "+000000001.hsm.zst",
        ] {
            assert_eq!(SegmentNo::from_file_name(name), None, "{name}");
        }
    }

    #[test]
    fn log_ids_come_back() {
        let id = LogId([0xa5; 16]);
        assert_eq!(id.to_string().parse::<LogId>().unwrap(), id);
        assert!("zz".repeat(16).parse::<LogId>().is_err());
    }
}
