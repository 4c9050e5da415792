"""The planners and the plans they make, under torch's module name; see `save_planner` and `load_planner`."""

from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from .leaves import PlanningError
from .load_planner import DefaultLoadPlanner
from .save_planner import DefaultSavePlanner

__all__ = [
    "BytesIOWriteData",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "LoadItemType",
    "LoadPlan",
    "LoadPlanner",
    "PlanningError",
    "ReadItem",
    "SavePlan",
    "SavePlanner",
    "TensorWriteData",
    "WriteItem",
    "WriteItemType",
]
