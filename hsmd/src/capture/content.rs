//! Reading a version of a file's content: what is there, cut into pieces, compared with the version
//! that the log has, and only the difference put into data frames.
//!
//! Guarantee: the extents of a [`Version`] cover `[0, size)`; all bytes that they name by data ids
//! have been given to the [`DataSink`] before. Whether the bytes belong to one moment is told by
//! [`Read::changed`]. Memory does not grow with the file but for 32 bytes for each 64 KiB of new
//! content, which the commit record lists.

use std::collections::VecDeque;
use std::iter::Peekable;
use std::os::fd::BorrowedFd;

use tierfs::layout::{self, Range, RootHasher};
use tierfs::record::Extent;
use tierfs::{DataId, Hash, Lsn};

use super::facts::Version;
use crate::sys::seek::{self, Content};
use crate::sys::{self, fiemap, io};

/// The most pieces in one extent, so that an extent always fits a record.
const PIECES_PER_EXTENT: usize = 4096;

/// Ranges asked for at a time.
const RANGES_AHEAD: usize = 4096;

/// Where new content goes: into data frames.
pub trait DataSink {
    /// What can go wrong there.
    type Error: From<sys::Error>;
    /// Names a chunk of `len` bytes (1 to [`layout::CHUNK`]) and gives room for it.
    fn begin(&mut self, len: usize) -> Result<(DataId, &mut [u8]), Self::Error>;
    /// Takes the last chunk back: its bytes could not be had.
    fn cancel(&mut self);
}

/// The pieces of the version that the log has, ascending.
pub type Base<'b> = Box<dyn Iterator<Item = (Range, Hash)> + 'b>;

/// What came of reading.
#[derive(Debug)]
pub struct Read {
    /// What was read.
    pub version: Version,
    /// The file ended before its size said, or shrank: the version is of no moment.
    pub changed: bool,
    /// Some of it is zeros that may never have been written: flushed, the file may have more holes.
    pub doubtful: bool,
}

/// Reads `[0, size)` of the file, flushed before where asked for. `base` names the version that the log has, and gives its pieces.
pub fn read<S: DataSink>(
    fd: BorrowedFd<'_>,
    size: u64,
    base: Option<(Lsn, Base<'_>)>,
    flush: bool,
    sink: &mut S,
) -> Result<Read, S::Error> {
    let (base_lsn, pieces) = match base {
        Some((lsn, pieces)) => (Some(lsn), Some(pieces.peekable())),
        None => (None, None),
    };
    let mut reader = Reader {
        fd,
        sink,
        list: ExtentList::default(),
        root: RootHasher::default(),
        scratch: Vec::new(),
        zeros: false,
    };
    let mut pieces = pieces;
    let mut changed = false;
    let whole = seek::Range {
        offset: 0,
        len: size,
        content: Content::Data,
    };
    let sparse = match seek::ranges(fd, size).next() {
        Some(first) => first? != whole,
        None => false,
    };
    let fiemap::Allocation {
        unwritten,
        reserved,
    } = fiemap::allocation(fd, size, flush || sparse)?;
    let mut ranges = seek::ranges(fd, size).flat_map(|range| without(range, &unwritten));
    let mut ahead = VecDeque::new();
    loop {
        // Asked before anything near is read: the pages that reading ahead leaves in preallocated space
        // count as data afterwards.
        if ahead.is_empty() {
            ahead.extend(ranges.by_ref().take(RANGES_AHEAD));
        }
        let Some(range) = ahead.pop_front() else {
            break;
        };
        let range = range?;
        let at = Range {
            offset: range.offset,
            len: range.len,
        };
        if range.content == Content::Hole {
            reader.list.push(Extent::Hole(at));
            continue;
        }
        for chunk in layout::chunks(at) {
            let whole = match &mut pieces {
                None => reader.new_chunk(chunk)?,
                Some(base) => reader.changed_pieces(chunk, base)?,
            };
            if !whole {
                changed = true;
                // What is missing reads as a hole; the caller will not take this version for whole.
                reader.list.push(Extent::Hole(chunk));
            }
        }
    }
    let Reader {
        list, root, zeros, ..
    } = reader;
    let uses_base = list
        .0
        .iter()
        .any(|extent| matches!(extent, Extent::Same(_)));
    let base = base_lsn.filter(|_| uses_base);
    Ok(Read {
        version: Version {
            size,
            base,
            extents: list.0,
            root: root.finish(size),
            fuzzy: false,
        },
        changed,
        doubtful: reserved && zeros,
    })
}

/// A range with the parts that were never written as holes.
fn without(
    range: Result<seek::Range, sys::Error>,
    unwritten: &[(u64, u64)],
) -> Vec<Result<seek::Range, sys::Error>> {
    let Ok(seek::Range {
        offset,
        len,
        content: Content::Data,
    }) = range
    else {
        return vec![range];
    };
    let (mut at, end, mut parts) = (offset, offset + len, Vec::new());
    let mut part = |from: u64, to: u64, content| {
        if from < to {
            parts.push(Ok(seek::Range {
                offset: from,
                len: to - from,
                content,
            }));
        }
    };
    let first = unwritten.partition_point(|(_, to)| *to <= offset);
    for (from, to) in unwritten[first..]
        .iter()
        .take_while(|(from, _)| *from < end)
    {
        let (from, to) = ((*from).max(at), (*to).min(end));
        part(at, from, Content::Data);
        part(from, to, Content::Hole);
        at = to;
    }
    part(at, end, Content::Data);
    parts
}

struct Reader<'s, S> {
    fd: BorrowedFd<'s>,
    sink: &'s mut S,
    list: ExtentList,
    root: RootHasher,
    scratch: Vec<u8>,
    /// A page of zeros was seen.
    zeros: bool,
}

