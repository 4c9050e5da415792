"""Boxes read out of a file: the right bytes, into any layout, with no more read than is cheap."""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtual_ranks import blank, noise, raw_bytes

from reference import item_parts
from reference.data_file import DataFile
from reference.hf_boxes import read_box
from reference.hf_metadata import Place
from reference.strict_json import SafetensorsError

DTYPES = [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.complex64, torch.float8_e5m2]
REUSED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)


def place(size, dtype, at=0):
    return Place("x", torch.Size(size), dtype, at, 0)


@st.composite
def boxes(draw):
    size = draw(st.lists(st.integers(1, 5), max_size=4))
    offsets = [draw(st.integers(0, extent)) for extent in size]
    lengths = [draw(st.integers(0, extent - offset)) for extent, offset in zip(size, offsets, strict=True)]
    return size, offsets, lengths


def cut(whole, offsets, lengths):
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        whole = whole.narrow(dim, offset, length)
    return whole


def destination(lengths, dtype, kind):
    if kind == "transposed":
        return blank(lengths[::-1], dtype).permute(list(reversed(range(len(lengths)))))
    if kind == "part":
        return cut(blank([length + 2 for length in lengths], dtype), [1] * len(lengths), lengths)
    return blank(lengths, dtype)


@REUSED_FOLDER
@given(
    boxes(),
    st.sampled_from(DTYPES),
    st.sampled_from(["contiguous", "transposed", "part"]),
    st.sampled_from([8, 40, 1 << 20]),
    st.sampled_from([0, 1, 6, 4096]),
    st.integers(0, 3),
)
def test_every_box_into_every_layout(tmp_path, box, dtype, kind, staged_bytes, gap_bytes, at):
    size, offsets, lengths = box
    whole = noise(size, dtype, 1)
    (tmp_path / "x").write_bytes(b"#" * at + raw_bytes(whole) + b"#" * 3)
    target = destination(lengths, dtype, kind)
    with pytest.MonkeyPatch.context() as patch, DataFile(tmp_path / "x") as file:
        patch.setattr(item_parts, "_STAGED_BYTES", staged_bytes)
        patch.setattr(item_parts, "_MIN_GAP_BYTES", gap_bytes)
        read_box(file, place(size, dtype, at), offsets, target)
    assert raw_bytes(target) == raw_bytes(cut(whole, offsets, lengths))


def test_another_dtype_is_converted(tmp_path):
    whole = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    (tmp_path / "x").write_bytes(raw_bytes(whole))
    target = torch.zeros(2, 2)
    with DataFile(tmp_path / "x") as file:
        read_box(file, place((3, 4), torch.int16), (1, 2), target)
    assert target.tolist() == [[6.0, 7.0], [10.0, 11.0]]


@pytest.mark.parametrize(
    ("offsets", "lengths"), [((0, 0), (4, 4)), ((-1, 0), (2, 2)), ((3, 0), (1, 1)), ((0,), (1,)), ((0, 0), (1,))]
)
def test_a_box_that_reaches_out_is_refused(tmp_path, offsets, lengths):
    (tmp_path / "x").write_bytes(bytes(100))
    with DataFile(tmp_path / "x") as file, pytest.raises(SafetensorsError, match="box inside"):
        read_box(file, place((3, 4), torch.uint8), offsets, torch.zeros(lengths, dtype=torch.uint8))


def test_a_file_that_ends_within_the_box_is_an_error(tmp_path):
    (tmp_path / "x").write_bytes(bytes(11))
    with DataFile(tmp_path / "x") as file, pytest.raises(EOFError, match="cut short"):
        read_box(file, place((3, 4), torch.uint8), (0, 0), torch.zeros(3, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("size", "offsets", "lengths", "most"),
    [
        ((64, 1024), (16, 0), (16, 1024), 1.0),  # rows: one run
        ((64, 65536), (0, 16384), (64, 16384), 1.0),  # columns: long runs with long gaps, each read alone
        ((4096, 16), (0, 4), (4096, 4), 4.0),  # columns: short runs, read with what lies between
    ],
)
@pytest.mark.parametrize("kind", ["contiguous", "part"])
def test_no_more_is_read_than_is_cheap(tmp_path, monkeypatch, size, offsets, lengths, most, kind):
    whole = noise(size, torch.uint8, 2)
    (tmp_path / "x").write_bytes(raw_bytes(whole))
    num_bytes_read = []
    preadv = os.preadv

    def counted(*args):
        num_bytes_read.append(preadv(*args))
        return num_bytes_read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    target = destination(lengths, torch.uint8, kind)
    with DataFile(tmp_path / "x") as file:
        read_box(file, place(size, torch.uint8), offsets, target)
    assert raw_bytes(target) == raw_bytes(cut(whole, offsets, lengths))
    assert math.prod(lengths) <= sum(num_bytes_read) <= most * math.prod(lengths)
