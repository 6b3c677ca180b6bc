"""The worker's side: an inference engine's process takes new weights from the parameter server beside it."""

from __future__ import annotations

import gc
import importlib
import io
import mmap
import os
import pickle
import stat
import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
import zmq

from . import device as devices
from . import tensors
from ._native import Worker

Weights = list[tuple[str, torch.Tensor]]

# How the endpoint of the native protocol begins.
NATIVE_SCHEME = "ckpt+unix://"
# A parameter server that says nothing for so long is gone: its own limits are shorter.
TIMEOUT_SECONDS = 3600.0
_CAPABILITIES = {"cpu": 1, "cuda": 1 | 2, "npu": 1 | 4}


def rebuild_host_buffer(
    path: str, offset_bytes: int, size_bytes: int, *_: int
) -> torch.Tensor:
    """A parameter server's ring in host memory, as a `uint8` tensor. The file must be this user's own and closed to others."""
    if not os.path.isabs(path):
        raise ValueError(f"the ring's path {path!r} is not absolute")
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o077:
            raise PermissionError(f"{path} is not a file of this user with mode 0600")
        if offset_bytes < 0 or size_bytes < 0 or offset_bytes + size_bytes > info.st_size:
            raise ValueError(f"{size_bytes} bytes at {offset_bytes} are outside {path} of {info.st_size} bytes")
        if size_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        mapping = mmap.mmap(descriptor, offset_bytes + size_bytes)
    finally:
        os.close(descriptor)
    # The tensor keeps the mapping; the last view of it unmaps.
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=offset_bytes, count=size_bytes)


