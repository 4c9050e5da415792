"""Rules R1xx and R2xx: the tensors that one rank holds after a load."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dcpbench.case import Case
from dcpbench.content import DTYPES, Bytes
from dcpbench.geometry import Region
from dcpbench.messages import Observation, TensorObservation
from dcpbench.oracle.setting import setting
from dcpbench.oracle.trace import Origin, chunk_note, origin_of
from dcpbench.oracle.verdict import Finding

__all__ = ["added_keys", "findings"]


def findings(case: Case, seen: Observation, saved: Observation | None) -> Iterator[Finding]:
    """Yields what is wrong with the tensors of one rank after a load.

    Args:
        case: what was run.
        seen: the rank's observation of the load.
        saved: the coordinator's observation of the save, whose chunk tables help to say why; None if there is none.
    """
    layout = case.layouts[case.steps[seen.step].layout]
    for number, (leaf, found) in enumerate(zip(case.tensors, seen.tensors, strict=True)):
        region = layout.region(number, leaf.shape, seen.rank)
        if region is not None:
            yield from _tensor(case, number, region, found, seen, saved)
        elif not found.same_tensor:
            yield _finding(case, "R201", number, seen, "was replaced by another tensor", ())


def _finding(
    case: Case, rule: str, number: int, seen: Observation, what: str, facts: tuple[tuple[str, str], ...], because: str = ""
) -> Finding:
    fqn = case.tensors[number].fqn
    reason = (("because", because),) if because else ()
    return Finding(
        rule,
        f"{fqn!r} {what} on rank {seen.rank} of {seen.world_size}",
        (*facts, *setting(case, seen.step, number), *reason),
        fqn=fqn,
        rank=seen.rank,
        step=seen.step,
    )


def _tensor(
    case: Case, number: int, region: Region, found: TensorObservation, seen: Observation, saved: Observation | None
) -> Iterator[Finding]:
    leaf = case.tensors[number]

    def wrong(rule: str, what: str, expected: str, got: str) -> Finding:
        return _finding(case, rule, number, seen, what, (("expected", expected), ("got", got)))

    if found.shape is None:
        got = f"a {found.dtype}" if found.dtype else "no such key"
        yield wrong("R104", "is no longer a tensor after load", "a tensor", got)
        return
    if not found.same_tensor:
        yield wrong("R201", "was replaced by another tensor", "the tensor that was given", "another object")
    elif not found.same_storage:
        yield wrong("R202", "was moved to other memory", "the memory that it had", "another address")
    if not found.outside_intact:
        yield wrong("R203", "was not all that load wrote to", "bytes beside the tensor unchanged", "some were overwritten")
    if found.dtype != leaf.dtype:
        yield wrong("R102", "changed its dtype", leaf.dtype, found.dtype)
    elif found.shape != region.shape:
        yield wrong("R103", "changed its local shape", str(region.shape), str(found.shape))
    else:
        yield from _bytes(case, number, region, found.data, seen, saved)


def _bytes(
    case: Case, number: int, region: Region, data: bytes, seen: Observation, saved: Observation | None
) -> Iterator[Finding]:
    leaf = case.tensors[number]
    version = case.version_at(seen.step) or 0
    want = case.expected_bytes(number, version, region)
    if data == want.tobytes():
        return
    got = np.frombuffer(data, np.uint8).reshape(-1, DTYPES[leaf.dtype])
    wrong = np.flatnonzero((got != want).any(axis=1))
    first = int(wrong[0])
    index = region.global_index([int(i) for i in np.unravel_index(first, region.shape)])
    origin = origin_of(case, number, version, region, got, wrong)
    facts = (
        ("at", f"global index {index}, box {region.box_of(index)}, {leaf.dtype}"),
        ("expected", _hex(want[first])),
        ("got", f"{_hex(got[first])}, {origin.text}  (first of {len(wrong)} of {len(want)} elements)"),
    )
    yield _finding(
        case, origin.rule, number, seen, _WHAT[origin.rule], facts, _because(number, index, origin, case, saved)
    )


_WHAT = {
    "R101": "differs after load",
    "R106": "holds what another save or load left",
    "R107": "was not written everywhere by load",
}


def _because(number: int, index: tuple[int, ...], origin: Origin, case: Case, saved: Observation | None) -> str:
    tables = {table.fqn: table for table in (saved.tables or ())} if saved else {}
    table = tables.get(case.tensors[number].fqn)
    return chunk_note(table, index, origin) if table else ""


def _hex(element: Bytes) -> str:
    """Returns the bytes of an element as one number in hex, most significant byte first."""
    return element[::-1].tobytes().hex()


def added_keys(case: Case, seen: Observation) -> Iterator[Finding]:
    """Yields the finding that a load put keys into the state dict that were not there."""
    if seen.keys is None:
        return
    paths = [leaf.path for leaf in (*case.tensors, *case.objects)]
    wanted = {"/".join(repr(part.value) for part in path) for path in paths}
    if extra := sorted(set(seen.keys) - wanted - _prefixes(wanted)):
        yield Finding(
            "R105",
            f"load added the key {extra[0]} on rank {seen.rank} of {seen.world_size}",
            (("expected", f"{len(wanted)} leaves as before"), ("got", f"{len(extra)} more"), *setting(case, seen.step)),
            fqn=extra[0],
            rank=seen.rank,
            step=seen.step,
        )


def _prefixes(paths: set[str]) -> set[str]:
    """Returns what stands above the given paths: a container that was replaced by a value is a lost leaf, no new key."""
    return {path.rsplit("/", n)[0] for path in paths for n in range(1, path.count("/") + 1)}
