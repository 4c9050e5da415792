"""The line on the terminal that says what a benchmark is doing. Runs in the controller."""

from __future__ import annotations

import sys

__all__ = ["say"]


def say(text: str) -> None:
    """Replaces the line by ``text``; an empty text takes it away. Silent where standard error is no terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
