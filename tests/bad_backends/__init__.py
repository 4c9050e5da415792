"""Backends that are no backends: each breaks the contract itself, not a rule of checkpointing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed.checkpoint as dcp

from dcpbench import EngineBackend, StorageBackend

__all__ = [
    "ends_its_location",
    "has_no_location",
    "kills_itself",
    "prints_without_end",
    "returns_nonsense",
    "takes_no_argument",
    "unheard_of",
]

MANY_BYTES = 1 << 28
"""What one save prints."""


def _no_argument() -> dcp.StorageWriter:
    return dcp.FileSystemWriter("never")


def _nonsense(_checkpoint_id: str) -> Any:
    return 42


def _end(_state_dict: dict[str, Any], _checkpoint_id: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _print_and_raise(_state_dict: dict[str, Any], _checkpoint_id: str) -> None:
    line = "x" * (1 << 20)
    for _ in range(MANY_BYTES // len(line)):
        sys.stdout.write(line)
    raise RuntimeError("nothing was saved")


def _load(_state_dict: dict[str, Any], _checkpoint_id: str) -> None:
    raise AssertionError("there is nothing to load")


@contextmanager
def _no_location() -> Iterator[str]:
    raise ConnectionError("the server did not start")
    yield ""


@contextmanager
def _ending_location() -> Iterator[str]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield ""


has_no_location = EngineBackend("has-no-location", _load, _load, location=_no_location)
ends_its_location = EngineBackend("ends-its-location", _load, _load, location=_ending_location)
unheard_of = EngineBackend("unheard-of", _load, _load, absent=("colour",))
takes_no_argument = StorageBackend("takes-no-argument", _no_argument, dcp.FileSystemReader)  # type: ignore[arg-type]
returns_nonsense = StorageBackend("returns-nonsense", _nonsense, dcp.FileSystemReader)
kills_itself = EngineBackend("kills-itself", _end, _load)
prints_without_end = EngineBackend("prints-without-end", _print_and_raise, _load)
