"""`dcpbench bench reference`: the reference beside torch and beside the raw I/O limit, in one run.

Each round saves and loads the same state by each side in turns, in each place; times stand as shares of the raw
limit of the same round, so that a noisy machine is noisy for every side. Runs in the controller.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dcpbench.bench.figures import Figures, Sample, Workload, combined
from dcpbench.bench.goals import Goal, goal_lines
from dcpbench.bench.reference_goals import goals_of
from dcpbench.bench.reference_table import planning_lines, read_lines, run_lines
from dcpbench.bench.status_line import say
from dcpbench.errors import DcpbenchError, UsageError, expected
from dcpbench.messages import Call
from dcpbench.ranks.pool import RankPool

__all__ = ["Options", "measure"]

SIDES = ("raw", "torch", "reference")
_WORLD_SIZE = 2
_TIMEOUT_S = 600.0
_MIB = 1 << 20
_ON_RANKS = "dcpbench.bench.reference_ranks"
_ON_ONE_RANK = "dcpbench.bench.reference_planning"


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        rounds: timed rounds; one more goes before them, for memory.
        scale: of the state: 1.0 is 4,000 tensors of 128 KiB and 16 tensors of 64 MiB; of the planning as well.
        disk: a folder on a disk; None for the system's folder of temporary files.
        json_file: where to write every sample; None for nowhere.
        is_gate: a missed goal makes the exit code 1.
    """

    rounds: int = 5
    scale: float = 1.0
    disk: Path | None = None
    json_file: Path | None = None
    is_gate: bool = False


def measure(options: Options) -> int:
    """Measures, prints the tables and the goals, and returns 0, or 1 if a goal is missed and `is_gate` is set.

    Raises:
        UsageError: an option is out of range, or there is too little room.
    """
    if options.rounds < 1:
        raise expected("at least one round", "--rounds", options.rounds, "Give, for example, 5.")
    if not 0.001 <= options.scale <= 4:
        raise expected("a scale of 0.001 to 4", "--scale", options.scale, "Give, for example, 0.1.")
    workloads = _workloads(options.scale)
    with _folders(options.disk) as folders, RankPool(_WORLD_SIZE) as pool:
        _check_room(folders, max(workload.num_bytes for workload in workloads))
        pool.rank_timeout_s = _TIMEOUT_S
        say("starting the ranks")
        run = _Run(pool, options.rounds, Figures(workloads, list(folders), _call(pool, "crc32_name")[0]))
        for workload in workloads:
            _call(pool, "take", workload=workload)
            for place, folder in folders.items():
                run.measure(workload, place, folder)
            run.measure_quarters(workload, next(iter(folders.values())))
            _call(pool, "forget")
        run.measure_plans(max(64, round(4096 * min(1.0, options.scale))))
        figures = run.figures
    say("")
    goals = goals_of(figures)
    _print(figures, goals, options)
    if options.json_file is not None:
        options.json_file.write_text(json.dumps(_as_dict(figures, goals, options), indent=1), encoding="utf-8")
    return 1 if options.is_gate and not all(goal.is_met for goal in goals) else 0


def _workloads(scale: float) -> list[Workload]:
    num_large = max(_WORLD_SIZE, round(16 * scale))
    large_bytes = int(64 * _MIB * min(1.0, 16 * scale / num_large)) // _MIB * _MIB or _MIB
    return [
        Workload("small", max(4, round(4000 * scale)), 128 << 10, 256),
        Workload("large", num_large, large_bytes, 4096),
    ]


@contextmanager
def _folders(disk: Path | None) -> Iterator[dict[str, Path]]:
    """Gives a fresh folder in memory and one on disk, by the name of the place; nothing of them is left."""
    memory = Path("/dev/shm")  # noqa: S108  measured in memory on purpose
    if not memory.is_dir():
        raise UsageError("Expected a file system in memory at /dev/shm but there is none. Mount one.")
    try:
        with (
            tempfile.TemporaryDirectory(prefix=f"dcpbench-{os.getpid()}-", dir=memory) as in_memory,
            tempfile.TemporaryDirectory(prefix=f"dcpbench-{os.getpid()}-", dir=disk) as on_disk,
        ):
            yield {"/dev/shm": Path(in_memory), "disk": Path(on_disk)}  # noqa: S108
    except OSError as error:
        if error.filename is None or disk is None or not str(error.filename).startswith(str(disk)):
            raise
        raise expected(
            "a folder that can be written", "--disk", str(disk), f"{error.strerror}: give another."
        ) from error


def _check_room(folders: dict[str, Path], num_bytes: int) -> None:
    for place, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if free < 2 * num_bytes:
            raise expected(
                f"{2 * num_bytes} bytes free in {folder}", place, free, "Make room, or give a smaller --scale."
            )


