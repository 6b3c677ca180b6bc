"""The package `checkpoint_engine` of ours: beside the real one, in a job, and under verl's own backend for it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import HERE, run_ranks

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
