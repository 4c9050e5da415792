"""Runs in the controller: what the ranks say of the backends under test, and the places that those bring.

The controller imports no backend. A rank describes each one; a process of its own enters its location.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcpbench import codec
from dcpbench.backends.parts import names_in
from dcpbench.errors import UsageError, expected
from dcpbench.messages import Call, Place
from dcpbench.ranks.pool import RankPool

__all__ = ["BackendsSeen"]

_ENDS_WITHIN_S = 20.0
_PROBE = "dcpbench.backends.lineage:describe"
_PROBE_TIMEOUT_S = 10.0


@dataclass
class BackendsSeen:
    """What is known of each backend of a run, asked for when it is first needed.

    Attributes:
        pool: gives the ranks.
        described: what a rank said of each backend (:func:`dcpbench.backends.registry.describe`).
    """

    pool: Callable[[], RankPool]
    described: dict[str, dict[str, Any]] = field(default_factory=dict)
    _places: dict[str, tuple[subprocess.Popen[str], Place]] = field(default_factory=dict)

    def of(self, backend: str) -> Mapping[str, Any]:
        """Returns what a rank says of a backend.

        Raises:
            UsageError: it cannot be imported or opened; the text is one line.
        """
        if backend not in self.described:
            target = "dcpbench.backends.registry:describe"
            (seen,) = self.pool().step(Call(0, 1, target, {"specification": backend}, distributed=False))
            if seen.outcome != "ok":
                reason = seen.error.text.strip().splitlines()[0] if seen.error else seen.outcome
                raise UsageError(
                    f"Expected backend {backend!r} to open but its rank {seen.outcome}: {reason}. Mend it."
                )
            if "problem" in seen.value:
                raise UsageError(seen.value["problem"])
            self.described[backend] = seen.value
        return self.described[backend]

    def check_device(self, backend: str, device: str) -> None:
        """Checks that a backend opens, and that torch sees the device that it is to be run on.

        Raises:
            UsageError: one or the other is not so; the text is one line.
        """
        found = self.of(backend)
        if device == "cuda" and not found["num_cuda_devices"]:
            raise expected("a CUDA device", "--device", "cuda", "Give --device=cpu, or run where torch sees a GPU.")

    def torch_parts(self, backend: str) -> tuple[str, ...]:
        """Returns what of torch a backend is built on; nothing, where finding out ends the ranks or hangs.

        It is looked at in one process and on two ranks: either may be what the backend does not support.
        """
        pool, found = self.pool(), set[str]()
        patience_s = pool.rank_timeout_s
        pool.rank_timeout_s = min(patience_s, _PROBE_TIMEOUT_S)
        try:
            for world_size in range(1, min(2, pool.size) + 1):
                with tempfile.TemporaryDirectory(prefix="dcpbench-", ignore_cleanup_errors=True) as folder:
                    arguments = {"specification": backend, "folder": folder}
                    call = Call(0, world_size, _PROBE, arguments, distributed=world_size > 1)
                    found |= {part for seen in pool.step(call) if seen.outcome == "ok" for part in seen.value}
        finally:
            pool.rank_timeout_s = patience_s
        return tuple(sorted(found))

    def declared(self, backend: str) -> frozenset[str]:
        """Returns the capabilities that a backend declares absent."""
        return frozenset(self.of(backend)["declared"])

    def absent(self, backend: str) -> frozenset[str]:
        """Returns the capabilities that a backend lacks, by its word or since they do not show."""
        return frozenset(self.of(backend)["absent"])

    def place(self, backend: str) -> Place | None:
        """Returns where a backend's checkpoints lie; None for fresh local folders.

        Raises:
            UsageError: the location of the backend cannot be entered.
        """
        if not any(self.of(name)["has_location"] for name in names_in(backend)):
            return None
        if backend not in self._places:
            self._places[backend] = _entered(backend)
        return self._places[backend][1]

    def close(self) -> None:
        """Leaves all locations that were entered, and waits until they are left."""
        for process, _ in self._places.values():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()
        for process, _ in self._places.values():
            try:
                process.wait(_ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._places.clear()


def _entered(backend: str) -> tuple[subprocess.Popen[str], Place]:
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", "dcpbench.backends.location", backend],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,  # Ctrl-C is for the controller, which then closes what this process waits for
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    answer = json.loads(line) if line else {"problem": "its process ended"}
    if "prefix" in answer:
        return process, codec.from_json(Place, answer, "location")
    process.communicate()
    raise UsageError(f"Expected the location of backend {backend!r} to be entered but {answer['problem']}. Mend it.")
