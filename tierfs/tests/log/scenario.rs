//! A small log with every kind of record, written with fixed times and epochs: what golden segments hold.

use std::collections::BTreeMap;

use tierfs::disk::Disk;
use tierfs::disk::sim::{Rng, SimDisk};
use tierfs::frame::{FrameKind, Packer, RawFrame};
use tierfs::layout::{self, BLOCK, CHUNK, Range, RootHasher};
use tierfs::record::{
    Bind, Bits, Content, Delete, Device, Extent, Extents, Filesystem, Inode, Kind, Link, Op, Pin,
    Txn, UNRESTORABLE_VERITY, Unlink, Volume, Xattrs,
};
use tierfs::spool::{Floor, Spool};
use tierfs::writer::Writer;
use tierfs::{DataId, Epoch, FileId, Hash, Time};

use crate::support::{LOG, fixed_time, open_spool, pack_txns};

const SEGMENT_BYTES: u64 = 1 << 20;

pub fn file(number: u64) -> FileId {
    FileId::new(number).unwrap()
}

pub fn inode(number: u64, kind: Kind) -> Inode {
    Inode {
        file: file(number),
        ctime: None,
        kind,
        btime: None,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: fixed_time(),
        rdev: None,
        target: None,
        flags: Bits(0),
        unrestorable: Bits(0),
    }
}

fn link(parent: u64, name: &[u8], number: u64) -> Op {
    Op::Link(Link {
        parent: file(parent),
        name: name.to_vec(),
        file: file(number),
    })
}

fn unlink(parent: u64, name: &[u8]) -> Op {
    Op::Unlink(Unlink {
        parent: file(parent),
        name: name.to_vec(),
    })
}

/// What a range of a new version is to be.
enum Part {
    Hole(u64),
    Same(u64),
    Data(Vec<u8>),
}

/// A version of a file: what it must hold.
#[derive(Default, Clone)]
pub struct Version {
    pub lsn: u64,
    pub bytes: Vec<u8>,
    pieces: Vec<(Range, Hash)>,
}

/// Every version of every file.
pub type Versions = BTreeMap<u64, Vec<Version>>;

/// Writes the log and remembers what every file must hold.
struct Author<'w> {
    writer: Writer<SimDisk>,
    packer: Packer,
    versions: &'w mut Versions,
    next_data: u64,
}

