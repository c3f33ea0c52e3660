//! Checked names: of objects on a volume, and serial numbers of volumes.
//!
//! Object names are a small alphabet on purpose: they must be the same file name on every
//! filesystem, tape, disc and object store, in thirty years too.

use std::fmt;
use std::str::FromStr;

use crate::Error;

/// Longest component of an object name, in bytes.
pub const COMPONENT_BYTES_MAX: usize = 200;
/// Most components of an object name.
pub const DEPTH_MAX: usize = 3;
/// Ends the names of inventory entries, so no object name may end so.
pub(crate) const ENTRY_SUFFIX: &str = ".b3";
/// Top-level directory of a volume's own manuals, so no object name may begin so.
pub(crate) const MANUAL_DIRECTORY: &str = "manual";
const SERIAL_BYTES: usize = 8;

/// Name of an object: one to three components of `[a-z0-9._-]`, separated by `/`, none of them
/// longer than 200 bytes or beginning with `.`. Components ending in `.b3` and the top-level
/// component `manual` are reserved for the volume itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(String);

impl ObjectName {
    pub fn new(name: &str) -> Result<Self, Error> {
        match Self::fault(name) {
            None => Ok(Self(name.to_owned())),
            Some(why) => Err(Error::BadName {
                name: printable(name),
                why,
            }),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The directories above the object, outermost first.
    pub(crate) fn parents(&self) -> Vec<&str> {
        let mut parts: Vec<&str> = self.0.split('/').collect();
        parts.pop();
        parts
    }

    /// The last component.
    pub(crate) fn file_name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }

    fn fault(name: &str) -> Option<&'static str> {
        if name.split('/').count() > DEPTH_MAX {
            return Some("it has more than 3 components");
        }
        if name.split('/').next() == Some(MANUAL_DIRECTORY) {
            return Some("`manual` holds the volume's own manuals");
        }
        name.split('/').find_map(component_fault)
    }
}

fn component_fault(part: &str) -> Option<&'static str> {
    let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
    if part.is_empty() {
        Some("a component is empty")
    } else if part.len() > COMPONENT_BYTES_MAX {
        Some("a component is longer than 200 bytes")
    } else if part.starts_with('.') {
        Some("a component begins with a dot")
    } else if part.ends_with(ENTRY_SUFFIX) {
        Some("names ending in .b3 are inventory entries")
    } else if !part.bytes().all(allowed) {
        Some("only a-z, 0-9, '.', '_' and '-' are allowed")
    } else {
        None
    }
}

/// A bounded, printable form of a name that came from outside.
pub(crate) fn printable(name: &str) -> String {
    let mut text: String = name
        .chars()
        .take(240)
        .flat_map(char::escape_debug)
        .collect();
    if name.chars().nth(240).is_some() {
        text.push_str("...");
    }
    text
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for ObjectName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::new(name)
    }
}

/// Serial number of a volume: 16 lower-case hexadecimal digits, random when it is labelled.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial(String);

impl Serial {
    /// A new serial number from the kernel's random source.
    pub fn random() -> Result<Self, Error> {
        let mut raw = [0u8; SERIAL_BYTES];
        getrandom::fill(&mut raw).map_err(|source| Error::Random {
            why: source.to_string(),
        })?;
        Ok(Self::from_bytes(raw))
    }

    /// The serial number of the given 8 bytes, for callers with a random source of their own.
    pub fn from_bytes(raw: [u8; SERIAL_BYTES]) -> Self {
        Self(crate::entry::hex(&raw))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Serial {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match crate::entry::unhex::<SERIAL_BYTES>(text) {
            Some(raw) => Ok(Self::from_bytes(raw)),
            None => Err(Error::BadSerial {
                text: printable(text),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_are_allowed() {
        for name in [
            "a",
            "segments/000000/0000000001.hsm.zst",
            "x-y_z.1",
            "manual.txt",
            "a/manual/b",
            &"a".repeat(200),
        ] {
            assert_eq!(ObjectName::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn names_that_are_refused_say_why() {
        for (name, why) in [
            ("", "empty"),
            ("a//b", "empty"),
            ("/a", "empty"),
            ("a/", "empty"),
            ("a/b/c/d", "more than 3"),
            ("..", "dot"),
            ("a/../b", "dot"),
            (".tmp-1", "dot"),
            ("VOLUME.json", "only a-z"),
            ("a\0b", "only a-z"),
            ("a b", "only a-z"),
            ("\u{e9}", "only a-z"),
            ("a.b3", "inventory"),
            ("a.b3/b", "inventory"),
            ("manual/x", "manuals"),
            (&"a".repeat(201), "longer than 200"),
        ] {
            let error = ObjectName::new(name).unwrap_err().to_string();
            assert!(error.contains(why), "{name:?}: {error}");
        }
    }

    #[test]
    fn parts_of_a_name() {
        let name = ObjectName::new("segments/000000/1.zst").unwrap();
        assert_eq!(name.parents(), ["segments", "000000"]);
        assert_eq!(name.file_name(), "1.zst");
        assert!(ObjectName::new("top").unwrap().parents().is_empty());
    }

    #[test]
    fn serials_are_random_and_round_trip() {
        let a = Serial::random().unwrap();
        assert_ne!(a, Serial::random().unwrap());
        assert_eq!(a.to_string().parse::<Serial>().unwrap(), a);
        for bad in [
            "",
            "0123",
            "0123456789ABCDEF",
            "0123456789abcdeg",
            "0123456789abcdef0",
        ] {
            assert!(bad.parse::<Serial>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_name_panics_or_escapes(name in ".{0,300}") {
            if let Ok(name) = ObjectName::new(&name) {
                let parts: Vec<_> = name.as_str().split('/').collect();
                prop_assert!(parts.len() <= DEPTH_MAX);
                prop_assert!(parts.iter().all(|p| !p.is_empty() && !p.starts_with('.')));
            }
        }
    }
}
