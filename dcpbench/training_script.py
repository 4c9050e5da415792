"""Turns a case of training into a standalone script: `standalone_training.py` with all of ours that it needs above it.

What builds and trains a model is the same code that the suites run, so that the script shows the same.
"""

from __future__ import annotations

import ast
import pprint
import re
from pathlib import Path
from typing import Final

from dcpbench.errors import expected
from dcpbench.models.case import TrainingCase

__all__ = ["as_training_script"]

_MODULES: Final = ("tree", "case", "modules", "parallel", "places", "loop", "app")
_ENGINES: Final = {"torch": "torch.distributed.checkpoint", "reference": "reference"}
_LEFT_OUT: Final = frozenset(("dumps", "id", "setting", "_repr_pretty_", "__all__"))
"""What a script has no use for: how cases become text."""


def as_training_script(case: TrainingCase, backend: str) -> str:
    """Returns the text of a script that shows what ``case`` shows on ``backend``.

    Raises:
        UsageError: the backend is not one that ships.
    """
    if backend not in _ENGINES:
        raise expected(
            f"one of {', '.join(sorted(_ENGINES))}", "--backend", backend, "Adapt the script of one of them."
        )
    here = Path(__file__).parent
    files = [*(here / "models" / f"{name}.py" for name in _MODULES), here / "standalone_training.py"]
    apart = [_taken_apart(file.read_text(encoding="utf-8")) for file in files]
    body = "\n\n\n".join(body for _, body in apart)
    body = re.sub(r"^CASE = .*$", lambda _: f"CASE = {pprint.pformat(case, width=110)}", body, flags=re.MULTILINE)
    words = set(re.findall(r"\w+", body))
    imports = {line for found, _ in apart for line, name in found if name in words}
    engine = _ENGINES[backend]
    lines = [
        re.sub(r"torch\.distributed\.checkpoint(\S*) as (dcp|functions)$", rf"{engine}\1 as \2", i) for i in imports
    ]
    docstring = f'"""Case {case.id}: run as `python THIS_FILE`. Exits with 1 where the defect shows."""'
    return "\n".join([docstring, "", "from __future__ import annotations", "", *sorted(lines), "", body, ""])


def _taken_apart(text: str) -> tuple[list[tuple[str, str]], str]:
    """Returns what a module imports from elsewhere, a line and a name each, and the rest without its docstring."""
    tree, lines = ast.parse(text), text.splitlines()
    imports, dropped = [], set[int]()

    def drop(node: ast.stmt) -> None:
        first = min((decorator.lineno for decorator in getattr(node, "decorator_list", ())), default=node.lineno)
        dropped.update(range(first, (node.end_lineno or node.lineno) + 1))

    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            drop(node)
            module = getattr(node, "module", None) or ""
            if module != "__future__" and not module.startswith("dcpbench"):
                origin = f"from {module} " if module else ""
                imports += [(f"{origin}import {ast.unparse(a)}", a.asname or a.name.split(".")[0]) for a in node.names]
        elif node is tree.body[0] or _name_of(node) in _LEFT_OUT:
            drop(node)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if _name_of(inner) in _LEFT_OUT:
                    drop(inner)
    kept = "\n".join(line for number, line in enumerate(lines, 1) if number not in dropped).strip("\n")
    return imports, re.sub(r"\n{4,}", "\n\n\n", kept)


def _name_of(node: ast.stmt) -> str:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return getattr(node, "name", "")
