"""Backends with a planted cost, and one that times itself: what the honesty experiment measures. Runs on ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dcpbench.backends.protocol import EngineBackend
from dcpbench.bench.planted_names import PLANTED_BYTES

__all__ = ["SLOWDOWN", "idle", "larger", "slower", "stamped"]

SLOWDOWN = 0.05


def _load(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    load(state_dict, checkpoint_id=checkpoint_id)


def _slower(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    begin = time.monotonic()
    save(state_dict, checkpoint_id=checkpoint_id)
    time.sleep(SLOWDOWN * (time.monotonic() - begin))


def _larger(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    held = bytearray(b"\1") * PLANTED_BYTES
    save(state_dict, checkpoint_id=checkpoint_id)
    del held


def _stamped(state_dict: dict[str, Any], checkpoint_id: str) -> None:
    """Saves, and writes down when that began and ended by the wall clock."""
    begin = time.time()
    save(state_dict, checkpoint_id=checkpoint_id)
    end = time.time()
    Path(f"{checkpoint_id}.rank-{dist.get_rank()}").write_text(json.dumps([begin, end]), encoding="utf-8")


def _idle(_state_dict: dict[str, Any], _checkpoint_id: str) -> None:
    """Does nothing: what is then measured is the harness."""


slower = EngineBackend("slower", _slower, _load)
larger = EngineBackend("larger", _larger, _load)
stamped = EngineBackend("stamped", _stamped, _load)
idle = EngineBackend("idle", _idle, _load)
