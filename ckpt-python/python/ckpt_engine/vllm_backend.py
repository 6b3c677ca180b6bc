"""The backend `ckpt_engine` of vLLM's weight-transfer API: `--weight-transfer-config '{"backend": "ckpt_engine"}'`.

`ckpt update --engine vllm-native` drives it: init, start, update with the endpoints of the parameter servers, finish.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.platforms import current_platform

from .vllm import _Load, _take
from .worker import endpoint_of


@dataclass
class CkptInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on before an update."""


@dataclass
class CkptUpdateInfo(WeightTransferUpdateInfo):
    """Where the parameter servers are, by device UUID."""

    endpoints: dict[str, str] = field(default_factory=dict)


class CkptWeightTransferEngine(WeightTransferEngine[CkptInitInfo, CkptUpdateInfo]):
    """Takes each update from the parameter server beside the worker."""

    init_info_cls = CkptInitInfo
    update_info_cls = CkptUpdateInfo
    _load: _Load | None = None

    def init_transfer_engine(self, init_info: CkptInitInfo) -> None:
        """Nothing to connect to yet: every update brings its own endpoints."""

    def start_weight_update(self) -> None:
        """The target is chosen: the model, or the draft model."""
        self._load = _Load(self.model, self.model_config, self.device)

    def receive_weights(self, update_info: CkptUpdateInfo) -> None:
        """Takes the whole update; it ends when all workers of all ranks have every byte."""
        if self._load is None:
            raise RuntimeError("start_weight_update must be called first")
        rank = self.parallel_config.rank
        kind = current_platform.device_type
        uuid, endpoint = endpoint_of(update_info.endpoints, kind, self.device.index, rank)
        with torch.no_grad():
            _take([self._load], uuid, endpoint, self.device, finish=False)

    def update_weights(self, update_info: dict) -> None:
        """As the base class does it, which asks for an accelerator that a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        """Post-processing."""
        load, self._load = self._load, None
        if load is not None:
            with torch.no_grad():
                load.finish()

    def shutdown(self) -> None:
        """Nothing outlives an update."""
