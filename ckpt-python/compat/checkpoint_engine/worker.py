"""The worker's side."""

from __future__ import annotations

from typing import TypedDict

import torch
from ckpt_engine.tensors import view
from ckpt_engine.worker import VllmColocateWorkerExtension, update_weights_from_ipc

__all__ = ["FlattenedTensorMetadata", "VllmColocateWorkerExtension", "update_weights_from_ipc"]


class FlattenedTensorMetadata(TypedDict):
    """One tensor in the buffer that a worker maps."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    offset: int


def _extract_weights(
    payload: list[FlattenedTensorMetadata], buffer: torch.Tensor
) -> list[tuple[str, torch.Tensor]]:
    return [(item["name"], view(buffer, item["offset"], item["dtype"], item["shape"])) for item in payload]
