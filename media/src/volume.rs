//! What every backend offers: the [`Volume`] and [`Object`] traits and the values they exchange.
//!
//! All methods take `&self` and may be called from several threads. Nothing here can change or
//! remove an object that is stored.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Error, Label, ObjectName};

/// One line of a volume's inventory: an object that was stored and read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: ObjectName,
    /// Length of the stored file.
    pub bytes: u64,
    /// BLAKE3 of the stored file.
    pub hash: [u8; 32],
}

/// What [`Volume::append`] did; the object is on the medium in both cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    Stored,
    /// The same bytes were there already. They were read back and checked.
    AlreadyThere,
}

/// The inventory together with everything that does not fit into it, so that a reader can use what
/// is whole and name what is not.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Sorted by name, which is the order of the medium.
    pub entries: Vec<Entry>,
    /// Damaged or orphaned inventory entries, each an error that names the place.
    pub faults: Vec<Error>,
    /// Objects without an inventory entry: an append was interrupted. Appending the same object
    /// again completes them.
    pub unlisted: Vec<ObjectName>,
    /// What is on the volume but can be no object and no part of its layout.
    pub strangers: Vec<PathBuf>,
}

/// An object opened for reading. It stays readable as long as the medium is there.
pub trait Object: Send + Sync {
    /// Length of the object when it was opened.
    fn bytes(&self) -> u64;

    /// Reads up to `buf.len()` bytes at `offset` and says how many; 0 only at the end. The bytes are
    /// as the medium gave them: checking them is the caller's.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Error>;

    /// Fills `buf` from `offset`, or fails with [`Error::Short`] where the object ends before.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            match self.read_at(at, &mut buf[done..])? {
                0 => {
                    return Err(Error::Short {
                        path: self.path().to_owned(),
                        at,
                        missing: (buf.len() - done) as u64,
                        bytes: self.bytes(),
                    });
                }
                n => done += n,
            }
        }
        Ok(())
    }

    /// Where the object lies, for messages.
    fn path(&self) -> &Path {
        Path::new("(object)")
    }
}

/// A labelled medium, or one place of it, that stores objects.
pub trait Volume: Send + Sync {
    fn label(&self) -> &Label;

    /// Where the volume is, for messages.
    fn location(&self) -> &Path;

    /// The size of the largest object that fits, the backend's reserve subtracted.
    fn free_bytes(&self) -> Result<u64, Error>;

    /// Stores an object of exactly `bytes` bytes from `source`, whose BLAKE3 must be `hash`.
    ///
    /// When it returns `Ok`, the object and its inventory entry are durable, and the object was read
    /// back from the medium and checked. On an error nothing of it is in the inventory; a name that
    /// holds other bytes is never overwritten ([`Error::Exists`]). Appending the same object again
    /// completes what an interruption left.
    fn append(
        &self,
        name: &ObjectName,
        bytes: u64,
        hash: &[u8; 32],
        source: &mut dyn Read,
    ) -> Result<Written, Error>;

    /// Opens an object, whether the inventory has it or not. Its bytes are not checked here.
    fn open(&self, name: &ObjectName) -> Result<Arc<dyn Object>, Error>;

    /// The inventory, in the order of the medium (names sorted). Fails with the first fault when a
    /// part of the inventory is damaged; [`Volume::inventory`] gives what is whole beside the faults.
    fn list(&self) -> Result<Vec<Entry>, Error>;

    /// The inventory and what does not fit into it. Reads no object.
    fn inventory(&self) -> Result<Inventory, Error> {
        Ok(Inventory {
            entries: self.list()?,
            ..Inventory::default()
        })
    }

    /// Reads all bytes of an object back from the medium and compares them with its inventory entry.
    fn verify(&self, name: &ObjectName) -> Result<Entry, Error>;
}
