"""Programs in fresh processes, one per rank: for what happens when a process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from rank_pool import free_port

import reference

ROOT = Path(reference.__file__).parent.parent
HEADER = """
    import os, sys, time, warnings, torch, reference
    import torch.distributed as dist
    warnings.simplefilter("ignore")
    rank, world_size, port = (int(word) for word in sys.argv[1:4])
    path = sys.argv[4]
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
"""


def run_script(
    body: str, *words: Any, world_size: int = 1, timeout_s: float = 60, folder: Path | None = None
) -> list[tuple[int, str]]:
    """Run `body` on each rank; return the exit codes and what was written on stderr.

    Args:
        body: Python; has `rank`, `world_size` and `path` (the first of `words`).
        words: from `sys.argv[4]` on.
        world_size: more than one process has a process group.
        timeout_s: for each process.
        folder: write the program into a file here, so that other processes can import it; default: none can.
    """
    code = textwrap.dedent(HEADER) + textwrap.dedent(body)
    program = ["-c", code]
    if folder is not None:
        (folder / "program.py").write_text(code)
        program = [str(folder / "program.py")]
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, *program, *map(str, (rank, world_size, port, *words))],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        for rank in range(world_size)
    ]
    ended = []
    try:
        for process in started:
            error = process.communicate(timeout=timeout_s)[1]
            ended.append((process.returncode, error))
    finally:
        for process in started:
            process.kill()
            process.wait()
    return ended