class _Reader(pickle.Unpickler):
    """Loads what a parameter server sends and nothing else: a pickle can name any function."""

    _functions = {
        ("ckpt_engine.worker", "rebuild_host_buffer"),
        ("torch.multiprocessing.reductions", "rebuild_cuda_tensor"),
        ("torch_npu.multiprocessing.reductions", "rebuild_npu_tensor"),
        ("torch.storage", "TypedStorage"),
        ("torch.storage", "UntypedStorage"),
        ("torch", "Tensor"),
        ("torch", "Size"),
        ("torch", "device"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._functions:
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module == "builtins":
            found = super().find_class(module, name)
            if isinstance(found, type) and issubclass(found, Exception):
                return found
        raise pickle.UnpicklingError(f"a parameter server has no reason to send {module}.{name}")


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


class _Device:
    """What an update asks of the worker's device."""

    def __init__(self) -> None:
        self.kind = devices.device_type()
        self.module = devices.module(self.kind)

    def synchronize(self) -> None:
        if self.module is not None:
            self.module.synchronize()

    def let_go(self) -> None:
        """Unmaps what has no tensor any more, so that the parameter server can free it."""
        gc.collect()
        if self.module is not None:
            self.module.synchronize()
            collect = getattr(self.module, "ipc_collect", None)
            if collect is not None:
                collect()
            self.module.empty_cache()


def update_weights_from_ipc(
    zmq_ctx: zmq.Context | None,
    zmq_handle: str,
    device_id: int | None,
    *,
    run: Callable[[Weights], None],
    post_hook: Callable[[], None] | None = None,
    uuid: str | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> None:
    """Takes one update from the parameter server at `zmq_handle`, over either protocol.

    Args:
        zmq_ctx: for checkpoint-engine's protocol; `None` makes one for this call.
        zmq_handle: the endpoint that the engine was told.
        device_id: this worker's accelerator; ignored for host memory.
        run: copies a bucket of `(name, tensor)` into the model. The tensors are views of a ring whose bytes change when
            it returns: keep copies, not views.
        post_hook: called when all buckets are in and the ring is gone.
        uuid: this worker's device, for the native protocol; by default it is asked for.
        timeout: seconds after which the parameter server counts as gone.

    Raises:
        RuntimeError: what failed on any rank, in its own words. Weights may be mixed then.
    """
    if zmq_handle.startswith(NATIVE_SCHEME):
        _native(zmq_handle, device_id, run, post_hook, uuid, timeout)
        return
    context = zmq.Context() if zmq_ctx is None else zmq_ctx
    try:
        with context.socket(zmq.REP) as socket:
            socket.setsockopt(zmq.LINGER, 1000)
            socket.setsockopt(zmq.RCVTIMEO, max(1, int(timeout * 1000)))
            socket.connect(zmq_handle)
            _checkpoint_engine(socket, device_id, run, post_hook)
    finally:
        if zmq_ctx is None:
            context.term()


def _receive(socket: zmq.Socket) -> Any:
    try:
        message = socket.recv()
    except zmq.Again:
        raise TimeoutError("the parameter server has said nothing for too long; it is gone") from None
    return _Reader(io.BytesIO(message)).load()


def _open(handle: Any, device_id: int | None) -> torch.Tensor:
    function, arguments = handle
    arguments = list(arguments)
    if device_id is not None:
        # The sender's number of the device; processes may see different ones.
        arguments[6] = device_id
    buffer = function(*arguments)
    if buffer.dtype != torch.uint8:
        raise TypeError(f"the ring has elements of {buffer.dtype}, not uint8")
    return buffer


def _checkpoint_engine(
    socket: zmq.Socket,
    device_id: int | None,
    run: Callable[[Weights], None],
    post_hook: Callable[[], None] | None,
) -> None:
    device = _Device()
    handle = _receive(socket)
    if isinstance(handle, Exception):
        # The update failed before it had a ring.
        raise handle
    try:
        buffer: torch.Tensor | None = _open(handle, device_id)
    except Exception as error:
        # The other ranks hear of it before this one raises.
        socket.send_string(_trace(error))
        socket.recv()
        raise
    socket.send(b"")
    try:
        while True:
            message = _receive(socket)
            if isinstance(message, Exception):
                raise message
            if message is None:
                break
            reply = ""
            try:
                run([(t["name"], tensors.view(buffer, t["offset"], t["dtype"], t["shape"])) for t in message])
                device.synchronize()
            except Exception as error:
                # Not raised here: all workers of an engine leave an update in the same way, by what comes next.
                reply = _trace(error)
            del message
            socket.send_string(reply)
        buffer = None
        device.let_go()
        socket.send(b"")
        message = _receive(socket)
        if isinstance(message, Exception):
            raise message
        if message is not None:
            raise RuntimeError(f"the parameter server sent {type(message)} after the last bucket")
        if post_hook is not None:
            try:
                post_hook()
                device.synchronize()
            except Exception as error:
                socket.send_string(_trace(error))
                socket.recv()
                raise
        socket.send(b"")
    finally:
        buffer = None
        device.let_go()


def _map(kind: str, handle: Any, offset_bytes: int, size_bytes: int, device_id: int | None) -> torch.Tensor:
    """The ring of a native parameter server."""
    if kind == "host":
        return rebuild_host_buffer(os.fspath(handle), offset_bytes, size_bytes)
    # Torch's own handle: a version and `c` for a block that cudaMalloc or aclrtMalloc made, then the library's bytes.
    # Then: size, offset in the block, no reference counter, no event to wait for.
    arguments = (
        torch.Tensor, torch.Size([size_bytes]), (1,), 0, torch.storage.TypedStorage, torch.uint8, device_id or 0,
        b"\x01c" + handle, size_bytes, offset_bytes, False, b"", 0, bytes(64), False,
    )  # fmt: skip
    module = "torch_npu" if kind == "npu" else "torch"
    reductions = importlib.import_module(f"{module}.multiprocessing.reductions")
    return getattr(reductions, f"rebuild_{kind}_tensor")(*arguments)


_workers: dict[tuple[str, int | None], Worker] = {}
_workers_lock = threading.Lock()


def _native(
    endpoint: str,
    device_id: int | None,
    run: Callable[[Weights], None],
    post_hook: Callable[[], None] | None,
    uuid: str | None,
    timeout: float,
) -> None:
    device = _Device()
    uuid = uuid or devices.device_uuid(device.kind, device_id, int(os.environ.get("RANK") or 0))
    key = (uuid, device_id)
    with _workers_lock:
        # Kept between updates: it remembers the list of tensors.
        worker = _workers.get(key)
        if worker is None:
            capabilities = _CAPABILITIES[device.kind]
            worker = Worker(uuid, capabilities, lambda *ring: _map(*ring, device_id), device.let_go, 1)
            _workers[key] = worker

    def bucket(ring: torch.Tensor, described: list[tuple[str, str, list[int], int]]) -> None:
        run([(n, tensors.view(ring, offset, tensors.dtype_of(d), shape)) for n, d, shape, offset in described])
        device.synchronize()

    def finish() -> None:
        if post_hook is not None:
            post_hook()
        device.synchronize()

    worker.update(endpoint, timeout, bucket, finish)


def endpoint_of(endpoints: dict[str, str], kind: str, index: int | None, rank: int) -> tuple[str, str]:
    """This worker's device and its endpoint among those that its engine was told.

    Host devices are named by the parameter servers' ranks, which a worker does not know: the engine's `rank`-th worker
    takes the `rank`-th of them.
    """
    if kind == "cpu":
        hosts = sorted((uuid for uuid in endpoints if uuid.startswith("HOST-")), key=_host_rank)
        if rank < len(hosts):
            return hosts[rank], endpoints[hosts[rank]]
        raise ValueError(f"worker {rank} runs on the CPU and was told of {len(hosts)} parameter servers with host memory")
    uuid = devices.device_uuid(kind, index)
    if uuid not in endpoints:
        raise ValueError(f"there is no parameter server for {uuid}; the engine was told of {', '.join(sorted(endpoints))}")
    return uuid, endpoints[uuid]


def _host_rank(uuid: str) -> int:
    return int(uuid.rpartition("-")[2])


class VllmColocateWorkerExtension:
    """Gives vLLM's workers a method that takes an update.

    vLLM is started with `--worker-extension-cls ckpt_engine.worker.VllmColocateWorkerExtension` and is told through
    `/collective_rpc` (`VLLM_SERVER_DEV_MODE=1`) or `LLM.collective_rpc`.
    """

    def update_weights_from_ipc(self, zmq_handles: dict[str, str]) -> None:
        """Takes one update; `zmq_handles` are endpoints by device UUID."""
        from .vllm import update_worker

        update_worker(self, zmq_handles)
