//! Base64 (RFC 4648, section 4), for bytes within JSON: file content, and names that are not UTF-8.

const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
const PAD: u8 = b'=';
/// Of each byte as a letter, or this.
const NONE: u8 = 0xff;
const VALUES: [u8; 256] = values();

const fn values() -> [u8; 256] {
    let mut values = [NONE; 256];
    let mut value = 0;
    while value < LETTERS.len() {
        values[LETTERS[value] as usize] = value.to_le_bytes()[0];
        value += 1;
    }
    values
}

fn letter(bits: u32) -> char {
    let index = usize::try_from(bits & 0x3f).unwrap_or(0);
    char::from(LETTERS[index])
}

/// The text of `bytes`, padded.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |at: usize| u32::from(group.get(at).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        text.push(letter(bits >> 18));
        text.push(letter(bits >> 12));
        text.push(if group.len() > 1 {
            letter(bits >> 6)
        } else {
            '='
        });
        text.push(if group.len() > 2 { letter(bits) } else { '=' });
    }
    text
}

/// The bytes of a padded text; `None` for any other text.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let text = text.as_bytes();
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for (at, group) in text.chunks_exact(4).enumerate() {
        let pads = group.iter().rev().take_while(|&&c| c == PAD).count();
        let last = (at + 1) * 4 == text.len();
        if pads > 2 || (pads > 0 && !last) {
            return None;
        }
        let mut bits = 0;
        for &c in &group[..4 - pads] {
            let value = VALUES[usize::from(c)];
            if value == NONE {
                return None;
            }
            bits = bits << 6 | u32::from(value);
        }
        bits <<= 6 * pads;
        let [_, a, b, c] = bits.to_be_bytes();
        let whole = [a, b, c];
        // Bits that belong to no byte are zero, so that each content has one text.
        if whole[3 - pads..].iter().any(|&rest| rest != 0) {
            return None;
        }
        bytes.extend_from_slice(&whole[..3 - pads]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_examples_of_the_rfc() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(encode(bytes.as_bytes()), text);
            assert_eq!(decode(text).unwrap(), bytes.as_bytes());
        }
        for bad in [
            "Z", "Zg=", "Zh==", "Zm9=", "====", "Z===", "Zg==Zg==", "Zm9v!", "Zm\u{e9}",
        ] {
            assert_eq!(decode(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn bytes_come_back(bytes: Vec<u8>) {
            prop_assert_eq!(decode(&encode(&bytes)), Some(bytes));
        }
    }
}
