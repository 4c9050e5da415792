"""Storages of its own kind: raw items in files, backwards, compressed, or in a database."""

from __future__ import annotations

import dataclasses
import io
import pickle
import sqlite3
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tests.odd_backends.dense import fill, raw_of

__all__ = ["BigEndian", "Database", "ItemReader", "ItemWriter", "Items", "Zipped"]


class Items:
    """Where the storage below puts items: one file each. A subclass has another place, or other bytes."""

    def put(self, folder: Path, name: str, raw: bytes, itemsize: int) -> None:
        (folder / name).write_bytes(self.encode(raw, itemsize))

    def get(self, folder: Path, name: str, itemsize: int) -> bytes:
        return self.encode((folder / name).read_bytes(), itemsize)

    def encode(self, raw: bytes, itemsize: int) -> bytes:
        return raw


class BigEndian(Items):
    def encode(self, raw: bytes, itemsize: int) -> bytes:
        return np.frombuffer(raw, np.uint8).reshape(-1, itemsize)[:, ::-1].tobytes() if raw else b""


class Zipped(Items):
    def put(self, folder: Path, name: str, raw: bytes, itemsize: int) -> None:
        (folder / f"{name}.z").write_bytes(zlib.compress(raw))

    def get(self, folder: Path, name: str, itemsize: int) -> bytes:
        return zlib.decompress((folder / f"{name}.z").read_bytes())


class Database(Items):
    def put(self, folder: Path, name: str, raw: bytes, itemsize: int) -> None:
        with sqlite3.connect(folder / "items.db", timeout=60) as database:
            database.execute("create table if not exists items (name text primary key, raw blob)")
            database.execute("insert or replace into items values (?, ?)", (name, raw))
        database.close()

    def get(self, folder: Path, name: str, itemsize: int) -> bytes:
        database = sqlite3.connect(folder / "items.db", timeout=60)
        (raw,) = database.execute("select raw from items where name = ?", (name,)).fetchone()
        database.close()
        return bytes(raw)


class ItemWriter(dcp.StorageWriter):
    """A storage of its own, for raw items; the metadata is one more file."""

    def __init__(self, path: str, items: Items) -> None:
        self.folder, self.items = Path(path), items

    def reset(self, checkpoint_id: Any = None) -> None:
        self.folder = Path(checkpoint_id or self.folder)

    def set_up_storage_writer(self, is_coordinator: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=number) for number, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[Any]:
        results = []
        for number, item in enumerate(plan.items):
            data, name = planner.resolve_data(item), f"{plan.storage_data}-{number}"
            is_tensor = isinstance(data, torch.Tensor)
            raw = raw_of(data).tobytes() if is_tensor else data.getvalue()
            how = (name, data.dtype, tuple(data.shape)) if is_tensor else (name, torch.uint8, (len(raw),))
            self.items.put(self.folder, name, raw, how[1].itemsize)
            results.append(WriteResult(item.index, len(raw), how))
        return _future(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {one.index: one.storage_data for many in results for one in many}
        (self.folder / "metadata.pkl").write_bytes(pickle.dumps(metadata))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class ItemReader(dcp.StorageReader):
    """The other half."""

    def __init__(self, path: str, items: Items) -> None:
        self.folder, self.items = Path(path), items

    def reset(self, checkpoint_id: Any = None) -> None:
        self.folder = Path(checkpoint_id or self.folder)

    def read_metadata(self) -> Metadata:
        return pickle.loads((self.folder / "metadata.pkl").read_bytes())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        self.storage_data = metadata.storage_data

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        return plans

    def read_data(self, plan: Any, planner: dcp.LoadPlanner) -> Future[None]:
        for item in plan.items:
            name, dtype, shape = self.storage_data[item.storage_index]
            raw = self.items.get(self.folder, name, dtype.itemsize)
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(raw))
                continue
            array = np.frombuffer(raw, np.uint8).reshape(*shape, dtype.itemsize)
            along = zip(item.storage_offsets, item.lengths, strict=True)
            tensor = planner.resolve_tensor(item)
            fill(tensor, array[tuple(slice(start, start + length) for start, length in along)])
            planner.commit_tensor(item, tensor)
        return _future(None)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _future(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
