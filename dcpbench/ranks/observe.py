"""What a rank finds in a state dict and in a checkpoint after a step, as plain data. Runs on ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from dcpbench import objects
from dcpbench.case import Case, Part
from dcpbench.geometry import Box
from dcpbench.messages import ChunkTable, ObjectObservation, TensorObservation
from dcpbench.ranks import materialize
from dcpbench.ranks.stateful import Keeper

__all__ = ["key_paths", "size_of", "state_of", "tables_of"]


def state_of(case: Case, number: int, rank: int, built: materialize.Built) -> dict[str, Any]:
    """Returns the state dict after a step, as the fields of an observation."""
    asked_for = case.asked_for(number, rank)
    with torch.no_grad():  # autograd would wrap each look at a shard
        return {
            "tensors": tuple(
                TensorObservation(leaf.fqn, asked_for=False)
                if held is None
                else _observe_tensor(held, built.state_dict)
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
        at = at.held if isinstance(at, Keeper) else at
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


def tables_of(metadata: Metadata | None) -> tuple[ChunkTable, ...] | None:
    """Returns what metadata says of tensors; None where there is none."""
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


def size_of(folder: Path) -> int | None:
    """Returns the bytes of all files in a checkpoint's folder; None where it is none."""
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
