"""What a state dict of a case holds: its leaves, each with the path on which it hangs. Part of a case."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from dcpbench import objects
from dcpbench.content import DTYPES

__all__ = ["ObjectLeaf", "Part", "TensorLeaf", "fqn_of"]


@dataclass(frozen=True)
class Part:
    """One step of the way from the state dict to a leaf: a dict key (text or int) or a list index."""

    kind: Literal["key", "index"]
    value: str | int

    def to_json(self) -> Any:
        if self.kind == "index":
            return self.value
        return self.value if isinstance(self.value, str) else {"key": self.value}

    @classmethod
    def from_json(cls, data: Any) -> Part:
        if type(data) is str:
            return cls("key", data)
        if type(data) is int and data >= 0:
            return cls("index", data)
        if isinstance(data, dict) and type(data.get("key")) is int:
            return cls("key", data["key"])
        raise ValueError(f'expected text, a list index or {{"key": <int>}} but got {data!r:.60}.')


def fqn_of(path: tuple[Part, ...]) -> str:
    """Returns the flattened key of a leaf, as DCP forms it: the parts joined by dots."""
    return ".".join(str(part.value) for part in path)


@dataclass(frozen=True)
class TensorLeaf:
    """A tensor of the state dict: where it hangs, its global shape and dtype.

    Attributes:
        expanded: all rows along dim 0 hold the same; a source is made by ``expand``, with stride 0 there.
        requires_grad: it is what a parameter is.
        tied_to: number of an earlier leaf that is the very same tensor, under another key; None if there is none.
        later_shape, later_dtype: what it is from content version 1 on, as when a model grows or changes precision;
            None for no change. The number of dims stays.
    """

    path: tuple[Part, ...]
    shape: tuple[int, ...]
    dtype: str = "float32"
    expanded: bool = False
    requires_grad: bool = False
    tied_to: int | None = None
    later_shape: tuple[int, ...] | None = None
    later_dtype: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("expected a path with at least one part but got an empty one.")
        for dtype in (self.dtype, self.later_dtype or self.dtype):
            if dtype not in DTYPES:
                raise ValueError(f"expected a dtype such as {', '.join(list(DTYPES)[:3])} but got {dtype!r}.")
        if self.expanded and not self.shape:
            raise ValueError("expected an expanded tensor to have a dim but got shape=().")
        if any(size < 0 for size in (*self.shape, *(self.later_shape or ()))):
            raise ValueError(f"expected sizes of 0 and more but got shape={self.shape}.")
        if self.later_shape is not None and len(self.later_shape) != len(self.shape):
            raise ValueError(f"expected {len(self.shape)} dims later too but got later_shape={self.later_shape}.")

    @property
    def fqn(self) -> str:
        return fqn_of(self.path)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype]

    def at(self, version: int) -> TensorLeaf:
        """Returns the leaf with the shape and dtype that it has in ``version`` of the content."""
        if not version or (self.later_shape is None and self.later_dtype is None):
            return self
        shape = self.shape if self.later_shape is None else self.later_shape
        return replace(self, shape=shape, dtype=self.later_dtype or self.dtype)


@dataclass(frozen=True)
class ObjectLeaf:
    """A value of the state dict that is no tensor, held as :func:`dcpbench.objects.encode` gives it.

    Attributes:
        differs: each rank that saves it has a value of its own under the key: a pair of its number and the value.
    """

    path: tuple[Part, ...]
    encoded: Any
    differs: bool = False

    @property
    def fqn(self) -> str:
        return fqn_of(self.path)

    def encoded_at(self, version: int, rank: int = 0) -> Any:
        """Returns the encoded value that a rank saves in ``version``: a tuple with it from version 1 on."""
        held = {"tuple": [objects.encode(rank), self.encoded]} if self.differs else self.encoded
        return {"tuple": [objects.encode(version), held]} if version else held

    def value(self, version: int, rank: int = 0) -> Any:
        """Returns what :meth:`encoded_at` describes."""
        return objects.decode(self.encoded_at(version, rank))
