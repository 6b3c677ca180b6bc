#!/usr/bin/env bash
# Builds what scripts/gpu/spike.sh runs, stripped, into FOLDER: for a machine with GPUs and no toolchain.
#   scripts/gpu/build.sh FOLDER
set -eu
folder=${1:?usage: build.sh FOLDER}
mkdir -p "$folder"
cd "$(dirname "$0")/../.."
cargo build --release -p ckpt-transport-nccl --example two_gpu_broadcast
test_binary=$(cargo test --release -p ckpt-transport-nccl --test gpu --no-run 2>&1 | sed -n 's/.*Executable.*(\(.*\))/\1/p')
strip -o "$folder/two_gpu_broadcast" target/release/examples/two_gpu_broadcast
strip -o "$folder/gpu" "$test_binary"
ls -l "$folder"
