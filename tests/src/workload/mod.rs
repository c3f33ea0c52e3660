//! Random operations by several threads on a real filesystem.
//!
//! All threads work on the same names, few enough that they meet: an operation that finds nothing to
//! work on, or is in another's way, is simply none. The seed decides what each thread tries; what
//! comes of it depends on the scheduler too, so a seed brings back the kind of a run, not each byte.
//! Everything stays within the directory that is given: no symlink is followed.

mod attributes;
mod content;
mod names;
mod worker;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::report::say;
use worker::Worker;

/// One kind of operation: its name, how often it is tried beside the others, what it does.
struct Operation {
    name: &'static str,
    weight: u32,
    run: fn(&mut Worker) -> io::Result<()>,
}

const fn operation(
    name: &'static str,
    weight: u32,
    run: fn(&mut Worker) -> io::Result<()>,
) -> Operation {
    Operation { name, weight, run }
}

const TABLES: [&[Operation]; 3] = [
    names::OPERATIONS,
    content::OPERATIONS,
    attributes::OPERATIONS,
];

/// Errors that operations of others and a random choice of names bring with them.
const EXPECTED: &[i32] = &[
    libc::ENOENT,
    libc::EEXIST,
    libc::ENOTEMPTY,
    libc::ENOTDIR,
    libc::EISDIR,
    libc::EPERM,
    libc::EACCES,
    libc::EINVAL,
    libc::EBUSY,
    libc::ELOOP,
    libc::EMLINK,
    libc::ENODATA,
    libc::ENXIO,
    libc::ENODEV,
    libc::ENOSPC,
    libc::EOPNOTSUPP,
    libc::EAGAIN,
    libc::ETXTBSY,
    libc::ESPIPE,
    libc::EBADF,
];

/// The seed of this run: `HSM_SEED`, or a new one. It is printed.
pub fn seed() -> u64 {
    let seed = match std::env::var("HSM_SEED") {
        Ok(text) => text.parse().expect("HSM_SEED is a number"),
        Err(_) => rand::random::<u32>().into(),
    };
    say(format_args!("HSM_SEED={seed} brings this run back"));
    seed
}

/// How many rounds: `HSM_ROUNDS`, or so many.
pub fn rounds(default: u32) -> u32 {
    match std::env::var("HSM_ROUNDS") {
        Ok(text) => text.parse().expect("HSM_ROUNDS is a number"),
        Err(_) => default,
    }
}

/// How often each operation succeeded.
pub type Counts = BTreeMap<&'static str, u64>;

/// Threads that work until they are stopped or have done their number of operations.
pub struct Workload {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Counts>>,
}

impl Workload {
    /// Starts so many threads in a directory, each to try so many operations.
    pub fn start(root: &Path, seed: u64, threads: u64, operations: u64) -> Self {
        Self::begin(root, seed, threads, operations, Duration::ZERO)
    }

    /// Starts so many threads that pause after each operation, until they are stopped: what rests meanwhile comes
    /// into the log, and can be released.
    pub fn start_slowly(root: &Path, seed: u64, threads: u64, pause: Duration) -> Self {
        Self::begin(root, seed, threads, u64::MAX, pause)
    }

    fn begin(root: &Path, seed: u64, threads: u64, operations: u64, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let threads = (0..threads)
            .map(|number| {
                let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
                let random = StdRng::seed_from_u64(seed.wrapping_add(number << 32));
                let worker = Worker::new(root.to_owned(), number, random);
                thread::spawn(move || work(worker, operations, pause, &stop, &done))
            })
            .collect();
        Self {
            stop,
            done,
            threads,
        }
    }

    /// How many operations were tried so far, by all threads.
    pub fn tried(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until all is done; says how often each operation succeeded.
    pub fn finish(self) -> Counts {
        let mut all = Counts::new();
        for thread in self.threads {
            let counts = thread.join().expect("a workload's thread failed");
            for (name, count) in counts {
                *all.entry(name).or_default() += count;
            }
        }
        all
    }

    /// Stops the threads and waits for them.
    pub fn stop(self) -> Counts {
        self.stop.store(true, Ordering::Relaxed);
        self.finish()
    }
}

fn work(
    mut worker: Worker,
    operations: u64,
    pause: Duration,
    stop: &AtomicBool,
    done: &AtomicU64,
) -> Counts {
    let all: Vec<&Operation> = TABLES.iter().copied().flatten().collect();
    let weights: u32 = all.iter().map(|operation| operation.weight).sum();
    let mut counts: Counts = all.iter().map(|operation| (operation.name, 0)).collect();
    for _ in 0..operations {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let mut drawn = worker.below(weights.into());
        let chosen = all.iter().find(|operation| {
            let hit = drawn < u64::from(operation.weight);
            drawn = drawn.saturating_sub(operation.weight.into());
            hit
        });
        let operation = chosen.expect("the weights add up");
        match (operation.run)(&mut worker) {
            Ok(()) => *counts.entry(operation.name).or_default() += 1,
            Err(e) if e.raw_os_error().is_some_and(|no| EXPECTED.contains(&no)) => {}
            Err(e) => panic!("{}: {e}", operation.name),
        }
        done.fetch_add(1, Ordering::Relaxed);
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
    counts
}
