"""Damage to the files of a checkpoint, as plain data, and what it makes of a tree. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["KINDS", "Damage", "Target", "damaged", "damages"]

KINDS = (
    *("flip a bit", "change a byte", "zero a block", "move a block", "cut", "extend", "empty"),
    *("swap two files", "copy over another", "delete"),
)
"""Kinds of damage. A block is 512 bytes at a multiple of 512; a moved one takes the place of another of its file."""

Target = Literal["data", "metadata"]

_BLOCK = 512
_MAX_TRIES = 1000


@dataclass(frozen=True)
class Damage:
    """One thing that is done to one file.

    Attributes:
        kind: one of :data:`KINDS`.
        path: the file.
        at: byte, or number of the block, where it is done; the new length where it is cut.
        value: bit of a byte, new byte, other block, or number of bytes to add.
        other: the second file, where there are two.
    """

    kind: str
    path: str
    at: int = 0
    value: int = 0
    other: str = ""


def damaged(tree: Mapping[str, bytes | None], damage: Damage) -> dict[str, bytes | None]:
    """Returns the tree with the damage done to it."""
    after = dict(tree)
    content = bytearray(tree[damage.path] or b"")
    start, stop = damage.at * _BLOCK, (damage.at + 1) * _BLOCK
    match damage.kind:
        case "flip a bit":
            content[damage.at] ^= 1 << damage.value
        case "change a byte":
            content[damage.at] = damage.value
        case "zero a block":
            content[start:stop] = bytes(len(content[start:stop]))
        case "move a block":
            block = content[start:stop]
            content[damage.value * _BLOCK : damage.value * _BLOCK + len(block)] = block
        case "cut":
            del content[damage.at :]
        case "extend":
            content += bytes(damage.value)
        case "empty":
            content.clear()
        case "swap two files":
            after[damage.other] = bytes(content)
            content = bytearray(tree[damage.other] or b"")
        case "copy over another":
            content = bytearray(tree[damage.other] or b"")
        case "delete":
            del after[damage.path]
            return after
        case _:
            raise ValueError(f"expected a kind of damage but got {damage.kind!r}.")
    after[damage.path] = bytes(content)
    return after


def damages(
    tree: Mapping[str, bytes | None], is_metadata: Mapping[str, bool], count: int, seed: int
) -> list[tuple[Target, Damage]]:
    """Returns ``count`` different kinds of damage, each of which changes the tree: as many to data as to metadata.

    Kinds of which there are only a few, such as removing one file of three, come once each; the others fill up.

    Args:
        tree: the checkpoint.
        is_metadata: of each file whether it is one that describes others.
        count: how many; fewer where there are no more.
        seed: of the choice.
    """
    source = random.Random(seed)
    groups: dict[Target, list[str]] = {"data": [], "metadata": []}
    for path, content in sorted(tree.items()):
        if content:
            groups["metadata" if is_metadata[path] else "data"].append(path)
    found: dict[Damage, Target] = {}
    ways: list[tuple[Target, str]] = [(target, kind) for target, paths in groups.items() if paths for kind in KINDS]
    while len(found) < count and ways:
        for way in list(ways):
            target, kind = way
            new = _new_one(tree, groups[target], kind, source, found)
            if new is None:
                ways.remove(way)
            elif len(found) < count:
                found[new] = target
    return [(target, damage) for damage, target in found.items()]


def _new_one(
    tree: Mapping[str, bytes | None],
    paths: Sequence[str],
    kind: str,
    source: random.Random,
    found: Mapping[Damage, Target],
) -> Damage | None:
    for _ in range(_MAX_TRIES if kind.endswith(("bit", "byte", "cut", "extend")) else _MAX_TRIES // 10):
        damage = _draw(tree, paths, kind, source)
        if damage is not None and damage not in found and damaged(tree, damage) != dict(tree):
            return damage
    return None


def _draw(tree: Mapping[str, bytes | None], paths: Sequence[str], kind: str, source: random.Random) -> Damage | None:
    path = source.choice(paths)
    size = len(tree[path] or b"")
    num_blocks = -(-size // _BLOCK)
    others = [other for other in paths if other > path or (other != path and kind == "copy over another")]
    match kind:
        case "flip a bit":
            return Damage(kind, path, source.randrange(size), source.randrange(8))
        case "change a byte":
            return Damage(kind, path, source.randrange(size), source.randrange(256))
        case "zero a block":
            return Damage(kind, path, source.randrange(num_blocks))
        case "move a block":
            return Damage(kind, path, source.randrange(num_blocks), source.randrange(num_blocks))
        case "cut":
            return Damage(kind, path, source.randrange(size))
        case "extend":
            return Damage(kind, path, value=source.randrange(1, 2 * _BLOCK))
        case "swap two files" | "copy over another":
            return Damage(kind, path, other=source.choice(others)) if others else None
        case _:
            return Damage(kind, path)
