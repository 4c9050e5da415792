"""Strategies for how tensors lie on ranks: meshes, placements, whole layouts."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from dcpbench.case import Layout, LeafLayout, MemoryForm, Mesh, Placement, TensorLeaf
from dcpbench.strategies.scope import scope

__all__ = ["layouts", "meshes", "placements", "world_sizes"]

_AXES = ("dp", "tp", "cp")
_FORMS: tuple[MemoryForm, ...] = ("contiguous", "transposed", "sliced")
_COMPLEX_FORMS: tuple[MemoryForm, ...] = ("contiguous", "conjugated", "transposed", "sliced")


def world_sizes(max_world_size: int) -> st.SearchStrategy[int]:
    """Returns a strategy for world sizes from 1 to ``max_world_size``. Shrinks towards 1."""
    several = range(2, max_world_size + 1)
    return st.sampled_from([1, *several, *several])


def meshes(world_size: int, *, any_order: bool = True) -> st.SearchStrategy[Mesh]:
    """Returns a strategy for meshes of one to three axes over a world.

    With ``any_order`` the ranks may stand in any order, and now and then some are left out. Shrinks towards one axis
    over all ranks in order.
    """

    def over(ranks: Sequence[int]) -> st.SearchStrategy[Mesh]:
        flat, *others = _factorings(len(ranks))
        proper = [sizes for sizes in others if 1 not in sizes] or [flat]
        # half of all one axis, most others without axes of size 1
        options = [flat, *others, *proper * len(others), *[flat] * (len(others) + len(proper) * len(others) - 1)]
        return st.sampled_from(options).map(lambda sizes: Mesh(_AXES[: len(sizes)], sizes, tuple(ranks)))

    in_order = over(range(world_size))
    if not any_order or world_size == 1:
        return in_order
    permuted = st.permutations(range(world_size)).flatmap(over)
    partial = st.integers(1, world_size - 1).flatmap(
        lambda n: st.permutations(range(world_size)).flatmap(lambda ranks: over(ranks[:n]))
    )
    return st.one_of(in_order, in_order, in_order, permuted, partial)


def _factorings(number: int) -> list[tuple[int, ...]]:
    """Returns the ways to write ``number`` as a product of one to three factors; the fewest and plainest first."""
    found: list[tuple[int, ...]] = [(number,)]
    for first in range(1, number + 1):
        if number % first == 0:
            rest = number // first
            found.append((first, rest))
            found += [(first, second, rest // second) for second in range(1, rest + 1) if rest % second == 0]
    return sorted(found, key=lambda sizes: (len(sizes), sizes.count(1), len(set(sizes))))


def placements(num_dims: int, mesh: Mesh, *, strided: bool = True) -> st.SearchStrategy[tuple[Placement, ...]]:
    """Returns a strategy for the placements of a tensor of ``num_dims`` dims, one per mesh axis.

    Several axes may cut the same dim. With ``strided`` a cut may be a strided shard, of the split factor that FSDP2
    gives it over tensor parallelism (the size of the later axes that cut the same dim) or of another one. Shrinks
    towards Shard(0) on each axis, which splits, rather than towards Replicate().
    """
    cuts = [Placement(dim) for dim in range(num_dims)]
    plain = st.sampled_from([*cuts, *cuts[:1], *cuts[:1], Placement()])
    if not strided or not cuts:
        return st.tuples(*[plain] * len(mesh.axes))
    factors = sorted({*(size for size in mesh.sizes if size > 1), 2, 3})
    bent = st.builds(Placement, st.integers(0, num_dims - 1), st.sampled_from(factors))
    unbent = st.tuples(*[plain] * len(mesh.axes))
    as_fsdp_over_tp = unbent.map(lambda drawn: _as_fsdp_over_tp(drawn, mesh))
    mixed = st.tuples(*[st.one_of(plain, plain, bent)] * len(mesh.axes))
    return st.sampled_from([unbent] * 6 + [as_fsdp_over_tp] * 2 + [mixed]).flatmap(lambda drawn: drawn)


def _as_fsdp_over_tp(drawn: tuple[Placement, ...], mesh: Mesh) -> tuple[Placement, ...]:
    """Returns the placements with each cut made strided by the later axes that cut the same dim."""
    bent = []
    for axis, placement in enumerate(drawn):
        factor = 1
        for later in range(axis + 1, len(drawn)):
            if drawn[later].dim == placement.dim:
                factor *= mesh.sizes[later]
        bent.append(Placement(placement.dim, factor) if placement.dim is not None else placement)
    return tuple(bent)


@st.composite
def layouts(draw: st.DrawFn, tensors: Sequence[TensorLeaf], world_size: int, *, is_whole: bool = False) -> Layout:
    """Draws a layout of ``tensors`` over ``world_size`` ranks; with ``is_whole`` the mesh leaves none of them out.

    Shrinks towards one axis over all ranks, each tensor cut along dim 0 and contiguous.
    """
    mesh = draw(meshes(world_size, any_order=not is_whole), label="mesh")
    leaves: list[LeafLayout] = []
    for tensor in tensors:
        if tensor.tied_to is not None:
            leaves.append(leaves[tensor.tied_to])
            continue
        is_plain = draw(st.sampled_from([False, False, False, True]))
        is_bent = scope.has("strided-shards")
        placed = None if is_plain else draw(placements(len(tensor.shape), mesh, strided=is_bent))
        leaves.append(
            LeafLayout(placed, draw(st.sampled_from(_COMPLEX_FORMS if tensor.dtype.startswith("complex") else _FORMS)))
        )
    return Layout(world_size, mesh, tuple(leaves))
