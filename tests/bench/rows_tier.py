"""Rows about release and recall: what files that are not released cost, and what released ones do."""

import json
import os
import random
import re
import time
from pathlib import Path

from common import Bench, Daemon, Disk, Row, median, note, run, shell

WARM_GOAL = 1.05
WARM_AGAIN_GOAL = 1.1
CREATE_GOAL = 1.3
CREATED = 20_000
CREATED_BYTES = 1000
CREATE_STUBS = 10_000
OPEN_P50_GOAL_S = 0.001
OPEN_P99_GOAL_S = 0.005
OPEN_FILES = 12_000
OPEN_SAMPLES = 2_500
BURST_GOAL_S = 1.5
BURST_FILES = 3_000
BURST_THREADS = 16
READ_GOAL = 1.3
RELEASE_GOAL = 5_000
RELEASE_FILES = 10_000
RELEASE_BYTES = 100 << 10
START_STUBS = 100_000
START_EXPOSED_GOAL_S = 1.0
START_MARKS_GOAL_S = 5.0
START_MARK_GOAL_BYTES = 1_500
GIB = 1 << 30
PAGE = 4096
# Objects of the kernel that an inode's mark pins, beside the inode itself.
MARK_SLABS = ("fanotify_mark", "fsnotify_mark_connector", "fsnotify_inode_mark_connector", "ext4_inode_cache")


def ordinary(bench: Bench) -> Path:
    """One GiB that compresses as what people keep does: this machine's programs and documents."""
    target = bench.cache / "ordinary"
    if not target.exists() or target.stat().st_size != GIB:
        bench.cache.mkdir(parents=True, exist_ok=True)
        note("packing a GiB of /usr")
        # `head` ends first, which tar takes for an error.
        shell(f"(tar --sort=name -cf - /usr 2>/dev/null || true) | head -c {GIB} >'{target}.part'")
        if os.path.getsize(f"{target}.part") != GIB:
            raise RuntimeError("/usr holds less than a GiB")
        os.rename(f"{target}.part", target)
    return target


def fill(bench: Bench, root: Path, count: int, size: int) -> list[Path]:
    """`count` files of `size` bytes, five hundred in each directory."""
    paths = []
    with open(ordinary(bench), "rb") as source:
        for number in range(count):
            place = root / f"d{number // 500:04}"
            if number % 500 == 0:
                place.mkdir(parents=True)
            path = place / f"file-{number:06}"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(descriptor, os.pread(source.fileno(), size, number * size % (GIB - size)))
            os.close(descriptor)
            paths.append(path)
    return paths


def has_content(bench: Bench, number: int, path: Path, size: int) -> bool:
    """Whether a file of `fill` is what it was."""
    with open(ordinary(bench), "rb") as source:
        return path.read_bytes() == os.pread(source.fileno(), size, number * size % (GIB - size))


def load(bench: Bench, *words) -> dict:
    return json.loads(run([str(bench.binaries / "load"), *map(str, words)]).stdout)


def logged(bench: Bench, disk: Disk, extra: str = "") -> Daemon:
    """hsmd exposes the disk, and everything on it is on the volume."""
    daemon = bench.daemon(disk.mount, volume=True, extra=f'device = "{disk.device}"\nmount_options = "noatime"\n{extra}')
    run(["umount", str(disk.mount)])
    daemon.start()
    daemon.wait_ready()
    daemon.sync("--to", "media")
    return daemon


def settled(daemon: Daemon) -> None:
    """The kernel asks about released files only."""
    end = time.monotonic() + 120
    while daemon.status()["released"]["every_file"]:
        if time.monotonic() > end:
            raise RuntimeError("every file is asked about still")
        time.sleep(0.02)


def released(daemon: Daemon, *paths: Path) -> float:
    """Releases files and directories; gives the seconds that it took."""
    begun = time.monotonic()
    daemon.tierctl("release", "-r", *map(str, paths))
    return time.monotonic() - begun


def recalled(daemon: Daemon, *paths: Path) -> None:
    """Recalls files and directories; returns when they are files like any other again."""
    daemon.tierctl("recall", "-r", "--wait", *map(str, paths))
    end = time.monotonic() + 120
    while daemon.status()["released"]["files"]:
        if time.monotonic() > end:
            raise RuntimeError("recalled files are on the list of stubs still")
        time.sleep(0.1)
    daemon.sync("--to", "media")


