//! A random log, a ledger of what was said about it, and the comparison of both.

use std::collections::BTreeMap;

use tierfs::disk::Disk;
use tierfs::disk::sim::{Rng, SimDisk};
use tierfs::fold::Transactions;
use tierfs::frame::{FrameKind, MetaFrames, PackedFrame, Packer, RawFrame};
use tierfs::record::{Bits, Inode, Kind, Link, Op, Record, Txn, Unlink, Xattrs};
use tierfs::recovery::Recovered;
use tierfs::spool::{Floor, Spool, SpoolError, SpoolOptions};
use tierfs::writer::{Placed, SyncJob, Writer, WriterError};
use tierfs::{DataId, Epoch, FileId, LogId, Lsn, Time};

pub const LOG: LogId = LogId([0x5e; 16]);

pub fn fixed_time() -> Time {
    Time {
        seconds: 1_700_000_000,
        nanos: 5,
    }
}

pub fn options(segment_bytes: u64) -> SpoolOptions {
    SpoolOptions {
        segment_bytes,
        bytes_max: u64::MAX,
        level: 1,
        fs_uuid: [7; 16],
        fs_type: "ext4".to_owned(),
        host: Some("host".to_owned()),
    }
}

/// The seeds of a random test: one that is given, or so many.
pub fn seeds(rounds: u64) -> Vec<u64> {
    if let Ok(seed) = std::env::var("HSM_SEED") {
        return vec![seed.parse().expect("HSM_SEED is a number")];
    }
    let more = std::env::var("HSM_ROUNDS").ok();
    let factor: u64 = more.map_or(1, |text| text.parse().expect("HSM_ROUNDS is a number"));
    (0..rounds * factor.max(1)).collect()
}

