"""Block-quantized checkpoints: torch's results where torch has any, and plain arithmetic elsewhere."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.distributed.tensor import Shard
from virtual_ranks import blank_like, check, load_all, raw_bytes, shard

import reference
from reference import CheckpointException, QuantizedHuggingFaceStorageReader, quantized_hf_storage
from reference.hf_index import INDEX

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
    pytest.mark.filterwarnings("ignore:.*values are converted"),
]
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
REUSED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)


def write(folder, files, with_index=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        save_file(content, folder / name)
    if with_index:
        weight_map = {fqn: name for name, content in files.items() for fqn in content}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def eight_bit(rows, columns, block, seed=0):
    """A matrix and its scales; every element of a block takes the same scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // block), -(-columns // block), generator=generator) * 3
    return {"l.weight": weight, "l.weight_scale_inv": scale}


def by_hand(content, block):
    weight, scale = content["l.weight"].float(), content["l.weight_scale_inv"].float()
    rows, columns = weight.size()
    value = [[weight[r, c] * scale[r // block, c // block] for c in range(columns)] for r in range(rows)]
    return torch.tensor(value).reshape(rows, columns)


def load(state, folder, with_="reference", **options):
    if with_ == "torch":
        reader = dcp.QuantizedHuggingFaceStorageReader(str(folder), **options)
        dcp.load(state, storage_reader=reader, no_dist=True)
    else:
        reference.load(state, storage_reader=QuantizedHuggingFaceStorageReader(folder, **options))
    return state


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_with_scales_as_torch(tmp_path, dtype, target_dtype):
    write(tmp_path, {"model.safetensors": eight_bit(10, 7, 4) | {"plain": torch.arange(3.0)}})
    found = [
        load(
            {"l.weight": torch.zeros(10, 7, dtype=dtype), "plain": torch.zeros(3)},
            tmp_path, with_, block_size=4, target_dtype=target_dtype, thread_count=2,
        )
        for with_ in ("reference", "torch")
    ]  # fmt: skip
    assert raw_bytes(found[0]["l.weight"]) == raw_bytes(found[1]["l.weight"])
    assert found[0]["plain"].tolist() == [0.0, 1.0, 2.0]
    assert found[0]["l.weight"].any()


@REUSED_FOLDER
@given(st.data())
def test_any_box_of_any_matrix(tmp_path, data):
    rows, columns, block = (data.draw(st.integers(1, most)) for most in (9, 9, 5))
    content = eight_bit(rows, columns, block, data.draw(st.integers(0, 3)))
    write(
        tmp_path,
        {"a.safetensors": {"l.weight": content["l.weight"]}, "b.safetensors": content | {"l.weight": torch.zeros(0)}},
    )
    weight_map = {"l.weight": "a.safetensors", "l.weight_scale_inv": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    num_ranks, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1))
    wanted = [shard(by_hand(content, block), rank, range(num_ranks), [Shard(dim)]) for rank in range(num_ranks)]
    loaded = [{"l.weight": blank_like(part)} for part in wanted]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_hf_storage, "_MAX_ELEMENTS", data.draw(st.integers(1, 20)))
        check(load_all(loaded, "", readers=lambda _: QuantizedHuggingFaceStorageReader(tmp_path, block_size=block)))
    assert [raw_bytes(part["l.weight"]) for part in loaded] == [raw_bytes(part) for part in wanted]


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.bfloat16, torch.float64])
def test_scales_of_other_dtypes(tmp_path, dtype):
    content = eight_bit(5, 6, 2)
    content["l.weight_scale_inv"] = content["l.weight_scale_inv"].to(dtype)
    write(tmp_path, {"model.safetensors": content}, with_index=False)
    loaded = load({"l.weight": torch.zeros(5, 6)}, tmp_path, block_size=2)
    assert raw_bytes(loaded["l.weight"]) == raw_bytes(by_hand(content, 2))


