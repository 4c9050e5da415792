"""`dcpbench bench simulator`: cases a second, the number of legal orders of a small case, and one case at scale."""

from __future__ import annotations

import gc
import itertools
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from dcpbench.backends import registry
from dcpbench.backends.protocol import Backend, StorageBackend
from dcpbench.bench.status_line import say
from dcpbench.errors import DcpbenchError, expected
from dcpbench.geometry import Box
from dcpbench.messages import Observation
from dcpbench.oracle.protocol import judge_protocol
from dcpbench.protocol_case import ProtocolCase, ProtocolLeaf, ProtocolPart, ProtocolStep
from dcpbench.simulate.fibres import pause
from dcpbench.simulate.memory_storage import MemoryReader, MemoryStore, MemoryWriter
from dcpbench.simulate.run import run_case
from dcpbench.simulate.schedule import drive, every_order
from reference import DefaultLoadPlanner, DefaultSavePlanner
from reference.engine import load_protocol, save_protocol

__all__ = ["Options", "Scaled", "measure", "run_at_scale"]

_NUM_RANKS = 8
_ROWS, _COLUMNS = 1, 4


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        seconds: how long cases are run on each storage.
        num_ranks, num_tensors: of the one case at scale.
    """

    seconds: float = 5.0
    num_ranks: int = 4096
    num_tensors: int = 500


@dataclass(frozen=True)
class Scaled:
    """What the case at scale took.

    Attributes:
        num_items: write items of all local plans.
        seconds: by what was done: build, save, load.
        cpu_s: of the process, which is less than those where other programs run beside it.
        peak_bytes: the high-water mark of the process.
    """

    num_items: int
    seconds: dict[str, float]
    cpu_s: float
    peak_bytes: int


def measure(options: Options) -> int:
    """Prints the figures; returns 0.

    Raises:
        UsageError: an option is out of range.
    """
    if not 0 < options.seconds <= 600:
        raise expected("seconds above 0, at most 600", "--seconds", options.seconds, "Give, for example, 5.")
    if options.num_ranks < 1 or options.num_tensors < 1:
        raise expected("at least one rank and one tensor", "--ranks", options.num_ranks, "Give, for example, 4096.")
    for name, backend in _storages():
        rate = _rate(name, backend, options.seconds)
        say("")
        print(f"{name}: {rate:.0f} cases a second, each a save and a load by {_NUM_RANKS} virtual ranks")
    for num_ranks, is_fine in ((2, False), (2, True)):
        what = "changed at each call" if is_fine else "changed where ranks wait"
        number = _num_orders(num_ranks, is_fine=is_fine)
        print(f"a save by {num_ranks} ranks, {what}: {number} legal orders, all run, each to the same metadata")
    scaled = run_at_scale(options.num_ranks, options.num_tensors)
    total_s = sum(scaled.seconds.values())
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in scaled.seconds.items())
    parts += f"; {scaled.cpu_s:.0f} s of CPU time"
    print(
        f"{options.num_ranks} ranks x {options.num_tensors} tensors, {scaled.num_items} items: {total_s:.0f} s "
        f"({parts}), peak {scaled.peak_bytes / 2**30:.2f} GiB"
    )
    return 0


def _storages() -> Iterator[tuple[str, Backend]]:
    store = MemoryStore()
    yield (
        "memory",
        StorageBackend(
            "memory",
            lambda path: MemoryWriter(store, path, 0, asks_twice=False),
            lambda path: MemoryReader(store, path),
        ),
    )
    for name in registry.KNOWN:
        yield name, registry.resolve(name)


def _rate(name: str, backend: Backend, seconds: float) -> float:
    with tempfile.TemporaryDirectory(prefix="dcpbench-", dir=_memory()) as folder:
        numbers = itertools.count()
        for _ in range(5):
            _run(backend, Path(folder), next(numbers))
        begin_s, done = time.monotonic(), 0
        while (elapsed_s := time.monotonic() - begin_s) < seconds:
            _run(backend, Path(folder), next(numbers))
            done += 1
            if not done % 50:
                say(f"{name}: {done} cases in {elapsed_s:.1f} s")
    return done / elapsed_s


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108  fresh folders of random names


def _run(backend: Backend, folder: Path, number: int) -> None:
    """Runs and judges one case: eight rows of a tensor and an object, saved by all ranks out of order, and loaded."""
    rows = [Box((row, 0), (_ROWS, _COLUMNS)) for row in range(_NUM_RANKS)]
    saved = [ProtocolPart(0, (row * 3 + number) % _NUM_RANKS, box) for row, box in enumerate(rows)]
    wanted = [ProtocolPart(0, row, box) for row, box in enumerate(rows)]
    order = tuple((number * 7 + turn * 5) % 8 for turn in range(16))
    case = ProtocolCase(
        "storage",
        number,
        (ProtocolLeaf("w", (_NUM_RANKS, _COLUMNS)), ProtocolLeaf("step", dtype="")),
        (
            ProtocolStep("save", "a", _NUM_RANKS, (*saved, ProtocolPart(1, 1)), schedule=order),
            ProtocolStep("load", "a", _NUM_RANKS, (*wanted, ProtocolPart(1, 0)), schedule=order),
        ),
    )
    seen = run_case(case, backend, folder / str(number))
    verdict = judge_protocol(case, [Observation(0, 1, 0, "call", "ok", value=seen)])
    if verdict.status != "PASS":
        raise DcpbenchError(f"Case {number} ended with {verdict.status}: {verdict.findings or verdict.reason}.")


def _num_orders(num_ranks: int, *, is_fine: bool) -> int:
    found: set[str] = set()
    number = 0
    for metadata in every_order(lambda choose: _saved(num_ranks, choose, is_fine=is_fine)):
        number += 1
        found.add(repr(metadata))
    if len(found) != 1:
        raise DcpbenchError(f"{len(found)} different checkpoints came of {number} orders.")
    return number


def _saved(num_ranks: int, choose: Any, *, is_fine: bool) -> Any:
    """Returns the metadata that all ranks get from a save, each of a row, in one order."""
    size = torch.Size((num_ranks, _COLUMNS))
    store = MemoryStore()
    states = [_Rows(["w"], size, rank).state() for rank in range(num_ranks)]
    run = drive([_save(state, rank, num_ranks, store) for rank, state in enumerate(states)], choose, is_fine=is_fine)
    return run.values()[-1].state_dict_metadata


def run_at_scale(num_ranks: int, num_tensors: int) -> Scaled:
    """Saves and loads tensors of which each rank has a row, by the reference's planners and a storage in memory.

    What ranks say is handed over as it is: pickled, two million items would say no more. All that was loaded is
    compared with what was saved.
    """
    size = torch.Size((num_ranks, _COLUMNS))
    store, names = MemoryStore(), [f"layers.{number}.weight" for number in range(num_tensors)]
    gc.collect()
    gc.disable()
    try:
        seconds = {}
        begin_s, begin_cpu_s = time.monotonic(), time.process_time()
        ranks = [_Rows(names, size, rank) for rank in range(num_ranks)]
        for rank, rows in enumerate(ranks):
            rows.block.copy_(_content(rank, num_tensors))
        states = [rows.state() for rows in ranks]
        seconds["build"] = (built_s := time.monotonic()) - begin_s
        drive([_save(state, rank, num_ranks, store) for rank, state in enumerate(states)], is_pickled=False).values()
        seconds["save"] = (saved_s := time.monotonic()) - built_s
        for rows in ranks:
            rows.block.fill_(-1.0)
        drive([_load(state, rank, num_ranks, store) for rank, state in enumerate(states)], is_pickled=False).values()
        for rank, rows in enumerate(ranks):
            if not torch.equal(rows.block, _content(rank, num_tensors)):
                raise DcpbenchError(f"Rank {rank} got wrong elements.")
        seconds["load"] = time.monotonic() - saved_s
    finally:
        gc.enable()
    cpu_s = time.process_time() - begin_cpu_s
    return Scaled(num_ranks * num_tensors, seconds, cpu_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _content(rank: int, num_tensors: int) -> torch.Tensor:
    first = torch.arange(num_tensors * _ROWS * _COLUMNS, dtype=torch.float64) + rank * 7919.0
    return (first % 8_388_593).to(torch.float32).reshape(num_tensors, _ROWS, _COLUMNS)


def _save(state: dict[str, Any], rank: int, num_ranks: int, store: MemoryStore) -> Any:
    return save_protocol(
        state,
        rank=rank,
        world_size=num_ranks,
        open_storage=lambda: _paused(MemoryWriter(store, "a", rank, asks_twice=False)),
        planner=DefaultSavePlanner(),
        asks_stateful=False,
    )


def _load(state: dict[str, Any], rank: int, num_ranks: int, store: MemoryStore) -> Any:
    return load_protocol(
        state,
        rank=rank,
        world_size=num_ranks,
        open_storage=lambda: MemoryReader(store, "a"),
        planner=DefaultLoadPlanner(),
        asks_stateful=False,
    )


def _paused(writer: MemoryWriter) -> MemoryWriter:
    """Lets other ranks have a turn before this one writes, where ranks are changed at each call."""
    pause()
    return writer


class _Rows:
    """One rank's row of each tensor, in one block of memory."""

    def __init__(self, names: list[str], size: torch.Size, rank: int) -> None:
        self.block = torch.zeros((len(names), _ROWS, _COLUMNS))
        self.size = size
        self.chunk = ChunkStorageMetadata(torch.Size((rank * _ROWS, 0)), torch.Size((_ROWS, _COLUMNS)))
        self.data = TensorWriteData(self.chunk, TensorProperties(dtype=torch.float32), size)
        self._names = names

    def state(self) -> dict[str, _Row]:
        """Returns the state dict of the rank."""
        return {name: _Row(self, number) for number, name in enumerate(self._names)}


class _Row:
    """A tensor of which this rank has one row; it describes its own chunk, as `_Checkpointable` of DTensor says."""

    __slots__ = ("_number", "_rows")

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, rows: _Rows, number: int) -> None:
        self._rows, self._number = rows, number

    def size(self) -> torch.Size:
        """Returns the shape of the whole tensor."""
        return self._rows.size

    def __create_write_items__(self, fqn: str, _value: Any) -> list[WriteItem]:
        rows = self._rows
        return [WriteItem(MetadataIndex(fqn, rows.chunk.offsets), WriteItemType.SHARD, tensor_data=rows.data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._rows.chunk]

    def __get_tensor_shard__(self, _index: MetadataIndex) -> torch.Tensor:
        return self._rows.block[self._number]
