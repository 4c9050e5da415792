"""The lines of a finding that say how a leaf lay on the ranks when it was saved and when it was loaded."""

from __future__ import annotations

from dcpbench.case import Case
from dcpbench.models.case import TrainingCase

__all__ = ["setting"]


def setting(case: Case, number: int, leaf: int | None = None) -> tuple[tuple[str, str], ...]:
    """Returns the lines ``saved on`` and ``loaded on`` for a finding at step ``number``.

    Args:
        case: what was run.
        number: of the step.
        leaf: the tensor leaf concerned; None where the finding is about the whole step.
    """
    other: object = case
    if isinstance(other, TrainingCase):
        return other.setting(number)
    step = case.steps[number]
    source = number if step.saves else case.source_of(number)
    lines = []
    if source is not None:
        lines.append(("saved on", _layout(case, case.steps[source].layout, leaf)))
    if step.action == "load":
        lines.append(("loaded on", _layout(case, step.layout, leaf)))
    if leaf is None:
        lines.append(("holding", _holding(case)))
    return tuple(lines)


def _layout(case: Case, number: int, leaf: int | None) -> str:
    layout = case.layouts[number]
    if not layout.distributed:
        world = "one process without a process group"
    else:
        world = f"{layout.world_size} ranks, mesh {layout.mesh}"
        if layout.members:
            world += f", of which {list(layout.members)} take part"
    if leaf is None:
        return world
    held = next((f", on ranks {list(held.ranks)} only" for held in layout.holders if held.leaf == leaf), "")
    return f"{world}: {layout.leaves[leaf]}{held}"


def _holding(case: Case) -> str:
    held = [f"{leaf.fqn!r} {leaf.dtype}{list(leaf.shape)}" for leaf in case.tensors]
    held += [f"{leaf.fqn!r} {str(leaf.encoded)[:40]}" for leaf in case.objects]
    more = f" and {len(held) - 3} more" if len(held) > 3 else ""
    return ", ".join(held[:3]) + more if held else "nothing"