def four_bit(*prefix, groups=3, num_bytes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*prefix, groups, num_bytes), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 140, (*prefix, groups), dtype=torch.uint8, generator=generator)
    return {"m_blocks": blocks, "m_scales": scales}


def unpacked_by_hand(content):
    blocks, scales = content["m_blocks"], content["m_scales"]
    *prefix, groups, num_bytes = blocks.size()
    value = [
        (-1 if half & 8 else 1) * FP4[half & 7] * 2.0 ** (exponent - 127)
        for group, exponent in zip(blocks.reshape(-1, num_bytes).tolist(), scales.flatten().tolist(), strict=True)
        for byte in group
        for half in (byte & 15, byte >> 4)
    ]
    return torch.tensor(value).reshape(*prefix, groups * num_bytes * 2)


@pytest.mark.parametrize("prefix", [(2, 3), (5,), (), (2, 1, 2), (0, 2)])
def test_four_bit_floats(tmp_path, prefix):
    content = four_bit(*prefix)
    write(tmp_path, {"model.safetensors": content})
    expected = unpacked_by_hand(content)
    loaded = load({"m_blocks": torch.ones(expected.size())}, tmp_path)
    assert raw_bytes(loaded["m_blocks"]) == raw_bytes(expected)


@REUSED_FOLDER
@given(st.data())
def test_any_box_of_four_bit_floats(tmp_path, data):
    content = four_bit(
        *data.draw(st.lists(st.integers(1, 3), max_size=2)), groups=data.draw(st.integers(1, 4)), num_bytes=2
    )
    write(tmp_path, {"model.safetensors": content})
    whole = unpacked_by_hand(content)
    num_ranks, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(0, whole.dim() - 1))
    wanted = [shard(whole, rank, range(num_ranks), [Shard(dim)]) for rank in range(num_ranks)]
    loaded = [{"m_blocks": blank_like(part)} for part in wanted]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_hf_storage, "_MAX_ELEMENTS", data.draw(st.integers(1, 20)))
        check(load_all(loaded, "", readers=lambda _: QuantizedHuggingFaceStorageReader(tmp_path)))
    assert [raw_bytes(part["m_blocks"]) for part in loaded] == [raw_bytes(part) for part in wanted]


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_bit_floats_are_torchs_numbers(tmp_path, target_dtype):
    """Torch's planner only asks for the first few columns, so what it computes is taken from the method itself."""
    content = four_bit(2, 3, seed=1)
    content["m_scales"][0, 0] = torch.tensor([0, 254, 255], dtype=torch.uint8)
    write(tmp_path, {"model.safetensors": content})
    whole = torch.Size((2, 3, 24))
    torchs = dcp.QuantizedHuggingFaceStorageReader(str(tmp_path), target_dtype=target_dtype)
    origin = torch.Size((0, 0, 0))
    index = reference.MetadataIndex("m_blocks", origin)
    item = reference.ReadItem(reference.LoadItemType.TENSOR, index, origin, index, origin, whole)
    expected = torchs._dequantize_tensor_mxfp4(content["m_blocks"], content["m_scales"], item, 0, 0)
    loaded = load({"m_blocks": torch.ones(whole, dtype=target_dtype)}, tmp_path, target_dtype=target_dtype)
    assert raw_bytes(loaded["m_blocks"]) == raw_bytes(expected)


def test_the_metadata_says_what_is_loaded(tmp_path):
    names = {"block_scales": torch.zeros(2), "odd_blocks": torch.zeros(2, 2)}
    write(tmp_path, {"model.safetensors": eight_bit(6, 4, 2) | four_bit(2) | names})
    reader = QuantizedHuggingFaceStorageReader(tmp_path, block_size=2, target_dtype=torch.bfloat16)
    entries = reader.read_metadata().state_dict_metadata
    assert {fqn: (entry.properties.dtype, tuple(entry.size)) for fqn, entry in entries.items()} == {
        "l.weight": (torch.bfloat16, (6, 4)),
        "l.weight_scale_inv": (torch.float32, (3, 2)),
        "m_blocks": (torch.bfloat16, (2, 24)),
        "m_scales": (torch.uint8, (2, 3)),
        "block_scales": (torch.float32, (2,)),
        "odd_blocks": (torch.float32, (2, 2)),
    }


