"""Sees from within when a storage moves the data, where a backend has a storage. Runs on ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dcpbench.backends.protocol import Backend, StorageBackend

__all__ = ["DataClock"]


class DataClock:
    """Wraps ``write_data`` and ``read_data`` of what a backend makes, and remembers when they began and ended.

    Attributes:
        begin_s, end_s: of the first and the last call since the last :meth:`reset`; 0.0 without any.
    """

    begin_s = end_s = 0.0

    def reset(self) -> None:
        """Forgets what was seen."""
        self.begin_s = self.end_s = 0.0

    def around(self, backend: Backend) -> Backend:
        """Returns ``backend``, looked at; one that is no storage backend as it is."""
        if not isinstance(backend, StorageBackend):
            return backend
        return replace(
            backend,
            writer=self._making(backend.writer, "write_data"),
            reader=self._making(backend.reader, "read_data"),
        )

    def _making(self, factory: Callable[..., Any], name: str) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> Any:
            made = factory(*args, **kwargs)
            setattr(made, name, self._timed(getattr(made, name)))
            return made

        return make

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.begin_s = self.begin_s or time.monotonic()
            future = method(*args, **kwargs)
            if hasattr(future, "wait"):
                future.wait()
            self.end_s = time.monotonic()
            return future

        return timed