impl<S: DataSink> Reader<'_, S> {
    /// Reads a chunk straight into a frame. False where the file ended before.
    fn new_chunk(&mut self, chunk: Range) -> Result<bool, S::Error> {
        let (id, room) = self.sink.begin(to_len(chunk.len))?;
        if !fill(self.fd, room, chunk.offset)? {
            self.sink.cancel();
            return Ok(false);
        }
        self.zeros |= has_zero_page(room);
        let hashes: Vec<Hash> = layout::pieces(chunk)
            .map(|piece| Hash::of(&room[within(chunk, piece)]))
            .collect();
        self.root.pieces(chunk, &hashes);
        self.list.push_data(chunk, id, hashes);
        Ok(true)
    }

    /// Reads a chunk and logs the runs of pieces that the base does not have. False where the file
    /// ended before.
    fn changed_pieces(
        &mut self,
        chunk: Range,
        base: &mut Peekable<impl Iterator<Item = (Range, Hash)>>,
    ) -> Result<bool, S::Error> {
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.resize(to_len(chunk.len), 0);
        let whole = fill(self.fd, &mut bytes, chunk.offset)?;
        if whole {
            self.zeros |= has_zero_page(&bytes);
            let mut run: Option<(Range, Vec<Hash>)> = None;
            for piece in layout::pieces(chunk) {
                let hash = Hash::of(&bytes[within(chunk, piece)]);
                self.root.piece(piece, &hash);
                if base_has(base, piece, &hash) {
                    self.end_run(run.take(), chunk, &bytes)?;
                    self.list.push(Extent::Same(piece));
                } else {
                    let (range, hashes) = run.get_or_insert_with(|| {
                        (
                            Range {
                                offset: piece.offset,
                                len: 0,
                            },
                            Vec::new(),
                        )
                    });
                    range.len += piece.len;
                    hashes.push(hash);
                }
            }
            self.end_run(run, chunk, &bytes)?;
        }
        self.scratch = bytes;
        Ok(whole)
    }

    fn end_run(
        &mut self,
        run: Option<(Range, Vec<Hash>)>,
        chunk: Range,
        bytes: &[u8],
    ) -> Result<(), S::Error> {
        if let Some((range, hashes)) = run {
            let (id, room) = self.sink.begin(to_len(range.len))?;
            room.copy_from_slice(&bytes[within(chunk, range)]);
            self.list.push_data(range, id, hashes);
        }
        Ok(())
    }
}

