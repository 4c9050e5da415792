"""Hypothesis strategies: shapes, dtypes, values, meshes, placements, whole cases. They run in the controller."""

from dcpbench.strategies.cases import bad_loads, multi_checkpoint, resharding, round_trips, scope, without_process_group
from dcpbench.strategies.layouts import layouts, meshes, placements
from dcpbench.strategies.values import dtypes, shapes, values

__all__ = [
    "bad_loads",
    "dtypes",
    "layouts",
    "meshes",
    "multi_checkpoint",
    "placements",
    "resharding",
    "round_trips",
    "scope",
    "shapes",
    "values",
    "without_process_group",
]
