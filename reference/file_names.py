"""The names of files in a checkpoint's folder, as DCP gives them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch.distributed.checkpoint.filesystem import _StoragePrefix

__all__ = ["DATA_FILE", "METADATA", "SUFFIX", "is_local", "metadata_path", "next_generation", "prefix_for"]

SUFFIX = ".distcp"
METADATA = ".metadata"
DATA_FILE = re.compile(r"__(?P<rank>\d+)_(?:g(?P<generation>\d+)_)?\d+\.distcp")
"""Data files, from here (where a generation tells apart saves into the same folder) or from torch."""


def metadata_path(folder: Path, rank: int | None) -> Path:
    """Return the file that commits a checkpoint: the whole one, or that of a rank which saved alone."""
    return folder / (METADATA if rank is None else f"__{rank}{METADATA}")


def prefix_for(rank: int, generation: int) -> _StoragePrefix:
    """Return how the names of a rank's data files begin; torch's own names, in a fresh folder."""
    return _StoragePrefix(f"__{rank}_g{generation}_" if generation else f"__{rank}_")


def next_generation(folder: Path) -> int:
    """Return 0 for a folder without data files, else one more than the highest generation in any file name."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    taken = [int(match["generation"] or 0) for name in names if (match := DATA_FILE.fullmatch(name))]
    return max(taken) + 1 if taken else 0


def is_local(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Whether `checkpoint_id` is a path rather than a URL."""
    return "://" not in str(checkpoint_id)
