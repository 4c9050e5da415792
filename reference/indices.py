"""Making `MetadataIndex` in numbers."""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

__all__ = ["new_index"]


def new_index(fqn: str, offset: torch.Size | None, hint: int | None) -> MetadataIndex:
    """Return `MetadataIndex(fqn, offset, hint)` for an `offset` that is a size already.

    The class's own constructor makes a size of it once more, which takes most of its time.
    """
    index = MetadataIndex.__new__(MetadataIndex)
    index.__dict__.update(fqn=fqn, offset=offset, index=hint)
    return index
