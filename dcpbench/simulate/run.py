"""Runs a `ProtocolCase` on a backend: all virtual ranks in this process. Runs on a rank of the pool, or in a test."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from dcpbench.backends import registry
from dcpbench.backends.protocol import Backend, StorageBackend
from dcpbench.content import DTYPES
from dcpbench.geometry import Box, Region
from dcpbench.messages import ChunkTable
from dcpbench.oracle.protocol import may_fail, protocol_findings
from dcpbench.protocol_case import BY_STORAGE, CALLS, ProtocolCase
from dcpbench.protocol_seen import Filled, ProtocolSeen, RankEnd, StepSeen
from dcpbench.simulate.memory_storage import MemoryReader, MemoryStore, MemoryWriter
from dcpbench.simulate.schedule import End, Run, drive, follow
from dcpbench.simulate.scripted import ScriptedLoadPlanner, ScriptedSavePlanner, raw_of, tensor_of
from dcpbench.simulate.virtual import held_by
from dcpbench.simulate.watch import Watch
from reference.engine import load_protocol, save_protocol

__all__ = ["run_case", "run_on_rank", "why_not"]

_NO_GROUP = "process group has not been initialized"


def run_on_rank(_rank: int, _world_size: int, *, case: ProtocolCase, backend: str, root: str) -> ProtocolSeen:
    """Runs ``case`` on the backend of that specification, with its checkpoints below ``root``."""
    return run_case(case, registry.resolve(backend), Path(root))


def why_not(case: ProtocolCase, backend: Backend) -> str:
    """Returns why a backend has not what the case is about, or "" if it has."""
    if not isinstance(backend, StorageBackend):
        return "it is a whole engine: there is no storage or planner to plug in"
    if case.part == "planner" and (backend.save_planner is None or backend.load_planner is None):
        return "it brings no planners of its own"
    return ""


def run_case(case: ProtocolCase, backend: Backend, root: Path) -> ProtocolSeen:
    """Runs ``case`` and, where it shows a broken rule, its plainer variants, which tell what it depends on."""
    if reason := why_not(case, backend):
        return ProtocolSeen(unsupported=reason)
    assert isinstance(backend, StorageBackend)
    steps = _run(case, backend, root / "run")
    errors = [end.error for step in steps for end in step.ends]
    if any(_NO_GROUP in error for error in errors):
        return ProtocolSeen(steps, unsupported="its parts need a process group, which virtual ranks have not")
    seen = ProtocolSeen(steps)
    if not any(protocol_findings(case, steps)):
        return seen
    if any(step.schedule or step.is_fine for step in case.steps):
        plain = replace(case, steps=tuple(replace(step, schedule=(), is_fine=False) for step in case.steps))
        seen = replace(seen, in_order=_run(plain, backend, root / "in-order"))
    if case.reuse:
        seen = replace(seen, anew=_run(replace(case, reuse=False), backend, root / "anew"))
    return seen


def _run(case: ProtocolCase, backend: StorageBackend, root: Path) -> tuple[StepSeen, ...]:
    root.mkdir(parents=True)
    running = _Running(case, backend, root)
    for number in range(len(case.steps)):
        seen = running.step(number)
        running.seen.append(seen)
        if any(end.outcome != "ok" for end in seen.ends) and not may_fail(case, number, running.seen):
            break
    return tuple(running.seen)


class _Running:
    """One run of a case: the store of planner cases, and the parts that ranks keep."""

    def __init__(self, case: ProtocolCase, backend: StorageBackend, root: Path) -> None:
        self.case, self.backend, self.root = case, backend, root
        self.store = MemoryStore()
        self.kept: dict[tuple[str, int], Any] = {}
        self.seen: list[StepSeen] = []

    def step(self, number: int) -> StepSeen:
        step = self.case.steps[number]
        ranks = [_Rank(self, number, rank) for rank in range(step.world_size)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = drive([rank.protocol() for rank in ranks], follow(step.schedule), is_fine=step.is_fine)
        for rank in ranks:
            rank.watch.release()
        return _seen(ranks, run)

    def part(self, kind: str, rank: int, make: Any) -> Any:
        """Returns the writer, reader or planner of a rank: a new one, or where parts are reused the same as before."""
        if not self.case.reuse:
            return make()
        if (kind, rank) not in self.kept:
            self.kept[kind, rank] = make()
        return self.kept[kind, rank]


class _Rank:
    """One virtual rank in one step."""

    def __init__(self, running: _Running, number: int, rank: int) -> None:
        self.running, self.number, self.rank = running, number, rank
        self.case, self.step = running.case, running.case.steps[number]
        halt = self.step.halt
        self.watch = Watch(rank, halt if halt is not None and halt.rank == rank else None)
        self.watch.hooks["finish"] = self._finishing
        self.is_storage = self.case.part == "storage"
        self.id = str(running.root / self.step.checkpoint)
        self.storage: Any = None
        self.planner: Any = None
        self.state: dict[str, Any] = {}
        self.metadata: Metadata | None = None
        self.results: Any = None
        self.is_finishing = False

    def protocol(self) -> Any:
        """Returns this rank's generator of requests."""
        backend, saves = self.running.backend, self.step.saves
        if self.is_storage:
            self.planner = (ScriptedSavePlanner if saves else ScriptedLoadPlanner)(self.case, self.number, self.watch)
        else:
            make = backend.save_planner if saves else backend.load_planner
            self.planner = self.running.part(f"{self.step.action} planner", self.rank, make)
            self.watch.bind(self.planner, CALLS["planner", self.step.action])
            self.state = self._state()
        how = save_protocol if saves else load_protocol
        return how(
            self.state,
            rank=self.rank,
            world_size=self.step.world_size,
            open_storage=self._open,
            planner=self.planner,
            asks_stateful=False,
        )

    def _open(self) -> Any:
        backend, running, saves = self.running.backend, self.running, self.step.saves
        if self.is_storage:
            make = backend.writer if saves else backend.reader
            self.storage = running.part(f"{self.step.action} storage", self.rank, lambda: make(self.id))
            self.storage.reset(self.id)
            names = [name for name in CALLS["storage", self.step.action] if name not in BY_STORAGE]
            self.watch.bind(self.storage, names)
        elif saves:
            self.storage = MemoryWriter(running.store, self.id, self.rank)
            self.watch.bind(self.storage, ["finish"])
        else:
            self.storage = MemoryReader(running.store, self.id)
        return self.storage

    def _finishing(self, metadata: Metadata, results: Any) -> None:
        self.is_finishing, self.metadata, self.results = True, metadata, results

    def _state(self) -> dict[str, Any]:
        """Returns the state dict of planner cases: what is saved, or other bytes where it is loaded."""
        layout, state = self.step.layout, dict[str, Any]()
        assert layout is not None
        for number, leaf in enumerate(self.case.leaves):
            if not leaf.dtype:
                state[leaf.fqn] = self.case.content(number, self.number, None) if self.step.saves else b""
                continue
            state[leaf.fqn] = held_by(
                layout, number, leaf.shape, self.rank, lambda region, number=number: self._local(number, region)
            )
        return state

    def _local(self, number: int, region: Region) -> torch.Tensor:
        leaf, box = self.case.leaves[number], next(region.boxes(), None)
        if box is None:
            return tensor_of(b"", region.shape, leaf.dtype)
        is_saved, num_bytes = self.step.saves, box.numel * DTYPES[leaf.dtype]
        raw = self.case.content(number, self.number, box) if is_saved else b"\1" * num_bytes
        return tensor_of(raw, region.shape, leaf.dtype)

    def filled(self) -> list[Filled]:
        """Returns what a load has left."""
        if self.step.saves:
            return []
        if isinstance(self.planner, ScriptedLoadPlanner):
            return self.planner.filled()
        found, read = [], getattr(self.storage, "num_read", {})
        for number, leaf in enumerate(self.case.leaves):
            value = self.state.get(leaf.fqn)
            if not leaf.dtype:
                found.append(Filled(number, self.rank, value if isinstance(value, bytes) else None))
                continue
            local = getattr(value, "_local_tensor", value)
            data = raw_of(local) if isinstance(local, torch.Tensor) else None
            found.append(Filled(number, self.rank, data, read.get(leaf.fqn, 0)))
        return found