def test_scales_can_be_loaded_by_name_and_only_the_part_that_is_needed_is_read(tmp_path, monkeypatch):
    content = eight_bit(8, 4, 2)
    write(tmp_path, {"model.safetensors": content})
    loaded = load({"l.weight_scale_inv": torch.zeros(4, 2)}, tmp_path, block_size=2)
    assert raw_bytes(loaded["l.weight_scale_inv"]) == raw_bytes(content["l.weight_scale_inv"])
    boxes = []
    original = quantized_hf_storage._read

    def noted(file, place, offsets, lengths):
        boxes.append((tuple(offsets), tuple(lengths)))
        return original(file, place, offsets, lengths)

    monkeypatch.setattr(quantized_hf_storage, "_read", noted)
    state = {"l.weight": shard(torch.zeros(8, 4), 1, range(2), [Shard(0)])}
    check(load_all([state], "", readers=lambda _: QuantizedHuggingFaceStorageReader(tmp_path, block_size=2)))
    assert boxes == [((4, 0), (4, 4)), ((2, 0), (2, 2))]


BAD = {
    "scales that do not fit": (eight_bit(8, 4, 2), 3, "Expected scales of shape (3, 2)"),
    "no matrix": ({"l.weight": torch.zeros(2, 2, 2), "l.weight_scale_inv": torch.zeros(1, 1)}, 2, "Expected a matrix"),
    "no bytes": (
        {"l_blocks": torch.zeros(2, 2), "l_scales": torch.zeros(2, dtype=torch.uint8)}, 2, "Expected uint8 groups"
    ),
    "scales for other groups": (
        {"l_blocks": torch.zeros(2, 2, dtype=torch.uint8), "l_scales": torch.zeros(3, dtype=torch.uint8)}, 2,
        "Expected scales of shape (2,)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "block", "text"), BAD.values(), ids=BAD)
def test_what_cannot_be_dequantized_is_refused_when_it_is_asked_for(tmp_path, content, block, text):
    write(tmp_path, {"model.safetensors": content | {"fine": torch.ones(2)}})
    reader = QuantizedHuggingFaceStorageReader(tmp_path, block_size=block)
    fine = {"fine": torch.zeros(2)}
    reference.load(fine, storage_reader=reader)
    assert fine["fine"].tolist() == [1.0, 1.0]
    fqn = next(iter(content))
    state = {"fine": torch.zeros(2), fqn: torch.zeros(content[fqn].size())}
    with pytest.raises(CheckpointException) as caught:
        reference.load(state, storage_reader=reader)
    assert text in str(caught.value)
    assert state["fine"].tolist() == [0.0, 0.0]


def test_parts_in_several_files_are_refused(tmp_path):
    content = eight_bit(4, 2, 2)
    for n, rows in enumerate((slice(0, 2), slice(2, 4))):
        part = {"l.weight": content["l.weight"][rows].clone()}
        info = {"l.weight": {"saved_offsets": [2 * n, 0]}}
        save_file(part, tmp_path / f"{n}.safetensors", {"DCP_SHARDING_INFO": json.dumps(info)})
    save_file({"l.weight_scale_inv": content["l.weight_scale_inv"]}, tmp_path / "s.safetensors")
    with pytest.raises(CheckpointException, match="Consolidate them first"):
        load({"l.weight": torch.zeros(4, 2)}, tmp_path, block_size=2)


def test_a_senseless_block_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="block_size=0"):
        QuantizedHuggingFaceStorageReader(tmp_path, block_size=0)
