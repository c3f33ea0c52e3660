//! The rules that every record and header follows, in one place.
//!
//! A record's body is a CBOR map with small unsigned keys in ascending order, encoded as RFC 8949,
//! section 4.2 asks (shortest integers, definite lengths). Even keys are critical: a reader that
//! does not know one refuses the record. Odd keys may be ignored by an older reader. A field at its
//! default (absent option, `false`, zero flags) is left out.
//!
//! Decoding never panics, and never allocates by a length that it reads: memory grows with the input,
//! by a small factor.

use minicbor::{Decoder, Encoder};

use crate::ids::{DataId, Epoch, FileId, Hash, LogId, Lsn, SegmentNo, Time};

/// An encoder that writes to memory, where writing cannot fail.
pub type Enc<'a> = Encoder<&'a mut Vec<u8>>;

/// Why bytes are no record of ours.
#[derive(Debug, thiserror::Error)]
pub enum CborError {
    /// Not CBOR, cut off, or another type than the format asks for.
    #[error("the bytes are not the CBOR that the format asks for: {0}")]
    Malformed(#[from] minicbor::decode::Error),
    /// A value outside the range that the format allows.
    #[error("{what} is out of range")]
    Range {
        /// The field's name in the format.
        what: &'static str,
    },
    /// Map keys that repeat or do not ascend, or an indefinite length.
    #[error("{what} is not encoded deterministically")]
    NotDeterministic {
        /// The record's name in the format.
        what: &'static str,
    },
    /// A critical key or kind of a later version of the format.
    #[error(
        "{what} has the critical key {key}, which this version does not know: read it with a newer version"
    )]
    Critical {
        /// The record's name in the format.
        what: &'static str,
        /// The unknown even key or kind.
        key: u64,
    },
    /// A field without which the record means nothing.
    #[error("{what} lacks its field {field}")]
    Missing {
        /// The record's name in the format.
        what: &'static str,
        /// The field's name in the format.
        field: &'static str,
    },
    /// Bytes after the end of the item.
    #[error("{what} is followed by {bytes} bytes that do not belong to it")]
    Trailing {
        /// The record's name in the format.
        what: &'static str,
        /// How many.
        bytes: usize,
    },
}

/// Writing to a `Vec` cannot fail; this turns minicbor's error type into nothing.
pub(crate) fn infallible<T, E: std::fmt::Debug>(result: Result<T, E>) {
    assert!(
        result.is_ok(),
        "encoding CBOR into memory cannot fail: {:?}",
        result.err()
    );
}

/// A value of a map: how it is written, read, and left out.
pub trait Field: Sized {
    /// False where the value is the default that is left out.
    fn present(&self) -> bool {
        true
    }
    /// Appends the value.
    fn put(&self, enc: &mut Enc<'_>);
    /// Reads the value.
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError>;
    /// What a left-out field means; `None` where it must not be left out.
    fn absent() -> Option<Self> {
        None
    }
}

/// The length of a definite array.
pub fn array_len(dec: &mut Decoder<'_>, what: &'static str) -> Result<u64, CborError> {
    dec.array()?.ok_or(CborError::NotDeterministic { what })
}

/// Reads the head of an array of exactly `len` items.
pub fn array_of(dec: &mut Decoder<'_>, len: u64, what: &'static str) -> Result<(), CborError> {
    if array_len(dec, what)? == len {
        Ok(())
    } else {
        Err(CborError::Range { what })
    }
}

/// Whether a map's keys are declared in the order in which they must be encoded.
pub const fn ascending(keys: &[u64]) -> bool {
    let mut at = 1;
    while at < keys.len() {
        if keys[at - 1] >= keys[at] {
            return false;
        }
        at += 1;
    }
    true
}

/// Defines a struct that is a CBOR map, with its encoder and decoder. Keys are declared ascending.
#[macro_export]
macro_rules! cbor_map {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $key:literal => $field:ident : $ty:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name { $($(#[$doc])* pub $field: $ty,)* }

        const _: () = assert!($crate::cbor::ascending(&[$($key),*]));

        impl $crate::cbor::Field for $name {
            fn put(&self, enc: &mut $crate::cbor::Enc<'_>) {
                let entries = 0u64 $(+ u64::from($crate::cbor::Field::present(&self.$field)))*;
                $crate::cbor::infallible(enc.map(entries));
                $(if $crate::cbor::Field::present(&self.$field) {
                    $crate::cbor::infallible(enc.u64($key));
                    $crate::cbor::Field::put(&self.$field, enc);
                })*
            }

            fn get(dec: &mut minicbor::Decoder<'_>) -> Result<Self, $crate::cbor::CborError> {
                use $crate::cbor::{CborError, Field};
                const WHAT: &str = stringify!($name);
                $(let mut $field: Option<$ty> = None;)*
                let entries = dec.map()?.ok_or(CborError::NotDeterministic { what: WHAT })?;
                let mut last: Option<u64> = None;
                for _ in 0..entries {
                    let key = dec.u64()?;
                    if last.is_some_and(|last| key <= last) {
                        return Err(CborError::NotDeterministic { what: WHAT });
                    }
                    last = Some(key);
                    match key {
                        $($key => $field = Some(<$ty as Field>::get(dec)?),)*
                        key if key % 2 == 0 => return Err(CborError::Critical { what: WHAT, key }),
                        _ => dec.skip()?,
                    }
                }
                Ok(Self { $($field: match $field.or_else(<$ty as Field>::absent) {
                    Some(value) => value,
                    None => return Err(CborError::Missing { what: WHAT, field: stringify!($field) }),
                },)* })
            }
        }
    };
}

impl Field for u64 {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.u64(*self));
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        Ok(dec.u64()?)
    }
}

impl Field for u32 {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.u32(*self));
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        Ok(dec.u32()?)
    }
}

