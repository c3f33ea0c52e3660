//! Who has which segment, over a catalog that says so.

use std::fmt::Write as _;
use std::path::PathBuf;

use tierfs::catalog::{Catalog, Place};
use tierfs::record::{Filesystem, Op, Txn, Volume};
use tierfs::{Epoch, LogId};

use super::*;

const ONE: &str = "1111111111111111";
const TWO: &str = "2222222222222222";

struct World {
    dir: tempfile::TempDir,
    catalog: Catalog,
}

fn no(number: u64) -> SegmentNo {
    SegmentNo::new(number).unwrap()
}

fn lsn(number: u64) -> Lsn {
    Lsn::new(number).unwrap()
}

impl World {
    /// Three segments of ten transactions each, which left the spool long ago.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut catalog = Catalog::create(&dir.path().join("c.db"), LogId([7; 16])).unwrap();
        for number in 1..=3 {
            catalog.add_segment(&Self::segment(number)).unwrap();
        }
        catalog.commit().unwrap();
        Self { dir, catalog }
    }

    fn segment(number: u64) -> SegmentRow {
        SegmentRow {
            segment: no(number),
            hash: Hash([9; 32]),
            bytes: 1000,
            epoch: Epoch(3),
            first_lsn: lsn(number * 10 - 9),
            last_lsn: Some(lsn(number * 10)),
            sealed: Time::default(),
        }
    }

    fn place(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn config(&self, pools: &[(&str, &[&str])]) -> Config {
        let at = |name: &str| self.dir.path().join(name).display().to_string();
        let mut text = format!(
            "mount = \"{}\"\nspool = \"{}\"\ncatalog = \"{}\"\n",
            at("mnt"),
            at("spool"),
            at("c.db")
        );
        for (name, volumes) in pools {
            let volumes: Vec<String> = volumes.iter().map(|name| at(name)).collect();
            let _ = write!(text, "[[pool]]\nname = \"{name}\"\nvolumes = {volumes:?}\n");
        }
        Config::parse(&self.place("hsmd.toml"), &text).unwrap()
    }

    /// The log says that a volume of a pool stood at a place.
    fn joined(&mut self, serial: &str, pool: &str, place: &str) {
        let place = self.place(place).as_os_str().as_bytes().to_vec();
        let volume = Op::Volume(Volume {
            serial: serial.to_owned(),
            pool: pool.to_owned(),
            backend: "directory".to_owned(),
            state: "filling".to_owned(),
            place: Some(place),
        });
        let lsn = Lsn::after(self.catalog.folded());
        let mut ops = vec![volume];
        if lsn == Lsn::FIRST {
            ops.insert(
                0,
                Op::Filesystem(Filesystem {
                    uuid: [1; 16],
                    fs_type: "ext4".to_owned(),
                    mount: None,
                }),
            );
        }
        let txn = Txn {
            lsn,
            time: Time::default(),
            wall: Time::default(),
            ops,
        };
        let place = Place {
            segment: SegmentNo::FIRST,
            frame_offset: 0,
        };
        self.catalog.apply(&txn, place).unwrap();
        self.catalog.commit().unwrap();
    }

    fn remember(&mut self, rows: impl IntoIterator<Item = CopyRow>) {
        for row in rows {
            self.catalog.set_copy(&row).unwrap();
        }
        self.catalog.commit().unwrap();
    }

    fn copies(&mut self, serial: &str, segments: std::ops::RangeInclusive<u64>) {
        let rows = segments.map(|number| {
            let verified = i64::try_from(number).unwrap() * 100;
            let verified = Time {
                seconds: verified,
                nanos: 0,
            };
            copy_row(no(number), serial, VERIFIED, Some(verified))
        });
        self.remember(rows.collect::<Vec<_>>());
    }

    fn open(&self, pools: &[(&str, &[&str])]) -> (Arc<Shared>, Board) {
        let shared = Arc::new(Shared::new(std::time::Duration::ZERO));
        let config = self.config(pools);
        let board = Board::open(shared.clone(), &config, self.catalog.queries(), &[]).unwrap();
        (shared, board)
    }
}