impl Author<'_> {
    fn data(&mut self, range: Range, bytes: &[u8]) -> DataId {
        let epoch = self.writer.epoch();
        let first = DataId {
            epoch,
            number: self.next_data,
        };
        for chunk in layout::chunks(range) {
            let start = (chunk.offset - range.offset) as usize;
            let content = &bytes[start..start + chunk.len as usize];
            self.data_frame(&[(
                DataId {
                    epoch,
                    number: self.next_data,
                },
                content,
            )]);
            self.next_data += 1;
        }
        first
    }

    fn data_frame(&mut self, records: &[(DataId, &[u8])]) {
        let mut raw = RawFrame::new(FrameKind::Data);
        for (id, content) in records {
            raw.push_data(*id, content);
        }
        let packed = self.packer.pack(&raw).unwrap();
        self.writer.append_data(packed).unwrap();
    }

    /// The operations of a new version; its data is appended at once.
    fn content(&mut self, number: u64, parts: &[Part], fuzzy: bool) -> Vec<Op> {
        let base = self
            .versions
            .get(&number)
            .and_then(|all| all.last())
            .cloned();
        let mut version = Version {
            lsn: self.writer.next_lsn().get(),
            ..Version::default()
        };
        let mut list = Vec::new();
        let mut same = false;
        for part in parts {
            let offset = version.bytes.len() as u64;
            let range = |len| Range { offset, len };
            match part {
                Part::Hole(len) => {
                    version.bytes.resize((offset + len) as usize, 0);
                    list.push(Extent::Hole(range(*len)));
                }
                Part::Same(len) => {
                    let base = base.as_ref().unwrap();
                    let range = range(*len);
                    let bytes = &base.bytes[offset as usize..range.end() as usize];
                    version.bytes.extend(bytes);
                    let pieces = base
                        .pieces
                        .iter()
                        .filter(|(piece, _)| piece.offset >= offset && piece.end() <= range.end());
                    version.pieces.extend(pieces);
                    list.push(Extent::Same(range));
                    same = true;
                }
                Part::Data(bytes) => {
                    let range = range(bytes.len() as u64);
                    let first = self.data(range, bytes);
                    let hashes: Vec<Hash> = layout::pieces(range)
                        .map(|piece| {
                            let start = (piece.offset - offset) as usize;
                            Hash::of(&bytes[start..start + piece.len as usize])
                        })
                        .collect();
                    version
                        .pieces
                        .extend(layout::pieces(range).zip(hashes.iter().copied()));
                    version.bytes.extend(bytes);
                    list.push(Extent::Data {
                        range,
                        first,
                        hashes,
                    });
                }
            }
        }
        let mut root = RootHasher::default();
        for (piece, hash) in &version.pieces {
            root.piece(*piece, hash);
        }
        let content = Content {
            file: file(number),
            size: version.bytes.len() as u64,
            base: same.then(|| tierfs::Lsn::new(base.unwrap().lsn).unwrap()),
            root: root.finish(version.bytes.len() as u64),
            fuzzy,
        };
        self.versions.entry(number).or_default().push(version);
        // Two records of extents where there is more than one.
        let middle = list.len() / 2;
        let tail = list.split_off(middle);
        let mut ops: Vec<Op> = [list, tail]
            .into_iter()
            .filter(|list| !list.is_empty())
            .map(|list| {
                Op::Extents(Extents {
                    file: file(number),
                    list,
                })
            })
            .collect();
        ops.push(Op::Content(content));
        ops
    }

    fn commit(&mut self, ops: Vec<Op>) {
        let lsn = self.writer.next_lsn();
        let time = Time {
            seconds: 1_700_000_000 + i64::try_from(lsn.get()).unwrap(),
            nanos: 0,
        };
        let wall = Time {
            seconds: time.seconds - 1,
            nanos: 999_999_999,
        };
        let frames = pack_txns(
            &mut self.packer,
            &[Txn {
                lsn,
                time,
                wall,
                ops,
            }],
        );
        self.writer.append_txns(frames).unwrap();
    }

    fn sync(&mut self) {
        if let Some(job) = self.writer.take_sync() {
            let result = job.run();
            self.writer.done(result).unwrap();
        }
    }

    fn seal(&mut self) {
        self.writer.seal_now().unwrap();
        self.sync();
    }
}

fn pattern(seed: u64, len: u64) -> Vec<u8> {
    let mut rng = Rng(seed);
    let unit: Vec<u8> = (0..97).map(|_| rng.number() as u8).collect();
    unit.into_iter().cycle().take(len as usize).collect()
}

