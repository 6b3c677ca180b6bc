"""A real vLLM on a CPU, updated while it runs. Runs on request (docs/testing.md): it needs vLLM and some minutes.

Both ways are tried on one server that begins with dummy weights: the worker extension through `/collective_rpc`, and the
backend of vLLM's own weight-transfer API. What it answers afterwards must be what a vLLM started from the files answers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Unanswered
from contextlib import contextmanager
from pathlib import Path

import pytest
from ckpt_engine import ParameterServer
from ranks import HERE, free_port

pytestmark = pytest.mark.live

PYTHON = os.environ.get("CKPT_VLLM_PYTHON", sys.executable)
CKPT = os.environ.get("CKPT_BINARY", str(HERE.parents[1] / "target" / "debug" / "ckpt"))
START = 900.0
PROMPTS = ["the weights", "0123456789", "a"]


def call(url: str, body: dict | None = None, timeout: float = 300.0) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.code} {error.read().decode(errors='replace')}") from None
    return json.loads(text) if text else {}


@contextmanager
def vllm(model: Path, *options: str) -> Iterator[str]:
    """A server; its URL once it is ready."""
    port = free_port()
    log = model.parent / f"vllm-{port}.log"
    env = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "CKPT_RUNTIME_DIR": os.environ["CKPT_RUNTIME_DIR"],
    }
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", "256", "--enforce-eager", "--served-model-name", "t", *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START
    try:
        while True:
            try:
                call(f"{url}/health", timeout=5)
                break
            except (OSError, AssertionError):
                if process.poll() is not None or time.monotonic() > end:
                    raise AssertionError(f"vLLM did not start\n{log.read_text()[-8000:]}") from None
                time.sleep(1)
        yield url
    except AssertionError as error:
        raise AssertionError(f"{error}\n--- vLLM\n{log.read_text()[-8000:]}") from None
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> list[dict]:
    """Texts and log-probabilities, exactly as the server gives them."""
    body = {"model": "t", "prompt": PROMPTS, "max_tokens": 8, "temperature": 0, "logprobs": 5, "seed": 0}
    choices = call(f"{url}/v1/completions", body)["choices"]
    return [
        {"text": c["text"], "logprobs": [c["logprobs"]["token_logprobs"], c["logprobs"]["top_logprobs"]]}
        for c in choices
    ]


def by_worker_extension(url: str, model: Path, protocol: str) -> None:
    def tell(pairs: list[tuple[str, str]]) -> None:
        body = {"method": "update_weights_from_ipc", "args": [dict(pairs)], "timeout": 300}
        call(f"{url}/collective_rpc", body)

    with ParameterServer(rank=0, world_size=1, device="host", worker_protocol=protocol) as server:
        server.register_checkpoint("step", files=sorted(model.glob("*.safetensors")))
        server.gather_metas("step")
        server.update("step", tell)


def by_program(engine: str, url: str, model: Path, protocol: str) -> subprocess.CompletedProcess[str]:
    command = [CKPT, "update", "--checkpoint-path", str(model), "--engine", engine, "--endpoint", url]
    command += ["--device", "host", "--inference-parallel-size", "1", "--worker-protocol", protocol]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def by_weight_transfer(url: str, model: Path, protocol: str) -> None:
    done = by_program("vllm-native", url, model, protocol)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # A UNIX socket's path is short.
    with tempfile.TemporaryDirectory(prefix="ckpt-") as folder:
        monkeypatch.setenv("CKPT_RUNTIME_DIR", folder)
        yield


@pytest.mark.usefixtures("runtime")
def test_a_running_vllm_takes_new_weights_both_ways(tmp_path: Path) -> None:
    models = [tmp_path / "first", tmp_path / "second"]
    for seed, model in enumerate(models):
        subprocess.run([PYTHON, str(HERE / "tiny_qwen3.py"), str(model), str(seed)], check=True)
    expected = []
    for model in models:
        with vllm(model) as url:
            expected.append(answers(url))
    assert expected[0] != expected[1]
    options = ["--load-format", "dummy"]
    options += ["--worker-extension-cls", "ckpt_engine.worker.VllmColocateWorkerExtension"]
    options += ["--weight-transfer-config", '{"backend": "ckpt_engine"}']
    ways = [
        (by_worker_extension, 0, "ce-0.4"),
        (by_weight_transfer, 1, "ce-0.4"),
        (by_worker_extension, 0, "native"),
        (by_weight_transfer, 1, "native"),
    ]
    with vllm(models[0], *options) as url:
        assert answers(url) not in expected, "the server has its weights before any update"
        for update, number, protocol in ways:
            update(url, models[number], protocol)
            call(f"{url}/reset_prefix_cache", {})
            assert answers(url) == expected[number], (update.__name__, protocol)
    print_versions()


@pytest.mark.usefixtures("runtime")
def test_a_vllm_whose_update_failed_answers_nobody_until_one_succeeds(tmp_path: Path) -> None:
    model, broken = tmp_path / "model", tmp_path / "broken"
    for folder in (model, broken):
        subprocess.run([PYTHON, str(HERE / "tiny_qwen3.py"), str(folder), "0"], check=True)
    # A tensor that the model has not, in the middle of good ones.
    rename = "import sys; from safetensors.torch import load_file as l, save_file as s; t = l(sys.argv[1]); "
    rename += "t['model.layers.9.mlp.up_proj.weight'] = t.pop('model.layers.2.mlp.up_proj.weight'); s(t, sys.argv[1])"
    subprocess.run([PYTHON, "-c", rename, str(broken / "model.safetensors")], check=True)
    with vllm(model) as url:
        expected = answers(url)
    options = ["--load-format", "dummy"]
    options += ["--worker-extension-cls", "ckpt_engine.worker.VllmColocateWorkerExtension"]
    with vllm(model, *options) as url:
        before = answers(url)
        assert before != expected
        failed = by_program("vllm", url, broken, "ce-0.4")
        assert failed.returncode not in (0, 70), failed.stderr
        assert "layers.9" in failed.stderr, failed.stderr
        # What comes now is kept back: it would be computed from old and new weights.
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(answers, url)
            with pytest.raises(Unanswered):
                waiting.result(3)
            done = by_program("vllm", url, model, "ce-0.4")
            assert done.returncode == 0, done.stderr
            assert waiting.result(60) == expected, "the request that had waited"
        assert answers(url) == expected
    print_versions()


def print_versions() -> None:
    versions = "import torch, vllm; print('vllm', vllm.__version__, 'torch', torch.__version__)"
    print(subprocess.run([PYTHON, "-c", versions], capture_output=True, text=True, check=True).stdout)
