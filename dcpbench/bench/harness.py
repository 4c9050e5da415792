"""What the harness itself costs: the pool beside a bare loop of the same calls, and beside ``torchrun`` per step.

All of it is measured in one run, in turns, so that a noisy machine is noisy for every side, and printed as ratios.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcpbench.case import Case, Layout, LeafLayout, Mesh, ObjectLeaf, Part, Placement, Step, TensorLeaf
from dcpbench.errors import DcpbenchError, expected
from dcpbench.messages import Call
from dcpbench.oracle.judge import judge
from dcpbench.ranks.pool import RankPool

__all__ = ["bare_loop", "measure", "small_case"]

MAX_POOL_OVER_BARE = 1.25
MIN_TORCHRUN_OVER_POOL = 50.0
MIN_TRIPS_PER_S = 3.0
MAX_FIRST_VERDICT_S = 6.0
_ROUNDS = 5
_TORCHRUN_TRIES = 3  # gloo now and then aborts a process that ends right after a collective


def small_case(world_size: int) -> Case:
    """Returns a round trip of a small state on ``world_size`` ranks: eight tensors of 4 KiB and an object."""
    tensors = tuple(TensorLeaf((Part("key", "model"), Part("key", f"w{i}")), (31, 32)) for i in range(8))
    layout = Layout(
        world_size,
        Mesh(("dp",), (world_size,), tuple(range(world_size))),
        tuple(LeafLayout((Placement(0),)) for _ in tensors),
    )
    step = ObjectLeaf((Part("key", "step"),), {"int": "7"})
    return Case("harness", 1, tensors, (step,), (layout,), (Step("save", 0), Step("load", 0)))


def bare_loop(rank: int, _world_size: int, *, case: Case, root: str, trips: int) -> float:
    """Runs on ranks: the checkpoint calls of ``trips`` round trips and nothing else; returns the seconds it took."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    from dcpbench.ranks.materialize import build

    source = build(case, 0, rank, "cpu").state_dict
    destination = build(case, 1, rank, "cpu").state_dict
    dist.barrier()
    start = time.perf_counter()
    for trip in range(trips):
        path = f"{root}/{trip}"
        save(source, checkpoint_id=path, storage_writer=FileSystemWriter(path))
        load(destination, checkpoint_id=path, storage_reader=FileSystemReader(path))
    dist.barrier()
    return time.perf_counter() - start


def one_step(rank: int, _world_size: int, *, case: Case, number: int, root: str) -> None:
    """Runs one step of ``case`` bare: what a script under ``torchrun`` does."""
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save

    from dcpbench.ranks.materialize import build

    state_dict = build(case, number, rank, "cpu").state_dict
    (save if case.steps[number].action == "save" else load)(state_dict, checkpoint_id=f"{root}/ckpt")


_SCRIPT = """
import os, sys
sys.path[:0] = {path!r}
import torch.distributed as dist
from dcpbench.bench.harness import one_step, small_case
dist.init_process_group("gloo")
world_size = dist.get_world_size()
one_step(dist.get_rank(), world_size, case=small_case(world_size), number=int(sys.argv[1]), root=sys.argv[2])
dist.destroy_process_group()
"""


