"""Space pressure: how fast a writer may fill a nearly full disk of cold data."""

import json
import os
import subprocess
import threading
import time

from common import Bench, Row, note, run

COLD_FILE = 4 << 20
DISK = "6G"
HIGH, LOW = 90, 80
RULE = f"""
[[rule]]
name = "make-room"
action = "release"
condition = "path glob 'cold/*'"
weight = "age(mtime)"
high_watermark = {HIGH}
low_watermark = {LOW}
"""


def used_percent(mount) -> float:
    stat = os.statvfs(mount)
    used = stat.f_blocks - stat.f_bfree
    return used * 100 / (used + stat.f_bavail)


def cold_disk(bench: Bench):
    """An ext4 that is just below the high watermark, full of files that all may be released."""
    disk = bench.disk("pressed", DISK, ("-m", "0"))
    daemon = bench.daemon(disk.mount, volume=True)
    policy = daemon.home / "policy.toml"
    policy.write_text(RULE)
    cold = disk.mount / "cold"
    cold.mkdir()
    block = os.urandom(1 << 20) * (COLD_FILE >> 20)
    number = 0
    while used_percent(disk.mount) < HIGH - 2:
        (cold / f"{number:05}").write_bytes(number.to_bytes(8, "big") + block[8:])
        number += 1
    run(["umount", str(disk.mount)])
    text = daemon.config.read_text()
    daemon.config.write_text(f'device = "{disk.device}"\npolicies = "{policy}"\n' + text)
    daemon.start()
    daemon.wait_ready()
    daemon.sync("--to", "media")
    return disk, daemon, number * COLD_FILE


def write(mount, total: int, rate: float | None) -> tuple[float, int]:
    """Write `total` bytes at this rate (None: as fast as it goes); gives bytes a second and ENOSPCs."""
    block, done, errors = os.urandom(1 << 20), 0, 0
    start = time.monotonic()
    with open(mount / "hot", "wb", buffering=0) as hot:
        while done < total:
            try:
                done += hot.write(block)
            except OSError:
                errors += 1
                time.sleep(0.1)
                if errors > 100:
                    break
            if rate is not None:
                time.sleep(max(0.0, start + done / rate - time.monotonic()))
    return done / (time.monotonic() - start), errors


class Watched:
    """What status says of the space, ten times a second."""

    def __init__(self, daemon):
        self.daemon, self.seen, self.over = daemon, [], False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.over:
            ran = self.daemon.tierctl("status", "--json", check=False)
            if ran.returncode == 0:
                self.seen.append(json.loads(ran.stdout)["space"])
            time.sleep(0.1)

    def stop(self) -> list[dict]:
        self.over = True
        self.thread.join()
        return self.seen


def space(bench: Bench) -> list[Row]:
    if bench.baselines:
        return []
    rate, trials = None, []
    while len(trials) < 6:
        disk, daemon, cold = cold_disk(bench)
        bench.settle()
        watched = Watched(daemon)
        # Less than what can be released: what was written itself is not on the volume yet.
        reached, errors = write(disk.mount, cold * 3 // 4, rate)
        seen = watched.stop()
        last = seen[-1]
        least = min(state["available_bytes"] for state in seen)
        note(
            f"space: asked {rate and rate / 2**20:.0f} MiB/s, {reached / 2**20:.0f} MiB/s, {errors} times ENOSPC, "
            f"at least {least / 2**20:.0f} MiB free; {last}"
            if rate else f"space: unbounded, {reached / 2**20:.0f} MiB/s, {errors} times ENOSPC, "
            f"at least {least / 2**20:.0f} MiB free; {last}"
        )
        daemon.stop()
        daemon.remove()
        bench.drop_disk("pressed")
        trials.append((reached, errors, last))
        if errors == 0:
            break
        rate = reached * 0.7
    reached, errors, last = trials[-1]
    limit = last["limit_bytes_per_s"] or 0
    latency = last["release_latency_ms"]
    too_fast = [full for full, met, _ in trials if met]
    met = f"; ENOSPC at {min(too_fast) / 2**20:.0f} MiB/s" if too_fast else ""
    tried = "as fast as it can" if len(trials) == 1 else "the highest rate without ENOSPC"
    return [
        Row(
            f"a writer on an ext4 of {DISK}iB, {HIGH} % full of cold files, {tried}", "",
            "no ENOSPC below the limit that status shows",
            f"{reached / 2**20:.0f} MiB/s; limit {limit / 2**20:.0f} MiB/s, space given back within {latency} ms{met}",
            errors == 0 and all(full > limit for full in too_fast),
        )
    ]
