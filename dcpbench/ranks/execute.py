"""Runs one step of a case on one rank and observes it. Runs on ranks, called by the worker.

Exceptions of the backend pass through: the worker's boundary turns them into observations. Only where a load is to be
refused, or may be, are they caught here, since the state dict that it leaves behind is to be seen too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from dcpbench.backends import registry
from dcpbench.backends.protocol import Session
from dcpbench.case import Case
from dcpbench.messages import ErrorReport, Observation, RunStep
from dcpbench.models.case import TrainingCase
from dcpbench.models.run import run_training_step
from dcpbench.needs import needs_of
from dcpbench.ranks import materialize
from dcpbench.ranks.act import Call, Running, arrange, checkpoint_id, perform, place_of
from dcpbench.ranks.blanks import blank, report
from dcpbench.ranks.meter import Meter
from dcpbench.ranks.observe import size_of, state_of, tables_of
from dcpbench.ranks.wishes import features, missing, wishes

__all__ = ["prepare", "run_step"]

_BUILDING: Final = ("save", "load", "async_save")

_running: list[Running] = []


def run_step(command: RunStep, rank: int, enter_phase: Callable[[str], None], device: str) -> Observation:
    """Returns what ``rank`` saw of one step; all ranks of the step call it.

    Raises:
        Whatever the backend raises, ``BaseException`` included.
    """
    other: object = command.case
    if isinstance(other, TrainingCase):
        return run_training_step(command, other, rank, enter_phase, device)
    case, step = command.case, command.case.steps[command.step]
    running, seen = _running_case(command), blank(command, rank)
    if step.action in ("delete", "copy", "rename"):
        enter_phase("arrange")
        return arrange(command, rank, seen)
    enter_phase("build")
    if command.distributed and not command.keeps_group:
        running.prepared = None  # its meshes have gone with their group
    built = running.last = _state_dict(running, case, command.step, rank, device)
    wanted = wishes(case, command.step)
    enter_phase("open")
    session = _session(running, command)
    if absent := missing(features(case, command.step), session):
        text = f"the backend has no {', '.join(absent)}"
        return replace(seen, outcome="unsupported", error=ErrorReport("Unsupported", text, ""))
    if not case.layouts[step.layout].takes_part(rank):
        return replace(seen, phase="observe", **state_of(case, command.step, rank, built))
    meter = Meter(device)
    enter_phase(step.action)
    with checkpoint_id(command) as place, meter:
        call = Call(command, rank, running, session, built, place, wanted, enter_phase)
        try:
            built = perform(call)
        except BaseException as error:
            if step.action != "load" or (step.misuse == "none" and not _lacks(command)):
                raise
            state = state_of(case, command.step, rank, built)
            return replace(seen, outcome="raised", phase=step.action, error=report(error), **state)
    is_complete = step.action in ("save", "wait", "import") or (step.action == "async_save" and not step.is_left_open)
    if is_complete and step.misuse == "none" and rank == min(case.layouts[step.layout].members or (0,)):
        enter_phase("metadata")
        path = str(place_of(command, step.checkpoint))
        seen = replace(seen, tables=tables_of(session.metadata(path)), bytes_on_storage=size_of(Path(path)))
    enter_phase("observe")
    shows = step.action in ("save", "load", "convert")
    state = state_of(case, command.step, rank, built) if shows else {}
    return replace(seen, phase="observe", usage=meter.usage, **state)


def prepare(command: RunStep, rank: int, device: str) -> None:
    """Builds the state dict of the step that follows, where it has the same layout.

    For the time between two steps, when a rank that is done waits for the others.
    """
    case, following = command.case, command.step + 1
    if not isinstance(case, Case) or following >= len(case.steps):
        return
    before, step = case.steps[command.step], case.steps[following]
    has_meshes = before.layout == step.layout and before.action in _BUILDING  # to make one takes all ranks
    if has_meshes and step.action in _BUILDING and not step.resaves:
        _running_case(command).prepared = following, materialize.build(case, following, rank, device)


def _state_dict(running: Running, case: Case, number: int, rank: int, device: str) -> materialize.Built:
    if case.steps[number].resaves and running.last is not None:
        return running.last
    prepared, running.prepared = running.prepared, None
    if prepared is not None and prepared[0] == number:
        return prepared[1]
    return materialize.build(case, number, rank, device)


def _lacks(command: RunStep) -> bool:
    """Reads as: the backend declares something absent that this step needs, and may refuse it."""
    return bool(needs_of(command.case, command.step) & registry.declared_absent(registry.resolve(command.backend)))


def _running_case(command: RunStep) -> Running:
    """Returns what is known of the case; the case before, its sessions and state dicts are let go."""
    if not _running or _running[0].root != command.root:
        _running[:] = [Running(command.root)]
    return _running[0]


def _session(running: Running, command: RunStep) -> Session:
    if command.backend not in running.sessions:
        backend = registry.resolve(command.backend)
        running.sessions[command.backend] = backend.open(reuse=command.case.options.reuse)
    return running.sessions[command.backend]
