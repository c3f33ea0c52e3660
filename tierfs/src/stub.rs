//! The stub mark: what says on the disk itself that a file's data is released.
//!
//! A file with the extended attribute [`XATTR`] is a stub: some of its data, usually all, lies only in
//! the log. The mark is set before the first byte is given back and goes after the last one is back and
//! durable, and after it says so durably ([`Stage::There`]): who writes to the file then cannot find it
//! a stub again after a loss of power. So a file without it is whole. It is bound to the inode by its handle: a copy of the
//! attribute on another inode says nothing.
//!
//! It is never logged, and is small enough to lie in an ext4 inode of 256 bytes (68 bytes of value).
//! hsm(7) describes it for people.

use minicbor::Decoder;

use crate::cbor::{self, CborError, Enc, Field};
use crate::cbor_map;
use crate::ids::{FileId, LogId, Lsn, Time};
use crate::record::Bits;

/// The attribute's name.
pub const XATTR: &str = "trusted.hsm";

/// How far a stub's data is on its way out or in; a number in the mark, left out where it rests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// It is not on its way.
    #[default]
    Rests,
    /// It is: the file's own modification time is that of our last step, and the mark's counts.
    Moving,
    /// All of it is back, but not durable; the modification time is the file's own.
    Filled,
    /// All of it is back and durable. What differs from the log is news, and the mark only has to go.
    There,
}

impl Stage {
    const ALL: [Self; 4] = [Self::Rests, Self::Moving, Self::Filled, Self::There];

    /// Whether the file reads right, as long as the disk does not lose what is not durable.
    pub fn is_filled(self) -> bool {
        matches!(self, Self::Filled | Self::There)
    }
}

impl Field for Stage {
    fn present(&self) -> bool {
        *self != Self::Rests
    }
    fn put(&self, enc: &mut Enc<'_>) {
        let number = Self::ALL.iter().position(|stage| stage == self);
        (number.unwrap_or_default() as u64).put(enc);
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        let number = usize::try_from(u64::get(dec)?).unwrap_or(usize::MAX);
        Self::ALL.get(number).copied().ok_or(CborError::Range {
            what: "a stub's stage",
        })
    }
    fn absent() -> Option<Self> {
        Some(Self::Rests)
    }
}

cbor_map! {
    /// What the attribute holds.
    StubMark {
        /// The log that has the data.
        0 => log_id: LogId,
        /// Which file of it.
        2 => file: FileId,
        /// The transaction that committed the version.
        4 => version: Lsn,
        /// Its size, bytes. A stub that is smaller was cut since, and has nothing of the log's beyond that.
        6 => size: u64,
        /// The modification time that the file is to have.
        8 => mtime: Time,
        /// The inode that it belongs to: handle type (i32 little endian) and bytes of
        /// `name_to_handle_at(2)`.
        10 => handle: Vec<u8>,
        /// How far its data is on its way.
        12 => stage: Stage,
        /// Flags (`FS_IMMUTABLE_FL`, `FS_APPEND_FL`) that are off while its data comes back, and are the
        /// file's all the same.
        14 => seals: Bits,
        /// The file's `security.capability`, which every write and punch takes away, until it is back.
        16 => capability: Option<Vec<u8>>,
    }
}

cbor_map! {
    /// What the attribute of the same name holds on a filesystem's root directory: which list of stubs
    /// ([`crate::residency`]) belongs to the disk as it is. A disk that was set back to an earlier
    /// state has stubs that have left the list since, and another generation.
    DiskMark {
        /// A random number that changes whenever files leave the list.
        0 => generation: [u8; 16],
    }
}

impl DiskMark {
    /// The attribute's value.
    pub fn to_bytes(&self) -> Vec<u8> {
        cbor::to_bytes(self)
    }

    /// Reads the attribute's value.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CborError> {
        cbor::whole(bytes, "a disk's mark")
    }
}

impl StubMark {
    /// The attribute's value.
    pub fn to_bytes(&self) -> Vec<u8> {
        cbor::to_bytes(self)
    }

    /// Reads the attribute's value.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, CborError> {
        cbor::whole(bytes, "a stub mark")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mark(size: u64) -> Option<StubMark> {
        Some(StubMark {
            log_id: LogId([0xa5; 16]),
            file: FileId::new(16_000_000)?,
            version: Lsn::new(4_000_000_000)?,
            size,
            mtime: Time {
                seconds: 1_795_000_000,
                nanos: 999_999_999,
            },
            handle: vec![1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8],
            stage: Stage::Moving,
            seals: Bits(0),
            capability: None,
        })
    }

    #[test]
    fn a_mark_fits_an_inode_of_ext4() {
        // 256 bytes less 160 of the inode: 4 of header, 20 of entry and name, 4 that end the list.
        let bytes = mark(4_000_000_000).map(|mark| mark.to_bytes());
        assert!(bytes.is_some_and(|bytes| bytes.len() <= 68));
    }

    proptest! {
        #[test]
        fn a_mark_comes_back(size: u64, stage in proptest::sample::select(&Stage::ALL)) {
            let mark = mark(size).map(|mark| StubMark { stage, ..mark });
            let again = mark.as_ref().map(|mark| StubMark::from_bytes(&mark.to_bytes()).ok());
            prop_assert_eq!(again, Some(mark));
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            if let Ok(mark) = StubMark::from_bytes(&bytes) {
                prop_assert!(mark.to_bytes().len() <= bytes.len());
            }
        }
    }
}
