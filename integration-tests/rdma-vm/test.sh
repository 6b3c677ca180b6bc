#!/bin/bash
# test.sh [DIR]: builds the RDMA crate's test binary and runs its hardware tests over soft-RoCE in a small virtual
# machine. DIR keeps the kernel between runs. Filters: TESTS="name ..." (default: all).
set -euo pipefail
here=$(dirname "$(realpath "$0")")
if ! command -v apt-get >/dev/null; then
    echo "skipped: the virtual machine is made of Debian packages, and there is no apt-get here"
    exit 0
fi
dir=${1:-${TMPDIR:-/tmp}/ckpt-rdma-vm}
"$here/prepare.sh" "$dir"
cd "$here/../.."
binary=$(cargo test -p ckpt-transport-rdma --test verbs --no-run --message-format=json |
    python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "verbs":
        print(message["executable"])' | tail -n 1)
work=$(mktemp -d "$dir/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
# The guest hides the host's /tmp behind its own.
cp "$binary" "$work/verbs"
cp "$here/two-hosts.sh" "$work/"
cat >"$work/run.sh" <<GUEST
export PATH=/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/tmp RUST_BACKTRACE=1
ulimit -l unlimited
bash $work/two-hosts.sh || exit 90
export CKPT_TEST_HCAS=rxe_a0,rxe_a1/rxe_b0,rxe_b1 CKPT_TEST_LINK=a1 CKPT_TEST_CYCLES=${CYCLES:-10}
# Under emulation shorter timeouts make spurious retries.
export NCCL_IB_TIMEOUT=${IB_TIMEOUT:-17}
exec $work/verbs --ignored --test-threads=1 --nocapture ${TESTS:-}
GUEST
"$here/boot.sh" "$dir" "${LIMIT:-600}" "$work"
