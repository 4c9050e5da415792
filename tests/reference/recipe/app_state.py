"""What the programs of the recipe share: the toy model and the application's state as one Stateful."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from reference.state_dict import get_state_dict, set_state_dict
from reference.stateful import Stateful

NUM_FEATURES = 16


class AppState(Stateful):
    """Lets DCP call ``state_dict`` and ``load_state_dict`` of a model and its optimizer, whatever shards them."""

    def __init__(self, model, optimizer=None):
        self.model = model
        self.optimizer = optimizer

    def state_dict(self):
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        return {"model": model_state, "optim": optimizer_state}

    def load_state_dict(self, state_dict):
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optim"]
        )


class ToyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net1 = nn.Linear(NUM_FEATURES, NUM_FEATURES)
        self.relu = nn.ReLU()
        self.net2 = nn.Linear(NUM_FEATURES, 8)

    def forward(self, x):
        return self.net2(self.relu(self.net1(x)))


def train_one_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.rand(8, NUM_FEATURES)).sum().backward()
    optimizer.step()


def digests(state):
    """Returns a digest per leaf of a nested state, of the full tensors; all ranks call it."""
    found = {}

    def visit(at, name):
        if isinstance(at, dict):
            for key, value in at.items():
                visit(value, f"{name}/{key}")
        elif isinstance(at, torch.Tensor):
            whole = at.full_tensor() if hasattr(at, "full_tensor") else at
            found[name] = hashlib.sha256(whole.detach().contiguous().numpy().tobytes()).hexdigest()
        else:
            found[name] = repr(at)

    visit(state, "")
    return found


def report(state):
    """Writes the digests of ``state`` to the file that is the program's second argument; all ranks call it."""
    found = digests(state)
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found))
