"""What is planned in `dcpbench bench planning`: the states of large models, and which box of each leaf a rank holds.

A mesh has three axes: pipeline stages, each with some of the layers, and in each stage two axes that cut tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["MODELS", "Grid", "Leaf", "Model"]

_OPTIMIZER = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Leaf:
    """A tensor of the state.

    Attributes:
        stage: the pipeline stage that has it.
        dims: the dim that the first and the second axis of the stage's mesh cuts; None replicates.
    """

    fqn: str
    shape: tuple[int, ...]
    stage: int
    dims: tuple[int | None, int | None]


@dataclass(frozen=True)
class Grid:
    """The sizes of the three axes."""

    stages: int
    first: int
    second: int

    @property
    def world_size(self) -> int:
        return self.stages * self.first * self.second

    def place(self, rank: int) -> tuple[int, int, int]:
        """Returns where a rank stands: its stage, and its places along the two axes."""
        stage, within = divmod(rank, self.first * self.second)
        return (stage, *divmod(within, self.second))

    def box(self, leaf: Leaf, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Returns offsets and sizes of what a rank of the leaf's stage holds; None for nothing."""
        _, *places = self.place(rank)
        offsets, sizes = [0] * len(leaf.shape), list(leaf.shape)
        for dim, place, parts in zip(leaf.dims, places, (self.first, self.second), strict=True):
            if dim is None:
                continue
            length = -(-sizes[dim] // parts)
            begin = min(place * length, sizes[dim])
            offsets[dim] += begin
            sizes[dim] = min(length, sizes[dim] - begin)
        return (tuple(offsets), tuple(sizes)) if 0 not in sizes else None


@dataclass(frozen=True)
class Model:
    """A model with the state of AdamW.

    Attributes:
        name: for tables.
        title: with what is notable of it.
        first: size of the first of the two axes of a stage, at most; the rest is the second.
    """

    name: str
    title: str
    num_layers: int
    first: int
    stages: int = 8

    def grid(self, world_size: int) -> Grid:
        """Returns the mesh of a world: 8 stages, the first axis as large as it may be."""
        within = world_size // self.stages
        first = min(self.first, within)
        return Grid(self.stages, first, within // first)

    def leaves(self) -> Iterator[Leaf]:
        """Yields the parameters, their moments, and a count of steps for each."""
        for fqn, shape, stage, dims in self._parameters():
            yield Leaf(f"model.{fqn}", shape, stage, dims)
            for moment in _OPTIMIZER:
                yield Leaf(f"optimizer.state.{fqn}.{moment}", shape, stage, dims)
            yield Leaf(f"optimizer.state.{fqn}.step", (), stage, (None, None))

    def _parameters(self) -> Iterator[tuple[str, tuple[int, ...], int, tuple[int | None, int | None]]]:
        block, ends = _BLOCKS[self.name]
        for fqn, shape, dims in ends:
            yield fqn, shape, 0 if "embed" in fqn else self.stages - 1, dims
        for layer in range(self.num_layers):
            for name, shape, dims in block:
                yield f"layers.{layer}.{name}", shape, layer * self.stages // self.num_layers, dims


_Tensors = tuple[tuple[str, tuple[int, ...], tuple[int | None, int | None]], ...]
_COLUMN, _ROW, _NORM = (0, 0), (1, 0), (None, 0)
_LLAMA: tuple[_Tensors, _Tensors] = (
    (
        ("attention.wq", (16384, 16384), _COLUMN),
        ("attention.wk", (1024, 16384), _COLUMN),
        ("attention.wv", (1024, 16384), _COLUMN),
        ("attention.wo", (16384, 16384), _ROW),
        ("feed_forward.w1", (53248, 16384), _COLUMN),
        ("feed_forward.w3", (53248, 16384), _COLUMN),
        ("feed_forward.w2", (16384, 53248), _ROW),
        ("attention_norm", (16384,), _NORM),
        ("ffn_norm", (16384,), _NORM),
    ),
    (("embed", (128256, 16384), _COLUMN), ("output", (128256, 16384), _COLUMN), ("norm", (16384,), _NORM)),
)
_DATA, _EXPERTS = (0, 0), (0, 1)
_MOE: tuple[_Tensors, _Tensors] = (
    (
        ("attention.wq_a", (1536, 7168), _DATA),
        ("attention.wq_b", (12288, 1536), _DATA),
        ("attention.wkv_a", (576, 7168), _DATA),
        ("attention.wkv_b", (16384, 512), _DATA),
        ("attention.wo", (7168, 8192), _DATA),
        ("moe.router", (384, 7168), _DATA),
        ("moe.experts.w1", (384, 2048, 7168), _EXPERTS),
        ("moe.experts.w2", (384, 7168, 2048), _EXPERTS),
        ("moe.experts.w3", (384, 2048, 7168), _EXPERTS),
        ("moe.shared.w1", (2048, 7168), _DATA),
        ("moe.shared.w2", (7168, 2048), _DATA),
        ("moe.shared.w3", (2048, 7168), _DATA),
        ("attention_norm", (7168,), _DATA),
        ("ffn_norm", (7168,), _DATA),
    ),
    (("embed", (163840, 7168), _DATA), ("output", (163840, 7168), _DATA), ("norm", (7168,), _DATA)),
)
_BLOCKS = {"llama3-405b": _LLAMA, "moe-1t": _MOE}

MODELS = {
    "llama3-405b": Model("llama3-405b", "Llama-3 405B: 8 stages, tensor parallel over 8, FSDP over the rest", 126, 8),
    "moe-1t": Model("moe-1t", "1T-class MoE of 384 experts: 8 stages, experts over 64, FSDP over the rest", 61, 64),
}
"""By name. Tensor parallelism and experts are the first axis of a stage, FSDP the second."""
