"""What test_pool.py has the ranks do. Imported by ranks, so that it must not need pytest."""

import ctypes
import os
import signal
import sys
import tempfile
import time
from pathlib import Path


def world(rank, world_size):
    """Returns what an all-reduce over all ranks says their number is, and this process's pid."""
    import torch
    import torch.distributed as dist

    assert dist.get_rank() == rank
    assert dist.get_world_size() == world_size
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return int(ones), os.getpid()


def alone(rank, world_size):
    import torch.distributed as dist

    return dist.is_initialized()


def prepared_step(rank, world_size):
    """Returns the number of the step whose state dict was built ahead; None if there is none."""
    from dcpbench.ranks import execute

    prepared = execute._running[0].prepared
    return None if prepared is None else prepared[0]


def leave(rank, world_size, how, ranks):
    """Ranks in ``ranks`` leave as ``how`` says; the others wait for the first of them.

    Not in a barrier: there a rank may wait for another one that waits, and that one has raised and gone no further.
    """
    import torch
    import torch.distributed as dist

    sys.stdout.write(f"rank {rank} was here\n")
    if rank in ranks:
        _LEAVE[how]()
    dist.recv(torch.zeros(1), src=ranks[0])


def sleep_while_one_leaves(rank, world_size, how):
    if rank == 1:
        _LEAVE[how]()
    time.sleep(600)


def value_of_kind(rank, world_size, kind):
    return _VALUES[kind]()


def take(rank, world_size, given):
    return repr(given)


def print_much(rank, world_size, num_mib, how=None):
    line = "x" * 1023 + "\n"
    for _ in range(num_mib * 1024):
        sys.stdout.write(line)
    sys.stdout.write("the last line\n")
    if how:
        _LEAVE[how]()


def resources(rank, world_size):
    world(rank, world_size)
    status = Path("/proc/self/status").read_text()
    resident_kib = int(status.split("VmRSS:")[1].split()[0])
    return len([*Path("/proc/self/fd").iterdir()]), len([*Path("/proc/self/task").iterdir()]), resident_kib, os.getpid()


def break_connect(rank, world_size):
    """Rank 1 cannot take part in any group from now on."""
    import torch.distributed as dist

    def refuse(*_args, **_options):
        raise RuntimeError("no group for me")

    if rank == 1:
        dist.init_process_group = refuse


def pid_then_sleep(rank, world_size, folder):
    (Path(folder) / f"{rank}.pid").write_text(str(os.getpid()))
    time.sleep(600)


class Unloadable:
    def __reduce__(self):
        return _only_on_a_rank, ()


def _only_on_a_rank():
    if "RANK" not in os.environ:
        raise RuntimeError("not in the controller")
    return Unloadable()


class OnlyInTheController:
    def __reduce__(self):
        return _only_in_the_controller, ()


def _only_in_the_controller():
    if "RANK" in os.environ:
        raise RuntimeError("not on a rank")
    return OnlyInTheController()


class Worse(BaseException):
    def __str__(self):
        raise ValueError("no text for you")

    def __reduce__(self):
        raise TypeError("does not travel")


def _raise(error):
    raise error


_LEAVE = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "exit 3": lambda: os._exit(3),
    "exit 0": lambda: os._exit(0),
    "segfault": lambda: ctypes.string_at(0),
    "sleep": lambda: time.sleep(600),
    "raise": lambda: _raise(KeyError("lost key")),
    "raise worse": lambda: _raise(Worse()),
    "sys.exit": lambda: sys.exit(7),
    "interrupt": lambda: _raise(KeyboardInterrupt()),
}

_VALUES = {"lambda": lambda: lambda: None, "unloadable": Unloadable}


def hang_on_one(rank, world_size):
    if rank == 1:
        time.sleep(600)


def temporary_folder(rank, world_size):
    return tempfile.gettempdir()
