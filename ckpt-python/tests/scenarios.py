"""What the ranks of a test do; each prints one JSON object last. Not collected by pytest: see `ranks.py`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading

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


def _one_tells(server: ParameterServer, weights: dict[str, torch.Tensor]) -> bool:
    held: list[dict[str, torch.Tensor]] = [{} for _ in range(WORLD_SIZE)]

    def tell(pairs: list[tuple[str, str]]) -> None:
        if RANK != 0:
            return

        def take(number: int, uuid: str, endpoint: str) -> None:
            load = held[number].update
            run = lambda bucket: load((name, tensor.clone()) for name, tensor in bucket)  # noqa: E731
            update_weights_from_ipc(None, endpoint, None, run=run, uuid=uuid, timeout=60)

        engine = [threading.Thread(target=take, args=(number, *pair)) for number, pair in enumerate(pairs)]
        for worker in engine:
            worker.start()
        for worker in engine:
            worker.join()

    server.update("step-2", tell, timeout=60)
    return RANK != 0 or all(same(one, weights) for one in held)


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

        # As with real engines, the first rank tells all workers and the others tell nobody.
        result["one_tells"] = _one_tells(server, second)
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


def compat() -> dict:
    """checkpoint-engine's names, as trainers use them."""
    import pickle

    import checkpoint_engine.distributed as dist
    from checkpoint_engine import H2DBucket
    from checkpoint_engine import ParameterServer as Compat
    from checkpoint_engine.ps import _gen_h2d_buckets, _to_named_tensor
    from checkpoint_engine.worker import _extract_weights
    from checkpoint_engine.worker import update_weights_from_ipc as take

    weights = {name: tensor for name, tensor in model(5).items() if tensor.numel()}
    result: dict = {}
    server = Compat(auto_pg=False, device="host")
    try:
        server.gather_metas("a")
        result["needs_group"] = False
    except RuntimeError:
        result["needs_group"] = True
    dist.use_backend("vllm_nccl")
    server.init_process_group()
    result["default_left_alone"] = not torch.distributed.is_initialized()
    result["initialized"] = dist.is_initialized()
    server.register_checkpoint("a", named_tensors=share(weights), use_shared_memory_pool=True)
    pool = server._memory_pool[server.shared_memory_pool_name]
    result["pool"] = server._current_shared_memory_pool_user == "a" and sum(len(b.metas) for b in pool) == len(share(weights))
    server.gather_metas("a")
    metas = server._current_global_parameter_metas
    result["metas"] = sorted(metas) == list(range(WORLD_SIZE)) and server.get_metas() is metas
    links = server._local_rdma_devices
    result["links"] = sorted(sum(map(list, links.values()), [])) == list(range(WORLD_SIZE)) and links == server._remote_rdma_devices

    # Moving buckets by hand, as trainers' own backends do: each owner's bytes are read and broadcast.
    held: dict[str, torch.Tensor] = {}
    everybody = dist.new_group(list(range(WORLD_SIZE)))
    only_last = dist.new_group([WORLD_SIZE - 1])
    result["outside"] = (only_last.handle is None) == (RANK != WORLD_SIZE - 1)
    for receiver, owner, bucket in _gen_h2d_buckets(metas, 1 << 20, links, links, [WORLD_SIZE - 1]):
        assert isinstance(bucket, H2DBucket) and receiver == WORLD_SIZE - 1
        buffer = torch.zeros(bucket.size, dtype=torch.uint8)
        if RANK == receiver:
            server._p2p_store.register_named_tensors({"buffer": buffer})
            server._copy_to_buffer("a", bucket, buffer, owner)
            assert server._p2p_store.unregister_named_tensors(["buffer"]) == 1
        dist.broadcast(buffer, src=receiver, group=everybody)
        held |= {name: t.clone() for name, t in _extract_weights(_to_named_tensor(bucket.items), buffer)}
    result["moved"] = same(held, weights)
    own = _gen_h2d_buckets({RANK: metas[RANK]}, 1 << 20, links, links)
    buffer = torch.zeros(own[0][2].size, dtype=torch.uint8)
    server._copy_to_buffer("a", own[0][2], buffer)
    local = dict(_extract_weights(_to_named_tensor(own[0][2].items), buffer))
    result["local"] = same(local, {name: weights[name] for name in local})

    total = torch.tensor([RANK + 1])
    dist.all_reduce(total)
    result["reduced"] = total.item() == WORLD_SIZE * (WORLD_SIZE + 1) // 2
    objects: list = [None] * WORLD_SIZE
    dist.all_gather_object(objects, {"rank": RANK})
    result["objects"] = objects == [{"rank": rank} for rank in range(WORLD_SIZE)]
    dist.all_gather_object(objects, RANK, group=everybody)
    result["objects_of_group"] = objects == list(range(WORLD_SIZE))
    dist.barrier(group=everybody)
    dist.barrier()

    worker = Worker(server)

    def tell(pairs: list[tuple[str, str]]) -> None:
        take(None, dict(pairs)[server.device_uuid], None, run=worker.load, post_hook=worker.hook)

    result["updated"] = server.update("a", tell) is None and same(worker.held, weights)
    # Metas as a trainer saves them: the engine's own keys survive.
    server.load_metas(pickle.loads(pickle.dumps(server.get_metas())))
    worker = Worker(server)
    server.update("a", tell, ranks=[WORLD_SIZE - 1])
    result["joined"] = RANK != WORLD_SIZE - 1 or same(worker.held, weights)
    dist.barrier()
    server.unregister_checkpoint("a", force=True)
    server.unregister_checkpoint("unknown")
    result["freed"] = server._memory_pool == {server.shared_memory_pool_name: []}
    dist.destroy_process_group()
    result["destroyed"] = not dist.is_initialized()
    server.close()
    return result


