"""`dcpbench conformance`: the suites on one or more backends, from a checkout or a wheel, to a certificate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dcpbench.backends import registry
from dcpbench.suites_folder import SUITES

__all__ = ["conformance"]


def conformance(
    backends: Sequence[str], folder: Path, *, world_size: int = 4, profile: str = "quick", more: Sequence[str] = ()
) -> int:
    """Runs the suites on ``backends`` and writes the certificate to ``folder``; returns pytest's exit code.

    Args:
        backends: specifications; their modules may lie in the current folder.
        folder: takes the certificate, the records and the failures.
        world_size: how many ranks.
        profile: how many cases.
        more: further arguments of pytest.

    Raises:
        UsageError: a specification is misspelt.
    """
    import pytest

    for backend in backends:
        registry.check_spelling(backend)
    if "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as for `python -m`; the ranks take over this path
    arguments = [
        str(SUITES),
        "-p",
        "dcpbench.plugin",
        "-p",
        "no:cacheprovider",
        "--rootdir=.",
        f"--world-size={world_size}",
        f"--profile={profile}",
        f"--results={folder}",
        f"--certificate={folder}",
        *(f"--backend={backend}" for backend in backends),
        *more,
    ]
    return int(pytest.main(arguments))
