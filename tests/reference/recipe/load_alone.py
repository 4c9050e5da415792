"""Third program of the recipe: loads the model's part in one process, without a process group."""

import sys

import reference as dcp
from tests.reference.recipe.app_state import ToyModel, report

model = ToyModel()
state_dict = {"app": {"model": model.state_dict()}}
dcp.load(state_dict=state_dict, checkpoint_id=sys.argv[1])
model.load_state_dict(state_dict["app"]["model"])
report({"model": model.state_dict()})