fn first_segment(author: &mut Author<'_>) {
    author.commit(vec![
        Op::Filesystem(Filesystem {
            uuid: [7; 16],
            mount: Some(b"/data".to_vec()),
            fs_type: "ext4".to_owned(),
        }),
        Op::Inode(Inode {
            mode: 0o755,
            ..inode(1, Kind::Directory)
        }),
        Op::Bind(Bind {
            file: file(1),
            ino: Some(2),
            handle: vec![1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        }),
    ]);
    let mut ops = vec![
        Op::Inode(Inode {
            mode: 0o2775,
            uid: 1000,
            gid: 100,
            flags: Bits(0x80),
            ..inode(2, Kind::Directory)
        }),
        link(1, b"dir", 2),
        Op::Inode(Inode {
            ctime: Some(fixed_time()),
            btime: Some(Time {
                seconds: -1,
                nanos: 1,
            }),
            mode: 0o4755,
            uid: u32::MAX,
            gid: 65536,
            mtime: Time {
                seconds: -5,
                nanos: 999_999_999,
            },
            unrestorable: Bits(UNRESTORABLE_VERITY),
            ..inode(3, Kind::Regular)
        }),
        Op::Bind(Bind {
            file: file(3),
            ino: None,
            handle: vec![0x81, 0, 0, 0, 9],
        }),
    ];
    ops.extend(author.content(3, &[Part::Data(b"hello, world\n".to_vec())], false));
    ops.extend([
        Op::Xattrs(Xattrs {
            file: file(3),
            list: vec![(b"security.capability".to_vec(), vec![1, 0, 0, 2])],
            more: true,
        }),
        Op::Xattrs(Xattrs {
            file: file(3),
            list: vec![
                (b"user.empty".to_vec(), Vec::new()),
                (b"user.long".to_vec(), pattern(1, 4000)),
            ],
            more: false,
        }),
        link(2, b"hello", 3),
        link(1, b"hard link", 3),
    ]);
    author.commit(ops);
    special_files(author);
    // Holes, pieces that begin and end anywhere, more than one chunk.
    let mut ops = vec![Op::Inode(inode(10, Kind::Regular)), link(1, b"sparse", 10)];
    let parts = [
        Part::Hole(1000),
        Part::Data(pattern(2, 70_000)),
        Part::Hole(2 * BLOCK - 71_000),
        Part::Data(pattern(3, CHUNK + BLOCK + 17)),
        Part::Data(pattern(4, 5)),
        Part::Hole(1 << 20),
    ];
    ops.extend(author.content(10, &parts, false));
    author.commit(ops);
}

fn special_files(author: &mut Author<'_>) {
    let device = |number, kind, major, minor| {
        Op::Inode(Inode {
            rdev: Some(Device { major, minor }),
            ..inode(number, kind)
        })
    };
    author.commit(vec![
        Op::Inode(Inode {
            target: Some(b"../somewhere/else".to_vec()),
            mode: 0o777,
            ..inode(4, Kind::Symlink)
        }),
        link(2, b"symlink", 4),
        Op::Inode(inode(5, Kind::Fifo)),
        link(2, b"fifo", 5),
        Op::Inode(inode(6, Kind::Socket)),
        link(2, b"socket", 6),
        device(7, Kind::CharDevice, 5, 1),
        link(2, b"tty", 7),
        device(8, Kind::BlockDevice, 259, u32::MAX),
        link(2, b"disk", 8),
        // Without any content record: empty. Its name is no UTF-8.
        Op::Inode(inode(9, Kind::Regular)),
        link(2, b"\xff\xfe name", 9),
    ]);
}

fn second_segment(author: &mut Author<'_>) {
    // Unchanged at both ends of a new version, longer than before, and fuzzy.
    let parts = [
        Part::Same(2 * BLOCK),
        Part::Data(pattern(5, BLOCK)),
        Part::Same(CHUNK + 22 + (1 << 20)),
        Part::Data(pattern(6, 3)),
    ];
    let ops = author.content(10, &parts, true);
    author.commit(ops);
    // A file moves, the directory it was in gets another name, and the old name another file.
    author.commit(vec![
        unlink(2, b"hello"),
        unlink(1, b"dir"),
        link(1, b"hello", 3),
        link(1, b"directory", 2),
        Op::Inode(Inode {
            mode: 0o400,
            ..inode(3, Kind::Regular)
        }),
        Op::Inode(inode(11, Kind::Regular)),
        link(1, b"dir", 11),
    ]);
    author.commit(vec![
        unlink(2, b"fifo"),
        Op::Delete(Delete { file: file(5) }),
        Op::Volume(Volume {
            serial: "V0001".to_owned(),
            pool: "first".to_owned(),
            backend: "directory".to_owned(),
            place: Some(b"/archive/V0001".to_vec()),
            state: "filling".to_owned(),
        }),
    ]);
    // One transaction that needs two frames.
    let list = |n: u64| vec![(format!("user.{n:02}").into_bytes(), pattern(n, 60_000))];
    let pieces = (0..20).map(|n| {
        Op::Xattrs(Xattrs {
            file: file(11),
            list: list(n),
            more: n < 19,
        })
    });
    author.commit(pieces.collect());
}

fn third_segment(author: &mut Author<'_>, old: DataId) {
    // As reclaim does: a data id of the first writer again, between those of this one.
    let own = DataId {
        epoch: author.writer.epoch(),
        number: author.next_data,
    };
    author.next_data += 1;
    author.data_frame(&[(old, b"hello, world\n"), (own, b"never referred to")]);
    let parts = [
        Part::Same(2 * BLOCK),
        Part::Data(pattern(7, 100)),
        Part::Hole(50),
    ];
    let ops = author.content(10, &parts, false);
    author.commit(ops);
    let ops = author.content(3, &[], false);
    author.commit(ops);
    let mut ops = author.content(11, &[Part::Data(b"second file".to_vec())], false);
    ops.push(Op::Xattrs(Xattrs {
        file: file(11),
        list: Vec::new(),
        more: false,
    }));
    author.commit(ops);
}

/// Writes it all: two segments by one writer, the third by another that a crash ends.
pub fn write() -> (Spool<SimDisk>, SimDisk, Versions) {
    let disk = SimDisk::new();
    Spool::create(&disk, LOG, None).unwrap();
    let mut versions = Versions::new();
    for (epoch, data) in [
        (0x0123_4567_89ab_cdef, 0),
        (u64::MAX, DataId::NUMBER_MAX - 100),
    ] {
        let (spool, _) = open_spool(&disk, SEGMENT_BYTES, &Floor::default()).unwrap();
        let mut author = Author {
            writer: spool.writer_with(Epoch(epoch), fixed_time).unwrap(),
            packer: Packer::new(1).unwrap(),
            versions: &mut versions,
            next_data: data,
        };
        if data == 0 {
            first_segment(&mut author);
            author.seal();
            second_segment(&mut author);
            author.seal();
        } else {
            let old = DataId {
                epoch: Epoch(0x0123_4567_89ab_cdef),
                number: 0,
            };
            third_segment(&mut author, old);
            author.sync();
        }
    }
    let (spool, _) = open_spool(&disk, SEGMENT_BYTES, &Floor::default()).unwrap();
    assert!(
        disk.list()
            .unwrap()
            .iter()
            .all(|name| !name.contains("open"))
    );
    (spool, disk, versions)
}

/// One segment of pins: set twice, taken back, one that goes with its file.
pub fn write_pins() -> (Spool<SimDisk>, SimDisk) {
    let disk = SimDisk::new();
    Spool::create(&disk, LOG, None).unwrap();
    let (spool, _) = open_spool(&disk, SEGMENT_BYTES, &Floor::default()).unwrap();
    let mut versions = Versions::new();
    let mut author = Author {
        writer: spool.writer_with(Epoch(0x0f), fixed_time).unwrap(),
        packer: Packer::new(1).unwrap(),
        versions: &mut versions,
        next_data: 0,
    };
    let pin = |number, pinned| {
        let file = file(number);
        Op::Pin(Pin { file, pinned })
    };
    let mut ops = vec![Op::Inode(inode(1, Kind::Directory))];
    for (number, name) in [(2, b"kept"), (3, b"free"), (4, b"gone")] {
        ops.extend([
            Op::Inode(inode(number, Kind::Regular)),
            link(1, name, number),
        ]);
    }
    author.commit(ops);
    author.commit(vec![pin(2, true), pin(3, true), pin(4, true)]);
    author.commit(vec![pin(2, true), pin(3, false)]);
    author.commit(vec![
        unlink(1, b"gone"),
        Op::Delete(Delete { file: file(4) }),
    ]);
    author.seal();
    drop(author);
    (spool, disk)
}
