"""Mooncake's transfer engine, as checkpoint-engine wraps it. Updates of this package do not need it."""

from __future__ import annotations

import logging
import os
import random
import time
from typing import TYPE_CHECKING

from .device_utils import DeviceManager, get_ip

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_TRIES = 8


class P2PStore:
    """Registers tensors for others to read, and reads others'. Needs the package `mooncake-transfer-engine`."""

    def __init__(self, device_manager: DeviceManager) -> None:
        from mooncake.engine import TransferEngine

        self.rank = int(os.environ["RANK"])
        self.device = device_manager.rdma_device(self.rank % device_manager.device_module.device_count())
        self.ip = get_ip()
        self.named_tensors: dict[str, torch.Tensor] = {}
        protocol = device_manager.transfer_engine_protocol
        for attempt in range(_TRIES):
            self.engine = TransferEngine()
            if self.engine.initialize(self.ip, "P2PHANDSHAKE", protocol, self.device) == 0:
                break
            logger.warning("try %d: Mooncake's engine does not start on %r over %s", attempt + 1, self.device, protocol)
            # Processes of one host that took the same port do not meet again.
            time.sleep(random.uniform(0.5, 2.0))
        else:
            raise RuntimeError(f"rank {self.rank}: Mooncake's engine does not start over {protocol}, see its log")
        self.port = self.engine.get_rpc_port()

    @property
    def addr(self) -> str:
        """Where others reach this process."""
        return f"{self.ip}:{self.port}"

    def register_named_tensors(self, named_tensors: dict[str, torch.Tensor]) -> None:
        """Lets others read these tensors."""
        tensors = named_tensors.values()
        code = self.engine.batch_register_memory([t.data_ptr() for t in tensors], [t.nbytes for t in tensors])
        assert code == 0, f"Mooncake refused to register {', '.join(named_tensors)}: {code}"
        self.named_tensors.update(named_tensors)

    def unregister_named_tensors(self, names: list[str]) -> int:
        """Ends that; the number of tensors."""
        code = self.engine.batch_unregister_memory([self.named_tensors[name].data_ptr() for name in names])
        assert code == 0, f"Mooncake refused to unregister {', '.join(names)}: {code}"
        for name in names:
            del self.named_tensors[name]
        return len(names)

    def batch_transfer_sync_read(
        self, target_hostname: str, buf_ptrs: list[int], remote_ptrs: list[int], lens: list[int]
    ) -> None:
        """Reads pieces of another process's registered memory."""
        code = self.engine.batch_transfer_sync_read(target_hostname, buf_ptrs, remote_ptrs, lens)
        assert code == 0, f"Mooncake could not read from {target_hostname}: {code}"
