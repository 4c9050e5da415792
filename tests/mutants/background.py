"""Mutants that save in the background, and let what follows reach the checkpoint, or a failure go unheard."""

from __future__ import annotations

import math
from concurrent.futures import Future
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcpbench import Case
from tests.mutants.bank import Background, breaks, local_of, rank


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


@breaks("R701", suite="async_saves", on=lambda case: _in_background(case) and any(one.shape for one in case.tensors))
class small_ones_by_reference(Background):
    """Copies tensors of 64 elements and more: smaller ones are not worth it."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if local_of(tensor).numel() < 64 else super().tensor(tensor)


@breaks("R701", suite="async_saves", on=lambda case: any(math.prod(one.shape) > 1 << 14 for one in case.tensors))
class large_ones_by_reference(Background):
    """Copies tensors of up to 16,384 elements: larger ones it writes from where they lie."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if local_of(tensor).numel() > 1 << 14 else super().tensor(tensor)


@breaks("R502", "R505", suite="bad_async_saves", on=lambda case: case.layouts[0].world_size > 1)
class coordinator_hears_alone(Background):
    """Keeps a failure from the futures of all ranks but the coordinator's."""

    def value(self, value: Any) -> Any:
        try:
            return super().value(value)
        except Exception:  # it fails later, in the background
            return value

    def run(self, held: dict[str, Any], given: dict[str, Any], future: Future[Any]) -> None:
        if rank() == 0:
            super().run(held, given, future)
            return
        own: Future[Any] = Future()
        super().run(held, given, own)
        own.exception()
        future.set_result(None)


@breaks("R701", suite="async_saves", on=lambda case: _in_background(case) and any(one.expanded for one in case.tensors))
class keeps_strides_of_copies(Background):
    """Copies the elements that a storage has, under the strides that it had: of an expanded tensor none are copied."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if 0 in local_of(tensor).stride() else super().tensor(tensor)
