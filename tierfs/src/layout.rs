//! How a file's content is cut: pieces that are hashed, chunks that are stored.
//!
//! Content is compared and verified in *pieces*: a contiguous range of data cut at every multiple of
//! [`BLOCK`]. It is stored in *chunks*, one data record each: a contiguous range of data cut at every
//! [`CHUNK`] bytes, counted from its start rounded down to a block. Holes belong to neither, so a
//! hole of any size comes back as a hole. Both cuts follow from (offset, length) alone.

use crate::ids::Hash;

/// Pieces are cut at multiples of this many bytes.
pub const BLOCK: u64 = 64 * 1024;
/// The most bytes in one data record: fifteen blocks, so that it fits a frame with its CBOR head.
pub const CHUNK: u64 = 15 * BLOCK;

/// A range of bytes of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Range {
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Length in bytes, never 0 in what the functions here return.
    pub len: u64,
}

impl Range {
    /// The offset of the first byte after the range.
    pub fn end(self) -> u64 {
        self.offset + self.len
    }
}

/// Cuts `range` at `base + k * step`; `base` is not after its start.
fn cut(range: Range, base: u64, step: u64) -> impl Iterator<Item = Range> {
    let end = range.end();
    let mut offset = range.offset;
    std::iter::from_fn(move || {
        if offset >= end {
            return None;
        }
        let boundary = base + ((offset - base) / step + 1).saturating_mul(step);
        let piece = Range {
            offset,
            len: boundary.min(end) - offset,
        };
        offset = piece.end();
        Some(piece)
    })
}

/// The pieces of a contiguous range of data. `range.end()` must not overflow.
pub fn pieces(range: Range) -> impl Iterator<Item = Range> {
    cut(range, 0, BLOCK)
}

/// How many pieces [`pieces`] gives.
pub fn piece_count(range: Range) -> u64 {
    if range.len == 0 {
        0
    } else {
        (range.end() - 1) / BLOCK - range.offset / BLOCK + 1
    }
}

/// The chunks of a contiguous range of data, in ascending order; each is one data record.
pub fn chunks(range: Range) -> impl Iterator<Item = Range> {
    cut(range, range.offset / BLOCK * BLOCK, CHUNK)
}

/// How many chunks [`chunks`] gives.
pub fn chunk_count(range: Range) -> u64 {
    let base = range.offset / BLOCK * BLOCK;
    if range.len == 0 {
        0
    } else {
        (range.end() - 1 - base) / CHUNK + 1
    }
}

/// The root hash of a version: BLAKE3 over every piece in ascending order, each as offset (u64 little
/// endian), length (u32 little endian) and BLAKE3 of its bytes, and at the end the file's size (u64
/// little endian).
#[derive(Default)]
pub struct RootHasher(blake3::Hasher);

impl RootHasher {
    /// Adds the next piece; at most [`BLOCK`] bytes long.
    pub fn piece(&mut self, piece: Range, hash: &Hash) {
        let mut bytes = [0; 8 + 4 + Hash::LEN];
        bytes[..8].copy_from_slice(&piece.offset.to_le_bytes());
        let len = u32::try_from(piece.len).unwrap_or(u32::MAX);
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..].copy_from_slice(&hash.0);
        self.0.update(&bytes);
    }

    /// Adds the pieces of a contiguous range in order.
    pub fn pieces<'h>(&mut self, range: Range, hashes: impl IntoIterator<Item = &'h Hash>) {
        for (piece, hash) in pieces(range).zip(hashes) {
            self.piece(piece, hash);
        }
    }

    /// The root hash of a file of `size` bytes.
    pub fn finish(mut self, size: u64) -> Hash {
        self.0.update(&size.to_le_bytes());
        self.0.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn cuts_cover_the_range_in_order(offset in 0..5 * CHUNK, len in 0..5 * CHUNK) {
            let range = Range { offset, len };
            for (cuts, max) in [(pieces(range).collect::<Vec<_>>(), BLOCK), (chunks(range).collect(), CHUNK)] {
                let mut at = offset;
                for cut in &cuts {
                    prop_assert_eq!(cut.offset, at);
                    prop_assert!(cut.len > 0 && cut.len <= max);
                    at = cut.end();
                }
                prop_assert_eq!(at, range.end());
            }
            prop_assert_eq!(pieces(range).count() as u64, piece_count(range));
            prop_assert_eq!(chunks(range).count() as u64, chunk_count(range));
        }

        #[test]
        fn the_pieces_of_the_chunks_are_the_pieces(offset in 0..3 * CHUNK, len in 0..5 * CHUNK) {
            let range = Range { offset, len };
            let all: Vec<_> = pieces(range).collect();
            let through: Vec<_> = chunks(range).flat_map(pieces).collect();
            prop_assert_eq!(all, through);
        }
    }

    #[test]
    fn the_root_tells_layout_and_size_apart() {
        let hash = Hash::of(b"x");
        let root = |offset, len, size| {
            let mut hasher = RootHasher::default();
            hasher.pieces(Range { offset, len }, [&hash]);
            hasher.finish(size)
        };
        assert_ne!(root(0, 1, 1), root(0, 1, 2));
        assert_ne!(root(0, 1, 2), root(1, 1, 2));
    }
}
