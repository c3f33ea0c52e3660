//! Flowing back, on a made-up disk: what is asked for, in which order, and when it rests.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;
use tierfs::residency::Stub;

use super::*;

/// What a recall of a file comes to, as long as it is so.
#[derive(Clone)]
enum Will {
    Work,
    /// Once, then it works.
    BeAway,
    Break,
}

#[derive(Default)]
struct Disk {
    /// By id: place in the log, size, and what comes of a recall.
    files: BTreeMap<u64, (u64, u64, Option<Will>)>,
    asked: Vec<u64>,
    used: u64,
    stop_after: Option<usize>,
}

#[derive(Clone)]
struct Fake {
    disk: Arc<Mutex<Disk>>,
    residency: Arc<Mutex<Residency>>,
    shared: Arc<Shared>,
}

impl World for Fake {
    fn look_up(&self, files: &[FileId]) -> Result<Vec<Due>, catalog::Error> {
        let disk = lock(&self.disk);
        let due = files.iter().map(|file| {
            let (place, size, _) = disk.files[&file.get()];
            Due {
                place,
                file: *file,
                size,
            }
        });
        Ok(due.collect())
    }

    fn room(&self) -> Result<(Usage, u8), String> {
        let used = lock(&self.disk).used;
        let available = 1000u64.saturating_sub(used);
        Ok((Usage { used, available }, 80))
    }

    fn ask(&self, handle: &Handle, _: u64, tell: Box<dyn FnOnce(Outcome) + Send>) {
        let id = u64::from(handle.to_bytes()[4]);
        let mut disk = lock(&self.disk);
        disk.asked.push(id);
        if disk.stop_after.is_some_and(|most| disk.asked.len() > most) {
            self.shared.stop();
            return;
        }
        let (_, size, will) = disk.files.get_mut(&id).expect("a file");
        let size = *size;
        match will.take().unwrap_or(Will::Work) {
            Will::Work => {
                disk.used += size;
                lock(&self.residency).note_unmarked(stub(id));
                tell(Outcome::Whole { bytes: size });
            }
            Will::BeAway => tell(Outcome::Failed(libc::EAGAIN, "volume x is away".to_owned())),
            Will::Break => tell(Outcome::Failed(libc::EIO, "damaged".to_owned())),
        }
    }
}

fn id(file: u64) -> FileId {
    FileId::new(file).expect("not 0")
}

fn stub(file: u64) -> Stub {
    let byte = u8::try_from(file).expect("small");
    Stub {
        file: id(file),
        handle: vec![1, 0, 0, 0, byte],
    }
}

/// A disk with these files (place, size, what a recall comes to), the ids from 1 on.
fn rig(files: &[(u64, u64, Option<Will>)]) -> (Fake, Refill, TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let mut list = Residency::open(&dir.path().join("list")).expect("a list");
    let files: BTreeMap<_, _> = (1..).zip(files.iter().cloned()).collect();
    let stubs: Vec<Stub> = files.keys().map(|file| stub(*file)).collect();
    list.take_over(&[1; 16], tierfs::Lsn::FIRST).expect("noted");
    list.add_found(&stubs).expect("added");
    let fake = Fake {
        disk: Arc::new(Mutex::new(Disk {
            files,
            ..Disk::default()
        })),
        residency: Arc::new(Mutex::new(list)),
        shared: Arc::new(Shared::new(Duration::from_millis(20))),
    };
    let mut refill = Refill::new(
        fake.shared.clone(),
        fake.residency.clone(),
        Box::new(fake.clone()),
    );
    refill.pauses = (Duration::from_millis(1), Duration::from_millis(4));
    (fake, refill, dir)
}

fn asked(fake: &Fake) -> Vec<u64> {
    lock(&fake.disk).asked.clone()
}

fn wanted(fake: &Fake) -> bool {
    lock(&fake.residency).wants_refill().expect("read")
}

#[test]
fn it_goes_in_the_order_of_the_log_and_ends_for_good() {
    let (fake, refill, _dir) = rig(&[(30, 1, None), (10, 1, None), (20, 1, None), (5, 1, None)]);
    // Released since.
    lock(&fake.residency).add(&[stub(4)], 7).expect("added");
    let began = AtomicBool::new(false);
    refill.run(&|| {
        if !began.swap(true, Ordering::Relaxed) {
            return false;
        }
        assert_eq!(asked(&fake), [0; 0]);
        let shown = refill.status().expect("shown");
        assert_eq!((shown.files, shown.rests.is_some()), (3, true));
        true
    });
    assert_eq!(asked(&fake), [2, 3, 1]);
    assert!(!wanted(&fake));
    assert_eq!(refill.status(), None);
    refill.run(&|| true);
    assert_eq!(asked(&fake).len(), 3);
}

#[test]
fn what_is_away_is_tried_again_and_what_is_broken_is_not() {
    let away = |place| (place, 1, Some(Will::BeAway));
    let mut files = vec![(1, 1, Some(Will::Break)), (2, 1, None)];
    files.extend((3..60).map(away));
    let (fake, refill, _dir) = rig(&files);
    refill.run(&|| true);
    let mut asked = asked(&fake);
    assert_eq!(
        asked.len(),
        2 + 57 * 2,
        "each that was away twice: {asked:?}"
    );
    asked.sort_unstable();
    asked.dedup();
    assert_eq!(asked.len(), 59);
    assert!(!wanted(&fake));
}

#[test]
fn it_rests_where_nothing_more_fits_and_takes_what_does() {
    let (fake, refill, _dir) = rig(&[(1, 500, None), (2, 400, None), (3, 250, None)]);
    std::thread::scope(|scope| {
        scope.spawn(|| refill.run(&|| true));
        let end = Instant::now() + Duration::from_secs(20);
        let rests = || refill.status().and_then(|shown| shown.rests);
        while !rests().is_some_and(|why| why.contains("75 %")) {
            assert!(Instant::now() < end, "{:?}", refill.status());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(asked(&fake), [1, 3]);
        // Somebody deletes something.
        lock(&fake.disk).used = 300;
    });
    assert_eq!(asked(&fake), [1, 3, 2]);
    assert!(!wanted(&fake));
}

#[test]
fn another_goes_on_where_one_was_killed() {
    let files: Vec<_> = (0..9).map(|n| (100 - n, 1, None)).collect();
    let (fake, refill, _dir) = rig(&files);
    lock(&fake.disk).stop_after = Some(4);
    refill.run(&|| true);
    assert!(wanted(&fake));
    let (disk, residency) = (fake.disk.clone(), fake.residency.clone());
    (lock(&disk).stop_after, lock(&disk).asked) = (None, Vec::new());
    let shared = Arc::new(Shared::new(Duration::from_millis(20)));
    let fake = Fake {
        disk,
        residency: residency.clone(),
        shared: shared.clone(),
    };
    // Released while nobody looked.
    lock(&residency).add(&[stub(1)], 7).expect("added");
    Refill::new(shared, residency, Box::new(fake.clone())).run(&|| true);
    assert_eq!(asked(&fake), [5, 4, 3, 2]);
    assert!(!wanted(&fake));
}
