"""Mutants that do something else to the state dict than fill its tensors."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from tests.mutants.bank import (
    Dense,
    Engine,
    LoadPlanner,
    Reader,
    any_key,
    any_tensor,
    any_value,
    breaks,
    local_of,
    tensors_of,
)


class _After(Engine):
    """torch's engine, and something that is done to the state dict after each load."""

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        super().load(state_dict, checkpoint_id)
        self.afterwards(state_dict)

    def afterwards(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


@breaks("R102", "R202", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype == "bfloat16"))
class widening_loader(_After):
    """Leaves bfloat16 tensors as float32."""

    def afterwards(self, state_dict: dict[str, Any]) -> None:
        for tensor in tensors_of(state_dict):
            if tensor.dtype == torch.bfloat16:
                local_of(tensor).data = local_of(tensor).detach().to(torch.float32)


@breaks("R103", suite="round_trips", on=any_tensor(lambda leaf: not leaf.shape))
class scalar_as_vector(_After):
    """Leaves a 0-d tensor as a tensor of one dim."""

    def afterwards(self, state_dict: dict[str, Any]) -> None:
        for tensor in tensors_of(state_dict):
            if not local_of(tensor).dim():
                local_of(tensor).data = local_of(tensor).detach().reshape(1)


@breaks("R104", "R402", suite="round_trips", on=any_value(lambda value: value is None))
class forgetful_loader(_After):
    """Takes keys that hold None for keys that were never there, and removes them."""

    def afterwards(self, state_dict: dict[str, Any]) -> None:
        for key in [key for key, value in state_dict.items() if value is None]:
            del state_dict[key]


@breaks("R104", suite="round_trips", on=any_tensor(lambda leaf: 0 in leaf.shape and len(leaf.path) > 1))
class drops_empty_tensors(_After):
    """Removes tensors without elements from a dict below the top."""

    def afterwards(self, state_dict: dict[str, Any]) -> None:
        for child in state_dict.values():
            if isinstance(child, dict):
                for key in [
                    key for key, value in child.items() if isinstance(value, torch.Tensor) and not value.numel()
                ]:
                    del child[key]


@breaks("R105", suite="round_trips", on=any_tensor(lambda leaf: len(leaf.path) > 1))
class generous_loader(_After):
    """Leaves each tensor of a nested dict at the top of the state dict too, under its flattened key."""

    def afterwards(self, state_dict: dict[str, Any]) -> None:
        for key, child in list(state_dict.items()):
            for inner, value in list(child.items()) if isinstance(child, dict) else []:
                state_dict.setdefault(f"{key}.{inner}", value)


@breaks("R105", "R402", "R401", suite="round_trips", on=any_key(lambda fqn: "." in fqn.strip(".")))
class dots_are_nesting(_After):
    """Takes each dot in the key of a value for a step into a dict."""

    def afterwards(self, state_dict: dict[str, Any]) -> None:
        for key, value in list(state_dict.items()):
            if "." in str(key).strip(".") and not isinstance(value, torch.Tensor | dict | list):
                head, _, tail = str(key).partition(".")
                if isinstance(state_dict.setdefault(head, {}), dict):
                    state_dict[head][tail] = value


@breaks("R201", suite="round_trips")
class replacing_loader(_After):
    """Puts a contiguous copy in the place of a tensor that is not contiguous."""

    def afterwards(self, state_dict: dict[str, Any]) -> None:
        for key, value in state_dict.items():
            if isinstance(value, torch.Tensor) and not local_of(value).is_contiguous():
                state_dict[key] = value.clone(memory_format=torch.contiguous_format)


@breaks("R202", suite="round_trips")
class moving_loader(_After):
    """Gives a tensor that is not contiguous new, contiguous memory."""

    def afterwards(self, state_dict: dict[str, Any]) -> None:
        for tensor in tensors_of(state_dict):
            if not local_of(tensor).is_contiguous():
                local_of(tensor).data = local_of(tensor).detach().contiguous()


@breaks("R203", suite="round_trips")
class overrunning_reader(LoadPlanner):
    """Writes whole words of 8 bytes at the end of what it reads."""

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        if not tensor.is_contiguous() or tensor.nbytes % 8 == 0:
            return
        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
        whole = local_of(self.state_dict[read_item.dest_index.fqn])
        if end == whole.storage_offset() * whole.itemsize + whole.nbytes:
            storage[end : end - end % 8 + 8] = 0


@breaks("R203", suite="round_trips", on=any_tensor(lambda leaf: len(leaf.shape) == 2))
class fills_gaps_of_views(LoadPlanner):
    """Writes to the whole span of memory under a view, gaps included."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        whole = local_of(self.state_dict[read_item.dest_index.fqn]).detach()
        if whole.dim() == 2 and whole.stride(1) == 2 and whole.size(1) > 1:
            torch.as_strided(whole, (whole.size(0), whole.size(1) * 2 - 1), (whole.stride(0), 1))[:, 1::2] = 0
        return super().resolve_tensor(read_item)


@breaks("R107", "R101", suite="round_trips")
class future_without_data(Reader):
    """Says that all is read while a thread still reads tensors of more than a kilobyte."""

    def read_data(self, plan: Any, planner: Any) -> Any:
        late: list[Any] = []
        resolve = planner.resolve_tensor

        def resolve_now_or_later(item: Any) -> torch.Tensor:
            target = resolve(item)
            if target.nbytes <= 1024:
                return target
            late.append((target, torch.empty_like(target)))
            return late[-1][1]

        def copy_later() -> None:
            time.sleep(1.0)
            for target, read in late:
                target.detach().copy_(read)

        planner.resolve_tensor = resolve_now_or_later
        future = super().read_data(plan, planner)
        threading.Thread(target=copy_later, daemon=True).start()
        return future


@breaks("R204", suite="round_trips")
class alters_sources(Engine):
    """Leaves zeros in the tensors that it has saved."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        super().save(state_dict, checkpoint_id)
        for tensor in tensors_of(state_dict):
            local_of(tensor).zero_()


@breaks("R204", "R105", suite="round_trips")
class adds_version_to_source(Engine):
    """Leaves a key of its own in the state dict that it has saved."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        state_dict["engine_version"] = 1
        super().save(state_dict, checkpoint_id)


@breaks("R105", suite="partial_loads", on=lambda case: any(step.without for step in case.steps))
class brings_all_that_was_saved(Dense):
    """Adds values to the state dict that the checkpoint has and nobody asked for."""

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        super().load(state_dict, checkpoint_id)
        for path, held in self.whole.items():
            if len(path) == 1:
                state_dict.setdefault(path[0], held)

    def check(self, path: tuple[Any, ...], value: Any, whole: dict[Any, Any]) -> None:
        self.whole = whole
        super().check(path, value, whole)
