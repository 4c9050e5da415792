"""How items go to a file and come back: in blocks, in parts, with short reads and writes, with and without CRCs."""

import os
import re

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard
from virtual_ranks import as_dtensor, blank, blank_like, noise, raw_bytes, shard

import reference
from reference import CheckpointException, FileSystemReader, FileSystemWriter, item_parts, read_items, write_items

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(path, state, **options):
    return reference.save(state, storage_writer=FileSystemWriter(path, sync_files=False, **options))


def load(path, state, **options):
    reference.load(state, storage_reader=FileSystemReader(path, **options), no_dist=True)
    return state


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Everything that is done block by block is done in many of them."""
    for module in (read_items, write_items, item_parts):
        for name in ("_BLOCK_BYTES", "_STAGED_BYTES", "_MIN_STAGED_BYTES", "_GATHERED_BYTES"):
            monkeypatch.setattr(module, name, 100, raising=False)


@pytest.fixture(params=[0, 50, 1 << 40], ids=["runs", "some gaps", "gaps"])
def min_gap(request, monkeypatch):
    monkeypatch.setattr(item_parts, "_MIN_GAP_BYTES", request.param)


FORMS = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].clone().expand(t.size()),
    "conjugated": lambda t: t.to(torch.complex64).conj(),
    "negated": lambda t: t.to(torch.complex64).conj().imag,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(), (1,), (300,), (7, 3, 40), (40, 7, 1)], ids=str)
def test_tensors_of_any_form_are_written_in_blocks(tmp_path, tiny_blocks, form, size):
    if (not size and form in {"strided", "expanded"}) or (len(size) < 2 and form == "transposed"):
        return
    value = FORMS[form](torch.arange(float(torch.Size(size).numel())).reshape(size))
    expected = raw_bytes(blank(value.size(), value.dtype).copy_(value))
    save(tmp_path, {"w": value}, per_thread_copy_ahead=0)
    loaded = load(tmp_path, {"w": blank(value.size(), value.dtype)})
    assert raw_bytes(loaded["w"]) == expected
    theirs = {"w": blank(value.size(), value.dtype)}
    dcp.load(theirs, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert raw_bytes(theirs["w"]) == expected


DESTINATIONS = {
    "itself": lambda size: torch.zeros(size, dtype=torch.int32),
    "other dtype": lambda size: torch.zeros(size, dtype=torch.int64),
    "transposed": lambda size: torch.zeros(size[::-1], dtype=torch.int32).permute(*range(len(size))[::-1]),
    "strided": lambda size: torch.zeros(*size, 2, dtype=torch.int32)[..., 1],
}


@pytest.mark.filterwarnings("ignore:.*values are converted")
@pytest.mark.parametrize("check_crc", ["always", "whole", "never"])
@pytest.mark.parametrize("kind", DESTINATIONS)
@pytest.mark.parametrize("size", [(300,), (9, 6, 7), (4, 200)], ids=str)
def test_parts_fill_destinations_of_any_form(tmp_path, tiny_blocks, min_gap, check_crc, kind, size):
    whole = noise(size, torch.int32)
    save(tmp_path, {"w": whole})
    for placements in ([Replicate()], *([Shard(dim)] for dim in range(len(size)))):
        for rank in range(3):
            expected = shard(whole, rank, range(3), placements)
            local = expected.to_local()
            into = DESTINATIONS[kind](tuple(local.size()))
            state = {"w": as_dtensor(into, whole, expected.device_mesh, placements)}
            load(tmp_path, state, check_crc=check_crc)
            assert torch.equal(into, local.to(into.dtype))


def read_calls(monkeypatch):
    """Notes (place, bytes) of every read of a data file."""
    calls = []
    original = os.preadv

    def noted(handle, buffers, at):
        count = original(handle, buffers, at)
        calls.append((at, count))
        return count

    monkeypatch.setattr(os, "preadv", noted)
    return calls


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_costs_no_more_than_its_bytes(tmp_path, monkeypatch, dim):
    whole = noise((64, 16384), torch.int32)
    save(tmp_path, {"w": whole})
    part = shard(whole, 1, range(4), [Shard(dim)])
    calls = read_calls(monkeypatch)
    loaded = load(tmp_path, {"w": blank_like(part)})
    assert raw_bytes(loaded["w"]) == raw_bytes(part)
    assert whole.nbytes / 4 <= sum(count for _, count in calls) < 1.01 * whole.nbytes / 4


def test_short_runs_are_read_together(tmp_path, monkeypatch):
    whole = noise((1000, 16), torch.int32)
    save(tmp_path, {"w": whole})
    part = shard(whole, 1, range(4), [Shard(1)])
    calls = read_calls(monkeypatch)
    load(tmp_path, {"w": blank_like(part)})
    assert len(calls) == 2


def test_large_tensors_are_read_in_blocks(tmp_path, monkeypatch):
    whole = noise((1024, 1024), torch.int32)
    save(tmp_path, {"w": whole})
    calls = read_calls(monkeypatch)
    loaded = load(tmp_path, {"w": blank((1024, 1024), torch.int32)})
    assert raw_bytes(loaded["w"]) == raw_bytes(whole)
    assert max(count for _, count in calls) <= read_items._BLOCK_BYTES


def test_short_reads_and_writes_are_completed(tmp_path, monkeypatch):
    state = {"w": noise((300, 300), torch.int32), "v": noise((3,), torch.int8), "step": 7}
    full = {"preadv": os.preadv, "writev": os.writev, "write": os.write}

    def cut(buffers, most):
        return [memoryview(buffer)[:most] for buffer in buffers if len(buffer)][:1]

    def writev(handle, buffers):
        return full["writev"](handle, cut(buffers, 999)) if any(map(len, buffers)) else 0

    monkeypatch.setattr(os, "preadv", lambda handle, buffers, at: full["preadv"](handle, cut(buffers, 1001), at))
    monkeypatch.setattr(os, "writev", writev)
    monkeypatch.setattr(os, "write", lambda handle, buffer: full["write"](handle, memoryview(buffer)[:1003]))
    save(tmp_path, state)
    loaded = load(tmp_path, blank_like(state))
    assert loaded["step"] == 7
    assert [raw_bytes(loaded[name]) for name in "wv"] == [raw_bytes(state[name]) for name in "wv"]


def test_a_file_that_ends_within_an_item_says_so(tmp_path, monkeypatch):
    save(tmp_path, {"w": noise((300,), torch.int32)})
    monkeypatch.setattr(FileSystemReader, "prepare_local_plan", lambda self, plan: plan)
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointException, match=r"'__0_0\.distcp' ends at byte 1000: it is cut short"):
        load(tmp_path, {"w": blank((300,), torch.int32)})


def damage(path, metadata, at_element):
    (info,) = metadata.storage_data.values()
    raw = bytearray((path / info.relative_path).read_bytes())
    payload = re.search(rb"archive/data/0FB..Z*", bytes(raw[info.offset :]), re.DOTALL).end()
    raw[info.offset + payload + 4 * at_element] ^= 1
    (path / info.relative_path).write_bytes(raw)


@pytest.mark.parametrize(
    ("check_crc", "num_ranks", "is_found"),
    [
        ("whole", 1, True),
        ("always", 1, True),
        ("never", 1, False),
        ("whole", 4, False),
        ("always", 4, True),
        ("never", 4, False),
    ],
)
def test_what_is_read_whole_is_checked(tmp_path, check_crc, num_ranks, is_found):
    whole = noise((400,), torch.int32)
    damage(tmp_path, save(tmp_path, {"w": whole}), at_element=5)
    state = {"w": blank_like(shard(whole, 0, range(num_ranks), [Shard(0)]))}
    if is_found:
        with pytest.raises(CheckpointException, match=r"'w'.*damaged"):
            load(tmp_path, state, check_crc=check_crc)
    else:
        load(tmp_path, state, check_crc=check_crc)


def test_what_is_read_nearly_whole_is_checked_too(tmp_path):
    whole = noise((400,), torch.int32)
    damage(tmp_path, save(tmp_path, {"w": whole}), at_element=399)
    mesh = shard(whole, 0, range(1), [Shard(0)]).device_mesh

    class Most:
        """Asks for the first 380 of 400 elements."""

        def __new__(cls):
            made = torch.zeros(400, dtype=torch.int32).as_subclass(type("Held", (torch.Tensor,), dict(cls.__dict__)))
            made.part = torch.zeros(380, dtype=torch.int32)
            return made

        def __create_chunk_list__(self):
            return [reference.metadata.ChunkStorageMetadata(torch.Size((0,)), torch.Size((380,)))]

        def __get_tensor_shard__(self, index):
            return self.part

    assert mesh.size() == 1
    with pytest.raises(CheckpointException, match=r"'w'.*damaged"):
        load(tmp_path, {"w": Most()})


def test_checkpoints_that_torch_wrote_without_crcs_are_read(tmp_path):
    state = {"w": noise((50, 3), torch.float32), "t": torch.arange(6.0).reshape(2, 3).t()}
    torch.serialization.set_crc32_options(False)
    try:
        dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, sync_files=False), no_dist=True)
    finally:
        torch.serialization.set_crc32_options(True)
    loaded = load(tmp_path, {"w": torch.zeros(50, 3), "t": torch.zeros(3, 2)})
    assert raw_bytes(loaded["w"]) == raw_bytes(state["w"])
    assert torch.equal(loaded["t"], state["t"])


def test_checksums_are_those_of_zips():
    import zlib

    from reference.checksums import crc32

    raw = bytes(range(256)) * 100
    assert crc32(raw) == zlib.crc32(raw)
    assert crc32(raw[700:], crc32(raw[:700])) == zlib.crc32(raw)
    assert crc32(memoryview(bytearray(raw))) == zlib.crc32(raw)
    assert crc32(b"") == 0
