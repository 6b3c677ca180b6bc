"""The parameter server under checkpoint-engine's names, with what trainers reach for behind its underscores."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import ckpt_engine
import torch
from ckpt_engine import tensors
from ckpt_engine.device import device_uuid, get_ip

from . import distributed as dist
from ._plan import _assign_receiver_ranks, _gen_h2d_buckets, _to_named_tensor
from .data_types import (
    BucketRange,
    DataToGather,
    H2DBucket,
    MemoryBuffer,
    MemoryBufferMetaList,
    MemoryBufferMetas,
    ParameterMeta,
)
from .device_utils import DeviceManager, npu_generate_uuid

__all__ = [
    "BucketRange",
    "DataToGather",
    "H2DBucket",
    "MemoryBuffer",
    "MemoryBufferMetaList",
    "MemoryBufferMetas",
    "ParameterMeta",
    "ParameterServer",
    "_assign_receiver_ranks",
    "_gen_h2d_buckets",
    "_get_physical_gpu_id",
    "_to_named_tensor",
    "npu_generate_uuid",
]

logger = logging.getLogger(__name__)

_READ_SECONDS = 300.0
_FAILED = b"failed"


def _get_physical_gpu_id(device_manager: DeviceManager, device_index: int | None = None) -> str:
    try:
        return device_uuid(device_manager.device_type, device_index, int(os.environ.get("RANK") or 0))
    except AssertionError as error:
        raise ValueError(f"accelerator {device_index} does not tell its UUID") from error


def _get_master_port(master_port: int | None = None) -> int:
    if master_port is not None:
        return master_port
    port = os.environ.get("MASTER_PORT")
    assert port, "set MASTER_PORT, or pass master_port"
    return int(port) + 1


class _P2PStore:
    """Other ranks' memory through the engine's own transport, with the methods of `p2p_store.P2PStore`."""

    def __init__(self, server: ParameterServer) -> None:
        self._server = server
        self.rank = server.rank
        self.ip = get_ip()
        self.port = server.rank
        self.device = ""
        self.named_tensors: dict[str, torch.Tensor] = {}

    @property
    def addr(self) -> str:
        return f"{self.ip}:{self.port}"

    def register_named_tensors(self, named_tensors: dict[str, torch.Tensor]) -> None:
        """Where bytes arrive needs no registration here; checkpoints are registered by `gather_metas`."""
        self.named_tensors.update(named_tensors)

    def unregister_named_tensors(self, names: list[str]) -> int:
        for name in names:
            del self.named_tensors[name]
        return len(names)

    def batch_transfer_sync_read(
        self, target_hostname: str, buf_ptrs: list[int], remote_ptrs: list[int], lens: list[int]
    ) -> None:
        """Reads into host memory from the rank whose metas have this address."""
        for owner, held in self._server._current_global_parameter_metas.items():
            if held.p2p_store_addr == target_hostname:
                pieces = list(zip(remote_ptrs, buf_ptrs, lens, strict=True))
                self._server._server.read(owner, pieces, self.named_tensors, _READ_SECONDS)
                return
        raise RuntimeError(f"no rank of the metas is at {target_hostname}")


class ParameterServer(ckpt_engine.ParameterServer):
    """`ckpt_engine.ParameterServer` with checkpoint-engine's types and its underscore names. Takes the same options."""

    shared_memory_pool_name = "__shared_memory_pool__"

    def __init__(self, *, gpu_count: int | None = None, mem_fraction: float | None = None, **options: Any) -> None:
        self.device_manager = DeviceManager()
        super().__init__(gpu_count=gpu_count, mem_fraction=mem_fraction, **options)
        self._rank = self.rank
        self._world_size = self.world_size
        self._gpu_count = gpu_count or self.device_manager.device_module.device_count()
        self._local_rank = self._rank % self._gpu_count
        self._mem_fraction = mem_fraction or float(os.environ.get("PS_MEM_FRACTION") or 0.9)
        self._device_uuid = self.device_uuid
        self._p2p_store: _P2PStore | None = _P2PStore(self)
        self._rdma_device = self._p2p_store.device
        self._all_hosts: list[str] = []
        self._global_device_uuids: list[str] = []
        self._local_rdma_devices: dict[str, set[int]] = defaultdict(set)
        self._remote_rdma_devices: dict[str, set[int]] = defaultdict(set)
        self._current_global_parameter_metas: dict[int, MemoryBufferMetaList] = {}
        self._current_shared_memory_pool_user = ""

    def register_checkpoint(
        self,
        checkpoint_name: str,
        *,
        files: Sequence[str] | None = None,
        named_tensors: Mapping[str, torch.Tensor] | None = None,
        use_shared_memory_pool: bool = False,
        use_inplace_pin_memory: bool = True,
        delete_inplace_files: bool | None = None,
    ) -> None:
        """As checkpoint-engine: files in /dev/shm are used in place on CUDA only, and removed then."""
        in_place = use_inplace_pin_memory and self.device_manager.device_type == "cuda"
        super().register_checkpoint(
            checkpoint_name,
            files=files,
            named_tensors=named_tensors,
            use_shared_memory_pool=use_shared_memory_pool,
            use_inplace_pin_memory=in_place,
            delete_inplace_files=in_place if delete_inplace_files is None else delete_inplace_files,
        )
        if use_shared_memory_pool:
            self._current_shared_memory_pool_user = checkpoint_name

    def unregister_checkpoint(self, checkpoint_name: str, force: bool = False) -> None:
        """An unknown name is a warning."""
        pooled = checkpoint_name == self._current_shared_memory_pool_user
        if not super().unregister_checkpoint(checkpoint_name, force and pooled):
            logger.warning("rank %d: checkpoint %s is not registered", self._rank, checkpoint_name)
        if pooled:
            self._current_shared_memory_pool_user = ""

    def init_process_group(self, *, timeout: timedelta = timedelta(minutes=10)) -> None:
        """Waits for all ranks; `checkpoint_engine.distributed` works from then on."""
        super().init_process_group(timeout=timeout)
        dist.base.attach(self)

    def gather_metas(self, checkpoint_name: str) -> None:
        """Also learns which ranks share a link."""
        if self._auto_pg and not dist.is_initialized():
            self.init_process_group()
        super().gather_metas(checkpoint_name)
        address = self._p2p_store.addr if self._p2p_store is not None else None
        place = {"host": get_ip(), "address": address, "device": self._rdma_device or "", "uuid": self._device_uuid}
        places = [json.loads(part) for part in self.gather(json.dumps(place).encode())]
        self._global_device_uuids = [of["uuid"] for of in places]
        self._all_hosts = [of["host"] for of in places[:: self._gpu_count]]
        self._current_global_parameter_metas = {}
        for rank, held in super().get_metas().items():
            # The engine publishes an address for Mooncake's readers only.
            own = {"p2p_store_addr": held.get("p2p_store_addr") or places[rank]["address"]}
            self._current_global_parameter_metas[rank] = MemoryBufferMetaList(**(held | own))
        for rank, of in enumerate(places):
            self._local_rdma_devices[_link(of["device"], of["address"], of["host"])].add(rank)
        self._remote_rdma_devices = self._local_rdma_devices.copy()

    def get_metas(self) -> dict[int, MemoryBufferMetaList]:  # type: ignore[override]
        """The metas in force, as data classes."""
        return self._current_global_parameter_metas

    def load_metas(self, metas: Mapping[int, Any]) -> None:
        """Takes another job's metas, of ours or of checkpoint-engine's own instances."""
        known = {
            int(rank): held if isinstance(held, MemoryBufferMetaList) else MemoryBufferMetaList.model_validate(held)
            for rank, held in metas.items()
        }
        plain = {rank: held.model_dump(mode="json") for rank, held in known.items()}
        for of_rank in plain.values():
            if "ckpt" in of_rank:
                # What `gather_metas` filled in for the grouping of links, is no address of Mooncake.
                of_rank["p2p_store_addr"] = None
        super().load_metas(plain)
        self._current_global_parameter_metas = known
        self._remote_rdma_devices = defaultdict(set)
        for rank, held in known.items():
            host = (held.p2p_store_addr or "").split(":")[0]
            self._remote_rdma_devices[f"{held.rdma_device}@{host}"].add(rank)

    def update(  # type: ignore[override]
        self,
        checkpoint_name: str,
        req_func: Callable[[list[tuple[str, str]]], None],
        *,
        timeout: timedelta = timedelta(minutes=10),
        ranks: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        """Moves a checkpoint into the workers of all ranks, or of `ranks` by P2P. All ranks call it: those that are not
        named wait, since their memory is read. With `auto_pg` torch's default group is gone afterwards."""
        if self._auto_pg and not dist.is_initialized():
            self.init_process_group()
        try:
            super().update(checkpoint_name, req_func, timeout=timeout, ranks=ranks, **options)
        except BaseException:
            if ranks:
                # The others learn at once that there is nothing to wait for; this rank's own error says why.
                with contextlib.suppress(ckpt_engine.Error):
                    self.gather(_FAILED, timeout)
            raise
        else:
            if ranks and _FAILED in self.gather(b"", timeout):
                raise RuntimeError(f"the update of ranks {list(ranks)} failed on other ranks; see their errors")
        finally:
            if self._auto_pg:
                dist.destroy_process_group()

    @property
    def _memory_pool(self) -> dict[str, list[MemoryBuffer]]:
        """What is registered, as tensors over the engine's memory; the shared pool under its own name."""
        pools: dict[str, list[MemoryBuffer]] = {self.shared_memory_pool_name: []}
        for name in self.checkpoints:
            shared = name == self._current_shared_memory_pool_user
            pools[self.shared_memory_pool_name if shared else name] = [
                _memory_buffer(memory, tensors_in) for memory, tensors_in in self._server.arenas(name)
            ]
        return pools

    def _get_memory_pool(self, checkpoint_name: str) -> list[MemoryBuffer]:
        pools = self._memory_pool
        if checkpoint_name and checkpoint_name == self._current_shared_memory_pool_user:
            return pools[self.shared_memory_pool_name]
        if checkpoint_name in pools:
            return pools[checkpoint_name]
        raise RuntimeError(f"checkpoint {checkpoint_name} is not registered")

    def _copy_to_buffer(
        self, checkpoint_name: str, bucket: H2DBucket, buffer: torch.Tensor, owner_rank: int | None = None
    ) -> None:
        """Fills `buffer` with a bucket, from this rank's memory or from `owner_rank`'s; complete when it returns."""
        assert sum(piece.size for piece in bucket.ranges) == bucket.size, "the bucket's ranges are not its size"
        if owner_rank is None:
            pool = self._get_memory_pool(checkpoint_name)
            at = 0
            for piece in bucket.ranges:
                source = pool[piece.idx].buffer[piece.offset : piece.offset + piece.size]
                buffer[at : at + piece.size].copy_(source, non_blocking=True)
                at += piece.size
        else:
            # Transports read into host memory; from there it goes where it is wanted.
            into = buffer if buffer.device.type == "cpu" else torch.empty(bucket.size, dtype=torch.uint8)
            starts = [held.ptr for held in self._current_global_parameter_metas[owner_rank].memory_buffer_metas_list]
            pieces, address = [], into.data_ptr()
            for piece in bucket.ranges:
                pieces.append((starts[piece.idx] + piece.offset, address, piece.size))
                address += piece.size
            self._server.read(owner_rank, pieces, into, _READ_SECONDS)
            if into is not buffer:
                buffer[: bucket.size].copy_(into)
        self.device_manager.device_module.synchronize()


def _link(device: str, address: str | None, host: str) -> str:
    return f"{device}@{address.split(':')[0]}" if address else host


def _memory_buffer(memory: Any, held: list[tuple[str, str, list[int], int]]) -> MemoryBuffer:
    ends = [offset for *_, offset in held[1:]] + [memory.nbytes]
    metas = [
        ParameterMeta(name=name, dtype=tensors.dtype_of(dtype), shape=torch.Size(shape), aligned_size=end - offset)
        for (name, dtype, shape, offset), end in zip(held, ends, strict=False)
    ]
    return MemoryBuffer(buffer=tensors.as_bytes(memory), size=memory.nbytes, metas=metas)


if __name__ == "__main__":
    from .__main__ import run_from_cli

    run_from_cli()
