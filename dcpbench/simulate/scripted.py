"""Planners that do as a case says: any items, in any order, with chunks of any split, on any rank."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dcpbench.content import DTYPES
from dcpbench.geometry import Box
from dcpbench.protocol_case import ProtocolCase, ProtocolPart
from dcpbench.protocol_seen import Filled
from dcpbench.simulate.watch import Watch

__all__ = ["ScriptedLoadPlanner", "ScriptedSavePlanner", "dtype_of", "raw_of", "tensor_of"]


def dtype_of(name: str) -> torch.dtype:
    """Returns the dtype of a name in :data:`dcpbench.content.DTYPES`."""
    found: torch.dtype = getattr(torch, name)
    return found


def tensor_of(raw: bytes, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """Returns a tensor of ``shape`` with the bytes ``raw``, in memory of its own."""
    if not raw:
        return torch.empty(tuple(shape), dtype=dtype_of(dtype))
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype_of(dtype)).reshape(tuple(shape))


def raw_of(tensor: torch.Tensor) -> bytes:
    """Returns the bytes of a tensor, row-major."""
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().data) if flat.numel() else b""


class ScriptedSavePlanner(SavePlanner):
    """Saves the parts of a step that a rank has, in their order."""

    def __init__(self, case: ProtocolCase, number: int, watch: Watch) -> None:
        self._case, self._step, self._number, self._watch = case, case.steps[number], number, watch
        self._parts = [part for part in self._step.parts if part.rank == watch.rank]
        self._may_ask: set[MetadataIndex] = set()
        self.strays: list[str] = []

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        return SavePlan([self._item(part) for part in self._parts])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        plans = []
        for plan in all_plans:
            items = []
            for item in plan.items:
                data, index = item.tensor_data, item.index
                if data is None:
                    entries[index.fqn] = BytesStorageMetadata()
                    items.append(item)
                    continue
                entry = entries.setdefault(index.fqn, TensorStorageMetadata(data.properties, data.size, []))
                assert isinstance(entry, TensorStorageMetadata)
                hint = len(entry.chunks) if self._step.has_hints else None
                entry.chunks.append(data.chunk)
                items.append(WriteItem(MetadataIndex(index.fqn, index.offset, hint), item.type, tensor_data=data))
            plans.append(SavePlan(items))
        return plans, Metadata(entries)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self._may_ask = {item.index for item in new_plan.items}
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.index not in self._may_ask:
            self.strays.append(f"resolve_data({_say(write_item.index)}) on rank {self._watch.rank}")
        found: torch.Tensor | io.BytesIO = self._watch.around("resolve_data", lambda: self._data(write_item))
        return found

    def _data(self, item: WriteItem) -> torch.Tensor | io.BytesIO:
        fqn = item.index.fqn
        number = next(number for number, leaf in enumerate(self._case.leaves) if leaf.fqn == fqn)
        if item.tensor_data is None:
            return io.BytesIO(self._case.content(number, self._number, None))
        chunk = item.tensor_data.chunk
        raw = self._case.content(number, self._number, Box(tuple(chunk.offsets), tuple(chunk.sizes)))
        return tensor_of(raw, chunk.sizes, self._case.leaves[number].dtype)

    def _item(self, part: ProtocolPart) -> WriteItem:
        leaf = self._case.leaves[part.leaf]
        if part.box is None:
            return WriteItem(MetadataIndex(leaf.fqn), WriteItemType.BYTE_IO)
        offsets, sizes, whole = torch.Size(part.box.offsets), torch.Size(part.box.sizes), torch.Size(leaf.shape)
        data = TensorWriteData(
            ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=dtype_of(leaf.dtype)), whole
        )
        kind = WriteItemType.TENSOR if sizes == whole else WriteItemType.SHARD
        return WriteItem(MetadataIndex(leaf.fqn, offsets), kind, tensor_data=data)


class ScriptedLoadPlanner(LoadPlanner):
    """Fills the boxes that a rank wants in a step, from whatever chunks the metadata lists."""

    def __init__(self, case: ProtocolCase, number: int, watch: Watch) -> None:
        self._case, self._step, self._watch = case, case.steps[number], watch
        self._parts = [(n, part) for n, part in enumerate(self._step.parts) if part.rank == watch.rank]
        self._targets: dict[int, torch.Tensor] = {}
        self._objects: dict[int, bytes] = {}
        self._given: dict[tuple[int, int], torch.Tensor] = {}
        self._committed: dict[tuple[int, int], bytes] = {}
        self._num_read: Counter[int] = Counter()
        self._num_items: Counter[int] = Counter()
        self._may_ask: set[tuple[Any, ...]] = set()
        self.strays: list[str] = []
        for n, part in self._parts:
            leaf = case.leaves[part.leaf]
            if part.box is not None:
                num_bytes = part.box.numel * DTYPES[leaf.dtype]
                self._targets[n] = tensor_of(b"\1" * num_bytes, part.box.sizes, leaf.dtype)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items = [item for n, part in self._parts for item in self._items(n, part)]
        if not self._step.has_hints:
            items.reverse()
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        self._may_ask = {_key(item) for item in central_plan.items}
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        def load() -> None:
            self._objects[self._note(read_item, "load_bytes")] = value.read()

        self._watch.around("load_bytes", load)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        def resolve() -> torch.Tensor:
            number = self._note(read_item, "resolve_tensor")
            tensor = self._targets[number]
            for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
                tensor = tensor.narrow(dim, offset, length)
            self._given[number, self._place(read_item)] = tensor
            return tensor

        found: torch.Tensor = self._watch.around("resolve_tensor", resolve)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        def commit() -> None:
            number = self._note(read_item, "commit_tensor")
            key = number, self._place(read_item)
            given = self._given.get(key)
            if given is None or tensor.size() != given.size() or tensor.data_ptr() != given.data_ptr():
                self.strays.append(f"commit_tensor({_say(read_item.dest_index)}) of another tensor")
            self._committed[key] = raw_of(tensor)

        self._watch.around("commit_tensor", commit)

    def filled(self) -> list[Filled]:
        """Returns what became of each box that was wanted."""
        found = []
        for n, part in self._parts:
            if part.box is None:
                found.append(Filled(n, part.rank, self._objects.get(n)))
                continue
            given = {key: tensor for key, tensor in self._given.items() if key[0] == n}
            is_committed = len(given) == self._num_items[n] and all(
                self._committed.get(key) == raw_of(tensor) for key, tensor in given.items()
            )
            found.append(Filled(n, part.rank, raw_of(self._targets[n]), self._num_read[n], is_committed))
        return found

    def _items(self, n: int, part: ProtocolPart) -> list[ReadItem]:
        fqn = self._case.leaves[part.leaf].fqn
        entry = self._metadata.state_dict_metadata[fqn]
        own = MetadataIndex(fqn, None, n)
        if part.box is None or isinstance(entry, BytesStorageMetadata):
            zero = torch.Size((0,))
            return [ReadItem(LoadItemType.BYTE_IO, own, zero, MetadataIndex(fqn), zero, zero)]
        items = []
        for position, chunk in enumerate(entry.chunks):
            both = part.box.intersect(Box(tuple(chunk.offsets), tuple(chunk.sizes)))
            if both is None:
                continue
            hint = position if self._step.has_hints else None
            items.append(
                ReadItem(
                    LoadItemType.TENSOR,
                    own,
                    _from(part.box.offsets, both.offsets),
                    MetadataIndex(fqn, chunk.offsets, hint),
                    _from(chunk.offsets, both.offsets),
                    torch.Size(both.sizes),
                )
            )
            self._num_read[n] += both.numel
        self._num_items[n] = len(items)
        return items

    def _place(self, item: ReadItem) -> int:
        return hash((tuple(item.dest_offsets), tuple(item.lengths)))

    def _note(self, item: ReadItem, call: str) -> int:
        if _key(item) not in self._may_ask:
            self.strays.append(f"{call}({_say(item.dest_index)}) on rank {self._watch.rank}")
        assert item.dest_index.index is not None
        return item.dest_index.index


def _from(base: Sequence[int], offsets: Sequence[int]) -> torch.Size:
    return torch.Size([offset - start for start, offset in zip(base, offsets, strict=True)])


def _key(item: ReadItem) -> tuple[Any, ...]:
    return (item.dest_index.fqn, item.dest_index.index, tuple(item.dest_offsets), tuple(item.lengths))


def _say(index: MetadataIndex) -> str:
    return f"{index.fqn!r} at {None if index.offset is None else tuple(index.offset)}"
