#!/usr/bin/env bash
# The product in three minutes: a disk is watched, damaged, destroyed, and built again.
#
# Run by `make demo` (as root). Everything happens in target/demo and is removed at the end, also
# after a failure or ^C. The comparison at the end uses rsync, find, getfattr and lsattr only.
# Exit status: 0 the rebuilt disk is equal, 1 it is not, 2 the demo could not run.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
bin=${HSM_BIN:-$root/target/release}
export PATH="$root/target/tools/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin"
python=$("$root/tests/setup.sh" python)
[ "$(id -u)" = 0 ] || { echo 'demo: error: root is needed, for disks and mounts: sudo make demo' >&2; exit 2; }
[ -x "$bin/hsmd" ] || { echo "demo: error: $bin/hsmd is not there: run 'make demo', which builds it" >&2; exit 2; }
mkdir -p "$root/target"
work=$(mktemp -d "$root/target/demo.XXXXXX")
data=$work/data            # where the watched disk is mounted
archive=$work/archive/vol1 # the archive: in real life a removable disk, an NFS or an LTFS mount
reference=$work/reference  # an independent copy, to compare with
config=$work/hsmd.toml
max_copy_kib=$((1500 * 1024))

# ---- words ------------------------------------------------------------------------------------

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; else bold='' dim='' plain=''; fi
step_number=0
step() { step_number=$((step_number + 1)); printf '\n%s%2d. %s%s\n' "$bold" "$step_number" "$*" "$plain"; }
tell() { printf '    %s\n' "$*"; }
show() { sed 's/^/      | /'; }
# Show a command as one would type it, then its output.
try() {
    local words="${*//$work/\$W}"
    printf '    %s$ %s%s\n' "$dim" "${words//$bin\//}" "$plain"
    "$@" 2>&1 | sed "s|$work|\$W|g" | show
}
now() { date +%s.%N; }
since() { awk -v from="$1" -v to="$(now)" 'BEGIN { printf "%.1f s", to - from }'; }
mib() { printf '%d MiB' $(($1 / 1048576)); }
disk_bytes() { du -s --block-size=1 --apparent-size "$1" | cut -f1; }
fail() { printf '\ndemo: error: %s\n' "$*" >&2; exit 2; }
tierctl() { "$bin/tierctl" --config "$config" "$@"; }

# ---- what is taken away at the end ----------------------------------------------------------------

daemon=''
workload=''
copy=''
loops=()

