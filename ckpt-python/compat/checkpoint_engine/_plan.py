"""How checkpoint-engine packs tensors into buckets and gives them to receivers. The engine's own planner is another one;
this is for code that moves buckets by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any, TypeVar

from .data_types import BucketRange, H2DBucket, MemoryBufferMetaList, MemoryBufferMetas, ParameterMeta

logger = logging.getLogger(__name__)

T = TypeVar("T")
_NOTHING: Any = object()


def _to_named_tensor(metas: list[ParameterMeta], offset: int = 0) -> list[dict]:
    """What a worker is told of tensors that lie one after the other from `offset` on."""
    told = []
    for meta in metas:
        told.append({"name": meta.name, "dtype": meta.dtype, "shape": meta.shape, "offset": offset})
        offset += meta.aligned_size
    return told


def _gen_h2d_buckets(
    global_metas: dict[int, MemoryBufferMetaList],
    bucket_size: int,
    local_topo: dict[str, set[int]],
    remote_topo: dict[str, set[int]],
    ranks: list[int] | None = None,
) -> list[tuple[int, int, H2DBucket]]:
    """(receiver, owner, bucket) for everything that is held; without `ranks` the owner is its own receiver."""
    packed: list[tuple[int, H2DBucket]] = []
    for owner, held in global_metas.items():
        buckets = list(_pack(held.memory_buffer_metas_list, bucket_size))
        assert buckets[-1].size > 0, f"rank {owner} is named and holds nothing"
        packed += [(owner, bucket) for bucket in buckets]
    if not ranks:
        return [(owner, owner, bucket) for owner, bucket in packed]
    chosen = set(ranks)
    links = {link: members & chosen for link, members in local_topo.items() if members & chosen}
    return _assign_receiver_ranks(packed, links, remote_topo)


def _pack(buffers: list[MemoryBufferMetas], bucket_size: int) -> Iterator[H2DBucket]:
    """Consecutive tensors of one owner; a bucket is closed when the next tensor does not fit."""
    bucket = H2DBucket(size=0, ranges=[], items=[])
    for idx, buffer in enumerate(buffers):
        begun = end = 0
        for meta in buffer.metas:
            if bucket.size + meta.aligned_size > bucket_size:
                if end > begun:
                    bucket.ranges.append(BucketRange(idx, begun, end - begun))
                yield bucket
                bucket = H2DBucket(size=0, ranges=[], items=[])
                begun = end
            end += meta.aligned_size
            bucket.size += meta.aligned_size
            bucket.items.append(meta)
        bucket.ranges.append(BucketRange(idx, begun, end - begun))
    yield bucket


def _assign_receiver_ranks(
    buckets: list[tuple[int, T]], local_topo: dict[str, set[int]], remote_topo: dict[str, set[int]]
) -> list[tuple[int, int, T]]:
    """The lowest rank of each link receives; in a round no two receivers read over the same link of the owners."""
    if not buckets:
        logger.warning("there are no buckets to receive")
        return []
    link_of = {rank: link for link, members in remote_topo.items() for rank in members}
    by_link: dict[str, list[tuple[int, T]]] = {}
    for owner, bucket in buckets:
        by_link.setdefault(link_of[owner], []).append((owner, bucket))
    rounds = zip_longest(*by_link.values(), fillvalue=_NOTHING)
    queue = [entry for column in rounds for entry in column if entry is not _NOTHING]
    receivers = [min(members) for members in local_topo.values()][: min(len(local_topo), len(by_link))]
    assigned: list[tuple[int, int, T]] = []
    while len(assigned) < len(queue):
        busy: set[str] = set()
        for receiver in receivers:
            if len(assigned) == len(queue):
                break
            owner, bucket = queue[len(assigned)]
            if link_of[owner] in busy:
                break
            busy.add(link_of[owner])
            assigned.append((receiver, owner, bucket))
    return assigned