def _seen(ranks: Sequence[_Rank], run: Run) -> StepSeen:
    first = ranks[0]
    metadata = first.metadata
    entries = metadata.state_dict_metadata if isinstance(metadata, Metadata) else {}
    tables = [
        ChunkTable(
            fqn,
            str(entry.properties.dtype).removeprefix("torch."),
            tuple(entry.size),
            tuple(Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks),
        )
        for fqn, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    ]
    return StepSeen(
        ends=tuple(_end(end) for end in run.ends),
        is_halted=any(rank.watch.is_halted for rank in ranks),
        is_finishing=first.is_finishing,
        planned=tuple(one for rank in ranks for one in getattr(rank.storage, "planned", ())),
        results=_results(first.results) if first.is_storage and first.is_finishing else None,
        strays=tuple(stray for rank in ranks for stray in getattr(rank.planner, "strays", ())),
        tables=tuple(tables),
        filled=tuple(one for rank in ranks for one in rank.filled()),
        order=tuple(run.order),
        problem=run.problem,
    )


def _end(end: End) -> RankEnd:
    error = end.value
    if end.outcome != "raised":
        return RankEnd(end.outcome)
    blames: tuple[int, ...] = ()
    causes = [error]
    if isinstance(error, CheckpointException):
        blames = tuple(sorted(error.failures))
        causes += [failure[0] for failure in error.failures.values()]
    text = "; ".join(f"{type(one).__name__}: {' '.join(str(one).split())[:300]}" for one in causes[-2:])
    return RankEnd("raised", text, type(error).__name__, blames)


def _results(results: Any) -> tuple[tuple[str, tuple[int, ...] | None, int], ...] | None:
    try:
        flat = [(one, rank) for rank, many in enumerate(results) for one in many]
    except TypeError:
        return None
    if not all(isinstance(one, WriteResult) for one, _ in flat):
        return None
    return tuple(
        (one.index.fqn, None if one.index.offset is None else tuple(one.index.offset), rank) for one, rank in flat
    )
