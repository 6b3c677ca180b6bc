"""One implementation for all backends: torch's process groups, made beside torch's default group and not in its place.

Groups are made when they are first used; a barrier or an exchange of objects needs none while a parameter server is there.
As with checkpoint-engine, torch's default group is there too, so that scripts can call `torch.distributed.barrier()`;
unless the trainer has one of its own already, or has chosen `vllm_nccl` or `vllm_hccl`, which exist to leave it alone.
"""

from __future__ import annotations

import io
import pickle
import socket
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as torch_dist

if TYPE_CHECKING:
    from ..ps import ParameterServer

_TIMEOUT = timedelta(minutes=10)


class CommGroup:
    """Some of the ranks."""

    def __init__(self, group: torch_dist.ProcessGroup | None, ranks: list[int]) -> None:
        self._group = group
        self._ranks = ranks

    @property
    def handle(self) -> torch_dist.ProcessGroup | None:
        """Torch's group; `None` on a rank that is not in it."""
        return self._group

    @property
    def ranks(self) -> list[int]:
        """Their numbers in the job."""
        return self._ranks


DistributedProcessGroup = torch_dist.ProcessGroup | CommGroup


class Distributed(ABC):
    """What a backend does."""

    @abstractmethod
    def init_process_group(self, rank: int, world_size: int, store: Any, **kwargs: Any) -> None: ...

    @abstractmethod
    def destroy_process_group(self, group: DistributedProcessGroup | None = None) -> None: ...

    @abstractmethod
    def is_initialized(self) -> bool: ...

    @abstractmethod
    def all_gather_object(
        self, object_list: list[Any], obj: Any, group: DistributedProcessGroup | None = None
    ) -> None: ...

    @abstractmethod
    def all_reduce(
        self, tensor: torch.Tensor, op: Any = None, group: DistributedProcessGroup | None = None, **kwargs: Any
    ) -> None: ...

    @abstractmethod
    def broadcast(
        self, tensor: torch.Tensor, src: int = 0, group: DistributedProcessGroup | None = None, **kwargs: Any
    ) -> None: ...

    @abstractmethod
    def barrier(self, group: DistributedProcessGroup | None = None, **kwargs: Any) -> None: ...

    @abstractmethod
    def new_group(self, ranks: list[int], **kwargs: Any) -> CommGroup: ...


def _backend() -> str:
    from ..device_utils import DeviceManager

    return DeviceManager().backend


