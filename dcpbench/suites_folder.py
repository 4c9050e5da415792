"""Where the suites lie: beside the package in a checkout, inside it when it was installed from a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["SUITES"]

_INSTALLED = Path(__file__).parent / "suites"

SUITES: Final = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "suites"
"""The folder of the suites, with ``known_defects/`` and ``regressions/`` in it."""
