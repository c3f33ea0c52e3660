//! The label of a volume and its JSON form, `VOLUME.json`.
//!
//! Decoding trusts nothing: the size is bounded by the reader, a newer format is told apart from
//! damage, unknown keys are refused, and every value is checked.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::entry::{hex, unhex};
use crate::{Error, Serial};

/// The newest format of volumes that this program writes and reads.
pub const FORMAT: u32 = 1;
/// Longest label that is read, in bytes.
pub(crate) const LABEL_BYTES_MAX: usize = 64 * 1024;
const POOL_BYTES_MAX: usize = 200;
const BARCODE_BYTES_MAX: usize = 64;
const CREATED_BYTES_MAX: usize = 64;

/// What a volume says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Version of the volume's layout.
    pub format: u32,
    /// The log whose objects the volume holds.
    pub log_id: [u8; 16],
    pub pool: String,
    pub serial: Serial,
    /// What is printed on the outside, where there is such a thing.
    pub barcode: Option<String>,
    /// When it was labelled, RFC 3339.
    pub created: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    format: u32,
    log_id: String,
    pool: String,
    serial: String,
    barcode: Option<String>,
    created: String,
}

/// Read first, so that a label of a newer format is not called damaged.
#[derive(Deserialize)]
struct Version {
    format: u64,
}

impl Label {
    /// The text of `VOLUME.json`, which decodes to an equal label. `path` is for the message.
    pub(crate) fn encode(&self, path: &Path) -> Result<String, Error> {
        let stored = Stored {
            format: self.format,
            log_id: hex(&self.log_id),
            pool: self.pool.clone(),
            serial: self.serial.to_string(),
            barcode: self.barcode.clone(),
            created: self.created.clone(),
        };
        let mut text = serde_json::to_string_pretty(&stored).map_err(|e| bad(path, &e))?;
        text.push('\n');
        if Self::decode(path, text.as_bytes())? != *self {
            return Err(bad(path, &"it does not read back as it was given"));
        }
        Ok(text)
    }

    /// The label in the bytes of the file `path`.
    pub(crate) fn decode(path: &Path, text: &[u8]) -> Result<Self, Error> {
        if text.len() > LABEL_BYTES_MAX {
            return Err(bad(path, &"it is longer than 64 KiB"));
        }
        let version: Version = serde_json::from_slice(text).map_err(|e| bad(path, &e))?;
        if version.format > u64::from(FORMAT) {
            return Err(Error::NewerFormat {
                path: path.to_owned(),
                found: version.format,
                known: FORMAT,
            });
        }
        let stored: Stored = serde_json::from_slice(text).map_err(|e| bad(path, &e))?;
        stored.check().map_err(|why| bad(path, &why))
    }
}

impl Stored {
    fn check(self) -> Result<Label, &'static str> {
        if self.format != FORMAT {
            return Err("there is no such format");
        }
        check_text(&self.pool, POOL_BYTES_MAX)
            .ok_or("the pool's name is empty, too long or not printable")?;
        if let Some(barcode) = &self.barcode {
            check_text(barcode, BARCODE_BYTES_MAX)
                .ok_or("the barcode is empty, too long or not printable")?;
        }
        check_text(&self.created, CREATED_BYTES_MAX)
            .filter(|text| is_time(text))
            .ok_or("the time of creation is not RFC 3339")?;
        Ok(Label {
            format: self.format,
            log_id: unhex(&self.log_id)
                .ok_or("the log id has not 32 lower-case hexadecimal digits")?,
            serial: self
                .serial
                .parse()
                .map_err(|_| "the serial has not 16 lower-case hexadecimal digits")?,
            pool: self.pool,
            barcode: self.barcode,
            created: self.created,
        })
    }
}

fn check_text(text: &str, bytes_max: usize) -> Option<&str> {
    let fine = !text.is_empty() && text.len() <= bytes_max && !text.chars().any(char::is_control);
    fine.then_some(text)
}

