"""The package `checkpoint_engine` of ours: beside the real one, in a job, and under verl's own backend for it."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from ranks import HERE, LONG, run_ranks

COMPAT = str(HERE.parent / "compat")
# Where `pip install --no-deps --target` put checkpoint-engine, verl and sglang (.ci/run does); see docs/testing.md.
PEERS = os.environ.get("CKPT_TEST_PEERS", "")


def probe(first: str) -> dict:
    path = os.pathsep.join([first, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(HERE / "compat_probe.py")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.peer
def test_names_signatures_and_pure_functions_are_the_real_packages() -> None:
    assert PEERS, "set CKPT_TEST_PEERS to the folder that has the real packages"
    theirs, ours = probe(PEERS), probe(COMPAT)
    assert "+ckpt." in ours["version"] and ours["version"].startswith(theirs["version"])
    assert theirs["all"] == ours["all"]
    for path, parameters in theirs.pop("signatures").items():
        own = ours["signatures"][path]
        # `**options` of ours takes what is not named.
        missing = {name for name, what in parameters.items() if own.get(name, what) != what}
        assert not missing, (path, missing, own)
    for what in ("fields", "hca", "many", "my", "plans", "assigned_nothing", "told", "json", "bad", "backend"):
        assert theirs[what] == ours[what], what
    raised = [plan for plan in theirs["plans"].values() if isinstance(plan, str)]
    assert len(raised) < 10, "most plans must be plans"


def test_a_job_with_the_underscore_names() -> None:
    results = run_ranks("compat", 2, path=COMPAT)
    for rank, result in enumerate(results):
        assert all(result.values()), (rank, result)


@pytest.mark.peer
def test_verls_own_backend_for_checkpoint_engine_runs_on_it() -> None:
    assert PEERS, "set CKPT_TEST_PEERS to the folder that has the real packages"
    source = Path(PEERS) / "verl" / "checkpoint_engine" / "kimi_checkpoint_engine.py"
    results = run_ranks("kimi", 4, str(source), path=os.pathsep.join([COMPAT, str(HERE / "stand_in")]))
    assert [result["same"] for result in results] == [None, None, True, True]


def test_the_version_says_whose_names_and_whose_engine() -> None:
    spec = importlib.util.spec_from_file_location("v", Path(COMPAT) / "checkpoint_engine" / "_version.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__version__.startswith("0.4.2+ckpt.")


def test_the_http_api_is_served_on_a_unix_socket() -> None:
    with tempfile.TemporaryDirectory(prefix="ckpt-") as folder:
        path = os.path.join(folder, "ps.sock")
        alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        env = alone | {"CKPT_RUNTIME_DIR": folder, "PYTHONPATH": os.pathsep.join([COMPAT, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "checkpoint_engine", "--uds", path, "--device", "host"]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert "listens on" in process.stdout.readline()
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.sendall(b"GET /v1/healthz HTTP/1.1\r\nhost: ps\r\nconnection: close\r\n\r\n")
                assert client.recv(64).startswith(b"HTTP/1.1 200")
            process.terminate()
            assert process.wait(LONG) == 0
        finally:
            process.kill()
            process.wait()
