//! The policy file: TOML, every key checked when it is loaded.
//!
//! What is wrong is reported with file, line, rule, key and what to do; an unknown key is an error, so
//! that a misspelt one is not ignored. man/hsm-policy.5 describes every key; a test holds it to this.

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use toml::Spanned;

use crate::expression::{Expression, Fault};
use crate::units;

/// No rule is asked for more often, seconds.
const EVERY_MIN: u64 = 60;
const EVERY_MAX: u64 = 366 * 86_400;
const NAME_BYTES_MAX: usize = 64;
const IGNORE_MAX: usize = 200;
const RULES_MAX: usize = 1000;
/// Per cent of failures that end a run, unless the file says otherwise.
const FAILURES_MAX: u8 = 10;

/// What is done to files.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum Action {
    /// Made sure to be on every pool.
    Migrate,
    /// Their data given back.
    Release,
    /// Their data fetched.
    Recall,
    /// Never released from then on.
    Pin,
}

impl Action {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Migrate, Self::Release, Self::Recall, Self::Pin];

    /// As the file writes it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Migrate => "migrate",
            Self::Release => "release",
            Self::Recall => "recall",
            Self::Pin => "pin",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A time of the day, as the clock on the wall shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TimeOfDay(u16);

impl TimeOfDay {
    /// "03:30".
    pub fn parse(text: &str) -> Option<Self> {
        let (hours, minutes) = text.split_once(':')?;
        let number = |text: &str, max: u16| -> Option<u16> {
            let two = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
            two.then(|| text.parse().ok())
                .flatten()
                .filter(|number| *number < max)
        };
        Some(Self(number(hours, 24)? * 60 + number(minutes, 60)?))
    }

    /// Since midnight.
    pub fn minutes(self) -> u16 {
        self.0
    }
}

impl fmt::Display for TimeOfDay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

/// When a rule runs by the clock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Schedule {
    /// So long after it ran last.
    Every {
        /// Seconds.
        seconds: u64,
    },
    /// Once a day.
    Daily(TimeOfDay),
}

/// How full the filesystem may become, per cent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watermarks {
    /// Here releasing begins.
    pub high: u8,
    /// Here it ends. Less than `high`.
    pub low: u8,
}

/// One rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Unique in the file.
    pub name: String,
    /// Where it begins in the file, counted from 1.
    pub line: usize,
    /// What is done.
    pub action: Action,
    /// To which files.
    pub condition: Expression,
    /// Where its text stands.
    pub condition_line: usize,
    /// Which of them come first: those with the largest value.
    pub weight: Option<Expression>,
    /// Where its text stands.
    pub weight_line: usize,
    /// By the clock.
    pub schedule: Option<Schedule>,
    /// When the filesystem is full. Only of a rule that releases.
    pub watermarks: Option<Watermarks>,
    /// When the spool is full.
    pub spool_full: bool,
    /// At most so many files in one run.
    pub max_files: Option<u64>,
    /// Files of at most so many bytes together in one run (the last one may go beyond).
    pub max_bytes: Option<u64>,
}

/// A policy file whose text is sound. Whether the names in its expressions exist is not known yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The file's name, for messages.
    pub file: String,
    /// GLOB patterns of paths that no rule touches.
    pub ignore: Vec<String>,
    /// A run ends when more than so many per cent of its files failed.
    pub failures_max_percent: u8,
    /// In the order of the file.
    pub rules: Vec<Rule>,
}