/// Runs a test for each seed, and names the seed that fails.
pub fn for_seeds(rounds: u64, test: impl Fn(u64)) {
    for seed in seeds(rounds) {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(seed)));
        if let Err(panic) = result {
            eprintln!("failed with HSM_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

fn bytes(rng: &mut Rng, len: u64) -> Vec<u8> {
    let compressible = rng.below(2) == 0;
    (0..len)
        .map(|at| {
            if compressible {
                (at / 100) as u8
            } else {
                rng.number() as u8
            }
        })
        .collect()
}

/// A transaction that means nothing and has every size.
pub fn txn(lsn: Lsn, rng: &mut Rng) -> Txn {
    let file = FileId::new(lsn.get() + 1).unwrap();
    let mut ops = Vec::new();
    for _ in 0..1 + rng.below(4) {
        ops.push(match rng.below(8) {
            0..=2 => Op::Link(Link {
                parent: FileId::ROOT,
                name: format!("name {}", rng.number()).into_bytes(),
                file,
            }),
            3..=4 => Op::Unlink(Unlink {
                parent: FileId::ROOT,
                name: vec![b'x'; 1 + rng.below(255) as usize],
            }),
            5..=6 => Op::Inode(Inode {
                file,
                kind: Kind::Regular,
                mode: 0o644,
                uid: rng.number() as u32,
                gid: 0,
                mtime: fixed_time(),
                rdev: None,
                target: None,
                flags: Bits(0),
                unrestorable: Bits(0),
                ctime: Some(fixed_time()),
                btime: None,
            }),
            _ => {
                let len = rng.below(3000);
                Op::Xattrs(Xattrs {
                    file,
                    list: vec![(b"user.x".to_vec(), bytes(rng, len))],
                    more: false,
                })
            }
        });
    }
    if rng.below(60) == 0 {
        // Larger than one frame.
        for _ in 0..20 {
            ops.push(Op::Xattrs(Xattrs {
                file,
                list: vec![(b"user.large".to_vec(), bytes(rng, 60_000))],
                more: false,
            }));
        }
    }
    Txn {
        lsn,
        time: fixed_time(),
        wall: fixed_time(),
        ops,
    }
}

pub fn pack_txns(packer: &mut Packer, txns: &[Txn]) -> Vec<PackedFrame> {
    let mut frames = MetaFrames::default();
    for txn in txns {
        frames.push_txn(txn).unwrap();
    }
    frames
        .finish()
        .iter()
        .map(|raw| packer.pack(raw).unwrap())
        .collect()
}

/// What was appended, and how much of it was acknowledged.
#[derive(Default)]
pub struct Ledger {
    pub txns: Vec<Txn>,
    pub data: Vec<(DataId, Vec<u8>, Placed)>,
    /// Lengths of `txns` and `data` that are durable.
    pub durable: (usize, usize),
}

impl Ledger {
    pub fn durable_lsn(&self) -> Option<Lsn> {
        Lsn::new(self.durable.0 as u64)
    }

    pub fn floor(&self) -> Floor {
        Floor {
            log_id: Some(LOG),
            durable: self.durable_lsn(),
            ..Floor::default()
        }
    }
}

/// Appends, syncs and seals at random.
pub struct Driver<D: Disk> {
    pub writer: Writer<D>,
    packer: Packer,
    job: Option<(SyncJob<D>, (usize, usize))>,
    next_data: u64,
}

impl<D: Disk> Driver<D> {
    pub fn new(spool: &Spool<D>, epoch: u64) -> Self {
        Self {
            writer: spool.writer_with(Epoch(epoch), fixed_time).unwrap(),
            packer: Packer::new(1).unwrap(),
            job: None,
            next_data: 0,
        }
    }

    pub fn append_data(&mut self, ledger: &mut Ledger, rng: &mut Rng) -> Result<(), WriterError> {
        let mut raw = RawFrame::new(FrameKind::Data);
        let mut contents = Vec::new();
        for _ in 0..1 + rng.below(4) {
            let most = if rng.below(20) == 0 { 200_000 } else { 3000 };
            let len = 1 + rng.below(most);
            let id = DataId {
                epoch: self.writer.epoch(),
                number: self.next_data,
            };
            self.next_data += 1 + rng.below(3);
            let content = bytes(rng, len);
            if raw.fits_data(content.len()) {
                raw.push_data(id, &content);
                contents.push((id, content));
            }
        }
        let packed = self.packer.pack(&raw).unwrap();
        let placed = self.writer.append_data(packed)?;
        let placed = contents
            .into_iter()
            .map(|(id, content)| (id, content, placed));
        ledger.data.extend(placed);
        Ok(())
    }

    pub fn append_txns(&mut self, ledger: &mut Ledger, rng: &mut Rng) -> Result<(), WriterError> {
        let mut txns = Vec::new();
        let mut lsn = self.writer.next_lsn();
        for _ in 0..1 + rng.below(5) {
            txns.push(txn(lsn, rng));
            lsn = lsn.next();
        }
        let frames = pack_txns(&mut self.packer, &txns);
        self.writer.append_txns(frames)?;
        ledger.txns.extend(txns);
        Ok(())
    }

    pub fn take(&mut self, ledger: &Ledger) {
        if let Some(job) = self.writer.take_sync() {
            self.job = Some((job, (ledger.txns.len(), ledger.data.len())));
        }
    }

    pub fn run_job(&mut self, ledger: &mut Ledger) -> Result<(), WriterError> {
        if let Some((job, reached)) = self.job.take() {
            let result = job.run();
            let synced = self.writer.done(result)?;
            ledger.durable = reached;
            assert_eq!(synced.durable, ledger.durable_lsn());
            assert_eq!(self.writer.watermarks().durable, ledger.durable_lsn());
        }
        Ok(())
    }

    /// Makes everything durable.
    pub fn sync(&mut self, ledger: &mut Ledger) -> Result<(), WriterError> {
        self.run_job(ledger)?;
        self.take(ledger);
        self.run_job(ledger)
    }

    /// Makes everything durable, for logs that have no ledger from their beginning.
    pub fn sync_quietly(&mut self) {
        if let Some(job) = self.writer.take_sync() {
            let result = job.run();
            self.writer.done(result).unwrap();
        }
    }

    /// One random step; a full disk is no failure.
    pub fn step(&mut self, ledger: &mut Ledger, rng: &mut Rng) -> Result<(), WriterError> {
        let done = match rng.below(16) {
            0..=5 => self.append_txns(ledger, rng),
            6..=10 => self.append_data(ledger, rng),
            11..=12 => {
                self.take(ledger);
                Ok(())
            }
            13..=14 => self.run_job(ledger),
            _ => self.writer.seal_now(),
        };
        match done {
            Err(WriterError::Full { .. }) => Ok(()),
            done => done,
        }
    }
}

/// A new spool on a disk in memory.
pub fn new_spool(disk: &SimDisk, segment_bytes: u64) -> Spool<SimDisk> {
    Spool::create(disk, LOG, None).unwrap();
    open_spool(disk, segment_bytes, &Floor::default())
        .unwrap()
        .0
}

pub fn open_spool<D: Disk>(
    disk: &D,
    segment_bytes: u64,
    floor: &Floor,
) -> Result<(Spool<D>, Recovered), SpoolError> {
    Spool::open_at(disk.clone(), options(segment_bytes), floor, fixed_time())
}

/// Everything that the sealed segments hold.
pub struct Content {
    pub txns: Vec<Txn>,
    pub data: BTreeMap<(u64, u64), (Vec<u8>, Placed)>,
}

/// Reads all segments of a spool and checks the chain.
pub fn read_all<D: Disk>(spool: &Spool<D>) -> Content {
    let mut content = Content {
        txns: Vec::new(),
        data: BTreeMap::new(),
    };
    let mut previous = spool.removed().map(|(_, hash)| hash);
    for sealed in spool.segments() {
        spool.verify(sealed.no).unwrap();
        let segment = spool.open_segment(sealed.no).unwrap();
        assert_eq!(segment.header.previous, previous);
        previous = Some(sealed.hash);
        for next in Transactions::new(&segment) {
            let (txn, place) = next.unwrap();
            assert_eq!(place.segment, sealed.no);
            assert!(segment.frame_at(place.frame_offset).is_some());
            content.txns.push(txn);
        }
        for (number, frame) in segment.index.frames.iter().enumerate() {
            if frame.kind != FrameKind::Data {
                continue;
            }
            let raw = segment.read_frame(number).unwrap();
            let records = segment.read_records(number).unwrap();
            for (entry, record) in frame.data.iter().zip(records) {
                let Record::Data(data) = record else {
                    panic!("{record:?}")
                };
                let start = entry.raw_offset as usize;
                assert_eq!(raw[start..start + entry.len as usize], data.bytes);
                assert_eq!(entry.id, data.id);
                let placed = Placed {
                    segment: sealed.no,
                    frame_offset: frame.offset,
                };
                content
                    .data
                    .insert((data.id.epoch.0, data.id.number), (data.bytes, placed));
            }
        }
    }
    content
}

/// The spool holds every acknowledged record, whole and in its place, and no record that was not
/// appended. The ledger is cut to what survived.
pub fn compare(content: &Content, ledger: &mut Ledger) {
    assert!(
        content.txns.len() >= ledger.durable.0,
        "{} transactions survive, {} were acknowledged",
        content.txns.len(),
        ledger.durable.0
    );
    assert!(content.txns.len() <= ledger.txns.len());
    assert!(
        content.txns == ledger.txns[..content.txns.len()],
        "a transaction changed"
    );
    let mut survived = 0;
    for (number, (id, bytes, placed)) in ledger.data.iter().enumerate() {
        match content.data.get(&(id.epoch.0, id.number)) {
            Some((found, at)) => {
                assert!(found == bytes && at == placed, "data {id} changed");
                survived += 1;
            }
            None => assert!(
                number >= ledger.durable.1,
                "data {id} was acknowledged and is lost"
            ),
        }
    }
    assert_eq!(survived, content.data.len(), "data that nobody appended");
    ledger.txns.truncate(content.txns.len());
    ledger
        .data
        .retain(|(id, ..)| content.data.contains_key(&(id.epoch.0, id.number)));
    ledger.durable = (ledger.txns.len(), ledger.data.len());
}

/// After a crash: recovers, compares, loses power again, goes on writing, closes, and compares again.
pub fn recover_and_go_on(disk: &SimDisk, ledger: &mut Ledger, segment_bytes: u64, seed: u64) {
    let open = |disk: &SimDisk, ledger: &Ledger| {
        open_spool(disk, segment_bytes, &ledger.floor())
            .unwrap_or_else(|error| panic!("{error}\n{}", disk.names().join("\n")))
    };
    let (spool, recovered) = open(disk, ledger);
    assert!(!recovered.loss_accepted && !recovered.catalog_is_ahead);
    compare(&read_all(&spool), ledger);
    assert_eq!(recovered.end, ledger.durable_lsn());
    drop(spool);
    // What was recovered is durable, also where it had only been in pages that a failed sync dropped.
    let disk = disk.power_loss(seed);
    let (spool, recovered) = open(&disk, ledger);
    assert_eq!(
        (recovered.segments, recovered.end),
        (Vec::new(), ledger.durable_lsn())
    );
    compare(&read_all(&spool), ledger);
    let mut rng = Rng(seed ^ 0xaaaa);
    let mut driver = Driver::new(&spool, seed.wrapping_add(1_000_000));
    for _ in 0..10 {
        driver.step(ledger, &mut rng).unwrap();
    }
    driver.sync(ledger).unwrap();
    drop((driver, spool));
    let (spool, _) = open(&disk, ledger);
    compare(&read_all(&spool), ledger);
}
