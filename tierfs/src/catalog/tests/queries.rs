//! Single questions whose answers are written out.

use super::build::*;
use crate::catalog::{Catalog, Changes, CopyRow, Error, NameRow};
use crate::ids::{DataId, FileId, Hash, Lsn};
use crate::layout::{BLOCK, CHUNK, Range};
use crate::record::{Bits, Content, Extent, Kind, Op, Volume};

fn one_file(list: Vec<Extent>) -> Catalog {
    let mut catalog = temporary();
    let [extents, content] = version(2, list);
    let txns = vec![
        vec![filesystem(1), root()],
        vec![inode(2, Kind::Regular), extents, content, link(1, "f", 2)],
    ];
    fold(&mut catalog, txns).unwrap();
    catalog
}

fn ranges(catalog: &Catalog, file: u64) -> Vec<(u64, u64, u64, u64)> {
    let rows = catalog.queries().extents(id(file), 0, 1000).unwrap();
    let row = |row: &crate::catalog::ExtentRow| {
        (
            row.range.offset,
            row.range.len,
            row.data.number,
            row.data_offset,
        )
    };
    rows.iter().map(row).collect()
}

#[test]
fn a_row_is_split_where_a_version_keeps_a_part_of_it() {
    let base = vec![data(0, CHUNK + 10, 1)];
    let mut catalog = one_file(base.clone());
    assert_eq!(ranges(&catalog, 2), [(0, CHUNK, 1, 0), (CHUNK, 10, 2, 0)]);
    let list = vec![
        same(0, 2 * BLOCK),
        data(2 * BLOCK, BLOCK, 9),
        same(3 * BLOCK, CHUNK - 3 * BLOCK + 10),
    ];
    let ops = version_on(2, list, Some(lsn(2)), &base);
    fold(&mut catalog, vec![ops.to_vec()]).unwrap();
    let expected = [
        (0, 2 * BLOCK, 1, 0),
        (2 * BLOCK, BLOCK, 9, 0),
        (3 * BLOCK, CHUNK - 3 * BLOCK, 1, 3 * BLOCK),
        (CHUNK, 10, 2, 0),
    ];
    assert_eq!(ranges(&catalog, 2), expected);
    let hashes: usize = catalog
        .queries()
        .extents(id(2), 0, 9)
        .unwrap()
        .iter()
        .map(|row| row.hashes.len())
        .sum();
    assert_eq!(hashes, 16);
    let before = catalog
        .queries()
        .at(lsn(2))
        .unwrap()
        .extents(id(2), 0, 9)
        .unwrap();
    assert_eq!(before[0].range.len, CHUNK);
    assert_eq!(before.len(), 2);
}

#[test]
fn extents_and_pieces_from_an_offset() {
    let end = 40 * CHUNK + 7;
    let mut list = vec![hole(0, BLOCK)];
    list.extend([data(BLOCK, 40 * CHUNK - BLOCK, 1), hole(40 * CHUNK, 7)]);
    let catalog = one_file(list);
    let queries = catalog.queries();
    let first = |from| {
        queries
            .extents(id(2), from, 1)
            .unwrap()
            .first()
            .map(|row| row.range.offset)
    };
    assert_eq!(first(0), Some(BLOCK));
    assert_eq!(first(BLOCK), Some(BLOCK));
    assert_eq!(first(BLOCK + CHUNK - 1), Some(BLOCK));
    assert_eq!(first(BLOCK + CHUNK), Some(BLOCK + CHUNK));
    assert_eq!(first(40 * CHUNK), None);
    let offsets = |from| -> Vec<u64> {
        let pieces = queries.pieces(id(2), from);
        pieces.map(|piece| piece.unwrap().0.offset).collect()
    };
    let all: Vec<u64> = (1..600).map(|n| n * BLOCK).collect();
    assert_eq!(offsets(0), all);
    assert_eq!(offsets(5 * BLOCK + 1), all[4..]);
    assert_eq!(offsets(end), []);
}

