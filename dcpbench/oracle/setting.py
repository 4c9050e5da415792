"""The lines of a finding that say how a leaf lay on the ranks when it was saved and when it was loaded."""

from __future__ import annotations

from dcpbench.case import Case

__all__ = ["setting"]


def setting(case: Case, number: int, leaf: int | None = None) -> tuple[tuple[str, str], ...]:
    """Returns the lines ``saved on`` and ``loaded on`` for a finding at step ``number``.

    Args:
        case: what was run.
        number: of the step.
        leaf: the tensor leaf concerned; None where the finding is about the whole step.
    """
    step = case.steps[number]
    saves = [s for s in case.steps[: number + 1] if s.action == "save" and s.checkpoint == step.checkpoint]
    lines = []
    if saves:
        lines.append(("saved on", _layout(case, saves[-1].layout, leaf)))
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
    return world if leaf is None else f"{world}: {layout.leaves[leaf]}"


def _holding(case: Case) -> str:
    held = [f"{leaf.fqn!r} {leaf.dtype}{list(leaf.shape)}" for leaf in case.tensors]
    held += [f"{leaf.fqn!r} {str(leaf.encoded)[:40]}" for leaf in case.objects]
    more = f" and {len(held) - 3} more" if len(held) > 3 else ""
    return ", ".join(held[:3]) + more if held else "nothing"