/// Why a policy file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}:{line}: {}{key}: {why}; {advice}", rule.as_ref().map(|rule| format!("rule {rule}: ")).unwrap_or_default())]
pub struct PolicyError {
    /// The file.
    pub file: Box<str>,
    /// Counted from 1.
    pub line: usize,
    /// The rule, where it is one and has a name.
    pub rule: Option<Box<str>>,
    /// The key, or the text of the line.
    pub key: String,
    /// What is wrong.
    pub why: String,
    /// What to do.
    pub advice: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPolicy {
    #[serde(default)]
    ignore: Vec<Spanned<String>>,
    failures_max_percent: Option<Spanned<i64>>,
    #[serde(default)]
    rule: Vec<Spanned<RawRule>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    name: Option<Spanned<String>>,
    action: Option<Spanned<String>>,
    condition: Option<Spanned<String>>,
    weight: Option<Spanned<String>>,
    every: Option<Spanned<String>>,
    daily: Option<Spanned<String>>,
    high_watermark: Option<Spanned<i64>>,
    low_watermark: Option<Spanned<i64>>,
    spool_full: Option<Spanned<bool>>,
    max_files: Option<Spanned<i64>>,
    max_bytes: Option<Spanned<String>>,
}

/// The keys of the file and of a rule.
pub const KEYS: [&str; 14] = [
    "ignore",
    "failures_max_percent",
    "rule",
    "name",
    "action",
    "condition",
    "weight",
    "every",
    "daily",
    "high_watermark",
    "low_watermark",
    "spool_full",
    "max_files",
    "max_bytes",
];

impl Policy {
    /// Checks the text of the file named `file`.
    pub fn parse(file: &str, text: &str) -> Result<Self, PolicyError> {
        let source = Source { file, text };
        let raw: RawPolicy = toml::from_str(text).map_err(|error| source.syntax(&error))?;
        if raw.rule.len() > RULES_MAX {
            let why = format!("there are more than {RULES_MAX} rules");
            return Err(source.wrong(&(0..0), None, "rule", why, "join some of them with or"));
        }
        let mut policy = Self {
            file: file.to_owned(),
            ignore: source.ignore(raw.ignore)?,
            failures_max_percent: match raw.failures_max_percent {
                Some(value) => source.percent(&value, None, "failures_max_percent", 100)?,
                None => FAILURES_MAX,
            },
            rules: Vec::new(),
        };
        for rule in raw.rule {
            let rule = source.rule(rule, &policy.rules)?;
            policy.rules.push(rule);
        }
        Ok(policy)
    }

    /// The rule of that name.
    pub fn rule(&self, name: &str) -> Option<&Rule> {
        self.rules.iter().find(|rule| rule.name == name)
    }

    /// That a rule's expression cannot be used, as whoever asked SQLite found out.
    pub fn expression_error(&self, rule: &Rule, key: &str, fault: &Fault) -> PolicyError {
        let (line, expression) = match (key, &rule.weight) {
            ("weight", Some(weight)) => (rule.weight_line, weight),
            _ => (rule.condition_line, &rule.condition),
        };
        PolicyError {
            file: self.file.as_str().into(),
            line,
            rule: Some(rule.name.as_str().into()),
            key: key.to_owned(),
            why: located(expression.text(), fault),
            advice: fault.advice.clone(),
        }
    }
}

/// A fault with its place in the expression's text.
pub fn located(text: &str, fault: &Fault) -> String {
    let before = text.get(..fault.at).unwrap_or(text);
    let near: String = text
        .get(fault.at..)
        .unwrap_or_default()
        .chars()
        .take(20)
        .collect();
    let place = before.chars().count() + 1;
    if near.trim().is_empty() {
        format!("{} (at its end)", fault.why)
    } else {
        format!("{} (at character {place}: {near:?})", fault.why)
    }
}

struct Source<'t> {
    file: &'t str,
    text: &'t str,
}

