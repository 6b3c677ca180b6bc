#!/usr/bin/env bash
# Puts what scripts/gpu/compare.sh and check.sh need on a machine without a toolchain into FOLDER: `ckpt`, stripped, and
# the wheels. For check.sh's conformance rows run scripts/gpu/build.sh with the same FOLDER.
#   scripts/gpu/package.sh FOLDER
# PYTHON=3.12 names the Python of that machine; torch and numpy must be there already.
set -eu
folder=${1:?usage: package.sh FOLDER}
mkdir -p "$folder/wheels"
cd "$(dirname "$0")/../.."
cargo build --release -p ckpt-cli
strip -o "$folder/ckpt" target/release/ckpt
# The folder is enough by itself: bash FOLDER/compare.sh FOLDER; bash FOLDER/check.sh FOLDER
cp scripts/gpu/compare.sh scripts/gpu/check.sh scripts/gpu/*.py "$folder/"
if ! ls "$folder"/wheels/checkpoint_engine-*.whl >/dev/null 2>&1; then
    get() {
        pip download -q --only-binary=:all: --python-version "${PYTHON:-3.12}" --platform manylinux2014_x86_64 \
            --no-deps -d "$folder/wheels" "$@"
    }
    get checkpoint-engine==0.4.2 pyzmq loguru pydantic annotated-types typing-inspection typing-extensions
    # pydantic works with one version of its core only.
    get "pydantic-core==$(unzip -p "$folder"/wheels/pydantic-[0-9]*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p')"
fi
ls -l "$folder" "$folder/wheels"