def measure(world_size: int, trips: int) -> int:
    """Measures, prints a table of ratios with the goals, and returns 0 if all are met, else 1.

    Raises:
        UsageError: an argument is out of range.
    """
    if not 1 <= world_size <= 128:
        raise expected("1 to 128 ranks", "--world-size", world_size, "Give a number in that range.")
    if trips < 1:
        raise expected("at least one round trip", "--trips", trips, "Give, for example, 15.")
    case = small_case(world_size)
    with tempfile.TemporaryDirectory(prefix="dcpbench-", dir=_memory_folder()) as root, RankPool(world_size) as pool:
        _say("starting the ranks")
        _through_pool(pool, case, 2)
        ratios, rates = [], []
        for round_ in range(_ROUNDS):
            _say(f"pool and bare loop, in turns: {round_ + 1} of {_ROUNDS}")
            sides: list[Callable[[], float]] = [
                lambda: _bare(pool, case, root, trips),
                lambda: _through_pool(pool, case, trips),
            ]
            order = [0, 1] if round_ % 2 == 0 else [1, 0]
            taken = {side: sides[side]() for side in order}
            ratios.append(taken[1] / taken[0])
            rates.append(trips / taken[1])
        _say("torchrun, once per step")
        torchrun_s = sum(_torchrun(world_size, number, root) for number in range(2))
    _say("pytest to the first verdict")
    first_s = min(_first_verdict(world_size) for _ in range(3))
    rate = statistics.median(rates)
    rows = [
        ("pool over bare loop", statistics.median(ratios), f"{MAX_POOL_OVER_BARE} or less", max, MAX_POOL_OVER_BARE),
        (
            "torchrun per step over pool",
            torchrun_s * rate,
            f"{MIN_TORCHRUN_OVER_POOL:g} or more",
            min,
            MIN_TORCHRUN_OVER_POOL,
        ),
        ("round trips per second", rate, f"{MIN_TRIPS_PER_S:g} or more", min, MIN_TRIPS_PER_S),
        ("pytest to first verdict, s", first_s, f"{MAX_FIRST_VERDICT_S:g} or less", max, MAX_FIRST_VERDICT_S),
    ]
    _say("")
    return _print_table(world_size, rows, ratios)


def _print_table(world_size: int, rows: list[tuple[str, float, str, Any, float]], ratios: list[float]) -> int:
    spread = f"pool over bare loop {min(ratios):.2f} to {max(ratios):.2f}"
    print(f"harness at {world_size} ranks; {_ROUNDS} rounds in turns, {spread}")
    missed = 0
    for name, value, goal, worst, limit in rows:
        is_met = worst(value, limit) == limit
        missed += not is_met
        print(f"  {name:<28} {value:>8.2f}   goal {goal:<12} {'met' if is_met else 'MISSED'}")
    return 1 if missed else 0


def _through_pool(pool: RankPool, case: Case, trips: int) -> float:
    start = time.perf_counter()
    for _ in range(trips):
        case = replace(case, seed=case.seed + 1)  # nothing of one trip may be of use to the next
        verdict = judge(case, pool.run(case, "torch"))
        if verdict.status != "PASS":
            raise DcpbenchError(f"The round trip that is measured did not pass: {verdict}.")
    return time.perf_counter() - start


def _bare(pool: RankPool, case: Case, root: str, trips: int) -> float:
    world_size = case.max_world_size
    with tempfile.TemporaryDirectory(dir=root) as folder:
        arguments = {"case": case, "root": folder, "trips": trips}
        seen = pool.step(Call(0, world_size, "dcpbench.bench.harness:bare_loop", arguments))
    if bad := [one for one in seen if one.outcome != "ok"]:
        raise DcpbenchError(f"The bare loop {bad[0].outcome} on rank {bad[0].rank}: {bad[0].error}.")
    return max(float(one.value) for one in seen)


def _torchrun(world_size: int, number: int, root: str) -> float:
    script = Path(root) / "step.py"
    script.write_text(_SCRIPT.format(path=sys.path))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    for _ in range(_TORCHRUN_TRIES):
        start = time.perf_counter()
        done = subprocess.run([*command, str(script), str(number), root], capture_output=True, text=True, check=False)
        if not done.returncode:
            return time.perf_counter() - start
    raise DcpbenchError(f"torchrun failed {_TORCHRUN_TRIES} times: {done.stderr[-500:]}")


def _first_verdict(world_size: int) -> float:
    """Returns the seconds from the start of pytest to its first verdict, as its summary says."""
    with tempfile.TemporaryDirectory(prefix="dcpbench-") as results:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "suites",
            "-q",
            "-k",
            "round_trip and torch",
            "-p",
            "no:cacheprovider",
        ]
        done = subprocess.run(
            [*command, f"--world-size={world_size}", "--profile=quick", "--backend=torch", f"--results={results}"],
            capture_output=True,
            text=True,
            check=False,
        )
    match = re.search(r"first verdict after ([\d.]+) s", done.stdout)
    if match is None:
        raise DcpbenchError(f"pytest gave no verdict: {done.stdout[-500:]} {done.stderr[-500:]}")
    return float(match[1])


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108  measured in memory on purpose


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
