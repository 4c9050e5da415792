"""The check of memo indices: no honest pickle is refused, no large index is let through, nothing raises otherwise."""

from __future__ import annotations

import contextlib
import pickle
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.metadata import MetadataError, load_metadata
from reference.pickle_memo import check_memo


def several(values):
    """Values that pickle as a buffer, and by a reference to the memo."""
    return [bytearray(repr(values), "utf-8", "replace"), values, values]


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**600), 2**600), st.floats(), st.text(), st.binary()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner), st.tuples(inner, inner), st.dictionaries(st.text(), inner), st.lists(inner).map(several)
    ),
    max_leaves=40,
)


@given(value=VALUES, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_honest_pickles_pass(value, protocol):
    check_memo(pickle.dumps(value, protocol))


@given(value=VALUES, protocol=st.integers(2, pickle.HIGHEST_PROTOCOL), index=st.integers(2**20, 2**32 - 1))
def test_a_large_index_is_found_wherever_it_stands(value, protocol, index):
    honest = pickle.dumps(value, protocol)
    at = honest.rindex(b".")
    if at + 1 == len(honest):
        with pytest.raises(ValueError, match=f"got {index}"):
            check_memo(honest[:at] + b"r" + struct.pack("<I", index) + b".")
        with pytest.raises(ValueError, match=f"got {index}"):
            check_memo(honest[:at] + b"p%d\n." % index)


@pytest.mark.parametrize(
    "index", ["+200000000", "200_000_000", " 200000000", "0" * 30 + "200000000", "200000000\0", ""]
)
def test_an_index_that_no_pickler_writes_is_refused(index):
    with pytest.raises(ValueError, match="memo index in plain digits"):
        check_memo(b"(lp" + index.encode() + b"\n.")


@given(raw=st.binary(max_size=200))
def test_anything_else_is_left_to_the_unpickler(raw):
    with contextlib.suppress(ValueError):
        check_memo(raw)


def test_metadata_is_refused_before_it_takes_memory():
    with pytest.raises(MetadataError, match="memo index of 9 at most"):
        load_metadata(b"\x80\x02]r\xff\xff\xff\x7f.")
