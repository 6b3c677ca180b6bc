"""The backend for verl, driven as verl's manager drives it: two trainers, four rollouts, on host memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from scenarios import model, same

TRAINERS, ROLLOUTS = 2, 4
LONG = 300
STAND_IN = str(Path(__file__).parent / "stand_in")


def source(seed: int, scratch: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every tensor in the same memory: whoever is not done with one when it asks for the next finds other bytes."""
    for name, tensor in model(seed).items():
        tensor = tensor.detach().resolve_conj().contiguous()
        if tensor.nbytes == 0:
            yield name, tensor
            continue
        place = scratch[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        yield name, place
        scratch.fill_(255)


def expected(seed: int) -> dict[str, torch.Tensor]:
    weights = {name: tensor.detach() for name, tensor in model(seed).items()}
    cast = {n for n, t in weights.items() if t.dtype.is_floating_point and t.dtype.itemsize > 1}
    return {n: t.to(torch.bfloat16) if n in cast else t for n, t in weights.items()}


async def take(engine: object, seed: int, fail: bool) -> bool:
    held = {}
    async for name, tensor in engine.receive_weights(global_steps=seed):
        if fail:
            raise ValueError("the rollout has no parameter of this name")
        held[name] = tensor.clone()
    return same(held, expected(seed))


def process(pipe: Connection, is_master: bool, runtime: str) -> None:
    """One actor: calls methods as it is told."""
    import asyncio

    sys.path.insert(0, STAND_IN)
    os.environ |= {"CKPT_RUNTIME_DIR": runtime, "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    import ckpt_engine.verl  # noqa: F401
    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    options = {"is_master": True} if is_master else {}
    engine = CheckpointEngineRegistry.new(
        "ckpt_engine", bucket_size=1 << 20, device="host", address="127.0.0.1", timeout=60, **options
    )
    while (order := pipe.recv()) is not None:
        method, arguments = order
        try:
            if method == "send":
                result = asyncio.run(engine.send_weights(source(arguments, torch.empty(1 << 20, dtype=torch.uint8))))
            elif method == "receive":
                result = asyncio.run(take(engine, *arguments))
            elif method == "server":
                result = id(engine._server)
            else:
                result = getattr(engine, method)(**arguments)
            pipe.send((True, result))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    engine._leave()


class Manager:
    def __init__(self, pipes: list[Connection]) -> None:
        self.pipes = pipes

    def call(self, orders: list[tuple[str, object]]) -> list[tuple[bool, object]]:
        for pipe, order in zip(self.pipes, orders, strict=True):
            pipe.send(order)
        answers = []
        for pipe in self.pipes:
            assert pipe.poll(LONG), "a process does not answer"
            answers.append(pipe.recv())
        return answers

    def ok(self, orders: list[tuple[str, object]]) -> list[object]:
        answers = self.call(orders)
        assert all(well for well, _ in answers), [text for well, text in answers if not well]
        return [result for _, result in answers]

    def build(self) -> None:
        sys.path.insert(0, STAND_IN)
        try:
            from ckpt_engine.verl import CkptCheckpointEngine
        finally:
            sys.path.remove(STAND_IN)

        metadata = self.ok([("prepare", {})] * len(self.pipes))
        topology = CkptCheckpointEngine.build_topology(TRAINERS, ROLLOUTS, metadata)
        orders: list[tuple[str, object]] = []
        for kwargs, size in zip(topology, (TRAINERS, ROLLOUTS), strict=True):
            assert all(len(values) == size for values in kwargs.values())
            orders += [("init_process_group", {k: v[i] for k, v in kwargs.items()}) for i in range(size)]
        self.ok(orders)

    def sync(self, seed: int, failing: int | None = None) -> list[tuple[bool, object]]:
        self.build()
        send = [("send", seed)] * TRAINERS
        receive = [("receive", (seed, rank == failing)) for rank in range(ROLLOUTS)]
        answers = self.call(send + receive)
        self.ok([("finalize", {})] * len(self.pipes))
        return answers


@contextmanager
def manager() -> Iterator[Manager]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ckpt-") as runtime:
        ends = [context.Pipe() for _ in range(TRAINERS + ROLLOUTS)]
        processes = [
            context.Process(target=process, args=(child, rank == 0, runtime), daemon=True)
            for rank, (_, child) in enumerate(ends)
        ]
        for one in processes:
            one.start()
        try:
            yield Manager([parent for parent, _ in ends])
            for parent, _ in ends:
                parent.send(None)
            for one in processes:
                one.join(30)
        finally:
            for one in processes:
                one.kill()


def test_trainers_send_and_rollouts_receive_as_verls_manager_drives_them() -> None:
    with manager() as driven:
        for seed in (1, 2):
            answers = driven.sync(seed)
            assert all(well for well, _ in answers), answers
            assert [result for _, result in answers[TRAINERS:]] == [True] * ROLLOUTS
            servers = driven.ok([("server", None)] * len(driven.pipes))
            assert seed == 1 or servers == before, "the group was built anew"
            before = servers
        # A consumer that fails fails everybody, and the next synchronisation works.
        answers = driven.sync(3, failing=1)
        assert not any(well for well, _ in answers)
        assert all("the rollout has no parameter" in text or "consumer left" in text for _, text in answers), answers
        answers = driven.sync(4)
        assert all(well for well, _ in answers), answers
        assert [result for _, result in answers[TRAINERS:]] == [True] * ROLLOUTS


@pytest.mark.peer
def test_verls_own_base_class_and_registry_take_the_backend() -> None:
    peers = os.environ.get("CKPT_TEST_PEERS")
    assert peers, "set CKPT_TEST_PEERS to the folder that has the real packages"
    command = [sys.executable, str(Path(__file__).parent / "verl_contract.py"), peers]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(found.pop("methods").values()) and all(found.values()), done.stdout


def test_a_dtype_may_be_text() -> None:
    sys.path.insert(0, STAND_IN)
    try:
        from ckpt_engine.verl import CkptCheckpointEngine
    finally:
        sys.path.remove(STAND_IN)
    assert CkptCheckpointEngine(1, rollout_dtype="float16").rollout_dtype is torch.float16
    assert CkptCheckpointEngine(1, rollout_dtype=None).rollout_dtype is None
    with pytest.raises(ValueError, match="no dtype"):
        CkptCheckpointEngine(1, rollout_dtype="float17")
