"""Content is a function of the place alone, and tells places apart."""

from __future__ import annotations

import numpy as np
import pytest

from dcpbench.content import DTYPES, element_bytes, overwritten, shard_bytes
from dcpbench.geometry import Region, full_region


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_part_holds_what_the_whole_holds_there(dtype):
    shape = (5, 3, 4)
    whole = shard_bytes(7, "w", shape, full_region(shape), dtype).reshape(*shape, -1)
    part = Region((((1, 2), (4, 1)), ((2, 1),), ((0, 3),)))
    got = shard_bytes(7, "w", shape, part, dtype).reshape(*part.shape, -1)
    assert np.array_equal(got, whole[np.ix_([1, 2, 4], [2], [0, 1, 2])])
    assert element_bytes(7, "w", shape, (4, 2, 1), dtype) == whole[4, 2, 1].tobytes()


@pytest.mark.parametrize("dtype", [d for d, size in DTYPES.items() if size >= 4])
def test_wide_elements_are_unique_within_a_tensor_apart_from_extremes(dtype):
    data = shard_bytes(1, "w", (20_000,), full_region((20_000,)), dtype)
    low, high = data[:, :1], data[:, -1:]
    is_extreme = (data[:, :-1] == low).all(axis=1) & np.isin(high, (0x00, 0x80, 0x7F, 0xFF)).all(axis=1)
    usual = data[~is_extreme]
    assert len(np.unique(usual, axis=0)) == len(usual)
    assert len(np.unique(data[is_extreme], axis=0)) == 4
    assert 1 / 20 < is_extreme.mean() < 1 / 13


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_names_and_seeds_hold_other_bytes(dtype):
    base = shard_bytes(1, "w", (256,), full_region((256,)), dtype)
    for seed, fqn in ((2, "w"), (1, "v")):
        other = shard_bytes(seed, fqn, (256,), full_region((256,)), dtype)
        assert (base != other).any(axis=1).mean() > 0.3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_destination_differs_in_each_element(dtype):
    data = shard_bytes(1, "w", (64,), full_region((64,)), dtype)
    assert (overwritten(data, dtype) != data).any(axis=1).all()


def test_scalar_and_empty():
    assert shard_bytes(1, "w", (), full_region(()), "float32").shape == (1, 4)
    assert shard_bytes(1, "w", (3, 0), full_region((3, 0)), "bool").shape == (0, 1)


def test_bools_are_bools():
    assert set(shard_bytes(1, "w", (64,), full_region((64,)), "bool").ravel()) == {0, 1}
