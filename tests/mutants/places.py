"""Mutants that go wrong about where a checkpoint is, or where a tensor begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dcpbench import Case
from tests.mutants.bank import Engine, SourcePlanner, Writer, breaks


def _moves(case: Case) -> bool:
    return any(step.action in ("copy", "rename") for step in case.steps)


@breaks("R501", "R106", suite="sequences", on=_moves)
class remembers_home(Engine):
    """Keeps the place of a checkpoint in it, and reads from there when it has been moved."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        super().save(state_dict, checkpoint_id)
        (Path(checkpoint_id) / ".home").write_text(checkpoint_id)

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        super().load(state_dict, (Path(checkpoint_id) / ".home").read_text())


@breaks("R304", "R501", suite="switched", on=lambda case: not case.steps[0].checkpoint.isascii())
class ascii_paths(Writer):
    """Writes to a path without what is not ASCII."""

    def reset(self, checkpoint_id: Any = None) -> None:
        super().reset(str(checkpoint_id).encode("ascii", "ignore").decode())


@breaks("R101", suite="chains", on=lambda case: any(step.resaves for step in case.steps))
class begins_at_zero(SourcePlanner):
    """Saves a contiguous tensor from the beginning of its storage."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        local = tensor.detach()
        if not local.is_contiguous() or not local.numel() or local.is_conj():
            return tensor
        return local.as_strided(local.size(), local.stride(), 0)
