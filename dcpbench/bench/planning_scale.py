"""`dcpbench bench planning`: what planning costs on 64 to 16,384 ranks, torch and the reference side by side.

Each side runs at each size in a process of its own, one after the other. Runs in the controller, without torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcpbench.bench.goals import goal_lines
from dcpbench.bench.planning_models import MODELS
from dcpbench.bench.planning_page import PlanningRun, goals_of, page, plot, table_lines, with_section
from dcpbench.bench.status_line import say
from dcpbench.errors import DcpbenchError, MalformedFile, UsageError, expected

__all__ = ["measure"]

SIDES = ("torch", "reference")
_MAX_RANKS = 16_384
_TIMEOUT_S = 3600.0


def measure(
    ranks: str, models: Sequence[str] | None, runs_file: Path | None, out: Path | None, *, whole_up_to: int = 4096
) -> int:
    """Measures, prints the tables and the goals, and writes the page; returns 0.

    Args:
        ranks: world sizes, parted by commas.
        whole_up_to: beyond so many ranks only what one rank does is measured; the coordinator's part is extrapolated.
        models: names in :data:`~dcpbench.bench.planning_models.MODELS`; None for all.
        runs_file: keeps each run; those that it has are not made again. None keeps none.
        out: folder that takes ``scale.md`` and ``planning.svg``; None for none.

    Raises:
        UsageError: a world size or a model is none that can be measured, or a file cannot be used.
    """
    sizes = _sizes(ranks)
    chosen = list(models or MODELS)
    if unknown := [name for name in chosen if name not in MODELS]:
        raise expected(f"one of {', '.join(MODELS)}", "--model", unknown[0], "Give one of them.")
    held = _held(runs_file)
    for size in sizes:
        for model in chosen:
            for side in SIDES:
                key = (model, size, side)
                if key not in held:
                    say(f"{model} on {size} ranks: {side}")
                    held[key] = _run(model, size, side, is_whole=size <= whole_up_to)
                    _keep(runs_file, held)
    say("")
    runs = [held[model, size, side] for model in chosen for size in sizes for side in SIDES]
    for model in chosen:
        print("\n".join(table_lines([run for run in runs if run.model == model])))
    print("\n".join(["", "goals", *goal_lines(goals_of(runs))]))
    if out is not None:
        _write(out, runs)
    return 0


def _sizes(text: str) -> list[int]:
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or any(size < 64 or size > _MAX_RANKS or size & (size - 1) for size in sizes):
        raise expected(f"powers of two from 64 to {_MAX_RANKS}", "--ranks", text, "Give, for example, 64,256,1024.")
    return sizes


def _run(model: str, size: int, side: str, *, is_whole: bool) -> PlanningRun:
    command = [
        sys.executable,
        "-m",
        "dcpbench.bench.planning_steps",
        side,
        model,
        str(size),
        "whole" if is_whole else "rank",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed; there may be too little memory"])[-1]
        raise DcpbenchError(f"{side} did not plan {model} on {size} ranks: {last}")
    return PlanningRun(**json.loads(done.stdout))


def _held(runs_file: Path | None) -> dict[tuple[str, int, str], PlanningRun]:
    if runs_file is None or not runs_file.exists():
        return {}
    try:
        runs = [PlanningRun(**held) for held in json.loads(runs_file.read_text(encoding="utf-8"))["runs"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise MalformedFile(
            str(runs_file), f"expected runs of this command but {error}. Give another --runs."
        ) from error
    return {(run.model, run.world_size, run.side): run for run in runs}


def _keep(runs_file: Path | None, held: dict[tuple[str, int, str], PlanningRun]) -> None:
    if runs_file is None:
        return
    data: dict[str, Any] = {"schema_version": 1, "runs": [vars(run) for run in held.values()]}
    temporary = runs_file.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1), encoding="utf-8")
        temporary.replace(runs_file)
    except OSError as error:
        raise UsageError(f"Expected to write {runs_file} but {error}. Give another --runs.") from error


def _write(out: Path, runs: Sequence[PlanningRun]) -> None:
    target = out / "scale.md"
    try:
        old = target.read_text(encoding="utf-8") if target.exists() else "# Scale\n"
        target.write_text(with_section(old, page(runs)), encoding="utf-8")
        (out / "planning.svg").write_text(plot(runs), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"Expected to write {target} but {error}. Give another --out.") from error
    print(f"\nwritten: {target}, {out / 'planning.svg'}")
