//! The write-once log and what is derived from it.
//!
//! * [`ids`]: LSNs, file ids, data ids, hashes, times.
//! * [`record`]: the records, one CBOR item each; [`cbor`] holds the rules that all of them follow.
//! * [`frame`], [`segment`]: how records lie in a file that `zstd -dc` can read.
//! * [`disk`], [`writer`], [`spool`]: appending, group commit, sealing, recovery.
//! * [`catalog`]: the SQLite database that is the fold of the log.
//! * [`stub`], [`residency`]: the mark of a released file, and the list of those on this disk.
//! * [`files`]: the view of files that policies and searches ask.
//!
//! This crate knows nothing of volumes, of the kernel's events or of the programs.

pub mod catalog;
pub mod cbor;
pub mod disk;
pub mod files;
pub mod fold;
pub mod frame;
pub mod ids;
pub mod layout;
pub mod record;
pub mod recovery;
pub mod residency;
pub mod scan;
pub mod segment;
pub mod spool;
pub mod stub;
pub mod writer;

pub use ids::{DataId, Epoch, FileId, Hash, LogId, Lsn, SegmentNo, Time};
