"""The safetensors header, against the safetensors package: the same bytes out, the same files in, or stricter."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors import torch as theirs
from virtual_ranks import noise, raw_bytes

from reference.items import memory_of
from reference.safetensors_dtypes import NUM_BITS, num_bytes_of, stored_as, torch_dtype, torch_size
from reference.safetensors_header import MAX_HEADER_BYTES, encode_header, parse_header, read_header
from reference.strict_json import SafetensorsError

DTYPES = sorted((dtype for name in NUM_BITS if (dtype := torch_dtype(name)) is not None), key=str)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__")
STATES = st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=6)
# tmp_path is only a place for one file, which each example replaces
REUSED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def file_bytes(tensors, metadata):
    head, entries = encode_header({name: stored_as(t.dtype, t.size()) for name, t in tensors.items()}, metadata)
    return head + b"".join(memory_of(tensors[name]).tobytes() for name in entries)


def make(state):
    # A scalar of two 4-bit floats has no shape in a file.
    return {
        name: noise(shape or ((1,) if dtype == torch.float4_e2m1fn_x2 else ()), dtype, seed)
        for seed, (name, (dtype, shape)) in enumerate(state.items())
    }


@given(STATES, st.text("abc", max_size=3))
def test_the_same_bytes_as_the_package(state, text):
    tensors = make(state)
    for metadata in ({}, {"format": text}):
        assert file_bytes(tensors, metadata) == theirs.save(tensors, metadata=metadata or None)


@given(STATES, st.dictionaries(st.text("ab", max_size=2), st.text(max_size=4), max_size=3))
def test_what_is_encoded_is_parsed(state, metadata):
    tensors = make(state)
    raw = file_bytes(tensors, metadata)
    num_header_bytes = int.from_bytes(raw[:8], "little")
    header = parse_header(raw[8 : 8 + num_header_bytes], len(raw), "x")
    assert header.metadata == metadata
    assert header.tensors.keys() == tensors.keys()
    for name, entry in header.tensors.items():
        assert torch_dtype(entry.dtype) == tensors[name].dtype
        assert torch_size(entry.dtype, entry.shape) == tensors[name].size()
        assert raw[header.data_at + entry.begin : header.data_at + entry.end] == raw_bytes(tensors[name])


@REUSED_FOLDER
@given(STATES)
def test_the_package_opens_what_is_written(tmp_path, state):
    tensors = make(state)
    (tmp_path / "x.safetensors").write_bytes(file_bytes(tensors, {"format": "pt"}))
    loaded = theirs.load_file(tmp_path / "x.safetensors")
    assert {name: (t.dtype, t.size(), raw_bytes(t)) for name, t in loaded.items()} == {
        name: (t.dtype, t.size(), raw_bytes(t)) for name, t in tensors.items()
    }


def test_dtypes_have_the_names_that_the_package_writes():
    assert set(DTYPES) == set(theirs._SIZE)
    for dtype in DTYPES:
        raw = theirs.save({"a": noise((2,), dtype)})
        assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["a"]["dtype"] == stored_as(dtype, (2,))[0]


def test_every_name_of_the_format_has_a_size_and_only_six_bits_have_no_torch_dtype():
    assert {name for name in NUM_BITS if torch_dtype(name) is None} == {"F6_E2M3", "F6_E3M2"}
    for name, num_bits in NUM_BITS.items():
        dtype = torch_dtype(name)
        if dtype is not None:
            assert num_bits == 8 * dtype.itemsize // (2 if name == "F4" else 1)
    assert num_bytes_of("F6_E2M3", (4, 2), "x") == 6


@REUSED_FOLDER
@given(st.data())
def test_damaged_headers_are_refused_or_mean_what_the_package_says(tmp_path, data):
    """Whatever passes here passes there and says the same; and nothing but a SafetensorsError is ever raised."""
    state = data.draw(
        st.dictionaries(st.text("ab", min_size=1, max_size=2), st.tuples(st.sampled_from(DTYPES), SHAPES))
    )
    raw = bytearray(file_bytes(make(state), {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        end = data.draw(st.integers(at, min(len(raw), at + 3)))
        raw[at:end] = data.draw(st.sampled_from([b"", b"0", b"9", b'"', b"a", b"{", b"}", b" ", b"-", b"\xff", b"\\u"]))
        raw = raw or bytearray(b"\0")
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except SafetensorsError:
        return
    with safe_open(path, framework="pt") as opened:
        assert set(opened.keys()) == header.tensors.keys()
        assert (opened.metadata() or {}) == header.metadata
        for name, entry in header.tensors.items():
            assert opened.get_slice(name).get_dtype() == entry.dtype
            assert tuple(opened.get_slice(name).get_shape()) == entry.shape


def entry(dtype="U8", shape=(2,), offsets=(0, 2)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def with_header(content, data=b"\0\0", length=None):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


HOSTILE = {
    "nothing": b"",
    "short length": b"\x01\0\0",
    "length beyond the file": with_header({}, length=100),
    "length beyond the limit": with_header({}, length=MAX_HEADER_BYTES + 1),
    "length of 2**64 - 1": with_header({}, length=2**64 - 1),
    "empty header": with_header(b""),
    "no JSON": with_header(b"{nonsense}"),
    "no object": with_header(b"[1]"),
    "blank first": with_header(
        b" " + json.dumps({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
    ),
    "not UTF-8": with_header(b'{"\xff": {}}'),
    "half a character": with_header(b'{"\\ud800": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}'),
    "deep nesting": with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "long number": with_header(b'{"a": ' + b"9" * 5000 + b"}"),
    "not a number": with_header(b'{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], "x": NaN}}'),
    "tensor that is no object": with_header({"a": 3}),
    "unknown dtype": with_header({"a": entry("F7")}),
    "dtype that is no text": with_header({"a": entry(["U8"])}),
    "no dtype": with_header({"a": {"shape": [2], "data_offsets": [0, 2]}}),
    "negative shape": with_header({"a": entry(shape=[-2])}),
    "fractional shape": with_header({"a": entry(shape=[2.0])}),
    "true as shape": with_header({"a": entry(shape=[True, 2])}),
    "huge shape": with_header({"a": entry(shape=[2**63, 0], offsets=[0, 0])}, b""),
    "one offset": with_header({"a": entry(offsets=[0])}),
    "offsets backwards": with_header({"a": entry(offsets=[2, 0])}),
    "offsets beyond the file": with_header({"a": entry(shape=[9], offsets=[0, 9])}),
    "size that differs from dtype and shape": with_header({"a": entry(shape=[1])}),
    "product that wraps at 64 bits": with_header({"a": entry("U64", [2**61, 8], [0, 0])}, b""),
    "overlap": with_header({"a": entry(), "b": entry(offsets=[1, 3])}, b"\0\0\0"),
    "the same bytes twice": with_header({"a": entry(), "b": entry()}),
    "gap at the beginning": with_header({"a": entry(offsets=[1, 3])}, b"\0\0\0"),
    "gap in the middle": with_header({"a": entry(), "b": entry(offsets=[3, 5])}, b"\0\0\0\0\0"),
    "bytes left over": with_header({"a": entry()}, b"\0\0\0"),
    "bytes missing": with_header({"a": entry()}, b"\0"),
    "half a byte": with_header({"a": entry("F4", [1], [0, 0])}, b""),
    "name twice": with_header(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"I8","shape":[2],"data_offsets":[0,2]}}'
    ),
    "key of a tensor twice": with_header(b'{"a":{"dtype":"U8","shape":[9],"shape":[2],"data_offsets":[0,2]}}'),
    "metadata that is no text": with_header({"__metadata__": {"a": 1}, "a": entry()}),
    "metadata that is a list": with_header({"__metadata__": ["a"], "a": entry()}),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused_in_one_line(tmp_path, raw):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(SafetensorsError, match=r"^Expected .* but got .*") as caught:
        read_header(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["name twice", "key of a tensor twice", "true as shape", "huge shape"])
def test_the_hostile_list_holds_what_the_package_would_accept_or_not(tmp_path, name):
    """What is stricter here than in the package is known: duplicates, and shapes beyond torch's integers."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    accepted = True
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError:
        accepted = False
    assert accepted is (name in {"name twice", "huge shape"})


