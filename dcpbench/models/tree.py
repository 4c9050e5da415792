"""What a generated model is: a tree of blocks, and by pure arithmetic every parameter and buffer in it.

The ranks build the same tree from torch's modules; a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["BATCH", "CONTAINERS", "INNER", "TIME", "Block", "BlockKind", "Buffer", "ModelSpec", "Parameter"]

BATCH: Final = 2
TIME: Final = 4
"""The input of a model is ``[BATCH, TIME, width]``, and so is what goes from block to block."""

INNER: Final = 4
"""Width inside an expert."""

BlockKind = Literal[
    "linear",
    "mlp",
    "norm",
    "batch-norm",
    "conv",
    "attention",
    "experts",
    "embedding",
    "scale",
    "empty",
    "counter",
    "dropout",
    "unused",
    "extra",
    "list",
    "dict",
    "sequence",
]
"""``scale`` has a 0-d parameter, ``empty`` one without elements, ``unused`` one that no forward pass touches;
``counter`` has buffers, persistent and not; ``extra`` has extra state; the last three are containers."""

CONTAINERS: Final = ("list", "dict", "sequence")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a model, once for each name that it has.

    Attributes:
        fqn: one of its names.
        is_trained: it requires gradients.
        is_used: a forward pass touches it.
        is_sparse: its gradients are sparse tensors.
        same_as: position of the first name of the same parameter in :meth:`ModelSpec.parameters`; its own, if first.
        kind: of the block that it is in; "root" for one that hangs on the model itself.
    """

    fqn: str
    shape: tuple[int, ...]
    is_trained: bool
    is_used: bool
    is_sparse: bool
    same_as: int
    kind: str


@dataclass(frozen=True)
class Buffer:
    """A buffer of a model."""

    fqn: str
    shape: tuple[int, ...]
    is_persistent: bool


def _check_names(blocks: tuple[Block, ...], *, numbered: bool) -> None:
    names = [block.name for block in blocks]
    if numbered and any(names):
        raise ValueError(f"expected numbered children without names but got {names}.")
    if not numbered and (len(set(names)) != len(names) or not all(names)):
        raise ValueError(f"expected children with names, each once, but got {names}.")