#[test]
fn twice_in_one_transaction_keeps_the_last() {
    let mut catalog = one_file(vec![data(0, 100, 1)]);
    let mut ops: Vec<Op> = version(2, vec![data(0, 3 * BLOCK, 2)]).into();
    let first = vec![data(0, 3 * BLOCK, 2)];
    let second = vec![same(0, BLOCK), hole(BLOCK, 5)];
    ops.extend(version_on(2, second, Some(lsn(3)), &first));
    ops.push(inode(2, Kind::Regular));
    fold(&mut catalog, vec![ops]).unwrap();
    assert_eq!(ranges(&catalog, 2), [(0, BLOCK, 2, 0)]);
    let row = catalog.queries().inode(id(2)).unwrap().unwrap();
    assert_eq!((row.size, row.content_lsn), (BLOCK + 5, Some(lsn(3))));
    assert_eq!(catalog.queries().versions_of(id(2)).unwrap().len(), 2);
    let then = catalog.queries().at(lsn(2)).unwrap();
    assert_eq!(then.extents(id(2), 0, 9).unwrap().len(), 1);
    assert_eq!(then.inode(id(2)).unwrap().unwrap().size, 100);
    assert_eq!(catalog.counts().versions, 3);
    assert_eq!(catalog.counts().bytes, BLOCK + 5);
}

#[test]
fn handles_name_one_file_until_the_filesystem_is_made_anew() {
    let mut catalog = one_file(vec![]);
    let find = |catalog: &Catalog, handle: &[u8]| catalog.queries().file_by_handle(handle).unwrap();
    fold(&mut catalog, vec![vec![bind(2, b"h2"), bind(1, b"h1")]]).unwrap();
    assert_eq!(find(&catalog, b"h1"), Some(id(1)));
    assert_eq!(find(&catalog, b"h2"), Some(id(2)));
    let row = catalog.queries().inode(id(2)).unwrap().unwrap();
    assert_eq!(
        (row.handle.as_deref(), row.ino),
        (Some(&b"h2"[..]), Some(2 << 60 | 9))
    );
    // A handle that another file had, and a swap.
    fold(
        &mut catalog,
        vec![vec![inode(3, Kind::Fifo), bind(3, b"h2")]],
    )
    .unwrap();
    assert_eq!(find(&catalog, b"h2"), Some(id(3)));
    assert_eq!(
        catalog.queries().inode(id(2)).unwrap().unwrap().handle,
        None
    );
    fold(&mut catalog, vec![vec![bind(1, b"h2"), bind(3, b"h1")]]).unwrap();
    assert_eq!(find(&catalog, b"h1"), Some(id(3)));
    assert_eq!(find(&catalog, b"h2"), Some(id(1)));
    // The same filesystem made anew has none of them, nor another; its own bindings follow it.
    fold(&mut catalog, vec![vec![filesystem(1)]]).unwrap();
    assert_eq!(find(&catalog, b"h1"), None);
    fold(&mut catalog, vec![vec![bind(1, b"h2"), bind(3, b"h1")]]).unwrap();
    catalog.set_seen(id(3), at(1), 0, at(2)).unwrap();
    fold(
        &mut catalog,
        vec![vec![bind(2, b"lost"), filesystem(2), bind(3, b"new")]],
    )
    .unwrap();
    assert_eq!(find(&catalog, b"h1"), None);
    assert_eq!(find(&catalog, b"h2"), None);
    assert_eq!(find(&catalog, b"lost"), None);
    assert_eq!(find(&catalog, b"new"), Some(id(3)));
    assert_eq!(
        catalog.queries().inode(id(3)).unwrap().unwrap().ctime,
        Some(at(78))
    );
    assert_eq!(catalog.filesystem().unwrap().unwrap().uuid, [2; 16]);
}

