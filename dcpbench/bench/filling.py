"""The content of benchmark states: a function of (FQN, global index), quick enough for gigabytes. numpy only.

Any rank can make any part, so that a state may be loaded under another layout and still be checked to the byte.

Source of the bijection: the finaliser of MurmurHash3, public domain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dcpbench.geometry import Region, Run

__all__ = ["STALE", "fill"]

STALE: Final = 0xA5
"""What each byte of a destination holds before a load."""

_BLOCK: Final = 1 << 16

_Words = npt.NDArray[np.unsignedinteger[Any]]


def fill(out: _Words, fqn: str, shape: Sequence[int], region: Region) -> None:
    """Fills ``out`` with what belongs in ``region`` of the tensor ``fqn``.

    Args:
        out: contiguous, of the region's shape, one unsigned word of 2 or 4 bytes per element.
        fqn: tensors of other names get other content.
        shape: of the global tensor; a 0-d one has one element.
        region: what is wanted of it.
    """
    key = np.uint32(int.from_bytes(hashlib.blake2b(fqn.encode(), digest_size=4).digest(), "little"))
    rows = out.reshape(out.shape[0], -1) if out.ndim and out.size else out.reshape(1, out.size)
    strides = [int(np.prod(shape[dim + 1 :], dtype=np.int64)) for dim in range(len(shape))]
    along = [_indices(runs) * np.uint32(stride % 2**32) for runs, stride in zip(region.runs, strides, strict=True)]
    first = along[0] if along else np.zeros(1, dtype=np.uint32)
    inner = np.zeros(1, dtype=np.uint32)
    for more in along[1:]:
        inner = np.add.outer(inner, more).reshape(-1)
    columns = max(1, min(_BLOCK, len(inner)))
    height = max(1, _BLOCK // columns)
    for top in range(0, len(first) if out.size else 0, height):
        for left in range(0, len(inner), columns):
            part = np.add.outer(first[top : top + height] + key, inner[left : left + columns])
            _mix(part)
            rows[top : top + height, left : left + columns] = part  # the lower half, where words are narrow


def _indices(runs: Sequence[Run]) -> npt.NDArray[np.uint32]:
    parts = [np.arange(start, start + length, dtype=np.int64) for start, length in runs]
    return np.concatenate(parts).astype(np.uint32) if parts else np.zeros(0, dtype=np.uint32)


def _mix(x: npt.NDArray[np.uint32]) -> None:
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
