"""Runs one step of a case on one rank and observes it. Runs on ranks, called by the worker.

Exceptions of the backend pass through: the worker's boundary turns them into observations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from dcpbench import objects
from dcpbench.backends import registry
from dcpbench.backends.protocol import Session
from dcpbench.case import Case, Part
from dcpbench.geometry import Box
from dcpbench.messages import ChunkTable, ObjectObservation, Observation, RunStep, TensorObservation
from dcpbench.ranks import materialize
from dcpbench.ranks.meter import Meter

__all__ = ["key_paths", "run_step"]


@dataclass(slots=True)
class _Running:
    """The case that this rank is in the middle of, and its open sessions, one per backend."""

    root: str
    sessions: dict[str, Session]


_running: list[_Running] = []


def run_step(command: RunStep, rank: int, enter_phase: Callable[[str], None], device: str) -> Observation:
    """Returns what ``rank`` saw of one step; all ranks of the step call it.

    Raises:
        Whatever the backend raises, ``BaseException`` included.
    """
    case, step = command.case, command.case.steps[command.step]
    enter_phase("build")
    built = materialize.build(case, command.step, rank, device)
    enter_phase("open")
    session = _session(command)
    checkpoint_id = str(Path(command.root) / step.checkpoint)
    enter_phase(step.action)
    meter = Meter(device)
    with meter:
        if step.action == "save":
            session.save(built.state_dict, checkpoint_id)
        else:
            session.load(built.state_dict, checkpoint_id)
    metadata = None
    if step.action == "save" and rank == 0:
        enter_phase("metadata")
        metadata = session.metadata(checkpoint_id)
    enter_phase("observe")
    with torch.no_grad():  # autograd would wrap each look at a shard
        seen = _state(case, command.step, built)
    if step.action == "save" and rank == 0:
        seen |= {"tables": _tables(metadata), "bytes_on_storage": _size(Path(checkpoint_id))}
    return Observation(
        rank, command.world_size, command.step, step.action, "ok", phase="observe", usage=meter.usage, **seen
    )


def _session(command: RunStep) -> Session:
    """Returns the session of this case and backend; the sessions of the case before are let go."""
    if not _running or _running[0].root != command.root:
        _running[:] = [_Running(command.root, {})]
    sessions = _running[0].sessions
    if command.backend not in sessions:
        sessions[command.backend] = registry.resolve(command.backend).open(reuse=command.case.options.reuse)
    return sessions[command.backend]


def _state(case: Case, number: int, built: materialize.Built) -> dict[str, Any]:
    """Returns the state dict after a step, as the fields of an observation."""
    asked_for = case.asked_for(number)
    return {
        "tensors": tuple(
            TensorObservation(leaf.fqn, asked_for=False) if held is None else _observe_tensor(held, built.state_dict)
            for leaf, held in zip(case.tensors, built.tensors, strict=True)
        ),
        "objects": tuple(
            _observe_object(leaf.fqn, leaf.path, built.state_dict)
            if index in asked_for
            else ObjectObservation(leaf.fqn, None, asked_for=False)
            for index, leaf in enumerate(case.objects, len(case.tensors))
        ),
        "keys": tuple(key_paths(built.state_dict, [leaf.path for leaf in case.leaves])),
    }


def _observe_tensor(held: materialize.BuiltTensor, state_dict: dict[str, Any]) -> TensorObservation:
    try:
        found = materialize.find(state_dict, held.path)
    except LookupError:
        return TensorObservation(held.leaf.fqn)
    if not isinstance(found, torch.Tensor):
        return TensorObservation(held.leaf.fqn, dtype=type(found).__name__)
    local = found.to_local() if isinstance(found, DTensor) else found
    if held.local is None:
        return TensorObservation(held.leaf.fqn, held.leaf.dtype, (), same_tensor=found is held.given)
    return TensorObservation(
        held.leaf.fqn,
        str(local.dtype).removeprefix("torch."),
        tuple(local.shape),
        materialize.tensor_bytes(local),
        same_tensor=found is held.given,
        same_storage=local.data_ptr() == held.data_ptr,
        outside_intact=materialize.outside_intact(held.local),
    )


def _observe_object(fqn: str, path: tuple[Part, ...], state_dict: dict[str, Any]) -> ObjectObservation:
    try:
        return ObjectObservation(fqn, objects.encode(materialize.find(state_dict, path)))
    except LookupError:
        return ObjectObservation(fqn, None, present=False)


def key_paths(state_dict: dict[str, Any], leaves: list[tuple[Part, ...]]) -> list[str]:
    """Returns the path of each leaf of ``state_dict``, written so that ``0`` and ``'0'`` differ.

    Dicts are always entered; a list only where one of ``leaves`` lies in it, since other lists are values.
    """
    prefixes = {tuple(part.value for part in path[:n]) for path in leaves for n in range(len(path))}
    found: list[str] = []

    def visit(at: Any, path: tuple[Any, ...]) -> None:
        if isinstance(at, dict) and path in prefixes:
            for key, value in at.items():
                visit(value, (*path, key))
        elif isinstance(at, list) and path in prefixes:
            for index, value in enumerate(at):
                visit(value, (*path, index))
        else:
            found.append("/".join(map(repr, path)))

    visit(state_dict, ())
    return sorted(found)


def _tables(metadata: Metadata | None) -> tuple[ChunkTable, ...] | None:
    if metadata is None:
        return None
    return tuple(
        ChunkTable(
            fqn,
            str(entry.properties.dtype).removeprefix("torch."),
            tuple(entry.size),
            tuple(Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks),
        )
        for fqn, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    )


def _size(folder: Path) -> int | None:
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
