"""Runs one step of a training case on one rank and observes it. Runs on ranks, called by `ranks/execute.py`.

What the functions under test raise passes through: the worker's boundary turns it into an observation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dcpbench.backends import registry
from dcpbench.backends.protocol import Session, StateDictFunctions, state_dict_functions
from dcpbench.layout import Mesh
from dcpbench.messages import ErrorReport, Observation, RunStep
from dcpbench.models.app import App
from dcpbench.models.case import AXES, TrainingCase, TrainingStep
from dcpbench.models.loop import Loop
from dcpbench.models.observed import TrainingView
from dcpbench.models.places import leaves_of_state_dict
from dcpbench.models.snapshot import digests_of, state_of
from dcpbench.needs import TRAINING_NEEDS
from dcpbench.ranks.act import place_of
from dcpbench.ranks.meshes import mesh_of

__all__ = ["run_training_step"]

EnterPhase = Callable[[str], None]


def run_training_step(
    command: RunStep, case: TrainingCase, rank: int, enter_phase: EnterPhase, device: str
) -> Observation:
    """Returns what ``rank`` saw of one step of ``case``; all ranks of the step call it.

    Raises:
        Whatever the functions under test raise, ``BaseException`` included.
    """
    step = case.steps[command.step]
    backend = registry.resolve(command.backend)
    session = backend.open(reuse=False)
    run = _Run(case, step, device, enter_phase, session, state_dict_functions(backend))
    needed = TRAINING_NEEDS | ({"statefuls"} if case.form == "stateful" else set())
    if lacking := sorted(needed & registry.absent_of(backend)):
        error = ErrorReport("Unsupported", f"the backend has no {', '.join(lacking)}", "")
        return Observation(rank, command.world_size, command.step, step.action, "unsupported", "open", error)
    checkpoint_id = str(place_of(command, "ckpt"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch has deprecated is under test as well
        view = run.load(checkpoint_id) if step.action == "load" else run.read(checkpoint_id)
    return Observation(rank, command.world_size, command.step, step.action, "ok", phase="observe", value=view)


@dataclass(frozen=True)
class _Run:
    _case: TrainingCase
    _step: TrainingStep
    _device: str
    _enter_phase: EnterPhase
    _session: Session
    _functions: StateDictFunctions

    def read(self, checkpoint_id: str) -> TrainingView:
        """Trains, reads the state, saves or restores it if the step says so, and trains on; first without reading."""
        case, before, after = self._case, self._case.num_before, self._case.num_after
        view: dict[str, Any] = {}
        if self._step.action == "read":
            alone, loss = self._trained()
            view = {"losses_alone": alone.train(before, after, loss), "ends_alone": digests_of(alone.leaves())}
        loop, loss = self._trained()
        held, digests, kept = state_of(loop.leaves()), digests_of(loop.leaves()), loop.keep()
        app = App(loop, case, self._functions)
        self._enter_phase("get")
        read = state_dict = app.read()
        if self._step.action == "save":
            self._enter_phase("save")
            whole = {**kept, "step": before}
            whole = {"app": app, **whole} if case.form == "stateful" else {**state_dict, **whole}
            self._session.save(whole, checkpoint_id)
        self._enter_phase("observe")
        now = digests_of(loop.leaves())
        changed = tuple(key for key in digests.keys() | now.keys() if digests.get(key) != now.get(key))
        said = state_of(leaves_of_state_dict(read, loop.names))
        copied = _copied(state_dict) if self._step.restores else None
        self._enter_phase("resume")
        losses = loop.train(before, after, loss)
        view |= {
            "held": held,
            "read": said,
            "changed": tuple(sorted(changed)),
            "losses": losses,
            "ends": digests_of(loop.leaves()),
        }
        if copied is not None:
            view |= self._restore(loop, app, copied, kept)
        return TrainingView(**view)

    def _trained(self) -> tuple[Loop, torch.Tensor | None]:
        self._enter_phase("build")
        loop = self._loop(0)
        self._enter_phase("train")
        loop.train(0, self._case.num_before)
        return loop, loop.backward(self._case.num_before) if self._case.is_mid_step else None

    def _loop(self, instance: int) -> Loop:
        how = self._case.layouts[self._step.layout]
        mesh = Mesh(AXES[how.kind], how.sizes, tuple(range(how.world_size)))
        made = mesh_of(mesh, self._device) if how.needs_mesh else None
        return Loop(self._case, self._step.layout, made, self._device, instance)

    def _restore(self, loop: Loop, app: App, state_dict: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
        loop.clear()
        given = dict(_leaves(state_dict))
        contents = digests_of(iter(given.items()))
        self._enter_phase("set")
        app.set(state_dict)
        self._enter_phase("observe")
        now_given = dict(_leaves(state_dict))
        left = digests_of(iter(now_given.items()))
        replaced = {k for k, v in given.items() if isinstance(v, torch.Tensor) and now_given.get(k) is not v}
        replaced |= {k for k in contents.keys() | left.keys() if contents.get(k) != left.get(k)}
        loop.put_back(kept)
        restored, digests = state_of(loop.leaves()), digests_of(loop.leaves())
        back = _write_over(given.values())
        now = digests_of(loop.leaves())
        for local, data in back:
            local.copy_(data)
        self._enter_phase("resume")
        losses = loop.train(self._case.num_before, self._case.num_after)
        return {
            "restored": restored,
            "tied": tuple(sorted(key for key in digests if digests[key] != now.get(key))),
            "spoiled": tuple(sorted(replaced)),
            "losses_restored": losses,
            "ends_restored": digests_of(loop.leaves()),
        }

    def load(self, checkpoint_id: str) -> TrainingView:
        """Builds another instance, loads what was saved, and trains on."""
        case = self._case
        self._enter_phase("build")
        loop = self._loop(1)
        self._enter_phase("train")
        loop.train(100, self._step.num_warm)
        loop.clear()
        app = App(loop, case, self._functions)
        holder: dict[str, Any] = {**loop.keep(), "step": None}
        if case.form == "stateful":
            self._enter_phase("load")
            holder = {"app": app, **holder}
            self._session.load(holder, checkpoint_id)
        else:
            self._enter_phase("get")
            holder |= app.read()
            self._enter_phase("load")
            self._session.load(holder, checkpoint_id)
            self._enter_phase("set")
            app.set(holder)
        self._enter_phase("observe")
        loop.put_back(holder)
        held = state_of(loop.leaves())
        self._enter_phase("resume")
        losses = loop.train(holder["step"], case.num_after)
        return TrainingView(held, losses=losses, ends=digests_of(loop.leaves()))


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value) for value in tree)
    return tree.detach().clone() if isinstance(tree, torch.Tensor) else tree


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each value of nested dicts and lists with its path."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{prefix}/{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _write_over(values: Iterable[Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Writes other bytes into each tensor, and returns its local part with what that held."""
    written = []
    for tensor in values:
        if isinstance(tensor, torch.Tensor):
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            written.append((local, local.clone()))
            local.add_(1)
    return written
