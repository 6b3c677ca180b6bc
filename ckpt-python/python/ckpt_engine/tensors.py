"""Tensors at the border between torch and the engine: no bytes are copied here unless a tensor leaves no other way."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch

# The engine's name of a tensor: name, dtype, shape, address, bytes, and the object that keeps the memory.
Described = tuple[str, str, list[int], int, int, object]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """`torch.bfloat16` for `bfloat16`; an error that says so if this torch is too old to have it."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch {torch.__version__} has no dtype {name}; the checkpoint needs a newer one")
    return dtype


def describe(named_tensors: Mapping[str, torch.Tensor]) -> list[Described]:
    """Tensors for the engine to copy from. Only tensors on a device or with gaps are copied once more here."""
    described = []
    for name, tensor in named_tensors.items():
        source = tensor.detach()
        if source.device.type != "cpu":
            source = source.cpu()
        # Views that conjugate or negate are resolved: the engine reads bytes.
        source = source.resolve_conj().resolve_neg().contiguous()
        shape = list(source.shape)
        described.append((name, dtype_name(source.dtype), shape, source.data_ptr(), source.nbytes, source))
    return described


class _DeviceMemory:
    """CUDA memory of the engine, as torch takes it."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.nbytes,),
            "typestr": "|u1",
            "data": (memory.address, False),
            "version": 3,
        }


def as_bytes(memory: Any) -> torch.Tensor:
    """The engine's memory as a `uint8` tensor, which keeps the memory alive."""
    if memory.nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    if memory.kind == "device":
        return torch.as_tensor(_DeviceMemory(memory), device="cuda")
    array = (ctypes.c_uint8 * memory.nbytes).from_address(memory.address)
    array.owner = memory  # the tensor keeps the array, the array keeps the memory
    return torch.frombuffer(array, dtype=torch.uint8)


def view(buffer: torch.Tensor, offset: int, dtype: torch.dtype, shape: list[int] | torch.Size) -> torch.Tensor:
    """The tensor at `offset` of a `uint8` buffer, without a copy where its address allows that."""
    shape = torch.Size(shape)
    part = buffer[offset : offset + dtype.itemsize * shape.numel()]
    if part.storage_offset() % dtype.itemsize or part.data_ptr() % dtype.itemsize:
        # Files that were pinned in place keep their own alignment.
        part = part.clone()
    return part.view(dtype).view(shape)


def as_tensor(memory: Any, dtype: str, shape: list[int]) -> torch.Tensor:
    """The engine's memory as the tensor that it holds."""
    return view(as_bytes(memory), 0, dtype_of(dtype), shape)