def warm_ratios(bench: Bench, bare: Path, watched: Path) -> dict[str, tuple[float, float]]:
    """For each call the median of the ratios, and of the nanoseconds without hsmd."""
    runs = [load(bench, "warm", bare, watched) for _ in range(bench.rounds)]
    note(f"warm: {runs}")
    return {
        call: (median(run[call]["ratio"] for run in runs), median(run[call]["bare_ns"] for run in runs))
        for call in runs[0]
    }


def warm(bench: Bench) -> list[Row]:
    """Calls on files that are not released, beside the same calls on a disk without hsmd."""
    if bench.baselines:
        return []
    bare = bench.disk("plain", "2G").mount / "whole"
    disk = bench.disk("fresh", "2G")
    watched = disk.mount / "whole"
    for path in (bare, watched):
        path.write_bytes(os.urandom(PAGE))
    fill(bench, disk.mount / "cold", 1000, PAGE)
    rows = []
    daemon = logged(bench, disk)
    released(daemon, disk.mount / "cold")
    settled(daemon)
    for call, (ratio, ns) in warm_ratios(bench, bare, watched).items():
        work = {"pread": "`pread` of 4 KiB", "open": "`open` + `close`", "stat": "`stat`"}[call]
        rows.append(
            Row(
                f"{work} of a file that is not released, warm", f"the same without hsmd: {ns:,.0f} ns",
                f"≤ {WARM_GOAL} x", f"{ratio:.2f} x", ratio <= WARM_GOAL,
            )
        )
    daemon.stop()
    daemon.config.write_text("stub_marks_max = 0\n" + daemon.config.read_text())
    daemon.start()
    daemon.wait_ready()
    if not daemon.status()["released"]["every_file"]:
        raise RuntimeError("with stub_marks_max = 0 not every file is asked about")
    time.sleep(3)
    watched.read_bytes()
    ratios = warm_ratios(bench, bare, watched)
    ratio, ns = ratios["open"]
    others = ", ".join(f"`{call}` {of:.2f} x" for call, (of, _) in ratios.items() if call != "open")
    rows.append(
        Row(
            "`open` + `close` a second time, more stubs than `stub_marks_max`", f"{ns:,.0f} ns",
            f"≤ {WARM_AGAIN_GOAL} x", f"{ratio:.2f} x ({others})", ratio <= WARM_AGAIN_GOAL,
        )
    )
    daemon.stop()
    daemon.remove()
    for name in ("plain", "fresh"):
        bench.drop_disk(name)
    return rows


def create(bench: Bench) -> list[Row]:
    """New files beside ten thousand released ones."""
    if bench.baselines:
        return []
    bare, disk = bench.disk("plain", "4G"), bench.disk("fresh", "4G")
    for place in (bare, disk):
        fill(bench, place.mount / "cold", CREATE_STUBS, PAGE)
    daemon = logged(bench, disk)
    released(daemon, disk.mount / "cold")
    settled(daemon)
    sides: dict[str, list[float]] = {"plain": [], "fresh": []}
    for number in range(2 * bench.rounds + 1):
        for place in (bare, disk):
            new = place.mount / f"new-{number}"
            new.mkdir()
            daemon.sync()
            bench.settle()
            sides[place.mount.name].append(load(bench, "create", new, CREATED, CREATED_BYTES)["seconds"])
            daemon.sync()
    note(f"create: {sides}")
    daemon.stop()
    daemon.remove()
    for name in ("plain", "fresh"):
        bench.drop_disk(name)
    # The first ones find neither journal nor directories ready.
    without, watched = (median(times[1:]) for times in (sides["plain"], sides["fresh"]))
    ratio = watched / without
    return [
        Row(
            f"create {CREATED:,} files of {CREATED_BYTES} bytes beside {CREATE_STUBS:,} released ones",
            f"the same without hsmd: {without * 1000:,.0f} ms", f"≤ {CREATE_GOAL} x",
            f"{ratio:.2f} x ({watched * 1000:,.0f} ms)", ratio <= CREATE_GOAL,
        )
    ]


def opened(bench: Bench, paths: list[tuple[int, Path]], threads: int) -> dict:
    listed = bench.work / "list"
    listed.write_text("".join(f"{path}\n" for _, path in paths))
    result = load(bench, "open", listed, "--threads", threads)
    if result["bytes"] != len(paths) * PAGE:
        raise RuntimeError(f"{result['bytes']} bytes were read of {len(paths)} files of {PAGE}")
    return result


