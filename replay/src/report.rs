//! What a replay says beside its result: progress, and everything that is not as it was logged.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// Something of the tree that is not restored (or, when verifying, that differs).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Loss {
    /// The file's path below the root, bytes.
    pub path: Vec<u8>,
    /// What is lost.
    pub what: Lost,
}

/// What is lost of a file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Lost {
    /// The whole entry.
    Entry {
        /// Why.
        why: String,
    },
    /// Bytes of content; the file has a hole there.
    Bytes {
        /// Where they begin.
        offset: u64,
        /// How many.
        len: u64,
        /// What each copy said.
        why: String,
    },
    /// An attribute: "owner", "extended attribute user.x" and so on.
    Attribute {
        /// Which.
        what: String,
        /// Why.
        why: String,
    },
    /// A name of a file that has others.
    Name {
        /// Why.
        why: String,
    },
    /// The end of the log: nobody knows what stood there.
    Tail {
        /// What is damaged.
        why: String,
    },
    /// What the log itself says cannot be brought back.
    Unrestorable {
        /// Which property.
        what: String,
    },
    /// Verifying: the tree differs.
    Differs {
        /// How.
        how: String,
    },
}

/// A path as text: bytes that are not printable ASCII or UTF-8 are escaped.
pub fn printable(path: &[u8]) -> String {
    match std::str::from_utf8(path) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => path.escape_ascii().to_string(),
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = printable(&self.path);
        let path = if path.is_empty() { "." } else { &path };
        match &self.what {
            Lost::Entry { why } => write!(f, "{path}: not restored: {why}"),
            Lost::Bytes { offset, len, why } => {
                write!(f, "{path}: {len} bytes at {offset} are lost: {why}")
            }
            Lost::Attribute { what, why } => write!(f, "{path}: {what} not restored: {why}"),
            Lost::Name { why } => write!(f, "{path}: this further name is not restored: {why}"),
            Lost::Tail { why } => write!(f, "the end of the log may be lost: {why}"),
            Lost::Unrestorable { what } => write!(f, "{path}: {what}"),
            Lost::Differs { how } => write!(f, "{path}: {how}"),
        }
    }
}

/// A part of the work, for progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading the log's transactions; counts segments.
    Fold,
    /// Making directories, links and so on; counts entries.
    Names,
    /// Fetching and writing content; counts bytes of content.
    Content,
    /// Setting the directories' attributes; counts directories.
    Directories,
    /// Waiting for the disk.
    Sync,
    /// Comparing an existing tree; counts entries.
    Verify,
}

/// What a caller wants to hear while it waits. All methods may be called from several threads.
pub trait Watch: Send + Sync {
    /// A stage begins; `total` in its own unit, where it is known.
    fn begin(&self, _stage: Stage, _total: Option<u64>) {}
    /// So much more of the stage is done.
    fn advance(&self, _by: u64) {}
    /// Something was lost, just now. It is in the final report, too.
    fn loss(&self, _loss: &Loss) {}
    /// Something to know that loses nothing by itself.
    fn warning(&self, _text: &str) {}
    /// True where the work shall stop at the next good moment.
    fn stop(&self) -> bool {
        false
    }
}

/// A watcher that hears nothing.
pub struct Silent;

impl Watch for Silent {}

/// The most findings of one sort that are kept for the end; all of them go to the [`Watch`].
pub const KEPT_MAX: usize = 100_000;

/// What was found on the way.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Findings {
    /// In the order in which they were met; at most [`KEPT_MAX`].
    pub losses: Vec<Loss>,
    /// How many there were in all.
    pub losses_total: u64,
    /// Paths of files whose version was logged while it changed; at most [`KEPT_MAX`].
    pub fuzzy: Vec<Vec<u8>>,
    /// How many there were in all.
    pub fuzzy_total: u64,
    /// What is odd without loss: missing segments that nothing needs, healed damage.
    pub warnings: Vec<String>,
}

/// The most warnings that are kept.
const WARNINGS_MAX: usize = 1000;

/// What an earlier run found.
#[derive(Default)]
struct Carried {
    losses: HashSet<Loss>,
    fuzzy: HashSet<Vec<u8>>,
}

/// Collects findings from several threads and passes them on.
pub struct Collector<'w> {
    watch: &'w dyn Watch,
    found: Mutex<Findings>,
    carried: Mutex<Carried>,
}

impl<'w> Collector<'w> {
    /// An empty collection.
    pub fn new(watch: &'w dyn Watch) -> Self {
        Self {
            watch,
            found: Mutex::default(),
            carried: Mutex::default(),
        }
    }

    /// Who listens.
    pub fn watch(&self) -> &'w dyn Watch {
        self.watch
    }

    fn with<T>(&self, change: impl FnOnce(&mut Findings) -> T) -> T {
        // What a panicking thread left there is still true.
        change(&mut self.found.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes over what an earlier run found: it is reported again, and not twice where this run meets
    /// the same.
    pub fn carry(&self, earlier: Findings) {
        for loss in &earlier.losses {
            self.add_loss(loss.clone());
        }
        for path in &earlier.fuzzy {
            self.add_fuzzy(path.clone());
        }
        let mut carried = self.carried.lock().unwrap_or_else(PoisonError::into_inner);
        carried.losses.extend(earlier.losses);
        carried.fuzzy.extend(earlier.fuzzy);
    }

    fn is_carried(&self, ask: impl FnOnce(&Carried) -> bool) -> bool {
        ask(&self.carried.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Notes a loss.
    pub fn loss(&self, path: Vec<u8>, what: Lost) {
        let loss = Loss { path, what };
        if !self.is_carried(|carried| carried.losses.contains(&loss)) {
            self.add_loss(loss);
        }
    }

    fn add_loss(&self, loss: Loss) {
        self.watch.loss(&loss);
        self.with(|found| {
            found.losses_total += 1;
            if found.losses.len() < KEPT_MAX {
                found.losses.push(loss);
            }
        });
    }

    /// Notes a version that was logged while it changed.
    pub fn fuzzy(&self, path: Vec<u8>) {
        if !self.is_carried(|carried| carried.fuzzy.contains(&path)) {
            self.add_fuzzy(path);
        }
    }

    fn add_fuzzy(&self, path: Vec<u8>) {
        self.with(|found| {
            found.fuzzy_total += 1;
            if found.fuzzy.len() < KEPT_MAX {
                found.fuzzy.push(path);
            }
        });
    }

    /// Notes a warning, once.
    pub fn warning(&self, text: &str) {
        let fresh = self.with(|found| {
            let fresh = !found.warnings.iter().any(|known| known == text);
            if fresh && found.warnings.len() < WARNINGS_MAX {
                found.warnings.push(text.to_owned());
            }
            fresh
        });
        if fresh {
            self.watch.warning(text);
        }
    }

    /// Everything so far.
    pub fn so_far(&self) -> Findings {
        self.with(|found| found.clone())
    }

    /// Everything.
    pub fn finish(self) -> Findings {
        self.found
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
