#!/usr/bin/env bash
# Runs the two-GPU spike and prints its table last.
#   scripts/gpu/spike.sh BINARY [GIB]
# BINARY: cargo build --release -p ckpt-transport-nccl --example two_gpu_broadcast (target/release/examples/...).
# Logs go to $OUT, or to a folder of its own.
set -u
binary=$(readlink -f "${1:?usage: spike.sh BINARY [GIB]}")
gib=${2:-4}
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
# Multicast over NVLink is not wanted here; whoever set it keeps it so.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
export RUST_BACKTRACE=1

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
[ "$gpus" -ge 1 ] || { echo "no GPU: nvidia-smi lists none"; exit 1; }
world=$((gpus >= 2 ? 2 : 1))

{
    uname -a
    nvidia-smi --query-gpu=index,name,uuid,pci.bus_id,memory.total,memory.free,driver_version --format=csv
    nvidia-smi topo -m
    nproc
    grep -E 'MemTotal|MemAvailable' /proc/meminfo
    ulimit -l
    for node in /sys/devices/system/node/node*/cpulist; do echo "$node $(cat "$node")"; done
    env | grep -E '^(NCCL|CUDA|CKPT|LD_LIBRARY|VIRTUAL_ENV)' || true
} >"$out/machine.log" 2>&1
cat "$out/machine.log"

status=0
run() { # name, then the command
    local name=$1
    shift
    echo "=== $name: $*"
    timeout --kill-after=10 "${LIMIT:-200}" "$@" >"$out/$name.out" 2>"$out/$name.err"
    local code=$?
    if [ $code -ne 0 ]; then
        status=1
        echo "--- $name ended with $code; the end of its log:"
        tail -n 60 "$out/$name.err"
    fi
    grep -aE 'panicked|NCCL WARN|ERROR|WARN' "$out/$name.err" | tail -n 20
}

run spike "$binary" --world "$world" --gib "$gib"
if [ "$world" = 2 ]; then
    run alone "$binary" --world 1 --gib "$gib"
    run small_buckets "$binary" --world 2 --gib "$gib" --bucket-mib 64 --slots 8
fi
if [ $status -ne 0 ]; then
    echo "=== once more with NCCL's log"
    NCCL_DEBUG=INFO RUST_LOG=debug run debug "$binary" --world "$world" --gib 1
    tail -n 80 "$out/debug.err"
fi
echo "=== GPU memory in use afterwards"
nvidia-smi --query-gpu=index,memory.used --format=csv
for name in spike alone small_buckets debug; do
    [ -f "$out/$name.out" ] && { echo "=== $name"; cat "$out/$name.out"; }
done
exit $status
