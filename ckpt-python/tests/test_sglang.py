"""SGLang: its own update script over the package `checkpoint_engine` of ours, against a server that answers as SGLang does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from ckpt_engine import update_weights_from_ipc
from ranks import HERE, LONG, free_port
from safetensors.torch import save_file
from scenarios import model, same

COMPAT = str(HERE.parent / "compat")
PEERS = os.environ.get("CKPT_TEST_PEERS", "")
RANKS = 2


class StandIn(BaseHTTPRequestHandler):
    """SGLang's routes, with a worker for each endpoint that it is told."""

    requests: list[tuple[str, object]]
    held: list[dict[str, torch.Tensor]]
    denies: bool

    def answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.requests.append((self.path, None))
        self.answer(200 if self.path == "/ping" else 404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.requests.append((self.path, body))
        if self.path != "/update_weights_from_ipc":
            self.answer(404, {})
        elif self.denies:
            self.answer(400, {"success": False, "message": "the model is still being loaded"})
        else:
            workers = [threading.Thread(target=self.take, args=one) for one in enumerate(body["zmq_handles"].values())]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(LONG)
            self.answer(200, {"success": True, "message": "updated"})

    def take(self, number: int, endpoint: str) -> None:
        held = self.held[number]
        update_weights_from_ipc(
            None, endpoint, 0, run=lambda weights: held.update((name, tensor.clone()) for name, tensor in weights), timeout=60
        )

    def log_message(self, *_: object) -> None: ...


@contextmanager
def server(denies: bool) -> Iterator[type[StandIn]]:
    handler = type("Handler", (StandIn,), {"requests": [], "held": [{} for _ in range(RANKS)], "denies": denies})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.url = f"http://127.0.0.1:{listening.server_port}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield handler
    finally:
        listening.shutdown()
        listening.server_close()


def script(url: str, checkpoint: Path, method: str) -> list[subprocess.CompletedProcess]:
    assert PEERS, "set CKPT_TEST_PEERS to the folder that has the real packages"
    path = Path(PEERS) / "sglang" / "srt" / "checkpoint_engine" / "update.py"
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ckpt-") as runtime:
        processes = []
        for rank in range(RANKS):
            env = os.environ | {
                "RANK": str(rank),
                "WORLD_SIZE": str(RANKS),
                "LOCAL_WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port - 1),
                "CKPT_RUNTIME_DIR": runtime,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([COMPAT, os.environ.get("PYTHONPATH", "")]),
            }
            command = [sys.executable, str(path), "--checkpoint-path", str(checkpoint), "--endpoint", url]
            command += ["--inference-parallel-size", str(RANKS), "--update-method", method, "--weight-version", "7"]
            processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
        try:
            return [
                subprocess.CompletedProcess(p.args, p.returncode, None, p.communicate(timeout=LONG)[1])
                if p.returncode is not None
                else subprocess.CompletedProcess(p.args, p.wait(LONG), None, p.stderr.read())
                for p in processes
            ]
        finally:
            for one in processes:
                if one.poll() is None:
                    one.kill()
                    one.wait()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    weights = {n: t.detach().resolve_conj().contiguous() for n, t in model(9).items() if t.dtype != torch.complex64}
    names = sorted(weights)
    for part in range(RANKS):
        save_file({name: weights[name] for name in names[part::RANKS]}, tmp_path / f"model-{part}.safetensors")
    return tmp_path


@pytest.mark.peer
def test_sglangs_script_updates_by_broadcast_and_p2p(checkpoint: Path) -> None:
    with server(denies=False) as seen:
        ended = script(seen.url, checkpoint, "all")
    assert [one.returncode for one in ended] == [0, 0], "\n".join(one.stderr for one in ended)
    posts = [body for path, body in seen.requests if path == "/update_weights_from_ipc"]
    assert ("/ping", None) in seen.requests and len(posts) == 2
    for body in posts:
        assert set(body) == {"zmq_handles", "flush_cache", "weight_version"}
        assert len(body["zmq_handles"]) == RANKS and body["flush_cache"] is True and body["weight_version"] == "7"
    weights = {n: t for n, t in model(9).items() if t.dtype != torch.complex64}
    assert all(same(held, weights) for held in seen.held)


@pytest.mark.peer
def test_a_400_of_sglang_ends_the_script_on_every_rank(checkpoint: Path) -> None:
    with server(denies=True) as seen:
        ended = script(seen.url, checkpoint, "broadcast")
    assert all(one.returncode != 0 for one in ended)
    assert "400" in ended[0].stderr
    assert "400" in ended[1].stderr, "the other rank does not say what failed"
