#!/usr/bin/env python3
"""Lists the tree in a log's segments, and extracts files: a reader that shares no code with the software.

    reader.py list    [--until LSN] SEGMENT...
    reader.py extract [--until LSN] DIRECTORY SEGMENT...
    reader.py records SEGMENT...

Written from hsm-log(5) alone. Needs Python 3.8 with cbor2, and the zstd program.
BLAKE3 is not in Python's library; where the blake3 module is there, hashes are checked.
"""

import io
import os
import struct
import subprocess
import sys

import cbor2

try:
    from blake3 import blake3
except ImportError:
    blake3 = None

BLOCK, CHUNK = 65536, 983040
KINDS = "-dlpscb"


def check(good, path, what):
    if not good:
        sys.exit(f"{path}: {what}")


def hash_of(data):
    return blake3(data).digest() if blake3 else None


def zstd(data):
    return subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout


def sequence(data):
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        yield cbor2.load(stream)


class Segment:
    """A sealed segment, opened from its trailer."""

    cached = (None, b"")

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            self.bytes = file.read()
        self.header, header_hash, at = self.block(0, 0x184D2A50, b"HSM-SEG\n")
        check(self.header[0] == 1, path, "a newer version of the format")
        check(len(self.bytes) > 112, path, "too short")
        end = len(self.bytes) - 112
        magic, length, mark, epoch, number, index_at, index_len, count, self.first, self.last, _, zero, seal = (
            struct.unpack("<II8sQQQIIQQQQ32s", self.bytes[end:]))
        check((magic, length, mark, zero) == (0x184D2A53, 104, b"HSM-END\n", 0), path, "no trailer")
        check((epoch, number) == (self.header[4], self.header[6]), path, "trailer of another segment")
        check(index_at + index_len == end, path, "the index does not end at the trailer")
        index, index_hash, after = self.block(index_at, 0x184D2A52, b"HSM-IDX\n")
        check(after == end, path, "the index has another length")
        check(hash_of(self.bytes[end + 8:end + 80] + index_hash) in (None, seal), path, "the trailer's hash")
        self.frames = index[0]
        check(len(self.frames) == count, path, "the number of frames")
        previous = header_hash
        for i, frame in enumerate(self.frames):
            check(frame[0] == at, path, "the index has a gap")
            previous = self.check_frame(i, frame, previous)
            at += 168 + frame[2]
        check(at == index_at, path, "the index does not cover the file")

    def block(self, at, magic, mark):
        found, length = struct.unpack_from("<II", self.bytes, at)
        check(found == magic and 40 <= length <= len(self.bytes) - at - 8, self.path, f"no block at {at}")
        payload = self.bytes[at + 8:at + 8 + length]
        check(payload[:8] == mark, self.path, f"no mark at {at}")
        check(hash_of(payload[:-32]) in (None, payload[-32:]), self.path, f"the hash at {at}")
        return cbor2.loads(payload[8:-32]), payload[-32:], at + 8 + length

    def check_frame(self, number, entry, previous):
        at, kind, compressed, raw, lsn, commits, records = entry[:7]
        head = self.bytes[at:at + 168]
        (magic, length, mark, version, kind_, epoch, segment, number_, records_, lsn_, commits_, compressed_, raw_,
         zero, _durable, before, body, own) = struct.unpack("<II4sHHQQIIQIIIIQ32s32s32s", head)
        check((magic, length, mark, version, zero) == (0x184D2A51, 160, b"HSMF", 1, 0), self.path, f"frame at {at}")
        check((epoch, segment) == (self.header[4], self.header[6]), self.path, f"foreign frame at {at}")
        check((number, kind, compressed, raw, lsn, commits, records)
              == (number_, kind_, compressed_, raw_, lsn_, commits_, records_), self.path, f"index and frame at {at}")
        check(before == previous, self.path, f"the chain breaks at {at}")
        check(hash_of(head[8:136]) in (None, own), self.path, f"the hash of the frame header at {at}")
        check(hash_of(self.bytes[at + 168:at + 168 + compressed]) in (None, body), self.path, f"the frame at {at}")
        return own

    def frame(self, entry):
        if self.cached[0] == entry[0]:
            return self.cached[1]
        raw = zstd(self.bytes[entry[0] + 168:entry[0] + 168 + entry[2]])
        check(len(raw) == entry[3], self.path, f"the length of the frame at {entry[0]}")
        self.cached = (entry[0], raw)
        return raw

    def operations(self):
        """Whole transactions: (commit, list of operations)."""
        ops, seen = [], 0
        for number, entry in enumerate(self.frames):
            if entry[1] != 1:
                continue
            for place, (kind, body) in enumerate(sequence(self.frame(entry))):
                if number == 0 and place == 0:
                    check(kind == 0 and body == self.header, self.path, "the header is not repeated")
                elif kind == 4:
                    check(body[6] == len(ops), self.path, f"the number of operations of {body[0]}")
                    check(body[0] == self.header[12] + seen, self.path, f"LSN {body[0]} is out of order")
                    seen += 1
                    yield body, ops
                    ops = []
                else:
                    check(kind >= 10 or kind % 2 == 1, self.path, f"a record of kind {kind}")
                    ops.append((kind, body))
        check(not ops, self.path, "operations without a commit")