stop_process() {
    [ -n "$1" ] && kill -0 "$1" 2>/dev/null || return 0
    kill -"$2" "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}

unmount() {
    local n
    for n in $(seq 50); do
        mountpoint -q "$1" || return 0
        umount "$1" 2>/dev/null && return 0
        sleep 0.1
    done
    umount "$1"
}

cleanup() {
    local status=$?
    trap - EXIT INT TERM
    set +e
    stop_process "$copy" KILL
    stop_process "$workload" KILL
    stop_process "$daemon" TERM
    if [ "$status" -ne 0 ] && [ -f "$work/hsmd.log" ]; then
        printf '\ndemo: the last lines of the daemon:\n' >&2
        tail -n 20 "$work/hsmd.log" >&2
    fi
    unmount "$data"
    unmount "$reference"
    local loop
    for loop in "${loops[@]}"; do losetup -d "$loop" 2>/dev/null; done
    chattr -R -f -i -a "$work/archive"
    if [ -n "${HSM_DEMO_KEEP:-}" ]; then
        echo "demo: kept in $work"
    else
        rm -rf --one-file-system "$work"
    fi
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# attach IMAGE MOUNTPOINT: a fresh ext4 in an image file
fresh_disk() {
    local loop
    truncate -s 6G "$1"
    mkfs.ext4 -q -F "$1"
    loop=$(losetup --find --show "$1")
    loops+=("$loop")
    mkdir -p "$2"
    mount "$loop" "$2"
}

destroy_disk() {
    local loop=${loops[-1]}
    unmount "$2"
    losetup -d "$loop"
    unset 'loops[-1]'
    rm "$1"
}

start_daemon() {
    "$bin/hsmd" --config "$config" >>"$work/hsmd.log" 2>&1 &
    daemon=$!
    local n
    for n in $(seq 600); do
        tierctl status --json >/dev/null 2>&1 && return 0
        kill -0 "$daemon" 2>/dev/null || break
        sleep 0.1
    done
    fail "hsmd did not start"
}

# ---- the input --------------------------------------------------------------------------------------

# /usr/share, or as many of its directories as fit, smallest first where it is larger.
choose_input() {
    local total size entry
    total=$(du -skx /usr/share | cut -f1)
    if [ "$total" -le "$max_copy_kib" ]; then
        printf '%s\n' /usr/share/*
        return
    fi
    total=0
    du -skx /usr/share/* 2>/dev/null | sort -n | while read -r size entry; do
        total=$((total + size))
        [ "$total" -le "$max_copy_kib" ] || break
        printf '%s\n' "$entry"
    done
}

# One of each thing that a careless archiver loses.
make_odd_things() {
    local d=$data/odd
    mkdir -p "$d/sub"
    echo 'one file' >"$d/hard-a" && ln "$d/hard-a" "$d/sub/hard-b"
    ln -s ../nowhere "$d/dangling"
    mkfifo -m 0640 "$d/fifo"
    mknod "$d/device" c 1 3
    printf 'x' | dd of="$d/sparse" bs=1 seek=1G conv=notrunc status=none
    echo acl >"$d/acl" && setfacl -m u:daemon:rw,g:games:r "$d/acl"
    setfacl -d -m u:daemon:rwx "$d/sub"
    setfattr -n user.comment -v 'hello' "$d/acl"
    cp /bin/true "$d/capable" && setcap cap_net_raw+ep "$d/capable"
    cp /bin/true "$d/setuid" && chown daemon:games "$d/setuid" && chmod 6755 "$d/setuid"
    echo 'old' >"$d/old" && touch -d '1999-12-31 23:59:59.123456789' "$d/old"
    echo 'name' >"$d/"$'a name\nwith a newline and a byte \xff'
    echo 'keep' >"$d/immutable" && chattr +i "$d/immutable"
    echo 'log' >"$d/append-only" && chattr +a "$d/append-only"
}

start_workload() {
    mkdir "$data/shop"
    sqlite3 "$data/shop/orders.db" \
        'PRAGMA journal_mode=WAL; CREATE TABLE orders(id INTEGER PRIMARY KEY, item TEXT, at TEXT);' >/dev/null
    (
        stop=0
        trap 'stop=1' TERM
        while [ "$stop" = 0 ]; do
            sqlite3 "$data/shop/orders.db" ".timeout 5000" \
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<200)
                 INSERT INTO orders(item, at) SELECT hex(randomblob(40)), datetime('now') FROM n;
                 UPDATE orders SET item='changed' WHERE id % 97 = 0;" || true
            sleep 0.05
        done
    ) &
    workload=$!
}

orders() { sqlite3 "$data/shop/orders.db" 'PRAGMA integrity_check; SELECT count(*) FROM orders;' | tr '\n' ' '; }

# ---- the comparison, by other people's programs ---------------------------------------------------------

# Names, types, modes, owners, sizes, mtimes in nanoseconds, link counts, link targets, device
# numbers, xattrs (ACLs and capabilities are xattrs), chattr flags. Sizes of directories are the
# filesystem's own affair, and so are the flags e (extents) and I (indexed directory).
listing() {
    (
        cd "$1"
        find . -path ./lost+found -prune -o -type d -printf '%p\t%y\t%m\t%U:%G\t-\t%T@\t%n\t%l\0' \
            -o -printf '%p\t%y\t%m\t%U:%G\t%s\t%T@\t%n\t%l\0' | sort -z | tr '\0' '\n'
        find . \( -type b -o -type c \) -exec stat -c '%n device %t:%T' {} + | sort
        find . ! -path './lost+found*' -print0 | sort -z | xargs -0 getfattr -h -d -m - -e hex 2>/dev/null
        find . \( -type f -o -type d \) ! -path './lost+found*' -print0 | sort -z |
            xargs -0 lsattr -d 2>/dev/null | sed 's/^\([^ ]*\)/\1 /; :a; s/^\([^ ]*\)[eI]/\1-/; ta'
    ) >"$2"
}

contents() { (cd "$1" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"$2"; }

# ==== the demo ==========================================================================================

whole=$(now)
cat <<TEXT
${bold}What this shows${plain}
    hsmd watches a filesystem and writes every change into a log on archive media. The media hold
    the truth; the disk is only a cache. So we copy real files to a disk, kill the daemon in the
    middle, make a mistake, then destroy the disk and everything but the archive. One command
    builds it again, and programs that know nothing of this software say whether it is equal.
    (\$W below is $work.)
TEXT

step 'A disk: a fresh ext4 in an image file, mounted'
fresh_disk "$work/reference.img" "$reference"
fresh_disk "$work/disk.img" "$data"
mkdir -p "$archive" "$work/state"
try findmnt -no SOURCE,FSTYPE,SIZE,TARGET "$data"

step 'The configuration: one file'
cat >"$config" <<TOML
mount   = "$data"                 # what is watched
spool   = "$work/state/spool"     # the log's newest part, until the archive has it
catalog = "$work/state/catalog.db"
socket  = "$work/state/hsmd.sock" # tierctl talks to hsmd here
rpo     = "1s"                    # a change is safe in the spool after at most this

[[pool]]                          # one copy of the whole log; name several pools for several copies
name    = "archive"
volumes = ["$archive"]
TOML
sed "s|$work|\$W|g" "$config" | show
try "$bin/hsmd" check-config --config "$config"

step 'hsmd is started, and only then do files come'
t=$(now)
start_daemon
tell "hsmd runs (process $daemon), ready after $(since "$t")"
make_odd_things
tell 'made one of each thing that careless archivers lose: hard links, ACLs, capabilities, a sparse'
tell 'file of 1 GiB, a fifo, a device, chattr flags, a name with a newline, a time in 1999 ...'
start_workload
tell 'an SQLite database takes orders, many times a second, until the end'
mapfile -t input < <(choose_input)
input_bytes=$(du -scx --block-size=1 "${input[@]}" | tail -n 1 | cut -f1)
mkdir "$data/share"
t=$(now)
cp -a --one-file-system "${input[@]}" "$data/share/" &
copy=$!
tell "copying $(mib "$input_bytes") of /usr/share"

step 'SIGKILL: the daemon dies in the middle of the copy'
used_before=$(df --output=used -B1 "$data" | tail -n 1)
while kill -0 "$copy" 2>/dev/null; do
    used=$(($(df --output=used -B1 "$data" | tail -n 1) - used_before))
    [ "$used" -lt $((input_bytes * 2 / 5)) ] || break
    sleep 0.05
done
stop_process "$daemon" KILL
daemon=''
tell "killed when $(mib "$(($(df --output=used -B1 "$data" | tail -n 1) - used_before))") were on the disk"
wait "$copy" || fail 'cp failed'
copy=''
tell "the copy went on without it, and is complete after $(since "$t"): $(find "$data" -xdev | wc -l) names"
tell 'more changes while nobody watches: a directory renamed, files deleted, changed, truncated, chmodded'
mkdir -p "$data/work"
for n in $(seq 300); do echo "report $n" >"$data/work/report-$n.txt"; done
mv "$data/work" "$data/reports"
rm "$data/reports/report-7.txt"
truncate -s 3 "$data/reports/report-8.txt"
chmod 0600 "$data/reports/report-9.txt"
mv "$data/share/doc" "$data/documents" 2>/dev/null || true

step 'Restart: hsmd finds what it missed'
t=$(now)
start_daemon
tierctl sync >/dev/null
tell "ready, and everything is durable in the log after $(since "$t")"
try tierctl status

step 'Is my file safe? All copies on the archive?'
try tierctl state "$data/reports/report-8.txt"
t=$(now)
tierctl sync --to media >/dev/null
tell "tierctl sync --to media: every change is on the archive, read back and checked, after $(since "$t")"
try tierctl state "$data/reports/report-8.txt"
try tierctl volume list

step 'A mistake, and an earlier moment'
echo 'The year was good: 1,204 orders, 3 complaints.' >"$data/reports/annual.txt"
tierctl sync >/dev/null
lsn=$(tierctl status --json | "$python" -c 'import json,sys; print(json.load(sys.stdin)["durable_lsn"])')
tell "a report is written; the log stands at transaction (LSN) $lsn"
echo 'oops' >"$data/reports/annual.txt"
rm "$data/reports/report-42.txt"
tierctl sync >/dev/null
tell 'the report is overwritten and another one deleted: the disk says'
try cat "$data/reports/annual.txt"
tell 'but the log keeps everything:'
try tierctl log list "$data/reports/annual.txt"
try tierctl log cat "$data/reports/annual.txt" --at "$lsn"
try tierctl log cat "$data/reports/report-42.txt" --at "$lsn"
[ "$(tierctl log cat "$data/reports/annual.txt" --at "$lsn")" = 'The year was good: 1,204 orders, 3 complaints.' ] ||
    fail 'the earlier version is not what was written'
[ "$(tierctl log cat "$data/reports/report-42.txt" --at "$lsn")" = 'report 42' ] ||
    fail 'the deleted file is not what was written'

step 'The last orders; then the log and an independent copy are brought up to date'
stop_process "$workload" TERM
workload=''
before_orders=$(orders)
tell "the database says: $before_orders"
t=$(now)
tierctl sync --sweep --to media >/dev/null
tell "on the archive after $(since "$t"), changes without an event (mmap, chattr) included"
# Without the window of -1, rsync leaves a directory's nanoseconds wrong where the second is right.
rsync -aHAXS --modify-window=-1 --numeric-ids --exclude=/lost+found "$data/" "$reference/"
listing "$data" "$work/listing.before"
contents "$data" "$work/sha256.before"
tell "for comparison: a copy by rsync, a listing of $(wc -l <"$work/listing.before") lines, $(wc -l <"$work/sha256.before") checksums"

step 'The disk dies'
tell 'hsmd is killed, the disk unmounted, and its image deleted; so are spool, catalog, configuration.'
stop_process "$daemon" KILL
daemon=''
destroy_disk "$work/disk.img" "$data"
cp "$config" "$work/config.kept"
rm -rf "$work/state" "$config"
tell "what is left is the archive: $(find "$archive" -type f | wc -l) files, $(mib "$(disk_bytes "$archive")") for $(mib "$input_bytes") and every version since"
try ls -l "$archive"

step 'The archive can be read without this software: zstd and CBOR'
mapfile -t segments < <(find "$archive" -name '*.hsm.zst' -type f | sort)
zstd -q -t "${segments[@]}" || fail 'zstd finds damage in the segments'
tell "zstd -t: ${#segments[@]} segments are sound"
for segment in "${segments[@]}"; do zstd -q -dc "$segment"; done | "$python" "$root/tests/demo/count_records.py" | show

step 'A fresh disk, and replay'
fresh_disk "$work/disk.img" "$data"
try "$bin/replay" --from "$archive" --list
t=$(now)
"$bin/replay" --from "$archive" --to "$data" 2>&1 | tail -n 12 | sed "s|$work|\$W|g" | show
sync -f "$data"
tell "rebuilt and synced after $(since "$t"), every byte checked against the log's hashes"

step 'Equal? Asked of rsync, find, getfattr, lsattr, sha256sum and SQLite'
unequal=0
verdict() { if [ -s "$2" ]; then tell "NOT EQUAL ($1):"; head -n 20 "$2" | show; unequal=1; else tell "equal: $1"; fi; }
unmount "$data"
mount "${loops[-1]}" "$data"
rsync -n -aHAXSc --modify-window=-1 --delete --itemize-changes --numeric-ids --exclude=/lost+found "$reference/" "$data/" >"$work/rsync.out" 2>&1 || true
verdict 'rsync -n -aHAXSc --modify-window=-1 --delete --itemize-changes prints nothing' "$work/rsync.out"
listing "$data" "$work/listing.after"
diff "$work/listing.before" "$work/listing.after" >"$work/listing.diff" || true
verdict "all $(wc -l <"$work/listing.before") lines of names, types, modes, owners, sizes, times in ns, links, xattrs, flags" "$work/listing.diff"
contents "$data" "$work/sha256.after"
diff "$work/sha256.before" "$work/sha256.after" >"$work/sha256.diff" || true
verdict "SHA-256 of $(wc -l <"$work/sha256.before") files" "$work/sha256.diff"
after_orders=$(orders)
tell "the database says: $after_orders"
[ "$before_orders" = "$after_orders" ] || { tell "NOT EQUAL: it said $before_orders"; unequal=1; }
[ "$unequal" = 0 ] || exit 1

step 'Life goes on: hsmd on the new disk continues the same log'
cp "$work/config.kept" "$config"
mkdir -p "$work/state"
tell 'the catalog is derived from the log: it is made again from the archive'
try "$bin/tierctl" --config "$config" catalog rebuild
t=$(now)
start_daemon
echo 'after the fire' >"$data/reports/annual.txt"
tierctl sync --to media >/dev/null
tell "caught up after $(since "$t"); the log now stands at $(tierctl status --json | "$python" -c 'import json,sys; print(json.load(sys.stdin)["durable_lsn"])')"
try tierctl log list "$data/reports/annual.txt"
[ "$(tierctl log cat "$data/reports/annual.txt" --at "$lsn")" = 'The year was good: 1,204 orders, 3 complaints.' ] ||
    fail 'the history from before the fire is gone'

printf '\n%sEqual. The disk was rebuilt from the archive alone; the whole demo took %s.%s\n' "$bold" "$(since "$whole")" "$plain"
