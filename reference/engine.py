"""The protocol: what each rank does in a save and a load, and when ranks wait for each other.

Both are generators that yield collective requests (see `collectives`) and never communicate themselves:

    save   every rank: plan --gather--> coordinator: global plan --scatter--> every rank: write
           --gather--> coordinator: finish (commit) --broadcast--> every rank: the metadata
    load   every rank: plan --gather--> coordinator: global plan --scatter--> every rank: read
           --gather--> coordinator: all well? --broadcast--> every rank

The calls to planner and storage, and their order, are torch's, so that torch's and third parties' plug in.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Generator
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from .collectives import (
    COORDINATOR,
    Abort,
    Broadcast,
    Failure,
    Gather,
    Message,
    Ok,
    Protocol,
    Request,
    Scatter,
    attempt,
    run_alone,
    run_on_group,
)
from .filesystem import FileSystemReader, FileSystemWriter
from .metadata import MetadataError
from .planner import DefaultLoadPlanner, DefaultSavePlanner
from .stateful import is_stateful

__all__ = ["load", "load_protocol", "save", "save_protocol"]


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
        no_dist: save from this process alone, whatever is initialised.
        use_collectives: False writes one checkpoint per rank, with its own metadata file, and no global plan.

    Raises:
        CheckpointException: on every rank, with each failing rank's error and traceback. It derives from
            `BaseException`, as in torch.

    Source: torch.distributed.checkpoint.state_dict_saver.
    """
    group, rank, world_size = _membership(process_group, no_dist)
    protocol = save_protocol(
        state_dict,
        rank=rank,
        world_size=world_size,
        open_storage=lambda: _open_writer(storage_writer, checkpoint_id),
        planner=planner,
        use_collectives=use_collectives,
    )
    return run_alone(protocol) if world_size == 1 else run_on_group(protocol, group)


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
        state_dict: says what to load and into what; leaves that it lacks are not loaded.
        checkpoint_id: a folder; or what `storage_reader` takes it to mean.
        storage_reader: default: a `FileSystemReader` on `checkpoint_id`.
        planner: default: a `DefaultLoadPlanner`.
        process_group: default: the default group.
        no_dist: load in this process alone.

    Raises:
        CheckpointException: on every rank, with each failing rank's error and traceback.

    Source: torch.distributed.checkpoint.state_dict_loader.
    """
    group, rank, world_size = _membership(process_group, no_dist)
    protocol = load_protocol(
        state_dict,
        rank=rank,
        world_size=world_size,
        open_storage=lambda: _open_reader(storage_reader, checkpoint_id),
        planner=planner,
    )
    if world_size == 1:
        run_alone(protocol)
    else:
        run_on_group(protocol, group)


def save_protocol(
    state_dict: dict[str, Any],
    *,
    rank: int,
    world_size: int,
    open_storage: Callable[[], StorageWriter],
    planner: SavePlanner | None = None,
    use_collectives: bool = True,
) -> Protocol[Metadata]:
    """One rank's part of a save, as a generator of collective requests that returns the metadata.

    Args:
        state_dict: as in `save`.
        rank: of this part; rank 0 is the coordinator.
        world_size: how many parts there are.
        open_storage: gives the ready writer; called inside the first step, so that its failure reaches all ranks.
        planner: as in `save`.
        use_collectives: as in `save`.
    """
    is_coordinator = rank == COORDINATOR
    planner = planner if planner is not None else DefaultSavePlanner()
    storage: Any = None
    metadata: Any = None

    def local_step() -> SavePlan:
        nonlocal storage
        storage = open_storage()
        plain = {key: value.state_dict() if is_stateful(value) else value for key, value in state_dict.items()}
        storage_meta = storage.storage_meta()
        if "storage_meta" in inspect.signature(planner.set_up_planner).parameters:
            planner.set_up_planner(state_dict=plain, storage_meta=storage_meta, is_coordinator=is_coordinator)
        else:
            planner.set_up_planner(plain, is_coordinator)  # type: ignore[arg-type]
        if _takes_kwargs(storage.set_up_storage_writer):
            storage.set_up_storage_writer(is_coordinator, rank=rank, use_collectives=use_collectives)
        else:
            storage.set_up_storage_writer(is_coordinator)
        plan: SavePlan = storage.prepare_local_plan(planner.create_local_plan())
        return plan

    def global_step(plans: list[SavePlan]) -> list[SavePlan]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan(plans)
        prepared: list[SavePlan] = storage.prepare_global_plan(plans)
        return prepared

    def write_step(plan: SavePlan) -> Any:
        writes = storage.write_data(planner.finish_plan(plan), planner)
        writes.wait()
        return writes.value()

    def finish_step(results: list[Any]) -> Metadata:
        storage.finish(metadata=metadata, results=results)
        finished: Metadata = metadata
        return finished

    if use_collectives:
        plan = yield from _plan(rank, world_size, attempt(rank, "plan", local_step), global_step)
        written = _then(rank, "write", plan, write_step)
        saved = yield from _conclude(rank, "write", written, finish_step)
    else:
        own: Message = attempt(rank, "plan", lambda: global_step([local_step()])[0])
        own = _then(rank, "write", _then(rank, "write", own, write_step), lambda results: finish_step([results]))
        yield from _conclude(rank, "write", _without_value(own), lambda _: None)
        saved = own.value if isinstance(own, Ok) else None
    result: Metadata = saved
    return result


def load_protocol(
    state_dict: dict[str, Any],
    *,
    rank: int,
    world_size: int,
    open_storage: Callable[[], StorageReader],
    planner: LoadPlanner | None = None,
) -> Protocol[None]:
    """One rank's part of a load, as a generator of collective requests.

    Args:
        state_dict: as in `load`.
        rank: of this part; rank 0 is the coordinator.
        world_size: how many parts there are.
        open_storage: gives the ready reader; called inside the first step, so that its failure reaches all ranks.
        planner: as in `load`.
    """
    is_coordinator = rank == COORDINATOR
    planner = planner if planner is not None else DefaultLoadPlanner()
    storage: Any = None
    plain: dict[Any, Any] = {}
    stateful: list[Any] = []

    def local_step() -> LoadPlan:
        nonlocal storage
        storage = open_storage()
        # Sorted, because a Stateful may communicate in state_dict(): all ranks must ask theirs in the same order.
        for key in _sorted_keys(state_dict):
            value = state_dict[key]
            if is_stateful(value):
                stateful.append(key)
                value = value.state_dict()
            plain[key] = value
        metadata, is_global = _read_metadata(storage, rank)
        planner.set_up_planner(plain, metadata, is_coordinator)
        if _takes_kwargs(storage.set_up_storage_reader):
            storage.set_up_storage_reader(metadata, is_coordinator, rank=rank, use_collectives=is_global)
        else:
            storage.set_up_storage_reader(metadata, is_coordinator)
        plan: LoadPlan = storage.prepare_local_plan(planner.create_local_plan())
        return plan

    def global_step(plans: list[LoadPlan]) -> list[LoadPlan]:
        prepared: list[LoadPlan] = storage.prepare_global_plan(planner.create_global_plan(plans))
        return prepared

    def read_step(plan: LoadPlan) -> bool:
        storage.read_data(planner.finish_plan(plan), planner).wait()
        return bool(stateful)

    def apply_step() -> None:
        for key in stateful:
            state_dict[key].load_state_dict(plain[key])

    plan = yield from _plan(rank, world_size, attempt(rank, "plan", local_step), global_step)
    has_stateful = yield from _conclude(rank, "read", _then(rank, "read", plan, read_step), any)
    for key in plain.keys() - stateful:
        if state_dict[key] is not plain[key]:
            state_dict[key] = plain[key]
    if has_stateful:
        yield from _conclude(rank, "apply", attempt(rank, "apply", apply_step), lambda _: None)


Step = Generator[Request, Any, Any]


def _plan(
    rank: int, world_size: int, local: Message, make_global: Callable[[list[Any]], list[Any]]
) -> Generator[Request, Any, Message]:
    """Turn every rank's local plan into its final plan. A failure meant for this rank alone is returned, not raised."""
    gathered = yield Gather("plan", local)
    replies: list[Message] | None = None
    if rank == COORDINATOR:
        verdict = _decide(rank, "plan", gathered, lambda plans: _one_per_rank(make_global(plans), world_size))
        replies = [Ok(plan) for plan in verdict.value] if isinstance(verdict, Ok) else [verdict] * world_size
    reply: Message = yield Scatter("plan", replies)
    if isinstance(reply, Abort):
        raise reply.exception()
    return reply


