"""What ranks send each other arrives as it was, and small."""

import dataclasses
import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
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
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult

from reference.wire import WriteResults, dumps


def tensor_item(fqn, offset, sizes, dtype=torch.float32, **fields):
    data = TensorWriteData(
        ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)),
        TensorProperties(dtype=dtype, requires_grad=True),
        torch.Size([n + 7 for n in sizes]),
    )
    return WriteItem(MetadataIndex(fqn, offset, 3), WriteItemType.SHARD, tensor_data=data, **fields)


class OwnIndex(MetadataIndex):
    pass


class OwnProperties(TensorProperties):
    pass


def save_plan(*items, **fields):
    plain = [
        tensor_item("w", (2, 0), (2, 5)),
        tensor_item("w", (4, 0), (2, 5), torch.bfloat16),
        tensor_item("scalar", (), ()),
        WriteItem(MetadataIndex("step"), WriteItemType.BYTE_IO),
    ]
    return SavePlan([*plain, *items], _StoragePrefix("__0_"), {"w": ("w", 0)}, **fields)


def read_item(fqn, **fields):
    size = torch.Size((2, 3))
    item = ReadItem(
        LoadItemType.TENSOR, MetadataIndex(fqn, (0, 1), 0), size, MetadataIndex("other", (4, 4), 9), size, size
    )
    return dataclasses.replace(item, **fields)


def metadata(**fields):
    chunks = [ChunkStorageMetadata(torch.Size((2 * i, 0)), torch.Size((2, 5))) for i in range(3)]
    entries = {
        "w": TensorStorageMetadata(TensorProperties(torch.float64), torch.Size((6, 5)), chunks),
        "v": TensorStorageMetadata(
            TensorProperties(torch.float64), torch.Size(()), [ChunkStorageMetadata(torch.Size(()), torch.Size(()))]
        ),
        "o": BytesStorageMetadata(),
    }
    stored = {
        MetadataIndex("w", (2, 0), 1): _StorageInfo("f", 1, 2),
        MetadataIndex("o"): _StorageInfo("f", 3, 4, ["x/1"]),
    }
    made = Metadata(entries, {"w": ("w",)}, stored, StorageMeta("x", "y", "z", ["m"]), "1.0.0")
    return dataclasses.replace(made, **fields)


MESSAGES = {
    "save plan": save_plan(),
    "save plan, flagged": save_plan(usable=False),
    "save plan with sizes of objects": save_plan(
        WriteItem(MetadataIndex("b"), WriteItemType.BYTE_IO, BytesIOWriteData(5))
    ),
    "save plan with an index of another class": save_plan(WriteItem(OwnIndex("b"), WriteItemType.BYTE_IO)),
    "empty save plan": SavePlan([]),
    "load plan": LoadPlan([read_item("a"), read_item("b", type=LoadItemType.BYTE_IO)], "storage", {"any": "thing"}),
    "load plan with tuples": LoadPlan([read_item("a", lengths=(2, 3))]),
    "metadata": metadata(),
    "metadata without storage": metadata(storage_data=None),
    "metadata with other storage": metadata(storage_data={"any": "thing"}),
    "results": WriteResults([WriteResult(MetadataIndex("w", (2, 0), 1), 7, _StorageInfo("f", 1, 2))]),
    "results of another storage": WriteResults([WriteResult(MetadataIndex("w"), 7, "elsewhere")]),
    "other": {"list": [1, 2.5, None], "error": ("text", b"bytes")},
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_arrive_as_they_were(name):
    sent = MESSAGES[name]
    arrived = pickle.loads(dumps(sent))
    assert arrived == sent
    assert type(arrived) is type(sent) or name == "results of another storage"
    assert repr(arrived) == repr(sent)  # repr also shows index hints, which == ignores


def test_properties_of_ones_own_arrive():
    item = tensor_item("w", (0,), (1,))
    own = dataclasses.replace(item.tensor_data, properties=OwnProperties(torch.int8))
    (arrived,) = pickle.loads(dumps(SavePlan([dataclasses.replace(item, tensor_data=own)]))).items
    assert type(arrived.tensor_data.properties) is OwnProperties


def test_what_arrives_can_be_changed_one_by_one():
    first, second = pickle.loads(dumps(SavePlan([tensor_item("a", (0,), (1,)), tensor_item("b", (0,), (1,))]))).items
    first.tensor_data.properties.dtype = torch.float16
    assert second.tensor_data.properties.dtype == torch.float32
    one, other = (pickle.loads(dumps(metadata())).state_dict_metadata[name] for name in "wv")
    assert one.properties is not other.properties


def test_many_items_are_small():
    plan = SavePlan([tensor_item(f"layers.{i}.weight", (i, 0), (1, 4096)) for i in range(1000)])
    assert len(dumps(plan)) < 80 * len(plan.items) < 0.6 * len(pickle.dumps(plan))
