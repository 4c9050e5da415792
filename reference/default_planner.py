"""The default planners and what they plan with, under torch's module name; see `save_planner` and `load_planner`."""

from .plan_functions import (
    create_default_global_load_plan,
    create_default_local_load_plan,
    create_default_local_metadata,
    validate_global_plan,
)
from .planner import DefaultLoadPlanner, DefaultSavePlanner
from .save_planner import create_default_global_save_plan, create_default_local_save_plan
from .whole_checkpoint import EmptyStateDictLoadPlanner

__all__ = [
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "create_default_global_load_plan",
    "create_default_global_save_plan",
    "create_default_local_load_plan",
    "create_default_local_save_plan",
]

_EmptyStateDictLoadPlanner = EmptyStateDictLoadPlanner
_create_default_local_metadata = create_default_local_metadata
_validate_global_plan = validate_global_plan
