"""A small folder as plain data: contents by path relative to it, None for a folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

__all__ = ["put_tree", "read_tree"]


def put_tree(root: Path, tree: Mapping[str, bytes | None]) -> None:
    """Makes a folder hold exactly what ``tree`` says."""
    for entry in root.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    for path, content in sorted(tree.items()):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def read_tree(root: Path) -> dict[str, bytes | None]:
    """Returns what a folder holds."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in sorted(root.rglob("*"))
    }
