"""Hypothesis strategies: shapes, dtypes, values, meshes, placements, whole cases. They run in the controller."""

from dcpbench.strategies.cases import (
    bad_loads,
    bad_saves,
    multi_checkpoint,
    overwriting,
    partial_loads,
    resharding,
    round_trips,
    without_process_group,
)
from dcpbench.strategies.contents import contents, scope
from dcpbench.strategies.layouts import layouts, meshes, placements
from dcpbench.strategies.values import dtypes, shapes, values

__all__ = [
    "bad_loads",
    "bad_saves",
    "contents",
    "dtypes",
    "layouts",
    "meshes",
    "multi_checkpoint",
    "overwriting",
    "partial_loads",
    "placements",
    "resharding",
    "round_trips",
    "scope",
    "shapes",
    "values",
    "without_process_group",
]