def test_a_header_as_long_as_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("reference.safetensors_header.MAX_HEADER_BYTES", 64)
    for length, is_read in ((64, True), (65, False)):
        path = tmp_path / str(length)
        path.write_bytes(with_header(json.dumps({"a": entry()}).encode().ljust(length)))
        if is_read:
            assert read_header(path).tensors["a"].end == 2
        else:
            with pytest.raises(SafetensorsError, match="at most 64 bytes"):
                read_header(path)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"__metadata__": ("U8", (2,))}, "other names"),
        ({"\ud800": ("U8", (2,))}, "Unicode"),
        ({"a": ("F4", (3,))}, "whole number of bytes"),
    ],
)
def test_what_no_header_can_say_is_not_written(tensors, text):
    with pytest.raises(SafetensorsError, match=text):
        encode_header(tensors, {})


def test_too_many_names_for_a_header_are_not_written(monkeypatch):
    monkeypatch.setattr("reference.safetensors_header.MAX_HEADER_BYTES", 64)
    with pytest.raises(SafetensorsError, match="more files"):
        encode_header({f"t{i}": ("U8", (2,)) for i in range(9)}, {})


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32, torch.bits8, torch.quint8])
def test_dtypes_that_the_format_lacks_are_refused(dtype):
    with pytest.raises(SafetensorsError, match="dtype"):
        stored_as(dtype, (2,))


def test_four_bit_scalars_are_refused():
    with pytest.raises(SafetensorsError, match="at least one dim"):
        stored_as(torch.float4_e2m1fn_x2, ())
    with pytest.raises(SafetensorsError, match="even last dim"):
        torch_size("F4", (2, 3))
