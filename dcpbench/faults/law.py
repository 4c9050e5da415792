"""The law of crashes: the old checkpoint whole, the new one whole, or a clear error. Pure.

What a load saw of an image is compared with what each save wrote, leaf by leaf, on bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dcpbench import objects
from dcpbench.case import Case
from dcpbench.faults.crash_images import Image
from dcpbench.faults.operations import Link, MakeFolder, OpenFile, Operation, RemoveFolder, Rename, Trace, Unlink
from dcpbench.oracle.verdict import Finding

__all__ = [
    "CRASHES",
    "LoadSeen",
    "Stakes",
    "content_of",
    "crash_findings",
    "judge_crash",
    "version_of",
    "what_it_holds",
]

CRASHES = {
    "kill": "the processes are killed",
    "ext4": "power is lost, on ext4",
    "posix": "power is lost, on what POSIX promises",
}
MAX_LOST_SHOWN = 3


@dataclass(frozen=True)
class LoadSeen:
    """What one load did.

    Attributes:
        outcome: ``loaded`` returned, ``refused`` raised, ``died`` took its process along, ``hung`` did not come back.
        content: bytes of each tensor and encoded value of each other leaf, where it loaded.
        error: what it raised, or how it ended.
    """

    outcome: Literal["loaded", "refused", "died", "hung"]
    content: tuple[Any, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Stakes:
    """What a crash during a save may and may not do.

    Attributes:
        checkpoint: what the save writes.
        new: the version that it writes.
        old: the version that was there under the same name; None if there was none.
        others: versions of checkpoints under other names.
    """

    checkpoint: str
    new: int
    old: int | None
    others: Mapping[str, int]


def content_of(case: Case, step: int, version: int) -> tuple[Any, ...]:
    """Returns what a load at ``step`` on rank 0 must bring of a content version, as in :attr:`LoadSeen.content`."""
    layout = case.layouts[case.steps[step].layout]
    found: list[Any] = []
    for number, leaf in enumerate(case.tensors):
        region = layout.region(number, leaf.shape, 0)
        found.append(b"" if region is None else case.expected_bytes(number, version, region).tobytes())
    return (*found, *(objects.encode(leaf.value(version)) for leaf in case.objects))


def version_of(case: Case, step: int, seen: LoadSeen, versions: Sequence[int]) -> int | None:
    """Returns the content version that a load brought whole, or None if it brought none of ``versions`` whole."""
    if seen.outcome != "loaded":
        return None
    return next((version for version in versions if seen.content == content_of(case, step, version)), None)


def what_it_holds(case: Case, step: int, seen: LoadSeen, versions: Sequence[int]) -> str:
    """Returns in words which leaf is of which version."""
    wanted = {version: content_of(case, step, version) for version in versions}
    parts = []
    for number, leaf in enumerate(case.leaves):
        held = [version for version in versions if seen.content[number] == wanted[version][number]]
        parts.append(f"{leaf.fqn!r} of {'save ' + str(held[0]) if held else 'no save'}")
    return ", ".join(parts)


def judge_crash(case: Case, step: int, stakes: Stakes, image: Image, loads: Mapping[str, LoadSeen]) -> list[Finding]:
    """Returns what is wrong with an image, by what loads of it saw.

    Args:
        case: whose saves it were.
        step: the load.
        stakes: what was to be kept.
        image: where the crash left the storage.
        loads: by checkpoint name.
    """
    found = []
    versions = [*dict.fromkeys([stakes.new, *([] if stakes.old is None else [stakes.old]), *stakes.others.values()])]
    for name, version in stakes.others.items():
        seen = loads[name]
        if version_of(case, step, seen, [version]) != version:
            found.append(_finding("R803", f"checkpoint {name!r} no longer loads as it was", case, step, seen, versions))
    seen = loads[stakes.checkpoint]
    got = version_of(case, step, seen, versions)
    what = f"checkpoint {stakes.checkpoint!r}"
    if seen.outcome in ("died", "hung"):
        found.append(_finding("R805", f"a load of {what} {seen.outcome}", case, step, seen, versions))
    elif seen.outcome == "refused" and not seen.error.strip():
        found.append(_finding("R805", f"a load of {what} raised without a word", case, step, seen, versions))
    elif seen.outcome == "loaded" and got not in (stakes.new, stakes.old):
        found.append(_finding("R801", f"{what} loads, and is neither save whole", case, step, seen, versions))
    elif image.is_after_return and got != stakes.new:
        found.append(_finding("R804", f"{what} is not what the save that returned wrote", case, step, seen, versions))
    elif got is None and stakes.old is not None:
        found.append(_finding("R802", f"{what} is gone, the old save and the new", case, step, seen, versions))
    return found


def _finding(  # noqa: PLR0917
    rule: str, what: str, case: Case, step: int, seen: LoadSeen, versions: Sequence[int]
) -> Finding:
    got = seen.error if seen.outcome != "loaded" else what_it_holds(case, step, seen, versions)
    return Finding(rule, what, (("got", " ".join(got.split())[:200] or "nothing"),), step=step)


def crash_findings(trace: Trace, judged: Sequence[tuple[Image, Finding]]) -> list[tuple[Image, Finding]]:
    """Returns one finding for each way in which the law breaks, with the smallest image that shows it.

    A way is a rule, a kind of crash and, where power is lost, the call whose effect was lost. The finding names the
    operation after which the law breaks, and the ordering that is missing.
    """
    groups: dict[tuple[str, ...], list[tuple[Image, Finding]]] = {}
    for image, finding in judged:
        lost = trace[image.lost[0]] if image.lost else None
        way = (type(lost).__name__, lost.path) if lost is not None else ("",)
        groups.setdefault((finding.rule, image.crash, *way), []).append((image, finding))
    return [_described(trace, members) for members in groups.values()]


def _described(trace: Trace, members: list[tuple[Image, Finding]]) -> tuple[Image, Finding]:
    image, finding = min(members, key=lambda member: (len(member[0].lost), len(member[0].done)))
    last = image.done[-1] if image.done else -1
    when = "the save has returned" if image.is_after_return else _numbered(trace, last) if image.done else "the start"
    facts = [("crash", f"{CRASHES[image.crash]}, after {when}")]
    if behind := _behind(trace, image):
        facts.append(("while", behind))
    if image.lost:
        shown = "; ".join(_numbered(trace, number) for number in image.lost[:MAX_LOST_SHOWN])
        more = len(image.lost) - MAX_LOST_SHOWN
        facts.append(("lost", shown + (f"; and {more} more" if more > 0 else "")))
    facts.append(("missing", missing_order(trace, image)))
    facts += finding.facts
    facts.append(("images", f"{len(members)} of this kind"))
    culprit = image.lost[0] if image.lost else last
    operation = str(trace[culprit]) if culprit >= 0 else "nothing"
    what = f"{image.crash}: {finding.headline}, {'without' if image.lost else 'after'} {operation}"
    return image, Finding(finding.rule, what, tuple(facts), step=finding.step)


def _behind(trace: Trace, image: Image) -> str:
    """Returns in words which ranks had not come as far as in the run that was traced."""
    done = set(image.done)
    late = {trace[n].rank: n for n in reversed(range(image.done[-1] if image.done else 0)) if n not in done}
    return ", ".join(f"rank {rank} has not come to {_numbered(trace, number)}" for rank, number in sorted(late.items()))


def missing_order(trace: Trace, image: Image) -> str:
    """Returns in words the ordering that would have kept the law."""
    if not image.lost:
        path = trace[image.done[-1]].path if image.done else ""
        return f"what a committed checkpoint needs ({path or 'its folder'}) must stay until another one is committed"
    last = image.done[-1]
    before = "before the save returns" if image.is_after_return else f"before {_numbered(trace, last)}"
    return f"{_sync_for(trace[image.lost[0]])} after operation {image.lost[0]}, {before}"


def _sync_for(operation: Operation) -> str:
    if isinstance(operation, MakeFolder | Rename | Link | Unlink | RemoveFolder):
        path = operation.target if isinstance(operation, Rename | Link) else operation.path
        return f"an fsync of the folder {path.rpartition('/')[0] or '.'!r}"
    if isinstance(operation, OpenFile):
        return f"an fsync of {operation.path!r}, and of its folder,"
    return f"an fsync of {operation.path!r}"


def _numbered(trace: Trace, number: int) -> str:
    return f"operation {number} ({trace[number]})"
