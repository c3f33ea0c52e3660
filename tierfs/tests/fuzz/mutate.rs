//! Segments taken apart, changed, and put together with right hashes, so that changes reach what
//! lies below them.

use std::path::Path;

use tierfs::Hash;
use tierfs::disk::sim::Rng;
use tierfs::frame::{FRAME_PREFIX_LEN, decompress};
use tierfs::segment::{Segment, TRAILER_LEN};

const HEAD: usize = 8;

#[derive(Clone)]
struct FrameParts {
    /// The first 64 bytes of its header's payload.
    fields: Vec<u8>,
    raw: Vec<u8>,
    /// `raw` compressed, while it is unchanged.
    compressed: Vec<u8>,
}

/// A segment without its hashes.
#[derive(Clone)]
pub struct Parts {
    /// CBOR of the header.
    header: Vec<u8>,
    frames: Vec<FrameParts>,
    /// CBOR of the index.
    index: Vec<u8>,
    /// The first 72 bytes of the trailer's payload.
    trailer: Vec<u8>,
}

fn block(magic: u32, mark: &[u8], body: &[u8]) -> (Vec<u8>, Hash) {
    let payload = [mark, body].concat();
    let hash = Hash::of(&payload);
    let len = (payload.len() + 32) as u32;
    let bytes = [
        &magic.to_le_bytes()[..],
        &len.to_le_bytes(),
        &payload,
        &hash.0,
    ]
    .concat();
    (bytes, hash)
}

/// A frame with right lengths and hashes, and the hash of its header.
fn frame(parts: &FrameParts, previous: &Hash) -> (Vec<u8>, Hash) {
    let compressed = &parts.compressed;
    let mut payload = parts.fields.clone();
    // Mostly true lengths: the fields before and after are as they were changed.
    if payload[52] == 0 {
        payload[44..48].copy_from_slice(&(compressed.len() as u32).to_le_bytes());
        payload[48..52].copy_from_slice(&(parts.raw.len() as u32).to_le_bytes());
    }
    payload.extend(previous.0);
    payload.extend(Hash::of(compressed).0);
    let hash = Hash::of(&payload);
    payload.extend(hash.0);
    let head = [0x184D_2A51_u32.to_le_bytes(), 160_u32.to_le_bytes()].concat();
    ([&head, &payload, &compressed[..]].concat(), hash)
}

impl Parts {
    fn of(bytes: &[u8]) -> Self {
        let segment = Segment::open(std::sync::Arc::new(bytes.to_vec()), "corpus").unwrap();
        let frames = &segment.index.frames;
        let start = frames[0].offset as usize;
        let end = frames.last().unwrap().end() as usize;
        let trailer = bytes.len() - TRAILER_LEN;
        let split = |at: usize, entry: &tierfs::segment::FrameEntry| {
            let body = at + FRAME_PREFIX_LEN;
            let compressed = &bytes[body..body + entry.compressed_len as usize];
            let raw = decompress(compressed, entry.raw_len as usize).unwrap();
            FrameParts {
                fields: bytes[at + HEAD..at + HEAD + 64].to_vec(),
                compressed: zstd::bulk::compress(&raw, 1).unwrap(),
                raw,
            }
        };
        Self {
            header: bytes[HEAD + 8..start - 32].to_vec(),
            frames: frames
                .iter()
                .map(|entry| split(entry.offset as usize, entry))
                .collect(),
            index: bytes[end + HEAD + 8..trailer - 32].to_vec(),
            trailer: bytes[trailer + HEAD..trailer + HEAD + 72].to_vec(),
        }
    }

    /// The file.
    pub fn assemble(&self) -> Vec<u8> {
        let (mut out, mut previous) = block(0x184D_2A50, b"HSM-SEG\n", &self.header);
        for parts in &self.frames {
            let (bytes, hash) = frame(parts, &previous);
            out.extend(bytes);
            previous = hash;
        }
        let (index, hash) = block(0x184D_2A52, b"HSM-IDX\n", &self.index);
        out.extend(index);
        let seal = Hash::of(&[&self.trailer[..], &hash.0].concat());
        out.extend(0x184D_2A53_u32.to_le_bytes());
        out.extend(104_u32.to_le_bytes());
        out.extend(&self.trailer);
        out.extend(seal.0);
        out
    }
}