def recall(bench: Bench) -> list[Row]:
    """Released files of one page: each by itself, and many at once; the volume is in the page cache."""
    if bench.baselines:
        return []
    disk = bench.disk("fresh", "4G")
    files = list(enumerate(fill(bench, disk.mount / "cold", OPEN_FILES, PAGE)))
    daemon = logged(bench, disk)
    settled(daemon)
    rng = random.Random(11)
    p50s, p99s, bursts = [], [], []
    for _ in range(bench.rounds):
        released(daemon, disk.mount / "cold")
        shell(f"cat '{daemon.volume}'/segments/*/* >/dev/null")
        bench.settle()
        # Nothing that was opened before says where the next one lies.
        chosen = rng.sample(files, OPEN_SAMPLES + BURST_FILES)
        single = opened(bench, chosen[:OPEN_SAMPLES], 1)
        bench.settle()
        burst = opened(bench, chosen[OPEN_SAMPLES:], BURST_THREADS)
        note(f"recall: one at a time {single}; {BURST_THREADS} threads {burst}")
        p50s.append(single["p50"])
        p99s.append(single["p99"])
        bursts.append(burst["seconds"])
        wrong = [path for number, path in chosen if not has_content(bench, number, path, PAGE)]
        if wrong:
            raise RuntimeError(f"{len(wrong)} recalled files are not what they were, {wrong[0]} is one")
        recalled(daemon, disk.mount / "cold")
    daemon.stop()
    daemon.remove()
    bench.drop_disk("fresh")
    p50, p99, burst = median(p50s), median(p99s), median(bursts)
    return [
        Row(
            f"open and read a released file of 4 KiB ({OPEN_SAMPLES:,} of {OPEN_FILES:,}, in random order)",
            "", f"p50 ≤ {OPEN_P50_GOAL_S * 1000:.0f} ms, p99 ≤ {OPEN_P99_GOAL_S * 1000:.0f} ms",
            f"p50 {p50 * 1000:.2f} ms, p99 {p99 * 1000:.2f} ms", p50 <= OPEN_P50_GOAL_S and p99 <= OPEN_P99_GOAL_S,
        ),
        Row(
            f"open and read {BURST_FILES:,} of them by {BURST_THREADS} threads", "", f"≤ {BURST_GOAL_S} s",
            f"{burst:.2f} s", burst <= BURST_GOAL_S,
        ),
    ]


def read(bench: Bench) -> list[Row]:
    """A large released file, read from its opening to its end."""
    source = ordinary(bench)
    packed = bench.work / "ordinary.zst"
    shell(f"zstd -q -f -1 -T2 '{source}' -o '{packed}'")
    bare = bench.disk("plain", "4G")
    disk = bench.disk("fresh", "4G")
    large = disk.mount / "large"
    run(["cp", "--sparse=never", str(source), str(large)])
    shell("sync")
    daemon = None if bench.baselines else logged(bench, disk)
    listed = bench.work / "list"
    listed.write_text(f"{large}\n")
    plain, through = [], []
    for _ in range(bench.rounds):
        out = bare.mount / "out"
        out.unlink(missing_ok=True)
        shell(f"cat '{packed}' >/dev/null")
        bench.settle()
        begun = time.monotonic()
        shell(f"zstd -q -dc '{packed}' >'{out}'")
        plain.append(time.monotonic() - begun)
        if daemon is None:
            continue
        daemon.sync("--to", "media")
        released(daemon, large)
        if large.stat().st_blocks > 8:
            raise RuntimeError("the large file was not released")
        shell(f"cat '{daemon.volume}'/segments/*/* >/dev/null")
        bench.settle()
        through.append(load(bench, "open", listed)["seconds"])
        run(["cmp", str(source), str(large)])
        recalled(daemon, large)
    note(f"read: zstd {plain}, recall {through}")
    against = f"`zstd -dc f.zst > file`: {median(plain):.1f} s"
    if daemon is None:
        return [Row("read a released file of 1 GiB", against, "", "")]
    daemon.stop()
    daemon.remove()
    for name in ("plain", "fresh"):
        bench.drop_disk(name)
    ratio = median(through) / median(plain)
    return [
        Row(
            "read a released file of 1 GiB, from its opening to its end", against, f"≤ {READ_GOAL} x",
            f"{ratio:.2f} x ({median(through):.1f} s)", ratio <= READ_GOAL,
        )
    ]


