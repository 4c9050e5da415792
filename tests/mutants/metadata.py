"""Mutants whose metadata is wrong."""

from __future__ import annotations

import dataclasses
import unicodedata
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.mutants.bank import SavePlanner, any_key, any_tensor, breaks


def _with_last(tensor: TensorStorageMetadata, **fields: Any) -> TensorStorageMetadata:
    *others, last = tensor.chunks
    return dataclasses.replace(tensor, chunks=[*others, dataclasses.replace(last, **fields)])


def _is_uneven(tensor: TensorStorageMetadata) -> bool:
    sizes = [chunk.sizes for chunk in tensor.chunks if 0 not in chunk.sizes]
    return len(tensor.chunks) == len(sizes) > 1 and sizes[-1][:1] < sizes[0][:1]


@breaks("R301", "R501", suite="round_trips")
class gap_in_metadata(SavePlanner):
    """Records an uneven last chunk without its last row."""

    def bend(self, fqn: str, tensor: TensorStorageMetadata) -> TensorStorageMetadata:
        if not _is_uneven(tensor):
            return tensor
        first, *rest = tensor.chunks[-1].sizes
        return _with_last(tensor, sizes=torch.Size([first - 1, *rest]))


@breaks("R302", suite="round_trips")
class overlap_in_metadata(SavePlanner):
    """Records an uneven last chunk as one that ends with the tensor but has the size of the others."""

    def bend(self, fqn: str, tensor: TensorStorageMetadata) -> TensorStorageMetadata:
        if not _is_uneven(tensor):
            return tensor
        sizes, offsets = tensor.chunks[0].sizes, tensor.chunks[-1].offsets
        at = torch.Size([tensor.chunks[-1].offsets[0] + tensor.chunks[-1].sizes[0] - sizes[0], *offsets[1:]])
        return _with_last(tensor, offsets=at, sizes=torch.Size([sizes[0], *tensor.chunks[-1].sizes[1:]]))


@breaks("R303", suite="round_trips")
class chunk_out_of_bounds(SavePlanner):
    """Records an uneven last chunk with the size of the others, beyond the end of the tensor."""

    def bend(self, fqn: str, tensor: TensorStorageMetadata) -> TensorStorageMetadata:
        return _with_last(tensor, sizes=tensor.chunks[0].sizes) if _is_uneven(tensor) else tensor


@breaks("R304", suite="round_trips", on=any_tensor(lambda leaf: 0 in leaf.shape))
class forgetful_metadata(SavePlanner):
    """Has no entry for a tensor without elements."""

    def bend(self, fqn: str, tensor: TensorStorageMetadata) -> TensorStorageMetadata | None:
        return tensor if tensor.size.numel() else None


@breaks("R304", suite="round_trips", on=any_tensor(lambda leaf: leaf.dtype == "bool"))
class bool_recorded_as_uint8(SavePlanner):
    """Records bool tensors as uint8."""

    def bend(self, fqn: str, tensor: TensorStorageMetadata) -> TensorStorageMetadata:
        is_bool = tensor.properties.dtype == torch.bool
        return (
            dataclasses.replace(tensor, properties=dataclasses.replace(tensor.properties, dtype=torch.uint8))
            if is_bool
            else tensor
        )


@breaks("R304", "R501", suite="round_trips", on=any_tensor(lambda leaf: not leaf.shape))
class scalar_recorded_as_vector(SavePlanner):
    """Records a 0-d tensor as one of one dim."""

    def bend(self, fqn: str, tensor: TensorStorageMetadata) -> TensorStorageMetadata:
        return tensor if tensor.size else dataclasses.replace(tensor, size=torch.Size([1]))


@breaks("R304", "R501", suite="round_trips")
class padded_size_recorded(SavePlanner):
    """Records the size that a tensor has once it is padded to even chunks."""

    def bend(self, fqn: str, tensor: TensorStorageMetadata) -> TensorStorageMetadata:
        if not _is_uneven(tensor):
            return tensor
        rows = len({chunk.offsets[0] for chunk in tensor.chunks}) * tensor.chunks[0].sizes[0]
        return dataclasses.replace(tensor, size=torch.Size([rows, *tensor.size[1:]]))


class RenamingMetadata(SavePlanner):
    """Changes the keys of the metadata."""

    def rename(self, fqn: str) -> str:
        raise NotImplementedError

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        held = {self.rename(fqn): entry for fqn, entry in metadata.state_dict_metadata.items()}
        return plans, dataclasses.replace(metadata, state_dict_metadata=held)


@breaks("R304", "R501", suite="round_trips", on=any_key(lambda fqn: fqn.lower() != fqn))
class lower_case_keys(RenamingMetadata):
    """Records keys in lower case."""

    def rename(self, fqn: str) -> str:
        return fqn.lower()


@breaks("R304", "R501", suite="round_trips", on=any_key(lambda fqn: fqn.strip() != fqn))
class stripped_keys(RenamingMetadata):
    """Records keys without white space at their ends."""

    def rename(self, fqn: str) -> str:
        return fqn.strip()


@breaks("R304", "R501", suite="round_trips", on=any_key(lambda fqn: len(fqn.encode()) > 12))
class clipped_keys(RenamingMetadata):
    """Records the first 12 bytes of a key."""

    def rename(self, fqn: str) -> str:
        return fqn.encode("utf-8", "surrogatepass")[:12].decode("utf-8", "ignore")


@breaks("R304", "R501", suite="round_trips", on=any_key(lambda fqn: fqn.startswith("module.")))
class module_prefix_removed(RenamingMetadata):
    """Records keys without the prefix that DistributedDataParallel gives them."""

    def rename(self, fqn: str) -> str:
        return fqn.removeprefix("module.")


@breaks("R304", "R501", suite="round_trips", on=any_key(lambda fqn: not unicodedata.is_normalized("NFC", fqn)))
class normalised_keys(RenamingMetadata):
    """Records keys in Unicode's composed form."""

    def rename(self, fqn: str) -> str:
        return unicodedata.normalize("NFC", fqn)
