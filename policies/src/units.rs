//! Sizes and durations as the configuration writes them.

/// Units of time and their seconds.
const SECONDS: [(&str, u64); 5] = [
    ("s", 1),
    ("m", 60),
    ("h", 3600),
    ("d", 86_400),
    ("w", 604_800),
];

/// Units of size and their bytes.
pub const BYTES: [(&str, u64); 12] = [
    ("", 1),
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("PiB", 1 << 50),
    ("kB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("PB", 1_000_000_000_000_000),
];

fn quantity(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit());
    let (number, unit) = text.split_at(end.unwrap_or(text.len()));
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim())?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

/// "90s", "5m", "1h", "1d", "2w", in seconds.
pub fn seconds(text: &str) -> Option<u64> {
    quantity(text, &SECONDS)
}

/// "512", "64MiB", "1GB", in bytes.
pub fn bytes(text: &str) -> Option<u64> {
    quantity(text, &BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities() {
        assert_eq!(seconds("90s"), Some(90));
        assert_eq!(seconds(" 2 w "), Some(1_209_600));
        assert_eq!(seconds("5"), None);
        assert_eq!(seconds("1.5h"), None);
        assert_eq!(seconds("99999999999999999999s"), None);
        assert_eq!(seconds("9999999999999999999w"), None);
        assert_eq!(bytes("512"), Some(512));
        assert_eq!(bytes("10 GiB"), Some(10 << 30));
        assert_eq!(bytes("1GB"), Some(1_000_000_000));
        assert_eq!(bytes("GiB"), None);
        assert_eq!(bytes("-1"), None);
    }
}
