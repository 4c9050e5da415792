"""Turns a case into a standalone script for a bug report: torch alone, no dcpbench. Runs in the controller.

The script is `dcpbench/standalone.py` with the steps of the case filled in, the bytes of each tensor as text.
"""

from __future__ import annotations

import json
import pprint
from pathlib import Path
from typing import Any, Final

from dcpbench import object_kinds
from dcpbench.case import Case, ObjectLeaf, Placement
from dcpbench.case_files import AnyCase
from dcpbench.content import overwritten
from dcpbench.errors import expected
from dcpbench.geometry import Region
from dcpbench.models.case import TrainingCase
from dcpbench.protocol_case import ProtocolCase
from dcpbench.training_script import as_training_script

__all__ = ["as_script"]

MAX_BYTES: Final = 1 << 20

_ENGINES: Final = {"torch": "torch.distributed.checkpoint", "reference": "reference"}
_ENGINE_LINES: Final = (
    "import torch.distributed.checkpoint as dcp  # isort: skip  (the engine)\n"
    "import torch.distributed.checkpoint.format_utils as formats  # isort: skip  (the engine)\n"
)
_STEPS_LINE: Final = "STEPS: list[dict[str, Any]] = []\n"


def as_script(case: AnyCase, backend: str) -> str:
    """Returns the text of a script that shows what ``case`` shows on ``backend``.

    Raises:
        UsageError: the case is one of virtual ranks, the tensors hold more than 1 MiB, a load is a misuse, a value is
            of a kind that Python does not write as it is, or the backend is not one that ships.
    """
    if isinstance(case, TrainingCase):
        return as_training_script(case, backend)
    if isinstance(case, ProtocolCase):
        raise expected("a case of real ranks", "part", case.part, "Use dcpbench replay: its ranks are virtual.")
    if backend not in _ENGINES:
        raise expected(
            f"one of {', '.join(sorted(_ENGINES))}", "--backend", backend, "Adapt the script of one of them."
        )
    size = sum(leaf.num_bytes for leaf in case.tensors)
    if size > MAX_BYTES:
        raise expected(f"a case of at most {MAX_BYTES} bytes", "bytes of its tensors", size, "Shrink it first.")
    kinds = {step.misuse for step in case.steps} - {"none", "unsavable", "failing-stateful"}
    if kinds:
        raise expected("a case without misuse of a load", "misuse", min(kinds), "Use dcpbench replay for it.")
    for leaf in case.objects:
        if not _is_literal(leaf):
            raise expected("values that read as Python", "value", leaf.encoded, "Use dcpbench replay for it.")
    steps = [_step(case, number) for number in range(len(case.steps))]
    text = Path(__file__).with_name("standalone.py").read_text(encoding="utf-8")
    body = text.split('"""', 2)[2]
    docstring = f'"""Case {case.id}: run as `python THIS_FILE`. Exits with 1 where the defect shows."""'
    engine = _ENGINES[backend]
    body = body.replace(_ENGINE_LINES, f"import {engine} as dcp\nimport {engine}.format_utils as formats\n")
    return docstring + body.replace(_STEPS_LINE, f"STEPS = {pprint.pformat(steps, width=110, sort_dicts=False)}\n")


def _step(case: Case, number: int) -> dict[str, Any]:
    step = case.steps[number]
    layout = case.layouts[step.layout]
    asked_for = case.asked_for(number)
    first_value = len(case.tensors)
    tensors = [_tensor(case, number, leaf) for leaf in asked_for if leaf < first_value]
    values = [_value(case, number, leaf) for leaf in asked_for if leaf >= first_value]
    failing = [step.misused_on] if step.misused_on is not None else list(range(layout.world_size))
    planner, writer, call = _options(case, number)
    return {
        "action": step.action,
        "id": _checkpoint_id(case, number),
        "target": step.target,
        "world_size": layout.world_size,
        "distributed": layout.distributed,
        "members": layout.members,
        "meshes": list(dict.fromkeys(tensor["mesh"] for tensor in tensors if tensor["mesh"] is not None)),
        "tensors": tensors,
        "values": values,
        "statefuls": list(case.options.statefuls),
        "failing": failing if step.misuse == "failing-stateful" else [],
        "must_fail": step.misuse != "none",
        "resaves": step.resaves,
        "is_left_open": step.is_left_open,
        "reuse": case.options.reuse,
        "planner": planner,
        "writer": writer,
        "call": call,
    }


