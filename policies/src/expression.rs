//! The text of a condition or weight, known to be one SQL expression once it stands in parentheses.
//!
//! This is the first of two guards: the text cannot leave the parentheses that the statement puts around
//! it (they are balanced, no string, comment or statement is left open), and holds no query of its own.
//! Whether its names exist is asked of SQLite, whose authorizer is the second guard.

use std::fmt;

/// No condition is longer.
const BYTES_MAX: usize = 10_000;
/// SQLite's own limit is 1000 for the whole expression.
const DEPTH_MAX: usize = 100;
/// Words that begin a query.
const QUERIES: [&str; 4] = ["select", "with", "values", "pragma"];
/// How the view calls the column `group`, which is a word of SQL; of the same length, so that places stay.
const GROUP_COLUMN: &str = "gname";

/// What is wrong with an expression's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where, bytes from its beginning.
    pub at: usize,
    /// What is wrong.
    pub why: String,
    /// What to do.
    pub advice: String,
}

/// A condition or a weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expression {
    text: String,
    sql: String,
    clauses: Vec<std::ops::Range<usize>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Token<'t> {
    Word(&'t str),
    Open,
    Close,
    Other,
}

impl Expression {
    /// Checks a text.
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let fault = |at, why: &str, advice: &str| Fault {
            at,
            why: why.to_owned(),
            advice: advice.to_owned(),
        };
        if text.len() > BYTES_MAX {
            let why = format!("it is longer than {BYTES_MAX} bytes");
            return Err(fault(BYTES_MAX, &why, "split the rule into several"));
        }
        let mut scan = Scan::new(text);
        let mut clauses = Clauses::default();
        let (mut sql, mut depth, mut empty) = (text.to_owned(), Vec::new(), true);
        while let Some((at, token)) = scan.next()? {
            empty = false;
            clauses.see(at, token, depth.len());
            match token {
                Token::Open => depth.push(at),
                Token::Close if depth.pop().is_none() => {
                    return Err(fault(
                        at,
                        "a closing parenthesis has no opening one",
                        "remove it, or add the other",
                    ));
                }
                Token::Word(word)
                    if QUERIES.iter().any(|query| word.eq_ignore_ascii_case(query)) =>
                {
                    return Err(fault(
                        at,
                        &format!("{word} begins a query, and only an expression can stand here"),
                        "compare columns with values; to mean a column or text, see hsm-policy(5)",
                    ));
                }
                Token::Word(word) if word.eq_ignore_ascii_case("group") => {
                    sql.replace_range(at..at + word.len(), GROUP_COLUMN);
                }
                _ => {}
            }
            if depth.len() > DEPTH_MAX {
                return Err(fault(
                    at,
                    "parentheses lie too deep in each other",
                    "simplify it",
                ));
            }
        }
        if let Some(at) = depth.pop() {
            return Err(fault(
                at,
                "a parenthesis is not closed",
                "add the closing one",
            ));
        }
        if empty {
            return Err(fault(
                0,
                "it is empty",
                "write an expression like size > mib(100) and age(atime) > days(30), or 1 for every file",
            ));
        }
        Ok(Self {
            clauses: clauses.end(text),
            text: text.to_owned(),
            sql,
        })
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What goes into a statement, in parentheses.
    pub fn sql(&self) -> &str {
        &self.sql
    }

    /// What must hold all at once, as written and as SQL: the parts between the outermost ANDs.
    pub fn clauses(&self) -> impl Iterator<Item = (&str, &str)> {
        self.clauses.iter().map(|range| {
            (
                self.text[range.clone()].trim(),
                self.sql[range.clone()].trim(),
            )
        })
    }
}

impl fmt::Display for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Finds the outermost ANDs, those of BETWEEN and within CASE left out.
#[derive(Default)]
struct Clauses {
    ands: Vec<usize>,
    betweens: usize,
    cases: usize,
    any_or: bool,
}

