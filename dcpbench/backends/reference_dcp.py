"""The backend ``reference``: the independent implementation in ``reference/``, all of its own."""

from __future__ import annotations

from typing import cast

import reference
from dcpbench.backends.protocol import Engine, Formats, StateDictFunctions, StorageBackend
from reference import format_utils, state_dict

__all__ = ["BACKEND"]

BACKEND = StorageBackend(
    "reference",
    writer=reference.FileSystemWriter,
    reader=reference.FileSystemReader,
    engine=Engine(reference.save, reference.load, reference.async_save, cast("StateDictFunctions", state_dict)),
    save_planner=reference.DefaultSavePlanner,
    load_planner=reference.DefaultLoadPlanner,
    formats=Formats(format_utils.dcp_to_torch_save, format_utils.torch_save_to_dcp),
)
