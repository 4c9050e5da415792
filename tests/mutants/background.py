"""Mutants that save in the background, and let what follows reach the checkpoint, or a failure go unheard."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcpbench import Case
from tests.mutants.bank import Background, breaks


def _in_background(case: Case) -> bool:
    return any(step.action == "async_save" for step in case.steps)


def _has_shards(case: Case) -> bool:
    return any(leaf.placements is not None for layout in case.layouts for leaf in layout.leaves)


@breaks("R701", suite="async_saves", on=lambda case: _in_background(case) and case.tensors)
class stages_by_reference(Background):
    """Saves the state dict itself in the background."""

    def copy(self, value: Any) -> Any:
        return value


@breaks("R701", suite="async_saves", on=lambda case: _in_background(case) and case.objects)
class values_by_reference(Background):
    """Copies tensors, but not the values beside them."""

    def value(self, value: Any) -> Any:
        return value


@breaks("R701", suite="async_saves", on=lambda case: _in_background(case) and _has_shards(case))
class shards_by_reference(Background):
    """Copies plain tensors, and of a sharded one the wrapper only."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, DTensor) else tensor.clone()


@breaks("R701", suite="async_saves", on=lambda case: _in_background(case) and any(one.shape for one in case.tensors))
class contiguous_is_a_copy(Background):
    """Takes what contiguous() returns for a copy."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor):
            return DTensor(tensor._local_tensor.contiguous(), tensor._spec, requires_grad=False)
        return tensor.contiguous()


@breaks("R505", suite="bad_async_saves")
class swallows_failures(Background):
    """Gives every future an answer, of failed saves too."""

    def async_save(self, state_dict: dict[str, Any], **given: Any) -> Future[Any]:
        try:
            return super().async_save(state_dict, **given)
        except Exception:
            future: Future[Any] = Future()
            future.set_result(None)
            return future


@breaks("R304", "R501", suite="async_saves", on=_in_background)
class answers_early(Background):
    """Gives the future its answer before anything is written."""

    def run(self, held: dict[str, Any], given: dict[str, Any], future: Future[Any]) -> None:
        future.set_result(None)
        super().run(held, given, Future())
