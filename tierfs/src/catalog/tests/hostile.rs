//! Transactions that no correct writer makes: each is refused by name, and nothing of it stays.

use super::build::*;
use crate::catalog::{Catalog, Error, Refusal};
use crate::ids::{DataId, FileId, Hash};
use crate::layout::{BLOCK, CHUNK};
use crate::record::{Content, Device, Extent, Extents, Inode, Kind, Link, Op, Pin};

/// A root with two directories, one within the other, and three files.
fn sample() -> Catalog {
    let mut catalog = temporary();
    let base = vec![
        data(0, 3 * BLOCK, 1),
        hole(3 * BLOCK, BLOCK),
        data(4 * BLOCK, 100, 7),
    ];
    let [extents, content] = version(5, base);
    fold(
        &mut catalog,
        vec![
            vec![filesystem(1), root()],
            vec![
                inode(2, Kind::Directory),
                link(1, "dir", 2),
                inode(3, Kind::Directory),
                link(2, "below", 3),
                inode(4, Kind::Symlink),
                link(3, "link", 4),
                inode(5, Kind::Regular),
                extents,
                content,
                link(2, "file", 5),
                bind(5, b"handle"),
                inode(6, Kind::Regular),
            ],
            vec![delete(6)],
        ],
    )
    .unwrap();
    catalog
}

/// Applies a transaction that must be refused, after something valid in the same transaction, and
/// checks that nothing of it stays.
fn refused(ops: Vec<Op>) -> Refusal {
    let mut catalog = sample();
    let (digest, counts) = (catalog.digest().unwrap(), catalog.counts());
    let mut all = vec![
        inode(90, Kind::Regular),
        link(1, "fresh", 90),
        unlink(2, "file"),
        xattrs(5, &[("user.a", "b")], false),
    ];
    all.extend(version(5, vec![data(0, 10, 20)]));
    all.extend(ops);
    // The same, with the version of the sample still in place.
    let number = 4;
    let why = refusal(catalog.apply(&txn(number, all), place(number)));
    assert_eq!(catalog.digest().unwrap(), digest, "{why}");
    assert_eq!(catalog.counts(), counts, "{why}");
    assert_eq!(catalog.next_file_id(), id(7));
    fold(
        &mut catalog,
        vec![vec![inode(7, Kind::Fifo), link(1, "goes on", 7)]],
    )
    .unwrap();
    assert!(why.to_string().len() > 10);
    why
}

/// As [`refused`], for a version of file 5 on top of the sample's.
fn refused_version(ops: impl IntoIterator<Item = Op>) -> Refusal {
    let mut catalog = sample();
    let digest = catalog.digest().unwrap();
    let why = refusal(catalog.apply(&txn(4, ops.into_iter().collect()), place(4)));
    assert_eq!(catalog.digest().unwrap(), digest, "{why}");
    why
}

fn content(file: u64, size: u64, base: Option<u64>) -> Op {
    Op::Content(Content {
        file: id(file),
        size,
        base: base.map(lsn),
        root: Hash([0; 32]),
        fuzzy: false,
    })
}

fn extents(file: u64, list: Vec<Extent>) -> Op {
    Op::Extents(Extents {
        file: id(file),
        list,
    })
}

#[test]
fn the_order_of_transactions() {
    let mut catalog = sample();
    for number in [1, 3, 5, u64::MAX >> 1] {
        let mut wrong = txn(4, vec![]);
        wrong.lsn = lsn(number);
        let why = refusal(catalog.apply(&wrong, place(4)));
        assert_eq!(why, Refusal::NotDense { expected: lsn(4) });
    }
    let mut early = txn(4, vec![]);
    early.time = at(29);
    let why = refusal(catalog.apply(&early, place(4)));
    assert!(matches!(why, Refusal::TimeBack { .. }), "{why}");
    early.time = at(30);
    catalog.apply(&early, place(4)).unwrap();
}

