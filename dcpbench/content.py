"""The bytes that belong at each element: a pure function of (seed, FQN, global index, dtype).

Any rank can write and check any part of any tensor without asking another, and a wrong element can be traced back to
where it belongs. Values are bit patterns, not numbers: NaN payloads, -0.0 and denormals all occur, and all must
survive.

One element in 16 is an extreme: all bits 0, the highest bit alone (-0.0, the least int), all bits but the highest, or
all bits. Apart from those, elements of 4 bytes and more are unique within a tensor, since the index goes through a
bijection of 32 or 64 bits. Narrower elements cannot be unique; there a run of neighbours tells where it belongs.

Source of the two bijections: the finalisers of MurmurHash3 (32 bits) and SplitMix64 (64 bits), both public domain.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from dcpbench.geometry import Region

__all__ = ["DTYPES", "Bytes", "element_bytes", "overwritten", "shard_bytes"]

Bytes = npt.NDArray[np.uint8]

DTYPES: Final[dict[str, int]] = {
    "float32": 4,
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "uint16": 2,
    "uint32": 4,
    "uint64": 8,
    "bfloat16": 2,
    "float16": 2,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}
"""Every dtype that torch 2.13 can store and copy on CPU, with its element size in bytes."""

_U64 = npt.NDArray[np.uint64]


def shard_bytes(seed: int, fqn: str, shape: Sequence[int], region: Region, dtype: str) -> Bytes:
    """Returns the bytes of ``region`` of the tensor ``fqn``, row-major, as an array ``[numel, element size]``.

    Args:
        seed: of the case, any integer.
        fqn: name of the tensor; tensors of other names hold other bytes.
        shape: of the global tensor. A 0-d tensor has one element, an empty one none.
        region: what is wanted of it.
        dtype: a key of :data:`DTYPES`.

    Returns:
        An array that is not to be written to: small tensors are kept whole, since many ranks hold parts of one, a rank
        that saves a shard often loads it, and the judge looks at each twice.
    """
    if math.prod(shape) > _KEPT_ELEMENTS:
        return _encode(_key(seed, fqn), _linear(shape, region), dtype)
    whole = _kept_whole(seed, fqn, tuple(shape), dtype)
    for dim, runs in enumerate(region.runs):
        along = slice(runs[0][0], sum(runs[0])) if len(runs) == 1 else region.indices(dim)
        whole = whole[(slice(None),) * dim + (along,)]
    return whole.reshape(region.numel, DTYPES[dtype])


_KEPT_ELEMENTS: Final = 4096


@functools.lru_cache(maxsize=512)
def _kept_whole(seed: int, fqn: str, shape: tuple[int, ...], dtype: str) -> Bytes:
    data = _encode(_key(seed, fqn), np.arange(math.prod(shape), dtype=np.uint64), dtype).reshape(*shape, DTYPES[dtype])
    data.flags.writeable = False
    return data


def _linear(shape: Sequence[int], region: Region) -> _U64:
    """Returns the row-major number of each element of ``region``."""
    linear = np.zeros(region.shape, dtype=np.uint64)
    stride = 1
    for dim in reversed(range(len(shape))):
        along = np.asarray(region.indices(dim), dtype=np.uint64) * np.uint64(stride)
        linear += along.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        stride *= shape[dim]
    return linear.reshape(-1)


def element_bytes(seed: int, fqn: str, shape: Sequence[int], index: Sequence[int], dtype: str) -> bytes:
    """Returns the bytes of the element at the global ``index`` of the tensor ``fqn``."""
    region = Region(tuple(((i, 1),) for i in index))
    return shard_bytes(seed, fqn, shape, region, dtype).tobytes()


def overwritten(content: Bytes, dtype: str) -> Bytes:
    """Returns bytes that differ from ``content`` in each element: what a destination holds before a load."""
    return content ^ np.uint8(1 if dtype == "bool" else 0xFF)


def _key(seed: int, fqn: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{fqn}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _encode(key: int, linear: _U64, dtype: str) -> Bytes:
    size = DTYPES[dtype]
    position = linear + np.uint64(key)
    if size == 16:
        lanes: npt.NDArray[np.unsignedinteger] = np.stack([_mix64(position), _mix64(~position)], axis=-1)
    else:
        lanes = _mix32(position) if size == 4 else _mix64(position)
    data = lanes.astype(lanes.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    data = data.reshape(len(linear), max(lanes.itemsize, size))[:, :size]
    if dtype == "bool":
        return data & np.uint8(1)
    data = np.ascontiguousarray(data)
    choice = (position * _GOLDEN_64) >> _58
    extreme = np.flatnonzero(choice < _NUM_EXTREMES)
    data[extreme] = _EXTREMES_BY_SIZE[size][choice[extreme]]
    return data


_EXTREMES = ((0x00, 0x00), (0x00, 0x80), (0xFF, 0x7F), (0xFF, 0xFF))
"""The extremes, each as its lower bytes and its highest byte; bytes are little-endian."""

_EXTREMES_BY_SIZE = {
    size: np.array([[low] * (size - 1) + [high] for low, high in _EXTREMES], dtype=np.uint8)
    for size in (1, 2, 4, 8, 16)
}


_NUM_EXTREMES: Final = np.uint64(len(_EXTREMES))
_GOLDEN_64: Final = np.uint64(0x9E3779B97F4A7C15)
_16, _13 = np.uint32(16), np.uint32(13)
_58, _30, _27, _31 = np.uint64(58), np.uint64(30), np.uint64(27), np.uint64(31)
_MURMUR: Final = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_SPLIT_MIX: Final = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
"""Made once: on a small tensor, numpy takes longer over a new scalar than over the array."""


def _mix64(x: _U64) -> _U64:
    x = (x ^ (x >> _30)) * _SPLIT_MIX[0]
    x = (x ^ (x >> _27)) * _SPLIT_MIX[1]
    return x ^ (x >> _31)


def _mix32(x: _U64) -> npt.NDArray[np.uint32]:
    low = x.astype(np.uint32)  # the lower 32 bits
    low = (low ^ (low >> _16)) * _MURMUR[0]
    low = (low ^ (low >> _13)) * _MURMUR[1]
    return low ^ (low >> _16)
