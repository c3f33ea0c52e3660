//! The comparison of two trees, independent of the project's own code: it reads what is there with
//! plain system calls, and shares neither the walk nor the hashes' block size nor the list of
//! chattr flags with the programs that it checks.
//!
//! Compared: names, types, modes, owners, mtimes in nanoseconds of everything (the root, directories
//! and symlinks included), sizes, bytes, holes to 4 KiB, xattrs (but `trusted.hsm`, and the second
//! names that XFS gives to ACLs), chattr flags,
//! hard-link groups, device numbers and link targets. Not compared: atime, ctime, inode numbers,
//! allocated blocks, the sizes of directories.

mod differ;
mod read;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

pub use differ::differences;

/// Unit of the content's hashes.
const BLOCK: u64 = 64 << 10;
/// Holes are compared to this.
const HOLE_UNIT: u64 = 4 << 10;

/// Whether hole maps are compared in this process, see [`ignore_holes`].
static HOLES: AtomicBool = AtomicBool::new(true);

/// From here on only bytes are compared, not where the holes are. For random workloads: a filesystem
/// decides about space that it reserved (XFS) or filled with zeros in its cache after the file was
/// logged, without a change of ctime, so zeros may be logged as data there. `p1_table` compares holes.
pub fn ignore_holes() {
    HOLES.store(false, Ordering::Relaxed);
}

/// What is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The root's `lost+found` too. It is made by mkfs.ext4 and cannot be asked to be equal.
    pub lost_found: bool,
    /// The attributes of the root directory itself.
    pub root: bool,
    /// Where the holes are.
    pub holes: bool,
    /// The chattr flags that count, `FS_*_FL`.
    pub flags: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            lost_found: false,
            root: true,
            holes: HOLES.load(Ordering::Relaxed) && std::env::var_os("HSM_NO_HOLES").is_none(),
            flags: MEANINGFUL_FLAGS,
        }
    }
}

/// chattr's c S i a d A m j D T C. What is left out says how a filesystem stores the file (`e`, `I`),
/// is of no effect (`s`, `u`) or cannot be set (`E`, `V`).
pub const MEANINGFUL_FLAGS: u32 = 0x0000_0004
    | 0x0000_0008
    | 0x0000_0010
    | 0x0000_0020
    | 0x0000_0040
    | 0x0000_0080
    | 0x0000_0400
    | 0x0000_4000
    | 0x0001_0000
    | 0x0002_0000
    | 0x0080_0000;

/// All that is compared of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// `S_IFMT` bits.
    kind: u32,
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, i64),
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    flags: u32,
    /// Of symlinks.
    target: Vec<u8>,
    /// Of devices.
    rdev: u64,
    /// Of regular files.
    size: u64,
    /// Blocks of [`BLOCK`] bytes that are not all zeros: number and hash.
    blocks: Vec<(u64, [u8; 32])>,
    /// Ranges with data, [start, end), widened to [`HOLE_UNIT`].
    data: Vec<(u64, u64)>,
    /// The first path (in the order of names) of the same inode; its own one if it is the first.
    group: Vec<u8>,
    /// Why the content could not be read.
    unreadable: Option<String>,
}

/// A tree as it was at one moment.
#[derive(Clone, Debug)]
pub struct Tree {
    /// By path below the root; the root's is empty.
    entries: BTreeMap<Vec<u8>, Entry>,
}

impl Tree {
    /// Reads the tree below `root`, after syncing its filesystem. It should be at rest.
    pub fn read(root: &Path) -> Self {
        Self::read_with(root, Options::default())
    }

    /// The same with other options.
    pub fn read_with(root: &Path, options: Options) -> Self {
        read::tree(root, options).unwrap_or_else(|e| panic!("reading {}: {e}", root.display()))
    }

    /// How many names it has, the root's among them.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has nothing, not even a root.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether it has this path.
    pub fn has(&self, path: &str) -> bool {
        self.entries.contains_key(path.as_bytes())
    }

    /// The same tree with nothing of what is in its files: names, attributes and sizes only.
    #[must_use]
    pub fn without_content(mut self) -> Self {
        for entry in self.entries.values_mut() {
            entry.blocks.clear();
            entry.data.clear();
        }
        self
    }

    /// What lies at and below a path, as a tree whose root is that path.
    #[must_use]
    pub fn below(&self, path: &str) -> Self {
        let prefix = [path.as_bytes(), b"/"].concat();
        let strip = |full: &Vec<u8>| -> Option<Vec<u8>> {
            if full == path.as_bytes() {
                return Some(Vec::new());
            }
            full.strip_prefix(prefix.as_slice()).map(<[u8]>::to_vec)
        };
        let mut entries: BTreeMap<Vec<u8>, Entry> = BTreeMap::new();
        // Links from outside of the subtree must not name its groups.
        let mut groups: BTreeMap<&[u8], Vec<u8>> = BTreeMap::new();
        for (full, entry) in &self.entries {
            let Some(path) = strip(full) else { continue };
            let group = groups
                .entry(&entry.group)
                .or_insert_with(|| path.clone())
                .clone();
            entries.insert(
                path,
                Entry {
                    group,
                    ..entry.clone()
                },
            );
        }
        Self { entries }
    }
}

/// One thing that is not equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Path below the root, "." for the root.
    pub path: String,
    /// What differs, with both sides.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.what)
    }
}

/// Compares what is below two directories.
pub fn compare(expected: &Path, found: &Path) -> Vec<Difference> {
    differences(&Tree::read(expected), &Tree::read(found))
}

/// Panics with the differences, the first 40 of them, if there is any.
pub fn assert_equal(expected: &Tree, found: &Tree, context: &str) {
    let all = differences(expected, found);
    assert!(all.is_empty(), "{context}: {}", listing(&all));
}

/// The differences as lines; long lists are cut.
pub fn listing(all: &[Difference]) -> String {
    const SHOWN: usize = 40;
    let mut text = format!("{} differences (expected / found)", all.len());
    for difference in all.iter().take(SHOWN) {
        text.push_str("\n  ");
        text.push_str(&difference.to_string());
    }
    if all.len() > SHOWN {
        text.push_str("\n  ...");
    }
    text
}
