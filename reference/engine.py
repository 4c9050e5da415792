"""The protocol: what each rank does in a save and a load, and when ranks wait for each other.

Both are generators that yield collective requests (see `collectives`) and never communicate themselves:

    save   every rank: plan --gather--> coordinator: global plan --scatter--> every rank: write
           --gather--> coordinator: finish (commit) --broadcast--> every rank: the metadata
    load   every rank: plan --gather--> coordinator: global plan --scatter--> every rank: read
           --gather--> coordinator: all well? --broadcast--> every rank
           (no plan is sent where the global step is known to change none; see `kept_plans`)

The calls to planner and storage, and their order, are torch's, so that torch's and third parties' plug in. What a user
calls (`state_dict_saver`, `state_dict_loader`) finds the group, makes one of these generators and drives it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import Any, cast
from typing import Protocol as Interface

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
)
from .kept_plans import are_plans_kept
from .metadata import MetadataError
from .planner import DefaultLoadPlanner, DefaultSavePlanner
from .stateful import is_stateful

__all__ = ["SaveActions", "conclude", "load_protocol", "save_actions", "save_protocol", "saving"]


class SaveActions(Interface):
    """What one rank does in a save, between collectives; plans and results are only passed on, whatever they are."""

    def plan(self) -> Any:
        """Return this rank's local plan."""

    def plan_all(self, plans: list[Any]) -> list[Any]:
        """Return every rank's final plan. Coordinator only, or each rank for itself without collectives."""

    def write(self, plan: Any) -> Any:
        """Write, and return the results."""

    def finish(self, results: list[Any]) -> Any:
        """Commit, and return the metadata. Where `plan_all` ran."""


def save_protocol(
    state_dict: dict[str, Any],
    *,
    rank: int,
    world_size: int,
    open_storage: Callable[[], StorageWriter],
    planner: SavePlanner | None = None,
    use_collectives: bool = True,
    coordinator: int = COORDINATOR,
    asks_stateful: bool = True,
) -> Protocol[Metadata]:
    """One rank's part of a save, as a generator of collective requests that returns the metadata.

    Args:
        state_dict: as in `save`.
        rank: of this part.
        world_size: how many parts there are.
        open_storage: gives the ready writer; called inside the first step, so that its failure reaches all ranks.
        planner: as in `save`.
        use_collectives: as in `save`.
        coordinator: the rank that plans for all, and commits.
        asks_stateful: whether `Stateful` values are asked for their state, or are the state.
    """
    actions = save_actions(
        state_dict,
        rank=rank,
        open_storage=open_storage,
        planner=planner,
        use_collectives=use_collectives,
        is_coordinator=rank == coordinator,
        asks_stateful=asks_stateful,
    )
    return saving(actions, rank, world_size, use_collectives=use_collectives, coordinator=coordinator)


def saving(
    actions: SaveActions,
    rank: int,
    world_size: int,
    *,
    use_collectives: bool = True,
    coordinator: int = COORDINATOR,
) -> Protocol[Any]:
    """Run `actions` in step with the other ranks, and return the metadata: wherever the actions themselves run."""
    is_coordinator = rank == coordinator
    if use_collectives:
        plan = yield from _plan(rank, world_size, attempt(rank, "plan", actions.plan), actions.plan_all, is_coordinator)
        written = _then(rank, "write", plan, actions.write)
        return (yield from conclude(rank, "write", written, actions.finish, is_coordinator))
    own: Message = attempt(rank, "plan", lambda: actions.plan_all([actions.plan()])[0])
    own = _then(rank, "write", _then(rank, "write", own, actions.write), lambda results: actions.finish([results]))
    # Nobody needs another's plan, but everybody needs to know whether the checkpoint is whole.
    yield from conclude(rank, "write", _without_value(own), lambda _: None, is_coordinator)
    return own.value if isinstance(own, Ok) else None


def save_actions(
    state_dict: dict[str, Any],
    *,
    rank: int,
    open_storage: Callable[[], StorageWriter],
    planner: SavePlanner | None,
    use_collectives: bool,
    is_coordinator: bool,
    asks_stateful: bool = True,
) -> SaveActions:
    """Return what this rank does in a save, here in this process; arguments as in `save_protocol`."""
    return _SaveActions(
        state_dict,
        rank,
        open_storage,
        planner if planner is not None else DefaultSavePlanner(),
        use_collectives=use_collectives,
        is_coordinator=is_coordinator,
        asks_stateful=asks_stateful,
    )


