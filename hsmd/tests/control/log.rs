//! A small log in a spool of its own: one sealed segment, one that is still open.

use std::path::{Path, PathBuf};

use tierfs::catalog::Catalog;
use tierfs::disk::RealDisk;
use tierfs::fold::{Before, fold_segment};
use tierfs::frame::{FrameKind, MetaFrames, Packer, RawFrame};
use tierfs::ids::{DataId, FileId, Hash, LogId, Lsn, SegmentNo, Time};
use tierfs::layout::{self, Range, RootHasher};
use tierfs::record::{
    Bits, Content, Delete, Extent, Extents, Filesystem, Inode, Kind, Link, Op, Txn, Unlink,
};
use tierfs::spool::{Floor, Spool, SpoolOptions};
use tierfs::writer::Writer;

pub const LOG: LogId = LogId([0xab; 16]);
/// LSN 2 gives it, LSN 3 changes it.
pub const FIRST: &[u8] = b"the first version\n";
pub const SECOND: &[u8] = b"the second version, which is longer\n";
/// Of the file that LSN 5 deletes.
pub const GONE: &[u8] = b"soon to be deleted\n";
pub const SPARSE_SIZE: u64 = 10 << 20;
pub const SPARSE_AT: u64 = 5 << 20;

fn time_of(lsn: Lsn) -> Time {
    Time {
        seconds: 1_790_000_000 + i64::try_from(lsn.get()).unwrap() * 60,
        nanos: 0,
    }
}

struct Maker {
    writer: Writer<RealDisk>,
    packer: Packer,
    next_data: u64,
}

impl Maker {
    fn commit(&mut self, ops: Vec<Op>) {
        let lsn = self.writer.next_lsn();
        let mut frames = MetaFrames::default();
        let time = time_of(lsn);
        frames
            .push_txn(&Txn {
                lsn,
                time,
                wall: time,
                ops,
            })
            .unwrap();
        let raw = frames.finish();
        let packed: Vec<_> = raw
            .iter()
            .map(|raw| self.packer.pack(raw).unwrap())
            .collect();
        self.writer.append_txns(packed).unwrap();
    }

    /// Logs the bytes; gives the extent that names them.
    fn data(&mut self, offset: u64, bytes: &[u8]) -> Extent {
        let range = Range {
            offset,
            len: bytes.len() as u64,
        };
        assert!(range.len <= layout::CHUNK && offset.is_multiple_of(layout::BLOCK));
        let first = DataId {
            epoch: self.writer.epoch(),
            number: self.next_data,
        };
        self.next_data += 1;
        let mut raw = RawFrame::new(FrameKind::Data);
        raw.push_data(first, bytes);
        self.writer
            .append_data(self.packer.pack(&raw).unwrap())
            .unwrap();
        let block = usize::try_from(layout::BLOCK).unwrap();
        let hashes = bytes.chunks(block).map(Hash::of).collect();
        Extent::Data {
            range,
            first,
            hashes,
        }
    }

    fn content(file: u64, size: u64, list: Vec<Extent>) -> Vec<Op> {
        let file = FileId::new(file).unwrap();
        let mut root = RootHasher::default();
        for extent in &list {
            if let Extent::Data { range, hashes, .. } = extent {
                root.pieces(*range, hashes);
            }
        }
        let content = Content {
            file,
            size,
            base: None,
            root: root.finish(size),
            fuzzy: false,
        };
        vec![Op::Extents(Extents { file, list }), Op::Content(content)]
    }

    fn small(&mut self, file: u64, bytes: &[u8]) -> Vec<Op> {
        let extent = self.data(0, bytes);
        Self::content(file, bytes.len() as u64, vec![extent])
    }

    fn seal(&mut self) {
        self.writer.seal_now().unwrap();
        self.sync();
    }

    fn sync(&mut self) {
        while let Some(job) = self.writer.take_sync() {
            let result = job.run();
            self.writer.done(result).unwrap();
        }
    }
}

fn inode(file: u64, kind: Kind) -> Op {
    Op::Inode(Inode {
        file: FileId::new(file).unwrap(),
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: Time {
            seconds: 1_780_000_000,
            nanos: 1,
        },
        rdev: None,
        target: None,
        flags: Bits(0),
        unrestorable: Bits(0),
        ctime: None,
        btime: None,
    })
}

fn link(parent: u64, name: &str, file: u64) -> Op {
    Op::Link(Link {
        parent: FileId::new(parent).unwrap(),
        name: name.as_bytes().to_vec(),
        file: FileId::new(file).unwrap(),
    })
}

