#!/usr/bin/env bash
# The Python package on a machine with a GPU, torch and no network: our torch worker and checkpoint-engine's own over CUDA IPC.
#   scripts/gpu/python.sh package FOLDER    here: the wheel, what it needs besides torch, and the tests
#   bash FOLDER/python.sh run FOLDER        there
# PYTHON=3.12 names the Python of that machine.
set -eu
what=${1:?usage: python.sh package|run FOLDER} folder=${2:?usage: python.sh package|run FOLDER}
case $what in
package)
    mkdir -p "$folder/wheels" "$folder/tests"
    cd "$(dirname "$0")/../.."
    cp scripts/gpu/python.sh "$folder/"
    cp ckpt-python/tests/{ranks,scenarios,test_gpu}.py "$folder/tests/"
    printf '[pytest]\nmarkers = gpu\n' >"$folder/tests/pytest.ini"
    get() {
        pip download -q --only-binary=:all: --python-version "${PYTHON:-3.12}" --platform manylinux_2_28_x86_64 \
            --platform manylinux2014_x86_64 -d "$folder/wheels" "$@"
    }
    get pytest pyzmq loguru fastapi httpx pydantic
    get --no-deps checkpoint-engine==0.4.2
    maturin build --release --strip --manifest-path ckpt-python/Cargo.toml --out "$folder/wheels"
    du -sh "$folder"
    ;;
run)
    folder=$(realpath "$folder")
    here=$(mktemp -d)
    # Beside torch, safetensors and numpy of that machine, and not in their place.
    python3 -m pip install -q --no-index --no-deps --target "$here" "$folder"/wheels/*.whl
    PYTHONPATH="$here" CKPT_TEST_PEERS="$here" python3 -m pytest -v -m gpu "$folder/tests"
    ;;
*)
    echo "python.sh: $what is neither package nor run" >&2
    exit 2
    ;;
esac
