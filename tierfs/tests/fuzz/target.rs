//! Everything that reads bytes of the log, on the same bytes.

use std::sync::Arc;

use tierfs::fold::Transactions;
use tierfs::frame::{FRAME_PREFIX_LEN, FrameHeader, decompress};
use tierfs::record::Record;
use tierfs::scan::{Scan, Step};
use tierfs::segment::{ReadAt, Segment};

/// True where all of it is a valid sealed segment.
pub fn read(bytes: &[u8]) -> bool {
    let source: Arc<dyn ReadAt> = Arc::new(bytes.to_vec());
    drop(Record::decode_all(bytes));
    drop(decompress(bytes, bytes.len().min(1 << 20)));
    if let Some(prefix) = bytes.first_chunk::<FRAME_PREFIX_LEN>() {
        drop(FrameHeader::decode(prefix));
    }
    scan(&source);
    if let Ok(segment) = Segment::salvage(source.clone(), "salvaged") {
        whole(&segment);
    }
    match Segment::open(source, "opened") {
        Ok(segment) => whole(&segment),
        Err(error) => {
            assert!(error.to_string().contains("opened"), "{error}");
            false
        }
    }
}

fn whole(segment: &Segment) -> bool {
    let txns = Transactions::new(segment).all(|next| next.is_ok());
    let frames = (0..segment.index.frames.len()).all(|number| {
        let records = segment.read_records(number).is_ok();
        let offset = segment.index.frames[number].offset;
        records && segment.frame_at(offset) == Some(number)
    });
    assert!(segment.read_frame(segment.index.frames.len()).is_err());
    txns && frames
}

fn scan(source: &Arc<dyn ReadAt>) {
    let Ok(mut scan) = Scan::open(source.clone(), "scanned") else {
        return;
    };
    loop {
        match scan.next_frame() {
            Ok(Step::Frame(_)) => {}
            Ok(Step::Stop(_)) if scan.resync().is_ok_and(|found| found) => {}
            _ => return,
        }
    }
}