def _conclude(rank: int, step: str, own: Message, combine: Callable[[list[Any]], Any]) -> Step:
    """Combine every rank's outcome on the coordinator, and return the result on all ranks."""
    gathered = yield Gather(step, own)
    reply: Message = yield Broadcast(step, _decide(rank, step, gathered, combine) if rank == COORDINATOR else None)
    if isinstance(reply, Failure):
        reply = Abort(step, (reply,))
    if isinstance(reply, Abort):
        raise reply.exception()
    return reply.value


def _decide(rank: int, step: str, gathered: list[Message], combine: Callable[[list[Any]], Any]) -> Ok | Abort:
    failures = [message for message in gathered if isinstance(message, Failure)]
    if not failures:
        values = [message.value for message in gathered if isinstance(message, Ok)]
        combined = attempt(rank, step, lambda: combine(values))
        if isinstance(combined, Ok):
            return combined
        failures = [combined]
    return Abort(step, tuple(failures))


def _then(rank: int, step: str, before: Message, action: Callable[[Any], Any]) -> Message:
    """Go on with `action` if what came before worked; otherwise pass the failure on."""
    return attempt(rank, step, lambda: action(before.value)) if isinstance(before, Ok) else before


def _without_value(message: Message) -> Message:
    return Ok() if isinstance(message, Ok) else message


