import os
import pickle
import pickletools
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.tensor import Shard
from virtual_ranks import check, save_all, shard

import reference
from reference.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataError,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
    check_metadata,
    dump_metadata,
    load_metadata,
)

DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)


def tensor_entry(size, chunks, dtype=torch.float32):
    return TensorStorageMetadata(
        TensorProperties(dtype=dtype),
        torch.Size(size),
        [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks],
    )


def example():
    entries = {"w": tensor_entry((4, 2), [((0, 0), (2, 2)), ((2, 0), (2, 2))]), "o": BytesStorageMetadata()}
    stored = {
        MetadataIndex("w", (0, 0), 0): _StorageInfo("__0_0.distcp", 0, 10),
        MetadataIndex("w", (2, 0), 1): _StorageInfo("__1_0.distcp", 0, 10),
        MetadataIndex("o"): _StorageInfo("__0_0.distcp", 10, 3),
    }
    return Metadata(entries, planner_data={"w": ("w",), "o": ("o", 0)}, storage_data=stored, version="1.0.0")


def test_round_trip():
    assert load_metadata(dump_metadata(example())) == example()


def test_torch_reads_what_we_write():
    assert pickle.loads(dump_metadata(example())) == example()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_known(dtype):
    metadata = Metadata({"w": tensor_entry((1,), [((0,), (1,))], dtype)})
    assert load_metadata(pickle.dumps(metadata)) == metadata


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last, torch.preserve_format])
def test_every_memory_format_and_layout_is_known(memory_format):
    entry = tensor_entry((1,), [((0,), (1,))])
    entry.properties.memory_format = memory_format
    entry.properties.layout = torch.sparse_coo
    assert load_metadata(pickle.dumps(Metadata({"w": entry}))) == Metadata({"w": entry})


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(protocol):
    assert load_metadata(pickle.dumps(example(), protocol=protocol)) == example()


def test_we_read_what_torch_writes(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"a": torch.ones(2), "b": {"c": 1}}, checkpoint_id=tmp_path)
    raw = (tmp_path / ".metadata").read_bytes()
    ours, theirs = load_metadata(raw), pickle.loads(raw)
    assert ours == theirs
    assert os.fspath(ours.storage_meta.checkpoint_id) == str(tmp_path)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
@pytest.mark.parametrize("name", ["PosixPath", "PurePosixPath", "WindowsPath"])
def test_paths_of_other_pythons_and_systems_are_read(module, name):
    raw = pickle.dumps(Metadata({}, storage_meta=reference.StorageMeta(checkpoint_id="/x/y")), protocol=2)
    path = f"c{module}\n{name}\n(X\x01\x00\x00\x00/X\x01\x00\x00\x00xtR".encode()
    text = b"X\x04\x00\x00\x00/x/y"
    assert text in raw
    loaded = load_metadata(raw.replace(text, path))
    assert loaded.storage_meta.checkpoint_id.parts[-1] == "x"


def test_equal_metadata_gives_equal_bytes(tmp_path):
    scattered = pickle.loads(pickle.dumps(example()))
    shared = example()
    same = torch.Size((2, 2))
    for chunk in shared.state_dict_metadata["w"].chunks:
        chunk.sizes = same
    assert dump_metadata(scattered) == dump_metadata(shared) == dump_metadata(example())


def test_the_same_save_gives_the_same_bytes(tmp_path):
    whole = torch.arange(12.0).reshape(6, 2)
    raws = []
    for _ in range(2):
        states = [{"w": shard(whole, rank, range(3), [Shard(0)]), "x": {"y": 1}} for rank in range(3)]
        writers = [reference.FileSystemWriter(tmp_path, sync_files=False) for _ in range(3)]
        for writer in writers:
            writer.save_id = "fixed"
        check(save_all(states, tmp_path, writers=writers.__getitem__))
        raws.append({p.name: p.read_bytes() for p in tmp_path.iterdir()})
        for path in tmp_path.iterdir():
            path.unlink()
    assert raws[0] == raws[1]


class Evil:
    def __init__(self, function, args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["state_dict_metadata", "planner_data", "storage_data", "storage_meta", "version"])
def test_a_hostile_pickle_runs_nothing(tmp_path, place):
    metadata = example()
    marker = tmp_path / "ran"
    setattr(metadata, place, Evil(os.mkdir, (str(marker),)))
    with pytest.raises(MetadataError, match=r"posix\.mkdir"):
        load_metadata(pickle.dumps(metadata))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "builtins getattr", "torch load", "os system", "torch.serialization load", "torch hub"],
)
def test_other_globals_are_refused_by_name(name):
    module, attribute = name.split()
    raw = pickle.PROTO + b"\x02" + f"c{module}\n{attribute}\n.".encode()
    with pytest.raises(MetadataError, match=rf"global='{module}\.{attribute}'.*trusted_classes"):
        load_metadata(raw)


