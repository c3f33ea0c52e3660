//! Volumes: media that store opaque, named, immutable objects.
//!
//! The crate knows nothing of records or segments: an object is a name, a length and a BLAKE3 hash.
//! A [`Volume`] appends objects, reads ranges of them, lists and verifies them; it never changes or
//! removes one (write once), and what it says is stored was synced and read back from the medium.
//! Backends are modules; so far there is [`directory`]. Deciding which object goes to which volume,
//! and remembering it, is the caller's.

pub mod directory;
mod durable;
mod entry;
mod error;
mod fault;
mod kernel;
mod label;
mod name;
mod readback;
mod volume;

#[cfg(test)]
mod contract;

pub use error::Error;
pub use label::{FORMAT, Label};
pub use name::{ObjectName, Serial};
pub use volume::{Entry, Inventory, Object, Volume, Written};
