"""Runs in the controller: one command on the ranks, from sending it to one observation per rank.

While it waits it takes in what ranks say and print, and notices ranks that die. Ranks that are still out when time is
up are asked for their stacks. What a lost rank's exit code was is known only later, when its whole generation is gone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from signal import Signals

from dcpbench.messages import Call, Done, ErrorReport, Observation, RunStep
from dcpbench.ranks import frames
from dcpbench.ranks.blanks import blank
from dcpbench.ranks.link import RankLink
from dcpbench.ranks.watch import Watch

__all__ = ["Exchange"]


class Exchange:
    """One command under way.

    Attributes:
        lost: ranks that died by themselves, the first one first.
        hung: ranks that were out when time was up.
    """

    def __init__(self, command: RunStep | Call, links: Sequence[RankLink]) -> None:
        self._command = command
        self._links = {link.rank: link for link in links}
        self._done: dict[int, Observation] = {}
        self._dumps: dict[int, str] = {}
        self._limit = ""
        self._raised: int | None = None
        self.lost: list[int] = []
        self.hung: list[int] = []

    def run(self, timeout_s: float, grace_s: float, grace_after_raise_s: float) -> None:
        """Sends the command and waits for the ranks.

        Args:
            timeout_s: how long the ranks have.
            grace_s: how long they have once one of them is lost.
            grace_after_raise_s: how long they have once one of them has raised.
        """
        data = frames.pack(self._command.command, self._command)
        for link in self._links.values():
            link.forget_output()
            link.send(data)
        deadline = time.monotonic() + timeout_s
        self._limit = f"within {timeout_s:g} s"
        watch = Watch(self._links.values())
        while self._waiting():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            had_lost, had_raised = bool(self.lost), self._raised is not None
            for link, is_gone in watch.ready(remaining):
                self._take(link, is_gone=is_gone)
                watch.update(link, is_over=link.rank in self._done or link.rank in self.lost)
            now = time.monotonic()
            if self.lost and not had_lost and now + grace_s < deadline:
                deadline = now + grace_s
                self._limit = f"within {grace_s:g} s after rank {self.lost[0]} was lost"
            if self._raised is not None and not had_raised and now + grace_after_raise_s < deadline:
                deadline = now + grace_after_raise_s
                self._limit = f"within {grace_after_raise_s:g} s after rank {self._raised} raised"
        self._ask_for_stacks()

    def observations(self, exit_codes: Mapping[int, int]) -> tuple[Observation, ...]:
        """Returns what became of the command, in rank order.

        Args:
            exit_codes: by pid, as far as they are known.
        """
        return tuple(self._observation(link, exit_codes) for link in self._links.values())

    def _waiting(self) -> list[RankLink]:
        return [link for rank, link in self._links.items() if rank not in self._done and rank not in self.lost]

    def _take(self, link: RankLink, *, is_gone: bool) -> None:
        for number, payload in link.read():
            if number == self._command.command:
                self._understand(link.rank, payload)
        if is_gone and link.rank not in self._done:
            self.lost.append(link.rank)

    def _understand(self, rank: int, payload: bytes) -> None:
        try:
            message = frames.unpack(payload)
        except Exception as error:  # a class that only the rank can import, or anything else
            text = f"what the rank returned cannot be read here: {type(error).__name__}: {error}"
            seen = blank(self._command, rank, "raised", self._phase(rank))
            self._finish(rank, replace(seen, error=ErrorReport(type(error).__qualname__, text, "")))
            return
        if isinstance(message, Done):
            self._finish(rank, message.observation)

    def _finish(self, rank: int, observation: Observation) -> None:
        self._done[rank] = observation
        if self._raised is None and observation.outcome == "raised":
            self._raised = rank

    def _phase(self, rank: int) -> str:
        return self._links[rank].phase.read(self._command.command)

    def _ask_for_stacks(self) -> None:
        hung = self._waiting()
        self.hung = [link.rank for link in hung]
        for link in hung:
            link.request_stacks()
        self._dumps = {link.rank: link.settled_stacks() for link in hung}

    def _observation(self, link: RankLink, exit_codes: Mapping[int, int]) -> Observation:
        rank = link.rank
        if rank in self._done:
            return replace(self._done[rank], stacks="finished") if self.hung else self._done[rank]
        printed = link.printed()
        last_output = f"\nIts last output:\n{printed}" if printed else ""
        phase = self._phase(rank)
        where = f"rank {rank} (pid {link.pid}), {f'in phase {phase!r}' if phase else 'before its first phase'},"
        if rank in self.lost:
            how = _exit_text(exit_codes.get(link.pid))
            error = ErrorReport(how, f"{where} was lost: {how}.{last_output}", link.stacks())
            return replace(blank(self._command, rank, "died", phase), error=error, stacks=link.stacks())
        stacks = self._dumps[rank]
        error = ErrorReport("Timeout", f"{where} did not return {self._limit}.{last_output}", stacks)
        return replace(blank(self._command, rank, "hung", phase), error=error, stacks=stacks)


def _exit_text(code: int | None) -> str:
    if code is None:
        return "exit code unknown"
    if code >= 0:
        return f"exit code {code}"
    try:
        return Signals(-code).name
    except ValueError:
        return f"signal {-code}"