impl Field for bool {
    fn present(&self) -> bool {
        *self
    }
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.bool(*self));
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        Ok(dec.bool()?)
    }
    fn absent() -> Option<Self> {
        Some(false)
    }
}

impl Field for String {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.str(self));
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        Ok(dec.str()?.to_owned())
    }
}

/// A byte string.
impl Field for Vec<u8> {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.bytes(self));
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        Ok(dec.bytes()?.to_vec())
    }
}

impl<T: Field> Field for Option<T> {
    fn present(&self) -> bool {
        self.is_some()
    }
    fn put(&self, enc: &mut Enc<'_>) {
        if let Some(value) = self {
            value.put(enc);
        }
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        T::get(dec).map(Some)
    }
    fn absent() -> Option<Self> {
        Some(None)
    }
}

impl<const N: usize> Field for [u8; N] {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.bytes(self));
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        let bytes = dec.bytes()?;
        bytes.try_into().map_err(|_| CborError::Range {
            what: "a byte string of fixed length",
        })
    }
}

impl Field for Hash {
    fn put(&self, enc: &mut Enc<'_>) {
        self.0.put(enc);
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        Field::get(dec).map(Self)
    }
}

impl Field for LogId {
    fn put(&self, enc: &mut Enc<'_>) {
        self.0.put(enc);
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        Field::get(dec).map(Self)
    }
}

macro_rules! numbered {
    ($ty:ty, $what:literal) => {
        impl Field for $ty {
            fn put(&self, enc: &mut Enc<'_>) {
                infallible(enc.u64(self.get()));
            }
            fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
                Self::new(dec.u64()?).ok_or(CborError::Range { what: $what })
            }
        }
    };
}

numbered!(Lsn, "an LSN");
numbered!(FileId, "a file id");
numbered!(SegmentNo, "a segment number");

impl Field for Epoch {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(enc.u64(self.0));
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        Ok(Self(dec.u64()?))
    }
}

/// `[epoch, number]`.
impl Field for DataId {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(
            enc.array(2)
                .and_then(|enc| enc.u64(self.epoch.0)?.u64(self.number)),
        );
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        array_of(dec, 2, "a data id")?;
        let id = Self {
            epoch: Epoch(dec.u64()?),
            number: dec.u64()?,
        };
        if id.number < Self::NUMBER_MAX {
            Ok(id)
        } else {
            Err(CborError::Range { what: "a data id" })
        }
    }
}

/// `[seconds, nanoseconds]`.
impl Field for Time {
    fn put(&self, enc: &mut Enc<'_>) {
        infallible(
            enc.array(2)
                .and_then(|enc| enc.i64(self.seconds)?.u32(self.nanos)),
        );
    }
    fn get(dec: &mut Decoder<'_>) -> Result<Self, CborError> {
        array_of(dec, 2, "a time")?;
        let time = Self {
            seconds: dec.i64()?,
            nanos: dec.u32()?,
        };
        if time.nanos < 1_000_000_000 {
            Ok(time)
        } else {
            Err(CborError::Range { what: "a time" })
        }
    }
}

/// `[kind, body]`: appends one record.
pub fn put_record<T: Field>(kind: u64, body: &T, out: &mut Vec<u8>) {
    let mut enc = Encoder::new(out);
    infallible(enc.array(2).and_then(|enc| enc.u64(kind)));
    body.put(&mut enc);
}

/// Reads the one value that `bytes` consist of.
pub fn whole<T: Field>(bytes: &[u8], what: &'static str) -> Result<T, CborError> {
    let mut dec = Decoder::new(bytes);
    let value = T::get(&mut dec)?;
    match bytes.len() - dec.position() {
        0 => Ok(value),
        bytes => Err(CborError::Trailing { what, bytes }),
    }
}

/// The bytes of one value.
pub fn to_bytes<T: Field>(value: &T) -> Vec<u8> {
    let mut out = Vec::new();
    value.put(&mut Encoder::new(&mut out));
    out
}
