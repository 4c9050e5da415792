"""Drives one generator per virtual rank, in any legal order, and answers the collectives that they ask for.

A rank goes on until it asks for a collective whose answer is not there yet. What it gives travels as it would between
processes: pickled and unpickled, unless that is switched off. A rank that leaves as if killed takes along those that
wait for it, as a process group does; ranks that wait for one that has ended otherwise wait for ever, which is reported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from dcpbench.simulate.fibres import Fibre, Killed, Paused
from reference.collectives import Broadcast, Gather, Message, Request, Scatter, pack, unpack

__all__ = ["Choose", "End", "Run", "drive", "every_order", "follow", "in_order"]

Choose = Callable[[Sequence[int]], int]
"""Given the ranks that can go on, returns which position goes on."""


class RankLost(Exception):
    """Raised in a rank that waits for one that is gone, as a process group would."""


@dataclass(frozen=True)
class End:
    """How a rank ended: what it returned or raised; "died" if it was stopped for good, "stuck" if it waits for ever."""

    outcome: Literal["ok", "raised", "died", "stuck"]
    value: Any = None


@dataclass
class Run:
    """What came of a drive.

    Attributes:
        ends: by rank.
        order: the ranks in the order of their turns.
        problem: why some wait for ever, or which different collectives they asked for; "" where all went well.
    """

    ends: list[End]
    order: list[int] = field(default_factory=list)
    problem: str = ""

    def values(self) -> list[Any]:
        """Returns what each rank returned.

        Raises:
            Whatever the first rank raised that did not return.
        """
        for end in self.ends:
            if isinstance(end.value, BaseException):
                raise end.value
        if self.problem:
            raise RuntimeError(self.problem)
        return [end.value for end in self.ends]


def in_order(_ready: Sequence[int]) -> int:
    """Chooses the rank that has been able to go on for longest; to begin with, the lowest."""
    return 0


def follow(schedule: Sequence[int]) -> Choose:
    """Returns what chooses by ``schedule``, each number modulo the ranks that can go on; after its end, the first."""
    left = iter(schedule)
    return lambda ready: next(left, 0) % len(ready)


def drive(
    protocols: Sequence[Generator[Request, Any, Any]],
    choose: Choose = in_order,
    *,
    coordinator: int = 0,
    is_pickled: bool = True,
    is_fine: bool = False,
) -> Run:
    """Drives all ranks to their ends.

    Args:
        protocols: one generator of requests per rank.
        choose: which rank goes on, of those that can.
        coordinator: the rank that gathers, scatters and broadcasts.
        is_pickled: what ranks say travels as bytes; False hands objects over, which is faster and takes less memory.
        is_fine: ranks may also be changed at each call that pauses (see `fibres`).
    """
    return _Drive(protocols, choose, coordinator, is_pickled=is_pickled, is_fine=is_fine).run()


def every_order(make: Callable[[Choose], Any], limit: int = 1_000_000) -> Iterator[Any]:
    """Yields what ``make`` returns for each legal order, each once: a walk through the tree of all choices.

    Args:
        make: runs the ranks anew with the choices that it is given.
        limit: of runs.
    """
    prefix: list[int] = []
    for _ in range(limit):
        taken: list[tuple[int, int]] = []

        yield make(functools.partial(_next_choice, prefix, taken))
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        prefix = [at for at, _ in taken]
        prefix[-1] += 1


def _next_choice(prefix: list[int], taken: list[tuple[int, int]], ready: Sequence[int]) -> int:
    at = prefix[len(taken)] if len(taken) < len(prefix) else 0
    taken.append((at, len(ready)))
    return at


@dataclass(slots=True)
class _Round:
    """One collective: what the ranks have given so far, and who waits for the answer."""

    given: dict[int, Request] = field(default_factory=dict)
    sent: dict[int, bytes] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)


class _Drive:
    def __init__(
        self, protocols: Sequence[Any], choose: Choose, coordinator: int, *, is_pickled: bool, is_fine: bool
    ) -> None:
        self._fibres = [Fibre(protocol, is_fine=is_fine) for protocol in protocols]
        self._choose, self._coordinator, self._is_pickled = choose, coordinator, is_pickled
        num_ranks = len(protocols)
        self._answers: list[Any] = [None] * num_ranks
        self._at = [0] * num_ranks
        self._rounds: list[_Round] = []
        self._ready = list(range(num_ranks))
        self._ends: list[End | None] = [None] * num_ranks
        self._gone: set[int] = set()
        self._run = Run([])

    def run(self) -> Run:
        try:
            while self._ready:
                rank = self._ready.pop(self._choose(self._ready) if len(self._ready) > 1 else 0)
                self._run.order.append(rank)
                self._turn(rank)
                if not self._ready:
                    self._release_the_lost()
        finally:
            for fibre in self._fibres:
                fibre.close()
        stuck = [rank for rank, end in enumerate(self._ends) if end is None]
        if stuck and not self._run.problem:
            asked = self._rounds[self._at[stuck[0]] - 1].given[stuck[0]]
            self._run.problem = f"ranks {stuck[:8]} wait for ever in {type(asked).__name__.lower()} {asked.step!r}"
        self._run.ends = [end if end is not None else End("stuck") for end in self._ends]
        return self._run

    def _turn(self, rank: int) -> None:
        answer, self._answers[rank] = self._answers[rank], None
        try:
            asked = self._fibres[rank].go_on(answer)
        except StopIteration as stop:
            self._ends[rank] = End("ok", stop.value)
        except Killed:
            self._ends[rank] = End("died")
            self._gone.add(rank)
        except BaseException as error:
            self._ends[rank] = End("raised", error)
            if isinstance(error, RankLost):
                self._gone.add(rank)
        else:
            if isinstance(asked, Paused):
                self._ready.append(rank)
            else:
                self._take(rank, asked)

    def _take(self, rank: int, asked: Request) -> None:
        number = self._at[rank]
        self._at[rank] += 1
        if number == len(self._rounds):
            self._rounds.append(_Round())
        held = self._rounds[number]
        other = next(iter(held.given.items()), (rank, asked))
        held.given[rank] = asked
        if (type(other[1]), other[1].step) != (type(asked), asked.step):
            self._run.problem = self._run.problem or (
                f"rank {other[0]} asks for {type(other[1]).__name__.lower()} {other[1].step!r} where "
                f"rank {rank} asks for {type(asked).__name__.lower()} {asked.step!r}"
            )
            return
        if isinstance(asked, Gather):
            self._gather(rank, held, asked)
        else:
            self._hand_out(rank, held, asked)

    def _gather(self, rank: int, held: _Round, asked: Gather) -> None:
        if rank != self._coordinator:
            if self._is_pickled:
                held.sent[rank] = pack(asked.message, rank, asked.step)[0]
            self._release(rank, None)
        if len(held.given) == len(self._fibres):
            self._release(self._coordinator, [self._gathered(held, one) for one in range(len(self._fibres))])
            held.given, held.sent = {self._coordinator: held.given[self._coordinator]}, {}
        elif rank == self._coordinator:
            held.waiting.append(rank)

    def _gathered(self, held: _Round, rank: int) -> Message:
        asked = cast(Gather, held.given[rank])
        if rank == self._coordinator or not self._is_pickled:
            return asked.message
        return unpack(held.sent[rank], rank, asked.step)

    def _hand_out(self, rank: int, held: _Round, asked: Scatter | Broadcast) -> None:
        if rank == self._coordinator:
            self._send(held, asked)
            for one in (rank, *held.waiting):
                self._release(one, self._answer(held, one))
        elif self._coordinator in held.given:
            self._release(rank, self._answer(held, rank))
        else:
            held.waiting.append(rank)

    def _send(self, held: _Round, asked: Scatter | Broadcast) -> None:
        if not self._is_pickled:
            return
        if isinstance(asked, Broadcast):
            assert asked.message is not None
            held.sent[-1] = pack(asked.message, self._coordinator, asked.step)[0]
            return
        for rank, message in enumerate(asked.messages or ()):
            held.sent[rank] = pack(message, self._coordinator, asked.step)[0]

    def _answer(self, held: _Round, rank: int) -> Message:
        asked = cast(Scatter | Broadcast, held.given[self._coordinator])
        if isinstance(asked, Broadcast):
            assert asked.message is not None
            own = asked.message
        else:
            assert asked.messages is not None
            own = asked.messages[rank]
        if rank == self._coordinator or not self._is_pickled:
            return own
        return unpack(held.sent[-1 if isinstance(asked, Broadcast) else rank], rank, asked.step)

    def _release(self, rank: int, answer: Any) -> None:
        self._answers[rank] = answer
        self._ready.append(rank)

    def _release_the_lost(self) -> None:
        """Tells ranks that wait for one that is gone; all others have gone as far as they can."""
        if not self._gone or self._run.problem:
            return
        for rank, end in enumerate(self._ends):
            if end is None:
                self._answers[rank] = RankLost(f"rank {min(self._gone)} is gone")
                self._ready.append(rank)
        # whoever still waits has been told; a rank that goes on waiting is stuck
        self._gone = set()