def _make(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """A group of torch's that is not the default one."""
    backend = _backend()
    if backend == "gloo":
        return torch_dist.ProcessGroupGloo(store, rank, size, timeout)
    if backend == "nccl":
        return torch_dist.ProcessGroupNCCL(store, rank, size, timeout)
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL

    return ProcessGroupHCCL(store, rank, size, ProcessGroupHCCL.Options())


class TorchGroups(Distributed):
    """The job's ranks, and groups of them."""

    def __init__(self) -> None:
        self._server: ParameterServer | None = None
        self.wants_default = True
        self._made_default = False
        self._reset()

    def _reset(self) -> None:
        self._rank = self._world_size = 0
        self._store: Any = None
        self._all: CommGroup | None = None
        self._groups = 0
        self._timeout = _TIMEOUT

    def attach(self, server: ParameterServer) -> None:
        """The ranks of a parameter server, which brings them together until `destroy_process_group`."""
        self._reset()
        self._server, self._rank, self._world_size = server, server.rank, server.world_size
        if self.wants_default and not torch_dist.is_initialized():
            store = torch_dist.PrefixStore("default", self._shared_store())
            torch_dist.init_process_group(
                _backend(), store=store, rank=self._rank, world_size=self._world_size, timeout=self._timeout
            )
            self._made_default = True

    def init_process_group(self, rank: int, world_size: int, store: Any, **kwargs: Any) -> None:
        """The ranks that share a store of torch's."""
        self._reset()
        self._server = None
        self._rank, self._world_size, self._store = rank, world_size, store
        self._timeout = kwargs.get("timeout", _TIMEOUT)
        self._whole()

    def is_initialized(self) -> bool:
        return self._world_size > 0

    def destroy_process_group(self, group: DistributedProcessGroup | None = None) -> None:
        """One group, or all of them."""
        if group is None:
            self._reset()
            self._server = None
            if self._made_default and torch_dist.is_initialized():
                torch_dist.destroy_process_group()
            self._made_default = False
        elif isinstance(group, CommGroup):
            group._group = None

    def _check(self) -> None:
        if not self.is_initialized():
            raise RuntimeError("there is no process group: call ParameterServer.init_process_group first")

    def _shared_store(self) -> Any:
        """Rank 0 opens a store and tells the others where."""
        if self._store is None:
            assert self._server is not None
            address = b""
            if self._rank == 0:
                self._store = torch_dist.TCPStore("0.0.0.0", 0, None, True, self._timeout, wait_for_workers=False)
                address = f"{_own_address()} {self._store.port}".encode()
            host, port = self._server.gather(address, self._timeout)[0].decode().split()
            if self._rank != 0:
                self._store = torch_dist.TCPStore(host, int(port), None, False, self._timeout)
        return self._store

    def _group(self, ranks: list[int]) -> CommGroup:
        """All ranks call it, in the same order."""
        self._groups += 1
        store = torch_dist.PrefixStore(f"group-{self._groups}", self._shared_store())
        if self._rank not in ranks:
            return CommGroup(None, ranks)
        return CommGroup(_make(store, ranks.index(self._rank), len(ranks), self._timeout), ranks)

    def _whole(self) -> CommGroup:
        if self._all is None:
            self._all = self._group(list(range(self._world_size)))
        return self._all

    def _of(self, group: DistributedProcessGroup | None) -> tuple[Any, list[int]]:
        self._check()
        if group is None:
            group = self._whole()
        if isinstance(group, CommGroup):
            return group.handle, group.ranks
        return group, torch_dist.get_process_group_ranks(group)

    def new_group(self, ranks: list[int], **kwargs: Any) -> CommGroup:
        """A group of some ranks; every rank of the job calls it."""
        self._check()
        return self._group(list(ranks))

    def broadcast(
        self, tensor: torch.Tensor, src: int = 0, group: DistributedProcessGroup | None = None, **kwargs: Any
    ) -> None:
        """From rank `src` of the job to the group; a rank outside does nothing."""
        handle, ranks = self._of(group)
        if handle is not None:
            handle.broadcast([tensor], _options(torch_dist.BroadcastOptions(), rootRank=ranks.index(src))).wait()

    def all_reduce(
        self, tensor: torch.Tensor, op: Any = None, group: DistributedProcessGroup | None = None, **kwargs: Any
    ) -> None:
        """In place; a sum by default."""
        handle, _ = self._of(group)
        if handle is not None:
            op = torch_dist.ReduceOp.SUM if op is None else op
            handle.allreduce([tensor], _options(torch_dist.AllreduceOptions(), reduceOp=op)).wait()

    def barrier(self, group: DistributedProcessGroup | None = None, **kwargs: Any) -> None:
        """Of all ranks, or of a group's."""
        self._check()
        if group is None and self._server is not None:
            self._server.store_based_barrier(self._timeout)
            return
        self.all_reduce(torch.zeros(1, device=_device()), group=group)
        if _backend() != "gloo":
            torch.accelerator.synchronize()

    def all_gather_object(
        self, object_list: list[Any], obj: Any, group: DistributedProcessGroup | None = None
    ) -> None:
        """Every rank's object into `object_list`. The ranks trust each other: objects travel as pickles."""
        data = pickle.dumps(obj)
        if group is None and self._server is not None:
            parts = self._server.gather(data, self._timeout)
        else:
            parts = self._gather_bytes(data, group)
        object_list[:] = [pickle.load(io.BytesIO(part)) for part in parts]

    def _gather_bytes(self, data: bytes, group: DistributedProcessGroup | None) -> list[bytes]:
        handle, ranks = self._of(group)
        if handle is None:
            return []
        device = _device()
        sizes = torch.zeros(len(ranks), dtype=torch.int64, device=device)
        sizes[ranks.index(self._rank)] = len(data)
        self.all_reduce(sizes, group=group)
        parts = []
        for rank, size in zip(ranks, sizes.tolist(), strict=True):
            part = torch.empty(size, dtype=torch.uint8, device=device)
            if rank == self._rank:
                part.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            self.broadcast(part, src=rank, group=group)
            parts.append(part.cpu().numpy().tobytes())
        return parts


def _options(options: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(options, name, value)
    return options


def _device() -> str:
    return {"nccl": "cuda", "hccl": "npu"}.get(_backend(), "cpu")


def _own_address() -> str:
    from ..device_utils import get_ip

    try:
        return get_ip()
    except OSError:
        return socket.gethostbyname("localhost")


_groups = TorchGroups()


def attach(server: ParameterServer) -> None:
    """Makes the functions below speak for the ranks of `server`."""
    _groups.attach(server)


def use_backend(backend: str | None) -> None:
    """`vllm_nccl` or `vllm_hccl`: torch's default group is left alone from then on."""
    if not backend:
        return
    if backend not in ("vllm_nccl", "vllm_hccl"):
        raise ValueError(f"Unsupported custom backend: {backend}")
    _groups.wants_default = False


def init_process_group(rank: int, world_size: int, store: Any, **kwargs: Any) -> None:
    """The ranks that share a store of torch's."""
    _groups.init_process_group(rank, world_size, store, **kwargs)


def destroy_process_group(group: DistributedProcessGroup | None = None) -> None:
    """Ends a group, or all."""
    _groups.destroy_process_group(group)


def is_initialized() -> bool:
    """Whether there is a group of all ranks."""
    return _groups.is_initialized()


def all_gather_object(object_list: list[Any], obj: Any, group: DistributedProcessGroup | None = None) -> None:
    """Every rank's object, by rank."""
    _groups.all_gather_object(object_list, obj, group)


def all_reduce(
    tensor: torch.Tensor, op: Any = torch_dist.ReduceOp.SUM, group: DistributedProcessGroup | None = None, **kwargs: Any
) -> None:
    """Reduces a tensor in place."""
    _groups.all_reduce(tensor, op, group, **kwargs)


def broadcast(
    tensor: torch.Tensor, src: int = 0, group: DistributedProcessGroup | None = None, **kwargs: Any
) -> None:
    """Sends a tensor from rank `src` of the job to a group."""
    _groups.broadcast(tensor, src, group, **kwargs)


def barrier(group: DistributedProcessGroup | None = None, **kwargs: Any) -> None:
    """Waits for all ranks of a group."""
    _groups.barrier(group, **kwargs)


def new_group(ranks: list[int], **kwargs: Any) -> CommGroup:
    """A group of some ranks; every rank of the job calls it."""
    return _groups.new_group(ranks, **kwargs)