impl Source<'_> {
    fn line(&self, offset: usize) -> usize {
        let before = self.text.as_bytes().get(..offset).unwrap_or_default();
        before.split(|&b| b == b'\n').count().max(1)
    }

    fn wrong(
        &self,
        span: &Range<usize>,
        rule: Option<&str>,
        key: &str,
        why: impl Into<String>,
        advice: impl Into<String>,
    ) -> PolicyError {
        PolicyError {
            file: self.file.into(),
            line: self.line(span.start),
            rule: rule.map(Into::into),
            key: key.to_owned(),
            why: why.into(),
            advice: advice.into(),
        }
    }

    /// What the TOML parser objects to. It names no key, so the line's own text does.
    fn syntax(&self, error: &toml::de::Error) -> PolicyError {
        let span = error.span().unwrap_or(0..0);
        let text = self.text.lines().nth(self.line(span.start) - 1);
        let key = text.unwrap_or_default().split('=').next();
        let key = match key.unwrap_or_default().trim() {
            "" => "the file",
            key => key,
        };
        let advice = if error.message().starts_with("unknown field") {
            "correct the key, or remove it"
        } else {
            "correct the line as hsm-policy(5) shows it"
        };
        let why = error.message().trim().replace('\n', ", ");
        self.wrong(&span, None, key, why, advice)
    }

    fn ignore(&self, raw: Vec<Spanned<String>>) -> Result<Vec<String>, PolicyError> {
        let mut list = Vec::new();
        for pattern in raw {
            let span = pattern.span();
            let pattern = pattern.into_inner();
            let (why, advice) = if pattern.is_empty() {
                ("a pattern is empty".to_owned(), "remove it")
            } else if pattern.starts_with('/') {
                let why = format!("{pattern:?} begins with a slash, and so matches nothing");
                (why, "write it from the mount point on, as in \"scratch/*\"")
            } else if list.len() >= IGNORE_MAX {
                let why = format!("there are more than {IGNORE_MAX} patterns");
                (why, "put what is to be ignored below one directory")
            } else {
                list.push(pattern);
                continue;
            };
            return Err(self.wrong(&span, None, "ignore", why, advice));
        }
        Ok(list)
    }

    fn percent(
        &self,
        value: &Spanned<i64>,
        rule: Option<&str>,
        key: &str,
        max: u8,
    ) -> Result<u8, PolicyError> {
        let number = *value.get_ref();
        u8::try_from(number)
            .ok()
            .filter(|percent| (1..=max).contains(percent))
            .ok_or_else(|| {
                let why = format!("{number} is no share that makes sense here");
                let advice = format!("write a whole number of per cent, 1 to {max}");
                self.wrong(&value.span(), rule, key, why, advice)
            })
    }

    fn rule(&self, raw: Spanned<RawRule>, others: &[Rule]) -> Result<Rule, PolicyError> {
        let whole = raw.span();
        let raw = raw.into_inner();
        let missing = |name: Option<&str>, key: &str, advice: &str| {
            self.wrong(&whole, name, key, "it is missing", advice)
        };
        let name = raw.name.as_ref().ok_or_else(|| {
            missing(
                None,
                "name",
                "give each [[rule]] a name = \"...\" of its own",
            )
        })?;
        self.check_name(name, others)?;
        let name = name.get_ref().clone();
        let action = raw.action.as_ref().ok_or_else(|| {
            missing(
                Some(&name),
                "action",
                "add action = \"release\", \"migrate\", \"recall\" or \"pin\"",
            )
        })?;
        let action = self.action(&name, action)?;
        let condition = raw.condition.as_ref().ok_or_else(|| {
            missing(
                Some(&name),
                "condition",
                "add condition = \"...\", or \"1\" for every file",
            )
        })?;
        let weight = raw.weight.as_ref();
        Ok(Rule {
            line: self.line(whole.start),
            action,
            condition: self.expression(&name, "condition", condition)?,
            condition_line: self.line(condition.span().start),
            weight: weight
                .map(|weight| self.expression(&name, "weight", weight))
                .transpose()?,
            weight_line: weight.map_or(0, |weight| self.line(weight.span().start)),
            schedule: self.schedule(&name, &raw)?,
            watermarks: self.watermarks(&name, action, &raw)?,
            spool_full: self.spool_full(&name, action, &raw)?,
            max_files: raw
                .max_files
                .map(|value| self.max_files(&name, &value))
                .transpose()?,
            max_bytes: raw
                .max_bytes
                .map(|value| self.max_bytes(&name, &value))
                .transpose()?,
            name,
        })
    }

    fn check_name(&self, name: &Spanned<String>, others: &[Rule]) -> Result<(), PolicyError> {
        let (text, span) = (name.get_ref(), name.span());
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if text.is_empty() || text.len() > NAME_BYTES_MAX || !text.bytes().all(good) {
            let why = format!("{text:?} is no name of a rule");
            let advice =
                format!("use 1 to {NAME_BYTES_MAX} letters, digits, hyphens, dots and underscores");
            return Err(self.wrong(&span, None, "name", why, advice));
        }
        if let Some(other) = others.iter().find(|rule| rule.name == *text) {
            let why = format!(
                "two rules are named {text}, the other one in line {}",
                other.line
            );
            return Err(self.wrong(&span, None, "name", why, "give each a name of its own"));
        }
        Ok(())
    }

    fn action(&self, rule: &str, value: &Spanned<String>) -> Result<Action, PolicyError> {
        let word = value.get_ref();
        let found = Action::ALL.into_iter().find(|action| action.word() == word);
        found.ok_or_else(|| {
            self.wrong(
                &value.span(),
                Some(rule),
                "action",
                format!("{word:?} is no action"),
                "write migrate, release, recall or pin",
            )
        })
    }

    fn expression(
        &self,
        rule: &str,
        key: &str,
        value: &Spanned<String>,
    ) -> Result<Expression, PolicyError> {
        let text = value.get_ref();
        Expression::parse(text).map_err(|fault| {
            let why = located(text, &fault);
            self.wrong(&value.span(), Some(rule), key, why, fault.advice)
        })
    }

    fn schedule(&self, rule: &str, raw: &RawRule) -> Result<Option<Schedule>, PolicyError> {
        match (&raw.every, &raw.daily) {
            (None, None) => Ok(None),
            (Some(_), Some(daily)) => Err(self.wrong(
                &daily.span(),
                Some(rule),
                "daily",
                "the rule has every as well",
                "keep one of the two",
            )),
            (Some(every), None) => {
                let text = every.get_ref();
                let seconds = units::seconds(text);
                let seconds = seconds.filter(|span| (EVERY_MIN..=EVERY_MAX).contains(span));
                let seconds = seconds.ok_or_else(|| {
                    self.wrong(
                        &every.span(),
                        Some(rule),
                        "every",
                        format!("{text:?} is no span from 1m to 366d"),
                        "write a whole number and m, h, d or w, like \"1h\"",
                    )
                })?;
                Ok(Some(Schedule::Every { seconds }))
            }
            (None, Some(daily)) => {
                let text = daily.get_ref();
                let time = TimeOfDay::parse(text).ok_or_else(|| {
                    self.wrong(
                        &daily.span(),
                        Some(rule),
                        "daily",
                        format!("{text:?} is no time of the day"),
                        "write hours and minutes with two digits each, like \"03:30\"",
                    )
                })?;
                Ok(Some(Schedule::Daily(time)))
            }
        }
    }

    fn watermarks(
        &self,
        rule: &str,
        action: Action,
        raw: &RawRule,
    ) -> Result<Option<Watermarks>, PolicyError> {
        let (high, low) = match (&raw.high_watermark, &raw.low_watermark) {
            (None, None) => return Ok(None),
            (Some(high), Some(low)) => (high, low),
            (Some(one), None) | (None, Some(one)) => {
                let here = if raw.high_watermark.is_some() {
                    "high_watermark"
                } else {
                    "low_watermark"
                };
                return Err(self.wrong(
                    &one.span(),
                    Some(rule),
                    here,
                    "the other watermark is missing",
                    "give both: releasing begins at high_watermark and ends at low_watermark",
                ));
            }
        };
        if action != Action::Release {
            return Err(self.wrong(
                &high.span(),
                Some(rule),
                "high_watermark",
                format!("action {action} frees no space"),
                "only a rule with action = \"release\" has watermarks",
            ));
        }
        let marks = Watermarks {
            high: self.percent(high, Some(rule), "high_watermark", 99)?,
            low: self.percent(low, Some(rule), "low_watermark", 98)?,
        };
        if marks.low >= marks.high {
            return Err(self.wrong(
                &low.span(),
                Some(rule),
                "low_watermark",
                format!("{} is not below high_watermark {}", marks.low, marks.high),
                "leave some per cent between them, like 90 and 80",
            ));
        }
        Ok(Some(marks))
    }

    fn spool_full(&self, rule: &str, action: Action, raw: &RawRule) -> Result<bool, PolicyError> {
        let Some(value) = &raw.spool_full else {
            return Ok(false);
        };
        if *value.get_ref() && matches!(action, Action::Recall | Action::Pin) {
            return Err(self.wrong(
                &value.span(),
                Some(rule),
                "spool_full",
                format!("action {action} empties no spool"),
                "a full spool is emptied by action = \"migrate\"",
            ));
        }
        Ok(*value.get_ref())
    }

    fn max_files(&self, rule: &str, value: &Spanned<i64>) -> Result<u64, PolicyError> {
        let number = *value.get_ref();
        let number = u64::try_from(number).ok().filter(|number| *number > 0);
        number.ok_or_else(|| {
            self.wrong(
                &value.span(),
                Some(rule),
                "max_files",
                "it is not above 0",
                "write how many files one run may take, or remove the key",
            )
        })
    }

    fn max_bytes(&self, rule: &str, value: &Spanned<String>) -> Result<u64, PolicyError> {
        let bytes = units::bytes(value.get_ref()).filter(|bytes| *bytes > 0);
        bytes.ok_or_else(|| {
            self.wrong(
                &value.span(),
                Some(rule),
                "max_bytes",
                format!("{:?} is no size", value.get_ref()),
                "write a whole number and a unit, like \"100GiB\"",
            )
        })
    }
}

#[cfg(test)]
mod tests;
