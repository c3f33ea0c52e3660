//! Random logs: the fold gives what the model gives, however it is cut into batches, and whatever is
//! done to a log, the fold refuses it or leaves a sound tree.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::build::*;
use super::model::{Model, Tree, compare_now, compare_past};
use crate::catalog::{Catalog, DataPlace, Error, History};
use crate::ids::{DataId, Epoch, FileId, Hash, Lsn};
use crate::layout::{self, BLOCK, CHUNK, Range, RootHasher};
use crate::record::{
    Bind, Bits, Content, Delete, Extent, Extents, Filesystem, Inode, Kind, Link, Op, Pin, Txn,
    Unlink, Volume, Xattrs,
};

/// Decisions that proptest made; 0 for ever when they are used up.
struct Choices<'a>(&'a [u32]);

impl Choices<'_> {
    fn below(&mut self, end: u64) -> u64 {
        let (value, rest) = self.0.split_first().map_or((0, self.0), |(v, r)| (*v, r));
        self.0 = rest;
        u64::from(value) % end.max(1)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == n - 1
    }

    fn pick<T: Clone>(&mut self, list: &[T]) -> Option<T> {
        let index = usize::try_from(self.below(list.len() as u64)).unwrap();
        list.get(index).cloned()
    }
}

/// A log and where its data lies.
struct Log {
    txns: Vec<Txn>,
    /// The data logged before each transaction: (segment, places).
    data: Vec<(u64, Vec<DataPlace>)>,
}

struct Writer<'a> {
    choices: Choices<'a>,
    model: Model,
    next_file: u64,
    next_data: u64,
    epoch: Epoch,
    lsn: Lsn,
    ops: Vec<Op>,
    data: Vec<DataPlace>,
}

fn write_log(choices: &[u32], txns: usize) -> (Log, Model) {
    let mut writer = Writer {
        choices: Choices(choices),
        model: Model::default(),
        next_file: 2,
        next_data: 1,
        epoch: Epoch(u64::MAX),
        lsn: Lsn::FIRST,
        ops: vec![filesystem(1), root()],
        data: Vec::new(),
    };
    let mut log = Log {
        txns: Vec::new(),
        data: Vec::new(),
    };
    let (mut seconds, mut segment) = (1, 1);
    for number in 1..=txns {
        if number > 1 {
            writer.transaction();
        }
        seconds += i64::try_from(writer.choices.below(3)).unwrap();
        let txn = Txn {
            lsn: writer.lsn,
            time: at(seconds),
            wall: at(seconds - 1),
            ops: std::mem::take(&mut writer.ops),
        };
        writer.model.past.push((txn.time, writer.model.now.clone()));
        writer.lsn = writer.lsn.next();
        log.txns.push(txn);
        log.data.push((segment, std::mem::take(&mut writer.data)));
        segment += writer.choices.below(2);
    }
    // The writer's own model went operation by operation; the one that counts goes by transactions.
    let mut model = Model::default();
    log.txns.iter().for_each(|txn| model.apply(txn));
    (log, model)
}

