"""Turns a case into a standalone script for a bug report: torch alone, no dcpbench. Runs in the controller.

The script is `dcpbench/standalone.py` with the steps of the case filled in, the bytes of each tensor as text.
"""

from __future__ import annotations

import pprint
from pathlib import Path
from typing import Any, Final

from dcpbench.case import Case, Placement
from dcpbench.errors import expected

__all__ = ["as_script"]

MAX_BYTES: Final = 1 << 20

_ENGINES: Final = {"torch": "torch.distributed.checkpoint", "reference": "reference"}
_ENGINE_LINE: Final = "import torch.distributed.checkpoint as dcp  # isort: skip  (the engine)\n"
_STEPS_LINE: Final = "STEPS: list[dict[str, Any]] = []\n"


def as_script(case: Case, backend: str) -> str:
    """Returns the text of a script that shows what ``case`` shows on ``backend``.

    Raises:
        UsageError: the tensors hold more than 1 MiB, a step is a misuse, or the backend is not one that ships.
    """
    if backend not in _ENGINES:
        raise expected(
            f"one of {', '.join(sorted(_ENGINES))}", "--backend", backend, "Adapt the script of one of them."
        )
    size = sum(leaf.num_bytes for leaf in case.tensors)
    if size > MAX_BYTES:
        raise expected(f"a case of at most {MAX_BYTES} bytes", "bytes of its tensors", size, "Shrink it first.")
    if misused := [step.misuse for step in case.steps if step.misuse != "none"]:
        raise expected("a case without misuse", "misuse", misused[0], "Use dcpbench replay for it.")
    steps = [_step(case, number) for number in range(len(case.steps))]
    text = Path(__file__).with_name("standalone.py").read_text(encoding="utf-8")
    body = text.split('"""', 2)[2]
    docstring = f'"""Case {case.id}: run as `python THIS_FILE`. Exits with 1 where the defect shows."""'
    body = body.replace(_ENGINE_LINE, f"import {_ENGINES[backend]} as dcp\n")
    return docstring + body.replace(_STEPS_LINE, f"STEPS = {pprint.pformat(steps, width=110, sort_dicts=False)}\n")


def _step(case: Case, number: int) -> dict[str, Any]:
    step = case.steps[number]
    layout = case.layouts[step.layout]
    asked_for = case.asked_for(number)
    first_value = len(case.tensors)
    return {
        "action": step.action,
        "checkpoint": step.checkpoint,
        "world_size": layout.world_size,
        "distributed": layout.distributed,
        "mesh": (layout.mesh.ranks, layout.mesh.sizes, layout.mesh.axes),
        "tensors": [_tensor(case, number, leaf) for leaf in asked_for if leaf < first_value],
        "values": [
            (_path(case, leaf), case.objects[leaf - first_value].value(case.version_held(number)))
            for leaf in asked_for
            if leaf >= first_value
        ],
    }


def _tensor(case: Case, number: int, leaf: int) -> dict[str, Any]:
    tensor, layout = case.tensors[leaf], case.layouts[case.steps[number].layout]
    placed = layout.leaves[leaf]
    shards: list[tuple[tuple[int, ...], str] | None] = []
    for rank in range(layout.world_size):
        region = layout.region(leaf, tensor.shape, rank)
        data = case.expected_bytes(leaf, case.version_held(number), region).tobytes() if region else b""
        shards.append((region.shape, data.hex()) if region else None)
    return {
        "path": _path(case, leaf),
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "placements": None if placed.placements is None else [_placement(p) for p in placed.placements],
        "memory": placed.memory,
        "shards": shards,
    }


def _path(case: Case, leaf: int) -> list[Any]:
    """Returns the parts of a path: keys as they are, a list index as a tuple of one."""
    return [(part.value,) if part.kind == "index" else part.value for part in case.leaves[leaf].path]


def _placement(placement: Placement) -> tuple[str, tuple[int, ...], dict[str, int]]:
    if placement.dim is None:
        return "Replicate", (), {}
    if placement.split_factor == 1:
        return "Shard", (placement.dim,), {}
    return "_StridedShard", (placement.dim,), {"split_factor": placement.split_factor}