#[test]
fn what_a_sweep_saw_counts_until_the_file_changes() {
    let mut catalog = one_file(vec![]);
    let digest = catalog.digest().unwrap();
    let ctime = |catalog: &Catalog| catalog.queries().children(id(1), None, 9).unwrap()[0].ctime;
    assert_eq!(ctime(&catalog), Some(at(78)));
    catalog.set_seen(id(2), at(99), 0, at(100)).unwrap();
    assert_eq!(ctime(&catalog), Some(at(99)));
    assert_eq!(catalog.digest().unwrap(), digest);
    fold(&mut catalog, vec![vec![inode(2, Kind::Regular)]]).unwrap();
    assert_eq!(ctime(&catalog), Some(at(78)));
}

#[test]
fn children_come_in_pages() {
    let mut catalog = temporary();
    let mut ops = vec![root()];
    for file in 2..30 {
        ops.extend([
            inode(file, Kind::Fifo),
            link(1, &format!("{:03}", 100 - file), file),
        ]);
    }
    ops.extend([
        inode(40, Kind::Directory),
        link(1, "d", 40),
        inode(41, Kind::Fifo),
        link(40, "x", 41),
    ]);
    fold(&mut catalog, vec![ops]).unwrap();
    let (mut after, mut all) = (None, Vec::new());
    loop {
        let page = catalog
            .queries()
            .children(id(1), after.as_deref(), 4)
            .unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.name.clone());
        all.extend(page);
    }
    assert_eq!(all.len(), 29);
    assert!(all.is_sorted_by(|a, b| a.name < b.name));
    let fits = |child: &crate::catalog::Child| {
        child.name == b"d" || child.name == format!("{:03}", 100 - child.file.get()).into_bytes()
    };
    assert!(all.iter().all(fits));
    assert_eq!(catalog.queries().resolve(b"/d//x").unwrap(), Some(id(41)));
    assert_eq!(catalog.queries().resolve(b"./d/../d").unwrap(), None);
    assert_eq!(catalog.queries().resolve(b"/").unwrap(), Some(FileId::ROOT));
    assert_eq!(catalog.queries().path_of(id(41)).unwrap().unwrap(), b"d/x");
    assert_eq!(catalog.queries().path_of(id(1)).unwrap().unwrap(), b"");
    assert_eq!(catalog.queries().path_of(id(99)).unwrap(), None);
}

#[test]
fn a_life_in_versions_and_names() {
    let mut catalog = one_file(vec![data(0, 10, 1)]);
    let fuzzy = version(2, vec![data(0, 20, 2)]).map(|op| match op {
        Op::Content(content) => Op::Content(Content {
            fuzzy: true,
            ..content
        }),
        op => op,
    });
    let txns = vec![
        fuzzy.to_vec(),
        vec![inode(3, Kind::Directory), link(1, "d", 3)],
        vec![unlink(1, "f"), link(3, "g", 2)],
        vec![
            xattrs(2, &[("user.a", "1")], true),
            xattrs(2, &[("user.b", "2")], false),
        ],
        vec![xattrs(2, &[], false)],
        vec![unlink(1, "d"), link(1, "e", 3)],
        vec![unlink(3, "g")],
        vec![delete(2), inode(4, Kind::Fifo), link(1, "f", 4)],
    ];
    fold(&mut catalog, txns).unwrap();
    let no = Changes::default();
    let names = Changes { names: true, ..no };
    let xattrs = Changes { xattrs: true, ..no };
    let expected = [
        (
            2,
            Changes {
                created: true,
                content: true,
                attributes: true,
                names: true,
                ..no
            },
            Some(10),
            false,
        ),
        (
            3,
            Changes {
                content: true,
                ..no
            },
            Some(20),
            true,
        ),
        (5, names, Some(20), true),
        (6, xattrs, Some(20), true),
        (7, xattrs, Some(20), true),
        (9, names, Some(20), true),
        (
            10,
            Changes {
                deleted: true,
                ..no
            },
            None,
            true,
        ),
    ];
    let queries = catalog.queries();
    let versions = queries.versions_of(id(2)).unwrap();
    let found: Vec<_> = versions
        .iter()
        .map(|row| (row.lsn.get(), row.changes, row.size, row.fuzzy))
        .collect();
    assert_eq!(found, expected);
    assert!(
        versions
            .iter()
            .all(|row| row.time == txn(row.lsn.get(), vec![]).time)
    );
    let row = |file, from, to: Option<u64>| NameRow {
        file: id(file),
        from: lsn(from),
        to: to.map(lsn),
    };
    assert_eq!(
        queries.files_at_path(b"f").unwrap(),
        [row(2, 2, Some(5)), row(4, 10, None)]
    );
    assert_eq!(queries.files_at_path(b"d/g").unwrap(), [row(2, 5, Some(8))]);
    assert_eq!(
        queries.files_at_path(b"/e/g").unwrap(),
        [row(2, 8, Some(9))]
    );
    assert_eq!(queries.files_at_path(b"e/none").unwrap(), []);
    let both = vec![
        (b"user.a".to_vec(), b"1".to_vec()),
        (b"user.b".to_vec(), b"2".to_vec()),
    ];
    assert_eq!(queries.at(lsn(6)).unwrap().xattrs(id(2)).unwrap(), both);
    assert_eq!(queries.at(lsn(7)).unwrap().xattrs(id(2)).unwrap(), []);
    assert_eq!(queries.orphans().unwrap(), []);
    let error = queries.at(lsn(11)).err().unwrap();
    assert!(matches!(error, Error::NotYet { .. }), "{error}");
}