def release(bench: Bench) -> list[Row]:
    """Giving back the space of many files, by name."""
    if bench.baselines:
        return []
    disk = bench.disk("fresh", "6G")
    paths = fill(bench, disk.mount / "cold", RELEASE_FILES, RELEASE_BYTES)
    shell("sync")
    daemon = logged(bench, disk)
    settled(daemon)
    times = []
    for _ in range(bench.rounds):
        bench.settle()
        times.append(released(daemon, disk.mount / "cold"))
        left = sum(path.stat().st_blocks > 8 for path in paths)
        if left:
            raise RuntimeError(f"{left} files were not released")
        recalled(daemon, disk.mount / "cold")
    note(f"release: {times}")
    daemon.stop()
    daemon.remove()
    bench.drop_disk("fresh")
    rate = RELEASE_FILES / median(times)
    return [
        Row(
            f"release of {RELEASE_FILES:,} files of {RELEASE_BYTES >> 10} KiB", "", f"≥ {RELEASE_GOAL:,} files/s",
            f"{rate:,.0f} files/s ({median(times):.1f} s)", rate >= RELEASE_GOAL,
        )
    ]


def slab_bytes() -> int:
    """What the kernel holds of marks and of the inodes that they pin."""
    total = 0
    for line in Path("/proc/slabinfo").read_text().splitlines()[2:]:
        name, active, _, size = line.split()[:4]
        if name in MARK_SLABS:
            total += int(active) * int(size)
    return total


def drop_caches() -> None:
    shell("sync; echo 2 >/proc/sys/vm/drop_caches")


def family(pid: int) -> dict[str, int]:
    """Resident KiB of keeper, guard and worker."""
    found = {}
    for name in ("keeper", "guard", "worker"):
        status = Path(f"/proc/{pid}/status").read_text()
        found[name] = int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pid = int(children[0]) if children else pid
    return found


def start(bench: Bench) -> list[Row]:
    """A start with many released files: until they can be opened, and until only they are asked about."""
    if bench.baselines:
        return []
    disk = bench.disk("fresh", "8G", ("-N", str(START_STUBS * 2)))
    note(f"making, logging and releasing {START_STUBS:,} files")
    paths = fill(bench, disk.mount / "cold", START_STUBS, 100)
    daemon = logged(bench, disk)
    settled(daemon)
    seconds = released(daemon, disk.mount / "cold")
    note(f"released {START_STUBS:,} files in {seconds:.1f} s")
    mounted_in, exposed_in, marked_in, pinned = [], [], [], []
    memory: dict[str, int] = {}
    for number in range(bench.rounds):
        daemon.stop()
        drop_caches()
        before = slab_bytes()
        bench.settle()
        begun = time.monotonic()
        daemon.start()
        while not os.path.ismount(disk.mount):
            time.sleep(0.002)
        mounted = time.monotonic()
        path = paths[number * 7919]
        if not has_content(bench, number * 7919, path, 100):
            raise RuntimeError(f"{path} was read as something else")
        exposed_in.append(time.monotonic() - mounted)
        daemon.wait_ready()
        settled(daemon)
        marked_in.append(time.monotonic() - mounted)
        mounted_in.append(mounted - begun)
        daemon.sync()
        stubs = daemon.status()["released"]["files"]
        drop_caches()
        pinned.append((slab_bytes() - before) / stubs)
        memory = family(daemon.process.pid)
        note(f"start: mounted {mounted_in}, first bytes {exposed_in}, marks {marked_in}, {stubs} stubs, {pinned} bytes each, {memory}")
        released(daemon, disk.mount / "cold")
    daemon.stop()
    daemon.remove()
    bench.drop_disk("fresh")
    exposed, marked, each = median(exposed_in), median(marked_in), median(pinned)
    guard = (memory["keeper"] + memory["guard"]) / 1024
    return [
        Row(
            f"start with {START_STUBS:,} released files, from the mount to a file's bytes", "",
            f"≤ {START_EXPOSED_GOAL_S:.0f} s", f"{exposed:.2f} s ({median(mounted_in):.2f} s from the start to the mount)",
            exposed <= START_EXPOSED_GOAL_S,
        ),
        Row(
            "the same, until only released files are asked about", "", f"≤ {START_MARKS_GOAL_S:.0f} s",
            f"{marked:.1f} s", marked <= START_MARKS_GOAL_S,
        ),
        Row(
            "memory of the kernel for each released file", "", f"≤ {START_MARK_GOAL_BYTES:,} bytes",
            f"{each:,.0f} bytes (keeper and guard {guard:.0f} MiB, worker {memory['worker'] / 1024:.0f} MiB)",
            each <= START_MARK_GOAL_BYTES,
        ),
    ]
