#!/bin/bash
# perftest.sh [DIR]: `ckpt bench transport --transport rdma` beside perftest, in turns, in one run of the virtual machine:
# READ bandwidth at 64 KiB and 1 MiB must be at least 0.95 of ib_read_bw's, 8-byte latency at most 1.2 of ib_read_lat's.
# Emulation makes all figures small and shaky: only the ratios mean something, and only on a machine that does nothing
# else. ROUNDS=N (3) sets how often each is measured; medians count. Needs root and apt.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
if ! command -v apt-get >/dev/null; then
    echo "skipped: the virtual machine is made of Debian packages, and there is no apt-get here"
    exit 0
fi
dir=${1:-${TMPDIR:-/tmp}/ckpt-rdma-vm}
"$here/prepare.sh" "$dir"
cd "$here/../.."
cargo build --release -p ckpt-cli --no-default-features --features rdma
work=$(mktemp -d "$dir/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
cp "${CARGO_TARGET_DIR:-target}/release/ckpt" "$here/two-hosts.sh" "$here/compare.py" "$work/"
cat >"$work/run.sh" <<GUEST
export PATH=/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/tmp NCCL_IB_TIMEOUT=18 CKPT_RUNTIME_DIR=/tmp/run
ulimit -l unlimited
bash $work/two-hosts.sh || exit 90
exec python3 $work/compare.py $work/ckpt ${ROUNDS:-3}
GUEST
MEM=1536 "$here/boot.sh" "$dir" "${LIMIT:-900}" "$work"
