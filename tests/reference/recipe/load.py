"""Second program of the recipe: builds the model under FSDP2, on any number of ranks, and loads what was saved."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import reference as dcp
from tests.reference.recipe.app_state import AppState, ToyModel, report

dist.init_process_group("gloo")
model = ToyModel()
fully_shard(model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
app = AppState(model, optimizer)
dcp.load(state_dict={"app": app}, checkpoint_id=sys.argv[1])
report(app.state_dict())
dist.destroy_process_group()
