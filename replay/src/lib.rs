//! Rebuilding a filesystem from the media alone.
//!
//! * [`sources`], [`copies`]: where the log can be read; what is damaged in one copy is read from
//!   another.
//! * [`mod@fold`]: the log's transactions up to a [`moment`], into a catalog.
//! * [`mod@replay`]: the whole of a replay, from sources to a synced tree; [`materialise`], [`content`]
//!   and [`target`] are its steps, [`state`] lets it be continued; [`stubs`] makes a tree without content.
//! * [`read`]: the content of a file at any moment, as a stream.
//! * [`verify`]: comparing a tree with the log.
//! * [`report`]: progress, and what is not as it was logged.
//!
//! Nothing here prints, and nothing here knows the daemon.

pub mod content;
pub mod copies;
pub mod dirs;
pub mod error;
pub mod fold;
pub mod materialise;
pub mod moment;
pub mod read;
pub mod replay;
pub mod report;
pub mod scope;
pub mod sources;
pub mod state;
pub mod stubs;
pub mod sync;
pub mod sys;
pub mod target;
pub mod tree;
pub mod verify;

pub use error::Error;
pub use moment::Moment;
pub use sources::Sources;
