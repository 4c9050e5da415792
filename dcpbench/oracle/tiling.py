"""Rules R3xx: the metadata of a checkpoint describes each element of each tensor once."""

from __future__ import annotations

from collections.abc import Iterator

from dcpbench.case import Case
from dcpbench.geometry import Box, TilingFault, tiling_fault
from dcpbench.messages import ChunkTable, Observation
from dcpbench.oracle.setting import setting
from dcpbench.oracle.verdict import Finding

__all__ = ["findings"]

_RULES = {"gap": "R301", "overlap": "R302", "out-of-bounds": "R303"}


def findings(case: Case, seen: Observation) -> Iterator[Finding]:
    """Yields what is wrong with the metadata that the coordinator read back after a save."""
    tables = {table.fqn: table for table in seen.tables or ()}
    version, saved = case.version_held(seen.step), case.asked_for(_save_of(case, seen.step))
    for number in range(len(case.tensors)):
        if number not in saved:
            continue
        leaf = case.tensor(number, version)
        table = tables.get(leaf.fqn)
        want = f"{leaf.dtype}{list(leaf.shape)}"
        got = "no entry" if table is None else f"{table.dtype}{list(table.shape)}"
        if got != want:
            yield Finding(
                "R304",
                f"the metadata is wrong about {leaf.fqn!r}",
                (("expected", want), ("got", got), *setting(case, seen.step, number)),
                fqn=leaf.fqn,
                rank=seen.rank,
                step=seen.step,
            )
        elif table is not None and (fault := tiling_fault(table.shape, table.chunks)) is not None:
            yield Finding(
                _RULES[fault.kind],
                f"the chunks of {leaf.fqn!r} in the metadata {_say(fault)}",
                (
                    ("at", " and ".join(f"box {box}" for box in fault.boxes)),
                    ("expected", f"each element of {want} in exactly one of {len(table.chunks)} chunks"),
                    ("got", _chunks(table)),
                    *setting(case, seen.step, number),
                ),
                fqn=leaf.fqn,
                rank=seen.rank,
                step=seen.step,
            )


def _save_of(case: Case, number: int) -> int:
    """Returns the save that step ``number`` is, or has waited for."""
    source = case.source_of(number)
    return number if case.steps[number].saves or source is None else source


def _say(fault: TilingFault) -> str:
    return {"gap": "leave elements out", "overlap": "overlap", "out-of-bounds": "reach beyond it"}[fault.kind]


def _chunks(table: ChunkTable) -> str:
    def one(box: Box) -> str:
        return f"{box.offsets}+{box.sizes}"

    more = f" and {len(table.chunks) - 4} more" if len(table.chunks) > 4 else ""
    return ", ".join(map(one, table.chunks[:4])) + more
