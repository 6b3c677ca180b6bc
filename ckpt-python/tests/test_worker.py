"""What a worker accepts, and what it does not."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import ckpt_engine
import pytest
import torch
import zmq
from ckpt_engine import tensors, worker


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ckpt-") as path:
        yield Path(path)


def load(message: bytes) -> object:
    return worker._Reader(io.BytesIO(message)).load()


class Command:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


class Chain:
    def __reduce__(self) -> tuple:
        return getattr, ("text", "upper")


@pytest.mark.parametrize("bad", [Command(), Chain(), [print], torch.load, Path("/")])
def test_pickles_name_nothing_but_what_a_parameter_server_sends(bad: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="has no reason to send"):
        load(pickle.dumps(bad))


def test_what_parameter_servers_send_is_loaded() -> None:
    bucket = [{"name": "w", "dtype": torch.float8_e4m3fn, "shape": torch.Size([2, 3]), "offset": 256}]
    assert load(pickle.dumps(bucket)) == bucket
    error = load(pickle.dumps(RuntimeError("rank 3 failed")))
    assert isinstance(error, RuntimeError) and str(error) == "rank 3 failed"
    handle = (worker.rebuild_host_buffer, ("/run/ring", 0, 256, 0, 0, 0, 0))
    assert load(pickle.dumps(handle)) == handle


def test_a_ring_is_a_file_of_this_user_only(folder: Path) -> None:
    ring = folder / "ring"
    ring.write_bytes(bytes(range(100)))
    ring.chmod(0o600)
    buffer = worker.rebuild_host_buffer(str(ring), 10, 90, 0, 0, 0, 0)
    assert buffer.dtype == torch.uint8 and buffer.tolist() == list(range(10, 100))
    for offset, size in [(0, 101), (101, 0), (-1, 5)]:
        with pytest.raises(ValueError, match="outside"):
            worker.rebuild_host_buffer(str(ring), offset, size)
    with pytest.raises(ValueError, match="not absolute"):
        worker.rebuild_host_buffer("ring", 0, 1)
    (folder / "link").symlink_to(ring)
    with pytest.raises(OSError):
        worker.rebuild_host_buffer(str(folder / "link"), 0, 1)
    ring.chmod(0o640)
    with pytest.raises(PermissionError, match="0600"):
        worker.rebuild_host_buffer(str(ring), 0, 1)


def serve(messages: list[object], folder: Path, **options: object) -> tuple[list[bytes], BaseException | None]:
    """Plays a parameter server; the worker's replies, and what it raised."""
    context = zmq.Context()
    endpoint = f"ipc://{folder}/worker.sock"
    raised: list[BaseException] = []

    def work() -> None:
        try:
            ckpt_engine.update_weights_from_ipc(None, endpoint, None, timeout=30, **options)
        except BaseException as error:
            raised.append(error)

    with context.socket(zmq.REQ) as socket:
        socket.bind(endpoint)
        socket.setsockopt(zmq.RCVTIMEO, 30_000)
        socket.setsockopt(zmq.LINGER, 30_000)
        thread = threading.Thread(target=work)
        thread.start()
        replies = []
        for number, message in enumerate(messages):
            socket.send(pickle.dumps(message))
            if number + 1 < len(messages) or message is None:
                replies.append(socket.recv())
        thread.join(60)
        assert not thread.is_alive()
    context.term()
    return replies, raised[0] if raised else None


def test_a_worker_leaves_as_it_is_told(folder: Path) -> None:
    ring = folder / "ring"
    ring.write_bytes(torch.arange(4, dtype=torch.float32).numpy().tobytes())
    ring.chmod(0o600)
    handle = (worker.rebuild_host_buffer, (str(ring), 0, 16, 0, 0, 0, 0))
    bucket = [{"name": "w", "dtype": torch.float32, "shape": (2, 2), "offset": 0}]
    held: dict[str, torch.Tensor] = {}
    hooks: list[int] = []

    def run(weights: list[tuple[str, torch.Tensor]]) -> None:
        held.update((name, tensor.clone()) for name, tensor in weights)

    replies, raised = serve([handle, bucket, None, None], folder, run=run, post_hook=lambda: hooks.append(1))
    assert raised is None and replies == [b""] * 4 and hooks == [1]
    assert held["w"].tolist() == [[0, 1], [2, 3]]

    def fail(_: object) -> None:
        raise KeyError("lm_head")

    replies, raised = serve([handle, bucket, RuntimeError("rank 0: lm_head")], folder, run=fail)
    assert b"KeyError" in replies[1] and str(raised) == "rank 0: lm_head"
    # Before there was a ring.
    _, raised = serve([RuntimeError("no plan")], folder, run=fail)
    assert str(raised) == "no plan"


def test_workers_find_their_endpoint() -> None:
    hosts = {f"HOST-a-{rank}": f"ipc:///{rank}" for rank in (8, 9, 10, 11)}
    assert worker.endpoint_of(hosts, "cpu", None, 2) == ("HOST-a-10", "ipc:///10")
    with pytest.raises(ValueError, match="told of 4"):
        worker.endpoint_of(hosts, "cpu", None, 4)


def test_tensors_are_described_without_a_copy_where_that_is_possible() -> None:
    whole = torch.randn(4, 6)
    [(name, dtype, shape, address, size, _)] = tensors.describe({"w": whole})
    assert (name, dtype, shape, size) == ("w", "float32", [4, 6], 96) and address == whole.data_ptr()
    [(*_, turned, _, owner)] = tensors.describe({"w": whole.t()})
    assert turned != whole.data_ptr() and owner.is_contiguous()
    odd = tensors.view(torch.arange(9, dtype=torch.uint8), 1, torch.int64, [1])
    assert odd.item() == int.from_bytes(bytes(range(1, 9)), "little")


@pytest.mark.parametrize(("arguments", "code", "told"), [(["--version"], 0, "ckpt "), (["nonsense"], 2, "nonsense")])
def test_the_command_line_is_in_the_wheel(arguments: list[str], code: int, told: str) -> None:
    command = [sys.executable, "-m", "ckpt_engine", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code and told in done.stdout + done.stderr


def test_an_error_has_its_parts() -> None:
    with pytest.raises(ckpt_engine.Error) as caught:
        ckpt_engine.ParameterServer(rank=3, world_size=2, master_addr="127.0.0.1", master_port=1, device="host")
    error = caught.value
    assert isinstance(error, RuntimeError) and error.kind == "config_invalid" and error.operation in str(error)
    assert "RANK=3" in error.message and error.context == {}
