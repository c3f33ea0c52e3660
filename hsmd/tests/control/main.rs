//! The control socket and tierctl, with a daemon that is made up.

#![allow(clippy::unwrap_used, clippy::expect_used)] // tests

mod answers;
mod authorisation;
mod fake;
mod golden;
mod interface;
mod log;
mod manual;
mod policies;
mod protocol;
mod rebuild;
