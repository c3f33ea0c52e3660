"""What every row of the benches shares: disks, the daemon, and timing.

Both sides of a row run on the same disk, one after the other, several times in alternation; the
figure is the median. Everything that is made here is taken away by `Cleanup`, also on failure.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path


def note(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def run(command, **options) -> subprocess.CompletedProcess:
    """Run a command that must succeed; its output is shown only where it fails."""
    options.setdefault("stdout", subprocess.PIPE)
    result = subprocess.run(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False, **options)
    if result.returncode != 0:
        words = command if isinstance(command, str) else " ".join(map(str, command))
        sys.stderr.write(result.stderr.decode(errors="replace")[-4000:])
        raise subprocess.CalledProcessError(result.returncode, words)
    return result


def shell(script: str, **options) -> subprocess.CompletedProcess:
    return run(["bash", "-o", "pipefail", "-ec", script], **options)


@dataclass
class Timed:
    """Wall and processor seconds of one run."""

    wall: float
    cpu: float


def timed(action) -> Timed:
    before = os.times()
    start = time.monotonic()
    action()
    wall = time.monotonic() - start
    after = os.times()
    cpu = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    return Timed(wall, cpu)


def median(values) -> float:
    return statistics.median(values)


def mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def tree_bytes(root: Path) -> int:
    total = 0
    for directory, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(directory, name)).st_size
    return total


def warm(tree: Path) -> None:
    """Read everything once, so that every run finds the page cache warm."""
    shell(f"tar -C '{tree}' -cf - . | cat >/dev/null")


@dataclass
class Row:
    """One line of the table. `ok` is None for a figure without a goal."""

    work: str
    against: str
    goal: str
    measured: str
    ok: bool | None = None

    def markdown(self) -> str:
        verdict = {True: "yes", False: "**no**", None: ""}[self.ok]
        return f"| {self.work} | {self.against} | {self.goal} | {self.measured} | {verdict} |"


class Disk:
    """A fresh ext4 in an image file on the machine's disk, mounted through a loop device.

    The loop device bypasses the cache of the image file: every byte would be held in memory twice,
    which no disk does."""

    def __init__(self, image: Path, mount: Path, size: str, mkfs=()):
        self.image, self.mount = image, mount
        self.device = None
        mount.mkdir(parents=True, exist_ok=True)
        image.unlink(missing_ok=True)
        run(["truncate", "-s", size, str(image)])
        run(["mkfs.ext4", "-q", "-F", *mkfs, str(image)])
        self.attach()

    def attach(self) -> None:
        found = run(["losetup", "--direct-io=on", "--find", "--show", str(self.image)])
        self.device = found.stdout.decode().strip()
        run(["mount", "-o", "noatime", self.device, str(self.mount)])

    def detach(self) -> None:
        if self.device is None:
            return
        for _ in range(50):
            if subprocess.run(["umount", str(self.mount)], stderr=subprocess.DEVNULL, check=False).returncode == 0:
                break
            if not os.path.ismount(self.mount):
                break
            time.sleep(0.1)
        subprocess.run(["losetup", "-d", self.device], stderr=subprocess.DEVNULL, check=False)
        self.device = None

    def remove(self) -> None:
        self.detach()
        self.image.unlink(missing_ok=True)


@dataclass
class Daemon:
    """hsmd with directories of its own: spool, catalog, and one pool with one volume."""

    binaries: Path
    home: Path
    mount: Path
    with_volume: bool = True
    # More of the configuration: what comes before the first section.
    extra: str = ""
    process: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def config(self) -> Path:
        return self.home / "hsmd.toml"

    @property
    def spool(self) -> Path:
        return self.home / "spool"

    @property
    def volume(self) -> Path:
        """Where it is absent (a disk that is not plugged in), the whole log stays in the spool."""
        return self.home / "archive" / "vol1"

    def prepare(self) -> None:
        """A first start on an empty home: nothing is known of the tree."""
        shutil.rmtree(self.home, ignore_errors=True)
        self.spool.mkdir(parents=True)
        self.volume.parent.mkdir()
        if self.with_volume:
            self.volume.mkdir()
        (self.home / "catalog").mkdir()
        self.config.write_text(
            f'{self.extra}mount = "{self.mount}"\n'
            f'spool = "{self.spool}"\n'
            f'catalog = "{self.home}/catalog/catalog.db"\n'
            f'socket = "{self.home}/hsmd.sock"\n'
            f'[[pool]]\nname = "archive"\nvolumes = ["{self.volume}"]\n'
        )

    def start(self) -> None:
        """Start without waiting."""
        with open(self.home / "hsmd.log", "ab") as log:
            self.process = subprocess.Popen(
                [str(self.binaries / "hsmd"), "--config", str(self.config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )

    def tierctl(self, *words, check=True) -> subprocess.CompletedProcess:
        command = [str(self.binaries / "tierctl"), "--config", str(self.config), *words]
        if check:
            return run(command)
        return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)

    def status(self) -> dict:
        return json.loads(self.tierctl("status", "--json").stdout)

    def wait_ready(self, limit: float = 600) -> None:
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            if self.tierctl("status", "--json", check=False).returncode == 0:
                return
            time.sleep(0.02)
        raise RuntimeError(f"hsmd does not answer; the end of {self.home}/hsmd.log:\n{self.log_tail()}")

    def sync(self, *words) -> None:
        self.tierctl("sync", *words)

    def wait_caught_up(self) -> float:
        """When nothing that was changed before was missing in the spool any more (monotonic time).

        That is when status last began to say so; `sync` afterwards must find nothing more, or its
        own end counts.
        """
        since, last = None, None
        while since is None or time.monotonic() - since < 1.5:
            status = self.status()
            done = status["lag"]["pending"] == 0 and status["durable_lsn"] == status["written_lsn"]
            if not done:
                since = None
            elif since is None or status["written_lsn"] != last:
                since = time.monotonic()
            last = status["written_lsn"]
            time.sleep(0.05)
        self.sync()
        return since if self.status()["durable_lsn"] == last else time.monotonic()

    def log_tail(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return "\n".join((self.home / "hsmd.log").read_text(errors="replace").splitlines()[-20:])
        return ""

    def proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()

    def memory_high_kib(self) -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", self.proc("status")).group(1))

    def cpu_seconds(self) -> float:
        fields = self.proc("stat").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def cpu_by_thread(self) -> str:
        """Where the daemon's processor time went, the busiest threads first."""
        tick, threads = os.sysconf("SC_CLK_TCK"), {}
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                head, rest = (task / "stat").read_text().rsplit(")", 1)
                fields = rest.split()
                name = head.split("(", 1)[1]
                threads[name] = threads.get(name, 0) + (int(fields[11]) + int(fields[12])) / tick
        busy = sorted(threads.items(), key=lambda pair: -pair[1])
        return ", ".join(f"{name} {seconds:.1f}" for name, seconds in busy if seconds >= 0.1)

    def log_bytes(self) -> int:
        """Bytes of the log: every segment once, whether in the spool, on the volume or on both."""
        sizes = {}
        for place in (self.spool, self.volume):
            for path in place.rglob("*"):
                number = re.match(r"\d{10,}", path.name)
                with contextlib.suppress(FileNotFoundError):
                    if number and path.is_file() and path.suffix != ".b3":
                        sizes[number.group()] = path.stat().st_size
        return sum(sizes.values())

    def stop(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                note("hsmd did not stop within 60 s of SIGTERM: killed")
                self.process.kill()
                self.process.wait()
        self.process = None

    def remove(self) -> None:
        subprocess.run(["chattr", "-R", "-f", "-i", "-a", str(self.home)], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.home, ignore_errors=True)


@dataclass
class Bench:
    """One run of the benches: where things are, and what has to be taken away."""

    binaries: Path
    work: Path
    cache: Path
    rounds: int
    baselines: bool
    disks: dict[str, Disk] = field(default_factory=dict)
    daemons: list[Daemon] = field(default_factory=list)

    def disk(self, name: str, size: str, mkfs=()) -> Disk:
        """A fresh disk; an older one of that name is dropped."""
        self.drop_disk(name)
        disk = Disk(self.work / f"{name}.img", self.work / name, size, mkfs)
        self.disks[name] = disk
        return disk

    def drop_disk(self, name: str) -> None:
        if name in self.disks:
            self.disks.pop(name).remove()

    def daemon(self, mount: Path, volume: bool, extra: str = "") -> Daemon:
        self.stop_daemons()
        daemon = Daemon(self.binaries, self.work / "hsmd", mount, with_volume=volume, extra=extra)
        daemon.remove()
        daemon.prepare()
        self.daemons.append(daemon)
        return daemon

    def settle(self) -> None:
        """Nobody's earlier writes may count as the next run's."""
        shell("sync")
        time.sleep(1)

    def stop_daemons(self) -> None:
        while self.daemons:
            self.daemons.pop().stop()

    def clean_up(self) -> None:
        self.stop_daemons()
        for name in list(self.disks):
            self.drop_disk(name)
        subprocess.run(["chattr", "-R", "-f", "-i", "-a", str(self.work)], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.work, ignore_errors=True)
