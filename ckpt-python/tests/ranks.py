"""Runs a function of `scenarios.py` as the ranks of a job, each in a process of its own, and returns what they print."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# Only decides how long a broken test takes.
LONG = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    scenario: str, world_size: int, *arguments: str, python: str = sys.executable, path: str = ""
) -> list[dict]:
    """Each rank's result, by rank; an AssertionError with all output if one fails."""
    with tempfile.TemporaryDirectory(prefix="ckpt-") as runtime:
        return _run(scenario, world_size, runtime, arguments, python, path)


def _run(
    scenario: str, world_size: int, runtime: str, arguments: tuple[str, ...], python: str, path: str
) -> list[dict]:
    port = free_port()
    processes = []
    for rank in range(world_size):
        env = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "CKPT_HUB_ADDRESS": f"127.0.0.1:{port}",
            "CKPT_RUNTIME_DIR": runtime,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), path, os.environ.get("PYTHONPATH", "")])),
        }
        command = [python, "-m", "scenarios", scenario, *arguments]
        processes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
        )
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=LONG))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    failed = [rank for rank, process in enumerate(processes) if process.returncode != 0]
    if failed:
        told = "\n".join(f"--- rank {rank}\n{out}\n{err}" for rank, (out, err) in enumerate(outputs))
        raise AssertionError(f"ranks {failed} of {scenario} failed\n{told}")
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]
