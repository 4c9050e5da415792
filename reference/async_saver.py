"""Saving in the background: copy the state, return to training, write.

    caller's thread    state_dict() of Stateful values --> stage --> future
    background         wait for the copy --> the same protocol as `save`, step by step, in a thread;
                       or the thread has each step done by another process (`process_saver`)

Whatever goes wrong on a rank is carried into the protocol's first step, so that every rank's future hears of it.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter

from .collectives import Protocol, membership, run_alone, run_on_group
from .engine import save_protocol
from .lanes import Lane, lane_for
from .metadata import warn_if_partial
from .open_storage import open_writer
from .process_saver import saving_in_process
from .shared_arena import Arena
from .staged_copy import staged_copy
from .staging import AsyncStager, BlockingAsyncStager, DefaultStager, StagingOptions
from .stateful import is_stateful

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "async_save"]


class AsyncCheckpointerType(Enum):
    """Where the background part runs."""

    THREAD = "thread"
    PROCESS = "process"


@dataclass
class AsyncSaveResponse:
    """What `async_save` returns if the stager copies in the background too.

    Args:
        staging_completion: done once the state may change again; fails with what made staging fail.
        upload_completion: the metadata, once the checkpoint is committed.
    """

    staging_completion: Future[None]
    upload_completion: Future[Metadata]


def async_save(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Future[Metadata] | AsyncSaveResponse:
    """Copy `state_dict`, and save the copy in the background. All ranks of the group must call this, in the same order.

    Once this returns (or once `staging_completion` is done), nothing done to the state can change what is saved. Saves
    of one group run one after the other. The first call on a group makes a private gloo group for its saves, and
    waits for all ranks; later ones do not.

    Args:
        state_dict: as in `save`; `Stateful` values are asked for their state before this returns.
        checkpoint_id: as in `save`.
        storage_writer: as in `save`; if it is an `AsyncStager` itself and no other is given, it stages.
        planner: as in `save`; used in the background.
        process_group: default: the default group. Needs no CPU backend.
        async_checkpointer_type: a thread of this process, or another process.
        async_stager: default: a `DefaultStager` that copies before this returns. Yours to close.
        no_dist: as in `save`.
        use_collectives: as in `save`.

    Returns:
        The future metadata; or an `AsyncSaveResponse` if the stager's `stage` returns a future. The future fails with
        `CheckpointException`, on every rank, whatever failed on any of them. It cannot be cancelled.

    Raises:
        ValueError: this rank is not in the group, or an argument is none that exists.

    Source: torch.distributed.checkpoint.state_dict_saver.
    """
    is_elsewhere = _kind_of(async_checkpointer_type) is AsyncCheckpointerType.PROCESS
    group, rank, world_size = membership(process_group, no_dist)
    lane = lane_for(group, rank, world_size)
    staged: Future[dict[str, Any]] = Future()
    staging_completion: Future[None] = Future()
    is_background = False
    # Without a stager of the caller's, the copy is made right where the other process can take it over.
    arena = Arena() if is_elsewhere and async_stager is None and not _stages_in_its_own_way(storage_writer) else None
    setting = b""
    try:
        if is_elsewhere:
            setting = pickle.dumps((checkpoint_id, storage_writer, planner, use_collectives))
        stager = async_stager or _default_stager(storage_writer, arena)
        is_background = getattr(stager, "is_background", False)
        plain = {key: value.state_dict() if is_stateful(value) else value for key, value in state_dict.items()}
        copied = stager.stage(plain)
        if isinstance(copied, Future):
            is_background = True
            copied.add_done_callback(lambda done: _hand_on(done, staged, staging_completion))
        else:
            _synchronize(stager)
            staged.set_result(copied)
            staging_completion.set_result(None)
    except BaseException as error:  # An interrupt too: the other ranks are about to save, and must hear of it.
        staged.set_exception(error)
        staging_completion.set_exception(error)

    def make_protocol() -> Protocol[Metadata]:
        if is_elsewhere:
            return saving_in_process(lane, staged, arena, setting, use_collectives=use_collectives)
        return _saving_here(
            lane,
            staged,
            open_storage=lambda: open_writer(storage_writer, checkpoint_id),
            planner=planner,
            use_collectives=use_collectives,
        )

    upload = lane.submit(lambda: _run(make_protocol(), lane, is_whole=use_collectives))
    return AsyncSaveResponse(staging_completion, upload) if is_background else upload


def _saving_here(
    lane: Lane,
    staged: Future[dict[str, Any]],
    *,
    open_storage: Callable[[], StorageWriter],
    planner: SavePlanner | None,
    use_collectives: bool,
) -> Protocol[Metadata]:
    state: dict[str, Any] = {}

    def open_once_staged() -> StorageWriter:
        # The first thing that the protocol does, before it looks at the state.
        state.update(staged.result())
        return open_storage()

    return save_protocol(
        state,
        rank=lane.rank,
        world_size=lane.world_size,
        open_storage=open_once_staged,
        planner=planner,
        use_collectives=use_collectives,
        asks_stateful=False,
    )


def _run(protocol: Protocol[Metadata], lane: Lane, *, is_whole: bool) -> Metadata:
    if lane.group is not None:
        return run_on_group(protocol, lane.group)
    metadata = run_alone(protocol)
    if is_whole:
        warn_if_partial(metadata)
    return metadata


class _ArenaStager(BlockingAsyncStager):
    """Copies into an arena."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        copied: dict[str, Any] = staged_copy(state_dict, allocate=self._arena.allocate)
        return copied


def _stages_in_its_own_way(storage_writer: StorageWriter | None) -> bool:
    if not isinstance(storage_writer, AsyncStager):
        return False
    # The stage() of torch's writers and of ours is an ordinary copy.
    return not type(storage_writer).stage.__module__.startswith((__package__ + ".", "torch.distributed.checkpoint."))


def _default_stager(storage_writer: StorageWriter | None, arena: Arena | None) -> AsyncStager:
    if arena is not None:
        return _ArenaStager(arena)
    if isinstance(storage_writer, AsyncStager):
        return storage_writer
    return DefaultStager(StagingOptions(False, False, False, False))


def _kind_of(value: Any) -> AsyncCheckpointerType:
    # By value, so that torch's own enumeration is understood too.
    try:
        return AsyncCheckpointerType(getattr(value, "value", value))
    except ValueError as error:
        raise ValueError(
            f"Expected AsyncCheckpointerType.THREAD or .PROCESS but got async_checkpointer_type={value!r}."
        ) from error


def _synchronize(stager: AsyncStager) -> None:
    if stager.should_synchronize_after_execute:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's protocol marks the method as deprecated
            stager.synchronize_staging()


def _hand_on(done: Future[dict[str, Any]], staged: Future[dict[str, Any]], completion: Future[None]) -> None:
    try:
        staged.set_result(done.result())
        completion.set_result(None)
    except BaseException as error:
        staged.set_exception(error)
        completion.set_exception(error)
