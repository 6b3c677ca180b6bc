"""The data that public code and metas files are made of."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, WithJsonSchema


def _dtype(value: Any) -> torch.dtype:
    if isinstance(value, str):
        if not value.startswith("torch."):
            raise ValueError(f"a dtype is written as torch.<name>, not {value!r}")
        found = getattr(torch, value.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"this torch has no dtype {value}")
        return found
    if isinstance(value, torch.dtype):
        return value
    # pydantic passes a TypeError on, as checkpoint-engine's classes do.
    raise TypeError(f"{value!r} is no dtype")


def _size(value: Any) -> torch.Size:
    if isinstance(value, list | tuple):
        return torch.Size(value)
    raise TypeError(f"{value!r} is no shape")


def _tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{type(value)} is no tensor")
    return value


_Dtype = Annotated[
    torch.dtype,
    PlainValidator(_dtype),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string"}, mode="serialization"),
]
_Size = Annotated[
    torch.Size,
    PlainValidator(_size),
    PlainSerializer(tuple, return_type=tuple),
    WithJsonSchema({"type": "array", "items": {"type": "integer"}}, mode="serialization"),
]
_Tensor = Annotated[torch.Tensor, PlainValidator(_tensor)]


class ParameterMeta(BaseModel):
    """One tensor; `aligned_size` is the distance to the next one in memory."""

    name: str
    dtype: _Dtype
    shape: _Size
    aligned_size: int


class BucketRange(NamedTuple):
    """A range of one memory buffer."""

    idx: int
    offset: int
    size: int


class H2DBucket(BaseModel):
    """Ranges that are sent together, and the tensors in them."""

    size: int
    ranges: list[BucketRange]
    items: list[ParameterMeta]


class MemoryBufferMetas(BaseModel):
    """The tensors of one memory buffer, in memory order, and where it is."""

    metas: list[ParameterMeta]
    ptr: int
    size: int


class MemoryBuffer(BaseModel):
    """A memory buffer of this process."""

    buffer: _Tensor
    size: int
    metas: list[ParameterMeta]
    manually_pinned: bool = False


class MemoryBufferMetaList(BaseModel):
    """What one rank holds. Further keys are kept: ckpt's own instances describe their memory in one."""

    model_config = ConfigDict(extra="allow")

    p2p_store_addr: str | None
    memory_buffer_metas_list: list[MemoryBufferMetas]
    rdma_device: str


class DataToGather(MemoryBufferMetaList):
    """The same with the rank's host and device."""

    host_ip: str
    device_uuid: str
