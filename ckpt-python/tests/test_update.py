"""Whole jobs on host memory: parameter servers and torch workers, over every worker protocol."""

from __future__ import annotations

import pytest
from ranks import run_ranks
from scenarios import model

TENSORS = len(model(1))


@pytest.mark.parametrize(("world_size", "protocol"), [(2, "ce-0.4"), (4, "native")])
def test_updates(world_size: int, protocol: str) -> None:
    results = run_ranks("updates", world_size, protocol)
    for rank, result in enumerate(results):
        for what in ("broadcast", "ordered", "p2p", "again", "views"):
            assert result[what] is True, (rank, what, result)
        assert result["report"] == [TENSORS, 1, False]
        assert result["metas"] == TENSORS
        assert "there is no parameter called lm_head" in result["error"]
        assert result["hook_after_error"] == 0
        assert result["one_tells"] is True, (rank, result)
        assert "the engine answered 500: no such model" in result["refused"]
    # The rank whose function raised gets the exception itself too.
    assert results[0]["cause"] == "ConnectionError"