@pytest.mark.parametrize("name", ["ChunkStorageMetadata", "TensorStorageMetadata", "Metadata", "_MEM_FORMAT_ENCODING"])
def test_a_pickle_cannot_change_the_classes_it_names(name):
    raw = pickle.PROTO + b"\x02" + f"ctorch.distributed.checkpoint.metadata\n{name}\n".encode()
    raw += b"(NX\x08\x00\x00\x00__init__K\x01s"  # state (None, {"__init__": 1}) sets attributes on the class
    raw = raw.replace(b"(N", b"N}") + b"\x86b."
    before = dict(vars(getattr(dcp.metadata, name)))
    with pytest.raises(MetadataError):
        load_metadata(raw)
    assert dict(vars(getattr(dcp.metadata, name))) == before
    assert list(pickletools.genops(raw))


@pytest.mark.parametrize("cut", [0, 1, 50, -1])
def test_a_torn_file_is_refused(cut):
    raw = dump_metadata(example())
    with pytest.raises(MetadataError, match="metadata pickle"):
        load_metadata(raw[:cut])


@pytest.mark.parametrize("value", [1, {}, None, example().storage_data])
def test_a_pickle_of_something_else_is_refused(value):
    with pytest.raises(MetadataError):
        load_metadata(pickle.dumps(value))


def test_wrong_types_inside_are_refused():
    metadata = example()
    metadata.state_dict_metadata["w"].chunks[0].offsets = "00"
    with pytest.raises(MetadataError, match="a size"):
        load_metadata(pickle.dumps(metadata))


class OwnData:
    def __eq__(self, other):
        return isinstance(other, OwnData)

    def __hash__(self):
        return 0

    def __repr__(self):
        return "OwnData()"


@pytest.mark.parametrize(
    "data", [OwnData(), [OwnData()], OrderedDict(a=(OwnData(),)), {OwnData()}, frozenset([OwnData()])], ids=repr
)
def test_what_could_not_be_loaded_is_refused_on_saving_unless_trusted(data):
    metadata = Metadata({}, planner_data=data)
    with pytest.raises(MetadataError, match="OwnData"):
        dump_metadata(metadata)
    raw = dump_metadata(metadata, trusted_classes=[OwnData])
    assert load_metadata(raw, trusted_classes=[OwnData]).planner_data == data


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (tensor_entry((4,), [((0,), (2,))]), r"'w' of shape \(4,\): no chunk holds the element at \(2,\)"),
        (tensor_entry((4,), [((0,), (3,)), ((2,), (2,))]), r"2 chunks hold the element at \(2,\): offsets=\(0,\)"),
        (tensor_entry((4,), [((0,), (5,))]), r"out of bounds: offsets=\(0,\) sizes=\(5,\)"),
        (tensor_entry((), []), r"no chunk holds the element at \(\)"),
        (tensor_entry((), [((), ()), ((), ())]), r"2 chunks hold the element at \(\)"),
        # Volumes add up, and yet one row is there twice and another is missing.
        (tensor_entry((2, 2), [((0, 0), (1, 2)), ((0, 0), (1, 2))]), r"2 chunks hold the element at \(0, 0\)"),
    ],
)
def test_chunks_that_do_not_tile_are_refused_with_evidence(entry, message):
    with pytest.raises(MetadataError, match=message):
        check_metadata(Metadata({"w": entry}))


def test_gaps_pass_where_a_rank_saves_its_own_part_and_overlaps_do_not():
    check_metadata(Metadata({"w": tensor_entry((4,), [((0,), (2,))])}), must_cover=False)
    with pytest.raises(MetadataError):
        check_metadata(Metadata({"w": tensor_entry((4,), [((0,), (3,)), ((2,), (2,))])}), must_cover=False)


def test_missing_storage_is_refused():
    metadata = example()
    del metadata.storage_data[MetadataIndex("w", (2, 0))]
    with pytest.raises(MetadataError, match=r"'w' has no storage data for the chunk at offset \(2, 0\)"):
        check_metadata(metadata, needs_storage=True)


def test_many_faults_are_counted():
    metadata = Metadata({f"w{i}": tensor_entry((4,), []) for i in range(9)})
    with pytest.raises(MetadataError, match=r"'w4'.*and 4 more"):
        check_metadata(metadata)