impl Clauses {
    fn see(&mut self, at: usize, token: Token<'_>, depth: usize) {
        let Token::Word(word) = token else { return };
        if depth > 0 {
            return;
        }
        match word.to_ascii_lowercase().as_str() {
            "case" => self.cases += 1,
            "end" => self.cases = self.cases.saturating_sub(1),
            _ if self.cases > 0 => {}
            "between" => self.betweens += 1,
            "and" if self.betweens > 0 => self.betweens -= 1,
            "and" => self.ands.push(at),
            "or" => self.any_or = true,
            _ => {}
        }
    }

    fn end(self, text: &str) -> Vec<std::ops::Range<usize>> {
        // An OR binds less than an AND: the whole is one clause then.
        let ands = if self.any_or { Vec::new() } else { self.ands };
        let mut from = 0;
        let mut list = Vec::new();
        for and in ands {
            list.push(from..and);
            from = and + "and".len();
        }
        list.push(from..text.len());
        list
    }
}

/// Cuts a text into tokens, as SQLite does, as far as it matters here.
struct Scan<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Scan<'t> {
    fn new(text: &'t str) -> Self {
        Self { text, at: 0 }
    }

    fn next(&mut self) -> Result<Option<(usize, Token<'t>)>, Fault> {
        let bytes = self.text.as_bytes();
        while bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        let at = self.at;
        let Some(&byte) = bytes.get(at) else {
            return Ok(None);
        };
        let fault = |why: String, advice: &str| {
            let advice = advice.to_owned();
            Err(Fault { at, why, advice })
        };
        let following = bytes.get(at + 1).copied();
        match byte {
            b'\'' | b'"' | b'`' | b'[' => return self.quoted(byte),
            b'-' if following == Some(b'-') => {
                return fault(
                    "-- begins a comment".to_owned(),
                    "put a space between the signs, and comments after a # of their own line",
                );
            }
            b'/' if following == Some(b'*') => {
                return fault(
                    "/* begins a comment".to_owned(),
                    "write comments after a # of their own line",
                );
            }
            b';' => {
                return fault(
                    "a semicolon ends a statement".to_owned(),
                    "write one expression",
                );
            }
            b'?' | b':' | b'@' | b'$' | b'#' => {
                let sign = char::from(byte);
                return fault(
                    format!("{sign} stands for a parameter, and there is none"),
                    "write the value itself",
                );
            }
            0 => return fault("it holds a NUL".to_owned(), "remove it"),
            _ => {}
        }
        let token = match byte {
            b'(' => Token::Open,
            b')' => Token::Close,
            byte if is_word(byte) && !byte.is_ascii_digit() => {
                let rest = &bytes[at..];
                let len = rest.iter().position(|byte| !is_word(*byte));
                let word = &self.text[at..at + len.unwrap_or(rest.len())];
                // x'00', a text of bytes: its quote is scanned next.
                self.at += word.len();
                return Ok(Some((at, Token::Word(word))));
            }
            _ => Token::Other,
        };
        self.at += 1;
        Ok(Some((at, token)))
    }

    /// A text or a name in quotes; the quote itself is doubled within.
    fn quoted(&mut self, open: u8) -> Result<Option<(usize, Token<'t>)>, Fault> {
        let (bytes, at) = (self.text.as_bytes(), self.at);
        let close = if open == b'[' { b']' } else { open };
        let mut end = at + 1;
        loop {
            match bytes.get(end) {
                None => {
                    return Err(Fault {
                        at,
                        why: format!("a {} is not closed", char::from(open)),
                        advice: "close it; a quote within a text is written twice".to_owned(),
                    });
                }
                Some(0) => {
                    return Err(Fault {
                        at: end,
                        why: "it holds a NUL".to_owned(),
                        advice: "remove it".to_owned(),
                    });
                }
                Some(&byte) if byte == close => {
                    let doubled = open != b'[' && bytes.get(end + 1) == Some(&close);
                    if !doubled {
                        break;
                    }
                    end += 2;
                }
                Some(_) => end += 1,
            }
        }
        self.at = end + 1;
        Ok(Some((at, Token::Other)))
    }
}

