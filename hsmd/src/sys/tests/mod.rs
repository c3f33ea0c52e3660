//! The calls of `sys` on real filesystems.

mod content;
mod events;
mod handles;
mod metadata;
mod mounts;
mod parser;
mod permission;