class File:
    def __init__(self):
        self.attributes, self.xattrs, self.pending, self.extents, self.size = {}, [], [], [], 0


class Tree:
    def __init__(self):
        self.files, self.names, self.places = {}, {}, {}

    def apply(self, kind, body):
        if kind == 12:
            self.files.setdefault(body[0], File()).attributes = body
        elif kind == 16:
            file = self.files[body[0]]
            file.pending += body[2]
            if not body.get(4):
                file.xattrs, file.pending = file.pending, []
        elif kind == 18:
            self.files[body[0]].new = getattr(self.files[body[0]], "new", []) + body[2]
        elif kind == 20:
            self.version(self.files[body[0]], body)
        elif kind == 22:
            self.names.setdefault(body[0], {})[body[2]] = body[4]
        elif kind == 24:
            del self.names[body[0]][body[2]]
        elif kind == 26:
            del self.files[body[0]]
        elif kind not in (10, 14, 28, 30) and kind % 2 == 0:
            sys.exit(f"a record of the unknown kind {kind}: read it with a newer program")

    def version(self, file, body):
        """Extents become pieces: (offset, length, data id, place in the chunk, hash)."""
        pieces, at = [], 0
        for kind, offset, length, *rest in file.__dict__.pop("new", []):
            assert offset == at, "a gap between extents"
            at += length
            if kind == 1:
                pieces += [piece for piece in file.extents if offset <= piece[0] < at]
            elif kind == 2:
                (epoch, number), hashes = rest
                base, start = offset // BLOCK * BLOCK, offset
                while start < at:
                    end = min(at, start // BLOCK * BLOCK + BLOCK)
                    chunk = (start - base) // CHUNK
                    begin = max(offset, base + chunk * CHUNK)
                    pieces.append((start, end - start, (epoch, number + chunk), start - begin, hashes[:32]))
                    hashes, start = hashes[32:], end
                assert not hashes, "too many hashes"
        assert at == body[2], "the extents do not cover the file"
        root = b"".join(struct.pack("<QI", p[0], p[1]) + p[4] for p in pieces) + struct.pack("<Q", body[2])
        assert hash_of(root) in (None, body[6]), "the root hash"
        file.extents, file.size = pieces, body[2]

    def walk(self, directory=1, path=b""):
        yield path or b"/", directory
        for name, file in sorted(self.names.get(directory, {}).items()):
            if self.files[file].attributes[2] == 1:
                yield from self.walk(file, path + b"/" + name)
            else:
                yield path + b"/" + name, file

    def content(self, file):
        data = bytearray(file.size)
        for offset, length, name, start, expected in file.extents:
            segment, entry, begin, whole = self.places[name]
            piece = segment.frame(entry)[begin:begin + whole][start:start + length]
            assert len(piece) == length and hash_of(piece) in (None, expected), f"content {name}"
            data[offset:offset + length] = piece
        return bytes(data)


def line(path, number, file):
    a = file.attributes
    more = [f"-> {a[14].decode()}"] if 14 in a else [f"{a[12][0]}:{a[12][1]}"] if 12 in a else []
    more += [f"flags={a[16]:#x}"] if 16 in a else []
    more += [f"unrestorable={a[18]}"] if 18 in a else []
    more += [f"{name.decode()}={value.hex() if len(value) < 40 else len(value)}" for name, value in file.xattrs]
    fields = [KINDS[a[2]], f"{a[4]:04o}", f"{a[6]}:{a[8]}", str(file.size), f"{a[10][0]}.{a[10][1]:09}"]
    return " ".join([str(number), *fields, path.decode(errors="backslashreplace"), *more])


def read(paths, until):
    tree, previous, lsn = Tree(), None, 0
    for path in paths:
        segment = Segment(path)
        check(segment.header.get(8) == previous or previous is None, path, "the chain of segments breaks")
        previous = hash_of(segment.bytes)
        for entry in segment.frames:
            for epoch, triples in entry[7:]:
                for number, start, length in zip(*[iter(triples)] * 3):
                    tree.places[epoch, number] = (segment, entry, start, length)
        for commit, ops in segment.operations():
            check(commit[0] == lsn + 1 or lsn == 0, path, f"LSN {commit[0]} after {lsn}")
            lsn = commit[0]
            for kind, body in ops if until is None or lsn <= until else []:
                tree.apply(kind, body)
    return tree


def main(args):
    command, until = args.pop(0), None
    if args[0] == "--until":
        until = int(args[1])
        args = args[2:]
    if command == "records":
        for path in args:
            with open(path, "rb") as file:
                raw = zstd(file.read())
            at = 0
            for record in sequence(raw):
                same = cbor2.dumps(record, canonical=True)
                check(raw[at:at + len(same)] == same, path, f"record at {at} is not encoded deterministically")
                print(record[0], len(same))
                at += len(same)
        return
    target = args.pop(0) if command == "extract" else None
    tree = read(args, until)
    for path, number in tree.walk():
        file = tree.files[number]
        if command == "list":
            print(line(path, number, file))
            continue
        place = os.path.join(os.fsencode(target), path.strip(b"/"))
        if file.attributes[2] == 1:
            os.makedirs(place, exist_ok=True)
        elif file.attributes[2] == 0:
            with open(place, "wb") as out:
                out.write(tree.content(file))


if __name__ == "__main__":
    main(sys.argv[1:])
