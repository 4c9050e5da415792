"""What the ranks do in `dcpbench bench run`: hold states, save and load them once per call. Runs on ranks.

    take -> { save, load, save_in_background, raw_save, raw_load } … -> forget

Every function runs on all ranks of a call. The clocks stand around the backend's call and nothing else; whatever is
made ready or checked lies outside of them.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dcpbench.backends import registry
from dcpbench.bench import dispatch
from dcpbench.bench.counters import evict, release_memory, resident_share, storage_bytes_read
from dcpbench.bench.placing import place
from dcpbench.bench.raw import RawFiles
from dcpbench.bench.samples import AsyncSample, CallSample, Taken
from dcpbench.bench.split import DataClock
from dcpbench.bench.state import RankState
from dcpbench.bench.training_loop import TrainingLoop
from dcpbench.bench.workloads import workload
from dcpbench.ranks.meter import Meter

__all__ = ["forget", "load", "process_id", "raw_load", "raw_save", "save", "save_counted", "save_in_background", "take"]

_states: dict[tuple[str, float, str, int], tuple[RankState, RawFiles]] = {}
_LOOP_ALONE_S = 0.2


def process_id(_rank: int, _world_size: int) -> int:
    """Returns the process id of this rank."""
    return os.getpid()


def take(rank: int, world_size: int, *, name: str, scale: float, layout: str, device: str = "cpu") -> Taken:
    """Makes this rank's part of a state and keeps it for the calls that follow."""
    wanted = workload(name, scale)
    if device != "cpu":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    placed = place(layout, wanted, world_size)
    state = RankState(wanted, placed, rank, device)
    on_host = state if device == "cpu" else RankState(wanted, placed, rank, "cpu")
    _states[name, scale, layout, world_size] = state, RawFiles(on_host)
    return Taken(state.local_bytes, sum(local.numel() > 0 for local in state.locals), state.digest)


def forget(_rank: int, _world_size: int) -> None:
    """Lets go of all states."""
    _states.clear()
    release_memory()


def save(
    _rank: int, world_size: int, *, setting: tuple[str, float, str], backend: str, folder: str, is_for_memory: bool
) -> CallSample:
    """Saves the state once.

    Args:
        world_size: of the call.
        setting: workload, scale and layout, as given to :func:`take`.
        backend: specification.
        folder: the checkpoint's, which is not there yet.
        is_for_memory: give freed memory back before the call: the peak is then exact, and the time is not.
    """
    state = _states[*setting, world_size][0]
    state_dict, clock = state.state_dict(), DataClock()
    session = clock.around(registry.resolve(backend)).open(reuse=False)
    return _timed(lambda: session.save(state_dict, folder), state, clock, is_for_memory=is_for_memory)


def save_counted(
    _rank: int, world_size: int, *, setting: tuple[str, float, str], backend: str, folder: str
) -> tuple[dict[str, int], int]:
    """Saves the state once, without a clock; returns its collectives by name, and the number of tensor copies."""
    state_dict = _states[*setting, world_size][0].state_dict()
    session = registry.resolve(backend).open(reuse=False)
    with dispatch.Counting() as counting:
        session.save(state_dict, folder)
    return dict(counting.collectives), counting.num_copies


def load(
    rank: int,
    world_size: int,
    *,
    setting: tuple[str, float, str],
    backend: str,
    folder: str,
    is_cold: bool,
    is_for_memory: bool,
) -> CallSample:
    """Loads the state once; afterwards it holds again what it held, or ``fault`` says what is wrong.

    Args:
        rank: this rank.
        world_size: may be another one than that of the save.
        setting: as given to :func:`take`.
        backend: specification.
        folder: the checkpoint's.
        is_cold: write its files back and drop them from the page cache before.
        is_for_memory: as for :func:`save`.
    """
    state = _states[*setting, world_size][0]
    state.make_stale()
    state_dict, clock = state.state_dict(), DataClock()
    session = clock.around(registry.resolve(backend)).open(reuse=False)
    resident = _make_cold(Path(folder), rank) if is_cold else 0.0
    seen = _timed(lambda: session.load(state_dict, folder), state, clock, is_for_memory=is_for_memory)
    return replace(seen, resident_share=resident, fault=_checked(state))


def raw_save(_rank: int, world_size: int, *, setting: tuple[str, float, str], folder: str) -> CallSample:
    """Writes the bytes of the state into ``folder``, which is there, and makes them durable."""
    raw = _states[*setting, world_size][1]
    return _timed(lambda: raw.write(Path(folder)), raw.state, DataClock(), is_for_memory=False)


def raw_load(rank: int, world_size: int, *, setting: tuple[str, float, str], folder: str, is_cold: bool) -> CallSample:
    """Reads the bytes of the state from what :func:`raw_save` wrote under the same layout."""
    raw = _states[*setting, world_size][1]
    raw.state.make_stale()
    resident = _make_cold(Path(folder), rank) if is_cold else 0.0
    seen = _timed(lambda: raw.read(Path(folder)), raw.state, DataClock(), is_for_memory=False)
    return replace(seen, resident_share=resident, fault=_checked(raw.state))


def save_in_background(
    _rank: int, world_size: int, *, setting: tuple[str, float, str], backend: str, folder: str
) -> AsyncSample | None:
    """Saves the state in the background while a small model trains; None where the backend has no such call."""
    state = _states[*setting, world_size][0]
    state_dict = state.state_dict()
    session = registry.resolve(backend).open(reuse=False)
    if "async_save" not in getattr(session, "takes", ()):
        return None
    loop = TrainingLoop(state.device)
    dist.barrier()
    alone = loop.rate_for(_LOOP_ALONE_S)
    dist.barrier()
    begin_s = time.monotonic()
    response = session.async_save(state_dict, folder)  # type: ignore[attr-defined]
    blocking_s = time.monotonic() - begin_s
    future = getattr(response, "upload_completion", response)
    during = loop.rate_until(future.done)
    future.result()
    end_s = time.monotonic()
    return AsyncSample(begin_s, end_s, blocking_s, during, alone)


def _timed(call: Callable[[], Any], state: RankState, clock: DataClock, *, is_for_memory: bool) -> CallSample:
    if is_for_memory:
        release_memory()
    dist.barrier()
    clock.reset()
    read_before = storage_bytes_read()
    with Meter(state.device) as meter:
        cpu_before = _cpu_s()
        begin_s = time.monotonic()
        call()
        if state.device != "cpu":
            torch.cuda.synchronize()
        end_s = time.monotonic()
        cpu_s = _cpu_s() - cpu_before
    return CallSample(
        begin_s,
        end_s,
        end_s - begin_s,
        data_begin_s=clock.begin_s,
        data_end_s=clock.end_s,
        cpu_s=cpu_s,
        peak_bytes=meter.usage.peak_bytes,
        device_peak_bytes=meter.usage.device_peak_bytes,
        storage_read_bytes=storage_bytes_read() - read_before,
    )


def _make_cold(folder: Path, rank: int) -> float:
    """Drops a checkpoint from the page cache and returns the share of it that stayed; all ranks call it."""
    dist.barrier()
    if rank == 0:
        evict(folder)
        return resident_share(folder)
    return 0.0


def _checked(state: RankState) -> str:
    fault = state.fault()
    if fault:
        state.fill()
    return fault


def _cpu_s() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )
