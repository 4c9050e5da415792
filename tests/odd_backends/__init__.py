"""Correct but unusual backends: each does in some other way what torch does, and must never be flagged."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.futures import Future

from dcpbench import EngineBackend, PlannerBackend, StorageBackend
from dcpbench.backends.protocol import Engine
from tests.odd_backends.calls import Background, Calls
from tests.odd_backends.dense import Broadcasting, Dense
from tests.odd_backends.files import Mapped, OneFile, Padded, compressing_reader, compressing_writer
from tests.odd_backends.planners import (
    Bookkeeping,
    ColumnHalves,
    HighestRank,
    Hintless,
    Restaging,
    RoundRobin,
    RowChunks,
    Shuffled,
)
from tests.odd_backends.storage import BigEndian, Database, ItemReader, Items, ItemWriter, Zipped

__all__ = ["ODD", "Background", "Calls", "Dense", "background", "dense"]


class LateWriter(dcp.FileSystemWriter):
    """Writes in a thread of its own that starts late; the future has an answer when all is written."""

    def write_data(self, plan: Any, planner: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def write() -> None:
            time.sleep(0.005)
            try:
                future.set_result(super(LateWriter, self).write_data(plan, planner).value())
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=write).start()
        return future


class LateReader(dcp.FileSystemReader):
    """Reads in a thread of its own that starts late, each part twice, from the last item to the first."""

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        future: Future[None] = Future()

        def read() -> None:
            time.sleep(0.005)
            twice = dataclasses.replace(plan, items=[item for item in reversed(plan.items) for _ in range(2)])
            future.set_result(super(LateReader, self).read_data(twice, planner).value())

        threading.Thread(target=read).start()
        return future


class LitteringWriter(dcp.FileSystemWriter):
    """Leaves other files and folders in the checkpoint."""

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        (Path(self.path) / "README").write_text("written by hand")
        (Path(self.path) / "__9_9.distcp").write_bytes(b"\0" * 100)
        (Path(self.path) / "logs").mkdir(exist_ok=True)


class Renaming:
    """Keeps each leaf under a hash of its key, at the top of a flat state dict."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> Metadata:
        held = {self.name(path): self.wrap(value) for path, value in Dense().leaves(state_dict)}
        return dcp.save(held, checkpoint_id=checkpoint_id)

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> list[str]:
        paths = {self.name(path): path for path, _ in Dense().leaves(state_dict)}
        held = {self.name(path): self.wrap(value) for path, value in Dense().leaves(state_dict)}
        try:
            dcp.load(held, checkpoint_id=checkpoint_id)
        except dcp.api.CheckpointException as error:
            known = {name: ".".join(map(str, path)) for name, path in paths.items()}
            raise RuntimeError(f"{error}, where {known}") from error
        for name, path in paths.items():
            if isinstance(held[name], tuple):
                at: Any = state_dict
                for part in path[:-1]:
                    at = at[part]
                (at[path[-1]],) = held[name]
        return list(held)

    def name(self, path: tuple[Any, ...]) -> str:
        return hashlib.sha256(repr(path).encode("utf-8", "surrogatepass")).hexdigest()

    def wrap(self, value: Any) -> Any:
        return value if hasattr(value, "untyped_storage") else (value,)


def _stored(name: str, items: Items) -> StorageBackend:
    return StorageBackend(name, lambda path: ItemWriter(path, items), lambda path: ItemReader(path, items))


def _planned(name: str, save_planner: Any = dcp.DefaultSavePlanner, load_planner: Any = dcp.DefaultLoadPlanner) -> Any:
    return PlannerBackend(name, save_planner, load_planner)


def _with_words(function: Any) -> Any:
    """Returns ``function`` made slower, and with a return value that means nothing."""

    def call(*args: Any, **kwargs: Any) -> object:
        time.sleep(0.003)
        function(*args, **kwargs)
        return "done"

    return call


_FILES = {"writer": dcp.FileSystemWriter, "reader": dcp.FileSystemReader}

background = Background().backend("background")
dense = EngineBackend("dense", Dense().save, Dense().load)
broadcasting = EngineBackend("broadcasting", Broadcasting().save, Broadcasting().load)
renaming = EngineBackend("renaming", Renaming().save, Renaming().load)
chatty = StorageBackend("chatty", **_FILES, engine=Engine(_with_words(dcp.save), _with_words(dcp.load)))
row_chunks = _planned("row_chunks", RowChunks)
highest_rank = _planned("highest_rank", HighestRank)
round_robin = _planned("round_robin", RoundRobin)
hintless = _planned("hintless", Hintless)
column_halves = _planned("column_halves", ColumnHalves)
shuffled = _planned("shuffled", Shuffled)
bookkeeping = _planned("bookkeeping", Bookkeeping)
restaging = _planned("restaging", load_planner=Restaging)
lowest_rank = _planned("lowest_rank", lambda: dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True))
raw_items = _stored("raw_items", Items())
big_endian = _stored("big_endian", BigEndian())
zipped = _stored("zipped", Zipped())
database = _stored("database", Database())
one_file = _stored("one_file", OneFile())
padded = _stored("padded", Padded())
mapped = _stored("mapped", Mapped())
compressing = StorageBackend("compressing", compressing_writer, compressing_reader)
late = StorageBackend("late", LateWriter, LateReader)
littering = StorageBackend("littering", LitteringWriter, dcp.FileSystemReader)
file_per_item = StorageBackend(
    "file_per_item", lambda path: dcp.FileSystemWriter(path, single_file_per_rank=False), dcp.FileSystemReader
)
three_threads = StorageBackend(
    "three_threads", lambda path: dcp.FileSystemWriter(path, thread_count=3), dcp.FileSystemReader
)

ODD = tuple(name for name, value in list(globals().items()) if isinstance(value, StorageBackend | EngineBackend))
"""The names of all of them; each is an attribute of this module."""
