"""Runs on a rank: the program of one rank, from its greeting to its end.

    connect -> Hello -> Welcome -> { command -> Done } …

The main thread serves commands. A second one only watches the controller, so that the rank ends with it even while the
main thread is blocked in a collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import os
import select
import signal
import socket
import sys
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from dcpbench.messages import Call, Done, Hello, Observation, RunStep, Welcome
from dcpbench.ranks import frames
from dcpbench.ranks.address import KEY_VARIABLE, OutputOf, connect
from dcpbench.ranks.blanks import blank, report
from dcpbench.ranks.lifetime import die_with_parent
from dcpbench.ranks.link import PhaseFile, stacks_path

if TYPE_CHECKING:
    from dcpbench.ranks.groups import DefaultGroup

__all__ = ["serve"]


def serve(address: str, generation: int) -> None:
    """Serves the controller at ``address`` until it is gone.

    The rank's number is in the environment (``RANK``), the key as well.
    """
    die_with_parent(os.getppid())
    key = bytes.fromhex(os.environ.pop(KEY_VARIABLE))
    rank = int(os.environ["RANK"])
    messages = connect(address, key)
    messages.send(Hello(rank, os.getpid(), socket.gethostname(), generation))
    welcome: Welcome = messages.recv()
    _send_output_to_controller(address, key, rank, generation)
    threading.Thread(target=_end_with_controller, args=(messages,), daemon=True).start()
    sys.path[:] = welcome.sys_path
    path = stacks_path(welcome.stacks_dir, generation, rank)
    with path.open("w") as stacks:
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks)
        # Elastic sends SIGTERM to all as soon as one rank is lost. What the others make of the loss is evidence; the
        # controller ends them when it has it. A handler, unlike SIG_IGN, is not inherited by subprocesses.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.siginterrupt(signal.SIGTERM, False)
        _Rank(rank, messages, welcome, PhaseFile(path)).serve_commands()


class _Rank:
    def __init__(self, rank: int, messages: Connection, welcome: Welcome, phases: PhaseFile) -> None:
        self._rank = rank
        self._messages = messages
        self._welcome = welcome
        self._phases = phases
        self._phase = ""
        self._command: RunStep | Call | None = None

    @functools.cached_property
    def _group(self) -> DefaultGroup:
        from dcpbench.ranks.groups import DefaultGroup

        return DefaultGroup(self._rank, self._welcome.device, self._welcome.connect_timeout_s)

    def serve_commands(self) -> None:
        while True:
            try:
                number, payload = frames.receive(self._messages)
                observation = self._observe(number, payload)
                self._messages.send_bytes(self._packed(number, observation))
                if observation.outcome == "ok":
                    self._prepare()
            except (EOFError, OSError):  # the controller is gone
                return

    def _prepare(self) -> None:
        """Begins with what comes next, while other ranks are busy."""
        if isinstance(self._command, RunStep):
            from dcpbench.ranks.execute import prepare

            with contextlib.suppress(Exception):  # it is done again, and reported, when its time has come
                prepare(self._command, self._rank, self._welcome.device)

    def _observe(self, number: int, payload: bytes) -> Observation:
        """Runs a command and returns what came of it.

        The boundary: whatever the code under test raises becomes an observation here, `BaseException` included, since
        DCP's own ``CheckpointException`` is one.
        """
        self._phase, self._command = "", None
        seen = Observation(self._rank, 0, 0, "call", "ok")
        try:
            command = self._command = frames.unpack(payload)
            seen = blank(command, self._rank)
            return self._run(number, command, seen)
        except BaseException as error:
            return replace(seen, outcome="raised", phase=self._phase, error=report(error))

    def _run(self, number: int, command: RunStep | Call, seen: Observation) -> Observation:
        def enter_phase(name: str) -> None:
            self._phase = name
            self._phases.write(number, name)

        if command.distributed:
            enter_phase("connect")
            keeps_group = isinstance(command, RunStep) and command.keeps_group
            self._group.connect(number, command.world_size, keeps_group=keeps_group)
        else:
            self._group.disconnect()
        try:
            if isinstance(command, RunStep):
                from dcpbench.ranks.execute import run_step

                done = run_step(command, self._rank, enter_phase, self._welcome.device)
                self._group.is_broken |= done.outcome == "raised"
                return done
            enter_phase("call")
            return replace(seen, phase="call", value=_call(command, self._rank))
        except BaseException:
            # Not dropped at once: ranks that wait for this one would be told by the end of its group. Whether they are
            # told by the backend is what we want to know.
            self._group.is_broken = True
            raise

    def _packed(self, number: int, observation: Observation) -> bytes:
        try:
            return frames.pack(number, Done(number, observation))
        except Exception as error:  # a value of a kind that does not travel
            unsent = replace(observation, outcome="raised", value=None, error=report(error))
            return frames.pack(number, Done(number, unsent))


def _call(command: Call, rank: int) -> Any:
    module, _, name = command.target.partition(":")
    return getattr(importlib.import_module(module), name)(rank, command.world_size, **command.arguments)


def _send_output_to_controller(address: str, key: bytes, rank: int, generation: int) -> None:
    """Makes a connection the standard output and error: what a rank prints outlives it, and fills no disk."""
    output = connect(address, key)
    output.send(OutputOf(rank, generation))
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _end_with_controller(messages: Connection) -> None:
    """Ends the process when the controller has closed its side. Runs in a thread of its own."""
    poll = select.poll()
    poll.register(messages.fileno(), select.POLLRDHUP)
    poll.poll()
    os._exit(0)
