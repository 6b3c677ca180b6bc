"""vLLM: how its workers take an update, and the backend of its own weight-transfer API.

Weights go through vLLM's layerwise reloading where the version has it. It loads tensors in the checkpoint's format, runs
each layer's post-processing (repacking, FP8 scales), and copies the result into the tensors that compiled graphs hold, so
quantized models need no patches. Older versions load in place and post-process at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform

from .worker import Weights, endpoint_of, update_weights_from_ipc

try:
    from vllm.model_executor.model_loader import reload as layerwise
except ImportError:
    layerwise = None

BACKEND = "ckpt_engine"


class _Load:
    """One update of one model."""

    def __init__(self, model: torch.nn.Module, config: Any, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device

    def start(self) -> None:
        if layerwise is not None:
            layerwise.initialize_layerwise_reload(self.model)

    def load(self, weights: Weights) -> None:
        if layerwise is not None:
            # It keeps tensors until their layer is complete, and the ring's bytes change before that.
            weights = [(name, tensor.clone()) for name, tensor in weights]
        self.model.load_weights(weights)

    def finish(self) -> None:
        """Also after a failure: layers that got nothing take their old tensors back."""
        if layerwise is not None:
            layerwise.finalize_layerwise_reload(self.model, self.config)
            return
        from vllm.model_executor.model_loader.utils import process_weights_after_loading

        process_weights_after_loading(self.model, self.config, self.device)


def _loads(worker: Any) -> list[_Load]:
    """The model, and the draft model of speculative decoding where there is one."""
    runner = worker.model_runner
    loads = [_Load(runner.model, worker.model_config, worker.device)]
    draft = getattr(getattr(runner, "drafter", None), "model", None)
    if isinstance(draft, torch.nn.Module):
        speculative = getattr(worker.vllm_config, "speculative_config", None)
        config = getattr(speculative, "draft_model_config", None) or worker.model_config
        loads.append(_Load(draft, config, worker.device))
    return loads


def update_worker(worker: Any, endpoints: dict[str, str]) -> None:
    """Takes one update into the models of a vLLM worker."""
    kind = current_platform.device_type
    if kind == "npu" and worker.device is None:
        # vllm-ascend leaves it open.
        worker.device = torch.device(f"npu:{worker.local_rank}")
    uuid, endpoint = endpoint_of(endpoints, kind, worker.device.index, worker.rank)
    with set_current_vllm_config(worker.vllm_config), torch.no_grad():
        _take(_loads(worker), uuid, endpoint, worker.device)


def _take(loads: list[_Load], uuid: str, endpoint: str, device: torch.device, finish: bool = True) -> None:
    finished = False

    def run(weights: Weights) -> None:
        for load in loads:
            load.load(weights)

    def post_hook() -> None:
        nonlocal finished
        if finish:
            finished = True
            for load in loads:
                load.finish()

    for load in loads:
        load.start()
    try:
        update_weights_from_ipc(None, endpoint, device.index, run=run, post_hook=post_hook, uuid=uuid)
    except BaseException:
        if not finished and layerwise is not None:
            # The engine stays loadable; what it holds may be mixed.
            for load in loads:
                load.finish()
        raise


def register() -> None:
    """Makes the backend known: vLLM calls this in each of its processes."""
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        return  # this version has no such API; the worker extension does without
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "ckpt_engine.vllm_backend", "CkptWeightTransferEngine")