class _SaveActions:
    def __init__(
        self,
        state_dict: dict[str, Any],
        rank: int,
        open_storage: Callable[[], StorageWriter],
        planner: SavePlanner,
        *,
        use_collectives: bool,
        is_coordinator: bool,
        asks_stateful: bool,
    ) -> None:
        self._state_dict, self._rank, self._open_storage, self._planner = state_dict, rank, open_storage, planner
        self._use_collectives, self._is_coordinator = use_collectives, is_coordinator
        self._asks_stateful = asks_stateful
        self._storage: Any = None
        self._metadata: Any = None

    def plan(self) -> SavePlan:
        self._storage = storage = self._open_storage()
        plain = self._state_dict
        if self._asks_stateful:
            plain = {key: value.state_dict() if is_stateful(value) else value for key, value in plain.items()}
        planner, is_coordinator = self._planner, self._is_coordinator
        storage_meta = storage.storage_meta()
        if "storage_meta" in inspect.signature(planner.set_up_planner).parameters:
            planner.set_up_planner(state_dict=plain, storage_meta=storage_meta, is_coordinator=is_coordinator)
        else:
            planner.set_up_planner(plain, is_coordinator)  # type: ignore[arg-type]
        if _takes_kwargs(storage.set_up_storage_writer):
            storage.set_up_storage_writer(is_coordinator, rank=self._rank, use_collectives=self._use_collectives)
        else:
            storage.set_up_storage_writer(is_coordinator)
        plan: SavePlan = storage.prepare_local_plan(planner.create_local_plan())
        return plan

    def plan_all(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans, self._metadata = self._planner.create_global_plan(plans)
        prepared: list[SavePlan] = self._storage.prepare_global_plan(plans)
        return prepared

    def write(self, plan: SavePlan) -> Any:
        writes = self._storage.write_data(self._planner.finish_plan(plan), self._planner)
        writes.wait()
        return writes.value()

    def finish(self, results: list[Any]) -> Metadata:
        self._storage.finish(metadata=self._metadata, results=results)
        finished: Metadata = self._metadata
        return finished


def load_protocol(
    state_dict: dict[str, Any],
    *,
    rank: int,
    world_size: int,
    open_storage: Callable[[], StorageReader],
    planner: LoadPlanner | None = None,
    coordinator: int = COORDINATOR,
    asks_stateful: bool = True,
) -> Protocol[None]:
    """One rank's part of a load, as a generator of collective requests.

    Args:
        state_dict: as in `load`.
        rank: of this part.
        world_size: how many parts there are.
        open_storage: gives the ready reader; called inside the first step, so that its failure reaches all ranks.
        planner: as in `load`.
        coordinator: the rank that sees all plans.
        asks_stateful: False hands `state_dict` itself to the planner, which loads into it.
    """
    is_coordinator = rank == coordinator
    planner = planner if planner is not None else DefaultLoadPlanner()
    storage: Any = None
    plain: dict[Any, Any] = {} if asks_stateful else state_dict
    stateful: list[Any] = []

    def local_step() -> LoadPlan:
        nonlocal storage
        storage = open_storage()
        # Sorted, because a Stateful may communicate in state_dict(): all ranks must ask theirs in the same order.
        for key in _sorted_keys(state_dict) if asks_stateful else ():
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

    def first_global_step(plans: list[LoadPlan | None]) -> list[Any]:
        if is_kept:
            return plans
        if any(plan is None for plan in plans):
            return [_PLANS_WANTED] * len(plans)
        return global_step(cast(list[LoadPlan], plans))

    def read_step(plan: LoadPlan) -> bool:
        storage.read_data(planner.finish_plan(plan), planner).wait()
        return bool(stateful)

    def apply_step() -> None:
        for key in stateful:
            state_dict[key].load_state_dict(plain[key])

    own: Message = attempt(rank, "plan", local_step)
    is_kept = isinstance(own, Ok) and are_plans_kept(planner, storage)
    plan = yield from _plan(rank, world_size, Ok() if is_kept else own, first_global_step, is_coordinator)
    if plan == Ok(_PLANS_WANTED):
        plan = yield from _plan(rank, world_size, own, global_step, is_coordinator)
    elif is_kept and isinstance(plan, Ok):
        plan = own
    has_stateful = yield from conclude(rank, "read", _then(rank, "read", plan, read_step), any, is_coordinator)
    # A planner may replace values, and one that knows what the checkpoint holds may have added some.
    for key, value in plain.items():
        if key not in stateful and (key not in state_dict or state_dict[key] is not value):
            state_dict[key] = value
    if has_stateful:
        yield from conclude(rank, "apply", attempt(rank, "apply", apply_step), lambda _: None, is_coordinator)


Step = Generator[Request, Any, Any]

_PLANS_WANTED = "plans wanted"
"""The coordinator's answer to ranks that kept their load plans to themselves, while its planner or reader needs all."""


def _plan(
    rank: int,
    world_size: int,
    local: Message,
    make_global: Callable[[list[Any]], list[Any]],
    is_coordinator: bool,
) -> Generator[Request, Any, Message]:
    """Turn every rank's local plan into its final plan. A failure meant for this rank alone is returned, not raised."""
    gathered = yield Gather("plan", local)
    replies: list[Message] | None = None
    if is_coordinator:
        verdict = _decide(rank, "plan", gathered, lambda plans: _one_per_rank(make_global(plans), world_size))
        replies = [Ok(plan) for plan in verdict.value] if isinstance(verdict, Ok) else [verdict] * world_size
    reply: Message = yield Scatter("plan", replies)
    if isinstance(reply, Abort):
        raise reply.exception()
    return reply


def conclude(rank: int, step: str, own: Message, combine: Callable[[list[Any]], Any], is_coordinator: bool) -> Step:
    """Combine every rank's outcome on the coordinator, and return the result on all ranks.

    Raises:
        CheckpointException: on all ranks: `own` is a failure on one of them, or `combine` fails.
    """
    gathered = yield Gather(step, own)
    reply: Message = yield Broadcast(step, _decide(rank, step, gathered, combine) if is_coordinator else None)
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
