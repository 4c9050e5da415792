"""Observations before anything was observed, reports of errors, and texts cut to a bounded length.

Used by controller and ranks alike.
"""

from __future__ import annotations

import traceback
from typing import Final

from dcpbench.messages import Call, ErrorReport, Observation, Outcome, RunStep

__all__ = ["blank", "bounded", "report"]

_MAX_TEXT: Final = 8 * 1024
_MAX_TRACEBACK: Final = 32 * 1024


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


def report(error: BaseException) -> ErrorReport:
    """Returns what is told of an exception: its type, its text, its traceback, none of them without bounds."""
    kind = type(error)
    try:
        text = str(error)
        lines = "".join(traceback.format_exception(error))
    except Exception as broken:  # the code under test may define __str__ as it likes
        text = f"no text: its __str__ raised {type(broken).__qualname__}"
        lines = "".join(traceback.format_tb(error.__traceback__))
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return ErrorReport(name, bounded(text, _MAX_TEXT), bounded(lines, _MAX_TRACEBACK))
