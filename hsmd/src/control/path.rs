//! Paths in JSON. A path is bytes and JSON has only text: what is not UTF-8 goes along in base64.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::base64;

/// A path: text for people and, where that does not say it exactly, the bytes.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PathText {
    /// The path, with U+FFFD for what is not UTF-8.
    pub path: String,
    /// Its bytes in base64; only there where `path` is not exact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_base64: Option<String>,
}

impl PathText {
    /// Of the bytes of a path.
    pub fn of(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self {
                path: text.to_owned(),
                path_base64: None,
            },
            Err(_) => Self {
                path: String::from_utf8_lossy(bytes).into_owned(),
                path_base64: Some(base64::encode(bytes)),
            },
        }
    }

    /// Of a path.
    pub fn of_path(path: &Path) -> Self {
        Self::of(path.as_os_str().as_bytes())
    }

    /// The exact path, `None` where `path_base64` is no base64.
    pub fn exact(&self) -> Option<PathBuf> {
        let bytes = match &self.path_base64 {
            Some(text) => base64::decode(text)?,
            None => self.path.clone().into_bytes(),
        };
        Some(PathBuf::from(OsString::from_vec(bytes)))
    }
}

/// A path of the log, as it is seen below the mount point.
pub fn below(mount: &Path, path: &[u8]) -> PathText {
    let mut bytes = mount.as_os_str().as_bytes().to_vec();
    if !bytes.ends_with(b"/") && !path.is_empty() {
        bytes.push(b'/');
    }
    bytes.extend_from_slice(path);
    PathText::of(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_comes_back() {
        for bytes in [
            &b"/data/a\nb"[..],
            b"/data/\xff\xfe",
            "/data/\u{fffd}".as_bytes(),
        ] {
            let text = PathText::of(bytes);
            assert_eq!(
                text.path_base64.is_some(),
                std::str::from_utf8(bytes).is_err()
            );
            let json = serde_json::to_string(&text).unwrap();
            let back: PathText = serde_json::from_str(&json).unwrap();
            assert_eq!(back.exact().unwrap().as_os_str().as_bytes(), bytes);
        }
        let bad = PathText {
            path: "x".to_owned(),
            path_base64: Some("!".to_owned()),
        };
        assert_eq!(bad.exact(), None);
    }
}
