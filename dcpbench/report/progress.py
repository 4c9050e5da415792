"""A line of progress on the terminal, beside what pytest prints. Runs in the controller."""

from __future__ import annotations

import contextlib
import os

__all__ = ["Progress"]

_SAVE, _RESTORE = "\0337", "\0338"
_NO_WRAP, _WRAP = "\033[?7l", "\033[?7h"
_ERASE_REST_OF_LINE = "\033[K"


class Progress:
    """Called with a text, shows it to the right of the cursor, which stays where it is; an empty text takes it away.

    pytest captures standard output while a test runs, so this goes to the controlling terminal itself; without one
    nothing is shown.
    """

    def __init__(self) -> None:
        self._terminal: int | None = None
        with contextlib.suppress(OSError):
            self._terminal = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY)

    def __call__(self, text: str) -> None:
        if self._terminal is None:
            return
        shown = f"{_SAVE}{_NO_WRAP}{_ERASE_REST_OF_LINE}{f'  {text}' if text else ''}{_WRAP}{_RESTORE}"
        with contextlib.suppress(OSError):
            os.write(self._terminal, shown.encode())
