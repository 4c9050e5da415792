"""Real ranks on gloo: started once for a module of tests, each runs functions on command."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from virtual_ranks import noise


class Ranks:
    """`world_size` processes with a default process group.

    Args:
        world_size: how many.
        set_up: called on each rank once its group is there; a function of a module.
        timeout_s: after which a rank that has not answered was left waiting.
    """

    def __init__(self, world_size: int, set_up: Callable[[], None] | None = None, timeout_s: float = 60) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed.checkpoint", "torch.distributed.tensor"])
        port = free_port()
        self.world_size, self._timeout_s = world_size, timeout_s
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            # No daemons: those may not have children, which saving in another process needs.
            process = context.Process(target=_rank_main, args=(rank, world_size, port, there, set_up))
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[tuple[str, Any]]:
        """Run `function` on all ranks; return `("ok", value)` or `(class of the error, traceback)` for each."""
        for pipe in self._pipes:
            pipe.send((function, args))
        deadline = time.monotonic() + self._timeout_s
        results = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(max(0, deadline - time.monotonic())), f"rank {rank} was left waiting in {function}"
            results.append(pipe.recv())
        return results

    def values(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function` on all ranks and return its values."""
        results = self(function, *args)
        assert [kind for kind, _ in results] == ["ok"] * self.world_size, results
        return [value for _, value in results]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _rank_main(rank: int, world_size: int, port: int, pipe: Any, set_up: Callable[[], None] | None) -> None:
    init_gloo(rank, world_size, port)
    if set_up is not None:
        set_up()
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(("ok", function(*args)))
        except BaseException as error:
            pipe.send((type(error).__name__, "".join(traceback.format_exception(error))))
    dist.destroy_process_group()


def make_state(placement: Placement, seed: int) -> dict[str, Any]:
    """Return a state dict with a DTensor on a mesh of all ranks, a replicated tensor and an object."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "w": distribute_tensor(noise((7, 4), torch.float32, seed), mesh, [placement]),
        "m": {"r": noise((5,), torch.bfloat16, seed), "o": {"seed": seed}},
    }


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def init_gloo(rank: int, world_size: int, port: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