impl Writer<'_> {
    fn tree(&mut self) -> &mut Tree {
        &mut self.model.now
    }

    /// Adds operations that belong together, and applies them to the writer's model.
    fn push(&mut self, ops: Vec<Op>) {
        let past = self.model.past.len();
        self.model.apply(&Txn {
            lsn: self.lsn,
            time: at(0),
            wall: at(0),
            ops: ops.clone(),
        });
        self.model.past.truncate(past);
        self.ops.extend(ops);
    }

    fn transaction(&mut self) {
        if self.lsn == lsn(2) {
            let ops = vec![filesystem(1), root()];
            self.model.apply(&txn(1, ops));
            self.model.past.clear();
        }
        for _ in 0..=self.choices.below(5) {
            match self.choices.below(12) {
                0..3 => self.create(),
                3..6 => self.write(),
                6 => self.rename(),
                7 => self.unlink(),
                8 => self.set_attributes(),
                9 => self.set_xattrs(),
                10 => self.delete(),
                _ => self.rare(),
            }
        }
    }

    fn files(&mut self, kind: Option<Kind>) -> Vec<FileId> {
        let files = self.tree().files.iter();
        files
            .filter(|(_, file)| kind.is_none_or(|kind| file.inode.kind == kind))
            .map(|(file, _)| *file)
            .collect()
    }

    fn free_name(&mut self, parent: FileId) -> Vec<u8> {
        let mut name = vec![b'a' + u8::try_from(self.choices.below(4)).unwrap()];
        while self.tree().dentries.contains_key(&(parent, name.clone())) {
            name.push(b'x');
        }
        name
    }

    fn create(&mut self) {
        let dirs = self.files(Some(Kind::Directory));
        let parent = self.choices.pick(&dirs).unwrap();
        let kinds = [
            Kind::Regular,
            Kind::Directory,
            Kind::Symlink,
            Kind::Fifo,
            Kind::Regular,
        ];
        let kind = self.choices.pick(&kinds).unwrap();
        self.next_file += 1 + self.choices.below(2);
        let file = id(self.next_file);
        let mut ops = vec![inode(self.next_file, kind)];
        if !self.choices.one_in(6) {
            let name = self.free_name(parent);
            ops.push(Op::Link(Link { parent, name, file }));
        }
        if self.choices.one_in(2) {
            ops.push(self.binding(file));
        }
        self.push(ops);
        if kind == Kind::Regular && self.choices.one_in(2) {
            self.write_to(file);
        }
    }

    fn binding(&mut self, file: FileId) -> Op {
        let handle = match self.choices.below(8) {
            0 => b"taken over".to_vec(),
            _ => file.get().to_le_bytes().to_vec(),
        };
        let ino = Some(file.get());
        Op::Bind(Bind { file, ino, handle })
    }

    fn rename(&mut self) {
        let names: Vec<_> = self.tree().dentries.clone().into_iter().collect();
        let Some(((parent, name), file)) = self.choices.pick(&names) else {
            return;
        };
        let dirs = self.files(Some(Kind::Directory));
        let to = self.choices.pick(&dirs).unwrap();
        let is_dir = self.tree().files[&file].inode.kind == Kind::Directory;
        if is_dir && self.is_below(to, file) {
            return;
        }
        let new_name = self.free_name(to);
        let unlink = Op::Unlink(Unlink { parent, name });
        let link = Op::Link(Link {
            parent: to,
            name: new_name,
            file,
        });
        let ops = match self.choices.below(3) {
            0 if !is_dir => vec![link],
            1 => vec![link, unlink],
            _ => vec![unlink, link],
        };
        self.push(ops);
    }

    fn is_below(&mut self, mut dir: FileId, above: FileId) -> bool {
        loop {
            if dir == above {
                return true;
            }
            match self.tree().dentries.iter().find(|(_, file)| **file == dir) {
                Some(((parent, _), _)) => dir = *parent,
                None => return false,
            }
        }
    }

    fn unlink(&mut self) {
        let names: Vec<_> = self.tree().dentries.keys().cloned().collect();
        if let Some((parent, name)) = self.choices.pick(&names) {
            self.push(vec![Op::Unlink(Unlink { parent, name })]);
        }
    }

    fn delete(&mut self) {
        let tree = self.tree();
        let named: BTreeSet<FileId> = tree.dentries.values().copied().collect();
        let parents: BTreeSet<FileId> = tree.dentries.keys().map(|(parent, _)| *parent).collect();
        let files = self.files(None);
        let free: Vec<_> = files
            .into_iter()
            .filter(|file| {
                *file != FileId::ROOT && !named.contains(file) && !parents.contains(file)
            })
            .collect();
        if let Some(file) = self.choices.pick(&free) {
            self.push(vec![Op::Delete(Delete { file })]);
        }
    }

    fn set_attributes(&mut self) {
        let files = self.files(None);
        let file = self.choices.pick(&files).unwrap();
        let number = u32::try_from(self.choices.below(100)).unwrap();
        let old = self.tree().files[&file].inode.clone();
        self.push(vec![Op::Inode(Inode {
            mode: number,
            flags: Bits(number),
            mtime: at(i64::from(number)),
            ctime: (number % 7 != 0).then(|| at(i64::from(number))),
            ..old
        })]);
    }

    fn set_xattrs(&mut self) {
        let files = self.files(None);
        let file = self.choices.pick(&files).unwrap();
        let all = ["user.a", "user.b", "user.c", "user.d"];
        let parts = [&all[..self.choices.below(3).try_into().unwrap()], &all[2..]];
        let parts = match self.choices.below(3) {
            0 => &parts[..0],
            1 => &parts[..1],
            _ => &parts[..],
        };
        let mut ops = Vec::new();
        for (index, names) in parts.iter().enumerate() {
            let list = names.iter().map(|name| {
                let value = self.choices.below(3).to_string();
                (name.as_bytes().to_vec(), value.into_bytes())
            });
            let list = list.collect();
            let more = index + 1 < parts.len();
            ops.push(Op::Xattrs(Xattrs { file, list, more }));
        }
        if ops.is_empty() {
            ops.push(xattrs(file.get(), &[], false));
        }
        self.push(ops);
    }

    fn rare(&mut self) {
        let op = match self.choices.below(6) {
            0 => Op::Filesystem(Filesystem {
                uuid: [u8::try_from(self.choices.below(3)).unwrap(); 16],
                fs_type: "xfs".into(),
                mount: None,
            }),
            1 => Op::Volume(Volume {
                serial: format!("S{}", self.choices.below(3)),
                pool: "pool".into(),
                place: None,
                backend: "directory".into(),
                state: format!("state {}", self.choices.below(3)),
            }),
            2 => {
                self.epoch = Epoch(self.choices.below(3) << 62);
                return;
            }
            3 => {
                let files = self.files(None);
                let file = self.choices.pick(&files).unwrap();
                self.binding(file)
            }
            _ => {
                let files = self.files(Some(Kind::Regular));
                let Some(file) = self.choices.pick(&files) else {
                    return;
                };
                let pinned = self.choices.below(3) > 0;
                Op::Pin(Pin { file, pinned })
            }
        };
        self.push(vec![op]);
    }

    fn write(&mut self) {
        let files = self.files(Some(Kind::Regular));
        if let Some(file) = self.choices.pick(&files) {
            self.write_to(file);
        }
    }

    /// A new version: cut at random places, mostly at blocks, each range a hole, data or unchanged.
    fn write_to(&mut self, file: FileId) {
        let base = self.tree().files[&file].clone();
        let blocks = 1 + self
            .choices
            .below(if self.choices.0.len().is_multiple_of(3) {
                40
            } else {
                5
            });
        let size = match self.choices.below(4) {
            0 => base.size,
            1 => blocks * BLOCK,
            _ => (blocks * BLOCK).saturating_sub(self.choices.below(BLOCK + 9)),
        };
        let mut cuts = BTreeSet::from([0, size, base.size.min(size)]);
        for _ in 0..self.choices.below(5) {
            cuts.insert(match self.choices.below(4) {
                0 => self.choices.below(size + 1),
                _ => self.choices.below(size / BLOCK + 1) * BLOCK,
            });
        }
        let cuts: Vec<u64> = cuts.into_iter().filter(|cut| *cut <= size).collect();
        let mut list = Vec::new();
        for cut in cuts.windows(2) {
            let range = range(cut[0], cut[1] - cut[0]);
            let across = |at: u64| {
                let inside =
                    |piece: &super::model::Piece| piece.range.offset < at && at < piece.range.end();
                base.pieces.iter().any(inside)
            };
            let same = range.end() <= base.size && !across(range.offset) && !across(range.end());
            list.push(match self.choices.below(4) {
                0 | 1 if same => Extent::Same(range),
                2 => Extent::Hole(range),
                _ => self.log_data(range),
            });
        }
        self.commit_version(file, size, list);
    }

    fn log_data(&mut self, range: Range) -> Extent {
        let first = DataId {
            epoch: self.epoch,
            number: self.next_data,
        };
        for (chunk, number) in layout::chunks(range).zip(first.number..) {
            self.data.push(DataPlace {
                id: DataId {
                    epoch: self.epoch,
                    number,
                },
                frame_offset: number / 3 * 100,
                raw_offset: u32::try_from(number % 3 * CHUNK).unwrap(),
                len: u32::try_from(chunk.len).unwrap(),
            });
            self.next_data = number + 1;
        }
        let hash = |piece: Range| Hash::of(&(first.number ^ piece.offset << 20).to_le_bytes());
        Extent::Data {
            range,
            first,
            hashes: layout::pieces(range).map(hash).collect(),
        }
    }

    fn commit_version(&mut self, file: FileId, size: u64, mut list: Vec<Extent>) {
        let base = self.tree().files[&file].content_lsn;
        let unchanged = list.iter().any(|extent| matches!(extent, Extent::Same(_)));
        let base = base.filter(|_| unchanged);
        let rest = list.split_off(list.len() / 2);
        let mut ops = vec![
            Op::Extents(Extents { file, list }),
            Op::Extents(Extents { file, list: rest }),
            Op::Content(Content {
                file,
                size,
                base,
                root: Hash([0; 32]),
                fuzzy: self.choices.one_in(4),
            }),
        ];
        // The model tells the pieces, and they the root hash.
        let mut probe = Model {
            now: self.tree().clone(),
            ..Model::default()
        };
        probe.apply(&txn(1, ops.clone()));
        let mut root = RootHasher::default();
        for piece in &probe.now.files[&file].pieces {
            root.piece(piece.range, &piece.hash);
        }
        if let Some(Op::Content(content)) = ops.last_mut() {
            content.root = root.finish(size);
        }
        self.push(ops);
    }
}

