"""Watches the calls that an engine makes of a storage or a planner: lets ranks take turns, and stops one where told."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from dcpbench.protocol_case import Halt
from dcpbench.simulate.fibres import kill, pause

__all__ = ["PlannedFailure", "Watch"]


@functools.cache
def _signature(function: Callable[..., Any], is_bound: bool) -> inspect.Signature:
    found = inspect.signature(function)
    return found.replace(parameters=list(found.parameters.values())[1:]) if is_bound else found


class PlannedFailure(RuntimeError):
    """Raised in a call, on purpose."""


@dataclass
class Watch:
    """What one rank does in one step.

    Attributes:
        rank: which.
        halt: where it stops; None where it does not, or another rank does.
        is_halted: it has made that call.
        calls: names of the calls so far.
        hooks: given the arguments of a call, by its name, when it begins.
    """

    rank: int
    halt: Halt | None = None
    is_halted: bool = False
    calls: list[str] = field(default_factory=list)
    hooks: dict[str, Callable[..., None]] = field(default_factory=dict)
    _bound: list[tuple[Any, str]] = field(default_factory=list)

    def around(self, name: str, action: Callable[[], Any]) -> Any:
        """Returns what ``action`` returns, as the call ``name``.

        Raises:
            PlannedFailure: the rank was to stop here, with an error.
            Killed: it was to stop here for good.
        """
        pause()
        self.calls.append(name)
        halt = self.halt if self.halt is not None and self.halt.call == name and not self.is_halted else None
        if halt is not None and halt.when == "before":
            self._stop(halt)
        result = action()
        if halt is not None:
            self._stop(halt)
        return result

    def bind(self, part: Any, names: Iterable[str]) -> None:
        """Has the calls ``names`` of ``part`` go through :meth:`around`, but for those that it makes of itself."""
        for name in names:
            method = getattr(part, name)
            setattr(part, name, self._watched(name, method))
            self._bound.append((part, name))

    def release(self) -> None:
        """Gives all that was bound back as it was."""
        for part, name in self._bound:
            vars(part).pop(name, None)
        self._bound.clear()

    def _watched(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        depth = 0

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth:
                return method(*args, **kwargs)
            depth += 1
            try:
                return self.around(name, lambda: self._hooked(name, method, args, kwargs))
            finally:
                depth -= 1

        # what `functools.wraps` does, and the signature found once: engines ask for it in each step
        vars(call).update(getattr(method, "__dict__", {}))
        call.__signature__ = _signature(getattr(method, "__func__", method), hasattr(method, "__self__"))  # type: ignore[attr-defined]
        return call

    def _hooked(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in self.hooks:
            self.hooks[name](*args, **kwargs)
        return method(*args, **kwargs)

    def _stop(self, halt: Halt) -> None:
        self.is_halted = True
        if halt.kind == "dies":
            kill()
        raise PlannedFailure(f"planned failure of {halt.call} on rank {halt.rank}")
