"""The dtypes of safetensors: their names, sizes and order in a file, and torch's dtypes for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .strict_json import SafetensorsError

__all__ = ["NUM_BITS", "ORDER", "num_bytes_of", "stored_as", "torch_dtype", "torch_size"]

NUM_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
ORDER = {name: position for position, name in enumerate(NUM_BITS)}
"""Tensors lie in a file by dtype, last in this list first, so that each is aligned; then by name."""

_TORCH_DTYPES = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}


def stored_as(dtype: torch.dtype, size: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Return the format's dtype name and shape of a torch tensor.

    Raises:
        SafetensorsError: the format cannot hold such a tensor.
    """
    name = _NAMES.get(dtype)
    if name is None:
        raise SafetensorsError(f"Expected a dtype that safetensors has but got dtype={dtype!r}. Convert the tensor.")
    shape = tuple(size)
    if name == "F4":
        if not shape:
            raise SafetensorsError(
                f"Expected at least one dim for dtype={dtype!r} but got shape=(). Reshape the tensor."
            )
        shape = (*shape[:-1], shape[-1] * 2)
    return name, shape


def torch_dtype(name: str) -> torch.dtype | None:
    """Return torch's dtype of that name, or None if torch has none."""
    return _TORCH_DTYPES.get(name)


def torch_size(dtype: str, shape: Sequence[int]) -> torch.Size:
    """Return the shape that torch gives a tensor of that dtype and shape in a file.

    Raises:
        SafetensorsError: an odd number of 4-bit elements, which torch cannot hold.
    """
    if dtype != "F4":
        return torch.Size(shape)
    if not shape or shape[-1] % 2:
        raise SafetensorsError(f"Expected an even last dim for dtype 'F4' but got shape={list(shape)}.")
    return torch.Size((*shape[:-1], shape[-1] // 2))


def num_bytes_of(dtype: str, shape: Sequence[int], what: str) -> int:
    """Return the bytes of a tensor; 0 if it is empty.

    Args:
        dtype: the format's name.
        shape: as in the file.
        what: names the tensor in errors.

    Raises:
        SafetensorsError: its bits are no whole number of bytes.
    """
    num_bits = math.prod(shape) * NUM_BITS[dtype]
    if num_bits % 8:
        raise SafetensorsError(f"Expected a whole number of bytes but got {num_bits} bits for {what}, {dtype}.")
    return num_bits // 8
