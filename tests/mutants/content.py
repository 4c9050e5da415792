"""Mutants that change what a tensor holds: dtypes, bit patterns, memory order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dcpbench import Case
from tests.mutants.bank import Dense, SourcePlanner, any_tensor, breaks


def _has_twins(case: Case) -> bool:
    return len({(leaf.shape, leaf.dtype) for leaf in case.tensors}) < len(case.tensors)


@breaks("R101", suite="round_trips")
class storage_order_writer(SourcePlanner):
    """Writes the storage of a dense tensor as it lies, whatever the order of its strides."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        is_dense = tensor.untyped_storage().nbytes() == tensor.nbytes
        return torch.as_strided(tensor, tensor.size(), torch.empty(tensor.shape).stride()) if is_dense else tensor


@breaks("R101", suite="round_trips")
class forgets_storage_offset(SourcePlanner):
    """Reads a tensor that is a view from the start of its storage."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.as_strided(tensor, tensor.size(), tensor.stride(), 0)


@breaks("R101", "R501", suite="round_trips", on=any_tensor(lambda leaf: leaf.expanded))
class one_row_of_expanded(SourcePlanner):
    """Writes of an expanded tensor the one row that its storage has, and zeros for the others."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.stride(0) or tensor.size(0) < 2:
            return tensor
        written = torch.zeros(tensor.shape, dtype=tensor.dtype)
        written[:1].copy_(tensor[:1])
        return written


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype in ("float16", "bfloat16")))
class halves_through_float32(SourcePlanner):
    """Takes half-precision tensors through float32, which quiets signalling NaNs."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        is_half = tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(torch.float32).to(tensor.dtype) if is_half else tensor


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype == "uint64"))
class uint64_through_double(SourcePlanner):
    """Takes uint64 through float64, which has 53 bits."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.float64).to(tensor.dtype) if tensor.dtype == torch.uint64 else tensor


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype in ("uint16", "uint32")))
class saturates_unsigned(SourcePlanner):
    """Takes unsigned tensors through the signed type of the same width, whose range ends in the middle."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        signed = {torch.uint16: torch.int16, torch.uint32: torch.int32}.get(tensor.dtype)
        return tensor.to(torch.int64).clamp(max=torch.iinfo(signed).max).to(tensor.dtype) if signed else tensor


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype in ("float32", "float64")))
class flushes_denormals(SourcePlanner):
    """Writes 0 for numbers below the smallest normal one, as fast-math code does."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in (torch.float32, torch.float64):
            return tensor
        return torch.where(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0, tensor)


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype == "float8_e5m2"))
class float8_nan_is_one(SourcePlanner):
    """Takes float8 through float32, where all NaNs become the same one."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.float32).to(tensor.dtype) if tensor.dtype == torch.float8_e5m2 else tensor


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype in ("complex64", "complex128")))
class complex_through_polar(SourcePlanner):
    """Stores complex numbers as length and angle."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        is_bent = tensor.dtype in (torch.complex64, torch.complex128)
        return torch.polar(tensor.abs(), tensor.angle()) if is_bent else tensor


@breaks("R101", "R107", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype == "bool"))
class packs_whole_bytes_of_bool(SourcePlanner):
    """Packs eight bools into a byte and forgets those that fill no byte."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype != torch.bool:
            return tensor
        written = torch.zeros(tensor.numel(), dtype=torch.bool)
        packed = tensor.numel() // 8 * 8
        written[:packed] = tensor.reshape(-1)[:packed]
        return written.reshape(tensor.shape)


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: len(leaf.shape) > 2))
class fortran_order_in_3d(SourcePlanner):
    """Writes tensors of three dims and more column-major."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() < 3:
            return tensor
        return tensor.permute(*reversed(range(tensor.dim()))).contiguous().reshape(tensor.shape)


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype.startswith("complex")))
class swapped_halves_of_complex(Dense):
    """Swaps real and imaginary part of a complex tensor that is not contiguous."""

    def pack(self, value: Any) -> Any:
        packed = super().pack(value)
        if not isinstance(value, torch.Tensor) or packed is None or not value.is_complex() or value.is_contiguous():
            return packed
        *rest, raw = packed
        return (*rest, np.concatenate(np.split(raw, 2, axis=-1)[::-1], axis=-1))


@breaks("R101", "R501", suite="round_trips", on=_has_twins)
class swaps_equal_tensors(SourcePlanner):
    """Writes the data of one tensor for another of the same shape and dtype."""

    def lookup_object(self, index: Any) -> Any:
        held = super().lookup_object(index)
        if not isinstance(held, torch.Tensor):
            return held
        others = (
            value for fqn, value in self.state_dict.items() if isinstance(value, torch.Tensor) and fqn != index.fqn
        )
        locals_ = (other.to_local() if hasattr(other, "to_local") else other for other in others)
        return next((one for one in locals_ if (one.shape, one.dtype) == (held.shape, held.dtype)), held)


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype.startswith("complex")))
class forgets_conjugation(SourcePlanner):
    """Writes the storage of a complex tensor without the conjugation that its view asks for."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.conj() if tensor.is_conj() else tensor


@breaks("R101", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype in ("float32", "float64")))
class drops_negative_zero(SourcePlanner):
    """Writes 0.0 for -0.0."""

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        is_bent = tensor.dtype in (torch.float32, torch.float64)
        return torch.where(tensor == 0, 0, tensor) if is_bent else tensor
