"""Where the benches' input comes from.

Debian's own packages are fetched once into the cache (target/bench/cache): the Linux source (about
78,000 files, 1.4 GB) and the data of a game that does not compress (1.4 GB). Where they cannot be
had, trees of the same shape are generated, and the table says so. Nothing here is measured.
"""

import os
import random
import shutil
import subprocess
from pathlib import Path

from common import note, run

DEBIAN_SOURCES = "deb-src http://deb.debian.org/debian bookworm main\n"
GENERATED_FILES = 78_000
INCOMPRESSIBLE_BYTES = 1_400_000_000


class Corpus:
    """The files in the cache: the kernel's tarball, the same uncompressed, and a package's data."""

    def __init__(self, cache: Path):
        cache = cache.resolve()
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)
        self.generated = False

    def kernel_tar_xz(self) -> Path:
        """The kernel source as it is shipped (a generated tree, packed the same way, without it)."""
        found = sorted(self.cache.glob("linux_*.orig.tar.xz"))
        if found:
            self.generated = found[-1].name.startswith("linux_generated")
            return found[-1]
        note("fetching the kernel source (apt-get source --download-only linux)")
        try:
            self._apt_source("linux")
            return sorted(self.cache.glob("linux_*.orig.tar.xz"))[-1]
        except (subprocess.CalledProcessError, IndexError) as error:
            note(f"the kernel source cannot be had ({error}): generating a tree of its shape")
        self.generated = True
        tree = self.cache / "generated" / "linux"
        generate_tree(tree, GENERATED_FILES)
        target = self.cache / "linux_generated.orig.tar.xz"
        run(["tar", "-C", str(tree.parent), "-I", "xz -1 -T2", "-cf", f"{target}.part", "linux"])
        os.rename(f"{target}.part", target)
        shutil.rmtree(tree.parent)
        return target

    def kernel_tar(self) -> Path:
        """The same, uncompressed."""
        packed = self.kernel_tar_xz()
        plain = packed.with_suffix("")
        if not plain.exists():
            note("uncompressing the kernel source")
            with open(f"{plain}.part", "wb") as out:
                run(["xz", "-dc", "-T2", str(packed)], stdout=out)
            os.rename(f"{plain}.part", plain)
        return plain

    def incompressible(self) -> Path:
        """A directory with about 1.4 GB that does not compress."""
        target = self.cache / "incompressible"
        if target.exists():
            return target
        part = self.cache / "incompressible.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        note("fetching 1.4 GB that does not compress (apt-get download 0ad-data)")
        try:
            run(["apt-get", "-q", "download", "0ad-data"], cwd=part)
        except subprocess.CalledProcessError:
            note("the package cannot be had: generating random files of mixed sizes")
            generate_random_files(part, INCOMPRESSIBLE_BYTES)
        os.rename(part, target)
        return target

    def _apt_source(self, package: str) -> None:
        """apt-get source with lists of its own, so that the machine's /etc/apt stays as it is."""
        lists = self.cache / "apt"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        sources = self.cache / "sources.list"
        sources.write_text(DEBIAN_SOURCES)
        options = [
            "-q",
            "-o", f"Dir::Etc::sourcelist={sources}",
            "-o", "Dir::Etc::sourceparts=/dev/null",
            "-o", f"Dir::State::lists={lists}",
            "-o", "APT::Sandbox::User=root",
        ]
        run(["apt-get", *options, "update"])
        run(["apt-get", *options, "source", "--download-only", package], cwd=self.cache)
        shutil.rmtree(lists, ignore_errors=True)
        for extra in self.cache.glob(f"{package}_*.debian.tar.xz"):
            extra.unlink()


def generate_tree(root: Path, files: int) -> None:
    """Source-like text in a tree as broad and deep as the kernel's: 18 KB a file on average."""
    rng = random.Random(20240229)
    words = [bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz_", k=rng.randint(2, 12))) for _ in range(4000)]
    made = 0
    while made < files:
        directory = root.joinpath(*(f"d{rng.randrange(12)}" for _ in range(rng.randint(1, 4))), f"m{made}")
        directory.mkdir(parents=True, exist_ok=True)
        for _ in range(min(16, files - made)):
            size = min(int(rng.lognormvariate(8.9, 1.3)), 4_000_000)
            chosen = rng.choices(words, k=max(1, size // 8))
            (directory / f"f{made}.c").write_bytes(b" ".join(chosen)[:size])
            made += 1


def generate_random_files(root: Path, total: int) -> None:
    """Random bytes in files from 4 KiB to 256 MiB."""
    rng = random.Random(17)
    written = 0
    number = 0
    while written < total:
        size = min(4096 * 2 ** rng.randrange(17), total - written)
        with open(root / f"r{number}.bin", "wb") as out:
            for offset in range(0, size, 1 << 20):
                out.write(os.urandom(min(1 << 20, size - offset)))
        written += size
        number += 1
