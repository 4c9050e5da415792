"""Functions for the state of models and optimizers that are wrong on purpose, each by one planted defect.

All bend the functions of ``reference.state_dict``, over torch's engine and storage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor

from dcpbench.backends.protocol import Engine, StorageBackend
from dcpbench.models.case import TrainingCase
from reference import state_dict as functions

__all__ = ["TRAINING_MUTANTS", "TrainingMutant"]


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingMutant:
    """A backend with one planted defect in its state-dict functions.

    Attributes:
        defect: what is wrong, in a sentence.
        rule: the one that it breaks.
        strategy: the strategy in ``dcpbench.training`` whose cases may show it.
        shows_on: says of a case whether the defect shows there.
    """

    name: str
    backend: str
    defect: str
    rule: str
    strategy: str
    shows_on: Callable[[TrainingCase], Any]


TRAINING_MUTANTS: dict[str, TrainingMutant] = {}


class Sound:
    """The functions of the reference: a subclass bends what they return, or what they set."""

    StateDictOptions = functions.StateDictOptions

    def model_read(self, model: Any, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def optimizers_read(self, optimizers: Any, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def model_to_set(self, model: Any, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def optimizers_to_set(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def after_set(self, model: Any, optimizers: Any, model_state: Any, optimizer_state: Any) -> None:
        pass

    def get_model_state_dict(self, model: Any, **how: Any) -> Any:
        return self.model_read(model, functions.get_model_state_dict(model, **how))

    def get_optimizer_state_dict(self, model: Any, optimizers: Any, **how: Any) -> Any:
        return self.optimizers_read(optimizers, functions.get_optimizer_state_dict(model, optimizers, **how))

    def get_state_dict(self, model: Any, optimizers: Any, **how: Any) -> Any:
        one, other = functions.get_state_dict(model, optimizers, **how)
        return self.model_read(model, one), self.optimizers_read(optimizers, other)

    def set_model_state_dict(self, model: Any, state: Any, **how: Any) -> None:
        functions.set_model_state_dict(model, self.model_to_set(model, state), **how)
        self.after_set(model, (), state, {})

    def set_optimizer_state_dict(self, model: Any, optimizers: Any, state: Any, **how: Any) -> None:
        functions.set_optimizer_state_dict(model, optimizers, self.optimizers_to_set(state), **how)
        self.after_set(model, optimizers, {}, state)

    def set_state_dict(
        self, model: Any, optimizers: Any, *, model_state_dict: Any, optim_state_dict: Any, **how: Any
    ) -> None:
        functions.set_state_dict(
            model,
            optimizers,
            model_state_dict=self.model_to_set(model, model_state_dict),
            optim_state_dict=self.optimizers_to_set(optim_state_dict),
            **how,
        )
        self.after_set(model, optimizers, model_state_dict, optim_state_dict)


def backend_of(kind: type[Sound]) -> StorageBackend:
    """Returns a backend with these functions, and torch's engine and storage."""
    engine = Engine(save, load, state_dict=kind())
    return StorageBackend(kind.__name__, FileSystemWriter, FileSystemReader, engine=engine)


sound = backend_of(Sound)


def breaks(rule: str, strategy: str, on: Callable[[TrainingCase], Any]) -> Callable[[type[Sound]], StorageBackend]:
    """Returns a class decorator that enters bent functions into the bank and makes a backend of them."""

    def enter(kind: type[Sound]) -> StorageBackend:
        name, defect = kind.__name__, (kind.__doc__ or "").strip()
        TRAINING_MUTANTS[name] = TrainingMutant(name, f"{__name__}:{name}", defect, rule, strategy, on)
        return backend_of(kind)

    return enter


def _kinds(case: TrainingCase) -> set[str]:
    return {block.kind for _, block in case.model.walk()}


def _has_moments(case: TrainingCase) -> bool:
    return case.has_optimizers and case.num_before > 0 and any(spec.kind == "AdamW" for spec in case.optimizers)


def _is_buffer(key: str) -> bool:
    return key.rsplit(".", 1)[-1] in ("calls", "mean", "running_mean", "running_var", "num_batches_tracked")


def _is_set(case: TrainingCase) -> bool:
    return any(step.restores for step in case.steps)


def _loses_dropout(case: TrainingCase) -> bool:
    return "dropout" in _kinds(case) and case.is_resumed_whole and case.steps[0].action == "save"


@breaks("R601", "options", _has_moments)
class rounds_moments(Sound):
    """Reads the moments of optimizers in half of their bits."""

    def optimizers_read(self, optimizers, state):
        for key, entries in list(state.get("state", state).items()):
            if isinstance(entries, dict):
                entries |= {name: self.rounded(value) for name, value in entries.items()}
            elif key.startswith("state."):
                state[key] = self.rounded(entries)
        return state

    def rounded(self, value):
        is_moment = isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.dim()
        return value.bfloat16().float() if is_moment else value


@breaks("R602", "models", lambda case: case.has_model and case.model.buffers())
class forgets_buffers(Sound):
    """Leaves the buffers of the model out."""

    def model_read(self, model, state):
        return {key: value for key, value in state.items() if not _is_buffer(key)}


