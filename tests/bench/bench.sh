#!/usr/bin/env bash
# Measures the product against other programs on the same disk; `make bench` runs it.
#
#   tests/bench/bench.sh [--rounds N] [--baselines] [--readme] [ROW ...]
#
# ROW is one or more of: adopt replay unpack overwrite memory stubs scan space latency idle warm create
# recall read release start (default: all).
# --baselines measures only the other programs; --readme writes the table into README.md.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
export PATH="$root/target/tools/bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin"
"$root/tests/setup.sh" bench
export HSM_BIN=${HSM_BIN:-$root/target/release}
exec "$("$root/tests/setup.sh" python)" -B "$root/tests/bench/bench.py" "$@"
