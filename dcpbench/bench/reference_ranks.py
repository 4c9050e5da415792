"""What the ranks do in `dcpbench bench reference`: hold a state, save and load it by one side, check what came back.

A side is the raw limit or an implementation with the public names of ``torch.distributed.checkpoint``. The state lives
across calls, so that nothing but the call itself is measured.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dcpbench.bench import roofline
from dcpbench.bench.counters import bytes_read, evict, release_memory, resident_share
from dcpbench.bench.figures import Sample, Workload
from dcpbench.errors import DcpbenchError
from dcpbench.ranks.meter import Meter

__all__ = ["crc32_name", "forget", "quarter", "sample", "take"]

MODULES = {"torch": "torch.distributed.checkpoint", "reference": "reference"}
_STALE = 0xA5
_NUM_PARTS = 4


@dataclass(frozen=True)
class _Held:
    source: dict[str, torch.Tensor]
    destination: dict[str, torch.Tensor]


_held: list[_Held] = []


def take(rank: int, world_size: int, *, workload: Workload) -> None:
    """Makes this rank's share of the state: every ``world_size``-th tensor, of random bytes, and a destination."""
    names = [f"layers.{number}.weight" for number in range(rank, workload.num_tensors, world_size)]
    generator = torch.Generator().manual_seed(rank)
    # As 32-bit integers, and compared as such: random bytes hold NaNs, which equal nothing.
    source = {
        name: torch.randint(-(2**31), 2**31, workload.shape, dtype=torch.int32, generator=generator) for name in names
    }
    _held[:] = [_Held(source, {name: torch.full_like(tensor, _STALE) for name, tensor in source.items()})]


def crc32_name(_rank: int, _world_size: int) -> str:
    """Returns what computes the reference's checksums."""
    name: str = importlib.import_module("reference.checksums").CRC32_NAME
    return name


def forget(_rank: int, _world_size: int) -> None:
    """Lets go of the state."""
    _held.clear()
    release_memory()


def sample(
    rank: int, _world_size: int, *, side: str, action: str, folder: str, is_cold: bool, is_for_memory: bool
) -> Sample:
    """Saves the state into ``folder`` or loads it from there, once; what was loaded is compared, outside of the clock.

    Args:
        rank: this rank.
        side: ``raw`` or a key of :data:`MODULES`.
        action: ``save`` or ``load``.
        folder: of this side alone; it must exist.
        is_cold: drop the files from the page cache before a load.
        is_for_memory: give freed memory back before the call, so that the peak is exact and the time is not.
    """
    held = _held[0]
    resident = 0.0
    if action == "load":
        for tensor in held.destination.values():
            tensor.fill_(_STALE)
        if is_cold and rank == 0:
            evict(Path(folder))
        dist.barrier()
        resident = resident_share(Path(folder))
    clock = _Clock()
    call = _raw_call(action, Path(folder) / f"{rank}.raw", held) if side == "raw" else None
    call = call or _side_call(side, action, folder, held, clock)
    if is_for_memory:
        release_memory()
    dist.barrier()
    read_before = bytes_read()
    with Meter("cpu") as meter:
        begin_s = time.monotonic()
        call()
        end_s = time.monotonic()
    read_bytes = bytes_read() - read_before
    if action == "load":
        _check(side, held.destination, held.source)
    data = (clock.begin_s, clock.end_s) if side != "raw" else (begin_s, end_s)
    return Sample(begin_s, end_s, *data, meter.usage.peak_bytes, read_bytes, resident)


def quarter(rank: int, _world_size: int, *, side: str, dim: int, folder: str) -> tuple[int, int]:
    """Loads a quarter of each of this rank's tensors along ``dim``, alone.

    Returns:
        The bytes read by system calls, and the bytes asked for.
    """
    source = _held[0].source
    part = {name: tensor.chunk(_NUM_PARTS, dim)[rank % _NUM_PARTS].contiguous() for name, tensor in source.items()}
    mesh = DeviceMesh("cpu", torch.arange(_NUM_PARTS), _init_backend=False, _rank=rank % _NUM_PARTS)
    state = {
        name: DTensor.from_local(
            torch.full_like(part[name], _STALE),
            mesh,
            [Shard(dim)],
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
        for name, tensor in source.items()
    }
    module = importlib.import_module(MODULES[side])
    read_before = bytes_read()
    module.load(state, storage_reader=module.FileSystemReader(folder), no_dist=True)
    read_bytes = bytes_read() - read_before
    _check(side, {name: tensor.to_local() for name, tensor in state.items()}, part)
    return read_bytes, sum(tensor.nbytes for tensor in part.values())


class _Clock:
    """Wraps the method of a storage that moves the data, and remembers when it began and ended."""

    begin_s = end_s = 0.0

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            self.begin_s = time.monotonic()
            future = method(*args)
            future.wait()
            self.end_s = time.monotonic()
            return future

        return timed


def _raw_call(action: str, path: Path, held: _Held) -> Callable[[], Any]:
    if action == "save":
        return lambda: roofline.write(path, [_memory(tensor) for tensor in held.source.values()])
    return lambda: roofline.read(path, [_memory(tensor) for tensor in held.destination.values()])


def _side_call(side: str, action: str, folder: str, held: _Held, clock: _Clock) -> Callable[[], Any]:
    module = importlib.import_module(MODULES[side])
    if action == "save":
        writer = module.FileSystemWriter(folder)
        writer.write_data = clock.around(writer.write_data)
        return lambda: module.save(held.source, storage_writer=writer)
    reader = module.FileSystemReader(folder)
    reader.read_data = clock.around(reader.read_data)
    return lambda: module.load(dict(held.destination), storage_reader=reader)


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy().data).cast("B")


def _check(side: str, loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    wrong = [name for name, tensor in expected.items() if not torch.equal(loaded[name], tensor)]
    if wrong:
        raise DcpbenchError(f"{side} loaded other content than was saved: {wrong[0]!r} and {len(wrong) - 1} more.")
