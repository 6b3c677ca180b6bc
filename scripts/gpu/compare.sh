#!/usr/bin/env bash
# checkpoint-engine and ckpt on the GPUs of this machine, in one run; one table at the end.
#   scripts/gpu/compare.sh FOLDER [SHAPE]
# FOLDER holds `ckpt` and `wheels/`, as scripts/gpu/package.sh makes it; SHAPE is qwen3-8b (default) or qwen:MIB for ours.
# No run starts after BUDGET seconds (540).
# Logs, JSON results and traces go to $OUT, or to a folder of its own. ONLY="ours_native_1 peer_1" runs just these.
set -u
folder=$(readlink -f "${1:?usage: compare.sh FOLDER [SHAPE]}")
shape=${2:-qwen3-8b}
here=$(dirname "$(readlink -f "$0")")
ckpt=$folder/ckpt
chmod +x "$ckpt"
out=$(readlink -f "${OUT:-$(mktemp -d)}")
mkdir -p "$out"
iterations=${ITERATIONS:-4}
# Multicast over NVLink is not wanted here; whoever set it keeps it so.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
export RUST_BACKTRACE=1
export RUST_LOG=${RUST_LOG:-info}

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
[ "$gpus" -ge 1 ] || { echo "no GPU: nvidia-smi lists none"; exit 1; }
if [ -z "${CKPT_NCCL_LIBRARY:-}" ]; then
    CKPT_NCCL_LIBRARY=$(find / -xdev -name 'libnccl.so.2' 2>/dev/null | head -n 1)
    [ -n "$CKPT_NCCL_LIBRARY" ] && export CKPT_NCCL_LIBRARY
fi
site=$(mktemp -d)
python3 -m pip install -q --no-index --no-deps --target "$site" "$folder"/wheels/*.whl || exit 1
export PYTHONPATH=$site
{
    uname -a
    nvidia-smi --query-gpu=index,name,memory.total,memory.free,driver_version --format=csv
    nvidia-smi topo -m
    nproc
    grep -E 'MemTotal|MemAvailable' /proc/meminfo
    df -h /dev/shm "${TMPDIR:-/tmp}"
    ulimit -l
    python3 -c 'import torch, importlib.metadata as m; print("torch", torch.__version__, "checkpoint-engine", m.version("checkpoint-engine"), "nccl", torch.cuda.nccl.version())'
    "$ckpt" --version
} >"$out/machine.log" 2>&1
cat "$out/machine.log"
"$ckpt" doctor || true

status=0
run() { # name, then the command
    local name=$1
    shift
    local left=$(( ${BUDGET:-540} - SECONDS ))
    if [ $left -lt 20 ]; then echo "=== $name: left out, BUDGET is over"; return; fi
    if [ -n "${ONLY:-}" ] && [[ " $ONLY " != *" $name "* ]]; then return; fi
    echo "=== $name: $* ($(date +%T))"
    local limit=${LIMIT:-150}
    timeout --kill-after=10 $((left < limit ? left : limit)) "$@" >"$out/$name.out" 2>"$out/$name.err"
    local code=$?
    if [ $code -ne 0 ]; then
        status=1
        echo "--- $name ended with $code; the end of its log:"
        tail -n 40 "$out/$name.err"
        tail -n 5 "$out/$name.out"
    fi
    grep -aE 'panicked|NCCL WARN|ERROR|WARN' "$out/$name.err" | tail -n 5
    nvidia-smi --query-gpu=memory.used --format=csv,noheader | tr '\n' ' '
    echo
}
ours() { # name, ranks, shape, worker, more
    local name=$1 ranks=$2 of=$3 kind=$4
    shift 4
    run "$name" "$ckpt" bench update --json --device cuda --ranks "$ranks" --shape "$of" --worker "$kind" \
        --iterations "$iterations" --trace "$out/$name.trace.json" "$@"
}
ce=(--ce-worker "python3 $here/ce_engine.py")

most=$((gpus >= 2 ? 2 : 1))
run demo "$ckpt" demo --json --device cuda --ranks "$most" --size-mib 1024
for ranks in $(seq 1 "$most"); do
    ours "ours_native_$ranks" "$ranks" "$shape" native
    ours "ours_ce_$ranks" "$ranks" "$shape" ce "${ce[@]}"
    [ "$shape" = qwen3-8b ] && run "peer_$ranks" python3 "$here/peer_update.py" "$ranks" --iterations "$iterations"
    ours "ours_none_$ranks" "$ranks" "$shape" none
done
if [ "$most" = 2 ]; then
    # `auto` copies over CUDA IPC between the GPUs of one host; the same with NCCL's kernels.
    ours ours_native_kept_2 2 "$shape" native --keep-ring
    for kind in native ce none; do
        more=(--transport nccl)
        [ $kind = ce ] && more+=("${ce[@]}")
        ours "nccl_${kind}_2" 2 "$shape" $kind "${more[@]}"
    done
    for transport in cuda-ipc nccl; do
        for op in broadcast allgather; do
            run "${transport}_$op" "$ckpt" bench transport --json --device cuda --transport $transport --op $op \
                --sizes 64KiB,1MiB,16MiB,128MiB,256MiB --ranks 2 --check --timeout 60
        done
    done
fi
ours kimi_native 1 kimi-small native
ours kimi_native_kept 1 kimi-small native --keep-ring
ours tiny_native 1 tiny:20000 native
ours tiny_ce 1 tiny:20000 ce "${ce[@]}"
run tiny_peer python3 "$here/peer_update.py" 1 --shape tiny:20000 --iterations "$iterations"
ours kimi_ce 1 kimi-small ce "${ce[@]}"

python3 "$here/table.py" "$out"
exit $status