fn apply(catalog: &mut Catalog, log: &Log, from: usize) -> Result<(), Error> {
    for (number, txn) in log.txns.iter().enumerate().skip(from) {
        let (in_segment, places) = &log.data[number];
        catalog.apply_data(segment(*in_segment), places)?;
        catalog.apply(txn, place(txn.lsn.get()))?;
    }
    Ok(())
}

/// What is needed of each segment, worked out from the model.
fn compare_live(catalog: &Catalog, log: &Log, model: &Model) {
    let mut places: BTreeMap<DataId, (u64, DataPlace)> = BTreeMap::new();
    for (segment, list) in &log.data {
        places.extend(list.iter().map(|place| (place.id, (*segment, *place))));
    }
    let mut expected = BTreeMap::new();
    for (file, row) in &model.now.files {
        for piece in &row.pieces {
            let (segment, place) = places[&piece.data];
            let within = (
                place.frame_offset,
                place.raw_offset,
                *file,
                piece.range.offset,
            );
            expected.insert(
                (segment, within),
                (piece.hash, piece.data_offset, place.len),
            );
        }
    }
    let live = catalog.queries().live(None).unwrap();
    let mut found = Vec::new();
    for row in live.segments().unwrap() {
        let segment = row.segment.unwrap();
        let mut bytes = 0;
        for row in live.rows(segment).unwrap() {
            let row = row.unwrap();
            let mut skipped = 0;
            bytes += row.extent.range.len;
            for (piece, hash) in layout::pieces(row.extent.range).zip(&row.extent.hashes) {
                let within = (row.frame_offset, row.raw_offset, row.file, piece.offset);
                let data_offset = row.extent.data_offset + skipped;
                skipped += piece.len;
                found.push(((segment.get(), within), (*hash, data_offset, row.data_len)));
            }
        }
        assert_eq!(bytes, row.bytes);
    }
    assert!(found.iter().copied().eq(expected), "{found:?}");
}

