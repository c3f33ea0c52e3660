#!/usr/bin/env bash
# Installs what the tests, the demo and the benches need on a Debian 12 machine.
#
#   tests/setup.sh test|demo|bench   install what is missing for that purpose, and say why
#   tests/setup.sh python            print the python3 that has cbor2 (the tests' HSM_PYTHON)
#
# Does nothing where everything is there. Nothing outside Debian's packages and crates.io is
# used; programs built by cargo go to target/tools, so that nothing of the user's is replaced.
# Exit status: 0 all is there, 2 something cannot be had (the message says what to do).
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
tools=$root/target/tools
export PATH="$tools/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 2; }
have() { command -v "$1" >/dev/null 2>&1; }

# The interpreter that has cbor2: the user's own choice, the default one, or Debian's.
find_python() {
    local candidate
    for candidate in "${HSM_PYTHON:-}" python3 /usr/bin/python3; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import cbor2' >/dev/null 2>&1; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# command | Debian package | why
packages_all='
cc|build-essential|compiles the bundled SQLite and zstd
mkfs.ext4|e2fsprogs|makes the ext4 disks
chattr|e2fsprogs|sets the flags that replay must bring back
losetup|mount|attaches disk images as loop devices
findmnt|util-linux|shows what is mounted where
zstd|zstd|reads the log without this software
rsync|rsync|compares trees independently of this software
getfattr|attr|compares extended attributes
setfacl|acl|sets the ACLs that replay must bring back
setcap|libcap2-bin|sets the file capabilities that replay must bring back
sqlite3|sqlite3|the database workload
'
packages_test='
mkfs.xfs|xfsprogs|makes the xfs disks
mkfs.btrfs|btrfs-progs|makes the btrfs disks
stress-ng|stress-ng|file stressors on the watched filesystem
bsdtar|libarchive-tools|reads released files: it asks for holes first
cpio|cpio|reads released files
qemu-img|qemu-utils|reads released files: it asks for holes first
strace|strace|kills the daemon before a certain call
'
packages_bench='
xz|xz-utils|unpacks the kernel source as it is shipped
restic|restic|the backup program to compare with
dpkg-source|dpkg-dev|fetches the kernel source as a corpus
'

missing_packages() {
    local name package why
    while IFS='|' read -r name package why; do
        [ -n "$name" ] || continue
        have "$name" || printf '%s|%s|%s\n' "$package" "$name" "$why"
    done
}

install_packages() {
    local wanted=$1 list package name why names=""
    list=$(missing_packages <<<"$wanted")
    if ! find_python >/dev/null; then
        list+=$'\n''python3-cbor2|python3 with cbor2|decodes the log without this software'
    fi
    while IFS='|' read -r package name why; do
        [ -n "$package" ] || continue
        say "installing $package ($name): $why"
        case " $names " in *" $package "*) ;; *) names+=" $package" ;; esac
    done <<<"$list"
    [ -n "$names" ] || return 0
    [ "$(id -u)" = 0 ] || die "installing$names needs root: run this as root, or 'apt-get install$names' first"
    have apt-get || die "this is not Debian: install$names by your system's own means, then run this again"
    apt_get update
    # shellcheck disable=SC2086  # one word per package
    apt_get install --no-install-recommends $names
    list=$(missing_packages <<<"$wanted")
    [ -z "$list" ] || die "still missing after installing: $(cut -d'|' -f2 <<<"$list" | tr '\n' ' ')"
    find_python >/dev/null || die "no python3 can import cbor2: 'apt-get install python3-cbor2', or 'pip install cbor2' and set HSM_PYTHON"
}

apt_get() {
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        die "'apt-get $*' failed (above): check the network and /etc/apt, then run this again"
    fi
    rm -f "$log"
}

check_cargo() {
    have cargo || die "cargo is missing: install Rust $(toolchain) with rustup (https://rustup.rs)"
    local version
    version=$(cd "$root" && cargo --version 2>/dev/null | cut -d' ' -f2)
    [ "$(printf '%s\n%s\n' "$(toolchain)" "$version" | sort -V | head -n 1)" = "$(toolchain)" ] ||
        die "cargo is '$version', but Rust $(toolchain) is needed: install rustup (https://rustup.rs), then 'rustup toolchain install $(toolchain) -c clippy -c rustfmt'"
}

toolchain() { sed -n 's/^channel *= *"\(.*\)"/\1/p' "$root/rust-toolchain.toml"; }

# install_crate COMMAND CRATE VERSION WHY
install_crate() {
    have "$1" && return 0
    say "installing $2 $3 from crates.io into target/tools (takes some minutes): $4"
    local log
    log=$(mktemp)
    if ! (cd "$root" && cargo install --locked --quiet --root "$tools" --version "$3" "$2") >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        die "'cargo install $2' failed (above): check the network, then run this again"
    fi
    rm -f "$log"
}

check_machine() {
    [ "$(id -u)" = 0 ] || die "root is needed, for loop devices, mounts and fanotify: run this with sudo"
    [ -e /dev/loop-control ] || modprobe loop 2>/dev/null || true
    [ -e /dev/loop-control ] || die "there are no loop devices (/dev/loop-control): 'modprobe loop', or run on a machine or container that has them"
    local major minor
    IFS=. read -r major minor _ < <(uname -r)
    minor=${minor%%[!0-9]*}
    [ "$major" -gt 5 ] || { [ "$major" -eq 5 ] && [ "$minor" -ge 17 ]; } ||
        die "kernel $(uname -r) is too old: fanotify with names and targets needs 5.17 or later"
    local fs
    for fs in $1; do
        grep -qw "$fs" /proc/filesystems || modprobe "$fs" 2>/dev/null || true
        grep -qw "$fs" /proc/filesystems || die "this kernel cannot mount $fs: 'modprobe $fs', or use a kernel that has it"
    done
}

case "${1:-}" in
python)
    find_python || die "no python3 can import cbor2: run 'tests/setup.sh test' first"
    ;;
test)
    check_machine 'ext4 xfs btrfs'
    install_packages "$packages_all$packages_test"
    check_cargo
    install_crate cargo-nextest cargo-nextest 0.9.143 'runs the tests'
    install_crate fsx fsx 0.3.2 'the public workload that tests filesystems'
    ;;
demo)
    check_machine 'ext4'
    install_packages "$packages_all"
    check_cargo
    ;;
bench)
    check_machine 'ext4'
    install_packages "$packages_all$packages_bench"
    check_cargo
    ;;
*)
    echo "usage: tests/setup.sh test|demo|bench|python" >&2
    exit 2
    ;;
esac