#[test]
fn moments_are_transaction_times() {
    let catalog = {
        let mut catalog = temporary();
        for (number, time) in [(1, 10), (2, 20), (3, 20), (4, 20), (5, 30)] {
            let mut txn = txn(number, vec![]);
            txn.time = at(time);
            catalog.apply(&txn, place(number)).unwrap();
        }
        catalog
    };
    let find = |seconds| {
        catalog
            .queries()
            .lsn_at_time(at(seconds))
            .unwrap()
            .map(Lsn::get)
    };
    let expected = [
        (9, None),
        (10, Some(1)),
        (19, Some(1)),
        (20, Some(4)),
        (29, Some(4)),
        (30, Some(5)),
        (99, Some(5)),
    ];
    for (seconds, lsn) in expected {
        assert_eq!(find(seconds), lsn, "{seconds}");
    }
    assert_eq!(temporary().queries().lsn_at_time(at(1)).unwrap(), None);
    let row = catalog.queries().txn(lsn(3)).unwrap().unwrap();
    assert_eq!(
        (row.time, row.wall, row.place, row.ops),
        (at(20), at(31), place(3), 0)
    );
}

#[test]
fn the_last_place_wins_and_recovery_can_replace_all() {
    let mut catalog = one_file(vec![data(0, 10, 1)]);
    let find = |catalog: &Catalog, number| {
        let id = DataId {
            epoch: EPOCH,
            number,
        };
        let found = catalog.queries().data(id).unwrap();
        found.map(|data| {
            (
                data.segment.get(),
                data.frame_offset,
                data.raw_offset,
                data.len,
            )
        })
    };
    assert_eq!(find(&catalog, 1), None);
    catalog
        .apply_data(
            segment(1),
            &[data_place(1, 5, 6, 10), data_place(2, 5, 16, 9)],
        )
        .unwrap();
    catalog
        .apply_data(segment(2), &[data_place(1, 50, 60, 10)])
        .unwrap();
    assert_eq!(find(&catalog, 1), Some((2, 50, 60, 10)));
    assert_eq!(find(&catalog, 2), Some((1, 5, 16, 9)));
    catalog.forget_data(segment(1)).unwrap();
    assert_eq!(find(&catalog, 2), None);
    assert_eq!(find(&catalog, 1), Some((2, 50, 60, 10)));
    let unknown = DataId {
        epoch: crate::ids::Epoch(3),
        number: 1,
    };
    assert_eq!(catalog.queries().data(unknown).unwrap(), None);
    let moved = crate::catalog::Place {
        segment: segment(4),
        frame_offset: 44,
    };
    catalog.set_place(lsn(2), moved).unwrap();
    assert_eq!(catalog.queries().txn(lsn(2)).unwrap().unwrap().place, moved);
}

