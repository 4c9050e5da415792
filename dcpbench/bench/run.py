"""`dcpbench bench run`: workloads x layouts x backends, measured with their proofs. Runs in the controller.

Whatever can be refused is refused before a rank is started. Rows are kept as they are finished.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import dcpbench
from dcpbench.backends import registry
from dcpbench.bench.group import Group, Rounds, measure_group
from dcpbench.bench.machine import available_memory_bytes, commit_of, file_system_of, this_machine, versions
from dcpbench.bench.placing import place
from dcpbench.bench.record import check_writable
from dcpbench.bench.row import Row
from dcpbench.bench.store import Run, RunWriter
from dcpbench.bench.workloads import Workload, fitted, workload
from dcpbench.errors import UsageError, expected
from dcpbench.ranks.backends_seen import BackendsSeen
from dcpbench.ranks.pool import RankPool

__all__ = ["DEFAULT_BACKENDS", "DEFAULT_LAYOUTS", "DEFAULT_WORKLOADS", "Matrix", "measure", "run_matrix"]

DEFAULT_WORKLOADS = ("llama3-8b", "llama3-70b@rank-3-of-64", "many-small", "few-huge")
DEFAULT_LAYOUTS = ("fsdp2", "tp")
DEFAULT_BACKENDS = ("torch", "reference", "gathered")
_TIMEOUT_S = 1800.0
_MIB = 1 << 20
_STATES_IN_MEMORY = 3
"""The state, a copy of it that a backend stages, and one that it makes for the storage."""
_STATES_ON_STORAGE = 2.5


@dataclass(frozen=True)
class Matrix:
    """What to measure; every combination of workload, layout and world size that is possible.

    Attributes:
        workloads, layouts, backends: by name.
        world_size: ranks that save; one rank's view of a workload is saved by one rank.
        load_world_sizes: ranks that load, each in a row of its own; none means as many as save.
        size_mib: of each state at most, scaled down to it.
        scale: of each state instead, 1.0 being the published size.
        storage: a folder on the file system to be measured; None for that of the results.
    """

    workloads: tuple[str, ...] = DEFAULT_WORKLOADS
    layouts: tuple[str, ...] = DEFAULT_LAYOUTS
    backends: tuple[str, ...] = DEFAULT_BACKENDS
    world_size: int = 2
    load_world_sizes: tuple[int, ...] = ()
    size_mib: int = 32
    scale: float | None = None
    device: str = "cpu"
    storage: Path | None = None
    results: Path = Path("results")
    rounds: Rounds = field(default_factory=Rounds)


def measure(matrix: Matrix, show: Callable[[Row], None], say: Callable[[str], None]) -> Run:
    """Measures all of ``matrix`` and returns the run, which is then on disk.

    Args:
        matrix: what to measure.
        show: told each row when it is finished.
        say: told what is being done.

    Raises:
        UsageError: something cannot be used, or there is too little room; nothing has been started then.
    """
    groups = _groups(matrix)
    storage = matrix.storage or matrix.results
    _refuse(matrix, groups, storage)
    num_ranks = max(max(group.world_size, group.load_world_size) for group in groups)
    with (
        tempfile.TemporaryDirectory(prefix="dcpbench-", dir=storage) as scratch,  # goes when no rank can write any more
        RankPool(num_ranks, device=matrix.device) as pool,
    ):
        pool.rank_timeout_s = _TIMEOUT_S
        say("starting the ranks")
        seen = BackendsSeen(lambda: pool)
        for backend in matrix.backends:
            seen.check_device(backend, matrix.device)
        writer = RunWriter(matrix.results, this_machine().id, _manifest(matrix, storage, groups))
        is_complete = False
        try:
            run_matrix(pool, groups, matrix.rounds, Path(scratch), keep=writer.add, show=show, say=say)
            is_complete = True
        finally:
            say("")
            run = writer.finish(is_complete=is_complete)
    return run


def run_matrix(
    pool: RankPool,
    groups: list[Group],
    rounds: Rounds,
    storage: Path,
    *,
    keep: Callable[[Row], None],
    show: Callable[[Row], None],
    say: Callable[[str], None],
) -> None:
    """Measures one group after the other; each row goes to ``keep`` and then to ``show``."""
    begin = time.monotonic()
    for number, group in enumerate(groups, 1):
        title = f"[{number}/{len(groups)}] {group.workload.name}, {group.layout}"

        def say_it(text: str, title: str = title) -> None:
            say(f"{title}: {text} ({time.monotonic() - begin:.0f} s)")

        for row in measure_group(pool, group, rounds, storage, say_it):
            keep(row)
            show(row)


def _groups(matrix: Matrix) -> list[Group]:
    groups: list[Group] = []
    sizes = matrix.load_world_sizes or (matrix.world_size,)
    for name, layout in product(matrix.workloads, matrix.layouts):
        wanted = _sized(name, matrix)
        if "@" in name:  # what it holds lies on one rank, whatever the layout
            one = Group(wanted, "fsdp2", 1, 1, matrix.backends, matrix.device)
            groups += [] if one in groups else [one]
            continue
        for load_size in sizes:
            place(layout, wanted, matrix.world_size)
            place(layout, wanted, load_size)
            groups.append(Group(wanted, layout, matrix.world_size, load_size, matrix.backends, matrix.device))
    if not groups:
        raise expected("at least one workload and one layout", "--workload", (), "Give, for example, llama3-8b.")
    return groups


def _sized(name: str, matrix: Matrix) -> Workload:
    if matrix.scale is not None:
        return workload(name, matrix.scale)
    if matrix.size_mib < 1:
        raise expected("at least 1 MiB", "--size", matrix.size_mib, "Give, for example, 64.")
    return fitted(name, matrix.size_mib * _MIB)


def _refuse(matrix: Matrix, groups: list[Group], storage: Path) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        raise UsageError("Expected to measure alone but this is a worker of pytest-xdist. Run it without -n.")
    if not matrix.backends or not matrix.layouts:
        raise expected("at least one backend and one layout", "--backend", matrix.backends, "Give, for example, torch.")
    if matrix.rounds.timed < 1:
        raise expected("at least one round", "--rounds", matrix.rounds.timed, "Give, for example, 5.")
    for backend in matrix.backends:
        registry.check_spelling(backend)
    check_writable(matrix.results)
    if not storage.is_dir() or not os.access(storage, os.W_OK):
        raise expected("a folder that can be written", "--storage", str(storage), "Give one on the disk to measure.")
    kind, is_memory = file_system_of(storage)
    if is_memory and matrix.rounds.is_cold:
        raise expected(
            "a file system on a device for cold loads", "--storage", f"{storage} ({kind})", "Add --warm, or a disk."
        )
    for group in groups:
        _check_room(group, storage)


def _check_room(group: Group, storage: Path) -> None:
    size = max(group.world_size, group.load_world_size)
    placed = [place(group.layout, group.workload, n) for n in {group.world_size, group.load_world_size}]
    held = sum(
        region.numel * tensor.num_bytes // max(1, math.prod(tensor.shape))
        for layout in placed
        for rank in range(layout.world_size)
        for index, tensor in enumerate(group.workload.tensors)
        if (region := layout.region(index, tensor.shape, rank)) is not None
    )
    needed, available = _STATES_IN_MEMORY * held, available_memory_bytes()
    at = f"{group.workload.name} on {group.layout} with {size} ranks"
    if needed > available:
        raise UsageError(
            f"Expected {needed // _MIB:,} MiB of memory for {at} but {available // _MIB:,} MiB are available. "
            "Give a smaller --size or --scale."
        )
    wanted, free = int(_STATES_ON_STORAGE * group.workload.num_bytes), shutil.disk_usage(storage).free
    if wanted > free:
        raise UsageError(
            f"Expected {wanted // _MIB:,} MiB free in --storage={storage} for {at} but {free // _MIB:,} MiB are. "
            "Make room, or give a smaller --size or --scale."
        )


def _manifest(matrix: Matrix, storage: Path, groups: list[Group]) -> dict[str, Any]:
    return {
        "dcpbench": dcpbench.__version__,
        "commit": commit_of(Path(dcpbench.__file__).parent),
        "versions": versions(),
        "machine": dataclasses.asdict(this_machine()),
        "file_system": file_system_of(storage)[0],
        "load_average": round(os.getloadavg()[0], 2),
        "options": {
            "world_size": matrix.world_size,
            "load_world_sizes": list(matrix.load_world_sizes or (matrix.world_size,)),
            "size_mib": matrix.size_mib,
            "scale": matrix.scale,
            "device": matrix.device,
            "rounds": dataclasses.asdict(matrix.rounds),
        },
        "backends": list(matrix.backends),
        "workloads": {g.workload.name: {"digest": g.workload.digest, "scale": g.workload.scale} for g in groups},
        "num_rows_planned": sum(len(group.backends) for group in groups),
    }
