"""Rules R1xx and R2xx: the tensors that one rank holds after a load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dcpbench.case import Case, ObjectLeaf, TensorLeaf
from dcpbench.content import DTYPES, Bytes
from dcpbench.geometry import Region
from dcpbench.messages import Observation, TensorObservation
from dcpbench.oracle.setting import setting
from dcpbench.oracle.trace import Mismatch, chunk_note, origin_of
from dcpbench.oracle.verdict import Finding

__all__ = ["added_keys", "findings"]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One tensor leaf on one rank after a step; ``saved`` is the coordinator's observation of its save, if any."""

    case: Case
    number: int
    leaf: TensorLeaf
    version: int
    seen: Observation
    saved: Observation | None

    @property
    def found(self) -> TensorObservation:
        return self.seen.tensors[self.number]

    def finding(self, rule: str, what: str, *facts: tuple[str, str], because: str = "") -> Finding:
        reason = (("because", because),) if because else ()
        return Finding(
            rule,
            f"{self.leaf.fqn!r} {what} on rank {self.seen.rank} of {self.seen.world_size}",
            (*facts, *setting(self.case, self.seen.step, self.number), *reason),
            fqn=self.leaf.fqn,
            rank=self.seen.rank,
            step=self.seen.step,
        )

    def wrong(self, rule: str, what: str, expected: str, got: str) -> Finding:
        return self.finding(rule, what, ("expected", expected), ("got", got))


def findings(case: Case, seen: Observation, saved: Observation | None) -> Iterator[Finding]:
    """Yields what is wrong with the tensors of one rank after a step.

    Args:
        case: what was run.
        seen: the rank's observation of the step.
        saved: the coordinator's observation of the save, whose chunk tables help to say why; None if there is none.
    """
    layout = case.layouts[case.steps[seen.step].layout]
    version = case.version_held(seen.step)
    for number in range(len(case.tensors)):
        loaded = _Loaded(case, number, case.tensor(number, version), version, seen, saved)
        if not loaded.found.asked_for:
            continue
        region = layout.region(number, loaded.leaf.shape, seen.rank)
        if region is not None:
            yield from _tensor(loaded, region)
        elif not loaded.found.same_tensor:
            yield loaded.wrong("R201", "was replaced by another tensor", "the tensor that was given", "another object")


def _tensor(loaded: _Loaded, region: Region) -> Iterator[Finding]:
    leaf, found = loaded.leaf, loaded.found
    if found.shape is None:
        got = f"a {found.dtype}" if found.dtype else "no such key"
        yield loaded.wrong("R104", "is no longer a tensor after load", "a tensor", got)
        return
    if found.dtype != leaf.dtype:
        yield loaded.wrong("R102", "changed its dtype", leaf.dtype, found.dtype)
    elif found.shape != region.shape:
        yield loaded.wrong("R103", "changed its local shape", str(region.shape), str(found.shape))
    else:
        yield from _bytes(loaded, region)
    if not found.same_tensor:
        yield loaded.wrong("R201", "was replaced by another tensor", "the tensor that was given", "another object")
    elif not found.same_storage:
        yield loaded.wrong("R202", "was moved to other memory", "the memory that it had", "another address")
    if not found.outside_intact:
        yield loaded.wrong(
            "R203", "was not all that load wrote to", "bytes beside it unchanged", "some were overwritten"
        )


_WHAT = {
    "R101": "differs after load",
    "R106": "holds what another save or load left",
    "R107": "was not written everywhere by load",
    "R701": "was changed by what followed async_save",
}


def _bytes(loaded: _Loaded, region: Region) -> Iterator[Finding]:
    case, leaf, version = loaded.case, loaded.leaf, loaded.version
    if case.is_missing(loaded.seen.step, loaded.number):
        untouched = case.destination_bytes(loaded.number, loaded.seen.step, loaded.seen.rank)
        if loaded.found.data != untouched.tobytes():
            yield loaded.wrong(
                "R108", "was written to", "what it held, as the checkpoint has no such key", "other bytes"
            )
        return
    want = case.expected_bytes(loaded.number, version, region)
    if loaded.found.data == want.tobytes():
        return
    got = np.frombuffer(loaded.found.data, np.uint8).reshape(-1, DTYPES[leaf.dtype])
    wrong = np.flatnonzero((got != want).any(axis=1))
    first = int(wrong[0])
    index = region.global_index([int(i) for i in np.unravel_index(first, region.shape)])
    origin = origin_of(Mismatch(case, loaded.number, version, region, want, got, wrong))
    table = next((t for t in (loaded.saved.tables or ()) if t.fqn == leaf.fqn), None) if loaded.saved else None
    yield loaded.finding(
        origin.rule,
        _WHAT[origin.rule],
        ("at", f"global index {index}, box {region.box_of(index)}, {leaf.dtype}"),
        ("expected", _hex(want[first])),
        ("got", f"{_hex(got[first])}, {origin.text}  (first of {len(wrong)} of {len(want)} elements)"),
        because=chunk_note(table, index, origin) if table else "",
    )


def _hex(element: Bytes) -> str:
    """Returns the bytes of an element as one number in hex, most significant byte first."""
    return element[::-1].tobytes().hex()


def added_keys(case: Case, seen: Observation) -> Iterator[Finding]:
    """Yields the finding that a load put keys into the state dict that were not there."""
    if seen.keys is None:
        return
    wanted = {"/".join(repr(part.value) for part in leaf.path) for leaf in _asked_for(case, seen)}
    if extra := sorted(set(seen.keys) - wanted - _prefixes(wanted)):
        yield Finding(
            "R105",
            f"{seen.action} added the key {extra[0]} on rank {seen.rank} of {seen.world_size}",
            (("expected", f"{len(wanted)} leaves as before"), ("got", f"{len(extra)} more"), *setting(case, seen.step)),
            fqn=extra[0],
            rank=seen.rank,
            step=seen.step,
        )


def _asked_for(case: Case, seen: Observation) -> list[TensorLeaf | ObjectLeaf]:
    return [case.leaves[number] for number in case.asked_for(seen.step, seen.rank)]


def _prefixes(paths: set[str]) -> set[str]:
    """Returns what stands above the given paths: a container that a value replaced is a lost leaf, no new key."""
    return {path.rsplit("/", n)[0] for path in paths for n in range(1, path.count("/") + 1)}
