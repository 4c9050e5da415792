"""Hostile checkpoints against a backend: what a load of each runs, reads, takes and answers.

The samples are DCP's own format, made bad; a backend that writes another one is not tried. Runs partly in the
controller, partly (`names`, `attack`) on a rank.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcpbench.case import Case
from dcpbench.errors import RanksUnavailable
from dcpbench.faults.corruption import cases_of_damage
from dcpbench.faults.crash import run_step, scratch_folder
from dcpbench.faults.law import LoadSeen, version_of, what_it_holds
from dcpbench.messages import Call
from dcpbench.oracle.verdict import Finding
from dcpbench.ranks.pool import RankPool

__all__ = ["MAX_PEAK_BYTES", "MAX_SECONDS", "Attack", "HostileReport", "attack", "names", "sample_names", "try_hostile"]

MAX_PEAK_BYTES = 512 << 20
"""How far the memory of a load of a checkpoint of some KiB may rise."""

MAX_SECONDS = 5.0
_LIMIT_BYTES = 4 << 30
_SAVE, _LOAD = 0, 1


@dataclass(frozen=True)
class Attack:
    """What one hostile checkpoint did.

    Attributes:
        has_run: the code that it names was run.
        peak_bytes: high-water mark of memory during the load, above what was resident before.
        seconds: of the load.
    """

    sample: str
    rule: str
    seen: LoadSeen
    has_run: bool = False
    peak_bytes: int = 0
    seconds: float = 0.0
    is_by_format: bool = False


@dataclass(frozen=True)
class HostileReport:
    """What hostile checkpoints did to one backend."""

    backend: str
    case: Case
    attacks: list[Attack]
    is_applicable: bool = True

    def findings(self, attack: Attack) -> list[Finding]:
        """Returns what is wrong with how the backend took one sample."""
        seen, facts = attack.seen, [("sample", attack.sample)]
        if seen.outcome == "loaded":
            facts.append(("got", what_it_holds(self.case, _LOAD, seen, [0])[:200]))
        else:
            facts.append(("got", " ".join(seen.error.split())[:200]))
        facts.append(("took", f"{attack.seconds:.1f} s, {attack.peak_bytes / 2**20:.0f} MiB"))

        def finding(rule: str, what: str) -> Finding:
            return Finding(rule, f"a hostile checkpoint, {attack.sample!r}, {what}", tuple(facts), step=_LOAD)

        if attack.is_by_format:
            return []
        if attack.has_run:
            return [finding("R901", "ran code of its own")]
        if seen.outcome in ("died", "hung"):
            return [finding("R903", f"made a load that {seen.outcome}")]
        if attack.peak_bytes > MAX_PEAK_BYTES or attack.seconds > MAX_SECONDS:
            return [finding("R903", "took more than a checkpoint of its size may")]
        is_good = seen.outcome == "loaded" and version_of(self.case, _LOAD, seen, [0]) == 0
        if attack.rule == "R902" and seen.outcome == "loaded":
            return [finding("R902", "had files outside its folder read")]
        if attack.rule == "R904" and seen.outcome == "loaded" and not is_good:
            return [finding("R904", "was loaded, and not as it was saved")]
        if attack.rule == "R903" and seen.outcome == "loaded" and not is_good:
            return [finding("R904", "was loaded, and not as it was saved")]
        return []


def names(_rank: int, _world_size: int) -> list[str]:
    """Runs on a rank: returns the names of all samples."""
    from dcpbench.faults.hostile_samples import SAMPLES

    return list(SAMPLES)


def attack(_rank: int, _world_size: int, *, sample: str, case: Case, backend: str, root: str, good: str) -> Attack:
    """Runs on a rank: returns what a load of one sample did to it.

    Args:
        sample: name of the sample.
        case: of the checkpoint.
        backend: what loads.
        root: folder with the checkpoint, which the sample is put in place of.
        good: folder with the good checkpoint's files.
    """
    from dcpbench.faults.hostile_samples import SAMPLES, Folder, restore
    from dcpbench.faults.warm_loads import bounded_load
    from dcpbench.messages import RunStep
    from dcpbench.ranks.meter import Meter

    folder = Folder(Path(root, "ckpt"), Path(root, "outside"), Path(root, "canary"))
    restore(Path(good), folder)
    chosen = SAMPLES[sample]
    chosen.make(folder)
    meter = Meter("cpu")
    begin = time.monotonic()
    with meter:
        seen = bounded_load(
            RunStep(0, 1, case, _LOAD, backend, root, distributed=False), 1.5 * MAX_SECONDS, _LIMIT_BYTES
        )
    seconds = time.monotonic() - begin
    has_run = folder.canary.exists()
    restore(Path(good), folder)
    return Attack(sample, chosen.rule, seen, has_run, meter.usage.peak_bytes, seconds, chosen.is_by_format)


def sample_names(pool: RankPool) -> list[str]:
    """Returns the names of all samples."""
    (known,) = pool.step(Call(0, 1, "dcpbench.faults.hostile:names", {}, distributed=False))
    return list(known.value)


def try_hostile(pool: RankPool, backend: str, only: Sequence[str] | None = None) -> HostileReport:
    """Returns what hostile checkpoints do to a backend.

    Args:
        pool: of at least two ranks.
        backend: its specification.
        only: names of samples; None tries all.

    Raises:
        SaveFailed: the save fails.
    """
    case = cases_of_damage()[0]
    attacks = []
    with scratch_folder() as folder:
        run_step(pool, case, _SAVE, backend, folder)
        if not (folder / "ckpt" / ".metadata").is_file():
            return HostileReport(backend, case, [], is_applicable=False)
        shutil.copytree(folder / "ckpt", folder / "good")
        for name in sample_names(pool) if only is None else only:
            arguments = {
                "sample": name,
                "case": case,
                "backend": backend,
                "root": str(folder),
                "good": str(folder / "good"),
            }
            attacks.append(_attack(pool, name, arguments))
    return HostileReport(backend, case, attacks)


def _attack(pool: RankPool, name: str, arguments: dict[str, Any]) -> Attack:
    usual_s, pool.rank_timeout_s = pool.rank_timeout_s, 30.0 + 4 * MAX_SECONDS
    try:
        (seen,) = pool.step(Call(0, 1, "dcpbench.faults.hostile:attack", arguments, distributed=False))
    finally:
        pool.rank_timeout_s = usual_s
    if seen.outcome == "ok":
        return seen.value  # type: ignore[no-any-return]
    error = seen.error.text if seen.error else seen.outcome
    if seen.outcome in ("died", "hung"):
        return Attack(name, "R903", LoadSeen(seen.outcome, error=error))
    raise RanksUnavailable(f"The sample {name!r} could not be tried: {error}")
