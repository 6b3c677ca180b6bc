"""The parameter server: one per inference worker, holds a share of checkpoints and moves it on request."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch

from . import device as devices
from . import tensors
from ._native import Error, Server

RequestFunction = Callable[[list[tuple[str, str]]], None]

_open: weakref.WeakSet[ParameterServer] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    """Ranks leave in order, so that the others are not told that this one died."""
    for server in list(_open):
        try:
            server.close()
        except Error:
            pass  # the job ended before


def _seconds(limit: timedelta | float) -> float:
    return limit.total_seconds() if isinstance(limit, timedelta) else float(limit)


class ParameterServer:
    """One rank of a job.

    The constructor joins the job: rank 0 hosts it, the others wait for it. `gather_metas`, `init_process_group`,
    `store_based_barrier` and `update` are collective: every rank calls them (for an update with `ranks`, those ranks).
    Every wait ends; a failure anywhere is an `Error` with the first cause on every rank. Calls block without the
    interpreter's lock; each has an `..._async` twin.

    Args:
        rank, world_size: this process's place; else what torchrun, Open MPI or Slurm say.
        auto_pg: join the process group on the first `gather_metas`; else call `init_process_group`.
        gpu_count: accelerators of this host that the job uses; the device is `rank % gpu_count`.
        mem_fraction: the part of the free device memory that an update may use.
        master_addr, master_port: where rank 0 listens. A port from here is used as it is, one from the variable
            MASTER_PORT is raised by one, since torchrun listens on it.
        local_rank: which of the visible accelerators, if it is not the one above.
        device: `auto`, `cuda`, `ascend` or `host`.
        transport, p2p_transport: how bytes reach other ranks, and how other ranks' memory is read; `ckpt doctor` lists
            them.
        worker_protocol: what the workers speak: `ce-0.4` (checkpoint-engine's and ours), `ce-0.3` or `native`.
        token: the job's secret; needed on several hosts, else CKPT_TOKEN.
        sender_token: the secret of the job whose metas are loaded, if it is not this job's.
        bind: this host's address for other hosts.
        bucket_mib: aim at buckets of this size.
        join_timeout, bucket_timeout: seconds for all ranks to come, and for one bucket.
    """

    def __init__(
        self,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        auto_pg: bool = True,
        gpu_count: int | None = None,
        mem_fraction: float | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
        local_rank: int | None = None,
        device: str = "auto",
        transport: str = "auto",
        p2p_transport: str = "auto",
        worker_protocol: str = "ce-0.4",
        token: bytes | str | None = None,
        sender_token: bytes | str | None = None,
        bind: str | None = None,
        bucket_mib: int | None = None,
        join_timeout: timedelta | float = 60.0,
        bucket_timeout: timedelta | float = 30.0,
    ) -> None:
        if mem_fraction is not None and not 0 < mem_fraction <= 1:
            raise ValueError(f"mem_fraction is {mem_fraction}; it must be above 0 and at most 1")
        if gpu_count is not None and gpu_count < 1:
            raise ValueError(f"gpu_count is {gpu_count}; it must be at least 1")
        variables: dict[str, str] = {}
        if rank is not None:
            variables["RANK"] = str(rank)
        if world_size is not None:
            variables["WORLD_SIZE"] = str(world_size)
        if mem_fraction is not None:
            variables["PS_MEM_FRACTION"] = str(mem_fraction)
        if master_addr is not None:
            variables["MASTER_ADDR"] = master_addr
        if master_port is not None:
            host = master_addr or os.environ.get("MASTER_ADDR") or "127.0.0.1"
            variables["CKPT_HUB_ADDRESS"] = f"[{host}]:{master_port}" if ":" in host else f"{host}:{master_port}"
        if rank is not None:
            variables["LOCAL_RANK"] = ""
        if world_size is not None and int(os.environ.get("LOCAL_WORLD_SIZE") or 0) > world_size:
            variables["LOCAL_WORLD_SIZE"] = ""
        if local_rank is None:
            local_rank = _accelerator(rank, gpu_count, device)
        self._auto_pg = auto_pg
        self._met = False
        self._protocol = worker_protocol
        self._join_timeout = _seconds(join_timeout)
        self._server = Server(
            {
                "variables": variables,
                "local_rank": local_rank,
                "device": device,
                "transport": transport,
                "reader": p2p_transport,
                "token": _secret(token),
                "reader_token": _secret(sender_token),
                "bind": bind,
                "connections": 2,
                "bucket_mib": bucket_mib,
                "join_timeout": self._join_timeout,
                "bucket_timeout": _seconds(bucket_timeout),
            }
        )
        _open.add(self)

    def __enter__(self) -> ParameterServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def rank(self) -> int:
        """This rank's number."""
        return self._server.rank

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self._server.world_size

    @property
    def device_uuid(self) -> str:
        """The key under which this rank's worker finds its endpoint."""
        return self._server.device_uuid

    @property
    def device_kind(self) -> str:
        """`host`, `cuda` or `ascend`."""
        return self._server.device_kind

    @property
    def transport(self) -> str:
        """How bytes reach other ranks."""
        return self._server.transport

    @property
    def token(self) -> bytes:
        """The job's secret: what a job that loads this one's metas needs as `sender_token`."""
        return self._server.token()

    @property
    def checkpoints(self) -> list[str]:
        """Names of what this rank holds."""
        return self._server.checkpoints()

    def register_checkpoint(
        self,
        checkpoint_name: str,
        *,
        files: Sequence[str | os.PathLike[str]] | None = None,
        named_tensors: Mapping[str, torch.Tensor] | None = None,
        use_shared_memory_pool: bool = False,
        use_inplace_pin_memory: bool = True,
        delete_inplace_files: bool = False,
    ) -> None:
        """Copies files and tensors into host memory under a name; a tensor wins over one of the same name in a file.

        Each byte is copied once, from the file or the tensor to pinned memory; a tensor on a device or with gaps takes a
        detour. When this returns, files and tensors may change.

        Args:
            use_shared_memory_pool: use the memory that the last such checkpoint left, whatever its shapes were. One
                checkpoint at a time uses it.
            use_inplace_pin_memory: safetensors files in /dev/shm become the memory, without a copy.
            delete_inplace_files: remove the names of such files: their memory goes with the checkpoint.
        """
        self._server.register(
            checkpoint_name,
            [os.fspath(path) for path in files or []],
            tensors.describe(named_tensors or {}),
            use_shared_memory_pool,
            use_inplace_pin_memory,
            delete_inplace_files,
        )

    def unregister_checkpoint(self, checkpoint_name: str, force: bool = False) -> bool:
        """Lets go of a checkpoint; `force` frees the shared memory pool too. `False` if there was no such checkpoint."""
        return self._server.unregister(checkpoint_name, force)

    def init_process_group(self, *, timeout: timedelta | float | None = None) -> None:
        """Waits until all ranks are there. The group stays until `close`, whatever happens to an update."""
        self._server.meet(self._join_timeout if timeout is None else _seconds(timeout))
        self._met = True

    def store_based_barrier(self, timeout: timedelta | float = timedelta(minutes=5)) -> None:
        """Waits until every rank has called it."""
        self._server.gather(b"", _seconds(timeout))

    def gather(self, part: bytes, timeout: timedelta | float = timedelta(minutes=5)) -> list[bytes]:
        """Every rank's bytes, by rank."""
        return self._server.gather(part, _seconds(timeout))

    def gather_metas(self, checkpoint_name: str) -> None:
        """Tells every rank what every rank holds of a checkpoint; a rank without it takes part."""
        if not self._met:
            if not self._auto_pg:
                raise RuntimeError("there is no process group: call init_process_group first, or use auto_pg=True")
            self.init_process_group()
        self._server.gather_metas(checkpoint_name)

    def get_metas(self) -> dict[int, dict[str, Any]]:
        """Who holds what, by rank: what `load_metas` of another job takes. It can be written as JSON."""
        text = self._server.metas_json()
        return {int(rank): metas for rank, metas in json.loads(text).items()} if text else {}

    def load_metas(self, metas: Mapping[int, Any]) -> None:
        """Takes another job's metas: updates pull from that job's memory, until the next `gather_metas`."""
        self._server.load_metas_json(json.dumps({str(rank): of_rank for rank, of_rank in metas.items()}))

    def update(
        self,
        checkpoint_name: str,
        req_func: RequestFunction | None,
        *,
        timeout: timedelta | float = timedelta(minutes=10),
        ranks: Sequence[int] | None = None,
        version: int | None = None,
        worker_protocol: str | None = None,
    ) -> dict[str, Any]:
        """Moves a checkpoint into the workers of all ranks, or of none.

        Args:
            req_func: called in another thread with `[(device UUID, endpoint), ...]`, one pair a rank of the job; it
                tells this rank's engine and returns when the engine is done. `None`: someone else tells it.
            ranks: empty for a broadcast to all ranks. Else those ranks pull what the others hold, and the others go on
                undisturbed; calls of ranks that are not named return at once.
            version: what the workers have afterwards; by default the number of `gather_metas` and `load_metas` calls.
            worker_protocol: what this rank's worker speaks, if it is not what the constructor was told.

        Returns:
            What was moved, and the seconds of each stage; empty on a rank that takes no part.
        """
        members = sorted(set(ranks or ()))
        if members and self.rank not in members:
            return {}
        report = self._server.update(
            checkpoint_name, req_func, members, version, worker_protocol or self._protocol, _seconds(timeout)
        )
        return json.loads(report)

    def stream(
        self,
        checkpoint_name: str,
        *,
        timeout: timedelta | float = timedelta(minutes=10),
        ranks: Sequence[int] | None = None,
        version: int | None = None,
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """An update whose worker is this process: yields buckets of `(name, tensor)`, at the pace of the consumer.

        The tensors are views of a ring whose bytes change when the next bucket is asked for. The last bucket is behind you
        when the iterator has ended; only then are the weights whole. Leaving it earlier fails the update on all ranks.
        """
        members = sorted(set(ranks or ()))
        stream = self._server.stream(checkpoint_name, members, version, _seconds(timeout))
        accelerator = devices.module(devices.device_type()) if self.device_kind != "host" else None
        while (bucket := stream.next_bucket()) is not None:
            yield [(name, tensors.as_tensor(memory, dtype, shape)) for name, dtype, shape, memory in bucket]
            del bucket
            if accelerator is not None:
                # What the consumer began to copy is copied before the bytes change.
                accelerator.synchronize()

    def tensors(self, checkpoint_name: str) -> dict[str, torch.Tensor]:
        """This rank's share of a checkpoint, as views of the memory that is sent from."""
        found = {}
        for memory, arena in self._server.arenas(checkpoint_name):
            buffer = tensors.as_bytes(memory)
            for name, dtype, shape, offset in arena:
                found[name] = tensors.view(buffer, offset, tensors.dtype_of(dtype), shape)
        return found

    def close(self) -> None:
        """Leaves the job; rank 0 ends it for everybody, so call it on all ranks together."""
        _open.discard(self)
        self._server.close()

    async def register_checkpoint_async(self, checkpoint_name: str, **options: Any) -> None:
        """`register_checkpoint` for asyncio."""
        await asyncio.to_thread(self.register_checkpoint, checkpoint_name, **options)

    async def init_process_group_async(self, *, timeout: timedelta | float | None = None) -> None:
        """`init_process_group` for asyncio."""
        await asyncio.to_thread(self.init_process_group, timeout=timeout)

    async def gather_metas_async(self, checkpoint_name: str) -> None:
        """`gather_metas` for asyncio."""
        await asyncio.to_thread(self.gather_metas, checkpoint_name)

    async def update_async(
        self, checkpoint_name: str, req_func: RequestFunction | None, **options: Any
    ) -> dict[str, Any]:
        """`update` for asyncio."""
        return await asyncio.to_thread(self.update, checkpoint_name, req_func, **options)


def _secret(token: bytes | str | None) -> bytes | None:
    return token.encode() if isinstance(token, str) else token


def _accelerator(rank: int | None, gpu_count: int | None, device: str) -> int | None:
    """Which of the visible accelerators: LOCAL_RANK where it names one, else the rank modulo their number."""
    visible = gpu_count
    if visible is None and device != "host":
        accelerator = devices.module(devices.device_type())
        visible = accelerator.device_count() if accelerator is not None else None
    if not visible:
        return None
    given = os.environ.get("LOCAL_RANK")
    if rank is None and given and int(given) < visible:
        return int(given)
    return (int(os.environ.get("RANK") or 0) if rank is None else rank) % visible
