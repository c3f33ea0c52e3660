//! Policies: rules that say which files are migrated, released, recalled and pinned, and when.
//!
//! * [`rules`]: the file's text becomes a [`Policy`], every fault told with file, line, rule and key.
//! * [`expression`]: conditions and weights, which must be SQL expressions and nothing else.
//! * [`statement`]: a rule becomes a condition and a weight over the view `files`, with bound parameters.
//! * [`decide`]: what is due, how much is to be freed, when a run stops.
//!
//! This crate does no input or output and knows no clock: texts, times and figures come from the caller,
//! SQLite is asked by the caller. What names and functions expressions may use is for whoever holds the
//! view to check.

pub mod decide;
pub mod expression;
pub mod rules;
pub mod space;
pub mod statement;
pub mod units;

pub use expression::{Expression, Fault};
pub use rules::{Action, Policy, PolicyError, Rule, Schedule, TimeOfDay, Watermarks};
pub use statement::Statement;
