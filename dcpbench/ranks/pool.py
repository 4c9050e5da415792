"""Runs in the controller: `RankPool` runs one step after the other on ranks that were started once.

    step --> Exchange with the ranks of this generation --> one Observation per rank
               |
               +-- a rank died or hung: Crew ends the generation and the launcher forks the next

The controller itself never imports torch.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from types import TracebackType
from typing import Self, cast

from dcpbench.case import Case
from dcpbench.case_files import AnyCase
from dcpbench.errors import expected
from dcpbench.messages import Call, Observation, Place, RunStep
from dcpbench.models.case import TrainingStep
from dcpbench.protocol_case import ProtocolCase
from dcpbench.ranks.crew import Crew
from dcpbench.ranks.exchange import Exchange
from dcpbench.steps import Step

__all__ = ["RankPool"]


class RankPool:
    """Ranks that live across cases.

    Not for use by several threads at once. Use it as a context manager, or pair :meth:`start` with :meth:`close`.

    Attributes:
        size: how many ranks there are.
        rank_timeout_s: how long the ranks have for one step; may be changed at any time.
        grace_s: how long the others have to return once a rank is lost.
        grace_after_raise_s: how long the others have to return once a rank has raised.
    """

    def __init__(
        self,
        size: int,
        *,
        device: str = "cpu",
        rank_timeout_s: float = 60.0,
        connect_timeout_s: float = 30.0,
        grace_s: float = 3.0,
        grace_after_raise_s: float = 10.0,
    ) -> None:
        if size < 1:
            raise expected("at least one rank", "size", size, "Give 1 or more.")
        self.size = size
        self.rank_timeout_s = rank_timeout_s
        self.grace_s = grace_s
        self.grace_after_raise_s = grace_after_raise_s
        self._commands = count(1)
        self._cases = count(1)
        self._crew = Crew(size, device, connect_timeout_s)
        self._connected = 0  # the world size of the group that all its ranks left in good order; 0 for none

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Starts the ranks and returns at once; the first step waits until they are ready. Does nothing if started."""
        self._crew.start()

    def close(self) -> None:
        """Ends all ranks, whatever they are doing, and leaves nothing behind. The pool may be started again."""
        self._crew.close()

    def run(
        self,
        case: AnyCase,
        backend: str,
        *,
        load_backend: str | None = None,
        place: Place | None = None,
        on_fresh_group: bool = False,
    ) -> tuple[Observation, ...]:
        """Runs the steps of ``case`` in a fresh folder and returns what each rank saw of each step.

        The first step in which a rank is not "ok" is the last one, but for those that all ranks were to refuse.

        Args:
            case: what to run.
            backend: specification of the backend that saves.
            load_backend: the backend that loads; None for the same.
            place: where checkpoints lie, and the case gets a place of its own; None takes a fresh local folder.
            on_fresh_group: the ranks make a new process group, rather than keep one that served the case before.

        Raises:
            UsageError: the case needs more ranks than there are.
            RanksUnavailable: there are no ranks, and none could be started.
        """
        self._check_size(case.max_world_size)
        root = self._crew.start() / f"case-{next(self._cases)}"
        root.mkdir()
        if on_fresh_group:
            self._connected = 0
        seen: list[Observation] = []
        own = None if place is None else replace(place, prefix=f"{place.prefix}/{root.parent.name}-{root.name}")
        try:
            if isinstance(case, ProtocolCase):  # all of its ranks are virtual, and live in the first one
                arguments = {"case": case, "backend": backend, "root": str(root)}
                return self.step(Call(0, 1, "dcpbench.simulate.run:run_on_rank", arguments, distributed=False))
            steps: Sequence[Step | TrainingStep] = case.steps
            for number, step in enumerate(steps):
                layout = case.layouts[step.layout]
                specification = load_backend or backend if step.action == "load" else backend
                command = RunStep(
                    command=0,
                    world_size=layout.world_size,
                    case=cast("Case", case),  # to the ranks, steps and layouts of either kind read alike
                    step=number,
                    backend=specification,
                    root=str(root),
                    distributed=layout.distributed,
                    place=own,
                )
                observations = self._step(command, continues=number > 0)
                seen += observations
                outcomes = {observation.outcome for observation in observations}
                if outcomes != {"ok"} and (step.misuse == "none" or outcomes != {"raised"}):
                    break
        finally:
            shutil.rmtree(root, ignore_errors=True)
        return tuple(seen)

    def step(self, command: RunStep | Call) -> tuple[Observation, ...]:
        """Runs a command on ranks 0 to ``world_size`` - 1 and returns one observation per rank, in rank order.

        The command's number is given by the pool. Where the ranks could not connect to each other, the command is tried
        once again on fresh ranks before the answer is "unconnected".

        Raises:
            UsageError: the command needs more ranks than there are.
            RanksUnavailable: there are no ranks, and none could be started.
        """
        return self._step(command, continues=False)

    def _step(self, command: RunStep | Call, *, continues: bool) -> tuple[Observation, ...]:
        self._check_size(command.world_size)
        observations = self._attempt(command, continues=continues)
        if _deserves_another_try(observations, continues=continues):
            observations = self._attempt(command, continues=False)
        return observations

    def _attempt(self, command: RunStep | Call, *, continues: bool) -> tuple[Observation, ...]:
        links = self._crew.muster(as_they_are=continues)
        command = replace(command, command=next(self._commands))
        if isinstance(command, RunStep):
            command = replace(command, keeps_group=command.distributed and command.world_size == self._connected)
        self._connected = 0
        exchange = Exchange(command, links[: command.world_size])
        try:
            exchange.run(self.rank_timeout_s, self.grace_s, self.grace_after_raise_s)
            if exchange.lost or exchange.hung:
                exit_codes = self._crew.end_generation()
                launcher_is_lost = exit_codes is None
                observations = exchange.observations(exit_codes or {})
            else:
                launcher_is_lost = False
                observations = exchange.observations({})
            observations = tuple(_judged_connect(o, launcher_is_lost=launcher_is_lost) for o in observations)
        except BaseException:  # Ctrl-C, say: the ranks are in the middle of something
            self._crew.renew()
            raise
        if exchange.lost or exchange.hung or any(o.outcome == "unconnected" for o in observations):
            self._crew.renew()
        elif command.distributed and all(o.outcome == "ok" for o in observations):
            self._connected = command.world_size
        return observations

    def _check_size(self, world_size: int) -> None:
        if world_size > self.size:
            raise expected(
                f"at most {self.size} ranks", "world_size", world_size, f"Give --world-size={world_size} or more."
            )


def _deserves_another_try(observations: tuple[Observation, ...], *, continues: bool) -> bool:
    """Reads as: the command failed before it began, on a rank at least, and it may be run again.

    A rank that died without entering a phase died before the command reached it: within a case that belongs to the step
    before, elsewhere to no one.
    """
    died_in = {o.phase for o in observations if o.outcome == "died"}
    if died_in:
        return died_in == {""} and not continues
    return any(o.outcome == "unconnected" and o.phase in ("", "connect") for o in observations)


def _judged_connect(seen: Observation, *, launcher_is_lost: bool) -> Observation:
    """Returns the observation as "unconnected" where it says nothing of the backend."""
    if seen.outcome == "ok":
        return seen
    if launcher_is_lost or (seen.phase == "connect" and seen.outcome in ("raised", "hung")):
        return replace(seen, outcome="unconnected")
    return seen