/// What must hold of any tree, whatever the log was.
fn check_sound(catalog: &Catalog) {
    let queries = catalog.queries();
    let mut files = Vec::new();
    queries
        .for_each_file(|file, _| {
            files.push(file);
            Ok::<_, Error>(())
        })
        .unwrap();
    for file in files {
        let row = queries.inode(file).unwrap().unwrap();
        let names = queries.names_of(file).unwrap();
        assert!(row.kind != Kind::Directory || names.len() <= 1);
        for (parent, _) in names {
            let parent = queries.inode(parent).unwrap().unwrap();
            assert_eq!(parent.kind, Kind::Directory);
        }
        queries.path_of(file).unwrap();
        let (mut root, mut end) = (RootHasher::default(), 0);
        for piece in queries.pieces(file, 0) {
            let (piece, hash) = piece.unwrap();
            assert!(piece.offset >= end);
            end = piece.end();
            root.piece(piece, &hash);
        }
        assert!(end <= row.size);
        if row.content_lsn.is_some() {
            assert_eq!(row.root, Some(root.finish(row.size)));
        }
    }
}

fn choices() -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::vec(any::<u32>(), 20..500)
}

/// A few seconds' worth, or as many as `PROPTEST_CASES` says.
fn config() -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(96),
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn every_moment_is_the_models(choices in choices(), txns in 2usize..30) {
        let (log, model) = write_log(&choices, txns);
        let mut catalog = temporary();
        apply(&mut catalog, &log, 0).unwrap();
        compare_now(&catalog, &model);
        compare_past(&catalog, &model);
        compare_live(&catalog, &log, &model);
        check_sound(&catalog);
    }

    #[test]
    fn the_digest_depends_on_the_log_alone(choices in choices(), stop in 0usize..20) {
        let (log, model) = write_log(&choices, 20);
        let mut whole = temporary();
        apply(&mut whole, &log, 0).unwrap();
        let digest = whole.digest().unwrap();

        // Committed after each, killed in the middle, with the places all at the end.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.sqlite");
        let mut catalog = Catalog::create(&path, LOG).unwrap();
        for (number, txn) in log.txns.iter().enumerate() {
            catalog.apply(txn, place(txn.lsn.get())).unwrap();
            if number < stop {
                catalog.commit().unwrap();
            }
        }
        drop(catalog);
        let mut catalog = Catalog::open(&path).unwrap();
        prop_assert_eq!(catalog.folded().map_or(0, Lsn::get), stop as u64);
        for txn in &log.txns[stop..] {
            catalog.apply(txn, place(txn.lsn.get())).unwrap();
        }
        for (in_segment, places) in &log.data {
            catalog.apply_data(segment(*in_segment), places).unwrap();
        }
        prop_assert_eq!(catalog.digest().unwrap(), digest);
        compare_now(&catalog, &model);

        let mut current = Catalog::temporary(None, LOG, History::Drop).unwrap();
        apply(&mut current, &log, 0).unwrap();
        prop_assert_eq!(current.digest_current().unwrap(), whole.digest_current().unwrap());
        prop_assert_ne!(whole.digest_current().unwrap(), digest);
        compare_now(&current, &model);
        compare_live(&current, &log, &model);
    }

    #[test]
    fn a_mutilated_log_is_refused_or_gives_a_sound_tree(
        choices in choices(),
        blows in proptest::collection::vec((any::<u32>(), any::<u32>(), 0..6u8), 1..6),
    ) {
        let (mut log, _) = write_log(&choices, 12);
        for (one, other, how) in blows {
            mutilate(&mut log.txns, one, other, how);
        }
        let mut catalog = temporary();
        for (number, txn) in log.txns.iter().enumerate() {
            let before = catalog.digest().unwrap();
            match catalog.apply(txn, place(number as u64)) {
                Ok(()) => check_sound(&catalog),
                Err(Error::Refused { .. }) => {
                    prop_assert_eq!(catalog.digest().unwrap(), before);
                    break;
                }
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
    }
}

/// Removes, repeats, moves or exchanges operations, or gives them to other files.
fn mutilate(txns: &mut [Txn], one: u32, other: u32, how: u8) {
    let pick = |number: u32, len: usize| usize::try_from(number).unwrap() % len.max(1);
    let to = pick(other, txns.len());
    let from = pick(one, txns.len());
    let index = pick(one / 7, txns[from].ops.len());
    let Some(op) = txns[from].ops.get(index).cloned() else {
        return;
    };
    let slot = pick(other / 7, txns[to].ops.len());
    match how {
        0 => drop(txns[from].ops.remove(index)),
        1 => txns[to].ops.insert(slot, op),
        2 => {
            txns[from].ops.remove(index);
            let slot = pick(other / 7, txns[to].ops.len());
            txns[to].ops.insert(slot, op);
        }
        3 => txns[from].ops.swap(0, index),
        4 => {
            let file = id(u64::from(other % 9) + 1);
            match &mut txns[from].ops[index] {
                Op::Inode(op) => op.file = file,
                Op::Link(op) => op.file = file,
                Op::Unlink(op) => op.parent = file,
                Op::Delete(op) => op.file = file,
                Op::Extents(op) => op.file = file,
                Op::Content(op) => op.file = file,
                Op::Xattrs(op) => op.file = file,
                Op::Bind(op) => op.file = file,
                Op::Pin(op) => op.file = file,
                _ => {}
            }
        }
        _ => {
            if let Op::Extents(op) = &mut txns[from].ops[index] {
                let by = usize::from(op.list.len() > 1);
                op.list.rotate_left(by);
            } else if let Op::Content(op) = &mut txns[from].ops[index] {
                op.size = op.size.wrapping_add(u64::from(other)) >> (other % 64);
            }
        }
    }
}