/// Whether one of the pages (counted from the start of the bytes) is all zeros.
fn has_zero_page(bytes: &[u8]) -> bool {
    bytes
        .chunks(4096)
        .any(|page| page[0] == 0 && page.iter().all(|byte| *byte == 0))
}

/// A chunk's length in memory: at most [`layout::CHUNK`].
fn to_len(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

/// Where `inner` lies in the bytes of `outer`.
fn within(outer: Range, inner: Range) -> std::ops::Range<usize> {
    let start = to_len(inner.offset - outer.offset);
    start..start + to_len(inner.len)
}

/// False where the file ends before `room` is full.
fn fill(fd: BorrowedFd<'_>, room: &mut [u8], offset: u64) -> Result<bool, sys::Error> {
    let mut done = 0;
    while done < room.len() {
        match io::read_at(fd, &mut room[done..], offset + done as u64)? {
            0 => return Ok(false),
            more => done += more,
        }
    }
    Ok(true)
}

/// True where the base has exactly this piece with these bytes.
fn base_has(
    base: &mut Peekable<impl Iterator<Item = (Range, Hash)>>,
    piece: Range,
    hash: &Hash,
) -> bool {
    while base
        .next_if(|(range, _)| range.offset < piece.offset)
        .is_some()
    {}
    base.peek()
        .is_some_and(|(range, known)| *range == piece && known == hash)
}

/// Extents in ascending order, neighbours of one kind joined.
#[derive(Default)]
struct ExtentList(Vec<Extent>);

impl ExtentList {
    fn push(&mut self, extent: Extent) {
        match (self.0.last_mut(), &extent) {
            (Some(Extent::Hole(last)), Extent::Hole(range))
            | (Some(Extent::Same(last)), Extent::Same(range))
                if last.end() == range.offset =>
            {
                last.len += range.len;
            }
            _ => self.0.push(extent),
        }
    }

    /// Joins a chunk to the extent before it where that gives the same chunks and data ids.
    fn push_data(&mut self, range: Range, id: DataId, hashes: Vec<Hash>) {
        if let Some(Extent::Data {
            range: last,
            first,
            hashes: all,
        }) = self.0.last_mut()
        {
            let next = DataId {
                epoch: first.epoch,
                number: first.number + layout::chunk_count(*last),
            };
            let joined = Range {
                offset: last.offset,
                len: last.len + range.len,
            };
            let fits = last.end() == range.offset
                && id == next
                && all.len() + hashes.len() <= PIECES_PER_EXTENT;
            if fits
                && layout::chunk_count(joined) == layout::chunk_count(*last) + 1
                && starts_chunk(joined, range)
            {
                *last = joined;
                all.extend(hashes);
                return;
            }
        }
        self.0.push(Extent::Data {
            range,
            first: id,
            hashes,
        });
    }
}

/// True where `last` would be exactly the last chunk of `joined`.
fn starts_chunk(joined: Range, last: Range) -> bool {
    let base = joined.offset / layout::BLOCK * layout::BLOCK;
    (last.offset - base).is_multiple_of(layout::CHUNK)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use tierfs::Epoch;

    use super::*;

    #[derive(Default)]
    struct Memory {
        chunks: BTreeMap<u64, Vec<u8>>,
        next: u64,
    }

    impl DataSink for Memory {
        type Error = sys::Error;
        fn begin(&mut self, len: usize) -> Result<(DataId, &mut [u8]), sys::Error> {
            self.next += 1;
            let room = self.chunks.entry(self.next).or_default();
            room.resize(len, 0);
            Ok((
                DataId {
                    epoch: Epoch(1),
                    number: self.next,
                },
                room,
            ))
        }
        fn cancel(&mut self) {
            self.chunks.remove(&self.next);
        }
    }

    /// A version as a reader of the log would build it: bytes, and where data lies.
    fn build(read: &Read, sink: &Memory, base: &[u8]) -> (Vec<u8>, Vec<(Range, Hash)>) {
        let version = &read.version;
        let mut bytes = vec![0; to_len(version.size)];
        let (mut at, mut pieces) = (0, Vec::new());
        for extent in &version.extents {
            let range = extent.range();
            assert_eq!(range.offset, at);
            at = range.end();
            let span = to_len(range.offset)..to_len(range.end());
            match extent {
                Extent::Hole(_) => continue,
                Extent::Same(_) => bytes[span.clone()].copy_from_slice(&base[span]),
                Extent::Data { first, hashes, .. } => {
                    for (chunk, number) in layout::chunks(range).zip(first.number..) {
                        bytes[to_len(chunk.offset)..to_len(chunk.end())]
                            .copy_from_slice(&sink.chunks[&number]);
                    }
                    assert_eq!(hashes.len(), layout::pieces(range).count());
                }
            }
            pieces.extend(
                layout::pieces(range)
                    .map(|p| (p, Hash::of(&bytes[to_len(p.offset)..to_len(p.end())]))),
            );
        }
        assert_eq!(at, version.size);
        let mut root = RootHasher::default();
        for (piece, hash) in &pieces {
            root.piece(*piece, hash);
        }
        assert_eq!(root.finish(version.size), version.root);
        (bytes, pieces)
    }

    fn file(writes: &[(u64, Vec<u8>)], size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in writes {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    fn bytes_of(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len().try_into().unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn a_version_and_its_successor_come_back(
            first in proptest::collection::vec((0..3_000_000u64, 1..200_000usize, 1..255u8), 0..6),
            second in proptest::collection::vec((0..3_000_000u64, 1..200_000usize, 1..255u8), 0..4),
            grow in 0..100_000u64,
        ) {
            let writes = |list: &[(u64, usize, u8)]| -> Vec<(u64, Vec<u8>)> {
                list.iter().map(|(at, len, byte)| (*at, vec![*byte; *len])).collect()
            };
            let file = file(&writes(&first), grow);
            let mut sink = Memory::default();
            let size = file.metadata().unwrap().len();
            let one = read(file.as_fd(), size, None, false, &mut sink).unwrap();
            let (bytes, pieces) = build(&one, &sink, &[]);
            prop_assert!(!one.changed && bytes == bytes_of(&file));

            for (offset, bytes) in writes(&second) {
                file.write_all_at(&bytes, offset).unwrap();
            }
            let size = file.metadata().unwrap().len();
            let before = sink.chunks.values().map(Vec::len).sum::<usize>();
            let base: Base<'_> = Box::new(pieces.into_iter());
            let two = read(file.as_fd(), size, Some((Lsn::FIRST, base)), false, &mut sink).unwrap();
            let (again, _) = build(&two, &sink, &bytes);
            prop_assert!(again == bytes_of(&file));
            let logged = sink.chunks.values().map(Vec::len).sum::<usize>() - before;
            // Each write touches its blocks, and one more where the old end lay within one.
            let bound: usize = second.iter().map(|(_, len, _)| len + 4 * 65536).sum();
            prop_assert!(logged <= bound, "{logged} bytes logged for {second:?}");
        }
    }

    #[test]
    fn a_file_that_ends_too_early_is_changed_and_leaves_nothing_behind() {
        let file = file(&[(0, vec![1; 100_000])], 0);
        let mut sink = Memory::default();
        let read = read(file.as_fd(), 150_000, None, false, &mut sink).unwrap();
        assert!(read.changed || read.version.extents.len() > 1);
        assert!(sink.chunks.values().all(|chunk| chunk.len() <= 100_000));
    }
}
