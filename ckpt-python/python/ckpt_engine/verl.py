"""The backend `ckpt_engine` of verl: trainers offload to host memory, rollouts pull what they need and share it.

In verl's configuration: `checkpoint_engine.backend: ckpt_engine`, `custom_backend_module: ckpt_engine.verl`. docs/verl.md
has the options and a diagram.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import Any

import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from . import device as devices
from .server import ParameterServer

Weights = Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]]

CHECKPOINT = "verl"
_END = object()


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A configuration file names dtypes as text."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"rollout_dtype {dtype!r} is no dtype of torch, such as bfloat16")
        return found
    return dtype


async def _each(weights: Weights) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
    """Trainers' generators run in the thread that they were made for: its device is the current one."""
    if isinstance(weights, AsyncIterable):
        async for item in weights:
            yield item
    else:
        for item in weights:
            yield item


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@CheckpointEngineRegistry.register("ckpt_engine")
class CkptCheckpointEngine(CheckpointEngine):
    """One process of a weight synchronisation; trainers come first in the job, then rollouts.

    Args:
        bucket_size: bytes of a bucket. A rollout needs the largest tensor and some buckets of device memory.
        is_master: whether the job is hosted here; true for one or all trainers.
        rebuild_group: leave the job after each synchronisation; else it is kept while the processes stay the same.
        rollout_dtype: trainers cast floating-point tensors to it before they send; `None` sends them as they are.
        timeout: seconds for one synchronisation, and for a consumer to take one bucket.
        address: the master's address for the other hosts; by default that on its way out.
        options: further options of `ckpt_engine.ParameterServer`, such as `transport` and `p2p_transport`.
    """

    def __init__(
        self,
        bucket_size: int,
        is_master: bool = False,
        rebuild_group: bool = False,
        rollout_dtype: torch.dtype | str | None = torch.bfloat16,
        timeout: float = 600.0,
        address: str | None = None,
        **options: Any,
    ) -> None:
        if bucket_size <= 0:
            raise ValueError(f"bucket_size is {bucket_size}; it must be above 0")
        self.bucket_size = bucket_size
        self.is_master = is_master
        self.rebuild_group = rebuild_group
        self.rollout_dtype = _dtype(rollout_dtype)
        self.timeout = timeout
        self.address = address
        self._options = options
        self._server: ParameterServer | None = None
        self._group: str | None = None
        self.rank: int | None = None
        self.trainers = self.rollouts = 0

    def prepare(self) -> dict[str, Any]:
        """What the others must know: which job this process is in, and from a master where a new one would be."""
        metadata: dict[str, Any] = {"group": self._group, "rank": self.rank, "world_size": self.trainers + self.rollouts}
        if self.is_master:
            metadata["master"] = {
                "address": self.address or devices.get_ip(),
                "port": _free_port(),
                "token": secrets.token_hex(32),
                "group": secrets.token_hex(8),
            }
        return metadata

    @classmethod
    def build_topology(
        cls, trainer_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Everybody's place; the job stays if it has exactly these processes in this order."""
        world_size = trainer_world_size + rollout_world_size
        if len(metadata) != world_size:
            raise ValueError(f"{world_size} processes were prepared by {len(metadata)} calls")
        master = metadata[0].get("master")
        if master is None:
            raise ValueError("the first trainer is not the master; make its engine with is_master=True")
        group = metadata[0]["group"]
        kept = group is not None and all(
            of["group"] == group and of["rank"] == rank and of["world_size"] == world_size
            for rank, of in enumerate(metadata)
        )

        def kwargs(ranks: range) -> dict[str, list[Any]]:
            return {
                "rank": list(ranks),
                "trainer_world_size": [trainer_world_size] * len(ranks),
                "rollout_world_size": [rollout_world_size] * len(ranks),
                "master": [None if kept else master] * len(ranks),
            }

        return kwargs(range(trainer_world_size)), kwargs(range(trainer_world_size, world_size))

    def init_process_group(
        self, rank: int, trainer_world_size: int, rollout_world_size: int, master: dict[str, Any] | None
    ) -> None:
        """Joins the job at `master`; `None` keeps the one that is up."""
        if master is None and self._server is not None:
            return
        if master is None:
            raise RuntimeError("there is no job to keep; prepare must be called on all processes first")
        self._leave()
        self.rank, self.trainers, self.rollouts = rank, trainer_world_size, rollout_world_size
        accelerator = devices.module(devices.device_type())
        self._server = ParameterServer(
            rank=rank,
            world_size=trainer_world_size + rollout_world_size,
            master_addr=master["address"],
            master_port=master["port"],
            token=master["token"],
            bucket_mib=max(1, self.bucket_size >> 20),
            bucket_timeout=self.timeout,
            # The one that verl chose for this process.
            local_rank=accelerator.current_device() if accelerator is not None else None,
            **self._options,
        )
        self._server.init_process_group(timeout=self.timeout)
        self._group = master["group"]

    async def send_weights(
        self, weights: Weights, global_steps: int | None = None
    ) -> None:
        """A trainer's part: drains `weights`, keeps every n-th tensor in host memory until the rollouts have them."""
        server = self._joined()
        failure: Exception | None = None
        try:
            kept = await self._offload(weights)
            await server.register_checkpoint_async(CHECKPOINT, named_tensors=kept)
            del kept
        except Exception as error:
            failure = error
        try:
            await self._agree(failure)
            await server.gather_metas_async(CHECKPOINT)
            # The rollouts read this process's memory meanwhile.
            await self._agree(None)
        except BaseException:
            self._group = None  # the next synchronisation begins with a new job
            raise
        finally:
            await asyncio.to_thread(server.unregister_checkpoint, CHECKPOINT)

    @torch.no_grad()
    async def _offload(self, weights: Weights) -> dict[str, torch.Tensor]:
        """Every trainer sees every tensor, since making one is collective work of all trainers."""
        kept: dict[str, torch.Tensor] = {}
        index = 0
        async for name, tensor in _each(weights):
            if index % self.trainers == self.rank:
                dtype = tensor.dtype
                # One-byte floats mean nothing without their scales.
                if self.rollout_dtype is not None and dtype.is_floating_point and dtype.itemsize > 1:
                    dtype = self.rollout_dtype
                # A copy that is complete when this returns, also from host memory: the generator uses the tensor's
                # memory again as soon as it is advanced.
                kept[name] = tensor.detach().to("cpu", dtype, non_blocking=False, copy=True)
            index += 1
        return kept

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """A rollout's part: the weights, as views that are valid until the next one is asked for."""
        server = self._joined()
        await self._agree(None)
        await server.gather_metas_async(CHECKPOINT)
        ranks = range(self.trainers, self.trainers + self.rollouts)
        failure: BaseException | None = None
        try:
            buckets = server.stream(CHECKPOINT, ranks=list(ranks), version=global_steps, timeout=self.timeout)
            while (bucket := await asyncio.to_thread(next, buckets, _END)) is not _END:
                for name, tensor in bucket:
                    yield name, tensor
                del bucket
        except BaseException as error:
            failure, self._group = error, None
            raise
        finally:
            buckets = None
            # The trainers wait for this word, whatever it is.
            await self._agree(failure, raising=failure is None)

    async def _agree(self, failure: BaseException | None, raising: bool = True) -> None:
        """All processes come here; if one brings a failure, all raise it."""
        server = self._joined()
        part = b"" if failure is None else f"{type(failure).__name__}: {failure}".encode()
        parts = await asyncio.to_thread(server.gather, part, self.timeout)
        if failure is not None and raising:
            raise failure
        if raising:
            for rank, text in enumerate(parts):
                if text:
                    raise RuntimeError(f"rank {rank} of the weight synchronisation failed: {text.decode()}")

    def finalize(self) -> None:
        """After each synchronisation."""
        if self.rebuild_group:
            self._leave()

    def _leave(self) -> None:
        server, self._server, self._group = self._server, None, None
        if server is not None:
            server.close()

    def _joined(self) -> ParameterServer:
        if self._server is None:
            raise RuntimeError("this process is in no job: call init_process_group first")
        return self._server
