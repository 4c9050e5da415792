"""What training does to a state dict right after ``async_save`` has returned. Runs on ranks.

Nothing of it may reach the checkpoint. Where tensors keep their memory, the new content is known (version
``MUTATED`` above the saved one), so that the judge can tell a late copy from other damage.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import numpy as np
import torch

from dcpbench.case import MUTATED, Case
from dcpbench.objects import CHANGED_LATER
from dcpbench.ranks.materialize import Built
from dcpbench.ranks.stateful import Keeper

__all__ = ["disturb"]


def disturb(case: Case, number: int, rank: int, built: Built) -> None:
    """Changes all that hangs in the state dict: values, then tensors, then as the step says."""
    step = case.steps[number]
    _change_values(built.state_dict)
    with torch.no_grad():
        for index, held in enumerate(built.tensors):
            if held is None or held.local is None:
                continue
            region = case.layouts[step.layout].region(index, held.leaf.shape, rank)
            if region is None or case.tensors[index].tied_to is not None:
                continue
            data = case.expected_bytes(index, step.version + MUTATED, region).copy()
            if held.local.is_conj():
                data[:, -1] ^= 0x80  # the sign of the imaginary part, which the view turns again
            _overwrite(held.local.conj() if held.local.is_conj() else held.local, data)
        for held in built.tensors:
            if held is not None and held.local is not None and step.disturbance == "free":
                held.local.untyped_storage().resize_(0)
    if step.disturbance == "clear":
        built.state_dict.clear()
        built.tensors[:] = [None] * len(built.tensors)


def _overwrite(local: torch.Tensor, data: Any) -> None:
    if 0 in local.stride():  # expanded: each row is the same memory
        local = local[:1]
        data = data[: local.numel()]
    if local.numel():
        fresh = torch.from_numpy(np.ascontiguousarray(data).reshape(-1)).view(local.dtype).reshape(local.shape)
        local.copy_(fresh)


def _change_values(at: Any, depth: int = 0) -> None:
    """Puts a mark into each container that can be changed, the innermost first, and for each value in a dict."""
    at = at.held if isinstance(at, Keeper) else at
    if isinstance(at, dict):
        for key, value in list(at.items()):
            _change_values(value, depth + 1)
            if not isinstance(value, torch.Tensor | dict | list | Keeper):
                at[key] = CHANGED_LATER
        if depth:
            at[CHANGED_LATER] = CHANGED_LATER
    elif isinstance(at, list | deque | tuple):
        for value in at:
            _change_values(value, depth + 1)
        if not isinstance(at, tuple):
            at.append(CHANGED_LATER)
    else:
        _change_value(at)


def _change_value(at: Any) -> None:
    if isinstance(at, set):
        at.add(CHANGED_LATER)
    elif isinstance(at, bytearray):
        at.extend(CHANGED_LATER.encode())
    elif isinstance(at, np.ndarray) and at.size:
        at[...] = np.zeros((), at.dtype)
    elif dataclasses.is_dataclass(at) and not isinstance(at, type):
        for one in dataclasses.fields(at):
            object.__setattr__(at, one.name, CHANGED_LATER)