#[test]
fn the_message_names_the_transaction_and_the_operation() {
    let error = sample().apply(&txn(4, vec![root(), delete(9)]), place(4));
    let text = error.unwrap_err().to_string();
    for part in [
        "transaction 4",
        "operation 1",
        "file 9 does not exist",
        "tierctl",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn files_that_are_not_there() {
    let gone = Refusal::NoSuchFile(id(6));
    let missing = Refusal::NoSuchFile(id(99));
    assert_eq!(refused(vec![bind(99, b"x")]), missing);
    assert_eq!(refused(vec![xattrs(99, &[], false)]), missing);
    assert_eq!(refused(vec![content(99, 0, None)]), missing);
    assert_eq!(refused(vec![link(1, "n", 99)]), missing);
    assert_eq!(refused(vec![link(99, "n", 5)]), missing);
    assert_eq!(refused(vec![delete(99)]), missing);
    assert_eq!(refused(vec![link(1, "n", 6)]), gone);
    assert_eq!(refused(vec![delete(6)]), gone);
    let far = FileId::new(u64::MAX).unwrap();
    let op = Op::Link(Link {
        parent: FileId::ROOT,
        name: b"n".to_vec(),
        file: far,
    });
    assert_eq!(refused(vec![op]), Refusal::NoSuchFile(far));
}

#[test]
fn ids_are_not_used_again() {
    assert_eq!(
        refused(vec![inode(6, Kind::Regular)]),
        Refusal::Reused(id(6))
    );
    assert_eq!(
        refused(vec![delete(5), inode(5, Kind::Regular)]),
        Refusal::Reused(id(5))
    );
    assert_eq!(
        refused(vec![
            unlink(1, "fresh"),
            delete(90),
            inode(90, Kind::Regular)
        ]),
        Refusal::Reused(id(90))
    );
    assert_eq!(
        refused(vec![inode(u64::MAX, Kind::Regular)]),
        Refusal::TooLarge {
            what: "a file id",
            value: u64::MAX
        }
    );
}

#[test]
fn attributes() {
    let bad = |inode: Inode| {
        let why = refused(vec![Op::Inode(inode)]);
        assert!(matches!(why, Refusal::BadInode { .. }), "{why}");
    };
    let regular = || super::build::attributes(70, Kind::Regular);
    let link = || super::build::attributes(70, Kind::Symlink);
    bad(Inode {
        mode: 0o10000,
        ..regular()
    });
    bad(Inode {
        target: Some(b"x".to_vec()),
        ..regular()
    });
    bad(Inode {
        rdev: Some(Device { major: 1, minor: 1 }),
        ..regular()
    });
    bad(super::build::attributes(70, Kind::BlockDevice));
    for target in [None, Some(vec![]), Some(vec![0]), Some(vec![b'a'; 4097])] {
        bad(Inode { target, ..link() });
    }
    let mut time = regular();
    time.mtime.nanos = 1_000_000_000;
    bad(time);
    assert_eq!(
        refused(vec![inode(5, Kind::Directory)]),
        Refusal::KindChanged {
            file: id(5),
            was: Kind::Regular,
            becomes: Kind::Directory
        }
    );
    let mut empty = temporary();
    let why = refusal(fold(&mut empty, vec![vec![inode(1, Kind::Regular)]]));
    assert!(matches!(why, Refusal::BadInode { .. }), "{why}");
}

#[test]
fn names() {
    let taken = |name: &str| Refusal::NameTaken {
        parent: id(1),
        name: name.into(),
    };
    assert_eq!(refused(vec![link(1, "fresh", 5)]), taken("fresh"));
    assert_eq!(refused(vec![link(1, "dir", 5)]), taken("dir"));
    for name in ["", ".", "..", "a/b", "a\0b", &"n".repeat(256)] {
        let why = refused(vec![link(1, name, 5)]);
        assert_eq!(why, Refusal::BadName { name: name.into() });
    }
    let missing = Refusal::NoSuchName {
        parent: id(1),
        name: b"nowhere".to_vec(),
    };
    assert_eq!(refused(vec![unlink(1, "nowhere")]), missing);
    assert_eq!(
        refused(vec![link(5, "n", 4)]),
        Refusal::NotADirectory(id(5))
    );
    assert_eq!(refused(vec![link(1, "n", 1)]), Refusal::Root);
}

#[test]
fn directories() {
    let twice = |file| Refusal::DirectoryNamedTwice(id(file));
    assert_eq!(refused(vec![link(1, "again", 3)]), twice(3));
    let why = refused(vec![
        inode(91, Kind::Directory),
        link(1, "a", 91),
        link(1, "b", 91),
    ]);
    assert_eq!(why, twice(91));
    // A directory into its own child.
    let why = refused(vec![unlink(1, "dir"), link(3, "dir", 2)]);
    assert!(matches!(why, Refusal::Cycle(_)), "{why}");
    let why = refused(vec![unlink(2, "below"), link(3, "below", 3)]);
    assert_eq!(why, Refusal::Cycle(id(3)));
    // Two new directories within each other, and one that is only above such a cycle.
    let why = refused(vec![
        inode(91, Kind::Directory),
        inode(92, Kind::Directory),
        inode(93, Kind::Directory),
        link(91, "x", 93),
        link(91, "b", 92),
        link(92, "a", 91),
    ]);
    assert!(matches!(why, Refusal::Cycle(_)), "{why}");
}

#[test]
fn deletions() {
    assert_eq!(refused(vec![delete(4)]), Refusal::DeleteNamed(id(4)));
    assert_eq!(refused(vec![delete(1)]), Refusal::Root);
    assert_eq!(
        refused(vec![unlink(1, "dir"), delete(2)]),
        Refusal::DeleteNotEmpty(id(2))
    );
    assert_eq!(
        refused(vec![inode(91, Kind::Regular), delete(91), delete(91)]),
        Refusal::NoSuchFile(id(91))
    );
}

#[test]
fn what_extents_cover() {
    let gap = |expected, found| Refusal::ExtentsGap {
        file: id(5),
        expected,
        found,
    };
    let short = |covered, size| Refusal::ExtentsShort {
        file: id(5),
        covered,
        size,
    };
    let version = |list, size| refused_version([extents(5, list), content(5, size, None)]);
    assert_eq!(version(vec![hole(1, 9)], 10), gap(0, 1));
    assert_eq!(version(vec![hole(0, 5), hole(6, 4)], 10), gap(5, 6));
    assert_eq!(version(vec![hole(0, 5), hole(4, 6)], 10), gap(5, 4));
    assert_eq!(version(vec![hole(0, 0)], 0), gap(0, 0));
    assert_eq!(version(vec![hole(0, 5)], 10), short(5, 10));
    assert_eq!(version(vec![hole(0, 10)], 5), short(10, 5));
    assert_eq!(refused_version([content(5, 1, None)]), short(0, 1));
    let why = version(vec![hole(0, 1), hole(1, u64::MAX)], 3);
    assert!(matches!(why, Refusal::TooLarge { .. }), "{why}");
    let why = version(vec![hole(0, 1 << 63)], 1 << 63);
    assert!(matches!(why, Refusal::TooLarge { .. }), "{why}");
    assert_eq!(
        refused_version([extents(5, vec![hole(0, 5)])]),
        Refusal::ExtentsWithoutContent(id(5))
    );
    assert_eq!(
        refused_version([content(4, 0, None)]),
        Refusal::NotRegular(id(4))
    );
}

#[test]
fn hashes_and_data_ids() {
    let mut extent = data(0, 2 * BLOCK, 1);
    if let Extent::Data { hashes, .. } = &mut extent {
        hashes.pop();
    }
    assert_eq!(
        refused_version([extents(5, vec![extent]), content(5, 2 * BLOCK, None)]),
        Refusal::HashCount {
            file: id(5),
            offset: 0,
            expected: 2,
            found: 1
        }
    );
    let why = refused_version([extents(5, vec![data(0, 5, 1)]), content(5, 5, None)]);
    assert!(matches!(why, Refusal::RootHash { .. }), "{why}");
    // The second chunk's number does not fit.
    let list = vec![data(0, CHUNK + 1, DataId::NUMBER_MAX - 1)];
    let why = refused_version(version(5, list));
    assert!(matches!(why, Refusal::TooLarge { .. }), "{why}");
}

#[test]
fn what_is_unchanged() {
    let base_of = |base: Option<u64>| Refusal::BaseNotCurrent {
        file: id(5),
        base: base.map(lsn),
        current: Some(lsn(2)),
    };
    let list = || extents(5, vec![same(0, BLOCK)]);
    for base in [None, Some(1), Some(3), Some(4)] {
        let why = refused_version([list(), content(5, BLOCK, base)]);
        assert_eq!(why, base_of(base));
    }
    let why = refused_version([content(5, 0, Some(1))]);
    assert_eq!(why, base_of(Some(1)));
    let end = 4 * BLOCK + 101;
    assert_eq!(
        refused_version([extents(5, vec![same(0, end)]), content(5, end, Some(2))]),
        Refusal::SameBeyondBase {
            file: id(5),
            end,
            base_size: end - 1
        }
    );
    // In the middle of a piece: at the end, at the beginning, in the last and short one.
    for (list, offset) in [
        (vec![same(0, 10), hole(10, 5)], 10),
        (vec![hole(0, 10), same(10, BLOCK)], 10),
        (vec![same(0, 4 * BLOCK + 50)], 4 * BLOCK + 50),
    ] {
        let size = list.last().unwrap().range().end();
        assert_eq!(
            refused_version([extents(5, list), content(5, size, Some(2))]),
            Refusal::NotAtAPiece {
                file: id(5),
                offset
            }
        );
    }
    // A wrong root on top of unchanged pieces.
    let why = refused_version([list(), content(5, BLOCK, Some(2))]);
    assert!(matches!(why, Refusal::RootHash { .. }), "{why}");
}

#[test]
fn extended_attributes() {
    let bad = |ops: Vec<Op>| {
        let why = refused(ops);
        assert!(matches!(why, Refusal::BadXattrs { .. }), "{why}");
    };
    bad(vec![xattrs(5, &[("user.b", ""), ("user.a", "")], false)]);
    bad(vec![xattrs(5, &[("user.a", ""), ("user.a", "")], false)]);
    bad(vec![xattrs(5, &[("", "")], false)]);
    bad(vec![xattrs(5, &[("user.\0", "")], false)]);
    bad(vec![xattrs(5, &[(&"n".repeat(256), "")], false)]);
    bad(vec![xattrs(5, &[("trusted.hsm", "")], false)]);
    bad(vec![xattrs(5, &[("user.a", "")], true)]);
    bad(vec![
        xattrs(5, &[("user.b", "")], true),
        xattrs(5, &[], true),
        xattrs(5, &[("user.a", "")], false),
    ]);
}

#[test]
fn a_fork_of_the_log() {
    let mut catalog = sample();
    let row = crate::catalog::SegmentRow {
        segment: segment(1),
        hash: Hash::of(b"one"),
        bytes: 10,
        epoch: EPOCH,
        first_lsn: lsn(1),
        last_lsn: Some(lsn(3)),
        sealed: at(9),
    };
    catalog.add_segment(&row).unwrap();
    catalog.add_segment(&row).unwrap();
    let other = crate::catalog::SegmentRow {
        hash: Hash::of(b"two"),
        ..row
    };
    let error = catalog.add_segment(&other).unwrap_err();
    assert!(matches!(error, Error::Fork { .. }), "{error}");
    let known = catalog.queries().segments(segment(1), 9).unwrap();
    assert_eq!(known, [row]);
}

#[test]
fn only_regular_files_that_exist_are_pinned() {
    let pin = |file: u64, pinned| {
        let file = id(file);
        vec![Op::Pin(Pin { file, pinned })]
    };
    for pinned in [true, false] {
        assert_eq!(refused(pin(99, pinned)), Refusal::NoSuchFile(id(99)));
        assert_eq!(refused(pin(6, pinned)), Refusal::NoSuchFile(id(6)));
        assert_eq!(refused(pin(2, pinned)), Refusal::NotRegular(id(2)));
        assert_eq!(refused(pin(4, pinned)), Refusal::NotRegular(id(4)));
    }
}
