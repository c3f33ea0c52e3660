//! The names of the spool's files. Anything else in its directory is refused.

use crate::disk::LOCK_NAME;
use crate::ids::{Epoch, SegmentNo};

/// The spool's own file.
pub(crate) const MARK_NAME: &str = "spool.hsm";
/// The same before it is whole.
pub(crate) const NEW_MARK_NAME: &str = "spool.hsm.tmp";

/// What a name in the spool's directory says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Name {
    /// `NNNNNNNNNN.hsm.zst`: a sealed segment.
    Sealed(SegmentNo),
    /// `NNNNNNNNNN.open-EPOCH`: being written, or left by a crash.
    Open(SegmentNo, Epoch),
    /// `NNNNNNNNNN.tmp-EPOCH`: a recovered segment that is not finished.
    Temporary(SegmentNo, Epoch),
    /// `NNNNNNNNNN.void-EPOCH-COUNT`: never acknowledged, set aside by recovery.
    Void(SegmentNo, Epoch, u32),
    /// The spool's own file.
    Mark,
    /// The same, not finished; worth nothing.
    NewMark,
    /// The lock.
    Lock,
    /// `lost+found`, where the spool is a filesystem of its own.
    LostAndFound,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sealed(no) => f.write_str(&no.file_name()),
            Self::Open(no, epoch) => write!(f, "{:010}.open-{epoch}", no.get()),
            Self::Temporary(no, epoch) => write!(f, "{:010}.tmp-{epoch}", no.get()),
            Self::Void(no, epoch, count) => write!(f, "{:010}.void-{epoch}-{count}", no.get()),
            Self::Mark => f.write_str(MARK_NAME),
            Self::NewMark => f.write_str(NEW_MARK_NAME),
            Self::Lock => f.write_str(LOCK_NAME),
            Self::LostAndFound => f.write_str("lost+found"),
        }
    }
}

impl Name {
    /// `None` for a name that is not of the spool.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let parsed = match name {
            MARK_NAME => Self::Mark,
            NEW_MARK_NAME => Self::NewMark,
            LOCK_NAME => Self::Lock,
            "lost+found" => Self::LostAndFound,
            _ => Self::parse_segment(name)?,
        };
        // Exactly as this program writes it: no signs, no other number of digits.
        (parsed.to_string() == name).then_some(parsed)
    }

    fn parse_segment(name: &str) -> Option<Self> {
        if let Some(no) = SegmentNo::from_file_name(name) {
            return Some(Self::Sealed(no));
        }
        let (digits, rest) = name.split_once('.')?;
        let no = SegmentNo::new(digits.parse().ok()?)?;
        let (kind, rest) = rest.split_once('-')?;
        let epoch = |text: &str| u64::from_str_radix(text, 16).ok().map(Epoch);
        match kind {
            "open" => Some(Self::Open(no, epoch(rest)?)),
            "tmp" => Some(Self::Temporary(no, epoch(rest)?)),
            "void" => {
                let (of, count) = rest.split_once('-')?;
                Some(Self::Void(no, epoch(of)?, count.parse().ok()?))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_others_do_not() {
        let no = SegmentNo::new(12).unwrap();
        let epoch = Epoch(0xabc);
        for name in [
            Name::Sealed(no),
            Name::Open(no, epoch),
            Name::Temporary(no, epoch),
            Name::Void(no, epoch, 3),
            Name::Mark,
            Name::NewMark,
            Name::Lock,
            Name::LostAndFound,
        ] {
            assert_eq!(Name::parse(&name.to_string()), Some(name));
        }
        for name in [
            "",
            "x",
            "0000000000.open-0000000000000abc",
            "0000000012.open-abc",
            "0000000012.open-0000000000000ABC",
            "+000000012.open-0000000000000abc",
            "0000000012.void-0000000000000abc",
            "0000000012.void-0000000000000abc-+1",
            "0000000012.hsm.zst.bak",
        ] {
            assert_eq!(Name::parse(name), None, "{name}");
        }
    }
}
