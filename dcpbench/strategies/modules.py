"""Strategies for models: trees of blocks of any kind, from the empty one up, and how they lie on ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from hypothesis import strategies as st

from dcpbench.models.case import AXES, Parallelism, ParallelismKind
from dcpbench.models.tree import Block, BlockKind, ModelSpec
from dcpbench.strategies.contents import one_in
from dcpbench.strategies.scope import scope

__all__ = ["SMALL", "model_specs", "parallelisms"]

LEAVES: Final[tuple[BlockKind, ...]] = (
    *("linear", "mlp", "norm", "embedding", "conv", "attention", "experts", "batch-norm"),
    *("scale", "empty", "counter", "dropout", "unused", "extra"),
)
SMALL: Final[tuple[BlockKind, ...]] = ("linear", "linear", "mlp", "norm", "embedding", "conv", "scale", "dropout")
"""Kinds for cases that look elsewhere."""

NAMES: Final = ("a", "b", "c", "module", "weight", "0", "ключ", "a b", "state", "_orig_mod", "params")
SIZES: Final[dict[BlockKind, tuple[int, ...]]] = {
    "mlp": (5, 3, 8, 1, 4),
    "experts": (2, 3, 4),  # one alone has gradients of nothing but zeros, of either sign
    "embedding": (3, 5, 1, 8),
    "unused": (2, 3),
}


@dataclass(slots=True)
class _Growing:
    """A model as far as it is drawn."""

    width: int
    kinds: Sequence[BlockKind]
    num_linears: int = 0


@st.composite
def model_specs(draw: st.DrawFn, kinds: Sequence[BlockKind] = LEAVES, max_blocks: int = 4) -> ModelSpec:
    """Draws a model of up to ``max_blocks`` blocks, now and then of none. Shrinks towards one linear layer."""
    width = draw(st.sampled_from([5, 6, 8, 7, 4]), label="width")
    numbers = [n for n in (1, 2, 3, 4, 2, 3) if n <= max_blocks]
    num_blocks = draw(st.sampled_from([*numbers * 3, 0] if max_blocks > 2 else numbers), label="blocks")
    growing = _Growing(width, kinds)
    blocks = _blocks(draw, growing, num_blocks, depth=0, named=True)
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    if one_in(draw, 8, "other dtype"):
        dtype = draw(st.sampled_from(["float64", "bfloat16"]), label="dtype")
    return ModelSpec(width, blocks, dtype, has_root_parameter=one_in(draw, 6, "parameter of the model itself"))


def _blocks(draw: st.DrawFn, growing: _Growing, number: int, *, depth: int, named: bool) -> tuple[Block, ...]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=number, max_size=number, unique=True)) if named else ()
    return tuple(_block(draw, growing, depth, names[n] if named else "") for n in range(number))


def _block(draw: st.DrawFn, growing: _Growing, depth: int, name: str) -> Block:
    if depth < 2 and len(growing.kinds) > len(SMALL) and one_in(draw, 6, "container"):
        kind: BlockKind = draw(st.sampled_from(["list", "dict", "sequence"]), label="container")
        num_children = draw(st.integers(1, 2), label="children")
        children = _blocks(draw, growing, num_children, depth=depth + 1, named=kind == "dict")
        return Block(kind, name, children)
    kind = draw(st.sampled_from(growing.kinds), label="block")
    is_frozen = one_in(draw, 6, "frozen")
    if kind == "linear":
        tied_to = None
        if growing.num_linears and one_in(draw, 4, "tied"):
            tied_to = draw(st.integers(0, growing.num_linears - 1), label="tied to")
        growing.num_linears += 1
        return Block(kind, name, is_frozen=is_frozen, tied_to=tied_to)
    sizes = SIZES.get(kind, (1,))
    if kind == "attention":
        sizes = tuple(heads for heads in (2, 4, 1) if growing.width % heads == 0)
    return Block(kind, name, size=draw(st.sampled_from(sizes), label="size"), is_frozen=is_frozen)


@st.composite
def parallelisms(
    draw: st.DrawFn, model: ModelSpec, *, is_uniform: bool = False, is_whole: bool = False, max_world_size: int = 8
) -> Parallelism:
    """Draws how ``model`` lies on up to ``max_world_size`` ranks. Shrinks towards one plain rank.

    Args:
        draw: Hypothesis's own.
        model: what a kind of parallelism cannot hold excludes it.
        is_uniform: all parameters must be of one kind, for optimizers that work on lists of them.
        is_whole: no parameter may be cut, for optimizers that only know plain tensors.
        max_world_size: no more than the session has.
    """
    limit = min(scope.max_world_size, max_world_size)
    world_size = draw(st.sampled_from([n for n in (1, 2, 2, 2, 3, 4, 2, 4, 6, 8) if n <= limit]), label="ranks")
    parameters = model.parameters()
    kinds: list[ParallelismKind] = ["plain", "alone"] if world_size == 1 else ["plain"]
    if any(p.is_trained for p in parameters):
        kinds.append("ddp")
    is_odd = any(not p.shape or 0 in p.shape for p in parameters)
    if any(p.shape and 0 not in p.shape for p in parameters) and not is_whole:
        if not (is_uniform and is_odd):
            kinds += ["fsdp", "fsdp", "hsdp"]
        if not is_uniform and world_size > 1:
            kinds += ["tp", "tp", "fsdp_tp", "fsdp_tp", "dp_cp_tp", "hsdp_tp"]
    kind = draw(st.sampled_from(kinds), label="parallelism")
    sizes = draw(st.sampled_from(_factorings(world_size, len(AXES[kind]))), label="mesh")
    is_tied = any(p.same_as != number for number, p in enumerate(parameters))
    units = ["model"] if is_tied else ["model", "blocks"] if is_uniform else ["blocks", "model", "some"]
    shards = Parallelism(kind, sizes).shards
    return Parallelism(
        kind,
        sizes,
        draw(st.sampled_from(units), label="units") if shards else "blocks",
        draw(st.sampled_from(["column", "row"]), label="style") if AXES[kind][-1] == "tp" else "column",
        is_checkpointed=one_in(draw, 6, "activation checkpointing"),
    )


def _factorings(number: int, num_factors: int) -> list[tuple[int, ...]]:
    """Returns the ways to write ``number`` as a product; those with the fewest ones first."""
    if num_factors == 1:
        return [(number,)]
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    found = [(d, *rest) for d in divisors for rest in _factorings(number // d, num_factors - 1)]
    fewest = min(sizes.count(1) for sizes in found)
    return sorted((s for s in found if s.count(1) <= fewest + 1), key=lambda sizes: sizes.count(1))
