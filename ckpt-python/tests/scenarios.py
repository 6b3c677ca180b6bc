"""What the ranks of a test do; each prints one JSON object last. Not collected by pytest: see `ranks.py`."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import torch
from ckpt_engine import Error, ParameterServer, update_weights_from_ipc

RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def model(seed: int) -> dict[str, torch.Tensor]:
    """Every kind of tensor that a checkpoint has: dtypes, gaps, scalars, nothing at all."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {f"layers.{i}.weight": random(64, 32).to(torch.bfloat16) for i in range(12)}
    weights |= {
        "embed": random(1000, 64).to(torch.float16),
        "transposed": random(40, 24).t(),
        "sliced": random(33, 7)[::2, 1:],
        "fp8": random(16, 16).to(torch.float8_e4m3fn),
        "fp8.scale": random(1),
        "scalar": random(1)[0],
        "empty": torch.empty(0, 4),
        "ids": torch.arange(77, dtype=torch.int64) * seed,
        "flags": random(5) > 0,
        "complex": torch.complex(random(3), random(3)).conj(),
        "parameter": torch.nn.Parameter(random(9, 9)),
    }
    return weights


def share(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(list(weights.items())[RANK::WORLD_SIZE])


def same(held: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> bool:
    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        b = b.detach().resolve_conj().contiguous()
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)

    def raw(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""

    return held.keys() == weights.keys() and all(equal(held[name], weights[name]) for name in weights)


class Worker:
    """A torch worker: what an engine's process does when it is told its endpoint."""

    def __init__(self, server: ParameterServer) -> None:
        self.server = server
        self.held: dict[str, torch.Tensor] = {}
        self.hooks = 0
        self.pairs: list[tuple[str, str]] = []
        self.fail_with = ""

    def load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        if self.fail_with:
            raise ValueError(self.fail_with)
        self.held.update((name, tensor.clone()) for name, tensor in weights)

    def hook(self) -> None:
        self.hooks += 1

    def __call__(self, pairs: list[tuple[str, str]]) -> None:
        self.pairs = pairs
        uuid = self.server.device_uuid
        endpoint = dict(pairs)[uuid]
        update_weights_from_ipc(None, endpoint, None, run=self.load, post_hook=self.hook, uuid=uuid, timeout=60)


def updates(protocol: str) -> dict:
    """Broadcast, P2P to half of the ranks, a worker that fails, and an update after that."""
    result: dict = {}
    with ParameterServer(device="host", worker_protocol=protocol, bucket_mib=1) as server:
        first, second = model(1), model(2)
        server.register_checkpoint("step-1", named_tensors=share(first))
        server.gather_metas("step-1")
        worker = Worker(server)
        report = server.update("step-1", worker, timeout=60)
        result["broadcast"] = same(worker.held, first) and worker.hooks == 1
        result["ordered"] = [uuid.rpartition("-")[2] for uuid, _ in worker.pairs] == [str(r) for r in range(WORLD_SIZE)]
        result["report"] = (report["tensors"], report["version"], report["p2p"])

        assert server.unregister_checkpoint("step-1") and not server.unregister_checkpoint("step-1")
        server.register_checkpoint("step-2", named_tensors=share(second), use_shared_memory_pool=True)
        server.gather_metas("step-2")
        worker = Worker(server)
        ranks = list(range(WORLD_SIZE // 2))
        report = server.update("step-2", worker, ranks=ranks, timeout=60)
        member = RANK in ranks
        result["p2p"] = (report.get("p2p") is True and same(worker.held, second)) if member else report == {}
        server.store_based_barrier()

        worker = Worker(server)
        if RANK == WORLD_SIZE - 1:
            worker.fail_with = "there is no parameter called lm_head"
        try:
            server.update("step-2", worker, timeout=60)
        except Error as error:
            result["error"], result["kind"] = str(error), error.kind
        result["hook_after_error"] = worker.hooks
        server.store_based_barrier()

        def refuse(_: list[tuple[str, str]]) -> None:
            raise ConnectionError("the engine answered 500: no such model")

        worker = Worker(server)
        try:
            server.update("step-2", refuse if RANK == 0 else worker, timeout=60)
        except Error as error:
            result["refused"], result["cause"] = str(error), type(error.__cause__).__name__
        server.store_based_barrier()

        worker = Worker(server)
        asyncio.run(server.update_async("step-2", worker, timeout=60))
        result["again"] = same(worker.held, second)
        result["metas"] = sum(
            len(buffer["metas"]) for of in server.get_metas().values() for buffer in of["memory_buffer_metas_list"]
        )
        views = server.tensors("step-2")
        result["views"] = same({name: views[name] for name in share(second)}, share(second))
    return result


def main() -> None:
    torch.set_num_threads(1)
    name, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](*arguments)))


if __name__ == "__main__":
    main()
