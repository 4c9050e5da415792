"""Trains, saves and resumes the small Llama under FSDP2, or plainly in one process. Runs on ranks.

Everything goes through the application-state wrapper that PyTorch's recipe for DCP shows: a Stateful around
get_state_dict and set_state_dict.

Source: https://docs.pytorch.org/tutorials/recipes/distributed_checkpoint_recipe.html
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  the name that everybody knows
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dcpbench.backends import registry
from dcpbench.models.llama import Llama, LlamaConfig
from dcpbench.ranks.materialize import tensor_bytes

__all__ = ["resume", "train_and_save"]


class AppState(Stateful):
    """Model and optimizer as one Stateful."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optim"]
        )


def train_and_save(
    rank: int, _world_size: int, *, backend: str, checkpoint: str, steps_before: int, steps_after: int
) -> dict[str, Any]:
    """Trains, saves, and trains on: the uninterrupted run.

    Returns:
        ``digests`` of the whole state at the save, by FQN, and ``losses`` of the steps after it, as hex.
    """
    state = _build(seed=1)
    for step in range(steps_before):
        _train(state, step, rank)
    registry.resolve(backend).open(reuse=False).save({"app": state, "step": steps_before}, checkpoint)
    digests = _digests(state)
    return {"digests": digests, "losses": [_train(state, steps_before + n, rank) for n in range(steps_after)]}


def resume(rank: int, _world_size: int, *, backend: str, checkpoint: str, steps_after: int) -> dict[str, Any]:
    """Builds the model anew from another seed, loads, and trains on for ``steps_after`` steps.

    Returns:
        ``digests`` of the whole state after the load, ``losses`` as hex, and the ``step`` that was loaded.
    """
    state = _build(seed=2)
    holder: dict[str, Any] = {"app": state, "step": None}
    registry.resolve(backend).open(reuse=False).load(holder, checkpoint)
    digests = _digests(state)
    losses = [_train(state, holder["step"] + n, rank) for n in range(steps_after)]
    return {"digests": digests, "losses": losses, "step": holder["step"]}


def _build(seed: int) -> AppState:
    torch.manual_seed(seed)
    model = Llama(LlamaConfig())
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return AppState(model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))


def _train(state: AppState, step: int, rank: int) -> str:
    """Takes one training step on data of its own for each step and rank; returns the loss, all its bits."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(LlamaConfig().vocabulary, (2, 9), generator=generator)
    logits = state.model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    state.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    state.optimizer.step()
    return float(loss.item()).hex()


def _digests(state: AppState) -> dict[str, str]:
    """Returns a digest of each leaf of the whole, gathered state; all ranks call it."""
    found: dict[str, str] = {}

    def visit(at: Any, fqn: str) -> None:
        if isinstance(at, dict):
            for key, value in at.items():
                visit(value, f"{fqn}.{key}")
        elif isinstance(at, list):
            for index, value in enumerate(at):
                visit(value, f"{fqn}.{index}")
        elif isinstance(at, torch.Tensor):
            whole = at.full_tensor() if isinstance(at, DTensor) else at
            text = f"{whole.dtype}{tuple(whole.shape)}".encode()
            found[fqn] = hashlib.blake2b(text + tensor_bytes(whole), digest_size=8).hexdigest()
        else:
            found[fqn] = repr(at)

    visit(state.state_dict(), "app")
    return found