fn view(board: &Board, pool: &str) -> PoolView {
    let pools = board.pools();
    pools.into_iter().find(|view| view.name == pool).unwrap()
}

fn numbers(board: &Board, pool: &str) -> Vec<u64> {
    let first = board.missing(pool, None);
    let next = |due: &Due| board.missing(pool, Some(due.no));
    let all = std::iter::successors(first, next);
    all.map(|due| due.no.get()).collect()
}

fn set(numbers: &[u64]) -> BTreeSet<SegmentNo> {
    numbers.iter().map(|number| no(*number)).collect()
}

#[test]
fn with_an_empty_spool_a_pool_still_has_what_it_had() {
    let mut world = World::new();
    world.joined(ONE, "a", "vol1");
    world.copies(ONE, 1..=3);
    let (_, board) = world.open(&[("a", &["vol1"])]);
    let pool = view(&board, "a");
    assert_eq!((pool.copied_lsn, pool.lacks), (30, (0, 0)));
    assert!(board.copied(30) && !board.copied(31));
    let volume = &pool.volumes[0];
    assert_eq!(
        (volume.segments, volume.bytes, volume.damaged),
        (3, 3000, 0)
    );
    assert_eq!(volume.serial.as_deref(), Some(ONE));
    assert_eq!(volume.verified.map(|time| time.seconds), Some(100));
}

#[test]
fn a_pool_that_comes_late_lacks_everything() {
    let mut world = World::new();
    world.joined(ONE, "a", "vol1");
    world.copies(ONE, 1..=3);
    let (_, board) = world.open(&[("a", &["vol1"]), ("b", &["vol2"])]);
    assert_eq!(numbers(&board, "a"), Vec::<u64>::new());
    assert_eq!(numbers(&board, "b"), [1, 2, 3]);
    assert_eq!(view(&board, "b").copied_lsn, 0);
    assert_eq!(view(&board, "b").lacks, (3, 3000));
    assert_eq!(board.places(no(2)), [world.place("vol1")]);
    let _ = board.has("b", TWO, no(1));
    assert_eq!(view(&board, "b").copied_lsn, 10);
    let _ = board.has("b", TWO, no(3));
    assert_eq!(view(&board, "b").copied_lsn, 10, "there is a gap");
    let _ = board.has("b", TWO, no(2));
    assert_eq!(view(&board, "b").copied_lsn, 30);
    assert_eq!(numbers(&board, "b"), Vec::<u64>::new());
}

#[test]
fn a_volume_counts_as_long_as_its_place_is_configured() {
    let mut world = World::new();
    world.joined(ONE, "a", "vol1");
    world.copies(ONE, 1..=3);
    // Another disk took its place, as disks that are rotated do.
    world.joined(TWO, "a", "vol1");
    assert_eq!(
        numbers(&world.open(&[("a", &["vol1"])]).1, "a"),
        Vec::<u64>::new()
    );
    // It is lost for good, and another directory is to replace it.
    let (_, board) = world.open(&[("a", &["new"])]);
    assert_eq!(numbers(&board, "a"), [1, 2, 3]);
    assert_eq!(view(&board, "a").copied_lsn, 0);
    // Found again, at yet another place.
    let rows = board.inventory("a", ONE, &set(&[1, 2, 3]), &set(&[]));
    assert_eq!((rows.len(), numbers(&board, "a").len()), (0, 0));
}

