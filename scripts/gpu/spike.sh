#!/usr/bin/env bash
# Runs the two-GPU spike and the tests that need a GPU, from binaries that were built elsewhere; tables come last.
#   scripts/gpu/spike.sh FOLDER [GIB]
# FOLDER holds `two_gpu_broadcast` and `gpu`, as scripts/gpu/build.sh makes it.
# Where $OUT is set, all logs go to $OUT/logs.tgz.
set -u
folder=$(readlink -f "${1:?usage: spike.sh FOLDER [GIB]}")
binary=$folder/two_gpu_broadcast
chmod +x "$binary" "$folder/gpu"
gib=${2:-4}
out=$(mktemp -d)
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
    timeout --kill-after=10 "${LIMIT:-75}" "$@" >"$out/$name.out" 2>"$out/$name.err"
    local code=$?
    if [ $code -ne 0 ]; then
        status=1
        echo "--- $name ended with $code; the end of its log:"
        tail -n 60 "$out/$name.err"
    fi
    grep -aE 'panicked|NCCL WARN|ERROR|WARN' "$out/$name.err" | tail -n 20
}

run spike "$binary" --world "$world" --gib "$gib"
if grep -q '^nccl: unavailable' "$out/spike.err"; then
    CKPT_NCCL_LIBRARY=$(find / -xdev -name 'libnccl.so.2' 2>/dev/null | head -n 1)
    export CKPT_NCCL_LIBRARY
    echo "--- the search for NCCL did not find $CKPT_NCCL_LIBRARY; once more with it"
    status=0
    run spike "$binary" --world "$world" --gib "$gib"
fi
if [ "$world" = 2 ]; then
    run alone "$binary" --world 1 --gib "$gib"
    run small_buckets "$binary" --world 2 --gib "$gib" --bucket-mib 64 --slots 8
fi
for test in cuda_conforms a_native_worker_takes_138_980_tensors nccl_conforms; do
    # Forming a group takes NCCL a second or so, and the suite forms dozens.
    LIMIT=140 run "$test" "$folder/gpu" --ignored --exact "$test" --nocapture
done
if [ $status -ne 0 ]; then
    echo "=== once more with NCCL's log"
    NCCL_DEBUG=INFO RUST_LOG=debug run debug "$binary" --world "$world" --gib 1
    tail -n 80 "$out/debug.err"
fi
echo "=== GPU memory in use afterwards"
nvidia-smi --query-gpu=index,memory.used --format=csv
for name in nccl_conforms cuda_conforms a_native_worker_takes_138_980_tensors debug small_buckets alone spike; do
    [ -f "$out/$name.out" ] && { echo "=== $name"; cat "$out/$name.out"; }
done
[ -z "${OUT:-}" ] || tar -czf "$OUT/logs.tgz" -C "$out" .
echo "=== overall: $([ $status = 0 ] && echo PASS || echo FAIL)"
exit $status
