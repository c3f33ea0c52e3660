//! The daemon and `tierctl`: capture, the log's one writer, copies to volumes, the control socket.
//!
//! See ARCHITECTURE.md for how the threads fit together.

pub mod board;
pub mod capture;
pub mod cli;
pub mod committer;
pub mod config;
pub mod control;
pub mod daemon;
pub mod doubts;
pub mod events;
pub mod examination;
pub mod fetch;
pub mod flush;
pub mod output;
pub mod policy;
pub mod preflight;
pub mod run;
pub mod service;
pub mod shared;
pub mod sweep;
pub mod sys;
pub mod tier;
pub mod tierctl;
