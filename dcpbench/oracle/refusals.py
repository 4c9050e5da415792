"""Rule R205: a load that is refused leaves its destination alone."""

from __future__ import annotations

from collections.abc import Iterator

from dcpbench import objects as codec
from dcpbench.case import Case
from dcpbench.messages import Observation
from dcpbench.oracle.setting import setting
from dcpbench.oracle.verdict import Finding

__all__ = ["findings"]


def findings(case: Case, seen: Observation) -> Iterator[Finding]:
    """Yields the first thing that a refused load changed in the state dict of one rank."""
    for fqn, what in _changes(case, seen):
        yield Finding(
            "R205",
            f"{fqn!r} {what} on rank {seen.rank} of {seen.world_size}, by a load that was refused",
            (("expected", "what it held before the load"), ("got", what), *setting(case, seen.step)),
            fqn=fqn,
            rank=seen.rank,
            step=seen.step,
        )
        return


def _changes(case: Case, seen: Observation) -> Iterator[tuple[str, str]]:
    layout = case.layouts[case.steps[seen.step].layout]
    for number, tensor in enumerate(seen.tensors):
        if not tensor.asked_for:
            continue
        region = layout.region(number, case.shape_asked(number, seen.step, seen.rank), seen.rank)
        if not tensor.same_tensor or tensor.shape is None:
            yield tensor.fqn, "was replaced"
        elif region is not None and tensor.data != case.destination_bytes(number, seen.step, seen.rank).tobytes():
            yield tensor.fqn, "was written to"
        elif not tensor.same_storage or not tensor.outside_intact:
            yield tensor.fqn, "was moved, or overrun"
    for number, value in enumerate(seen.objects, len(case.tensors)):
        is_elsewhere = case.misuse_of(seen.step, number, seen.rank) in ("unknown-key", "other-kind")
        if value.asked_for and not is_elsewhere and value.encoded != codec.NEVER_LOADED:
            yield value.fqn, "was replaced"
