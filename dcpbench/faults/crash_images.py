"""Every storage that a crash may leave: the images of a history. Pure.

A crash comes at a *cut*: a set of operations that have been done, with all that they needed. Ranks that have not
heard of each other may be anywhere, so that cuts are more than the moments of the one run that was traced. At each cut
there are three kinds of crash, each allowing more than the one before:

``kill``
    The processes end, the machine goes on: what was done is there, and of a write that was under way a part.
``ext4``
    Power is lost under ext4 with its default options (``data=ordered``, delayed allocation, ``auto_da_alloc``). Names,
    and sizes that shrink, reach the disk in the order in which they were made, and any fsync takes all earlier ones
    along. Appended bytes come in order, after which the size grows; bytes that replace others come in any order. A file
    that is renamed over another, or was emptied and then closed, has its bytes on disk before any later name.
``posix``
    Power is lost under what POSIX promises, and no more: an fsync makes durable the content of one file, or the names
    in one folder. All else may be there or not, in any combination, torn, or as zeros. A rename is never half done.

Where POSIX leaves too many combinations, at each cut these are taken: nothing but what is durable; all; each effect
alone; all but each one, and but each two of at most `MAX_EFFECTS_FOR_PAIRS`; names without bytes; bytes without names;
all names up to each, with and without bytes; each page of a write torn, and as zeros. Where at most
`MAX_EFFECTS_FOR_ALL` effects are open, it is every combination.

Source: T. S. Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), for effects and their reordering;
the kernel's Documentation/filesystems/ext4 for data=ordered and auto_da_alloc; fsync(2) for names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Literal

from dcpbench.faults.storage_model import Effect, History, PutBytes, SetNames, SetSize, Tree, tree_with

__all__ = ["MAX_CUTS", "MAX_EFFECTS_FOR_ALL", "MAX_EFFECTS_FOR_PAIRS", "Crash", "Image", "cuts_of", "images_of"]

Crash = Literal["kill", "ext4", "posix"]

MAX_CUTS = 1500
MAX_EFFECTS_FOR_ALL = 8
MAX_EFFECTS_FOR_PAIRS = 20


@dataclass(frozen=True)
class Image:
    """What a crash may leave.

    Attributes:
        tree: files and folders.
        crash: the kind that suffices.
        done: numbers of the operations that had been done, in order.
        lost: those of them whose effect is not there, or not whole.
        is_after_return: the save had returned on all ranks.
    """

    tree: Tree
    crash: Crash
    done: tuple[int, ...]
    lost: tuple[int, ...]
    is_after_return: bool

    @property
    def digest(self) -> str:
        """A hash of the tree."""
        return _digest(self.tree)


def _digest(tree: Tree) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for path, content in sorted(tree.items()):
        name = path.encode("utf-8", "surrogateescape")
        hasher.update(b"%d:%b%d:" % (len(name), name, -1 if content is None else len(content)))
        hasher.update(content or b"")
    return hasher.hexdigest()


def cuts_of(history: History) -> list[frozenset[int]]:
    """Returns the sets of operations that may have been done when a crash comes, smallest first.

    Where there are more than :data:`MAX_CUTS`, those of the order that was traced are taken, and those in which one
    operation of it, with all that needs it, has not been done yet.
    """
    total = len(history.trace)
    level, found = {frozenset[int]()}, [frozenset[int]()]
    while level and len(found) <= MAX_CUTS:
        level = {
            cut | {number}
            for cut in level
            for number in range(total)
            if number not in cut and history.needs[number] <= cut
        }
        found += sorted(level, key=sorted)
    if len(found) <= MAX_CUTS:
        return found
    prefixes = [frozenset(range(length)) for length in range(total + 1)]
    return [*prefixes, *(_closed(history, prefix - {late}) for prefix in prefixes for late in prefix)]


def _closed(history: History, cut: frozenset[int]) -> frozenset[int]:
    """Returns the cut without operations that need one outside it."""
    kept: set[int] = set()
    for number in sorted(cut):
        if history.needs[number] <= kept:
            kept.add(number)
    return frozenset(kept)


def images_of(history: History, kinds: Sequence[Crash] = ("kill", "ext4", "posix")) -> list[Image]:
    """Returns each different image once, with the weakest kind of crash and the smallest cut that gives it.

    The storage before the save is among them, and so is the one after it.
    """
    ways = {"kill": _kill, "ext4": _ext4, "posix": _posix}
    found: dict[tuple[str, bool], Image] = {}
    cuts = cuts_of(history)
    seen: set[tuple[tuple[Effect, ...], bool]] = set()
    for kind in kinds:
        for cut in cuts:
            is_after_return = len(cut) == len(history.trace)
            done = [effect for effect in history.effects if effect.operation in cut]
            for kept in ways[kind](history, cut, done):
                if (kept, is_after_return) in seen:
                    continue
                seen.add((kept, is_after_return))
                whole = set(kept)
                lost = tuple(dict.fromkeys(effect.operation for effect in done if effect not in whole))
                image = Image(tree_with(history, kept), kind, tuple(sorted(cut)), lost, is_after_return)
                found.setdefault((image.digest, is_after_return), image)
    return sorted(found.values(), key=lambda image: (kinds.index(image.crash), len(image.done), len(image.lost)))


Kept = tuple[Effect, ...]
Cut = frozenset[int]


def _torn(effect: PutBytes) -> PutBytes:
    return replace(effect, data=effect.data[: len(effect.data) // 2])


def _zeroed(effect: PutBytes) -> PutBytes:
    return replace(effect, data=bytes(len(effect.data)))


def _kill(history: History, cut: Cut, done: list[Effect]) -> Iterator[Kept]:
    yield tuple(done)
    for number, needs in enumerate(history.needs):
        if number in cut or not needs <= cut:
            continue
        under_way: list[Effect] = []
        for effect in history.effects:
            if effect.operation == number and isinstance(effect, PutBytes):
                yield _in_order([*done, *under_way, _torn(effect)])
                under_way.append(effect)
                yield _in_order([*done, *under_way])


def _in_order(effects: list[Effect]) -> Kept:
    return tuple(sorted(effects, key=lambda effect: effect.operation))


def _posix(_history: History, cut: Cut, done: list[Effect]) -> Iterator[Kept]:
    pending = [effect for effect in done if cut.isdisjoint(effect.synced_by)]
    if len(pending) <= MAX_EFFECTS_FOR_ALL:
        for choice in product((True, False), repeat=len(pending)):
            gone = {effect for effect, is_kept in zip(pending, choice, strict=True) if not is_kept}
            yield _without(done, gone)
    else:
        names = [effect for effect in pending if isinstance(effect, SetNames)]
        others = [effect for effect in pending if not isinstance(effect, SetNames)]
        yield tuple(done)
        yield _without(done, set(pending))
        yield _without(done, set(others))
        yield _without(done, set(names))
        for effect in pending:
            yield _without(done, {effect})
            yield _without(done, set(pending) - {effect})
            yield _without(done, set(others) - {effect})
        for number in range(len(names)):
            yield _without(done, set(names[number:]))
            yield _without(done, set(names[number:]) | set(others))
        if len(pending) <= MAX_EFFECTS_FOR_PAIRS:
            for pair in combinations(pending, 2):
                yield _without(done, set(pair))
    for effect in pending:
        if isinstance(effect, PutBytes) and effect.data:
            for part in (_torn(effect), _zeroed(effect)):
                yield tuple(part if one is effect else one for one in done)


def _without(done: list[Effect], gone: set[Effect]) -> Kept:
    return tuple(effect for effect in done if effect not in gone)


def _ext4(history: History, cut: Cut, done: list[Effect]) -> Iterator[Kept]:
    journal = [effect for effect in done if not isinstance(effect, PutBytes)]
    synced = frozenset[int]().union(*(history.needs[number] for number in history.syncs if number in cut))
    committed = max((at for at, effect in enumerate(journal, 1) if effect.operation in synced), default=0)
    writes = [effect for effect in done if isinstance(effect, PutBytes)]
    for length in range(committed, len(journal) + 1):
        in_journal = set(journal[:length])
        until = journal[length - 1].operation if length else -1
        may = [effect for effect in writes if _is_reachable(effect, journal[length:])]
        must = {
            effect
            for effect in may
            if not cut.isdisjoint(effect.synced_by) or _is_flushed(history, effect, in_journal, until)
        }
        for data in _ext4_data([effect for effect in may if effect not in must]):
            chosen = {(part.operation, part.offset): part for part in (*data, *must)}
            kept: list[Effect] = []
            for effect in done:
                if isinstance(effect, PutBytes):
                    if (effect.operation, effect.offset) in chosen:
                        kept.append(chosen[effect.operation, effect.offset])
                elif effect in in_journal:
                    kept.append(effect)
            yield tuple(kept)


def _is_reachable(effect: PutBytes, uncommitted: Sequence[Effect]) -> bool:
    """Reads as: no change of the file's size, nor its making, that came before the write is still out."""
    for other in uncommitted:
        if other.operation < effect.operation:
            if isinstance(other, SetSize) and other.file == effect.file:
                return False
            if isinstance(other, SetNames) and other.changes[0][2] == effect.file:
                return False
    return True


def _is_flushed(history: History, effect: PutBytes, in_journal: set[Effect], until: int) -> bool:
    """Reads as: ext4 has put the bytes on disk before a name that is there."""
    if any(
        isinstance(other, SetNames)
        and other.replaced is not None
        and other.operation > effect.operation
        and other.changes[-1][2] == effect.file
        for other in in_journal
    ):
        return True
    was_emptied = any(
        isinstance(other, SetSize) and other.file == effect.file and not other.size for other in in_journal
    )
    return was_emptied and any(
        file == effect.file and effect.operation < number < until for number, file in history.closes
    )


def _ext4_data(pending: list[PutBytes]) -> Iterator[list[PutBytes]]:
    """Yields what may be there of the bytes that nobody has waited for."""
    yield pending
    yield []
    for effect in pending:
        earlier = pending[: pending.index(effect)]
        before = [one for one in earlier if one.file == effect.file]
        others = [one for one in pending if one.file != effect.file]
        if effect.appends:
            cut = [*others, *before]
            yield cut
            yield before
            yield [*cut, _torn(effect)]
        else:
            yield [one for one in pending if one is not effect]
            yield [effect]
            yield [_torn(effect) if one is effect else one for one in pending]