/// The spool (kept open, like the daemon's) and the catalog.
pub struct MadeLog {
    pub spool: PathBuf,
    pub catalog: PathBuf,
    writer: Writer<RealDisk>,
    open: Spool<RealDisk>,
}

fn options() -> SpoolOptions {
    SpoolOptions {
        segment_bytes: 64 << 20,
        bytes_max: 1 << 30,
        level: 1,
        fs_uuid: [7; 16],
        fs_type: "ext4".to_owned(),
        host: None,
    }
}

/// The same log, left as it is by a daemon that ended; gives the catalog's path.
pub fn make_ended(dir: &Path) -> PathBuf {
    make(dir).catalog
}

/// The same log, all of it sealed and nobody holding it; gives the catalog's path.
pub fn make_sealed(dir: &Path) -> PathBuf {
    let mut made = make(dir);
    made.writer.seal_now().unwrap();
    while let Some(job) = made.writer.take_sync() {
        let result = job.run();
        made.writer.done(result).unwrap();
    }
    let mut catalog = Catalog::open(&made.catalog).unwrap();
    for sealed in made.open.segments() {
        catalog.add_segment(&sealed.row()).unwrap();
    }
    catalog.commit().unwrap();
    made.catalog
}

/// `/d`, `/d/a.txt` in two versions, `/gone.txt` deleted, `/sparse` with one block in the middle.
pub fn make(dir: &Path) -> MadeLog {
    let (spool_dir, path) = (dir.join("spool"), dir.join("catalog.db"));
    std::fs::create_dir(&spool_dir).unwrap();
    let disk = RealDisk::open(&spool_dir).unwrap();
    Spool::create(&disk, LOG, None).unwrap();
    let (spool, _) = Spool::open(disk, options(), &Floor::default()).unwrap();
    let mut maker = Maker {
        writer: spool.writer().unwrap(),
        packer: Packer::new(1).unwrap(),
        next_data: 0,
    };
    write(&mut maker);
    let mut catalog = Catalog::create(&path, LOG).unwrap();
    for number in [1, 2] {
        let segment = spool.open_segment(SegmentNo::new(number).unwrap()).unwrap();
        fold_segment(&mut catalog, &segment, None, Before::Unknown).unwrap();
    }
    for sealed in spool.segments() {
        catalog.add_segment(&sealed.row()).unwrap();
    }
    catalog.commit().unwrap();
    assert_eq!(catalog.folded().unwrap().get(), 6);
    MadeLog {
        spool: spool_dir,
        catalog: path,
        writer: maker.writer,
        open: spool,
    }
}

fn write(maker: &mut Maker) {
    let uuid = [7; 16];
    let filesystem = Filesystem {
        uuid,
        fs_type: "ext4".to_owned(),
        mount: None,
    };
    maker.commit(vec![
        Op::Filesystem(filesystem),
        inode(1, Kind::Directory),
        inode(2, Kind::Directory),
        link(1, "d", 2),
    ]);
    let mut ops = vec![inode(3, Kind::Regular)];
    ops.extend(maker.small(3, FIRST));
    ops.push(link(2, "a.txt", 3));
    maker.commit(ops);
    let ops = maker.small(3, SECOND);
    maker.commit(ops);
    maker.seal();
    let mut ops = vec![inode(4, Kind::Regular)];
    ops.extend(maker.small(4, GONE));
    ops.push(link(1, "gone.txt", 4));
    maker.commit(ops);
    let unlink = Unlink {
        parent: FileId::ROOT,
        name: b"gone.txt".to_vec(),
    };
    maker.commit(vec![
        Op::Unlink(unlink),
        Op::Delete(Delete {
            file: FileId::new(4).unwrap(),
        }),
    ]);
    let block = vec![0x55; usize::try_from(layout::BLOCK).unwrap()];
    let middle = maker.data(SPARSE_AT, &block);
    let hole = |offset, end| {
        Extent::Hole(Range {
            offset,
            len: end - offset,
        })
    };
    let list = vec![
        hole(0, SPARSE_AT),
        middle,
        hole(SPARSE_AT + layout::BLOCK, SPARSE_SIZE),
    ];
    let mut ops = vec![inode(5, Kind::Regular)];
    ops.extend(Maker::content(5, SPARSE_SIZE, list));
    ops.push(link(1, "sparse", 5));
    maker.commit(ops);
    maker.sync();
}
