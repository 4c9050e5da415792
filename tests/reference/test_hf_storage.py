"""Safetensors folders saved and loaded by one process, by the reference, torch and the safetensors package."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from virtual_ranks import blank_like, noise, raw_bytes

import reference
from reference import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter, safetensors_write
from reference.hf_index import INDEX
from reference.safetensors_dtypes import NUM_BITS, torch_dtype

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

ONE_FILE = "model-00001-of-00001.safetensors"
DTYPES = sorted((dtype for name in NUM_BITS if (dtype := torch_dtype(name)) is not None), key=str)
# torch's reader looks names up in a table that lacks these two
TORCH_READS = [d for d in DTYPES if d not in {torch.float8_e8m0fnu, torch.float4_e2m1fn_x2}]


def save(state, path, with_="reference", **options):
    if with_ == "torch":
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(path), **options), no_dist=True)
    else:
        reference.save(state, storage_writer=HuggingFaceStorageWriter(path, **options))


def load(state, path, with_="reference", **options):
    if with_ == "torch":
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path), **options), no_dist=True)
    else:
        reference.load(state, storage_reader=HuggingFaceStorageReader(path, **options))


def flat(state, prefix=""):
    for key, value in state.items():
        yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def contents(state):
    return {fqn: (t.dtype, tuple(t.size()), raw_bytes(t)) for fqn, t in flat(state)}


def assert_holds(path, expected, with_="reference", **options):
    loaded = blank_like(expected)
    load(loaded, path, with_, **options)
    assert contents(loaded) == contents(expected)


def every_dtype(dtypes=DTYPES):
    return {str(dtype): noise((3, 4), dtype, seed) for seed, dtype in enumerate(dtypes)}


def shapes():
    return {
        "scalar": noise((), torch.float32, 1),
        "empty": torch.empty(0, dtype=torch.int16),
        "empty rows": torch.empty(0, 3, dtype=torch.bfloat16),
        "empty columns": torch.empty(3, 0, 2),
        "column": noise((5, 1), torch.int8, 2),
        "deep": noise((2, 1, 3, 1, 2), torch.float16, 3),
        "layers": {"0": {"wéight": noise((7,), torch.uint16, 4), 'q"\\\n': noise((2, 2), torch.float64, 5)}},
    }


def mapped(num_files):
    state = {f"t{i}": noise((i + 1, 2), torch.float32, i) for i in range(7)}
    return state, {fqn: 1 + i % num_files for i, fqn in enumerate(state)}


@pytest.mark.parametrize("load_with", ["reference", "torch"])
@pytest.mark.parametrize("save_with", ["reference", "torch"])
def test_every_dtype_between_the_reference_and_torch(tmp_path, save_with, load_with):
    state = every_dtype(TORCH_READS)
    save(state, tmp_path, save_with)
    assert_holds(tmp_path, state, load_with)


@pytest.mark.parametrize("load_with", ["reference", "torch"])
@pytest.mark.parametrize("save_with", ["reference", "torch"])
def test_every_shape_between_the_reference_and_torch(tmp_path, save_with, load_with):
    save(shapes(), tmp_path, save_with)
    assert_holds(tmp_path, shapes(), load_with)


@pytest.mark.parametrize("save_with", ["reference", "torch"])
def test_dtypes_that_only_the_reference_reads(tmp_path, save_with):
    state = every_dtype()
    save(state, tmp_path, save_with)
    assert_holds(tmp_path, state)


@pytest.mark.parametrize("state", [every_dtype(), dict(flat(shapes()))], ids=["dtypes", "shapes"])
def test_the_package_and_the_reference_read_each_other(tmp_path, state):
    save(state, tmp_path / "ours")
    assert contents(load_file(tmp_path / "ours" / ONE_FILE)) == contents(state)
    (tmp_path / "theirs").mkdir()
    save_file(state, tmp_path / "theirs" / "model.safetensors")
    assert_holds(tmp_path / "theirs", state)


@pytest.mark.parametrize("save_with", ["reference", "torch"])
def test_the_same_files_as_torch(tmp_path, save_with):
    state, mapping = mapped(3)
    save(state, tmp_path, save_with, fqn_to_index_mapping=mapping, thread_count=2)
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names, INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index == {
        "metadata": {"total_size": sum(t.nbytes for t in state.values())},
        "weight_map": {fqn: names[i - 1] for fqn, i in mapping.items()},
    }
    for i, name in enumerate(names, 1):
        assert contents(load_file(tmp_path / name)) == contents({k: t for k, t in state.items() if mapping[k] == i})


def header_of(path):
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])


def test_headers_say_what_torchs_say(tmp_path):
    state = dict(flat(shapes())) | every_dtype()
    for with_ in ("reference", "torch"):
        save(state, tmp_path / with_, with_)
    ours, theirs = (header_of(tmp_path / with_ / ONE_FILE) for with_ in ("reference", "torch"))
    for header in (ours, theirs):
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    assert ours == theirs


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(
    st.dictionaries(
        st.text("ab.é ", min_size=1, max_size=4).filter(lambda name: ".." not in name and name.strip(".") == name),
        st.tuples(st.sampled_from(TORCH_READS), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([("reference", "torch"), ("torch", "reference"), ("reference", "reference")]),
)
def test_any_state_dict_through_any_files(tmp_path_factory, drawn, num_files, thread_count, pair):
    path = tmp_path_factory.mktemp("hf")
    state = {fqn: noise(size, dtype, seed) for seed, (fqn, (dtype, size)) in enumerate(drawn.items())}
    mapping = {fqn: 1 + i % num_files for i, fqn in enumerate(state)}
    save(state, path, pair[0], fqn_to_index_mapping=mapping, thread_count=thread_count)
    assert_holds(path, state, pair[1], thread_count=thread_count)


def test_views_and_odd_strides_are_written_by_value(tmp_path):
    base = noise((6, 8), torch.float32, 1)
    state = {
        "transposed": base.t(),
        "part": base[1:5, 2:7],
        "expanded": base[:1].expand(4, 8),
        "conj": noise((3,), torch.complex64, 2).conj(),
        "neg": noise((3,), torch.complex64, 3).conj().imag,
        "parameter": torch.nn.Parameter(noise((2,), torch.float32, 4)),
    }
    save(state, tmp_path)
    loaded = load_file(tmp_path / ONE_FILE)
    assert {fqn: raw_bytes(t) for fqn, t in loaded.items()} == {fqn: raw_bytes(t) for fqn, t in state.items()}
    into = {"transposed": torch.zeros(6, 8).t(), "part": torch.zeros(9, 9)[2:6, 1:6]}
    load(into, tmp_path)
    assert all(raw_bytes(into[fqn]) == raw_bytes(state[fqn]) for fqn in into)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.float4_e2m1fn_x2], ids=str)
def test_odd_strides_are_written_through_small_copies(monkeypatch, dtype):
    monkeypatch.setattr(safetensors_write, "_STAGED_BYTES", 32)
    tensor = noise((65, 64), dtype).t()
    blocks = [block.tobytes() for block in safetensors_write._blocks(tensor)]
    assert b"".join(blocks) == raw_bytes(tensor if tensor.itemsize > 1 else tensor.view(torch.uint8))
    assert max(map(len, blocks)) <= 32


def test_what_a_planner_makes_of_a_tensor_is_what_the_file_says(tmp_path):
    class Halving(reference.DefaultSavePlanner):
        def transform_object(self, write_item, object):
            return super().transform_object(write_item, object).to(torch.float16)

    state = {"a": torch.arange(3.0), "b": torch.arange(4)}
    reference.save(state, storage_writer=HuggingFaceStorageWriter(tmp_path), planner=Halving())
    halves = {fqn: t.to(torch.float16) for fqn, t in state.items()}
    assert contents(load_file(tmp_path / ONE_FILE)) == contents(halves)
    assert_holds(tmp_path, halves)


def test_values_are_converted_with_a_warning(tmp_path):
    save({"a": torch.arange(4, dtype=torch.int16)}, tmp_path)
    loaded = {"a": torch.zeros(4)}
    with pytest.warns(UserWarning, match="converted"):
        load(loaded, tmp_path)
    assert loaded["a"].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_async_save_and_reset(tmp_path):
    state = {"a": noise((8,), torch.float32)}
    writer = HuggingFaceStorageWriter(tmp_path / "first")
    reference.async_save(state, checkpoint_id=tmp_path / "second", storage_writer=writer).result()
    assert not (tmp_path / "first").exists()
    loaded = blank_like(state)
    reader = HuggingFaceStorageReader(tmp_path / "first")
    reference.load(loaded, checkpoint_id=tmp_path / "second", storage_reader=reader)
    assert contents(loaded) == contents(state)


def test_an_empty_state_dict(tmp_path):
    save({}, tmp_path)
    assert json.loads((tmp_path / INDEX).read_text()) == {"metadata": {"total_size": 0}, "weight_map": {}}
    load({}, tmp_path)
    with pytest.raises(CheckpointException, match="missing from the checkpoint"):
        load({"a": torch.zeros(1)}, tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "an object, which safetensors cannot hold"),
        (torch.zeros(2, dtype=torch.complex128), "dtype=torch.complex128"),
        (torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)[0], "at least one dim"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, value, text):
    with pytest.raises(CheckpointException, match=text):
        save({"a": torch.zeros(2), "odd": value}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fqn_to_index_mapping": {"a": 0}}, "from 1"),
        ({"fqn_to_index_mapping": {"a": True}}, "from 1"),
        ({"thread_count": 0}, "thread_count=0"),
        ({"thread_count_consolidation": 0}, "thread_count_consolidation=0"),
    ],
)
def test_senseless_options_are_refused(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        HuggingFaceStorageWriter(tmp_path, **options)


@pytest.mark.parametrize("url", ["hf://owner/name", "s3://bucket/key"])
def test_urls_are_refused(tmp_path, url):
    for make in (HuggingFaceStorageWriter, HuggingFaceStorageReader):
        with pytest.raises(ValueError, match="Expected a local path"):
            make(url)
        with pytest.raises(ValueError, match="Expected a local path"):
            make(tmp_path).reset(url)


def test_a_tensor_without_a_file_is_refused(tmp_path):
    with pytest.raises(CheckpointException, match="none for 'b'"):
        save({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path, fqn_to_index_mapping={"a": 1})


def test_ranks_that_save_alone_are_refused(tmp_path):
    with pytest.raises(CheckpointException, match="use_collectives=False"):
        reference.save({}, storage_writer=HuggingFaceStorageWriter(tmp_path), use_collectives=False)
