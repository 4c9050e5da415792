"""The backend ``reference``: the independent implementation in ``reference/``, all of its own."""

from __future__ import annotations

import reference
from dcpbench.backends.protocol import Engine, StorageBackend

__all__ = ["BACKEND"]

BACKEND = StorageBackend(
    "reference",
    writer=reference.FileSystemWriter,
    reader=reference.FileSystemReader,
    engine=Engine(reference.save, reference.load),
)
