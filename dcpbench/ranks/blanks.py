"""Observations before anything was observed, and texts cut to a bounded length. Used by controller and ranks alike."""

from __future__ import annotations

from dcpbench.messages import Call, Observation, Outcome, RunStep

__all__ = ["blank", "bounded"]


def blank(command: RunStep | Call, rank: int, outcome: Outcome = "ok", phase: str = "") -> Observation:
    """Returns the observation of a rank that knows no more than its command."""
    if isinstance(command, Call):
        return Observation(rank, command.world_size, 0, "call", outcome, phase)
    action = command.case.steps[command.step].action
    return Observation(rank, command.world_size, command.step, action, outcome, phase)


def bounded(text: str, limit: int) -> str:
    """Returns ``text``, or its beginning and its end with a mark between them where it is longer than ``limit``."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n… {len(text) - limit} characters left out …\n{text[-limit // 2 :]}"
