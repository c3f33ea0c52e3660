"""Rows about whole trees: adopting one, building one again, unpacking one."""

import shutil
import subprocess
import time
from pathlib import Path

from common import Bench, Daemon, Disk, Row, median, mib, note, run, shell, timed, tree_bytes, warm
from corpus import Corpus

ADOPT_GOAL = 1.1
ADOPT_SIZE_GOAL = 1.1
ADOPT_RESTIC_GOAL = 1.6
REPLAY_GOAL = 1.2
REPLAY_RESTIC_GOAL = 3.0
UNPACK_GOAL = 1.25
CAUGHT_UP_GOAL_S = 2.0


def corpus_tree(bench: Bench) -> Disk:
    """The watched tree: the kernel source and 1.4 GB that does not compress, made once."""
    if "tree" in bench.disks:
        return bench.disks["tree"]
    corpus = Corpus(bench.cache)
    kernel, noise = corpus.kernel_tar(), corpus.incompressible()
    note("making the watched tree")
    disk = bench.disk("tree", "10G")
    run(["tar", "-C", str(disk.mount), "-xf", str(kernel)])
    shutil.copytree(noise, disk.mount / "incompressible")
    shell("sync")
    note(f"watched tree: {mib(tree_bytes(disk.mount))}")
    return disk


def tar_command(tree: Path, target: Path) -> str:
    return f"tar -C '{tree}' -cf - . | zstd -q -1 -T2 > '{target}'; sync '{target}'"


def restic(bench: Bench, *words: str) -> None:
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(bench.work),
        "RESTIC_PASSWORD": "bench",
        "RESTIC_REPOSITORY": str(bench.work / "restic"),
        "RESTIC_CACHE_DIR": str(bench.work / "restic-cache"),
    }
    run(["restic", "-q", *words], env=environment)


def fresh_restic(bench: Bench) -> None:
    for place in ("restic", "restic-cache"):
        shutil.rmtree(bench.work / place, ignore_errors=True)
    restic(bench, "init")


def adopt_once(daemon: Daemon) -> None:
    daemon.start()
    daemon.wait_ready()
    daemon.sync()


def adopt(bench: Bench) -> list[Row]:
    tree = corpus_tree(bench).mount
    archive = bench.work / "tree.tar.zst"
    sides = {"tar": [], "restic": [], "hsmd": [], "hsmd+volume": []}
    sizes: list[float] = []
    for _ in range(bench.rounds):
        archive.unlink(missing_ok=True)
        warm(tree)
        bench.settle()
        sides["tar"].append(timed(lambda: shell(tar_command(tree, archive))))
        if not bench.baselines:
            for name, volume in (("hsmd", False), ("hsmd+volume", True)):
                daemon = bench.daemon(tree, volume=volume)
                warm(tree)
                bench.settle()
                sides[name].append(timed(lambda d=daemon: adopt_once(d)))
                note(f"adopt, {name}: {daemon.cpu_seconds():.1f} s of processor: {daemon.cpu_by_thread()}")
                if not volume:
                    sizes.append(daemon.log_bytes())
                daemon.stop()
                daemon.remove()
        fresh_restic(bench)
        warm(tree)
        bench.settle()
        sides["restic"].append(timed(lambda: restic(bench, "backup", str(tree))))
    wall = {name: median([t.wall for t in runs]) for name, runs in sides.items() if runs}
    for name, runs in sides.items():
        note(f"adopt, {name}: " + ", ".join(f"{t.wall:.1f} s" for t in runs) + (f" ({runs[0].cpu:.1f} s of processor)" if runs else ""))
    tar_size = archive.stat().st_size
    against = f"`tar -cf - . \\| zstd -1 -T2 > f; sync`: {wall['tar']:.1f} s, {mib(tar_size)}"
    if bench.baselines:
        return [
            Row("adopt an existing tree", against, "", ""),
            Row("", f"`restic backup`: {wall['restic']:.1f} s", "", ""),
        ]
    ratio, size_ratio = wall["hsmd"] / wall["tar"], median(sizes) / tar_size
    faster, with_volume = wall["restic"] / wall["hsmd"], wall["hsmd+volume"] / wall["tar"]
    return [
        Row(
            f"adopt an existing tree ({mib(tree_bytes(tree))}) until durable in the spool",
            against, f"≤ {ADOPT_GOAL} x time", f"{ratio:.2f} x ({wall['hsmd']:.1f} s)", ratio <= ADOPT_GOAL,
        ),
        Row(
            "size of its log", f"{mib(tar_size)}", f"≤ {ADOPT_SIZE_GOAL} x",
            f"{size_ratio:.2f} x ({mib(median(sizes))})", size_ratio <= ADOPT_SIZE_GOAL,
        ),
        Row("adopt, while a volume on the same disk is copied to", "the same", "", f"{with_volume:.2f} x"),
        Row(
            "adopt", f"`restic backup`: {wall['restic']:.1f} s", f"≥ {ADOPT_RESTIC_GOAL} x faster",
            f"{faster:.1f} x faster", faster >= ADOPT_RESTIC_GOAL,
        ),
    ]


def unequal(left: Path, right: Path) -> str:
    """What rsync finds different between two trees; empty where they are equal."""
    command = ["rsync", "-n", "-aHAXSc", "--modify-window=-1", "--delete", "--itemize-changes", "--numeric-ids",
               "--exclude=/lost+found", f"{left}/", f"{right}/"]
    found = subprocess.run(command, capture_output=True, check=False)
    return (found.stdout + found.stderr).decode(errors="replace").strip()


