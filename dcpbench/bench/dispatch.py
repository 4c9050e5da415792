"""Counts collectives and tensor copies by looking at what goes through torch's dispatcher. Runs on ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Counting"]

_COPIES = ("copy_", "_to_copy", "clone", "copy")


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that counts what the thread that entered it does; what runs in other threads is not seen.

    Attributes:
        collectives: by name, without those that tensors of no group make.
        num_copies: of tensors.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives: Counter[str] = Counter()
        self.num_copies = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call: Callable[..., Any] = func
        namespace, name = func.namespace, func._schema.name.partition("::")[2]
        if namespace in ("c10d", "_c10d_functional"):
            self.collectives[name.rstrip("_")] += 1
        elif namespace == "aten" and name in _COPIES:
            self.num_copies += 1
        return call(*args, **(kwargs or {}))
