//! The log as a whole: written, crashed, damaged, read back.
//!
//! Random tests print their seed; `HSM_SEED` runs one again, `HSM_ROUNDS` sets how many there are.

// Helpers of tests, outside #[test] functions.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::range_plus_one
)]

mod damage;
mod faults;
mod full;
mod golden;
mod independent;
mod power;
mod roundtrip;
mod scenario;
mod spool;
mod support;