/// What SQLite takes for a part of a name: all bytes beyond ASCII too.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn clauses(text: &str) -> Vec<String> {
        let parsed = Expression::parse(text).unwrap_or_else(|fault| panic!("{text}: {fault:?}"));
        parsed.clauses().map(|(text, _)| text.to_owned()).collect()
    }

    #[test]
    fn conditions_are_cut_at_their_outermost_ands() {
        assert_eq!(
            clauses("size > mib(1) AND (a and b) and c between 1 and 2 and d"),
            ["size > mib(1)", "(a and b)", "c between 1 and 2", "d"]
        );
        assert_eq!(clauses("a and b or c"), ["a and b or c"]);
        assert_eq!(
            clauses("case when a and b then 1 else 0 end and c"),
            ["case when a and b then 1 else 0 end", "c"]
        );
        assert_eq!(
            clauses("name = 'this and that'"),
            ["name = 'this and that'"]
        );
        assert_eq!(clauses("  pinned "), ["pinned"]);
    }

    #[test]
    fn the_group_is_a_column() {
        let parsed = Expression::parse("Group = 'group' and path glob 'a group/*'").unwrap();
        assert_eq!(parsed.sql(), "gname = 'group' and path glob 'a group/*'");
        assert_eq!(
            parsed.clauses().next(),
            Some(("Group = 'group'", "gname = 'group'"))
        );
        assert_eq!(parsed.to_string(), parsed.text());
    }

    #[test]
    fn what_is_no_expression_is_refused() {
        let deep = "(".repeat(200);
        let long = "1 ".repeat(6000);
        let cases = [
            ("", 0, "it is empty"),
            (" \n ", 0, "it is empty"),
            ("size > (1", 7, "not closed"),
            ("size > 1)", 8, "no opening one"),
            ("1) or (1", 1, "no opening one"),
            ("name = 'x", 7, "a ' is not closed"),
            ("name = 'x''", 7, "a ' is not closed"),
            ("[name = 1", 0, "a [ is not closed"),
            ("1; drop table inode", 1, "semicolon"),
            ("1 -- x", 2, "comment"),
            ("1 /* x", 2, "comment"),
            ("size > ?1", 7, "parameter"),
            ("size > :a", 7, "parameter"),
            ("file in (SELECT 1)", 9, "SELECT begins a query"),
            ("file in (with x as (y) z)", 9, "with begins a query"),
            ("file in (values (1))", 9, "values begins a query"),
            ("a\0b", 1, "NUL"),
            ("'a\0b'", 2, "NUL"),
            (deep.as_str(), 100, "too deep"),
            (long.as_str(), 10_000, "longer than"),
        ];
        for (text, at, why) in cases {
            let fault = Expression::parse(text).expect_err(text);
            assert!(fault.why.contains(why), "{text}: {fault:?}");
            assert_eq!(fault.at, at, "{text}: {fault:?}");
            assert!(!fault.advice.is_empty());
        }
    }

    proptest! {
        /// Whatever passes stays within the parentheses that are put around it.
        #[test]
        fn what_passes_is_balanced(text in "[-a-c()'\"`\\[\\];/* ?\u{e9}]{0,24}") {
            if let Ok(parsed) = Expression::parse(&text) {
                let (mut depth, mut quote) = (0_i32, None);
                let mut chars = parsed.sql().chars().peekable();
                while let Some(c) = chars.next() {
                    match (quote, c) {
                        (Some(open), c) if c == open => {
                            if open != ']' && chars.peek() == Some(&open) {
                                chars.next();
                            } else {
                                quote = None;
                            }
                        }
                        (None, '[') => quote = Some(']'),
                        (None, '\'' | '"' | '`') => quote = Some(c),
                        (None, '(') => depth += 1,
                        (None, ')') => depth -= 1,
                        (None, ';' | '?') => prop_assert!(false, "{text}"),
                        _ => {}
                    }
                    prop_assert!(depth >= 0, "{text}");
                }
                prop_assert_eq!((depth, quote), (0, None), "{}", text);
                prop_assert!(parsed.clauses().count() >= 1);
            }
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,60}") {
            let _ = Expression::parse(&text);
        }
    }
}
