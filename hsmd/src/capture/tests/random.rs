//! Random trees, random order: at rest the catalog holds the tree, whatever was told when.
//!
//! `HSM_SEED` runs one seed again, `HSM_ROUNDS` makes this many times as many.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use tierfs::Time;
use tierfs::disk::sim::Rng;

use super::compare::assert_same;
use super::mover::Mover;
use super::rig::{Rig, below};
use crate::sys::testfs::TestFs;

const ROUNDS: u64 = 3;
const STEPS: u64 = 500;

/// What may go wrong with the events, beside their order and number.
#[derive(Clone, Copy, PartialEq)]
enum Loss {
    /// Every event is told.
    Nothing,
    /// Some are lost, and a sweep follows.
    Events,
    /// The daemon is killed now and then.
    Crash,
}

fn seeds() -> Vec<u64> {
    if let Ok(seed) = std::env::var("HSM_SEED") {
        return vec![seed.parse().expect("HSM_SEED is a number")];
    }
    let more: u64 =
        std::env::var("HSM_ROUNDS").map_or(1, |text| text.parse().expect("HSM_ROUNDS is a number"));
    let first = u64::from(std::process::id()) << 32 | u64::from(Time::now().nanos);
    (0..ROUNDS * more).map(|round| first + round).collect()
}

fn for_seeds(kind: &'static str, run: impl Fn(TestFs, Rng)) {
    for seed in seeds() {
        eprintln!("{kind}: HSM_SEED={seed}");
        let fs = TestFs::new(kind);
        let done = catch_unwind(AssertUnwindSafe(|| run(fs, Rng(seed))));
        if let Err(panic) = done {
            eprintln!("{kind}: failed with HSM_SEED={seed}");
            resume_unwind(panic);
        }
    }
}

/// Everything comes in any order, and the tree moves between any two steps.
fn in_any_order(fs: TestFs, mut rng: Rng, loss: Loss) {
    let mut mover = Mover::new(fs.root(), Rng(rng.number()));
    for _ in 0..rng.below(60) {
        mover.step();
    }
    let before = rng.below(2) == 0;
    let mut rig = Rig::new(fs);
    rig.watched_from(Time::now().seconds - if before { 0 } else { 60 });
    // Adopted while it moves, or at rest.
    rig.sweep();
    if before {
        mover.end();
        rig.settle(&mut rng);
        rig.watched_from(Time::now().seconds - 60);
    }
    let mut lost = !before;
    let result = catch_unwind(AssertUnwindSafe(|| {
        for _ in 0..STEPS {
            step(&mut rig, &mut mover, &mut rng, loss, &mut lost);
        }
        mover.end();
        if lost {
            rig.rest(&mut rng);
            rig.sweep();
        }
        rig.rest(&mut rng);
        if loss == Loss::Nothing {
            assert_same(&rig);
        }
        rig.settle(&mut rng);
        assert_same(&rig);
        assert_eq!(rig.troubles(), [""; 0]);
    }));
    if let Err(panic) = result {
        let from = mover.story.len().saturating_sub(600);
        for line in &mover.story[from..] {
            eprintln!("  {line}");
        }
        resume_unwind(panic);
    }
}

fn step(rig: &mut Rig, mover: &mut Mover, rng: &mut Rng, loss: Loss, lost: &mut bool) {
    match rng.below(100) {
        0..40 => mover.step(),
        40..60 => {
            rig.read_events();
            let count = 1 + below(rng, 12);
            rig.tell(rng, count);
        }
        60..75 => {
            let count = 1 + below(rng, 6);
            rig.work(rng, count);
        }
        75..92 => {
            let (hints, results) = (below(rng, 30), below(rng, 6));
            rig.turn(hints, results);
        }
        92..95 => rig.commit(),
        95 | 96 => rig.walk(),
        97 => drop(rig.sweep()),
        98 if loss == Loss::Events => {
            rig.lose_events();
            *lost = true;
        }
        98 if loss == Loss::Crash => {
            rig.crash();
            *lost = true;
        }
        _ => {}
    }
}

/// The tree moves all the time, in the middle of every step too.
fn while_it_moves(fs: TestFs, mut rng: Rng) {
    let mut mover = Mover::new(fs.root(), Rng(rng.number()));
    let mut rig = Rig::new(fs);
    rig.watched_from(Time::now().seconds - 60);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                mover.step();
            }
            mover.end();
        });
        let done = catch_unwind(AssertUnwindSafe(|| {
            let until = std::time::Instant::now() + std::time::Duration::from_millis(700);
            while std::time::Instant::now() < until {
                rig.read_events();
                let count = 1 + below(&mut rng, 100);
                rig.tell(&mut rng, count);
                rig.work(&mut rng, count);
                rig.turn_in_time(count);
                rig.commit();
                rig.walk();
                if rng.below(50) == 0 {
                    rig.sweep();
                }
            }
        }));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = done {
            resume_unwind(panic);
        }
    });
    rig.settle(&mut rng);
    assert_same(&rig);
    assert_eq!(rig.troubles(), [""; 0]);
}

macro_rules! for_each_filesystem {
    ($($kind:ident)*) => {$(
        mod $kind {
            use super::*;

            const KIND: &str = stringify!($kind);

            #[test]
            fn told_in_any_order() {
                for_seeds(KIND, |fs, rng| in_any_order(fs, rng, Loss::Nothing));
            }

            #[test]
            fn with_events_lost() {
                for_seeds(KIND, |fs, rng| in_any_order(fs, rng, Loss::Events));
            }

            #[test]
            fn killed_now_and_then() {
                for_seeds(KIND, |fs, rng| in_any_order(fs, rng, Loss::Crash));
            }

            #[test]
            fn while_the_tree_moves() {
                for_seeds(KIND, while_it_moves);
            }
        }
    )*};
}

for_each_filesystem!(ext4 xfs btrfs);
