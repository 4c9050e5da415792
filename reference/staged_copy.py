"""A copy of a state dict in this process's own CPU memory, which shares nothing with the original.

Python values are copied with `copy.deepcopy`; tensors wherever they stand are copied element by element, since a
deep copy of a tensor would take its whole storage along. A copy costs the tensor's own bytes, and views of the same
elements share one.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["Allocate", "StagingError", "staged_copy"]

Allocate = Callable[[torch.Tensor], torch.Tensor]
"""Given a tensor, returns uninitialised CPU memory of its size, dtype and (if dense) strides."""


_UNCHANGING = {int, float, complex, bool, str, bytes, type(None), torch.Size, torch.dtype, torch.device}


class StagingError(ValueError):
    """A value that cannot be copied."""


def staged_copy(state_dict: Any, *, allocate: Allocate | None = None, is_blocking: bool = True) -> Any:
    """Return a copy of `state_dict` that nothing done to the original later can change.

    Args:
        state_dict: nested containers of tensors of any kind and of Python values; may be empty.
        allocate: gives the memory for each tensor; default: ordinary CPU memory.
        is_blocking: False lets copies from a device finish later; the caller must then synchronise the device.

    Raises:
        StagingError: a value that `copy.deepcopy` refuses, with the path to it.
    """
    with torch.no_grad():
        return _Copier(allocate or _ordinary, is_blocking).copy(state_dict, ())


class _Copier(TorchFunctionMode):
    """Copies containers itself; tensors inside other objects come here because `Tensor.__deepcopy__` is intercepted."""

    def __init__(self, allocate: Allocate, is_blocking: bool) -> None:
        super().__init__()
        self._allocate = allocate
        self._is_blocking = is_blocking
        self._memo: dict[int, Any] = {}
        self._kept: list[Any] = []
        self._copies: dict[Any, torch.Tensor] = {}

    def copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        if id(value) in self._memo:
            return self._memo[id(value)]
        copied: Any
        if type(value) in _UNCHANGING:
            return value
        if isinstance(value, torch.Tensor):
            copied = self._tensor(value)
        elif type(value) is dict or type(value) is OrderedDict:
            return self._mapping(value, path)
        elif type(value) is list:
            copied = self._remember(value, [])
            copied += (self.copy(entry, (*path, position)) for position, entry in enumerate(value))
        elif type(value) is tuple:
            copied = tuple(self.copy(entry, (*path, position)) for position, entry in enumerate(value))
        else:
            return self._object(value, path)
        return self._remember(value, copied)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # torch leaves the mode while this runs, so the calls made here are ordinary ones.
        if func is torch.Tensor.__deepcopy__:
            return self.copy(args[0], ())
        return func(*args, **(kwargs or {}))

    def _remember(self, value: Any, copied: Any) -> Any:
        # The original is kept too: its id must not be given to another object meanwhile.
        self._kept.append(value)
        self._memo[id(value)] = copied
        return copied

    def _mapping(self, value: dict[Any, Any], path: tuple[Any, ...]) -> Any:
        copied = self._remember(value, type(value)())
        for key, entry in value.items():
            copied[key] = self.copy(entry, (*path, key))
        if isinstance(value, OrderedDict):  # A module's state dict carries `_metadata` as an attribute.
            vars(copied).update(self.copy(vars(value), path))
        return copied

    def _object(self, value: Any, path: tuple[Any, ...]) -> Any:
        try:
            with self:
                return copy.deepcopy(value, self._memo)
        except Exception as error:
            at = "state_dict" + "".join(f"[{key!r}]" for key in path)
            raise StagingError(
                f"Expected a value that can be copied but got {at}, a {type(value).__qualname__}: {error}. "
                "Leave it out, or give it __deepcopy__."
            ) from error

    def _tensor(self, value: Any) -> Any:
        if isinstance(value, AsyncCollectiveTensor):
            value = value.wait()
        if type(value) is torch.nn.Parameter:
            return torch.nn.Parameter(self._elements(value.detach()), value.requires_grad)
        if isinstance(value, DTensor):
            local = self.copy(value.to_local().detach(), ())
            return DTensor(local, value._spec, requires_grad=value.requires_grad)  # type: ignore[no-untyped-call]
        if is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            inner = {name: self.copy(getattr(value, name), ()) for name in names}
            return type(value).__tensor_unflatten__(inner, context, value.size(), value.stride())
        if type(value) is not torch.Tensor:
            return copy.deepcopy(value)
        if value.device.type == "meta":
            return value
        return self._elements(value.detach()).requires_grad_(value.requires_grad)

    def _elements(self, value: torch.Tensor) -> torch.Tensor:
        """Return a copy of what `value` shows; the same for another view of exactly the same elements."""
        if value.layout != torch.strided or value.is_quantized:
            return value.to("cpu", copy=True)
        facts = (value.size(), value.stride(), value.dtype, value.device, value.is_conj(), value.is_neg())
        place = (value.data_ptr(), *facts) if value.numel() else id(value)
        if place not in self._copies:
            self._copies[place] = self._new(value)
            self._kept.append(value)
        # Detached again: two views of the same elements may differ in requires_grad.
        return self._copies[place].detach()

    def _new(self, value: torch.Tensor) -> torch.Tensor:
        size = value.size()
        for dim, (length, stride) in enumerate(zip(size, value.stride(), strict=True)):
            if length > 1 and stride == 0:
                value = value.narrow(dim, 0, 1)  # An expanded dim repeats one element.
        target = self._allocate(value)
        target.copy_(value, non_blocking=not self._is_blocking)
        return target.expand(size)


def _ordinary(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value, device="cpu", memory_format=torch.preserve_format)
