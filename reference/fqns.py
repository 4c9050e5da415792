"""Canonical names: what parameters and state dict keys of a model are called when nothing is wrapped around it.

`state_dict` starts here. A wrapper (DDP, torch.compile, activation checkpointing) adds an attribute to the path of what
it wraps; the FQN leaves it out, so that a checkpoint fits the model under any wrapper.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.nn.parallel import DistributedDataParallel

__all__ = ["ModelNames", "NamedModule"]


class NamedModule(NamedTuple):
    """A module at one place of the model; path and prefixes are empty or end in a dot."""

    module: nn.Module
    path: str
    key_prefix: str
    fqn_prefix: str


class ModelNames:
    """The names of everything in `model`, worked out once.

    Args:
        model: may be wrapped, wholly or in parts. A module that occurs at two places has two names.
        modifiers: the method by which a module says which child its state dict hides, as `{name: hidden child}`.

    Source: `get_state_dict`'s documentation: the names of the model "when the module is not distributed".
    """

    def __init__(self, model: nn.Module, modifiers: str = "_fqn_modifiers") -> None:
        self._modifiers = modifiers
        self._fqn_prefixes: dict[str, str] = {}
        self.modules: list[NamedModule] = []
        self.parameters: dict[torch.Tensor, list[str]] = {}
        self._visit(NamedModule(model, "", "", ""))

    def fqn(self, key: str) -> str:
        """Return the FQN of a key of `model.state_dict()`; a key that a hook made up keeps what it has of a name."""
        prefix = key
        while prefix == key or prefix not in self._fqn_prefixes:  # the empty prefix is always there
            prefix = prefix[: prefix.rstrip(".").rfind(".") + 1]
        return self._fqn_prefixes[prefix] + key[len(prefix) :]

    def of(self, parameter: torch.Tensor) -> list[str]:
        """Return the FQNs of a parameter, the first in the order of `named_parameters` first; none if not in here."""
        return self.parameters.get(parameter, [])

    def prefixes_of(self, modules: Iterable[nn.Module]) -> list[str]:
        """Return the FQN prefix of each place where one of `modules` is."""
        wanted = set(modules)
        return [place.fqn_prefix for place in self.modules if place.module in wanted]

    def _visit(self, place: NamedModule) -> None:
        module = place.module
        self.modules.append(place)
        self._fqn_prefixes.setdefault(place.key_prefix, place.fqn_prefix)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # FSDP1 may have flattened several into one.
                inner = getattr(parameter, "_fqns", (name,)) if isinstance(parameter, FlatParameter) else (name,)
                self.parameters.setdefault(parameter, []).extend(place.fqn_prefix + one for one in inner)
        hidden = set(getattr(module, self._modifiers)().values()) if hasattr(module, self._modifiers) else set()
        for name, child in module._modules.items():
            if child is not None:
                in_key = not isinstance(module, ActivationWrapper | FullyShardedDataParallel) and name not in hidden
                in_fqn = in_key and not _is_wrapper(module)
                key_prefix = place.key_prefix + (f"{name}." if in_key else "")
                fqn_prefix = place.fqn_prefix + (f"{name}." if in_fqn else "")
                self._visit(NamedModule(child, f"{place.path}{name}.", key_prefix, fqn_prefix))


def _is_wrapper(module: nn.Module) -> bool:
    if isinstance(module, DistributedDataParallel):
        return True
    # A compiled module can only exist where its class has been imported already; the import takes seconds.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(module, compiler.OptimizedModule)
