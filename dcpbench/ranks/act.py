"""Carries out the action of one step: calls the backend, disturbs what it saves, moves folders. Runs on ranks.

Whatever the backend raises passes through.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dcpbench.backends.protocol import Session
from dcpbench.messages import ErrorReport, Observation, RunStep
from dcpbench.ranks import materialize
from dcpbench.ranks.disturb import disturb

__all__ = ["Call", "Running", "arrange", "checkpoint_id", "perform", "place_of"]


@dataclass(slots=True)
class Running:
    """The case that this rank is in the middle of.

    Attributes:
        sessions: open ones, by backend.
        pending: saves in the background that no one has waited for yet, by checkpoint.
        last: the state dict of the step before.
        prepared: the state dict of a step to come, with its number.
    """

    root: str
    sessions: dict[str, Session] = field(default_factory=dict)
    pending: dict[str, Any] = field(default_factory=dict)
    last: materialize.Built | None = None
    prepared: tuple[int, materialize.Built] | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """What a step calls the backend with.

    Attributes:
        place: the checkpoint_id, in the form that the case asks for.
        wanted: further arguments; the session is called without those that it does not take.
    """

    command: RunStep
    rank: int
    running: Running
    session: Session
    built: materialize.Built
    place: str | Path
    wanted: dict[str, Any]
    enter_phase: Callable[[str], None]


def perform(call: Call) -> materialize.Built:
    """Carries out the action and returns the state dict that is then to be looked at."""
    session, built = call.session, call.built
    step = call.command.case.steps[call.command.step]
    taken = {name: value for name, value in call.wanted.items() if name in getattr(session, "takes", ())}
    match step.action:
        case "save":
            session.save(built.state_dict, call.place, **taken)
        case "load":
            session.load(built.state_dict, call.place, **taken)
        case "async_save":
            _save_in_background(call, taken)
            if not step.is_left_open:
                _finish(call.running, step.checkpoint)
        case "wait":
            _finish(call.running, step.checkpoint)
        case "import":
            file = str(Path(call.command.root) / f"{step.checkpoint}.pt")
            torch.save(built.state_dict, file)
            session.import_file(file, call.place)  # type: ignore[attr-defined]
        case "convert":
            file = str(Path(call.command.root) / f"{step.target}.pt")
            target = str(place_of(call.command, step.target))
            session.convert(call.place, file, target)  # type: ignore[attr-defined]
            found = torch.load(file, weights_only=False)
            return materialize.taken_from(call.command.case, call.command.step, found)
    return built


def _save_in_background(call: Call, taken: dict[str, Any]) -> None:
    """Begins a save, and goes on at once as training does."""
    step, session = call.command.case.steps[call.command.step], call.session
    future = session.async_save(call.built.state_dict, call.place, **taken)  # type: ignore[attr-defined]
    call.running.pending[step.checkpoint] = future
    call.enter_phase("disturb")
    disturb(call.command.case, call.command.step, call.rank, call.built)
    call.enter_phase(step.action)


def _finish(running: Running, checkpoint: str) -> None:
    future = running.pending.pop(checkpoint, None)
    if future is not None:
        getattr(future, "upload_completion", future).result()


def place_of(command: RunStep, checkpoint: str) -> str | Path:
    """Returns where a checkpoint of the case lies: below the folder of the case, or below its place elsewhere."""
    if command.place is None:
        return Path(command.root) / checkpoint
    os.environ.update(command.place.environ)
    return f"{command.place.prefix}/{checkpoint}"


@contextmanager
def checkpoint_id(command: RunStep) -> Iterator[str | Path]:
    """Yields the checkpoint_id in the form that the case asks for; a relative one holds inside only."""
    checkpoint = command.case.steps[command.step].checkpoint
    if command.place is not None:
        yield place_of(command, checkpoint)
        return
    path = Path(command.root) / checkpoint
    form = command.case.options.id_form
    if form != "relative":
        yield path if form == "path" else f"{path}/" if form == "slash" else str(path)
        return
    before = Path.cwd()
    os.chdir(command.root)
    try:
        yield checkpoint
    finally:
        os.chdir(before)


def arrange(command: RunStep, rank: int, seen: Observation) -> Observation:
    """Deletes, copies or renames a checkpoint's folder, once. A backend whose checkpoint is none is not judged."""
    step = command.case.steps[command.step]
    path, target = Path(command.root) / step.checkpoint, Path(command.root) / step.target
    if rank > 0:
        return replace(seen, phase="arrange")
    if not path.is_dir():
        text = "the backend has no checkpoint that is a folder"
        return replace(seen, outcome="unsupported", error=ErrorReport("Unsupported", text, ""))
    if step.target:
        shutil.rmtree(target, ignore_errors=True)
    match step.action:
        case "delete":
            shutil.rmtree(path)
        case "copy":
            shutil.copytree(path, target)
        case "rename":
            path.rename(target)
    return replace(seen, phase="arrange")
