#!/usr/bin/env bash
# What must hold on real GPUs: right bytes on every path, ends in time after every death, memory given back. One table of
# PASS and FAIL comes last.
#   scripts/gpu/check.sh FOLDER [NAME...]
# FOLDER holds `ckpt` and, for the conformance rows, `gpu`, as scripts/gpu/package.sh and scripts/gpu/build.sh make them;
# with its `wheels/` and torch, checkpoint-engine's own worker is checked too. NAMEs choose rows. No row starts after
# BUDGET seconds (440); UPDATES says how many the row about growth makes (200). DEVICE=host tries the script itself on a machine without a GPU.
set -u
folder=$(readlink -f "${1:?usage: check.sh FOLDER [NAME...]}")
shift
here=$(dirname "$(readlink -f "$0")")
chmod +x "$folder/ckpt" "$folder/gpu" 2>/dev/null
export RUST_BACKTRACE=1 NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
if [ "${DEVICE:-cuda}" = cuda ] && [ -z "${CKPT_NCCL_LIBRARY:-}" ]; then
    CKPT_NCCL_LIBRARY=$(find / -xdev -name 'libnccl.so.2' 2>/dev/null | head -n 1)
    [ -n "$CKPT_NCCL_LIBRARY" ] && export CKPT_NCCL_LIBRARY
fi
if ls "$folder"/wheels/checkpoint_engine-*.whl >/dev/null 2>&1; then
    site=$(mktemp -d)
    python3 -m pip install -q --no-index --no-deps --target "$site" "$folder"/wheels/*.whl && export PYTHONPATH=$site
fi
exec python3 "$here/check.py" "$folder" "$@"