def kimi(source: str) -> dict:
    """verl's backend for checkpoint-engine, with two trainers and the rest rollouts."""
    import importlib.util

    name = "verl.checkpoint_engine.kimi_checkpoint_engine"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    # The master's port is what the test chose for all ranks.
    host, port = os.environ.pop("CKPT_HUB_ADDRESS").split(":")
    trainers, rollouts = 2, WORLD_SIZE - 2
    engine = module.KIMICheckpointEngine(1 << 20, is_master=RANK == 0)
    engine.prepare()
    master = module.MasterMetadata(zmq_ip=None, zmq_port=None, dist_ip=host, dist_port=int(port))
    weights = {n: t.detach().contiguous() for n, t in model(6).items() if t.numel() and t.dtype.is_floating_point}
    engine.init_process_group(RANK, trainers, rollouts, master)
    result: dict = {"same": None}

    async def take() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() async for name, tensor in engine.receive_weights()}

    for _ in range(2):
        if RANK < trainers:
            asyncio.run(engine.send_weights(iter(weights.items())))
        else:
            result["same"] = same(asyncio.run(take()), {n: t.to(torch.bfloat16) for n, t in weights.items()})
        engine.finalize()
    engine.parameter_server.close()
    return result


def gpu_worker(package: str, endpoints: str) -> dict:
    """A worker on this process's CUDA device, of `package`."""
    import importlib

    import zmq

    update = importlib.import_module(f"{package}.worker").update_weights_from_ipc
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid!s}"
    held: dict[str, torch.Tensor] = {}
    hooks: list[int] = []
    update(
        zmq.Context(),
        json.loads(endpoints)[uuid],
        0,
        run=lambda weights: held.update((name, tensor.clone()) for name, tensor in weights),
        post_hook=lambda: hooks.append(1),
    )
    large = {f"large.{i}": torch.randn(4096, 2048, generator=torch.Generator().manual_seed(i)) for i in range(8)}
    expected = large | {n: t for n, t in model(3).items() if t.dtype != torch.complex64}
    device = {tensor.device.type for tensor in held.values()}
    equal = same({name: tensor.cpu() for name, tensor in held.items()}, expected)
    return {"same": equal, "hooks": len(hooks), "device": "".join(device)}


def main() -> None:
    torch.set_num_threads(1)
    name, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](*arguments)))


if __name__ == "__main__":
    main()