#[test]
fn damage_takes_a_copy_away_and_is_remembered() {
    let mut world = World::new();
    world.joined(ONE, "a", "vol1");
    world.copies(ONE, 1..=3);
    let (shared, board) = world.open(&[("a", &["vol1"])]);
    let row = board.verified(ONE, no(2), Found::Damaged);
    world.remember([row]);
    drop(board);
    assert!(shared.troubles().iter().any(|(_, trouble)| trouble.severe));

    let (shared, board) = world.open(&[("a", &["vol1"])]);
    let pool = view(&board, "a");
    assert_eq!((pool.copied_lsn, pool.volumes[0].damaged), (10, 1));
    assert_eq!(numbers(&board, "a"), [2]);
    assert!(board.is_damaged("a", ONE, no(2)) && board.places(no(2)).is_empty());
    let troubles = shared.troubles();
    let (_, trouble) = &troubles[0];
    assert!(trouble.what.contains(ONE) && trouble.why.contains("segment 2"));
    assert!(trouble.severe && trouble.todo.contains("add an empty directory"));
    // That the inventory lists it does not make it good.
    let rows = board.inventory("a", ONE, &set(&[1, 2, 3]), &set(&[]));
    assert_eq!((rows.len(), numbers(&board, "a")), (0, vec![2]));

    // Another volume of the pool gets it.
    let _ = board.has("a", TWO, no(2));
    assert_eq!(view(&board, "a").copied_lsn, 30);
    let troubles = shared.troubles();
    assert!(!troubles[0].1.severe && troubles[0].1.todo.contains("replace this disk"));
    // A check finds it good after all.
    let row = board.verified(ONE, no(2), Found::Good);
    assert_eq!(row.state, VERIFIED);
    assert!(shared.troubles().is_empty());
    assert_eq!(view(&board, "a").volumes[0].damaged, 0);
}

#[test]
fn what_is_gone_from_a_volume_is_copied_again() {
    let mut world = World::new();
    world.joined(ONE, "a", "vol1");
    world.copies(ONE, 1..=3);
    let (shared, board) = world.open(&[("a", &["vol1"])]);
    let rows = board.inventory("a", ONE, &set(&[1, 3]), &set(&[]));
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].segment, rows[0].state.as_str()), (no(2), LOST));
    assert_eq!(numbers(&board, "a"), [2]);
    assert!(shared.troubles().is_empty(), "it can be put back");
    world.remember(rows);
    assert_eq!(numbers(&world.open(&[("a", &["vol1"])]).1, "a"), [2]);
    let row = board.verified(ONE, no(3), Found::Gone);
    assert_eq!(
        (row.state.as_str(), numbers(&board, "a")),
        (LOST, vec![2, 3])
    );
}

#[test]
fn after_a_rebuild_the_inventories_say_what_there_is() {
    let mut world = World::new();
    world.joined(ONE, "a", "vol1");
    let (_, board) = world.open(&[("a", &["vol1"])]);
    assert_eq!(view(&board, "a").copied_lsn, 0);
    let rows = board.inventory("a", ONE, &set(&[1, 2]), &set(&[3]));
    assert_eq!(rows.len(), 3);
    let pool = view(&board, "a");
    assert_eq!((pool.copied_lsn, pool.volumes[0].damaged), (20, 1));
    assert_eq!(pool.volumes[0].verified, None, "they are only listed");
    world.remember(rows);
    let (_, board) = world.open(&[("a", &["vol1"])]);
    assert_eq!(view(&board, "a").copied_lsn, 20);
}

#[test]
fn what_is_in_the_spool_may_leave_it_when_all_have_it() {
    let shared = Arc::new(Shared::new(std::time::Duration::ZERO));
    let board = Board::new(shared, &["a".to_owned(), "b".to_owned()]);
    let row = World::segment(1);
    board.add(Due::from(&row));
    let _ = board.has("a", ONE, no(1));
    assert!(board.dispensable(100).is_empty());
    let _ = board.has("b", TWO, no(1));
    assert!(board.dispensable(9).is_empty());
    assert_eq!(board.dispensable(10), [no(1)]);
    board.left_spool(no(1));
    assert!(board.dispensable(10).is_empty() && board.copied(10));
}
