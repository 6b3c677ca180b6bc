"""One rank, its device's memory, and a torch worker in another process: with our worker, and with checkpoint-engine's own.

Runs on request on a machine with a CUDA device (docs/testing.md). Nothing but torch, pyzmq and loguru is needed there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest
import torch
from ckpt_engine import ParameterServer
from ranks import HERE
from scenarios import model

pytestmark = pytest.mark.gpu
PEERS = os.environ.get("CKPT_TEST_PEERS", "")


def weights() -> dict[str, torch.Tensor]:
    large = {f"large.{i}": torch.randn(4096, 2048, generator=torch.Generator().manual_seed(i)) for i in range(8)}
    return large | {n: t for n, t in model(3).items() if t.dtype != torch.complex64}


@pytest.mark.parametrize(
    ("package", "protocol"), [("ckpt_engine", "ce-0.4"), ("ckpt_engine", "native"), ("checkpoint_engine", "ce-0.4")]
)
def test_a_torch_worker_takes_an_update_over_cuda_ipc(package: str, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.is_available(), "this test needs a CUDA device"
    with tempfile.TemporaryDirectory(prefix="ckpt-") as runtime:
        monkeypatch.setenv("CKPT_RUNTIME_DIR", runtime)
        results = []

        def tell(pairs: list[tuple[str, str]]) -> None:
            path = [str(HERE), PEERS if package == "checkpoint_engine" else "", os.environ.get("PYTHONPATH", "")]
            env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
            command = [sys.executable, "-m", "scenarios", "gpu_worker", package, json.dumps(dict(pairs))]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
            results.append(json.loads(done.stdout.splitlines()[-1]))

        with ParameterServer(rank=0, world_size=1, device="cuda", worker_protocol=protocol) as server:
            assert server.device_kind == "cuda"
            before = torch.cuda.mem_get_info()[0]
            for _ in range(2):
                # Tensors of a trainer are on the device.
                server.register_checkpoint("step", named_tensors={n: t.cuda() for n, t in weights().items()})
                server.gather_metas("step")
                server.update("step", tell, timeout=180)
                server.unregister_checkpoint("step")
            torch.cuda.empty_cache()
            kept = before - torch.cuda.mem_get_info()[0]
        assert results == [{"same": True, "hooks": 1, "device": "cuda"}] * 2
        assert kept < 256 << 20, f"{kept >> 20} MiB of device memory did not come back"
