//! Files beside a model of them in memory: a workload that knows at each moment what it must read.
//!
//! Each thread has a directory of its own and does one thing after the other, so its model is exact, while
//! the daemon releases, recalls and is killed. What the kernel refuses because a guard was killed (EBUSY)
//! has not happened; every later look at the file proves that. Nothing is left out of the comparison.
//!
//! Compared at once: bytes, sizes, modes, attributes, and modification times of open files. At the end the
//! whole tree, hard links too, on the disk and as it is replayed.

mod model;
mod operations;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::stubs::is_for_later;
use crate::workload::Counts;
use operations::{Hand, Operation, TABLE};

/// Who gets EBUSY for so long gets nothing else.
const PATIENCE: Duration = Duration::from_mins(1);
/// Pauses after an operation with a file that was not released, so that it comes to rest and is: after a change,
/// and after another one.
const REST: Duration = Duration::from_millis(100);
const BREATH: Duration = Duration::from_millis(2);
/// Files of a thread at first.
const FILES: usize = 24;
/// Where all of it is, below the filesystem's root.
pub const DIRECTORY: &str = "shadow";

/// See the module.
pub struct Shadow {
    hands: Vec<Hand>,
}

impl Shadow {
    /// So many threads' directories, empty. `asked_by_path`: the kernel asks about who cuts a file by its path. Where
    /// it does not, files are not made longer that way, or cut while they come back: hsm(7) says why.
    pub fn new(root: &Path, seed: u64, threads: u64, asked_by_path: bool) -> Self {
        let hand = |number: u64| {
            let dir = root.join(DIRECTORY).join(number.to_string());
            for below in operations::DIRECTORIES {
                fs::create_dir_all(dir.join(below)).expect("a directory");
            }
            let random = StdRng::seed_from_u64(seed.wrapping_add(number << 32));
            Hand::new(dir, random, asked_by_path)
        };
        Self {
            hands: (0..threads).map(hand).collect(),
        }
    }

    /// Makes files for the threads to work with.
    pub fn fill(&mut self) {
        for hand in &mut self.hands {
            while hand.model.count() < FILES {
                match operations::create(hand) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => panic!("a file is not made: {error}"),
                }
            }
        }
    }

    /// All threads work until `over`, or each has tried so many operations.
    pub fn work(&mut self, operations: u64, over: &AtomicBool) -> Done {
        let mut done = Done::default();
        thread::scope(|scope| {
            let work = |hand| scope.spawn(move || work(hand, operations, over));
            let threads: Vec<_> = self.hands.iter_mut().map(work).collect();
            for thread in threads {
                let one = thread.join();
                done.add(&one.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
        });
        done
    }

    /// Closes all files that are held open.
    pub fn let_go(&mut self) {
        for hand in &mut self.hands {
            while operations::let_go(hand).is_ok() {}
        }
    }

    /// Compares all of it with what lies below `root`: the watched filesystem, or one that was replayed.
    pub fn compare(&mut self, root: &Path, context: &str) {
        for (number, hand) in self.hands.iter_mut().enumerate() {
            let dir = root.join(DIRECTORY).join(number.to_string());
            compare(hand, &dir, context);
        }
    }
}

/// What was done.
#[derive(Default)]
pub struct Done {
    /// How often each operation was done.
    pub all: Counts,
    /// How often with a released file.
    pub with_stubs: Counts,
    /// How often one was refused with EBUSY.
    pub refused: u64,
}

impl Done {
    /// Operations with released files.
    pub fn count_with_stubs(&self) -> u64 {
        self.with_stubs.values().sum()
    }

    fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.all, &other.all),
            (&mut self.with_stubs, &other.with_stubs),
        ];
        for (sums, counts) in pairs {
            for (name, count) in counts {
                *sums.entry(name).or_default() += count;
            }
        }
        self.refused += other.refused;
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} operations, {} with released files, {} refused",
            self.all.values().sum::<u64>(),
            self.count_with_stubs(),
            self.refused
        )
    }
}

fn work(hand: &mut Hand, operations: u64, over: &AtomicBool) -> Done {
    let mut done = Done::default();
    let weights: u64 = TABLE.iter().map(|operation| operation.weight).sum();
    for _ in 0..operations {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let mut drawn = hand.below(weights);
        let hit = |operation: &&Operation| {
            let hit = drawn < operation.weight;
            drawn = drawn.saturating_sub(operation.weight);
            hit
        };
        let operation = TABLE.iter().find(hit).expect("the weights add up");
        hand.met_stub = false;
        match (operation.run)(hand) {
            Ok(()) => {
                *done.all.entry(operation.name).or_default() += 1;
                if hand.met_stub {
                    *done.with_stubs.entry(operation.name).or_default() += 1;
                } else {
                    thread::sleep(if operation.changes { REST } else { BREATH });
                }
            }
            Err(error) if is_for_later(&error) => done.refused += 1,
            // There was nothing to do it with.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => panic!("{}: {error}\n{}", operation.name, hand.story()),
        }
    }
    done
}

/// Tries again where the guard was just changed.
fn patiently<T>(path: &Path, mut act: impl FnMut() -> io::Result<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        match act() {
            Ok(done) => return done,
            Err(error) if is_for_later(&error) && Instant::now() < end => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
}

/// The names of everything below a directory that is none itself.
fn names_below(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(at) = left.pop() {
        for entry in fs::read_dir(&at).expect("a directory").flatten() {
            let path = entry.path();
            if path.is_dir() {
                left.push(path);
                continue;
            }
            let name = path.strip_prefix(dir).expect("below it");
            names.push(name.to_str().expect("ASCII").to_owned());
        }
    }
    names.sort();
    names
}

fn compare(hand: &mut Hand, dir: &Path, context: &str) {
    assert_eq!(
        names_below(dir),
        hand.model.names(),
        "{context}: names below {}",
        dir.display()
    );
    let mut inodes: BTreeMap<u64, usize> = BTreeMap::new();
    let mut places: BTreeMap<usize, u64> = BTreeMap::new();
    for name in hand.model.names() {
        let path: PathBuf = dir.join(&name);
        let (file, bytes) = patiently(&path, || {
            let file = File::open(&path)?;
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut &file, &mut bytes)?;
            Ok((file, bytes))
        });
        let meta = file.metadata().expect("its attributes");
        let (id, inode) = hand.model.at(&name).expect("a name of the model");
        let here = format!("{context}: {}", path.display());
        inode.expect_bytes(0, &bytes, usize::MAX, &here);
        inode.expect_attributes(&path, &meta, &here);
        inode.expect_mtime(&meta, &here);
        let same = *inodes.entry(meta.ino()).or_insert(id) == id
            && *places.entry(id).or_insert(meta.ino()) == meta.ino();
        assert!(same, "{here}: other hard links: {}", inode.story());
    }
}
