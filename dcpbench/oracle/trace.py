"""Traces wrong bytes back to where they belong, so that a failure says why.

The content of a case is a function of the place, so what was found can be looked up among everything that the case
ever wrote: the same tensor elsewhere, another tensor, another version, what the destination held before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcpbench.case import MUTATED, Case
from dcpbench.content import DTYPES, Bytes, overwritten
from dcpbench.geometry import Region, full_region
from dcpbench.messages import ChunkTable

__all__ = ["Mismatch", "Origin", "chunk_note", "origin_of"]

_WINDOW = 16
_TELLING_BITS = 16
"""Fewer wrong bits than these may be what they are by chance."""
_MAX_SEARCHED_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Origin:
    """Where wrong bytes come from.

    Attributes:
        rule: the rule that this breaks.
        text: the end of the sentence "got …, which …".
        index: the global index in the same tensor where the bytes belong, if that is it.
    """

    rule: str
    text: str
    index: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor leaf on one rank whose bytes are not what they must be.

    Attributes:
        version: the content version that belongs there.
        want, got: bytes ``[numel, element size]``.
        wrong: positions of the elements that differ, ascending; at least one.
    """

    case: Case
    number: int
    version: int
    region: Region
    want: Bytes
    got: Bytes
    wrong: npt.NDArray[np.intp]


def origin_of(mismatch: Mismatch) -> Origin:
    """Returns where the first wrong run of elements comes from."""
    case, number, version, region = mismatch.case, mismatch.number, mismatch.version, mismatch.region
    want, got, wrong = mismatch.want, mismatch.got, mismatch.wrong
    leaf = case.tensor(number, version)
    bits = len(wrong) if leaf.dtype == "bool" else len(wrong) * DTYPES[leaf.dtype] * 8
    # a wrong bool can only be the other one: a whole tensor of them says that it was never written, a few say nothing
    may_be_untouched = leaf.dtype != "bool" or (len(wrong) == len(want) and bits >= _TELLING_BITS)
    if may_be_untouched and np.array_equal(got[wrong], overwritten(want, leaf.dtype)[wrong]):
        return Origin("R107", "what the destination held before the load")
    if bits >= _TELLING_BITS and any(s.action == "async_save" for s in case.steps):
        changed = case.expected_bytes(number, version + MUTATED, region)
        if np.array_equal(got[wrong], changed[wrong]):
            return Origin("R701", "what was written into the tensor after async_save had returned")
    versions = {s.version for s in case.steps if s.saves} - {version}
    for other in sorted(versions) if bits >= _TELLING_BITS else ():
        if case.tensor(number, other) == leaf and np.array_equal(
            got[wrong], case.expected_bytes(number, other, region)[wrong]
        ):
            return Origin("R106", f"what belongs there in version {other} of the state dict, not {version}")
    if not got[wrong].any():
        return Origin("R101", "zeros")
    if bits < _TELLING_BITS:
        return Origin("R101", "too few bits to say where they belong")
    return _misplaced(mismatch, _first_run(got, wrong, region))


def _first_run(got: Bytes, wrong: npt.NDArray[np.intp], region: Region) -> bytes:
    """Returns up to 16 neighbouring wrong elements of one row, from the first wrong one on."""
    length = 1
    row = region.shape[-1] if region.shape else 1
    room = row - int(wrong[0]) % row
    while length < min(_WINDOW, room, len(wrong)) and wrong[length] == wrong[0] + length:
        length += 1
    return got[int(wrong[0]) : int(wrong[0]) + length].tobytes()


def _misplaced(mismatch: Mismatch, run: bytes) -> Origin:
    case, number, version = mismatch.case, mismatch.number, mismatch.version
    size = DTYPES[case.tensor(number, version).dtype]
    unclear = Origin("R101", "which belongs nowhere in this case")
    order = [number, *(other for other in range(len(case.tensors)) if other != number)]
    for candidate in order:
        leaf = case.tensor(candidate, version)
        if leaf.num_bytes > _MAX_SEARCHED_BYTES or DTYPES[leaf.dtype] != size:
            continue
        whole = case.expected_bytes(candidate, version, full_region(leaf.shape)).tobytes()
        at = _find_aligned(whole, run, size)
        is_sure = at is not None and _find_aligned(whole, run, size, at + 1) is None
        if at is None:
            continue
        index = tuple(int(i) for i in np.unravel_index(at, leaf.shape)) if leaf.shape else ()
        if candidate == number:
            likely = "" if is_sure else "perhaps "
            return Origin("R101", f"which {likely}belongs at {index} of the same tensor", index)
        return Origin("R101", f"which belongs at {index} of {leaf.fqn!r}")
    return unclear


def _find_aligned(whole: bytes, run: bytes, size: int, start: int = 0) -> int | None:
    at = whole.find(run, start * size)
    while at >= 0 and at % size:
        at = whole.find(run, at + 1)
    return at // size if at >= 0 else None


def chunk_note(table: ChunkTable, index: tuple[int, ...], origin: Origin) -> str:
    """Returns which chunk the wrong element should have come from, and which one it came from."""
    right = next((chunk for chunk in table.chunks if chunk.contains(index)), None)
    if right is None:
        return "no chunk of the metadata holds this element"
    came = next((chunk for chunk in table.chunks if origin.index is not None and chunk.contains(origin.index)), None)
    if came is None:
        return f"the element lies in the chunk at {right.offsets}"
    if came == right:
        return f"it was read from the right chunk, at {right.offsets}, but from the wrong place in it"
    return f"it was read from the chunk at {came.offsets}; the chunk at {right.offsets} holds it"