/// The shape `YYYY-MM-DDTHH:MM:SS...` with a zone; the calendar is not checked.
fn is_time(text: &str) -> bool {
    const SHAPE: &[u8; 19] = b"0000-00-00T00:00:00";
    let text = text.as_bytes();
    let same = |(have, want): (&u8, &u8)| match want {
        b'0' => have.is_ascii_digit(),
        other => have == other,
    };
    text.len() > SHAPE.len()
        && text.iter().zip(SHAPE).all(same)
        && (text.ends_with(b"Z") || text[SHAPE.len()..].iter().any(|b| matches!(b, b'+' | b'-')))
}

fn bad(path: &Path, why: &impl ToString) -> Error {
    Error::BadLabel {
        path: path.to_owned(),
        why: why.to_string(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Label {
        Label {
            format: FORMAT,
            log_id: *b"0123456789abcdef",
            pool: "disk".into(),
            serial: Serial::from_bytes([0, 1, 2, 3, 0xfc, 0xfd, 0xfe, 0xff]),
            barcode: Some("HSM001L9".into()),
            created: "2026-01-02T03:04:05Z".into(),
        }
    }

    const SAMPLE: &str = r#"{
  "format": 1,
  "log_id": "30313233343536373839616263646566",
  "pool": "disk",
  "serial": "00010203fcfdfeff",
  "barcode": "HSM001L9",
  "created": "2026-01-02T03:04:05Z"
}
"#;

    fn decode(text: &str) -> Result<Label, Error> {
        Label::decode(Path::new("/v/VOLUME.json"), text.as_bytes())
    }

    #[test]
    fn the_text_of_format_1_does_not_change() {
        assert_eq!(sample().encode(Path::new("v")).unwrap(), SAMPLE);
        assert_eq!(decode(SAMPLE).unwrap(), sample());
        let bare = Label {
            barcode: None,
            ..sample()
        };
        assert_eq!(decode(&bare.encode(Path::new("v")).unwrap()).unwrap(), bare);
    }

    #[test]
    fn a_newer_format_is_named_whatever_else_it_has() {
        for text in ["{\"format\":2}", "{\"format\":4294967296,\"x\":[1]}"] {
            let error = decode(text).unwrap_err();
            assert!(
                matches!(error, Error::NewerFormat { known: 1, .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn damaged_labels_are_refused() {
        for (from, to) in [
            ("\"format\": 1", "\"format\": 0"),
            ("\"format\": 1,", ""),
            ("3031", "303"),
            ("3031", "30ZZ"),
            ("0001020", "000102"),
            ("disk", ""),
            ("disk", "a\\nb"),
            ("HSM001L9", ""),
            ("2026-01", "2026_01"),
            ("05Z", "05"),
            ("\"pool\"", "\"pond\""),
            ("}", ""),
            ("}", "} x"),
        ] {
            let text = SAMPLE.replace(from, to);
            assert_ne!(text, SAMPLE);
            let error = decode(&text).unwrap_err();
            assert!(matches!(error, Error::BadLabel { .. }), "{to}: {error}");
            assert!(error.to_string().contains("/v/VOLUME.json"));
        }
        assert!(decode(&format!("{SAMPLE}{}", " ".repeat(LABEL_BYTES_MAX))).is_err());
        for at in 0..SAMPLE.len() - 2 {
            assert!(decode(&SAMPLE[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_label_that_would_not_read_back_is_not_written() {
        let label = Label {
            pool: String::new(),
            ..sample()
        };
        assert!(label.encode(Path::new("v")).is_err());
    }

    #[test]
    fn times_with_fractions_and_zones() {
        assert!(is_time("2026-01-02T03:04:05.123456789Z"));
        assert!(is_time("2026-01-02T03:04:05+01:00"));
        assert!(!is_time("2026-01-02 03:04:05Z"));
    }
}
