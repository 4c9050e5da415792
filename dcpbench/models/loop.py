"""A training loop on one rank: model, optimizers, schedulers, and the steps it takes. Runs on ranks.

Each rank trains on the same data, so that losses, gradients and buffers are the same under every parallelism but for
rounding, and the same to the bit on the same one.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import lr_scheduler

from dcpbench.models.case import Group, OptimizerSpec, TrainingCase
from dcpbench.models.modules import build_model
from dcpbench.models.parallel import parallelize
from dcpbench.models.places import Leaves, leaves_of_loop, places_of
from dcpbench.models.tree import BATCH, TIME

__all__ = ["Loop"]


class Loop:
    """A training loop.

    Args:
        case: what is trained.
        layout: which of its layouts.
        mesh: of that layout, if it needs one.
        device: where the model is made.
        instance: another one begins with other values.

    Attributes:
        model: what is called, parallel and wrapped.
        names: from each name of a parameter to its first.
    """

    def __init__(
        self, case: TrainingCase, layout: int, mesh: DeviceMesh | None, device: str, instance: int = 0
    ) -> None:
        self.case = case
        bare = build_model(case.model, case.seed, instance).to(device)
        self._places = places_of(bare)
        self.bare = bare
        self.model = parallelize(bare, case.model, case.layouts[layout], mesh)
        self._device = device
        parameters = [module._parameters[name] for _, module, name in self._places[0]]
        self.optimizers = [_optimizer(spec, parameters) for spec in case.optimizers]
        self.schedulers = [
            SCHEDULERS[spec.scheduler](optimizer)
            for spec, optimizer in zip(case.optimizers, self.optimizers, strict=True)
            if spec.scheduler
        ]
        specs = case.model.parameters()
        self.names = {spec.fqn: specs[spec.same_as].fqn for spec in specs}
        self._has_gradients = any(spec.is_trained and spec.is_used for spec in specs)
        torch.default_generator.manual_seed(case.seed + 100 * instance)

    def train(self, first: int, num_steps: int, loss: Tensor | None = None) -> tuple[str, ...]:
        """Takes steps ``first``, ``first + 1``, … and returns their losses, all bits of them.

        Args:
            first: number of the first step, which says on what data it trains.
            num_steps: how many.
            loss: of the first step, if its gradients are there already.
        """
        losses = []
        for number in range(first, first + num_steps):
            losses.append(float(self._step(number, loss).item()).hex())
            loss = None
            if not self.case.keeps_gradients:
                self.clear()
        return tuple(losses)

    def backward(self, number: int) -> Tensor:
        """Computes the gradients of step ``number`` and returns the loss."""
        generator = torch.Generator().manual_seed(self.case.seed * 1000 + number)
        width = self.case.model.width
        dtype = getattr(torch, self.case.model.dtype)
        x, wanted = (torch.randn(BATCH, TIME, width, generator=generator).to(self._device, dtype) for _ in range(2))
        self.clear()
        loss: Tensor = (self.model(x) - wanted).float().square().mean()
        if self._has_gradients:
            loss.backward()  # type: ignore[no-untyped-call]
        for module in self.bare.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # which a backward pass does not do where nothing needs a gradient
        return loss

    def _step(self, number: int, loss: Tensor | None) -> Tensor:
        for optimizer in self.optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                loss = optimizer.step(lambda: self.backward(number))  # type: ignore[no-untyped-call]
        if loss is None:
            loss = self.backward(number)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, torch.optim.LBFGS):
                optimizer.step()
        for scheduler in self.schedulers:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss.item())
            else:
                scheduler.step()
        return loss

    def clear(self) -> None:
        """Forgets all gradients."""
        self.model.zero_grad()

    def keep(self) -> dict[str, Any]:
        """Returns what of the state no state-dict function knows: schedulers and random numbers."""
        schedulers = {str(number): copy.deepcopy(one.state_dict()) for number, one in enumerate(self.schedulers)}
        return {"sched": schedulers, "rng": torch.get_rng_state()}

    def put_back(self, kept: dict[str, Any]) -> None:
        """Sets what :meth:`keep` has returned."""
        for number, scheduler in enumerate(self.schedulers):
            scheduler.load_state_dict(copy.deepcopy(kept["sched"][str(number)]))
        torch.set_rng_state(kept["rng"])

    def leaves(self) -> Leaves:
        """Yields key and value of all that this loop keeps, as this rank holds it."""
        return leaves_of_loop(self._places, self.optimizers, self.schedulers)


def _optimizer(spec: OptimizerSpec, parameters: list[Any]) -> torch.optim.Optimizer:
    kind: Any = getattr(torch.optim, spec.kind)
    settings = [_arguments(group, is_tensor=spec.has_tensor_lr) for group in spec.groups]
    chosen = [[parameters[number] for number in group.parameters] for group in spec.groups]
    made: torch.optim.Optimizer
    if spec.kind == "LBFGS":  # it knows of no groups
        made = kind(chosen[0], **settings[0])
    else:
        groups = [{"params": some, **more} for some, more in zip(chosen, settings, strict=True)]
        made = kind(groups, **settings[0])
    return made


def _arguments(group: Group, *, is_tensor: bool) -> dict[str, Any]:
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in group.settings.items()}
    if is_tensor and "lr" in settings:
        settings["lr"] = torch.tensor(settings["lr"])
    return settings


SCHEDULERS: Final[dict[str, Any]] = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1)),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8),
    "restarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
    "one-cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)], [2]
    ),
}
"""Learning-rate schedulers, by the short names of :attr:`OptimizerSpec.scheduler`."""