@breaks("R603", "options", lambda case: _has_moments(case) and not case.options.cpu_offload)
class steps_to_read(Sound):
    """Counts a step of the optimizers that it reads, as if it had let them take one."""

    def optimizers_read(self, optimizers, state):
        for optimizer in optimizers:
            for entries in optimizer.state.values():
                entries["step"] += 1
        return state


@breaks("R604", "models", lambda case: case.has_model and case.num_before and {"batch-norm", "counter"} & _kinds(case))
class keeps_own_buffers(Sound):
    """Keeps the buffers that a model has, rather than set those of the state dict."""

    def model_read(self, model, state):
        self.own = {key: value.clone() for key, value in state.items() if _is_buffer(key)}
        return state

    def model_to_set(self, model, state):
        return {key: self.own.get(key, value) for key, value in state.items()}


@breaks("R605", "models", lambda case: _loses_dropout(case) and case.layouts[0] == case.layouts[1])
class leaves_evaluation_mode(Sound):
    """Puts the model into evaluation mode to set it, and leaves it there."""

    def after_set(self, model, optimizers, model_state, optimizer_state):
        model.eval()


@breaks("R606", "models", lambda case: _loses_dropout(case) and case.layouts[1].kind == "plain" != case.layouts[0].kind)
class evaluates_what_is_whole(Sound):
    """Leaves a model of which no part is sharded in evaluation mode."""

    def after_set(self, model, optimizers, model_state, optimizer_state):
        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            model.eval()


@breaks("R607", "options", lambda case: _has_moments(case) and _is_set(case) and not case.options.full_state_dict)
class forgets_steps(Sound):
    """Sets the step counts of optimizers to zero."""

    def after_set(self, model, optimizers, model_state, optimizer_state):
        for optimizer in optimizers:
            for entries in optimizer.state.values():
                entries["step"] = torch.zeros_like(entries["step"])


@breaks("R608", "options", lambda case: _has_moments(case) and _is_set(case) and not case.options.full_state_dict)
class shares_moments(Sound):
    """Lets the optimizers keep the very tensors of the state dict, where one of them fits."""

    def after_set(self, model, optimizers, model_state, optimizer_state):
        given = [value for entries in optimizer_state.get("state", {}).values() for value in entries.values()]
        given += [value for value in optimizer_state.values() if isinstance(value, torch.Tensor)]
        for optimizer in optimizers:
            for entries in optimizer.state.values():
                for name, held in entries.items():
                    entries[name] = next((one for one in given if self.are_alike(one, held)), held)

    def are_alike(self, one, other):
        if type(one) is not type(other) or not isinstance(one, torch.Tensor) or one.shape != other.shape:
            return False
        one, other = (t.to_local() if isinstance(t, DTensor) else t for t in (one, other))
        return one.shape == other.shape and one.dim() > 0 and torch.equal(one, other)


@breaks("R609", "options", lambda case: _is_set(case) and case.has_model)
class consumes_what_is_set(Sound):
    """Takes the tensors out of the state dict as it sets them."""

    def after_set(self, model, optimizers, model_state, optimizer_state):
        model_state.clear()


def _has_rates(case: TrainingCase) -> bool:
    return any(len({group.settings["lr"] for group in one.groups}) > 1 for one in case.optimizers)


@breaks("R604", "optimizers", lambda case: _has_rates(case) and case.has_optimizers)
class one_rate_for_all_groups(Sound):
    """Sets the learning rate of the first parameter group in all of them."""

    def after_set(self, model, optimizers, model_state, optimizer_state):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.param_groups[0]["lr"]


def _is_amsgrad(case: TrainingCase) -> bool:
    return any(group.settings.get("amsgrad") for one in case.optimizers for group in one.groups)


@breaks("R602", "optimizers", lambda case: _is_amsgrad(case) and case.num_before)
class knows_two_moments(Sound):
    """Reads the first and the second moment of Adam, and nothing of AMSGrad's third."""

    def optimizers_read(self, optimizers, state):
        entries = state.get("state", state)
        for key in [key for key in entries if key.endswith("max_exp_avg_sq")]:
            del entries[key]
        for held in entries.values():
            if isinstance(held, dict):
                held.pop("max_exp_avg_sq", None)
        return state


class Copies(Sound):
    """Odd, but correct: what is read are copies."""

    def model_read(self, model, state):
        return {key: self.copied(value) for key, value in state.items()}

    def optimizers_read(self, optimizers, state):
        return self.copied(state)

    def copied(self, value):
        if isinstance(value, dict):
            return {key: self.copied(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.copied(inner) for inner in value]
        return value.detach().clone() if isinstance(value, torch.Tensor) else value


class Backwards(Sound):
    """Odd, but correct: keys come in another order, those of parameter groups too."""

    def model_read(self, model, state):
        return dict(reversed(state.items()))

    def optimizers_read(self, optimizers, state):
        return {key: dict(reversed(value.items())) if key == "state" else value for key, value in state.items()}


copies, backwards = backend_of(Copies), backend_of(Backwards)