@dataclass(frozen=True)
class Block:
    """One module of the tree.

    Attributes:
        name: its attribute or key in its parent; lists and sequences number their children themselves.
        size: hidden features of an mlp, rows of an embedding or an unused parameter, experts, heads of attention.
        is_frozen: its parameters do not require gradients.
        is_sparse: an embedding has sparse gradients.
        tied_to: a linear block has the very weight of an earlier one: which of the model's linear blocks, in order.
    """

    kind: BlockKind = "linear"
    name: str = ""
    children: tuple[Block, ...] = ()
    size: int = 1
    is_frozen: bool = False
    is_sparse: bool = False
    tied_to: int | None = None

    def __post_init__(self) -> None:
        if self.children and self.kind not in CONTAINERS:
            raise ValueError(f"expected children in a container only but got a {self.kind} with some.")
        if self.size < 1:
            raise ValueError(f"expected a size of 1 or more but got {self.size}.")
        if "." in self.name:
            raise ValueError(f"expected a name without a dot but got {self.name!r}.")
        _check_names(self.children, numbered=self.kind != "dict")

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each parameter of its own, by name, in torch's order."""
        size, row, square = self.size, (width,), (width, width)
        by_kind: dict[str, dict[str, tuple[int, ...]]] = {
            "linear": {"weight": square, "bias": row},
            "mlp": {"up.weight": (size, width), "up.bias": (size,), "down.weight": (width, size), "down.bias": row},
            "norm": {"norm.weight": row, "norm.bias": row},
            "batch-norm": {"norm.weight": row, "norm.bias": row},
            "conv": {"conv.weight": (*square, 3), "conv.bias": row},
            "attention": {f"{name}.weight": square for name in ("wq", "wk", "wv", "wo")},
            "experts": {"up": (size, width, INNER), "down": (size, INNER, width), "gate.weight": (size, width)},
            "embedding": {"embedding.weight": (size, width)},
            "scale": {"gain": ()},
            "empty": {"nothing": (0, width)},
            "unused": {"idle": (size, width)},
        }
        return by_kind.get(self.kind, {})

    def buffers(self, width: int) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Returns shape and persistence of each buffer of its own, by name."""
        if self.kind == "batch-norm":
            return {f"norm.{name}": ((width,), True) for name in ("running_mean", "running_var")} | {
                "norm.num_batches_tracked": ((), True)
            }
        if self.kind == "counter":
            return {"calls": ((), True), "mean": ((width,), True), "scratch": ((width,), False)}
        return {}

    def __str__(self) -> str:
        frozen = " frozen" if self.is_frozen else ""
        tied = "" if self.tied_to is None else f" tied to {self.tied_to}"
        inner = f"[{', '.join(map(str, self.children))}]" if self.kind in CONTAINERS else ""
        return f"{self.kind}{inner}{frozen}{tied}"


@dataclass(frozen=True)
class ModelSpec:
    """A model: blocks one after the other, each added to its input.

    Attributes:
        width: features of what goes from block to block.
        blocks: the children of the model itself.
        dtype: of its parameters, and of its buffers of floating point.
        has_root_parameter: a parameter ``shift`` of ``[width]`` hangs on the model itself.
    """

    width: int = 5
    blocks: tuple[Block, ...] = (Block(name="a"),)
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    has_root_parameter: bool = False

    def __post_init__(self) -> None:
        _check_names(self.blocks, numbered=False)
        num_linear = 0
        for _, block in self.walk():
            if block.tied_to is not None and (block.kind != "linear" or not 0 <= block.tied_to < num_linear):
                raise ValueError(f"expected a linear block tied to one of {num_linear} earlier ones but got {block}.")
            if block.kind == "attention" and self.width % block.size:
                raise ValueError(f"expected heads that divide width={self.width} but got {block.size}.")
            num_linear += block.kind == "linear"

    def walk(self) -> Iterator[tuple[str, Block]]:
        """Yields each block with its FQN, parents first, in the order of ``named_modules``."""

        def visit(blocks: tuple[Block, ...], prefix: str, *, numbered: bool) -> Iterator[tuple[str, Block]]:
            for number, block in enumerate(blocks):
                fqn = f"{prefix}{number if numbered else block.name}"
                yield fqn, block
                yield from visit(block.children, f"{fqn}.", numbered=block.kind != "dict")

        return visit(self.blocks, "", numbered=False)

    def parameters(self) -> tuple[Parameter, ...]:
        """Returns all parameters in the order of ``named_parameters(remove_duplicate=False)``."""
        found: list[Parameter] = []
        if self.has_root_parameter:
            found.append(Parameter("shift", (self.width,), True, True, False, 0, "root"))
        weights: list[int] = []
        for fqn, block in self.walk():
            for name, shape in block.shapes(self.width).items():
                same_as, is_trained = len(found), not block.is_frozen
                if block.kind == "linear" and name == "weight":
                    if block.tied_to is not None:
                        same_as = weights[block.tied_to]
                        is_trained = found[same_as].is_trained
                    weights.append(same_as)
                is_used, key = block.kind != "unused", f"{fqn}.{name}"
                found.append(Parameter(key, shape, is_trained, is_used, block.is_sparse, same_as, block.kind))
        return tuple(found)

    def buffers(self) -> tuple[Buffer, ...]:
        """Returns all buffers."""
        return tuple(
            Buffer(f"{fqn}.{name}", shape, is_persistent)
            for fqn, block in self.walk()
            for name, (shape, is_persistent) in block.buffers(self.width).items()
        )

    @property
    def num_elements(self) -> int:
        return sum(math.prod(p.shape) for number, p in enumerate(self.parameters()) if p.same_as == number)

    def __str__(self) -> str:
        root = " and a parameter of its own" if self.has_root_parameter else ""
        blocks = ", ".join(map(str, self.blocks)) or "no blocks"
        return f"{blocks}{root}, width {self.width}, {self.dtype}"
