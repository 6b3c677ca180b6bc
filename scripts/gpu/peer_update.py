"""Times checkpoint-engine itself: its parameter server and its worker loop, as installed.

    peer_update.py RANKS [--shape qwen3-8b|qwen:LAYERS] [--iterations N]

Each rank owns 1/RANKS of the checkpoint and has one worker process that copies every tensor into preallocated
parameters. The last line of stdout is one JSON object.
"""
import argparse
import json
import os
import socket
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from stubs import without_http_packages  # noqa: E402

without_http_packages()
import torch  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

LIMIT = 120


def shapes(layers, hidden=4096, intermediate=12288, key_value=1024, vocabulary=151936):
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        prefix = f"model.layers.{i}."
        yield prefix + "self_attn.q_proj.weight", (hidden, hidden)
        yield prefix + "self_attn.k_proj.weight", (key_value, hidden)
        yield prefix + "self_attn.v_proj.weight", (key_value, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, hidden)
        yield prefix + "mlp.gate_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.up_proj.weight", (intermediate, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, intermediate)
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_norm.weight", (128,)
        yield prefix + "self_attn.k_norm.weight", (128,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def tiny(count):
    for i in range(count):
        yield f"model.layers.{i // 1000}.tensors.{i % 1000}.weight", (128,)


def tensors_of(shape):
    kind, _, number = shape.partition(":")
    if kind == "qwen3-8b":
        return list(shapes(36))
    if kind == "qwen":
        return list(shapes(int(number)))
    if kind == "tiny":
        return list(tiny(int(number)))
    raise SystemExit(f"unknown shape {shape}")


def worker(rank, shape, orders, answers):
    import zmq
    from checkpoint_engine.worker import update_weights_from_ipc

    torch.cuda.set_device(rank)
    parameters = {name: torch.zeros(size, dtype=torch.bfloat16, device="cuda") for name, size in tensors_of(shape)}

    def load(weights):
        for name, tensor in weights:
            parameters[name].copy_(tensor)

    context = zmq.Context()
    answers.put("ready")
    while True:
        order = orders.get()
        if order is None:
            break
        uuid, endpoints = order
        update_weights_from_ipc(context, dict(endpoints)[uuid], rank, run=load)
        answers.put("done")


def rank_main(rank, world, shape, iterations, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from loguru import logger

    logger.remove()
    context = mp.get_context("spawn")
    orders, answers = context.Queue(), context.Queue()
    process = context.Process(target=worker, args=(rank, shape, orders, answers))
    process.start()
    assert answers.get(timeout=LIMIT) == "ready"
    torch.cuda.set_device(rank)
    import checkpoint_engine.distributed as dist
    from checkpoint_engine.ps import ParameterServer

    result = {"peer": "checkpoint-engine", "ranks": world, "shape": shape}

    def timed(name, call):
        begun = time.perf_counter()
        value = call()
        result[name] = round(time.perf_counter() - begun, 4)
        return value

    server = timed("construct_s", lambda: ParameterServer(auto_pg=True))
    generator = torch.Generator().manual_seed(7)
    own, total, count = {}, 0, 0
    for i, (name, size) in enumerate(tensors_of(shape)):
        total += torch.Size(size).numel() * 2
        count += 1
        if i % world == rank:
            tensor = torch.empty(size, dtype=torch.bfloat16)
            tensor.view(torch.int16).random_(0, 16000, generator=generator)
            own[name] = tensor
    timed("register_s", lambda: server.register_checkpoint("c", named_tensors=own))
    timed("gather_metas_first_s", lambda: server.gather_metas("c"))
    timed("gather_metas_s", lambda: server.gather_metas("c"))
    updates = []
    for _ in range(iterations):
        begun = time.perf_counter()
        server.update("c", lambda endpoints: orders.put((server._device_uuid, endpoints)))
        updates.append(round(time.perf_counter() - begun, 4))
        assert answers.get(timeout=LIMIT) == "done"
        time.sleep(0.5)
    orders.put(None)
    process.join()
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        print(json.dumps({**result, "tensors": count, "tensor_bytes": total, "updates_s": updates}), flush=True)


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("ranks", type=int)
    options.add_argument("--shape", default="qwen3-8b")
    options.add_argument("--iterations", type=int, default=4)
    args = options.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_main, args=(args.ranks, args.shape, args.iterations, port), nprocs=args.ranks)


if __name__ == "__main__":
    main()