def replay(bench: Bench) -> list[Row]:
    tree = corpus_tree(bench).mount
    archive = bench.work / "tree.tar.zst"
    if not archive.exists():
        shell(tar_command(tree, archive))
    fresh_restic(bench)
    restic(bench, "backup", str(tree))
    daemon = None
    if not bench.baselines:
        daemon = bench.daemon(tree, volume=True)
        adopt_once(daemon)
        daemon.sync("--to", "media")
        daemon.stop()
    sides = {"tar": [], "replay": [], "restic": []}
    differences = ""

    def once(name: str, source: Path, action) -> None:
        disk = bench.disk("fresh", "10G")
        if source.is_file():
            shell(f"cat '{source}' >/dev/null")
        else:
            warm(source)
        bench.settle()
        sides[name].append(timed(lambda: action(disk.mount)))

    for number in range(bench.rounds):
        once("tar", archive, lambda to: shell(f"zstd -q -dc '{archive}' | tar -C '{to}' -xf -; sync -f '{to}'"))
        if daemon:
            once("replay", daemon.volume, lambda to: replay_to(bench, daemon.volume, to))
            if number == 0:
                differences = unequal(tree, bench.disks["fresh"].mount)
        once("restic", bench.work / "restic", lambda to: restic_restore(bench, to))
    bench.drop_disk("fresh")
    for name, runs in sides.items():
        note(f"replay, {name}: " + ", ".join(f"{t.wall:.1f} s" for t in runs))
    wall = {name: median([t.wall for t in runs]) for name, runs in sides.items() if runs}
    against = f"`zstd -dc f \\| tar -xf -; sync`: {wall['tar']:.1f} s"
    if not daemon:
        return [
            Row("replay onto a fresh ext4, synced", against, "", ""),
            Row("", f"`restic restore; sync`: {wall['restic']:.1f} s", "", ""),
        ]
    daemon.remove()
    if differences:
        note(f"the replayed tree differs:\n{differences[:2000]}")
    ratio, faster = wall["replay"] / wall["tar"], wall["restic"] / wall["replay"]
    verdict = "equal by rsync -c" if not differences else "NOT EQUAL by rsync -c"
    return [
        Row(
            "replay onto a fresh ext4, synced", against, f"≤ {REPLAY_GOAL} x",
            f"{ratio:.2f} x ({wall['replay']:.1f} s, {verdict})", ratio <= REPLAY_GOAL and not differences,
        ),
        Row(
            "replay", f"`restic restore; sync`: {wall['restic']:.1f} s", f"≥ {REPLAY_RESTIC_GOAL:.0f} x faster",
            f"{faster:.1f} x faster", faster >= REPLAY_RESTIC_GOAL,
        ),
    ]


def replay_to(bench: Bench, volume: Path, to: Path) -> None:
    run([str(bench.binaries / "replay"), "--from", str(volume), "--to", str(to)])
    shell(f"sync -f '{to}'")


def restic_restore(bench: Bench, to: Path) -> None:
    restic(bench, "restore", "latest", "--target", str(to))
    shell(f"sync -f '{to}'")


def unpack(bench: Bench) -> list[Row]:
    corpus = Corpus(bench.cache)
    rows = []
    for label, tarball in (
        ("unpack the kernel source, as shipped (.tar.xz)", corpus.kernel_tar_xz()),
        ("unpack it from an uncompressed tar", corpus.kernel_tar()),
    ):
        rows += unpack_from(bench, label, tarball)
    return rows


def unpack_from(bench: Bench, label: str, tarball: Path) -> list[Row]:
    bare, watched, caught_up = [], [], []
    for _ in range(bench.rounds):
        disk = bench.disk("fresh", "10G")
        shell(f"cat '{tarball}' >/dev/null")
        bench.settle()
        bare.append(timed(lambda to=disk.mount: run(["tar", "-C", str(to), "-xf", str(tarball)])).wall)
        if bench.baselines:
            continue
        disk = bench.disk("fresh", "10G")
        daemon = bench.daemon(disk.mount, volume=True)
        adopt_once(daemon)
        bench.settle()
        watched.append(timed(lambda to=disk.mount: run(["tar", "-C", str(to), "-xf", str(tarball)])).wall)
        start = time.monotonic()
        caught_up.append(max(0.0, daemon.wait_caught_up() - start))
        daemon.stop()
        daemon.remove()
    bench.drop_disk("fresh")
    against = f"the same without hsmd: {median(bare):.1f} s"
    note(f"{label}: without {', '.join(f'{t:.1f}' for t in bare)}; with {', '.join(f'{t:.1f}' for t in watched)}")
    if bench.baselines:
        return [Row(label, against, "", "")]
    # Of each pair, one after the other: whoever else uses the machine stays for minutes.
    ratio = median(with_hsmd / without for with_hsmd, without in zip(watched, bare, strict=True))
    late = median(caught_up)
    # The goal is set for what the kernel ships; the uncompressed tar is reported beside it.
    goal = tarball.suffix == ".xz"
    return [
        Row(
            label, against, f"≤ {UNPACK_GOAL} x" if goal else "",
            f"{ratio:.2f} x ({median(watched):.1f} s)", ratio <= UNPACK_GOAL if goal else None,
        ),
        Row(
            "log caught up after its last write", "", f"≤ {CAUGHT_UP_GOAL_S:.0f} s" if goal else "",
            f"{late:.1f} s", late <= CAUGHT_UP_GOAL_S if goal else None,
        ),
    ]
