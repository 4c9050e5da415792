"""A virtual rank's thread of control: it goes on until it asks for a collective, or pauses at a call.

Between collectives a generator runs in the caller's own thread. Where ranks are to be changed at each call of a storage
or planner (``is_fine``), each has a thread, and exactly one of all threads runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Any

__all__ = ["Fibre", "Killed", "Paused", "kill", "pause"]


class Killed(BaseException):
    """Stops a virtual rank for good, as SIGKILL would a process; the engine's boundaries do not see it."""


class Paused:
    """What a fibre gives instead of a request: it can go on at any time."""


_PAUSED = Paused()
_own = threading.local()


def pause() -> None:
    """Lets other ranks have a turn, where ranks are changed at each call; otherwise does nothing."""
    stop: Callable[[], None] | None = getattr(_own, "pause", None)
    if stop is not None:
        stop()


class Fibre:
    """Runs one protocol.

    Args:
        protocol: a generator of requests.
        is_fine: :func:`pause` ends a turn.
    """

    def __init__(self, protocol: Generator[Any, Any, Any], *, is_fine: bool) -> None:
        self._protocol = protocol
        self.is_killed = False
        self._thread: _Thread | None = _Thread(self._send) if is_fine else None

    def go_on(self, answer: Any) -> Any:
        """Returns the next request, or `Paused`.

        Args:
            answer: to the request before; an exception is raised there.

        Raises:
            StopIteration: the protocol has returned.
            Killed: the rank has been stopped for good.
        """
        return self._send(answer) if self._thread is None else self._thread.go_on(answer)

    def close(self) -> None:
        """Ends what is left of it."""
        if self._thread is not None:
            self._thread.close()
        self._protocol.close()

    def _send(self, answer: Any) -> Any:
        _own.fibre = self
        try:
            asked = self._protocol.throw(answer) if isinstance(answer, Exception) else self._protocol.send(answer)
        except BaseException:
            if self.is_killed:
                raise Killed from None
            raise
        finally:
            _own.fibre = None
        if self.is_killed:  # the engine has made a message of it, which nobody gets
            raise Killed
        return asked


def kill() -> None:
    """Stops the rank that runs now for good.

    Raises:
        Killed: always.
    """
    fibre: Fibre | None = getattr(_own, "fibre", None)
    if fibre is not None:
        fibre.is_killed = True
    raise Killed


class _Thread:
    def __init__(self, send: Callable[[Any], Any]) -> None:
        self._send = send
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._answer: Any = None
        self._outcome: tuple[str, Any] = ("asked", None)
        self._is_closing = self._is_started = self._is_paused = False
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def go_on(self, answer: Any) -> Any:
        if not self._is_started:
            self._thread.start()
            self._is_started = True
        self._answer = answer
        self._go.release()
        self._back.acquire()
        how, value = self._outcome
        if how == "raised":
            raise value
        return value

    def close(self) -> None:
        if self._is_started and self._thread.is_alive():
            self._is_closing = True
            self._go.release()
            self._thread.join()

    def _serve(self) -> None:
        _own.pause = self._pause
        while True:
            self._go.acquire()
            if self._is_closing:
                return
            try:
                self._outcome = ("asked", self._send(self._answer))
            except BaseException as error:
                self._outcome = ("raised", error)
            has_ended = self._outcome[0] == "raised"
            self._back.release()
            if has_ended:
                return

    def _pause(self) -> None:
        self._outcome = ("asked", _PAUSED)
        self._back.release()
        self._go.acquire()
        if self._is_closing:
            raise Killed
