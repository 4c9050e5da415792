"""Bulk steps without the cyclic garbage collector.

Planning makes many objects and no cycles. The collector, which goes by the number of new objects, walks all objects of
the process meanwhile, in vain; with what torch alone brings along that takes longer than the planning.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

__all__ = ["gc_paused", "gc_paused_in_main_thread"]

_lock = threading.Lock()
_num_pauses = 0
_was_enabled = False


@contextmanager
def gc_paused() -> Iterator[None]:
    """Keep the collector from running while the context, or a function decorated with it, does.

    Pauses nest, in several threads as well: the last to end sets the collector going again, if it was. Not for what may
    wait: other threads make garbage meanwhile.
    """
    global _num_pauses, _was_enabled  # noqa: PLW0603  the collector is the process's own
    with _lock:
        if not _num_pauses:
            _was_enabled = gc.isenabled()
            gc.disable()
        _num_pauses += 1
    try:
        yield
    finally:
        with _lock:
            _num_pauses -= 1
            if not _num_pauses and _was_enabled:
                gc.enable()


def gc_paused_in_main_thread() -> AbstractContextManager[None]:
    """Return a pause for a whole save or load, if the main thread makes it: the program then waits for it anyway.

    Any other thread may wait for ever while the program goes on: there, steps that cannot wait are paused one by one.
    """
    return gc_paused() if threading.current_thread() is threading.main_thread() else nullcontext()
