"""Which parts of DCP a backend is built on: torch's known defects are then not the backend's own. Runs on a rank.

A storage backend is driven by torch's engine and planners unless it brings others, a planner may subclass torch's, and
an engine may wrap ``torch.distributed.checkpoint.save``. Rather than guess from types, a small state dict is saved and
loaded, and the functions of torch that run meanwhile tell.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from dcpbench.backends.protocol import TORCH_STATE_DICT, Backend, state_dict_functions
from dcpbench.backends.registry import resolve

__all__ = ["describe", "torch_parts"]

_FOLDER = str(Path(dcp.__file__).parent)
_PART_OF_FILE = {
    "state_dict_saver.py": "engine",
    "state_dict_loader.py": "engine",
    "default_planner.py": "planner",
    "planner_helpers.py": "planner",
    "filesystem.py": "storage",
    "_fsspec_filesystem.py": "storage",
    "hf_storage.py": "storage",
}


_PROBES: tuple[dict[str, Any], ...] = ({"tensor": torch.zeros(2), "value": 0}, {"tensor": torch.zeros(2)}, {"value": 0})
"""A backend that has no values, or no tensors, refuses the first one."""


def describe(_rank: int, _world_size: int, specification: str, folder: str) -> tuple[str, ...]:
    """Runs on ranks: returns :func:`torch_parts` of the backend that ``specification`` names, as this rank saw it.

    Args:
        specification: of the backend.
        folder: a fresh one, the same on all ranks.
    """
    return torch_parts(resolve(specification), Path(folder))


def torch_parts(backend: Backend, folder: Path) -> tuple[str, ...]:
    """Returns the parts of torch's DCP that ``backend`` runs: some of engine, planner, state_dict, storage; sorted.

    A backend that cannot save and load two small leaves shows what ran until it raised; it is then asked with a tensor
    alone, and with a value alone.
    """
    found: set[str] = set()
    if state_dict_functions(backend) is TORCH_STATE_DICT:
        found.add("state_dict")
    with warnings.catch_warnings(), _watching(found):
        warnings.simplefilter("ignore")  # torch warns that there is no process group, which is on purpose
        for number, probe in enumerate(_PROBES):
            try:
                session, held = backend.open(reuse=False), dict(probe)
                session.save(held, str(folder / str(number)))
                session.load(held, str(folder / str(number)))
            except BaseException as error:  # the suites say what is wrong with the backend; this only looks
                if isinstance(error, KeyboardInterrupt):
                    raise
            else:
                break
    return tuple(sorted(found))


@contextmanager
def _watching(found: set[str]) -> Iterator[None]:
    """Adds to ``found`` the part of each function of torch's DCP that is called within, in any thread."""

    def look(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(_FOLDER):
            return
        part = _PART_OF_FILE.get(Path(frame.f_code.co_filename).name)
        if part is not None and not _is_shared(frame.f_code.co_qualname):
            found.add(part)

    threading.setprofile(look)
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def _is_shared(function: str) -> bool:
    """Reads as: any implementation of DCP's interface calls it, such as the pickling of a data type."""
    return any(name.startswith("__") or name == "<module>" for name in function.split("."))