/// The golden segments, packed again by this library's zstd, so that lengths are those of the index.
pub fn corpus() -> Vec<Parts> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    let mut corpus = Vec::new();
    for number in 1..=3 {
        let bytes = std::fs::read(golden.join(format!("{number:010}.hsm.zst"))).unwrap();
        corpus.push(Parts::of(&rewrite(&bytes)));
    }
    corpus
}

/// The same frames, written by today's encoder: index and trailer fit what [`frame`] makes.
fn rewrite(bytes: &[u8]) -> Vec<u8> {
    use tierfs::segment::{Index, encode_end};
    let parts = Parts::of(bytes);
    let segment = Segment::open(std::sync::Arc::new(bytes.to_vec()), "corpus").unwrap();
    let (mut out, mut previous) = block(0x184D_2A50, b"HSM-SEG\n", &parts.header);
    let mut frames = segment.index.frames.clone();
    for (entry, parts) in frames.iter_mut().zip(&parts.frames) {
        let (bytes, hash) = frame(parts, &previous);
        entry.offset = out.len() as u64;
        entry.compressed_len = (bytes.len() - FRAME_PREFIX_LEN) as u32;
        out.extend(bytes);
        previous = hash;
    }
    let mut trailer = segment.trailer.unwrap();
    trailer.index_offset = out.len() as u64;
    out.extend(encode_end(&Index { frames }, trailer).unwrap());
    out
}

/// Numbers that programs get wrong.
const NUMBERS: [u64; 12] = [
    0,
    1,
    23,
    24,
    255,
    65_536,
    1 << 20,
    i32::MAX as u64,
    u32::MAX as u64,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

fn change(bytes: &mut Vec<u8>, rng: &mut Rng) {
    if bytes.is_empty() {
        return;
    }
    let at = rng.below(bytes.len() as u64) as usize;
    let number = NUMBERS[rng.below(12) as usize];
    match rng.below(9) {
        0 => bytes[at] ^= 1 << rng.below(8),
        1 => bytes[at] = rng.number() as u8,
        2 => {
            let width = [4, 8][rng.below(2) as usize].min(bytes.len() - at);
            bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        // An integer of CBOR, or the length of a string, an array or a map.
        3 | 4 => {
            let head = (rng.below(6) << 5) as u8 | 0x1b;
            let number = [&[head], &number.to_be_bytes()[..]].concat();
            bytes.splice(at..=at, number);
        }
        5 => bytes.truncate(at),
        6 => {
            let end = (at + 1 + rng.below(40) as usize).min(bytes.len());
            let part = bytes[at..end].to_vec();
            bytes.splice(at..at, part);
        }
        7 => {
            let end = (at + 1 + rng.below(40) as usize).min(bytes.len());
            bytes.drain(at..end);
        }
        // Deep nesting.
        _ => {
            let deep = [0x81, 0xa1, 0xc1, 0x9f][rng.below(4) as usize];
            let len = 1 << rng.below(17);
            bytes.splice(at..at, std::iter::repeat_n(deep, len));
        }
    }
}

/// Fields of fixed length stay so long.
fn change_fixed(bytes: &mut [u8], rng: &mut Rng) {
    let at = rng.below(bytes.len() as u64) as usize;
    let width = [1, 4, 8][rng.below(3) as usize].min(bytes.len() - at);
    let number = NUMBERS[rng.below(12) as usize];
    let little = number.to_le_bytes();
    bytes[at..at + width].copy_from_slice(&little[..width]);
}

/// One hostile segment.
pub fn mutate(parts: &Parts, rng: &mut Rng) -> Vec<u8> {
    let mut parts = parts.clone();
    for _ in 0..=rng.below(3) {
        let number = rng.below(parts.frames.len() as u64) as usize;
        match rng.below(8) {
            0 => change(&mut parts.header, rng),
            1..=3 => {
                let frame = &mut parts.frames[number];
                change(&mut frame.raw, rng);
                frame.compressed = zstd::bulk::compress(&frame.raw, 1).unwrap();
            }
            4 => change_fixed(&mut parts.frames[number].fields, rng),
            5 => change(&mut parts.index, rng),
            6 => change_fixed(&mut parts.trailer, rng),
            _ => {
                let other = rng.below(parts.frames.len() as u64) as usize;
                parts.frames.swap(number, other);
            }
        }
    }
    let mut bytes = parts.assemble();
    if rng.below(4) == 0 {
        for _ in 0..=rng.below(3) {
            change(&mut bytes, rng);
        }
    }
    bytes
}