#[test]
fn what_is_needed_of_a_subtree() {
    let mut catalog = one_file(vec![data(0, 10, 1)]);
    let mut ops = vec![
        inode(3, Kind::Directory),
        link(1, "d", 3),
        inode(4, Kind::Regular),
        link(3, "x", 4),
    ];
    ops.extend(version(4, vec![data(0, 2 * CHUNK, 10)]));
    fold(&mut catalog, vec![ops]).unwrap();
    let places = [data_place(1, 0, 0, 10), data_place(11, 9, 0, 983_040)];
    catalog.apply_data(segment(1), &places).unwrap();
    let live = catalog.queries().live(None).unwrap();
    let segments = live.segments().unwrap();
    assert_eq!(segments.len(), 2);
    assert_eq!(
        (segments[0].segment, segments[0].rows, segments[0].bytes),
        (None, 1, CHUNK)
    );
    assert_eq!(
        (segments[1].segment, segments[1].rows, segments[1].bytes),
        (Some(segment(1)), 2, CHUNK + 10)
    );
    assert_eq!(live.missing(9).unwrap(), [id(4)]);
    let live = catalog.queries().live(Some(id(3))).unwrap();
    let rows: Vec<_> = live.rows(segment(1)).unwrap().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 1);
    assert_eq!(
        (rows[0].file, rows[0].frame_offset, rows[0].data_len),
        (id(4), 9, 983_040)
    );
    assert_eq!(
        rows[0].extent.range,
        Range {
            offset: CHUNK,
            len: CHUNK
        }
    );
    assert_eq!(rows[0].extent.hashes.len(), 15);
    assert_eq!(live.rows(segment(7)).unwrap().count(), 0);
}

#[test]
fn volumes_copies_and_local_values() {
    let mut catalog = temporary();
    let volume = |state: &str| Volume {
        serial: "S1".into(),
        pool: "p".into(),
        place: Some(b"/archive/vol1".to_vec()),
        backend: "directory".into(),
        state: state.into(),
    };
    let ops = |state: &str| vec![Op::Volume(volume(state))];
    fold(&mut catalog, vec![ops("filling"), ops("full")]).unwrap();
    let rows = catalog.queries().volumes().unwrap();
    assert_eq!(rows.len(), 1);
    assert_eq!((&rows[0].volume, rows[0].lsn), (&volume("full"), lsn(2)));
    let digest = catalog.digest().unwrap();
    let copy = CopyRow {
        segment: segment(3),
        serial: "S1".into(),
        state: "verified".into(),
        verified: Some(at(4)),
    };
    catalog.set_copy(&copy).unwrap();
    catalog
        .set_copy(&CopyRow {
            serial: "S0".into(),
            verified: None,
            ..copy.clone()
        })
        .unwrap();
    let serials = |catalog: &Catalog| -> Vec<String> {
        let copies = catalog.queries().copies(segment(3)).unwrap();
        copies.into_iter().map(|copy| copy.serial).collect()
    };
    assert_eq!(serials(&catalog), ["S0", "S1"]);
    assert_eq!(catalog.queries().copies(segment(3)).unwrap()[1], copy);
    catalog.forget_copies("S0").unwrap();
    assert_eq!(serials(&catalog), ["S1"]);
    catalog.set_meta("k", Some(b"v")).unwrap();
    assert_eq!(catalog.queries().meta("k").unwrap(), Some(b"v".to_vec()));
    catalog.set_meta("k", None).unwrap();
    assert_eq!(catalog.queries().meta("k").unwrap(), None);
    assert_eq!(catalog.digest().unwrap(), digest);
}

#[test]
fn an_empty_file_has_a_root_hash_too() {
    let catalog = one_file(vec![]);
    let row = catalog.queries().inode(id(2)).unwrap().unwrap();
    let root = crate::layout::RootHasher::default().finish(0);
    assert_eq!((row.size, row.root), (0, Some(root)));
    assert_ne!(row.root, Some(Hash([0; 32])));
}

