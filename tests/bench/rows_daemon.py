"""Rows about the daemon itself: bytes per overwrite, memory, start-up, latency, idleness."""

import json
import os
import random
import subprocess
import threading
import time
from pathlib import Path

from common import Bench, Daemon, Disk, Row, median, note, run, shell

OVERWRITE_GOAL_KIB = 72
MEMORY_GOAL_MIB = 300
STARTUP_GOAL_S = 15.0
STUBS_GOAL_S = 60.0
SCAN_GOAL_S = 10.0
SCAN_FILES = 10_000_000
# "Linear": four times the files may take this many times as long.
LINEAR_GOAL = 4.6
LATENCY_GOAL_S = 1.0
# One tick in ten seconds: what `top` shows as 0.1 %.
IDLE_GOAL_PERCENT = 0.1
IDLE_SECONDS = 60
# Files that are opened while others flow back.
MEANWHILE = 500
GIB = 1 << 30


def overwrite(bench: Bench) -> list[Row]:
    """4 KiB random overwrites in a 1 GiB file, closed and logged after each hundred."""
    if bench.baselines:
        return []
    disk = bench.disk("fresh", "3G")
    image = disk.mount / "image.bin"
    with open(image, "wb") as out:
        for _ in range(GIB >> 22):
            out.write(os.urandom(1 << 22))
    daemon = bench.daemon(disk.mount, volume=False)
    daemon.start()
    daemon.wait_ready()
    daemon.sync()
    before, rounds, rng = daemon.log_bytes(), 20, random.Random(7)
    for _ in range(rounds):
        with open(image, "r+b", buffering=0) as out:
            for _ in range(100):
                out.seek(rng.randrange(GIB // 4096) * 4096)
                out.write(os.urandom(4096))
        daemon.sync()
    each = (daemon.log_bytes() - before) / (rounds * 100) / 1024
    daemon.stop()
    daemon.remove()
    bench.drop_disk("fresh")
    return [
        Row(
            "4 KiB random overwrites in a 1 GiB file, closed after each hundred", "bytes logged for each",
            f"≤ {OVERWRITE_GOAL_KIB} KiB", f"{each:.1f} KiB", each <= OVERWRITE_GOAL_KIB,
        )
    ]


def make_files(root: Path, count: int) -> None:
    """`count` small files, a hundred in each directory."""
    for directory in range(count // 100):
        place = root / f"d{directory // 100:03}" / f"d{directory:05}"
        place.mkdir(parents=True)
        for number in range(100):
            descriptor = os.open(f"{place}/file-{number:03}.txt", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            os.write(descriptor, b"file %d of directory %d\n" % (number, directory))
            os.close(descriptor)


def examine(bench: Bench, count: int) -> tuple[float, float, float]:
    """Adopt `count` files and start again: MiB at most, MiB after a restart, seconds to examine."""
    note(f"making {count:,} files")
    disk = bench.disk("fresh", "12G", ("-N", str(count + count // 50 + 10_000)))
    make_files(disk.mount, count)
    shell("sync")
    daemon = bench.daemon(disk.mount, volume=False)
    daemon.start()
    daemon.wait_ready()
    daemon.sync()
    high = daemon.memory_high_kib() / 1024
    walls, restarted = [], 0.0
    for _ in range(bench.rounds):
        daemon.stop()
        start = time.monotonic()
        daemon.start()
        daemon.wait_ready()
        daemon.sync()
        walls.append(time.monotonic() - start)
        restarted = max(restarted, daemon.memory_high_kib() / 1024)
    daemon.stop()
    daemon.remove()
    bench.drop_disk("fresh")
    note(f"{count:,} files: {high:.0f} MiB adopting, {restarted:.0f} MiB later, start-up {walls}")
    return high, restarted, median(walls)


def memory(bench: Bench) -> list[Row]:
    if bench.baselines:
        return []
    _, _, quarter = examine(bench, 250_000)
    high, restarted, whole = examine(bench, 1_000_000)
    factor = whole / quarter
    return [
        Row(
            "memory of hsmd with 1 M files (VmHWM: adopting them; after a restart)", "",
            f"≤ {MEMORY_GOAL_MIB} MiB", f"{high:.0f} MiB; {restarted:.0f} MiB", max(high, restarted) <= MEMORY_GOAL_MIB,
        ),
        Row(
            "start-up examination of 1 M files, warm", "", f"≤ {STARTUP_GOAL_S:.0f} s",
            f"{whole:.1f} s", whole <= STARTUP_GOAL_S,
        ),
        Row(
            "the same, linear in the number of files", f"250,000 files: {quarter:.1f} s",
            f"≤ {LINEAR_GOAL} x for 4 x the files", f"{factor:.1f} x", factor <= LINEAR_GOAL,
        ),
    ]


def take_over(bench: Bench, first: Daemon, disk: Disk) -> Daemon:
    """hsmd on a rebuilt disk, with copies of all that the first one has; waits for a file's bytes."""
    run(["umount", str(disk.mount)])
    daemon = Daemon(bench.binaries, bench.work / "hsmd-rebuilt", disk.mount)
    daemon.remove()
    run(["cp", "-a", str(first.home), str(daemon.home)])
    text = daemon.config.read_text().replace(str(first.home), str(daemon.home))
    # The time until a file can be read is asked for, not what all of them take.
    daemon.config.write_text(f'device = "{disk.device}"\nrefill = false\n' + text)
    bench.daemons.append(daemon)
    daemon.start()
    daemon.wait_ready()
    found = (disk.mount / "d017/d01794/file-007.txt").read_bytes()
    if found != b"file 7 of directory 1794\n":
        raise RuntimeError(f"a stub was read as {found}")
    return daemon


def opened_meanwhile(bench: Bench, daemon: Daemon, count: int) -> dict:
    """Opens of released files, at random, while the rest of a million flows back in the background."""
    daemon.stop()
    text = daemon.config.read_text()
    daemon.config.write_text(text.replace("refill = false\n", "refill = true\n"))
    daemon.start()
    daemon.wait_ready()
    end = time.monotonic() + 300
    while (left := (daemon.status().get("refill") or {}).get("files", count)) >= count - 1000:
        if time.monotonic() > end:
            raise RuntimeError(f"nothing flows back: {daemon.status().get('refill')}")
        time.sleep(0.2)
    rng, listed = random.Random(5), bench.work / "list"
    chosen = [(rng.randrange(count // 100), rng.randrange(100)) for _ in range(MEANWHILE)]
    paths = [daemon.mount / f"d{directory // 100:03}/d{directory:05}/file-{number:03}.txt" for directory, number in chosen]
    listed.write_text("".join(f"{path}\n" for path in paths))
    result = json.loads(run([str(bench.binaries / "load"), "open", str(listed), "--threads", "1"]).stdout)
    begun, before = time.monotonic(), daemon.status()["refill"]["files"]
    time.sleep(5)
    rate = (before - daemon.status()["refill"]["files"]) / (time.monotonic() - begun)
    note(f"{left:,} files to flow back: opened meanwhile {result}; {rate:.0f} files/s flow back")
    return {**result, "rate": rate}


def stubs(bench: Bench) -> list[Row]:
    """A million names without content onto a fresh disk, until a file can be read there."""
    if bench.baselines:
        return []
    count = 1_000_000
    inodes = ("-N", str(count + count // 50 + 10_000))
    note(f"making and logging {count:,} files")
    disk = bench.disk("fresh", "12G", inodes)
    make_files(disk.mount, count)
    daemon = bench.daemon(disk.mount, volume=True)
    daemon.start()
    daemon.wait_ready()
    daemon.sync("--to", "media")
    daemon.stop()
    made_in, usable_in = [], []
    for _ in range(bench.rounds):
        disk = bench.disk("fresh", "12G", inodes)
        bench.settle()
        start = time.monotonic()
        command = [str(bench.binaries / "replay"), "--from", str(daemon.volume), "--to", str(disk.mount)]
        made = json.loads(run([*command, "--stubs", "--json"]).stdout)
        made_in.append(time.monotonic() - start)
        if made["stubs"] != count or made["losses_total"]:
            raise RuntimeError(f"replay made {made['stubs']} stubs of {count}, and lost {made['losses_total']}")
        rebuilt = take_over(bench, daemon, disk)
        usable_in.append(time.monotonic() - start)
        meanwhile = opened_meanwhile(bench, rebuilt, count) if len(usable_in) == bench.rounds else {}
        rebuilt.stop()
        rebuilt.remove()
    daemon.remove()
    bench.drop_disk("fresh")
    note(f"stubs of {count:,} files: synced after {made_in}, usable after {usable_in}")
    wall = median(usable_in)
    return [
        Row(
            "`replay --stubs` of 1 M files onto a fresh ext4, until hsmd gives a file's bytes", "",
            f"≤ {STUBS_GOAL_S:.0f} s", f"{wall:.1f} s ({median(made_in):.1f} s of it replay)", wall <= STUBS_GOAL_S,
        ),
        Row(
            f"open and read {MEANWHILE:,} of them, in random order, while the rest flows back", "", "",
            f"p50 {meanwhile['p50'] * 1000:.2f} ms, p99 {meanwhile['p99'] * 1000:.2f} ms"
            f" ({meanwhile['rate']:,.0f} files/s flow back)", None,
        ),
    ]


def scan(bench: Bench) -> list[Row]:
    """A policy's question about size and age to a made-up catalog of ten million files."""
    if bench.baselines:
        return []
    seconds: dict[str, list[float]] = {}
    for _ in range(bench.rounds):
        lines = run([str(bench.binaries / "scan"), str(SCAN_FILES), str(bench.work)]).stdout
        for line in lines.splitlines():
            answer = json.loads(line)
            seconds.setdefault(answer["question"], []).append(answer["seconds"])
    note(f"scan of {SCAN_FILES:,} files: {seconds}")
    walls = {question: median(walls) for question, walls in seconds.items()}
    wall = walls.pop("size and age")
    others = ", ".join(f"{question} {other:.1f} s" for question, other in walls.items())
    return [
        Row(
            "a rule's search by size and age over 10 M files", "", f"≤ {SCAN_GOAL_S:.0f} s",
            f"{wall:.1f} s ({others})", wall <= SCAN_GOAL_S,
        )
    ]


class Durable:
    """Follows `tierctl events --json` and notes when each path became durable."""

    def __init__(self, daemon):
        command = [str(daemon.binaries / "tierctl"), "--config", str(daemon.config), "events", "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        self.seen: dict[str, float] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            arrived = time.time()
            event = json.loads(line)
            if event.get("event") != "durable":
                continue
            for path in event.get("paths", []):
                self.seen.setdefault(Path(path).name, arrived)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def latency(bench: Bench) -> list[Row]:
    """Small files written at random moments, about ten a second, each followed to durability."""
    if bench.baselines:
        return []
    disk = bench.disk("fresh", "2G")
    daemon = bench.daemon(disk.mount, volume=True)
    daemon.start()
    daemon.wait_ready()
    daemon.sync()
    durable = Durable(daemon)
    time.sleep(1)
    rng, written = random.Random(3), {}
    for number in range(400):
        name = f"small-{number}"
        start = time.time()
        (disk.mount / name).write_bytes(os.urandom(2000))
        written[name] = start
        time.sleep(rng.uniform(0.02, 0.18))
    time.sleep(3)
    durable.stop()
    daemon.stop()
    daemon.remove()
    bench.drop_disk("fresh")
    waits = sorted(durable.seen[name] - start for name, start in written.items() if name in durable.seen)
    missing = len(written) - len(waits)
    if missing:
        raise RuntimeError(f"{missing} of {len(written)} changes were never reported as durable")
    p50, p99 = waits[len(waits) // 2], waits[int(len(waits) * 0.99)]
    return [
        Row(
            "change to durable in the spool, ten changes a second", "", f"p99 ≤ {LATENCY_GOAL_S:.0f} s",
            f"p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms", p99 <= LATENCY_GOAL_S,
        )
    ]


def idle(bench: Bench) -> list[Row]:
    if bench.baselines:
        return []
    disk = bench.disk("fresh", "3G")
    make_files(disk.mount, 50_000)
    daemon = bench.daemon(disk.mount, volume=True)
    daemon.start()
    daemon.wait_ready()
    daemon.sync("--to", "media")
    time.sleep(20)  # the catalog is checkpointed within 15 s
    before = daemon.cpu_seconds()
    time.sleep(IDLE_SECONDS)
    percent = (daemon.cpu_seconds() - before) / IDLE_SECONDS * 100
    daemon.stop()
    daemon.remove()
    bench.drop_disk("fresh")
    return [
        Row(
            f"CPU of hsmd on an idle filesystem (50,000 files, {IDLE_SECONDS} s)", "", "none that top can show",
            f"{percent:.2f} %", percent <= IDLE_GOAL_PERCENT,
        )
    ]
