"""Which rank writes what several ranks hold: part of the global plan, on the coordinator only."""

from __future__ import annotations

import heapq
import math
from typing import Any

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

__all__ = ["ReplicaConflictError", "assign_replicas"]


class ReplicaConflictError(ValueError):
    """Ranks describe the same leaf in ways that exclude each other."""


def assign_replicas(all_plans: list[SavePlan], *, to_lowest_rank: bool = False) -> list[list[WriteItem]]:
    """Return, for each rank, the items it shall write: every item once, over all ranks.

    Items held by one rank only stay there. The others go, largest first, to the least loaded of the ranks that hold
    them, where load counts the bytes of chunks (not of the whole tensors they belong to).

    Args:
        all_plans: one plan per rank.
        to_lowest_rank: give each to the lowest rank instead.

    Raises:
        ReplicaConflictError: for one FQN, two ranks give different kinds, shapes, dtypes, or chunk sizes.
    """
    holders: dict[MetadataIndex, list[int]] = {}
    first: dict[MetadataIndex, WriteItem] = {}
    leaves: dict[str, tuple[int, WriteItem]] = {}
    for rank, plan in enumerate(all_plans):
        for item in plan.items:
            seen = leaves.setdefault(item.index.fqn, (rank, item))
            if not _is_same_leaf(seen[1], item):
                raise _conflict(seen, (rank, item))
            ranks = holders.setdefault(item.index, [])
            if not ranks:
                first[item.index] = item
            elif ranks[-1] == rank:
                raise ReplicaConflictError(
                    f"Expected each chunk once per rank but got {item.index.fqn!r} twice on rank {rank}, "
                    f"offset={item.index.offset!r}."
                )
            elif not _is_same_chunk(first[item.index], item):
                raise _conflict((ranks[0], first[item.index]), (rank, item))
            ranks.append(rank)
    writer = _lowest(holders) if to_lowest_rank else _balanced(holders, first, len(all_plans))
    return [[item for item in plan.items if writer[item.index] == rank] for rank, plan in enumerate(all_plans)]


def _lowest(holders: dict[MetadataIndex, list[int]]) -> dict[MetadataIndex, int]:
    return {index: ranks[0] for index, ranks in holders.items()}


def _balanced(
    holders: dict[MetadataIndex, list[int]], items: dict[MetadataIndex, WriteItem], world_size: int
) -> dict[MetadataIndex, int]:
    load = [0] * world_size
    writer: dict[MetadataIndex, int] = {}
    shared = []
    for index, ranks in holders.items():
        if len(ranks) == 1:
            writer[index] = ranks[0]
            load[ranks[0]] += item_bytes(items[index])
        else:
            shared.append(index)
    # Many items have the same holders, so one heap per set of holders finds the least loaded without looking at all.
    # Its loads may be out of date, but only too low: an entry is trusted once it matches.
    heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for index in sorted(shared, key=lambda i: -item_bytes(items[i])):
        together = tuple(holders[index])
        heap = heaps.get(together)
        if heap is None:
            heap = heaps[together] = [(load[rank], rank) for rank in together]
            heapq.heapify(heap)
        while heap[0][0] != load[heap[0][1]]:
            heapq.heapreplace(heap, (load[heap[0][1]], heap[0][1]))
        rank = heap[0][1]
        writer[index] = rank
        load[rank] += item_bytes(items[index])
    return writer


def item_bytes(item: WriteItem) -> int:
    """Return the payload bytes of `item`; an object counts as 1, since its size is not known before it is pickled."""
    data = item.tensor_data
    if data is None:
        return max(1, item.bytes_io_data.nbytes) if item.bytes_io_data is not None else 1
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _is_same_leaf(one: WriteItem, other: WriteItem) -> bool:
    a, b = one.tensor_data, other.tensor_data
    if a is None or b is None:
        return a is b
    return a is b or (a.size == b.size and a.properties.dtype == b.properties.dtype)


def _is_same_chunk(one: WriteItem, other: WriteItem) -> bool:
    a, b = one.tensor_data, other.tensor_data
    return a is None or b is None or a.chunk.sizes == b.chunk.sizes


def _conflict(one: tuple[int, WriteItem], other: tuple[int, WriteItem]) -> ReplicaConflictError:
    ours, theirs = _facts(one[1]), _facts(other[1])
    name = next(name for name, fact in ours.items() if fact != theirs.get(name))
    return ReplicaConflictError(
        f"Expected all ranks to agree on {one[1].index.fqn!r} but got {name}={ours[name]} on rank {one[0]} and "
        f"{name}={theirs.get(name)} on rank {other[0]}. Shard it as a DTensor, or give each its own key."
    )


def _facts(item: WriteItem) -> dict[str, Any]:
    data = item.tensor_data
    if data is None:
        return {"kind": "object"}
    return {
        "kind": "tensor",
        "shape": tuple(data.size),
        "dtype": data.properties.dtype,
        "chunk sizes": tuple(data.chunk.sizes),
    }