def _one_per_rank(plans: list[Any], world_size: int) -> list[Any]:
    if len(plans) != world_size:
        raise ValueError(
            f"Expected one plan per rank but got {len(plans)} plans for world_size={world_size}. "
            "create_global_plan and prepare_global_plan must return as many as they take."
        )
    return plans


def _read_metadata(storage: Any, rank: int) -> tuple[Metadata, bool]:
    """Return the metadata, and whether it is the whole checkpoint's rather than one that this rank wrote for itself."""
    try:
        return storage.read_metadata(), True
    except MetadataError:
        raise  # There is a checkpoint, and it is damaged: an older one beside it is no substitute.
    except Exception as missing:
        if not _takes_kwargs(storage.read_metadata):
            raise
        try:
            return storage.read_metadata(rank=rank), False
        except Exception as also_missing:
            raise FileNotFoundError(
                f"Expected a checkpoint but got none: {missing}; and none of rank {rank} alone: {also_missing}."
            ) from missing


def _takes_kwargs(method: Callable[..., Any]) -> bool:
    return "kwargs" in inspect.signature(method).parameters


def _sorted_keys(state_dict: dict[str, Any]) -> list[Any]:
    return sorted(state_dict, key=lambda key: (str(key), type(key).__name__))


def _membership(group: dist.ProcessGroup | None, no_dist: bool) -> tuple[dist.ProcessGroup | None, int, int]:
    if no_dist or not dist.is_available() or not dist.is_initialized():
        return None, 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(
            f"Expected a process_group that this rank belongs to but got {group!r} on rank {dist.get_rank()}. "
            "Only members of the group may call this."
        )
    return group, rank, dist.get_world_size(group)


def _open_writer(writer: StorageWriter | None, checkpoint_id: str | os.PathLike[str] | None) -> StorageWriter:
    if writer is None:
        writer = FileSystemWriter(_local_path(checkpoint_id, "storage_writer"))
    if checkpoint_id is not None:
        writer.reset(checkpoint_id)
    return writer


def _open_reader(reader: StorageReader | None, checkpoint_id: str | os.PathLike[str] | None) -> StorageReader:
    if reader is None:
        reader = FileSystemReader(_local_path(checkpoint_id, "storage_reader"))
    if checkpoint_id is not None:
        reader.reset(checkpoint_id)
    return reader


def _local_path(checkpoint_id: str | os.PathLike[str] | None, argument: str) -> str | os.PathLike[str]:
    if not checkpoint_id or "://" in str(checkpoint_id):
        raise ValueError(
            f"Expected a local path but got checkpoint_id={checkpoint_id!r}. Give one, or pass {argument}."
        )
    return checkpoint_id
