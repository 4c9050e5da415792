"""Runs in the launcher process: starts generations of ranks with torch elastic, and ends them with the controller.

    controller --socket on stdin--> launcher --forks--> fork server (torch imported once) --forks--> ranks

The controller sends the number of a generation that it wants; the launcher runs it until its ranks are gone and
answers with their exit codes. The end of the socket, or of the controller, is the end of the session.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import shutil
import sys
import threading
import traceback
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Final

from dcpbench.ranks.lifetime import LAUNCHER_VARIABLE, adopt_orphans, end_session, reap_children

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

__all__: list[str] = []

_MONITOR_INTERVAL_S: Final = 0.05
_MAX_LOG_BYTES: Final = 1 << 20


def main(home: str, address: str, num_ranks: int, controller: int) -> None:
    """Serves the controller until it is gone; never returns.

    Args:
        home: the pool's folder; removed at the end.
        address: where the ranks find the controller.
        num_ranks: ranks of each generation.
        controller: the controller's pid.
    """
    channel = _channel_from_stdin()
    adopt_orphans()
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_watch, args=(channel, controller, wanted, home), daemon=True).start()
    try:
        multiprocessing.set_forkserver_preload(["dcpbench.ranks.preload"])
        forkserver.ensure_running()  # it imports torch while this process does
        generations = _Generations(address, num_ranks)
        while True:
            generation = wanted.get()
            exit_codes = generations.run(generation)
            with contextlib.suppress(OSError):  # the controller is gone: the watching thread ends the session
                channel.send((generation, exit_codes))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        _end(home=None)  # the controller reads the log, and then removes the folder


class _Generations:
    """Runs ranks, one generation after the other."""

    def __init__(self, address: str, num_ranks: int) -> None:
        import torch.distributed.launcher.api  # noqa: F401  (in parallel with the fork server)

        logging.disable(logging.ERROR)  # elastic tells of each lost rank with a stack trace; the controller knows
        self._address = address
        self._num_ranks = num_ranks

    def run(self, generation: int) -> dict[int, int]:
        """Returns the exit codes by pid when all ranks of the generation are gone."""
        from torch._C._distributed_c10d import TCPStore
        from torch.distributed.elastic.metrics import api as metrics
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import elastic_launch

        from dcpbench.ranks import worker

        _bound_log()
        # The static rendezvous finds this very server again at its port, which the system chose. A new one for each
        # generation: nothing that a killed rank has left in it can reach the next.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        family = _family(self._num_ranks)
        metrics.configure(family)
        with contextlib.suppress(ChildFailedError, _AllGone):
            elastic_launch(self._config(generation, store.port), worker.serve)(self._address, generation)
        codes: dict[int, int] = family.exit_codes()
        return codes

    def _config(self, generation: int, port: int) -> LaunchConfig:
        from torch.distributed.launcher.api import LaunchConfig

        return LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=self._num_ranks,
            run_id=f"generation-{generation}",
            rdzv_backend="static",
            rdzv_endpoint=f"127.0.0.1:{port}",
            rdzv_configs={"rank": 0, "timeout": 60},
            max_restarts=0,
            monitor_interval=_MONITOR_INTERVAL_S,
            start_method="forkserver",
            logs_specs=_no_logs(),
            shutdown_timeout=1,
        )


class _AllGone(BaseException):
    """Every rank has ended, and not one of them as elastic would have it."""


def _family(num_ranks: int) -> Any:
    """Returns the metric handler that knows the processes of a generation.

    Elastic keeps its processes to itself and tells the exit code of the first lost rank only; nor does it ever return
    if all ranks left with exit code 0 without returning. Its metric handler is the one public hook that runs in its
    own thread, after the start and after each look at the ranks.
    """
    from torch.distributed.elastic.metrics.api import MetricData, MetricHandler

    class Family(MetricHandler):
        def __init__(self) -> None:
            self._processes: dict[int, BaseProcess] = {}

        def emit(self, metric_data: MetricData) -> None:  # noqa: ARG002  (what counts is when it is called)
            if len(self._processes) < num_ranks:
                self._processes |= {child.pid: child for child in multiprocessing.active_children() if child.pid}
            elif not any(process.is_alive() for process in self._processes.values()):
                raise _AllGone

        def exit_codes(self) -> dict[int, int]:
            codes = {pid: process.exitcode for pid, process in self._processes.items()}
            return {pid: code for pid, code in codes.items() if code is not None}

    return Family()


def _no_logs() -> Any:
    """Returns elastic's log settings for ranks that send their output to the controller themselves."""
    from torch.distributed.elastic.multiprocessing import LogsSpecs
    from torch.distributed.elastic.multiprocessing.api import LogsDest

    class NoLogs(LogsSpecs):
        @property
        def root_log_dir(self) -> str:
            return os.devnull

        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            inherited = dict.fromkeys(envs, "")
            for environment in envs.values():
                environment["TORCHELASTIC_ERROR_FILE"] = ""
            return LogsDest(stdouts=inherited, stderrs=dict(inherited), error_files=dict.fromkeys(envs, os.devnull))

    return NoLogs()


def _channel_from_stdin() -> Connection:
    """Takes the socket away from descriptor 0, where the fork server and the ranks would inherit it."""
    channel = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return channel


def _watch(channel: Connection, controller: int, wanted: queue.SimpleQueue[int], home: str) -> None:
    """Hands on what the controller wants, and ends the session with it. Runs in a thread of its own."""
    try:
        # The socket alone does not tell: a process that the controller forked may hold its end open.
        life = os.pidfd_open(controller)
        while life not in wait([channel, life]):
            wanted.put(channel.recv())
    except (EOFError, OSError):
        pass
    finally:
        _end(home)


def _end(home: str | None) -> None:
    end_session(os.getsid(0), awaits_tracker=False)
    reap_children()
    if home is not None:
        shutil.rmtree(home, ignore_errors=True)
    os._exit(0)


def _bound_log() -> None:
    if os.fstat(2).st_size > _MAX_LOG_BYTES:
        os.ftruncate(2, 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
