"""First program of the recipe: trains a model under FSDP2 for a step and saves it with its optimizer."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import reference as dcp
from tests.reference.recipe.app_state import AppState, ToyModel, report, train_one_step

dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
model = ToyModel()
fully_shard(model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
train_one_step(model, optimizer)
app = AppState(model, optimizer)
dcp.save({"app": app}, checkpoint_id=sys.argv[1])
report(app.state_dict())
dist.destroy_process_group()
