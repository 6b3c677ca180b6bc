#!/bin/bash
# test.sh [DIR]: runs what needs RDMA devices over soft-RoCE in a small virtual machine: the tests of the RDMA crate, and
# a P2P update and a join of the whole program. DIR keeps the kernel between runs. TESTS="name ..." runs only these,
# CYCLES=N sets how often is joined and left (100), LIMIT=SECONDS how long the machine may run.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
if ! command -v apt-get >/dev/null; then
    echo "skipped: the virtual machine is made of Debian packages, and there is no apt-get here"
    exit 0
fi
if [[ $here == /tmp/* ]]; then
    echo "the machine has a /tmp of its own, so it cannot see the programs of a checkout below /tmp: move it" >&2
    exit 1
fi
dir=${1:-${TMPDIR:-/tmp}/ckpt-rdma-vm}
"$here/prepare.sh" "$dir"
cd "$here/../.."
# No `-p`: the features of other steps, so that nothing is built again.
cargo test --test verbs --test rdma_vm --no-run --message-format=json |
    python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] in ("verbs", "rdma_vm"):
        print(message["target"]["name"], message["executable"])' | sort -u >"$dir/binaries"
work=$(mktemp -d "$dir/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
# The guest hides the host's /tmp behind its own.
while read -r name path; do cp "$path" "$work/$name"; done <"$dir/binaries"
cp "$here/two-hosts.sh" "$work/"
cat >"$work/run.sh" <<GUEST
export PATH=/usr/sbin:/usr/bin:/sbin:/bin TMPDIR=/tmp RUST_BACKTRACE=1
ulimit -l unlimited
bash $work/two-hosts.sh || exit 90
# Under emulation shorter timeouts make spurious retries.
export NCCL_IB_TIMEOUT=${IB_TIMEOUT:-17}
$work/rdma_vm --ignored --test-threads=1 --nocapture ${TESTS:-} || exit 91
export CKPT_TEST_HCAS=rxe_a0,rxe_a1/rxe_b0,rxe_b1 CKPT_TEST_LINK=a1 CKPT_TEST_CYCLES=${CYCLES:-100}
exec $work/verbs --ignored --test-threads=1 --nocapture ${TESTS:-}
GUEST
"$here/boot.sh" "$dir" "${LIMIT:-600}" "$work"
