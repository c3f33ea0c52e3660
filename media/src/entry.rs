//! The line that stands beside each object: exactly what `b3sum NAME` prints, `HEX  NAME\n`.
//!
//! Checking a volume needs no program of ours: `b3sum -c *.b3` in the object's directory does it.

use crate::name::COMPONENT_BYTES_MAX;

const HASH_HEX: usize = 64;
/// More than any line that we write can have.
pub(crate) const LINE_BYTES_MAX: usize = HASH_HEX + 2 + COMPONENT_BYTES_MAX + 1;

/// Lower-case hexadecimal digits of `raw`.
pub(crate) fn hex(raw: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    raw.iter()
        .flat_map(|b| [b >> 4, b & 15])
        .map(|digit| char::from(DIGITS[usize::from(digit)]))
        .collect()
}

/// The bytes of exactly `2 * N` lower-case hexadecimal digits.
pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let mut raw = [0u8; N];
    for (to, pair) in raw.iter_mut().zip(text.chunks_exact(2)) {
        *to = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(raw)
}

/// The line for a file of this name and hash.
pub(crate) fn encode(file_name: &str, hash: &[u8; 32]) -> String {
    format!("{}  {file_name}\n", hex(hash))
}

/// The hash in a line for this file; else what is wrong with the line.
pub(crate) fn decode(file_name: &str, line: &[u8]) -> Result<[u8; 32], &'static str> {
    let line = std::str::from_utf8(line).map_err(|_| "bytes that are no text")?;
    let (digits, rest) = line
        .split_at_checked(HASH_HEX)
        .ok_or("a line that is too short")?;
    let hash = unhex(digits).ok_or("no 64 lower-case hexadecimal digits")?;
    match rest.strip_prefix("  ").and_then(|r| r.strip_suffix('\n')) {
        Some(name) if name == file_name => Ok(hash),
        Some(_) => Err("the name of another file"),
        None => Err("a line that does not end where it should"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_line_is_what_b3sum_prints() {
        let hash = *blake3::hash(b"").as_bytes();
        let line = encode("empty", &hash);
        assert_eq!(
            line,
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262  empty\n"
        );
        assert_eq!(decode("empty", line.as_bytes()), Ok(hash));
    }

    #[test]
    fn every_flip_truncation_and_addition_is_seen() {
        let line = encode("0000000001.hsm.zst", &[0xa5; 32]).into_bytes();
        for at in 0..line.len() {
            assert!(decode("0000000001.hsm.zst", &line[..at]).is_err());
            for bit in 0..8 {
                let mut bad = line.clone();
                bad[at] ^= 1 << bit;
                // A flip within the digits may give another hash, which is compared with the object.
                if let Ok(hash) = decode("0000000001.hsm.zst", &bad) {
                    assert!(at < 64 && hash != [0xa5; 32]);
                }
            }
        }
        assert!(decode("0000000001.hsm.zst", &[&line[..], b"\n"].concat()).is_err());
        assert!(decode("0000000001.hsm.zst", &line.repeat(2)).is_err());
    }

    proptest! {
        #[test]
        fn lines_round_trip(hash: [u8; 32], name in "[a-z0-9][a-z0-9._-]{0,199}") {
            let line = encode(&name, &hash);
            prop_assert!(line.len() <= LINE_BYTES_MAX);
            prop_assert_eq!(decode(&name, line.as_bytes()), Ok(hash));
        }

        #[test]
        fn no_bytes_panic(line in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode("a", &line);
        }
    }
}
