"""Loads verl's real base class, with stand-ins for what it imports besides, and looks at our backend with it.

Run as a program with the folder that has verl; prints JSON.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import inspect
import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

BASE = "verl.checkpoint_engine.base"


class Stand(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Ray, and all of verl but its base class."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in ("ray", "verl") and name != BASE:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> object:
        module = MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: object) -> None: ...


def main(peers: str) -> None:
    sys.meta_path.insert(0, Stand())
    for name in ("verl", "verl.checkpoint_engine"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(peers, *name.split(".")))]
        sys.modules[name] = package
    base = __import__(BASE, fromlist=["CheckpointEngine"])
    import ckpt_engine.verl

    ours = base.CheckpointEngineRegistry.get("ckpt_engine")
    assert ours is ckpt_engine.verl.CkptCheckpointEngine
    engine = base.CheckpointEngineRegistry.new("ckpt_engine", bucket_size=1 << 20)
    master = base.CheckpointEngineRegistry.new("ckpt_engine", bucket_size=1 << 20, is_master=True)
    methods = {}
    for name in sorted(base.CheckpointEngine.__abstractmethods__):
        theirs = list(inspect.signature(getattr(base.CheckpointEngine, name)).parameters)
        own = list(inspect.signature(getattr(ours, name)).parameters)
        # Positions count for build_topology, names for the rest.
        methods[name] = len(theirs) == len(own) if name == "build_topology" else name == "init_process_group" or theirs == own
    metadata = [master.prepare(), engine.prepare(), engine.prepare()]
    trainers, rollouts = ours.build_topology(1, 2, metadata)
    # The manager adds `method` and hands one element to each process.
    sizes = {len(values) for values in trainers.values()}, {len(values) for values in rollouts.values()}
    inspect.signature(ours.init_process_group).bind(engine, **{name: values[0] for name, values in rollouts.items()})
    print(
        json.dumps(
            {
                "subclass": issubclass(ours, base.CheckpointEngine) and not ours.__abstractmethods__,
                "wire_format": ours.wire_format == "named_tensors",
                "methods": methods,
                "sizes": sizes == ({1}, {2}),
                "generator": inspect.isasyncgenfunction(ours.receive_weights),
                "coroutine": inspect.iscoroutinefunction(ours.send_weights),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