#[test]
fn marked_files_are_counted_by_an_index() {
    let mut catalog = one_file(vec![]);
    let count = |catalog: &Catalog| {
        let queries = catalog.queries();
        (
            queries.fuzzy_count().unwrap(),
            queries.unrestorable_count().unwrap(),
        )
    };
    assert_eq!(count(&catalog), (0, 0));
    let marked = |bits: u32| {
        let mut inode = attributes(2, Kind::Regular);
        inode.unrestorable = Bits(bits);
        vec![Op::Inode(inode)]
    };
    let unreadable = crate::record::UNRESTORABLE_UNREADABLE;
    fold(&mut catalog, vec![marked(unreadable)]).unwrap();
    assert_eq!(count(&catalog), (0, 1));
    fold(&mut catalog, vec![marked(0)]).unwrap();
    assert_eq!(count(&catalog), (0, 0));
    // Among ten million files a count must not look at each.
    for column in ["fuzzy", "unrestorable"] {
        let plan: String = catalog
            .queries()
            .conn
            .query_row(
                &format!("EXPLAIN QUERY PLAN SELECT count(*) FROM inode WHERE {column} <> 0"),
                [],
                |row| row.get(3),
            )
            .unwrap();
        assert!(plan.contains(&format!("inode_{column}")), "{plan}");
    }
}

#[test]
fn all_copies_are_told() {
    let mut catalog = one_file(vec![]);
    let copy = |number: u64, state: &str| CopyRow {
        segment: segment(number),
        serial: "S".into(),
        state: state.into(),
        verified: None,
    };
    let rows = [copy(1, "verified"), copy(2, "damaged")];
    for row in &rows {
        catalog.set_copy(row).unwrap();
    }
    let mut told = Vec::new();
    catalog
        .queries()
        .for_each_copy(|row| told.push(row))
        .unwrap();
    assert_eq!(told, rows);
}

#[test]
fn a_listing_says_all_of_each_entry() {
    let mut catalog = one_file(vec![data(0, 10, 1)]);
    let [extents, content] = version(3, vec![hole(0, 10)]);
    fold(
        &mut catalog,
        vec![vec![
            inode(3, Kind::Regular),
            extents,
            content,
            link(1, "holes", 3),
            inode(4, Kind::Directory),
            link(1, "dir", 4),
            link(4, "again", 2),
            inode(5, Kind::Symlink),
            xattrs(5, &[("trusted.a", "1"), ("trusted.b", "2")], false),
            link(1, "link", 5),
        ]],
    )
    .unwrap();
    let queries = catalog.queries();
    let told: Vec<_> = queries
        .listing(id(1), None, 9)
        .unwrap()
        .into_iter()
        .map(|row| {
            let whole = queries.inode(row.inode.file).unwrap().unwrap();
            assert_eq!(row.inode.mtime, whole.mtime);
            assert_eq!(
                (row.inode.content_lsn, row.inode.size, row.inode.target),
                (whole.content_lsn, whole.size, whole.target)
            );
            assert_eq!(row.xattrs, queries.xattrs(row.inode.file).unwrap());
            let name = String::from_utf8(row.name).unwrap();
            (name, row.inode.kind, row.has_data, row.has_others)
        })
        .collect();
    let expected = [
        ("dir", Kind::Directory, false, false),
        ("f", Kind::Regular, true, true),
        ("holes", Kind::Regular, false, false),
        ("link", Kind::Symlink, false, false),
    ];
    assert_eq!(
        told,
        expected.map(|(name, kind, data, others)| (name.to_owned(), kind, data, others))
    );
    let rest = queries.listing(id(1), Some(b"f"), 1).unwrap();
    assert_eq!(rest[0].name, b"holes");
    let dirs = |after| queries.files_of_kind(Kind::Directory, after, 9).unwrap();
    assert_eq!(dirs(None), [id(1), id(4)]);
    assert_eq!(dirs(Some(id(1))), [id(4)]);
}
