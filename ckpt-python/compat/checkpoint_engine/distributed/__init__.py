"""Collective calls among the ranks, for code that moves tensors by itself."""

from . import base
from .base import (
    Distributed,
    DistributedProcessGroup,
    all_gather_object,
    all_reduce,
    barrier,
    broadcast,
    destroy_process_group,
    init_process_group,
    is_initialized,
    new_group,
    use_backend,
)

__all__ = [
    "Distributed",
    "DistributedProcessGroup",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "base",
    "broadcast",
    "destroy_process_group",
    "init_process_group",
    "is_initialized",
    "new_group",
    "use_backend",
]
