"""`make bench`: the table of what this must reach, measured side by side with other programs."""

import argparse
import atexit
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import rows_daemon
import rows_space
import rows_tier
import rows_tree
from common import Bench, Row, note

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "adopt": rows_tree.adopt,
    "replay": rows_tree.replay,
    "unpack": rows_tree.unpack,
    "overwrite": rows_daemon.overwrite,
    "memory": rows_daemon.memory,
    "stubs": rows_daemon.stubs,
    "scan": rows_daemon.scan,
    "space": rows_space.space,
    "latency": rows_daemon.latency,
    "idle": rows_daemon.idle,
    "warm": rows_tier.warm,
    "create": rows_tier.create,
    "recall": rows_tier.recall,
    "read": rows_tier.read,
    "release": rows_tier.release,
    "start": rows_tier.start,
}
BLOCK = re.compile(r"(<!-- bench:begin -->\n).*?(<!-- bench:end -->)", re.DOTALL)


def table(rows: list[Row]) -> str:
    head = "| work | against | goal | measured | reached |\n|---|---|---|---|---|\n"
    return head + "".join(row.markdown() + "\n" for row in rows)


def machine() -> str:
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores ({cpu.group(1) if cpu else 'unknown'}), Linux {os.uname().release}"


def write_readme(text: str) -> None:
    readme = ROOT / "README.md"
    old = readme.read_text()
    new, count = BLOCK.subn(lambda found: found.group(1) + text + found.group(2), old)
    if count != 1:
        sys.exit("bench: README.md has no block between <!-- bench:begin --> and <!-- bench:end -->")
    readme.write_text(new)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.sh", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=" ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (median)")
    parser.add_argument("--baselines", action="store_true", help="measure only the other programs")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    arguments = parser.parse_args()
    unknown = [row for row in arguments.rows if row not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]}; there are: {' '.join(ROWS)}")
    return arguments


def main() -> int:
    arguments = parse()
    home = ROOT / "target" / "bench"
    bench = Bench(
        binaries=Path(os.environ["HSM_BIN"]),
        work=home / "work",
        cache=home / "cache",
        rounds=arguments.rounds,
        baselines=arguments.baselines,
    )
    if not bench.baselines and not (bench.binaries / "hsmd").exists():
        sys.exit(f"bench: {bench.binaries}/hsmd is not there: run `make bench`, which builds it")
    shutil.rmtree(bench.work, ignore_errors=True)
    bench.work.mkdir(parents=True)
    atexit.register(bench.clean_up)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rows: list[Row] = []
    for name in arguments.rows or ROWS:
        note(f"--- {name}")
        try:
            rows += ROWS[name](bench)
        except Exception as error:  # one row's failure must not lose the others' figures
            note(f"{name} failed: {error!r}")
            rows.append(Row(name, "", "", f"failed: {error}", False))
        finally:
            bench.stop_daemons()
    text = f"Measured on {machine()}; medians of {arguments.rounds} alternating runs.\n\n" + table(rows)
    print("\n" + text)
    (home / "results.json").write_text(json.dumps([vars(row) for row in rows], indent=1))
    if arguments.readme:
        write_readme(text)
    return 0 if all(row.ok is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
