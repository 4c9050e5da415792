import contextlib
import io
import zipfile
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_ranks import noise, raw_bytes

from reference.item_parts import copy
from reference.items import CorruptItemError, frame_of, load_tensor, memory_of, serialize_object, verify_zip

NAMES = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e5m2",
    "float8_e4m3fn",
    "float8_e5m2fnuz",
    "float8_e4m3fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
    "complex128",
    "complex64",
    "complex32",
    "bits8",
    "bits16",
    "bits1x8",
    "bits2x4",
    "bits4x2",
]
DTYPES = [getattr(torch, name) for name in NAMES]
SIZES = [(), (0,), (1,), (3,), (2, 3), (0, 4), (4, 0, 2), (1, 5, 1), (300, 70)]


def item_of(value):
    frame = frame_of(value.dtype, value.size())
    payload = memory_of(value)
    return frame.head + bytes(payload) + frame.tail(zlib.crc32(payload))


def torch_item(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_an_item_is_what_torch_save_writes(dtype, size):
    value = noise(size, dtype)
    ours, theirs = item_of(value), torch_item(value)
    assert len(ours) == len(theirs) == frame_of(dtype, size).length
    records = [zipfile.ZipFile(io.BytesIO(raw)) for raw in (ours, theirs)]
    assert records[0].namelist() == records[1].namelist()
    for mine, other in zip(records[0].infolist(), records[1].infolist(), strict=True):
        assert (mine.header_offset, mine.file_size, mine.flag_bits) == (
            other.header_offset,
            other.file_size,
            other.flag_bits,
        )
        if not mine.filename.endswith("serialization_id"):
            assert records[0].read(mine) == records[1].read(other)
    last = ours.index(b"archive/.data/serialization_id")
    assert ours[:last] == theirs[:last]
    loaded = torch.load(io.BytesIO(ours), weights_only=True)
    assert (loaded.dtype, loaded.size(), raw_bytes(loaded)) == (dtype, value.size(), raw_bytes(value))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), max_size=5), st.sampled_from(DTYPES))
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_any_shape_loads_in_torch(size, dtype):
    value = noise(size, dtype)
    loaded = torch.load(io.BytesIO(item_of(value)), weights_only=True)
    assert (loaded.size(), raw_bytes(loaded)) == (value.size(), raw_bytes(value))
    verify_zip(item_of(value), "item")


def test_huge_and_quantized_tensors_have_no_frame():
    assert frame_of(torch.uint8, (2**33,)) is None
    assert frame_of(torch.qint8, (1,)) is None


def test_strided_forms_of_torch_are_read():
    base = torch.arange(12.0).reshape(3, 4)
    complex_base = torch.view_as_complex(base.reshape(3, 2, 2).clone())
    for value in (base.t(), base[:, 1:3], base[:1].expand(5, 4), complex_base.conj(), complex_base.conj().imag):
        assert raw_bytes(load_tensor(torch_item(value), "item")) == raw_bytes(value)


def test_a_changed_byte_is_found():
    raw = bytearray(item_of(torch.arange(1000.0)))
    raw[2000] ^= 1
    with pytest.raises(CorruptItemError, match=r"item with a wrong CRC in record 'archive/data/0'"):
        verify_zip(raw, "item")
    verify_zip(b"not a zip", "item")
    with pytest.raises(CorruptItemError, match="item unreadable"):
        verify_zip(b"PK\x03\x04 torn", "item")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_any_changed_bit_is_found_or_harmless():
    value = {"step": [1, 2, "y"]}
    intact = serialize_object(value).getvalue()
    for at in range(len(intact)):
        raw = bytearray(intact)
        raw[at] ^= 1 << at % 8
        try:
            verify_zip(raw, "item")
        except CorruptItemError:
            continue
        with contextlib.suppress(RuntimeError):  # what torch refuses
            assert raw[:4] != intact[:4] or torch.load(io.BytesIO(raw), weights_only=True) == value


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantized_tensors_are_copied_as_what_they_are():
    value = torch.quantize_per_tensor(torch.arange(4.0), 0.5, 0, torch.qint8)
    target = torch.quantize_per_tensor(torch.zeros(4), 0.5, 0, torch.qint8)
    copy(target, value)
    assert torch.equal(target.int_repr(), value.int_repr())


def test_what_is_no_tensor_is_refused():
    with pytest.raises(CorruptItemError, match="holding a dict"):
        load_tensor(torch_item({}), "item")
    with pytest.raises(CorruptItemError, match="unreadable"):
        load_tensor(b"junk", "item")


def test_objects_load_in_torch():
    assert torch.load(serialize_object({"a": [1]}), weights_only=False) == {"a": [1]}
