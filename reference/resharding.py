"""Where two chunks meet, under torch's module name; see `boxes`."""

from __future__ import annotations

from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from .boxes import intersect

__all__ = ["_check_shard_metadata_pair_overlap", "_shards_get_overlap_region_wrt_saved_tensor"]


def _check_shard_metadata_pair_overlap(shard1: ChunkStorageMetadata, shard2: ChunkStorageMetadata) -> bool:
    """Whether two chunks have an element in common."""
    return intersect(shard1.offsets, shard1.sizes, shard2.offsets, shard2.sizes) is not None


def _shards_get_overlap_region_wrt_saved_tensor(
    saved_shard: ChunkStorageMetadata, current_shard: ChunkStorageMetadata
) -> list[tuple[int, int, int, int]]:
    """Return `(dim, offset in the saved chunk, offset in the current one, length)` of what two chunks share, by dim."""
    common = intersect(saved_shard.offsets, saved_shard.sizes, current_shard.offsets, current_shard.sizes)
    if common is None:
        raise ValueError(f"Expected chunks that overlap but got {saved_shard} and {current_shard}.")
    return [
        (dim, at - saved_shard.offsets[dim], at - current_shard.offsets[dim], length)
        for dim, (at, length) in enumerate(zip(*common, strict=True))
    ]
