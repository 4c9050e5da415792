"""`load` and its relatives: they find the group, and drive the engine's protocol on it."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from typing_extensions import deprecated

from .collectives import checked_coordinator, membership, run_alone, run_on_group
from .engine import load_protocol
from .gc_pause import gc_paused_in_main_thread
from .open_storage import open_reader, takes_storage_second
from .whole_checkpoint import EmptyStateDictLoadPlanner

__all__ = ["load", "load_state_dict"]


@takes_storage_second("storage_reader")
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Fill `state_dict` from a checkpoint, in place. All ranks of the group must call this.

    Tensors keep their memory, objects are replaced in their containers, `Stateful` values get `load_state_dict`. The
    checkpoint may come from any number of ranks and any layout. If planning fails, nothing has changed on any rank;
    if reading fails, tensors may hold a mixture.

    Args:
        state_dict: says what to load and into what; leaves that it lacks are not loaded, unless the planner adds them.
        checkpoint_id: a folder; or what `storage_reader` takes it to mean.
        storage_reader: default: a `FileSystemReader` on `checkpoint_id`.
        planner: default: a `DefaultLoadPlanner`.
        process_group: default: the default group.
        no_dist: load in this process alone.

    Raises:
        CheckpointException: on every rank, with each failing rank's error and traceback.
        StorageSetupError: one process alone, and neither `checkpoint_id` nor `storage_reader` tells where from.
        ValueError: this rank is not in the group.

    Source: torch.distributed.checkpoint.state_dict_loader.
    """
    group, rank, world_size = membership(process_group, no_dist)
    if world_size == 1:  # Nobody else is waiting: what is wrong with the arguments need not be wrapped.
        storage_reader, checkpoint_id = open_reader(storage_reader, checkpoint_id), None
    protocol = load_protocol(
        state_dict,
        rank=rank,
        world_size=world_size,
        open_storage=lambda: open_reader(storage_reader, checkpoint_id),
        planner=planner,
    )
    with gc_paused_in_main_thread():
        if world_size == 1:
            run_alone(protocol)
        else:
            run_on_group(protocol, group)


@deprecated(
    "`load_state_dict` is deprecated and will be removed in future versions. Please use `load` instead.",
    category=FutureWarning,
)
def load_state_dict(  # noqa: PLR0917  torch's signature
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    """Fill `state_dict` from a checkpoint: what `load` was before it knew `Stateful`.

    Args:
        state_dict: as in `load`; a `Stateful` value is an object like any other.
        storage_reader: as in `load`.
        process_group: as in `load`.
        coordinator_rank: the rank in `process_group` that sees all plans.
        no_dist: as in `load`.
        planner: as in `load`.

    Raises:
        CheckpointException: as `load`.
        ValueError: there is no such rank.

    Source: torch.distributed.checkpoint.state_dict_loader.
    """
    storage_reader.reset()
    _load_state_dict(state_dict, storage_reader, process_group, coordinator_rank, no_dist, planner)


def _load_state_dict(  # noqa: PLR0917  torch's signature
    state_dict: dict[str, Any],
    storage_reader: StorageReader,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: LoadPlanner | None = None,
) -> None:
    group, rank, world_size = membership(process_group, no_dist)
    protocol = load_protocol(
        state_dict,
        rank=rank,
        world_size=world_size,
        open_storage=lambda: storage_reader,
        planner=planner,
        coordinator=checked_coordinator(coordinator_rank, world_size),
        asks_stateful=False,
    )
    if world_size == 1:
        run_alone(protocol)
    else:
        run_on_group(protocol, group, coordinator_rank)


def _load_state_dict_from_keys(
    keys: set[str] | str | None = None,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Return what the checkpoint holds under `keys`, whole, on every rank of the group. All of its ranks must call.

    Args:
        keys: FQNs, or names of subtrees; None for everything.
        checkpoint_id: as in `load`.
        storage_reader: as in `load`.
        process_group: as in `load`.

    Raises:
        CheckpointException: as `load`.

    Source: torch.distributed.checkpoint.state_dict_loader.
    """
    loaded: dict[str, Any] = {}
    planner = EmptyStateDictLoadPlanner({keys} if isinstance(keys, str) else keys)
    load(
        loaded,
        checkpoint_id=checkpoint_id,
        storage_reader=storage_reader,
        planner=planner,
        process_group=process_group,
    )
    return loaded
