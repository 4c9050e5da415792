"""Traces wrong bytes back to where they belong, so that a failure says why.

The content of a case is a function of the place, so what was found can be looked up among everything that the case
ever wrote: the same tensor elsewhere, another tensor, another version, what the destination held before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dcpbench.case import Case
from dcpbench.content import DTYPES, Bytes, overwritten
from dcpbench.geometry import Region, full_region
from dcpbench.messages import ChunkTable

__all__ = ["Origin", "chunk_note", "origin_of"]

_WINDOW = 16
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


def origin_of(
    case: Case, number: int, version: int, region: Region, got: Bytes, wrong: npt.NDArray[np.intp]
) -> Origin:
    """Returns where the first wrong run of elements of tensor ``number`` comes from.

    Args:
        got: what was found, ``[numel, element size]``.
        wrong: positions of the elements that differ, ascending.
    """
    leaf = case.tensors[number]
    want = case.expected_bytes(number, version, region)
    is_certain = leaf.dtype != "bool" or len(wrong) == len(want)  # a wrong bool can only be the other one
    if is_certain and np.array_equal(got[wrong], overwritten(want, leaf.dtype)[wrong]):
        return Origin("R107", "what the destination held before the load")
    versions = {s.version for s in case.steps if s.action == "save"} - {version}
    for other in sorted(versions):
        if np.array_equal(got[wrong], case.expected_bytes(number, other, region)[wrong]):
            return Origin("R106", f"what belongs there in version {other} of the state dict, not {version}")
    if not got[wrong].any():
        return Origin("R101", "zeros")
    return _misplaced(case, number, version, region, _first_run(got, wrong, region))


def _first_run(got: Bytes, wrong: npt.NDArray[np.intp], region: Region) -> bytes:
    """Returns up to 16 neighbouring wrong elements of one row, from the first wrong one on."""
    length = 1
    row = region.shape[-1] if region.shape else 1
    room = row - int(wrong[0]) % row
    while length < min(_WINDOW, room, len(wrong)) and wrong[length] == wrong[0] + length:
        length += 1
    return got[int(wrong[0]) : int(wrong[0]) + length].tobytes()


def _misplaced(case: Case, number: int, version: int, region: Region, run: bytes) -> Origin:
    size = DTYPES[case.tensors[number].dtype]
    unclear = Origin("R101", "which belongs nowhere in this case")
    order = [number, *(other for other in range(len(case.tensors)) if other != number)]
    for candidate in order:
        leaf = case.tensors[candidate]
        if leaf.num_bytes > _MAX_SEARCHED_BYTES or DTYPES[leaf.dtype] != size:
            continue
        whole = case.expected_bytes(candidate, version, full_region(leaf.shape)).tobytes()
        at = _find_aligned(whole, run, size)
        if at is None:
            continue
        index = tuple(int(i) for i in np.unravel_index(at, leaf.shape)) if leaf.shape else ()
        if candidate == number:
            likely = "" if len(run) >= 4 else "perhaps "
            return Origin("R101", f"which {likely}belongs at {index} of the same tensor", index)
        return Origin("R101", f"which belongs at {index} of {leaf.fqn!r}")
    return unclear


def _find_aligned(whole: bytes, run: bytes, size: int) -> int | None:
    at = whole.find(run)
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
