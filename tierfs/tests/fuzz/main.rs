//! Hostile segments: bytes are changed at random, below right hashes as well as above them, and every
//! reader must neither panic nor take memory beyond a multiple of the input, nor hang.
//!
//! Runs for ten seconds, or for `HSM_FUZZ_SECONDS`. `HSM_SEED` runs one case again.

// Helpers of tests, outside #[test] functions.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation
)]
#![allow(unsafe_code)] // an allocator that counts

mod mutate;
mod target;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tierfs::disk::sim::Rng;

/// Counts what is allocated at the moment, and the most there was.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A frame's worth of records, decoded, may take this much; the rest grows with the input.
const MEMORY: usize = 192 << 20;
const TIME: Duration = Duration::from_secs(20);

fn one(seed: u64, corpus: &[mutate::Parts]) {
    let mut rng = Rng(seed);
    let parts = &corpus[rng.below(corpus.len() as u64) as usize];
    let bytes = mutate::mutate(parts, &mut rng);
    let (before, begun) = (NOW.load(Ordering::Relaxed), Instant::now());
    PEAK.store(before, Ordering::Relaxed);
    target::read(&bytes);
    let peak = PEAK.load(Ordering::Relaxed) - before;
    let bound = MEMORY + bytes.len() * 32;
    assert!(
        peak < bound,
        "{peak} bytes of memory for {} bytes",
        bytes.len()
    );
    assert!(begun.elapsed() < TIME, "{:?}", begun.elapsed());
}

#[test]
fn no_reader_panics_on_any_bytes() {
    let corpus = mutate::corpus();
    for parts in &corpus {
        // What is put together again unchanged is read.
        assert!(target::read(&parts.assemble()), "the corpus is not valid");
    }
    if let Ok(seed) = std::env::var("HSM_SEED") {
        return one(seed.parse().unwrap(), &corpus);
    }
    let seconds = std::env::var("HSM_FUZZ_SECONDS").map_or(10, |text| text.parse().unwrap());
    let end = Instant::now() + Duration::from_secs(seconds);
    for seed in 0.. {
        let result = std::panic::catch_unwind(|| one(seed, &corpus));
        if let Err(panic) = result {
            eprintln!("failed with HSM_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
        if Instant::now() > end {
            eprintln!("{} cases", seed + 1);
            break;
        }
    }
}
