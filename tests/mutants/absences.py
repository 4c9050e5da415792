"""Backends that declare something absent, and treat what they lack wrongly; and some that treat it right."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from dcpbench import EngineBackend, StorageBackend
from tests.mutants.bank import rank

__all__ = [
    "drops_values",
    "ends_when_asked",
    "fills_and_refuses",
    "refuses_layouts",
    "refuses_on_one_rank",
    "refuses_values",
    "understates_itself",
    "waits_when_asked",
]


def _values_of(held: Any) -> list[Any]:
    children = held.values() if isinstance(held, dict) else held if isinstance(held, list) else None
    if children is None:
        return [] if isinstance(held, torch.Tensor) else [held]
    return [value for child in children for value in _values_of(child)]


def _without_values(held: Any) -> Any:
    if isinstance(held, dict):
        return {key: _without_values(value) for key, value in held.items() if not _is_value(value)}
    return [_without_values(value) for value in held if not _is_value(value)] if isinstance(held, list) else held


def _is_value(held: Any) -> bool:
    return not isinstance(held, torch.Tensor | dict | list)


def _save(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    dcp.save(state_dict, checkpoint_id=checkpoint_id)


def _load(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    dcp.load(state_dict, checkpoint_id=checkpoint_id)


def _refuse(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    if _values_of(state_dict):
        raise ValueError("values that are no tensors are not saved")
    _save(state_dict, checkpoint_id)


def _refuse_on_one(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    if _values_of(state_dict) and rank() == 0:
        raise ValueError("values that are no tensors are not saved")
    if not _values_of(state_dict):
        _save(state_dict, checkpoint_id)


def _end(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    if _values_of(state_dict):
        os.kill(os.getpid(), signal.SIGKILL)
    _save(state_dict, checkpoint_id)


def _wait(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    while _values_of(state_dict):
        signal.pause()
    _save(state_dict, checkpoint_id)


def _drop(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    dcp.save(_without_values(state_dict), checkpoint_id=checkpoint_id)


def _load_tensors(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    dcp.load(_without_values(state_dict), checkpoint_id=checkpoint_id)


class _OneLayout:
    """Writes down the number of ranks, and has a load on another number refused, before or after it is done."""

    def __init__(self, *, is_late: bool) -> None:
        self._is_late = is_late

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        dcp.save({**state_dict, "num_ranks": self._num_ranks()}, checkpoint_id=checkpoint_id)

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        held = {"num_ranks": 0}
        dcp.load(held, checkpoint_id=checkpoint_id)
        if self._is_late:
            dcp.load(state_dict, checkpoint_id=checkpoint_id)
        if held["num_ranks"] != self._num_ranks():
            raise ValueError(f"saved on {held['num_ranks']} ranks, not on {self._num_ranks()}")
        if not self._is_late:
            dcp.load(state_dict, checkpoint_id=checkpoint_id)

    def _num_ranks(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1


_EARLY, _LATE = _OneLayout(is_late=False), _OneLayout(is_late=True)

refuses_values = EngineBackend("refuses-values", _refuse, _load, absent=("objects",))
refuses_layouts = EngineBackend("refuses-layouts", _EARLY.save, _EARLY.load, absent=("resharding",))
refuses_on_one_rank = EngineBackend("refuses-on-one-rank", _refuse_on_one, _load, absent=("objects",))
ends_when_asked = EngineBackend("ends-when-asked", _end, _load, absent=("objects",))
waits_when_asked = EngineBackend("waits-when-asked", _wait, _load, absent=("objects",))
fills_and_refuses = EngineBackend("fills-and-refuses", _LATE.save, _LATE.load, absent=("resharding",))
drops_values = EngineBackend("drops-values", _drop, _load_tensors, absent=("objects",))
understates_itself = StorageBackend(
    "understates-itself", dcp.FileSystemWriter, dcp.FileSystemReader, absent=("objects", "scalar-tensors")
)
