//! What the tests share.

#![allow(dead_code)] // each test binary uses a part

pub mod adopt;
pub mod fs;
pub mod log;
pub mod program;
pub mod tree;
