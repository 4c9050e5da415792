"""Measures one workload on one layout: all backends and the raw limit, in turns. Runs in the controller.

    states made -> warm-up, peaks -> timed rounds -> saves in the background -> one save under strace

What goes wrong with one backend ends its part alone; ranks that were lost are replaced, and the states made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcpbench.bench import proof
from dcpbench.bench.call_log import STRACE_ARGUMENTS, counts_of
from dcpbench.bench.placing import digest_of, place
from dcpbench.bench.row import Row
from dcpbench.bench.rows import Measured, row_of
from dcpbench.bench.samples import CallSample, Seen, Taken, async_over_ranks, over_ranks
from dcpbench.bench.workloads import Workload
from dcpbench.errors import DcpbenchError
from dcpbench.faults.tracer import Strace, StraceMissing
from dcpbench.messages import Call
from dcpbench.ranks.pool import RankPool

__all__ = ["Group", "Rounds", "measure_group"]

RAW = "raw"
_ON_RANKS = "dcpbench.bench.measuring"


@dataclass(frozen=True)
class Group:
    """What is measured together.

    Attributes:
        workload: what is saved.
        layout, world_size: how it lies on the ranks that save.
        load_world_size: how many ranks load, under the layout of the same name.
        backends: specifications.
        device: ``cpu`` or ``cuda``.
    """

    workload: Workload
    layout: str
    world_size: int
    load_world_size: int
    backends: tuple[str, ...]
    device: str = "cpu"


@dataclass(frozen=True)
class Rounds:
    """How it is measured.

    Attributes:
        timed: rounds whose times count; two go before them, a warm-up and one for the peaks.
        is_cold: drop checkpoints from the page cache before each load.
        with_async: save in the background too.
        with_counts: save once under strace.
        mtbf_s: mean time between failures, for the goodput.
    """

    timed: int = 5
    is_cold: bool = True
    with_async: bool = True
    with_counts: bool = True
    mtbf_s: float = 4 * 3600.0


def measure_group(pool: RankPool, group: Group, rounds: Rounds, storage: Path, say: Callable[[str], None]) -> list[Row]:
    """Returns a row per backend.

    Args:
        pool: with enough ranks.
        group: what to measure.
        rounds: how.
        storage: an empty folder on the file system to be measured. Remove it when the pool is closed and not before:
            ranks that are interrupted may still write there.
        say: told what is being done.
    """
    run = _Run(pool, group, rounds, storage, say)
    try:
        return run.rows()
    finally:
        run.forget()


class _RankFailed(DcpbenchError):
    """A backend raised on a rank, or the rank was lost."""


class _Run:
    def __init__(self, pool: RankPool, group: Group, rounds: Rounds, folder: Path, say: Callable[[str], None]) -> None:
        self._pool, self._group, self._rounds, self._folder, self._say = pool, group, rounds, folder, say
        self._seen = {side: Seen() for side in (RAW, *group.backends)}
        self._taken = self._loading = (Taken(0, 0, ""),)

    def rows(self) -> list[Row]:
        self._say("making the states")
        self._take()
        for backend in self._group.backends:
            self._attempt(backend, "memory and warm-up", self._measure_memory)
        self._attempt(RAW, "warm-up", self._measure_memory)
        self._measure_rounds()
        for backend in self._group.backends:
            if self._rounds.with_async:
                for number in range(self._rounds.timed):
                    self._attempt(backend, f"in the background, {number + 1}", self._measure_background)
            if self._rounds.with_counts:
                self._attempt(backend, "counting calls", self._count)
        return [self._row(backend) for backend in self._group.backends]

    def forget(self) -> None:
        self._pool.step(Call(0, self._pool.size, f"{_ON_RANKS}:forget", {}, distributed=False))

    def _measure_rounds(self) -> None:
        sides = list(self._seen)
        for number in range(self._rounds.timed):
            first = number % len(sides)  # nobody is always the first, or always behind the same one
            for side in (*sides[first:], *sides[:first]):
                self._attempt(side, f"round {number + 1} of {self._rounds.timed}", self._measure_once)

    def _attempt(self, side: str, doing: str, action: Callable[[str, Path], None]) -> None:
        """Runs ``action`` on a side that has not failed, in a folder of its own that is then removed."""
        if self._seen[side].failure:
            return
        self._say(f"{doing}: {side}")
        own = self._folder / "checkpoint"
        try:
            action(side, own)
        except _RankFailed as error:
            if side == RAW:
                raise
            self._seen[side].failure = str(error)
            self._take()  # ranks that were replaced hold nothing, and a load may have left anything behind
        finally:
            shutil.rmtree(own, ignore_errors=True)

    def _take(self) -> None:
        group = self._group
        self.forget()
        known = {"name": group.workload.name, "scale": group.workload.scale, "layout": group.layout}
        sizes = dict.fromkeys((group.world_size, group.load_world_size))
        taken = {size: tuple(self._call("take", size, device=group.device, **known)) for size in sizes}
        self._taken, self._loading = taken[group.world_size], taken[group.load_world_size]

    def _measure_memory(self, side: str, folder: Path) -> None:
        seen = self._seen[side]
        seen.warm_up = self._once(side, folder, is_for_memory=False)
        shutil.rmtree(folder)  # the first call imports and allocates what later ones share: its peak is not theirs
        seen.memory = self._once(side, folder, is_for_memory=True)

    def _measure_once(self, side: str, folder: Path) -> None:
        save, load = self._once(side, folder, is_for_memory=False)
        self._seen[side].saves.append(save)
        self._seen[side].loads.append(load)

    def _once(self, side: str, folder: Path, *, is_for_memory: bool) -> tuple[CallSample, CallSample]:
        group, is_cold = self._group, self._rounds.is_cold
        if side == RAW:
            folder.mkdir()
            save = over_ranks(self._on_state("raw_save", group.world_size, folder))
            if group.load_world_size != group.world_size:  # what the ranks that load need must lie in their files
                shutil.rmtree(folder)
                folder.mkdir()
                self._on_state("raw_save", group.load_world_size, folder)
            load = over_ranks(self._on_state("raw_load", group.load_world_size, folder, is_cold=is_cold))
        else:
            more = {"backend": side, "is_for_memory": is_for_memory}
            save = over_ranks(self._on_state("save", group.world_size, folder, **more))
            files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else [folder]
            self._seen[side].num_files = len(files)
            self._seen[side].stored_bytes = sum(path.stat().st_size for path in files if path.exists())
            load = over_ranks(self._on_state("load", group.load_world_size, folder, is_cold=is_cold, **more))
        if load.fault:
            raise _RankFailed(f"wrong content: {load.fault}")
        return save, load

    def _measure_background(self, backend: str, folder: Path) -> None:
        seen = self._on_state("save_in_background", self._group.world_size, folder, backend=backend)
        if all(one is not None for one in seen):
            self._seen[backend].backgrounds.append(async_over_ranks(seen))
            if len(self._seen[backend].backgrounds) == 1:
                self._check(backend, folder)

    def _check(self, backend: str, folder: Path) -> None:
        """Loads what was saved in the background: a time for a save that lost something says nothing."""
        more = {"backend": backend, "is_for_memory": False, "is_cold": False}
        loads = self._on_state("load", self._group.load_world_size, folder, **more)
        if fault := over_ranks(loads).fault:
            raise _RankFailed(f"wrong content after a save in the background: {fault}")

    def _count(self, backend: str, folder: Path) -> None:
        seen, world_size = self._seen[backend], self._group.world_size
        pids = self._call("process_id", world_size)
        log = self._folder / "strace.log"
        strace = Strace(pids, STRACE_ARGUMENTS, log)
        try:
            with strace:
                counted = self._on_state("save_counted", world_size, folder, backend=backend)
        except StraceMissing as error:
            seen.no_counts_because = str(error)
            return
        collectives: dict[str, int] = {}
        for by_name, _ in counted:
            for name, number in by_name.items():
                collectives[name] = collectives.get(name, 0) + number
        counts = counts_of(strace.text(), str(folder.resolve()))
        num_copies = sum(number for _, number in counted)
        seen.counts = replace(counts, collectives=dict(sorted(collectives.items())), num_copies=num_copies)

    def _on_state(self, target: str, world_size: int, folder: Path, **arguments: Any) -> list[Any]:
        workload = self._group.workload
        setting = (workload.name, workload.scale, self._group.layout)
        return self._call(target, world_size, setting=setting, folder=str(folder), **arguments)

    def _call(self, target: str, world_size: int, **arguments: Any) -> list[Any]:
        seen = self._pool.step(Call(0, world_size, f"{_ON_RANKS}:{target}", arguments))
        for one in seen:
            if one.outcome != "ok":
                text = one.error.text if one.error else ""
                kind = f"{one.error.type}: " if one.error and one.outcome == "raised" else ""
                raise _RankFailed(f"{target} {one.outcome} on rank {one.rank}: {kind}{_first_line(text)}")
        return [one.value for one in seen]

    def _row(self, backend: str) -> Row:
        group, seen, raw = self._group, self._seen[backend], self._seen[RAW]
        saving = place(group.layout, group.workload, group.world_size)
        loading = place(group.layout, group.workload, group.load_world_size)
        evidence = proof.Evidence(seen, raw.loads, group.workload.num_bytes, is_cold=self._rounds.is_cold)
        status, reason = proof.judged(evidence)
        row = Row(
            backend=backend,
            workload=group.workload.name,
            workload_version=group.workload.version,
            workload_digest=group.workload.digest,
            scale=group.workload.scale,
            layout=group.layout,
            layout_digest=digest_of(saving),
            world_size=group.world_size,
            load_layout=group.layout,
            load_layout_digest=digest_of(loading),
            load_world_size=group.load_world_size,
            device=group.device,
            is_cold=self._rounds.is_cold,
            num_tensors=len(group.workload.tensors),
            state_bytes=group.workload.num_bytes,
            local_bytes=max(taken.local_bytes for taken in self._taken),
            status=status,
            reason=reason,
        )
        measured = Measured(
            seen,
            raw,
            digests=[taken.digest for taken in self._loading],
            load_local_bytes=min(taken.local_bytes for taken in self._loading),
            save_local_bytes=min(taken.local_bytes for taken in self._taken),
            mtbf_s=self._rounds.mtbf_s,
        )
        return row_of(row, measured)


def _first_line(text: str) -> str:
    return " ".join(text.split())[:300]
