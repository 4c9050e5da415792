"""`dcpbench bench honesty`: does the benchmark call what is there, and only that?

Equal sides are compared with each other, and with a backend that is 5 % slower on purpose; memory is planted; a clock
of the backend's own stands within the same calls. Everything goes the way that real measurements go.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcpbench.bench.goals import at_least, at_most, goal_lines
from dcpbench.bench.planted_names import IDLE, LARGER, PLANTED_BYTES, SLOWER, STAMPED
from dcpbench.bench.samples import CallSample, over_ranks
from dcpbench.bench.stats import Comparison, compare_paired, verdict_of
from dcpbench.bench.status_line import say
from dcpbench.bench.workloads import fitted
from dcpbench.errors import DcpbenchError, expected
from dcpbench.messages import Call
from dcpbench.ranks.pool import RankPool

__all__ = ["Experiment", "measure_honesty"]

_MIB = 1 << 20
_WORLD_SIZE = 2
_ALPHA = 0.01
_ENOUGH = 1.035
"""Rounds go on until an effect of this size would be found, or four times as many are done."""


@dataclass(frozen=True)
class Experiment:
    """How much to measure.

    Attributes:
        trials: comparisons of equal sides, and of a slower one.
        rounds: pairs in each, at least.
        size_mib: of the state.
        storage: a folder.
    """

    trials: int = 20
    rounds: int = 40
    size_mib: int = 16
    storage: Path = Path()


def measure_honesty(experiment: Experiment) -> int:
    """Runs the experiment, prints each figure beside its goal and returns 0 if all are met, else 1.

    Raises:
        UsageError: an option is out of range.
    """
    if experiment.trials < 1 or experiment.rounds < 6:
        raise expected("at least 1 trial and 6 rounds", "--rounds", experiment.rounds, "Give, for example, 40.")
    if not experiment.storage.is_dir():
        raise expected("a folder", "--storage", str(experiment.storage), "Give one on the disk to measure.")
    with (
        tempfile.TemporaryDirectory(prefix="dcpbench-", dir=experiment.storage) as folder,
        RankPool(_WORLD_SIZE) as pool,
    ):
        run = _Run(pool, Path(folder), experiment)
        run.warm_up()
        alarms = [run.verdict("torch", "torch", f"equal sides, {n + 1}") for n in range(experiment.trials)]
        called = [run.verdict("torch", SLOWER, f"planted slowdown, {n + 1}") for n in range(experiment.trials)]
        planted = run.planted_bytes() / _MIB
        clock, own = run.clock_ratio(), run.own_share()
    say("")
    wrong = sum(verdict in ("faster", "slower") for verdict, _ in alarms)
    right = sum(verdict == "slower" for verdict, _ in called)
    goals = [
        at_most(f"false alarms in {experiment.trials} comparisons of equal sides", wrong, experiment.trials / 20, ""),
        at_least(f"slowdowns of 5 % called in {experiment.trials}", right, experiment.trials * 0.9, ""),
        at_most("planted 64 MiB, measured within", abs(planted - PLANTED_BYTES / _MIB), 2, "MiB", f"{planted:.2f}"),
        at_most("throughput beside an outside clock", 100 * abs(clock - 1), 2, "%"),
        at_most("time of the harness within a measured save", 100 * own, 1, "%"),
    ]
    print("\n".join(goal_lines(goals)))
    print(f"  equal sides: {_spread([one for _, one in alarms])}")
    print(f"  slower side: {_spread([one for _, one in called])}")
    return 0 if all(goal.is_met for goal in goals) else 1


def _spread(compared: Sequence[Comparison]) -> str:
    ratios = sorted(one.ratio for one in compared)
    detectable = statistics.median(one.detectable for one in compared)
    pairs = sorted(one.num_samples for one in compared)
    return (
        f"ratios {ratios[0]:.3f} .. {ratios[-1]:.3f}, {detectable - 1:.1%} detectable, {pairs[0]} to {pairs[-1]} pairs"
    )


class _Run:
    def __init__(self, pool: RankPool, folder: Path, experiment: Experiment) -> None:
        self._pool, self._folder, self._experiment = pool, folder, experiment
        workload = fitted("few-huge", experiment.size_mib * _MIB)
        self._setting = (workload.name, workload.scale, "fsdp2")
        self._call("take", name=workload.name, scale=workload.scale, layout="fsdp2")

    def warm_up(self) -> None:
        for _ in range(3):
            for backend in ("torch", SLOWER, STAMPED):
                self._save(backend)

    def verdict(self, first: str, second: str, what: str) -> tuple[str, Comparison]:
        """Returns what is said of two backends that are measured in turns."""
        times: tuple[list[float], list[float]] = ([], [])
        for number in range(4 * self._experiment.rounds):
            say(f"{what}: pair {number + 1}")
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                times[side].append(self._save((first, second)[side]).seconds)
            if number + 1 >= self._experiment.rounds and number % 10 == 9:
                compared = compare_paired(*times, alpha=_ALPHA)
                if compared.detectable <= _ENOUGH:
                    break
        compared = compare_paired(*times, alpha=_ALPHA)
        return verdict_of(compared, compared.p, alpha=_ALPHA), compared

    def planted_bytes(self) -> float:
        """Returns by how much the peak of the larger backend is above torch's."""
        peaks: dict[str, list[int]] = {"torch": [], LARGER: []}
        for _ in range(5):
            for backend, own in peaks.items():
                say(f"planted memory: {backend}")
                own.append(self._save(backend, is_for_memory=True).peak_bytes)
        return float(statistics.median(peaks[LARGER]) - statistics.median(peaks["torch"]))

    def clock_ratio(self) -> float:
        """Returns measured seconds over those of a clock within the same calls: the median over rounds."""
        ratios = []
        for _ in range(self._experiment.rounds):
            say("an outside clock")
            measured = self._save(STAMPED).seconds
            stamps = [json.loads(path.read_text()) for path in self._folder.glob("checkpoint.rank-*")]
            ratios.append(measured / (max(end for _, end in stamps) - min(begin for begin, _ in stamps)))
        return float(statistics.median(ratios))

    def own_share(self) -> float:
        """Returns what is measured of a backend that does nothing, over a save."""
        idle = statistics.median(self._save(IDLE).slowest_s for _ in range(self._experiment.rounds))
        return idle / statistics.median(self._save("torch").slowest_s for _ in range(self._experiment.rounds))

    def _save(self, backend: str, *, is_for_memory: bool = False) -> CallSample:
        checkpoint = self._folder / "checkpoint"
        more = {"setting": self._setting, "folder": str(checkpoint), "is_for_memory": is_for_memory}
        try:
            return over_ranks(self._call("save", backend=backend, **more))
        finally:
            shutil.rmtree(checkpoint, ignore_errors=True)

    def _call(self, target: str, **arguments: Any) -> list[Any]:
        seen = self._pool.step(Call(0, _WORLD_SIZE, f"dcpbench.bench.measuring:{target}", arguments))
        if bad := [one for one in seen if one.outcome != "ok"]:
            raise DcpbenchError(f"{target} {bad[0].outcome} on rank {bad[0].rank}: {bad[0].error}")
        return [one.value for one in seen]
