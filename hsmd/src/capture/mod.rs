//! Capture: from the kernel's hints to transactions.
//!
//! [`hints`] collects what is to be looked at; [`namespace`] and [`tree`] turn entries into a valid
//! tree; [`examine`], [`content`] and [`worker`] read inodes; [`facts`] is what they find; [`examiner`] makes
//! one transaction of it all, and [`unread`] is what it did not read. Events say
//! where to look; the log records what was found. Adoption, start-up, overflow, sweep and single
//! events all come through here; there is no other way into the log.

pub mod content;
pub mod examine;
pub mod examiner;
pub mod facts;
pub mod hints;
pub mod namespace;
#[cfg(test)]
mod tests;
pub mod tree;
pub mod unread;
pub mod worker;
