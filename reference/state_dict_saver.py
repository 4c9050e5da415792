"""`save` and its relatives: they find the group, and drive the engine's protocol on it."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter
from typing_extensions import deprecated

from .async_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save
from .collectives import checked_coordinator, membership, run_alone, run_on_group
from .engine import save_protocol
from .gc_pause import gc_paused_in_main_thread
from .metadata import warn_if_partial
from .open_storage import open_writer, takes_storage_second

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "async_save", "save", "save_state_dict"]


@takes_storage_second("storage_writer")
def save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Metadata:
    """Save `state_dict` and return the checkpoint's metadata. All ranks of the group must call this.

    A rank that fails never leaves another waiting: every rank then raises the same.

    Args:
        state_dict: values may be tensors, DTensors, objects, nested mappings and lists of these, or `Stateful`.
        checkpoint_id: a folder, made if needed; or what `storage_writer` takes it to mean.
        storage_writer: default: a `FileSystemWriter` on `checkpoint_id`.
        planner: default: a `DefaultSavePlanner`.
        process_group: default: the default group.
        no_dist: save from this process alone, whatever is initialised; warns if that is a part of some tensor only.
        use_collectives: False writes one checkpoint per rank into the same folder, each with its own metadata file and
            no global plan. Ranks still tell each other at the end whether all is well.

    Raises:
        CheckpointException: on every rank, with each failing rank's error and traceback. It derives from
            `BaseException`, as in torch.
        StorageSetupError: one process alone, and neither `checkpoint_id` nor `storage_writer` tells where to.
        ValueError: this rank is not in the group.

    Source: torch.distributed.checkpoint.state_dict_saver.
    """
    group, rank, world_size = membership(process_group, no_dist)
    if world_size == 1:  # Nobody else is waiting: what is wrong with the arguments need not be wrapped.
        storage_writer, checkpoint_id = open_writer(storage_writer, checkpoint_id), None
    protocol = save_protocol(
        state_dict,
        rank=rank,
        world_size=world_size,
        open_storage=lambda: open_writer(storage_writer, checkpoint_id),
        planner=planner,
        use_collectives=use_collectives,
    )
    with gc_paused_in_main_thread():
        metadata = run_alone(protocol) if world_size == 1 else run_on_group(protocol, group)
    if use_collectives and world_size == 1:
        warn_if_partial(metadata, stacklevel=4)
    return metadata


@deprecated(
    "`save_state_dict` is deprecated and will be removed in future versions. Please use `save` instead.",
    category=FutureWarning,
)
def save_state_dict(  # noqa: PLR0917  torch's signature
    state_dict: dict[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
) -> Metadata:
    """Save `state_dict` as it is and return the metadata: what `save` was before it knew `Stateful`.

    Args:
        state_dict: as in `save`; a `Stateful` value is an object like any other.
        storage_writer: as in `save`.
        process_group: as in `save`.
        coordinator_rank: the rank in `process_group` that plans and commits.
        no_dist: as in `save`.
        planner: as in `save`.

    Raises:
        CheckpointException: as `save`.
        ValueError: there is no such rank.

    Source: torch.distributed.checkpoint.state_dict_saver.
    """
    storage_writer.reset()
    return _save_state_dict(state_dict, storage_writer, process_group, coordinator_rank, no_dist, planner)


def _save_state_dict(  # noqa: PLR0917  torch's signature
    state_dict: dict[str, Any],
    storage_writer: StorageWriter,
    process_group: dist.ProcessGroup | None = None,
    coordinator_rank: int = 0,
    no_dist: bool = False,
    planner: SavePlanner | None = None,
    use_collectives: bool = True,
) -> Metadata:
    group, rank, world_size = membership(process_group, no_dist)
    protocol = save_protocol(
        state_dict,
        rank=rank,
        world_size=world_size,
        open_storage=lambda: storage_writer,
        planner=planner,
        use_collectives=use_collectives,
        coordinator=checked_coordinator(coordinator_rank, world_size),
        asks_stateful=False,
    )
    return run_alone(protocol) if world_size == 1 else run_on_group(protocol, group, coordinator_rank)
