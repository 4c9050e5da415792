"""Turning block-quantized values into numbers: pure functions of tensors."""

from __future__ import annotations

import torch

__all__ = ["scale_blocks", "unpack_mxfp4"]

_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_EXPONENT_BIAS = 127


def scale_blocks(
    weight: torch.Tensor,
    scale: torch.Tensor,
    offsets: tuple[int, int],
    block_size: int,
    target_dtype: torch.dtype,
) -> torch.Tensor:
    """Return `weight` with each element multiplied, in float32, by the scale of its block.

    Args:
        weight: box of a matrix, of shape (rows, columns); may be empty.
        scale: scales of the whole matrix, one for each square block.
        offsets: row and column of the matrix at which `weight` begins.
        block_size: rows and columns of a block; those at the far edges may be smaller.
        target_dtype: of the result.
    """
    row_blocks, column_blocks = (
        torch.arange(begin, begin + length) // block_size for begin, length in zip(offsets, weight.size(), strict=True)
    )
    factors = scale.to(torch.float32)[row_blocks][:, column_blocks]
    return (weight.to(torch.float32) * factors).to(target_dtype)


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, target_dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers of MXFP4 groups: two 4-bit floats in each byte, the low half first, times a power of two.

    Args:
        blocks: uint8, of shape (…, groups, bytes); may be empty.
        scales: uint8, of shape (…, groups): exponents, biased by 127.
        target_dtype: of the result, which has shape (…, groups * bytes * 2).

    Source: OCP Microscaling Formats (MX) Specification 1.0; torch's reader for the rounding.
    """
    values = torch.tensor(_FP4_VALUES, dtype=target_dtype)
    halves = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).to(torch.int64)
    exponents = scales.to(torch.int32) - _EXPONENT_BIAS
    numbers = torch.ldexp(values[halves], exponents[..., None, None]).to(target_dtype)
    *prefix, groups, num_bytes = blocks.size()
    return numbers.reshape(*prefix, groups * num_bytes * 2)
