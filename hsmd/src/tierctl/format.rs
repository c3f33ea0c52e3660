//! How numbers, times and names look to people.

/// Appends formatted text to a string, which cannot fail.
macro_rules! add {
    ($text:expr, $($what:tt)*) => {{
        use std::fmt::Write as _;
        let _ = write!($text, $($what)*);
    }};
}
pub(crate) use add;

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// A size in IEC units: "0 B", "512 B", "1.5 KiB", "64 MiB".
pub fn size(bytes: u64) -> String {
    let (mut unit, mut scale) = (0, 1_u64);
    while unit + 1 < UNITS.len() && bytes / scale >= 1024 {
        unit += 1;
        scale <<= 10;
    }
    let (whole, rest) = (bytes / scale, bytes % scale);
    // Tenths, rounded down: 128-bit, so that nothing overflows.
    let tenths = u128::from(rest) * 10 / u128::from(scale);
    if whole < 10 && tenths > 0 {
        format!("{whole}.{tenths} {}", UNITS[unit])
    } else {
        format!("{whole} {}", UNITS[unit])
    }
}

/// A whole number with a comma at every third digit.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// "1 file", "2 files".
pub fn some(number: u64, one: &str, many: &str) -> String {
    format!("{} {}", count(number), if number == 1 { one } else { many })
}

/// A span of time: "300 ms", "1.5 s", "42 s", "5 min", "3 h 10 min", "2 d 4 h".
pub fn span(millis: u64) -> String {
    let seconds = millis / 1000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    let with = |whole: u64, unit: &str, rest: u64, small: &str| match rest {
        0 => format!("{whole} {unit}"),
        rest => format!("{whole} {unit} {rest} {small}"),
    };
    match seconds {
        0 if millis > 0 => format!("{millis} ms"),
        1 if millis > 1099 => format!("1.{} s", millis % 1000 / 100),
        0..120 => format!("{seconds} s"),
        120..3600 => format!("{minutes} min"),
        3600..86_400 => with(hours, "h", minutes % 60, "min"),
        _ => with(days, "d", hours % 24, "h"),
    }
}

/// A part of a whole as a percentage, "16 %"; nothing where the whole is 0.
pub fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => String::new(),
        whole => format!(
            "{} %",
            u128::from(part.min(whole)) * 100 / u128::from(whole)
        ),
    }
}

/// A name for a terminal: nothing in it can move the cursor, change colours or hide.
pub fn name(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        let hidden = c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
        if hidden {
            add!(shown, "{}", c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// Which side of a column its text stands on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Columns that are as wide as they must be. The last one is never padded.
pub struct Table {
    indent: usize,
    sides: Vec<Side>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With a heading for each column.
    pub fn new(indent: usize, columns: &[(&str, Side)]) -> Self {
        Self {
            indent,
            sides: columns.iter().map(|(_, side)| *side).collect(),
            rows: vec![columns.iter().map(|(head, _)| (*head).to_owned()).collect()],
        }
    }

    /// Adds a row; what it lacks stays empty.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Whether there is only the heading.
    pub fn is_empty(&self) -> bool {
        self.rows.len() == 1
    }

    /// The lines.
    pub fn text(&self) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.sides.len()).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = " ".repeat(self.indent);
            for (column, cell) in row.iter().enumerate() {
                let pad = " ".repeat(widths[column].saturating_sub(cell.chars().count()));
                if column > 0 {
                    line.push_str("  ");
                }
                match self.sides[column] {
                    Side::Left => line.extend([cell.as_str(), &pad]),
                    Side::Right => line.extend([&pad, cell.as_str()]),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (64 << 20, "64 MiB"),
            ((10 << 30) + (1 << 29), "10 GiB"),
            (u64::MAX, "15 EiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }

    #[test]
    fn spans_and_counts() {
        for (millis, text) in [
            (0, "0 s"),
            (300, "300 ms"),
            (1530, "1.5 s"),
            (1020, "1 s"),
            (1000, "1 s"),
            (3999, "3 s"),
            (119_000, "119 s"),
            (300_000, "5 min"),
            (3_600_000, "1 h"),
            (11_400_000, "3 h 10 min"),
            (187_200_000, "2 d 4 h"),
        ] {
            assert_eq!(span(millis), text);
        }
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(some(1, "file", "files"), "1 file");
        assert_eq!(percent(u64::MAX, u64::MAX), "100 %");
    }

    #[test]
    fn names_cannot_steer_the_terminal() {
        assert_eq!(name("plain \u{e9}"), "plain \u{e9}");
        assert_eq!(name("a\nb\x1b[2J\u{202e}"), "a\\nb\\u{1b}[2J\\u{202e}");
    }

    #[test]
    fn tables_are_aligned() {
        let mut table = Table::new(
            2,
            &[("A", Side::Left), ("N", Side::Right), ("PATH", Side::Left)],
        );
        table.row(["x".to_owned(), "10".to_owned(), "/a".to_owned()]);
        table.row(["long".to_owned(), "9".to_owned(), String::new()]);
        assert_eq!(
            table.text(),
            "  A      N  PATH\n  x     10  /a\n  long   9\n"
        );
    }
}
