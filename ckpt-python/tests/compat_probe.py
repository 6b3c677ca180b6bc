"""Prints what the package `checkpoint_engine` of this Python looks like and answers, as JSON: run for the real one and ours."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import random
import typing

import torch

logging.disable(logging.CRITICAL)

SIGNATURES = [
    "ps.ParameterServer.__init__",
    "ps.ParameterServer.register_checkpoint",
    "ps.ParameterServer.unregister_checkpoint",
    "ps.ParameterServer.gather_metas",
    "ps.ParameterServer.get_metas",
    "ps.ParameterServer.load_metas",
    "ps.ParameterServer.init_process_group",
    "ps.ParameterServer.update",
    "ps.ParameterServer.store_based_barrier",
    "ps.ParameterServer._copy_to_buffer",
    "ps._gen_h2d_buckets",
    "ps._to_named_tensor",
    "ps._assign_receiver_ranks",
    "ps._get_physical_gpu_id",
    "worker.update_weights_from_ipc",
    "worker.VllmColocateWorkerExtension.update_weights_from_ipc",
    "api.request_inference_to_update",
    "device_utils.get_ip",
    "device_utils.npu_generate_uuid",
    "device_utils.DeviceManager.__init__",
    "device_utils.DeviceManager.rdma_device",
    "device_utils._parse_NCCL_IB_HCA",
    "device_utils._get_rdma_devices",
    "device_utils._get_my_rdma_device",
    "device_utils._ibv_get_device_list",
    "p2p_store.P2PStore.__init__",
    "p2p_store.P2PStore.register_named_tensors",
    "p2p_store.P2PStore.unregister_named_tensors",
    "p2p_store.P2PStore.batch_transfer_sync_read",
    "distributed.use_backend",
    "distributed.init_process_group",
    "distributed.destroy_process_group",
    "distributed.is_initialized",
    "distributed.all_gather_object",
    "distributed.all_reduce",
    "distributed.broadcast",
    "distributed.barrier",
    "distributed.new_group",
]
CLASSES = ["ParameterMeta", "BucketRange", "H2DBucket", "MemoryBufferMetas", "MemoryBuffer", "MemoryBufferMetaList", "DataToGather"]
HCAS = ["mlx5_0", "mlx5_1", "mlx5_10", "mlx5_2", "roce0"]
FILTERS = ["", " ", "mlx5", "mlx5_1", "=mlx5_1", "^mlx5", "^=mlx5_0,mlx5_1", "mlx5_0:1, roce", "nothing", "^", "=", "^nothing", "mlx5_1,mlx5_1"]


def find(path: str) -> object:
    module, *names = path.split(".")
    found: object = importlib.import_module(f"checkpoint_engine.{module}")
    for name in names:
        found = getattr(found, name)
    return found


def signature(path: str) -> dict[str, list[str]]:
    parameters = inspect.signature(find(path)).parameters.values()
    default = {inspect.Parameter.empty: "required"}
    return {
        p.name: [p.kind.name, default.get(p.default, repr(p.default)) if isinstance(p.default, type) else repr(p.default)]
        for p in parameters
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self"
    }


def fields(name: str) -> list[str]:
    cls = find(f"data_types.{name}")
    return list(getattr(cls, "model_fields", None) or cls._fields)


def attempt(call: typing.Callable[[], object]) -> object:
    try:
        return call()
    except Exception as error:
        return f"raises {type(error).__name__}"


def metas(seed: int) -> dict:
    """Some ranks' metas, with tensors of all sizes."""
    data = importlib.import_module("checkpoint_engine.data_types")
    choose = random.Random(seed)
    found = {}
    for owner in sorted(choose.sample(range(8), choose.randint(1, 5))):
        buffers = []
        for _ in range(choose.randint(1, 3)):
            sizes = [256 * choose.randint(1, 40) for _ in range(choose.randint(1, 6))]
            held = [
                data.ParameterMeta(name=f"{owner}.{len(buffers)}.{i}", dtype=torch.bfloat16, shape=torch.Size([s // 2]), aligned_size=s)
                for i, s in enumerate(sizes)
            ]
            buffers.append(data.MemoryBufferMetas(metas=held, ptr=4096, size=sum(sizes)))
        found[owner] = data.MemoryBufferMetaList(p2p_store_addr="10.0.0.1:1", memory_buffer_metas_list=buffers, rdma_device="")
    return found


def topology(seed: int) -> dict[str, set[int]]:
    choose = random.Random(seed)
    links = choose.randint(1, 4)
    found: dict[str, set[int]] = {}
    for rank in range(8):
        found.setdefault(f"mlx5_{choose.randrange(links)}@10.0.0.1", set()).add(rank)
    return found


def plan(seed: int) -> object:
    ps = importlib.import_module("checkpoint_engine.ps")
    choose = random.Random(seed)
    ranks = choose.choice([None, [], sorted(choose.sample(range(8), choose.randint(1, 8)))])
    size = 256 * choose.randint(1, 100)
    buckets = ps._gen_h2d_buckets(metas(seed), size, topology(seed + 1), topology(seed + 2), ranks)
    return [
        [receiver, owner, bucket.size, [list(r) for r in bucket.ranges], [item.name for item in bucket.items]]
        for receiver, owner, bucket in buckets
    ]


def text(told: list[dict]) -> list[list]:
    return [[item["name"], str(item["dtype"]), list(item["shape"]), item["offset"], sorted(item)] for item in told]


def main() -> None:
    package = importlib.import_module("checkpoint_engine")
    utils = importlib.import_module("checkpoint_engine.device_utils")
    data = importlib.import_module("checkpoint_engine.data_types")
    ps = importlib.import_module("checkpoint_engine.ps")
    one = {"name": "w", "dtype": "torch.bfloat16", "shape": [2, 3], "aligned_size": 256}
    listed = {"p2p_store_addr": None, "memory_buffer_metas_list": [{"ptr": 1, "size": 256, "metas": [one]}], "rdma_device": "a,b"}
    print(
        json.dumps(
            {
                "version": package.__version__,
                "all": sorted(package.__all__),
                "signatures": {path: signature(path) for path in SIGNATURES},
                "fields": {name: fields(name) for name in CLASSES},
                "hca": {f: attempt(lambda f=f: utils._parse_NCCL_IB_HCA(f, HCAS)) for f in FILTERS},
                "many": utils._parse_NCCL_IB_HCA("mlx", [f"mlx5_{i}" for i in range(40)]),
                "my": {
                    f"{rank} of {gpus} with {count}": attempt(lambda r=rank, g=gpus, c=count: utils._get_my_rdma_device(r, g, HCAS[:c]))
                    for gpus in (1, 2, 4, 8)
                    for count in range(5)
                    for rank in range(gpus)
                },
                "plans": {seed: attempt(lambda s=seed: plan(s)) for seed in range(300)},
                "assigned_nothing": ps._assign_receiver_ranks([], {}, {}),
                "told": text(ps._to_named_tensor([data.ParameterMeta(**one)] * 3, 512)),
                "json": data.MemoryBufferMetaList.model_validate(listed).model_dump_json(),
                "bad": [
                    attempt(lambda v=v: data.ParameterMeta(**(one | v)))
                    for v in ({"dtype": "bfloat16"}, {"dtype": "torch.nothing"}, {"dtype": 3}, {"shape": "no"}, {"name": 3})
                ],
                "backend": attempt(lambda: importlib.import_module("checkpoint_engine.distributed").use_backend("nothing")),
            }
        )
    )


if __name__ == "__main__":
    main()
