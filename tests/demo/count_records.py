#!/usr/bin/env python3
"""Counts the CBOR items on standard input: a reader of the log that shares no code with it.

What comes out of `zstd -dc SEGMENT` is a CBOR sequence (RFC 8742). Any CBOR library reads it.
"""

import collections
import sys

import cbor2


# The numbers of hsm-log(5).
KINDS = {
    0: "segment headers",
    2: "pieces of file content",
    4: "commits (transactions)",
    10: "filesystems",
    12: "inodes",
    14: "bindings of a file to its place on disk",
    16: "sets of extended attributes",
    18: "lists of extents",
    20: "versions of a file's content",
    22: "names given",
    24: "names taken away",
    26: "files deleted",
    28: "volumes",
}


def main() -> None:
    counts = collections.Counter()
    content_bytes = 0
    decoder = cbor2.CBORDecoder(sys.stdin.buffer)
    while True:
        try:
            kind, body = decoder.decode()
        except cbor2.CBORDecodeEOF:
            break
        counts[kind] += 1
        if kind == 2:
            content_bytes += sum(len(value) for value in body.values() if isinstance(value, bytes))
    for kind, count in sorted(counts.items()):
        print(f"{count:>10,}  {KINDS.get(kind, f'records of kind {kind}')}")
    print(f"{sum(counts.values()):>10,}  records in all, with {content_bytes / 2**20:,.0f} MiB of content")


if __name__ == "__main__":
    main()