def _options(case: Case, number: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Returns the arguments of the planner, of the writer and of the call."""
    step, options = case.steps[number], case.options
    planner: dict[str, Any] = {} if options.is_flattened else {"flatten_state_dict": False}
    if step.saves and options.is_deduplicated_low:
        planner["dedup_save_to_lowest_rank"] = True
    if step.saves and options.caches_plans:
        planner["enable_plan_caching"] = True
    if step.lenient:
        planner["allow_partial_load"] = True
    writer: dict[str, Any] = {"single_file_per_rank": False} if options.has_file_per_item else {}
    if options.num_threads > 1:
        writer["thread_count"] = options.num_threads
    is_alone = options.no_dist and case.layouts[step.layout].world_size == 1
    return planner, writer, {"no_dist": True} if is_alone else {}


def _checkpoint_id(case: Case, number: int) -> str:
    name = case.steps[number].checkpoint
    form = {"relative": "{}", "slash": "FOLDER/{}/"}.get(case.options.id_form, "FOLDER/{}")
    return form.format(name)


def _tensor(case: Case, number: int, leaf: int) -> dict[str, Any]:
    layout, tensor = case.layouts[case.steps[number].layout], case.tensor(leaf, case.version_held(number))
    placed, mesh = layout.leaves[leaf], layout.mesh_of(leaf)
    shards: list[tuple[tuple[int, ...], str] | None] = []
    for rank in range(layout.world_size):
        region = layout.region(leaf, tensor.shape, rank)
        shards.append((region.shape, _bytes(case, number, leaf, region).hex()) if region else None)
    return {
        "path": _path(case, leaf),
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "placements": None if placed.placements is None else [_placement(p) for p in placed.placements],
        "mesh": None if placed.placements is None else (mesh.ranks, mesh.sizes, mesh.axes),
        "memory": placed.memory,
        "ranks": [rank for rank in range(layout.world_size) if layout.holds(leaf, rank)],
        "shards": shards,
    }


def _bytes(case: Case, number: int, leaf: int, region: Region) -> bytes:
    version = case.version_held(number)
    data = case.expected_bytes(leaf, version, region)
    if case.is_missing(number, leaf):  # it stays as it is before the load
        data = overwritten(data, case.tensor(leaf, version).dtype)
    return data.tobytes()


def _value(case: Case, number: int, leaf: int) -> dict[str, Any]:
    step, version = case.steps[number], case.version_held(number)
    layout, value = case.layouts[step.layout], case.objects[leaf - len(case.tensors)]
    source = case.source_of(number)
    saved_on = case.layouts[case.steps[number if source is None else source].layout]
    savers = [rank for rank in range(saved_on.world_size) if saved_on.holds(leaf, rank)]
    may_be = [value.value(version, rank) for rank in (savers if value.differs else savers[:1])]
    return {
        "path": _path(case, leaf),
        "held": [value.value(version, rank) for rank in range(layout.world_size)],
        "may_be": ["never loaded"] if case.is_missing(number, leaf) else may_be,
        "is_unsavable": step.misuse == "unsavable" and step.misused == leaf,
        "ranks": [rank for rank in range(layout.world_size) if layout.holds(leaf, rank)],
    }


def _is_literal(leaf: ObjectLeaf) -> bool:
    """Reads as: the value, as Python writes it, is the value again, without any import."""
    text = json.dumps(leaf.encoded)
    return not any(f'{{"{tag}": ' in text for tag in (*object_kinds.TAGS, "other"))


def _path(case: Case, leaf: int) -> list[Any]:
    """Returns the parts of a path: keys as they are, a list index as a tuple of one."""
    return [(part.value,) if part.kind == "index" else part.value for part in case.leaves[leaf].path]


def _placement(placement: Placement) -> tuple[str, tuple[int, ...], dict[str, int]]:
    if placement.dim is None:
        return "Replicate", (), {}
    if placement.split_factor == 1:
        return "Shard", (placement.dim,), {}
    return "_StridedShard", (placement.dim,), {"split_factor": placement.split_factor}
