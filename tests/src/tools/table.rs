//! The table of the tools: a line of shell each.
//!
//! `$SRC` is the file, `$OUT` where what was read goes, `$DIR` a directory beside that, `$PY` is python3.

use super::{Leaves, To};

/// What leaves a copy of what it read in `$OUT`.
pub(super) const COPIES: &[(&str, To, &str)] = &[
    (
        "cp --sparse=never --reflink=never",
        To::Same,
        r#"cp --sparse=never --reflink=never "$SRC" "$OUT""#,
    ),
    (
        "cp --sparse=auto --reflink=never",
        To::Same,
        r#"cp --sparse=auto --reflink=never "$SRC" "$OUT""#,
    ),
    (
        "cp --sparse=always --reflink=never",
        To::Same,
        r#"cp --sparse=always --reflink=never "$SRC" "$OUT""#,
    ),
    (
        "cp --sparse=auto --reflink=auto",
        To::Same,
        r#"cp --sparse=auto --reflink=auto "$SRC" "$OUT""#,
    ),
    (
        "cp --sparse=never --reflink=auto",
        To::Same,
        r#"cp --sparse=never --reflink=auto "$SRC" "$OUT""#,
    ),
    (
        "cp --sparse=always --reflink=auto",
        To::Same,
        r#"cp --sparse=always --reflink=auto "$SRC" "$OUT""#,
    ),
    (
        "cp --sparse=never, elsewhere",
        To::Elsewhere,
        r#"cp --sparse=never "$SRC" "$OUT""#,
    ),
    (
        "cp --sparse=auto, elsewhere",
        To::Elsewhere,
        r#"cp --sparse=auto "$SRC" "$OUT""#,
    ),
    (
        "cp --sparse=always, elsewhere",
        To::Elsewhere,
        r#"cp --sparse=always "$SRC" "$OUT""#,
    ),
    ("cp -a", To::Same, r#"cp -a "$SRC" "$OUT""#),
    ("cp -a, elsewhere", To::Elsewhere, r#"cp -a "$SRC" "$OUT""#),
    (
        "cp --reflink=always (FICLONE)",
        To::Same,
        r#"cp --reflink=always "$SRC" "$OUT""#,
    ),
    (
        "ioctl(FICLONERANGE)",
        To::Same,
        r#"exec "$PY" -c '
import fcntl, struct, sys
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as out:
    fcntl.ioctl(out, 0x4020940D, struct.pack("qQQQ", source.fileno(), 0, 0, 0))
' "$SRC" "$OUT""#,
    ),
    (
        "tar",
        To::Elsewhere,
        r#"tar -C "${SRC%/*}" -cf "$DIR/t" "${SRC##*/}"; mkdir "$DIR/x"; tar -C "$DIR/x" -xf "$DIR/t"; mv "$DIR/x/${SRC##*/}" "$OUT""#,
    ),
    (
        "tar -S",
        To::Elsewhere,
        r#"tar -C "${SRC%/*}" -Scf "$DIR/t" "${SRC##*/}"; mkdir "$DIR/x"; tar -C "$DIR/x" -xf "$DIR/t"; mv "$DIR/x/${SRC##*/}" "$OUT""#,
    ),
    (
        "tar -S --hole-detection=raw",
        To::Elsewhere,
        r#"tar -C "${SRC%/*}" -S --hole-detection=raw -cf "$DIR/t" "${SRC##*/}"; mkdir "$DIR/x"; tar -C "$DIR/x" -xf "$DIR/t"; mv "$DIR/x/${SRC##*/}" "$OUT""#,
    ),
    (
        "bsdtar",
        To::Elsewhere,
        r#"bsdtar -C "${SRC%/*}" -cf "$DIR/t" "${SRC##*/}"; mkdir "$DIR/x"; bsdtar -C "$DIR/x" -xf "$DIR/t"; mv "$DIR/x/${SRC##*/}" "$OUT""#,
    ),
    (
        "cpio",
        To::Elsewhere,
        r#"cd "${SRC%/*}"; echo "${SRC##*/}" | cpio --quiet -o >"$DIR/t"; mkdir "$DIR/x"; cd "$DIR/x"; cpio --quiet -i <"$DIR/t"; mv "${SRC##*/}" "$OUT""#,
    ),
    (
        "cpio --sparse -p",
        To::Elsewhere,
        r#"cd "${SRC%/*}"; echo "${SRC##*/}" | cpio --quiet --sparse -p "$DIR"; mv "$DIR/${SRC##*/}" "$OUT""#,
    ),
    ("rsync", To::Same, r#"rsync -t "$SRC" "$OUT""#),
    (
        "rsync, elsewhere",
        To::Elsewhere,
        r#"rsync -t "$SRC" "$OUT""#,
    ),
    ("rsync -S", To::Same, r#"rsync -tS "$SRC" "$OUT""#),
    (
        "rsync -c over an older copy",
        To::Elsewhere,
        r#"truncate -r "$SRC" "$OUT"; touch -r "$SRC" "$OUT"; rsync -tc "$SRC" "$OUT""#,
    ),
    (
        "qemu-img convert",
        To::Elsewhere,
        r#"qemu-img convert -f raw -O raw "$SRC" "$OUT""#,
    ),
    (
        "qemu-img convert -S 0",
        To::Elsewhere,
        r#"qemu-img convert -S 0 -f raw -O raw "$SRC" "$OUT""#,
    ),
    (
        "qemu-img convert to qcow2",
        To::Same,
        r#"qemu-img convert -f raw -O qcow2 "$SRC" "$DIR/q"; qemu-img convert -f qcow2 -O raw "$DIR/q" "$OUT""#,
    ),
    (
        "dd",
        To::Elsewhere,
        r#"dd if="$SRC" of="$OUT" bs=64K status=none"#,
    ),
    (
        "dd conv=sparse",
        To::Same,
        r#"dd if="$SRC" of="$OUT" bs=64K conv=sparse status=none; truncate -r "$SRC" "$OUT""#,
    ),
    (
        "dd iflag=direct (O_DIRECT)",
        To::Elsewhere,
        r#"dd if="$SRC" of="$OUT" bs=64K iflag=direct status=none"#,
    ),
    ("install", To::Elsewhere, r#"install -m 644 "$SRC" "$OUT""#),
    (
        "install, same filesystem",
        To::Same,
        r#"install -m 644 "$SRC" "$OUT""#,
    ),
    ("cat", To::Elsewhere, r#"cat "$SRC" >"$OUT""#),
    (
        "cat of a descriptor that is inherited",
        To::Elsewhere,
        r#"cat <"$SRC" >"$OUT""#,
    ),
    (
        "cat of /proc/self/fd of an open file",
        To::Elsewhere,
        r#"exec 7<"$SRC"; cat /proc/self/fd/7 >"$OUT""#,
    ),
    (
        "cat of a further hard link",
        To::Same,
        r#"ln "$SRC" "$DIR/link"; cat "$DIR/link" >"$OUT""#,
    ),
    (
        "cat of a symbolic link",
        To::Elsewhere,
        r#"ln -s "$SRC" "$DIR/link"; cat "$DIR/link" >"$OUT""#,
    ),
    ("grep -a", To::Elsewhere, r#"grep -a "" "$SRC" >"$OUT""#),
    (
        "gzip",
        To::Elsewhere,
        r#"gzip -c "$SRC" | gzip -dc >"$OUT""#,
    ),
    (
        "zstd",
        To::Elsewhere,
        r#"zstd -qc "$SRC" | zstd -qdc >"$OUT""#,
    ),
    (
        "tail, then head",
        To::Elsewhere,
        r#"head -c 1000000 "$SRC" >"$OUT"; tail -c +1000001 "$SRC" >>"$OUT""#,
    ),
    (
        "python shutil.copyfile",
        To::Elsewhere,
        r#"exec "$PY" -c 'import shutil, sys; shutil.copyfile(sys.argv[1], sys.argv[2])' "$SRC" "$OUT""#,
    ),
    (
        "python shutil.copy2, same filesystem",
        To::Same,
        r#"exec "$PY" -c 'import shutil, sys; shutil.copy2(sys.argv[1], sys.argv[2])' "$SRC" "$OUT""#,
    ),
    (
        "mmap, read only",
        To::Elsewhere,
        r#"exec "$PY" -c '
import mmap, sys
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as out:
    out.write(mmap.mmap(source.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ))
' "$SRC" "$OUT""#,
    ),
    (
        "mmap, private",
        To::Elsewhere,
        r#"exec "$PY" -c '
import mmap, sys
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as out:
    out.write(mmap.mmap(source.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE))
' "$SRC" "$OUT""#,
    ),
    (
        "mmap of one page, then mremap",
        To::Elsewhere,
        r#"exec "$PY" -c '
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
for call in (libc.mmap, libc.mremap): call.restype = ctypes.c_void_p
source = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(source).st_size
one = libc.mmap(None, 4096, 1, 1, source, ctypes.c_long(0))
all = libc.mremap(ctypes.c_void_p(one), ctypes.c_size_t(4096), ctypes.c_size_t(size), 1)
if all in (None, ctypes.c_void_p(-1).value): raise OSError(ctypes.get_errno(), "mremap")
open(sys.argv[2], "wb").write(ctypes.string_at(all, size))
' "$SRC" "$OUT""#,
    ),
    (
        "preadv",
        To::Elsewhere,
        r#"exec "$PY" -c '
import os, sys
source, parts, at = os.open(sys.argv[1], os.O_RDONLY), [], 0
while True:
    two = [bytearray(5000), bytearray(60000)]
    got = os.preadv(source, two, at)
    if not got: break
    parts.append(b"".join(two)[:got]); at += got
open(sys.argv[2], "wb").write(b"".join(parts))
' "$SRC" "$OUT""#,
    ),
    (
        "lseek(SEEK_DATA), then read",
        To::Elsewhere,
        r#"exec "$PY" -c '
import os, sys
source, out = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
size, at = os.fstat(source).st_size, 0
os.ftruncate(out, size)
while at < size:
    try: begin = os.lseek(source, at, os.SEEK_DATA)
    except OSError: break
    end = os.lseek(source, begin, os.SEEK_HOLE)
    os.pwrite(out, os.pread(source, end - begin, begin), begin); at = end
' "$SRC" "$OUT""#,
    ),
    (
        "sendfile",
        To::Elsewhere,
        r#"exec "$PY" -c '
import os, sys
source, out = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
while os.sendfile(out, source, None, 1 << 20): pass
' "$SRC" "$OUT""#,
    ),
    (
        "splice",
        To::Elsewhere,
        r#"exec "$PY" -c '
import os, sys
source, out = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
read, write = os.pipe()
while True:
    got = os.splice(source, write, 65536)
    if not got: break
    while got: got -= os.splice(read, out, got)
' "$SRC" "$OUT""#,
    ),
    (
        "copy_file_range",
        To::Same,
        r#"exec "$PY" -c '
import os, sys
source, out = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
while os.copy_file_range(source, out, 1 << 20): pass
' "$SRC" "$OUT""#,
    ),
    ("io_uring read", To::Elsewhere, IO_URING),
    (
        "a descriptor passed to another process",
        To::Elsewhere,
        r#"exec "$PY" -c '
import os, socket, sys
near, far = socket.socketpair(socket.AF_UNIX)
if os.fork() == 0:
    source = os.open(sys.argv[1], os.O_RDONLY)
    socket.send_fds(near, [b"x"], [source])
    os._exit(0)
near.close()
_, fds, _, _ = socket.recv_fds(far, 1, 1)
with os.fdopen(fds[0], "rb") as source, open(sys.argv[2], "wb") as out: out.write(source.read())
' "$SRC" "$OUT""#,
    ),
    (
        "O_PATH, then opened through /proc",
        To::Elsewhere,
        r#"exec "$PY" -c '
import os, sys
path = os.open(sys.argv[1], os.O_PATH)
open(sys.argv[2], "wb").write(open(f"/proc/self/fd/{path}", "rb").read())
' "$SRC" "$OUT""#,
    ),
    (
        "opened by its handle",
        To::Elsewhere,
        r#"exec "$PY" -c '
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
handle, mount = ctypes.create_string_buffer(136), ctypes.c_int()
ctypes.memmove(handle, (128).to_bytes(4, "little"), 4)
if libc.name_to_handle_at(-100, os.fsencode(sys.argv[1]), handle, ctypes.byref(mount), 0): raise OSError(ctypes.get_errno(), "handle")
at = os.open(os.path.dirname(sys.argv[1]), os.O_RDONLY)
source = libc.open_by_handle_at(at, handle, os.O_RDONLY)
if source < 0: raise OSError(ctypes.get_errno(), "open_by_handle_at")
open(sys.argv[2], "wb").write(os.fdopen(source, "rb").read())
' "$SRC" "$OUT""#,
    ),
    (
        "losetup -r, then cat",
        To::Elsewhere,
        r#"L=$(losetup -r --find --show "$SRC"); trap 'losetup -d "$L"' EXIT; cat "$L" >"$OUT""#,
    ),
    (
        "losetup --direct-io=on, then cat",
        To::Elsewhere,
        r#"L=$(losetup -r --direct-io=on --find --show "$SRC"); trap 'losetup -d "$L"' EXIT; cat "$L" >"$OUT""#,
    ),
    (
        "overlayfs, then cat",
        To::Elsewhere,
        r#"mkdir "$DIR/u" "$DIR/w" "$DIR/m"; mount -t overlay none -o "lowerdir=${SRC%/*},upperdir=$DIR/u,workdir=$DIR/w" "$DIR/m"; trap 'umount "$DIR/m"' EXIT; cat "$DIR/m/${SRC##*/}" >"$OUT""#,
    ),
    (
        "overlayfs, then mmap",
        To::Elsewhere,
        r#"mkdir "$DIR/u" "$DIR/w" "$DIR/m"; mount -t overlay none -o "lowerdir=${SRC%/*},upperdir=$DIR/u,workdir=$DIR/w" "$DIR/m"; trap 'umount "$DIR/m"' EXIT; "$PY" -c '
import mmap, sys
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as out:
    out.write(mmap.mmap(source.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ))
' "$DIR/m/${SRC##*/}" "$OUT""#,
    ),
    (
        "overlayfs, copied up",
        To::Elsewhere,
        r#"mkdir "$DIR/u" "$DIR/w" "$DIR/m"; mount -t overlay none -o "lowerdir=${SRC%/*},upperdir=$DIR/u,workdir=$DIR/w" "$DIR/m"; trap 'umount "$DIR/m"' EXIT; touch -a "$DIR/m/${SRC##*/}"; chmod 600 "$DIR/m/${SRC##*/}"; cp "$DIR/u/${SRC##*/}" "$OUT""#,
    ),
    (
        "a bind mount, then cat",
        To::Elsewhere,
        r#"mkdir "$DIR/m"; mount --bind "${SRC%/*}" "$DIR/m"; trap 'umount "$DIR/m"' EXIT; cat "$DIR/m/${SRC##*/}" >"$OUT""#,
    ),
    (
        "another mount namespace, then cat",
        To::Elsewhere,
        r#"unshare -m cat "$SRC" >"$OUT""#,
    ),
];

/// What leaves something else: the script, and what must be found then.
pub(super) const OTHERS: &[(&str, To, Leaves, &str)] = &[
    (
        "md5sum",
        To::Elsewhere,
        Leaves::Md5,
        r#"md5sum <"$SRC" >"$OUT""#,
    ),
    (
        "exec of a binary",
        To::Elsewhere,
        Leaves::Said,
        r#""$SRC" it runs >"$OUT""#,
    ),
    (
        "exec of a script",
        To::Elsewhere,
        Leaves::Said,
        r#""$SRC" it runs >"$OUT""#,
    ),
    (
        "mv to another filesystem",
        To::Elsewhere,
        Leaves::Moved,
        r#"mv "$SRC" "$OUT""#,
    ),
    (
        "mv on the same filesystem",
        To::Same,
        Leaves::Moved,
        r#"mv "$SRC" "$OUT""#,
    ),
    (
        ">> (O_APPEND)",
        To::Elsewhere,
        Leaves::Source(|bytes| [bytes, b"appended\n".to_vec()].concat()),
        r#"echo appended >>"$SRC""#,
    ),
    (
        "> (O_TRUNC)",
        To::Elsewhere,
        Leaves::Source(|_| b"new\n".to_vec()),
        r#"echo new >"$SRC""#,
    ),
    (
        "a store in the middle (dd conv=notrunc)",
        To::Elsewhere,
        Leaves::Source(stored),
        r#"printf stored | dd of="$SRC" bs=1 seek=70000 conv=notrunc status=none"#,
    ),
    (
        "a store through mmap",
        To::Elsewhere,
        Leaves::Source(stored),
        r#"exec "$PY" -c '
import mmap, sys
with open(sys.argv[1], "r+b") as source:
    mmap.mmap(source.fileno(), 0)[70000:70006] = b"stored"
' "$SRC""#,
    ),
    (
        "copy_file_range into it",
        To::Same,
        Leaves::Source(stored),
        r#"printf stored >"$DIR/new"; exec "$PY" -c '
import os, sys
new, source = os.open(sys.argv[2], os.O_RDONLY), os.open(sys.argv[1], os.O_WRONLY)
os.copy_file_range(new, source, 6, 0, 70000)
' "$SRC" "$DIR/new""#,
    ),
    (
        "a store past the page cache (dd oflag=direct)",
        To::Same,
        Leaves::Source(|bytes| replaced(bytes, 69_632..73_728)),
        r#"head -c 4096 /dev/zero | tr '\0' x >"$DIR/new"; dd if="$DIR/new" of="$SRC" bs=4096 seek=17 oflag=direct conv=notrunc status=none"#,
    ),
    (
        "ioctl(FICLONERANGE) into it",
        To::Same,
        Leaves::Source(|bytes| replaced(bytes, 65_536..131_072)),
        r#"head -c 65536 /dev/zero | tr '\0' x >"$DIR/new"; exec "$PY" -c '
import fcntl, struct, sys
with open(sys.argv[2], "rb") as new, open(sys.argv[1], "r+b") as source:
    fcntl.ioctl(source, 0x4020940D, struct.pack("qQQQ", new.fileno(), 0, 65536, 65536))
' "$SRC" "$DIR/new""#,
    ),
    (
        "losetup, then a store",
        To::Elsewhere,
        Leaves::Source(stored),
        r#"L=$(losetup --find --show "$SRC"); trap 'losetup -d "$L"' EXIT; printf stored | dd of="$L" bs=1 seek=70000 conv=notrunc,fsync status=none"#,
    ),
    (
        "sed -i",
        To::Elsewhere,
        Leaves::Source(|bytes| [bytes, b"after\n".to_vec()].concat()),
        r#"sed -i '$ a after' "$SRC""#,
    ),
    (
        "truncate(2) to less",
        To::Elsewhere,
        Leaves::Source(|mut bytes| {
            bytes.truncate(70_001);
            bytes
        }),
        r#"exec "$PY" -c 'import os, sys; os.truncate(sys.argv[1], 70001)' "$SRC""#,
    ),
    (
        "truncate(2) to more",
        To::Elsewhere,
        Leaves::Source(|mut bytes| {
            bytes.resize(bytes.len() + 10_000, 0);
            bytes
        }),
        r#"exec "$PY" -c 'import os, sys; os.truncate(sys.argv[1], os.stat(sys.argv[1]).st_size + 10000)' "$SRC""#,
    ),
    (
        "ftruncate(2) to less",
        To::Elsewhere,
        Leaves::Source(|mut bytes| {
            bytes.truncate(70_001);
            bytes
        }),
        r#"truncate -s 70001 "$SRC""#,
    ),
    (
        "fallocate --punch-hole",
        To::Elsewhere,
        Leaves::Source(punched),
        r#"fallocate --punch-hole -o 65536 -l 131072 "$SRC""#,
    ),
    (
        "fallocate --zero-range",
        To::Elsewhere,
        Leaves::Source(punched),
        r#"fallocate --zero-range -o 65536 -l 131072 "$SRC""#,
    ),
    (
        "fallocate --collapse-range",
        To::Elsewhere,
        Leaves::Source(|mut bytes| {
            bytes.drain(65_536..196_608.min(bytes.len()));
            bytes
        }),
        r#"fallocate --collapse-range -o 65536 -l 131072 "$SRC""#,
    ),
    (
        "fallocate --insert-range",
        To::Elsewhere,
        Leaves::Source(|mut bytes| {
            let tail = bytes.split_off(65_536.min(bytes.len()));
            bytes.resize(bytes.len() + 131_072, 0);
            bytes.extend(tail);
            bytes
        }),
        r#"fallocate --insert-range -o 65536 -l 131072 "$SRC""#,
    ),
    (
        "fallocate, the space of all of it",
        To::Elsewhere,
        Leaves::Source(|bytes| bytes),
        r#"fallocate -l "$(stat -c %s "$SRC")" "$SRC""#,
    ),
    (
        "fallocate --dig-holes",
        To::Elsewhere,
        Leaves::Source(|bytes| bytes),
        r#"fallocate --dig-holes "$SRC""#,
    ),
    (
        "a store in a reflink copy",
        To::Same,
        Leaves::Source(|bytes| bytes),
        r#"cp --reflink=always "$SRC" "$DIR/copy"; printf x | dd of="$DIR/copy" bs=1 seek=70000 conv=notrunc status=none"#,
    ),
];

fn stored(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(place) = bytes.get_mut(70_000..70_006) {
        place.copy_from_slice(b"stored");
    }
    bytes
}

fn replaced(mut bytes: Vec<u8>, range: std::ops::Range<usize>) -> Vec<u8> {
    if let Some(place) = bytes.get_mut(range) {
        place.fill(b'x');
    }
    bytes
}

fn punched(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(place) = bytes.get_mut(65_536..196_608) {
        place.fill(0);
    }
    bytes
}

/// `IORING_OP_READ` by the bare system calls: `io_uring_setup` is 425, `io_uring_enter` 426.
const IO_URING: &str = r#"exec "$PY" -c '
import ctypes, mmap, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*words):
    got = libc.syscall(*words)
    if got < 0: raise OSError(ctypes.get_errno(), "io_uring")
    return got
params = ctypes.create_string_buffer(120)
ring = call(425, 1, params)
numbers = struct.unpack_from("<30I", params)
sq_entries, cq_entries, sq_off, cq_off = numbers[0], numbers[1], numbers[10:20], numbers[20:30]
area = lambda size, at: mmap.mmap(ring, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=at)
sq, cq = area(sq_off[6] + 4 * sq_entries, 0), area(cq_off[5] + 16 * cq_entries, 0x8000000)
sqes = area(64 * sq_entries, 0x10000000)
number = lambda of, at: struct.unpack_from("<I", of, at)[0]
source, out, at = os.open(sys.argv[1], os.O_RDONLY), open(sys.argv[2], "wb"), 0
block = ctypes.create_string_buffer(1 << 16)
while True:
    tail = number(sq, sq_off[1])
    slot = tail & number(sq, sq_off[2])
    struct.pack_into("<BBHiQQIIQ", sqes, 64 * slot, 22, 0, 0, source, at, ctypes.addressof(block), len(block), 0, 1)
    struct.pack_into("<I", sq, sq_off[6] + 4 * slot, slot)
    struct.pack_into("<I", sq, sq_off[1], tail + 1)
    call(426, ring, 1, 1, 1, None, 0)
    head = number(cq, cq_off[0])
    _, got, _ = struct.unpack_from("<QiI", cq, cq_off[5] + 16 * (head & number(cq, cq_off[2])))
    struct.pack_into("<I", cq, cq_off[0], head + 1)
    if got < 0: raise OSError(-got, "read")
    if got == 0: break
    out.write(block.raw[:got]); at += got
' "$SRC" "$OUT""#;