@dataclass(frozen=True)
class _Run:
    pool: RankPool
    rounds: int
    figures: Figures

    def measure(self, workload: Workload, place: str, folder: Path) -> None:
        """Saves and loads by each side in turns, once for memory and then in timed rounds."""
        for number in range(self.rounds + 1):
            first = number % len(SIDES)
            for side in (*SIDES[first:], *SIDES[:first]):
                say(f"{place}, {workload.name} tensors, round {number} of {self.rounds}: {side}")
                own = folder / side
                own.mkdir()
                for action in ("save", "load"):
                    seen = self._sample(side, action, own, is_cold=place == "disk", is_for_memory=number == 0)
                    self.figures.samples.setdefault((place, workload.name, side, action), []).append(seen)
                shutil.rmtree(own)

    def _sample(self, side: str, action: str, folder: Path, *, is_cold: bool, is_for_memory: bool) -> Sample:
        arguments: dict[str, Any] = {"side": side, "action": action, "folder": str(folder), "is_cold": is_cold}
        return combined(_call(self.pool, "sample", is_for_memory=is_for_memory, **arguments))

    def measure_quarters(self, workload: Workload, folder: Path) -> None:
        """Counts what is read to load a quarter of each tensor."""
        for side in SIDES[1:]:
            own = folder / side
            own.mkdir()
            self._sample(side, "save", own, is_cold=False, is_for_memory=False)
            for dim in (0, 1):
                say(f"a quarter of the {workload.name} tensors along dim {dim}: {side}")
                counts = _call(self.pool, "quarter", side=side, dim=dim, folder=str(own))
                read, wanted = (sum(column) for column in zip(*counts, strict=True))
                self.figures.quarters[workload.name, side, dim] = read / wanted
            shutil.rmtree(own)

    def measure_plans(self, num_chunks: int) -> None:
        """Plans loads of tensors of so many chunks, by each side, and of up to four times as many by the reference."""
        wanted = [
            (side, destination, num_chunks, 1 if destination == "as many boxes" else 8)
            for destination in ("1 of 2 ranks", "1 of 64 ranks", "as many boxes")
            for side in SIDES[1:]
        ]
        wanted += [("reference", "as many boxes", num_chunks * 2**power // 4, 1) for power in (0, 1, 3, 4)]
        for number in range(self.rounds):
            for side, destination, chunks, tensors in wanted:
                if side == "torch" and destination == "as many boxes" and number:
                    continue  # takes tens of seconds
                say(f"planning, round {number + 1} of {self.rounds}: {side}, {destination}, {chunks} chunks")
                arguments: dict[str, Any] = {
                    "side": side,
                    "num_chunks": chunks,
                    "num_tensors": tensors,
                    "destination": destination,
                }
                (planned,) = _call(self.pool, "plan_load", module=_ON_ONE_RANK, world_size=1, **arguments)
                self.figures.plans.setdefault((side, destination, chunks, tensors), []).append(planned)


def _call(
    pool: RankPool, name: str, *, module: str = _ON_RANKS, world_size: int = _WORLD_SIZE, **arguments: Any
) -> list[Any]:
    """Returns what ``name`` returned on each rank."""
    seen = pool.step(Call(0, world_size, f"{module}:{name}", arguments, distributed=world_size > 1))
    if bad := [one for one in seen if one.outcome != "ok"]:
        raise DcpbenchError(f"{name} {bad[0].outcome} on rank {bad[0].rank}: {bad[0].error}.")
    return [one.value for one in seen]


def _print(figures: Figures, goals: list[Goal], options: Options) -> None:
    print(
        f"reference beside torch and the raw I/O limit: {_WORLD_SIZE} ranks, {options.rounds} rounds in turns, "
        f"CRC-32 by {figures.crc32}; median (min..max)"
    )
    for workload in figures.workloads:
        for place in figures.places:
            print("\n".join(run_lines(figures, workload, place)))
    print("\n".join(read_lines(figures)))
    print("\n".join(planning_lines(figures)))
    scaled = "" if options.scale == 1 else f", at {options.scale:g} of the size that they are meant for"
    print("\n".join([f"\ngoals{scaled}", *goal_lines(goals)]))


def _as_dict(figures: Figures, goals: list[Goal], options: Options) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "rounds": options.rounds,
        "scale": options.scale,
        "crc32": figures.crc32,
        "workloads": [asdict(workload) for workload in figures.workloads],
        "samples": [
            dict(zip(("place", "workload", "side", "action"), key, strict=True), round=number, **asdict(sample))
            for key, samples in figures.samples.items()
            for number, sample in enumerate(samples)
        ],
        "quarters": [
            dict(zip(("workload", "side", "dim"), key, strict=True), read_over_wanted=share)
            for key, share in figures.quarters.items()
        ],
        "plans": [
            dict(zip(("side", "destination", "num_chunks", "num_tensors"), key, strict=True), **asdict(planned))
            for key, plans in figures.plans.items()
            for planned in plans
        ],
        "goals": [goal.as_dict() for goal in goals],
    }
