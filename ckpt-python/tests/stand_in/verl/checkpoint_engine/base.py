"""What verl's backends see of verl, from its contract: for a machine without verl."""

from __future__ import annotations

from abc import ABC, abstractmethod


class CheckpointEngineRegistry:
    _registry: dict[str, type] = {}

    @staticmethod
    def register(backend: str):
        def wrap(cls: type) -> type:
            CheckpointEngineRegistry._registry[backend] = cls
            return cls

        return wrap

    @classmethod
    def new(cls, backend: str, *args, **kwargs):
        return cls._registry[backend](*args, **kwargs)


class CheckpointEngine(ABC):
    @abstractmethod
    def prepare(self): ...

    @classmethod
    @abstractmethod
    def build_topology(cls, actor_wg_world_size, rollout_world_size, metadata): ...

    @abstractmethod
    def init_process_group(self, **kwargs): ...

    @abstractmethod
    def finalize(self): ...

    @abstractmethod
    async def send_weights(self, weights, global_steps=None): ...

    @abstractmethod
    async def receive_weights(self, global_steps=None): ...
