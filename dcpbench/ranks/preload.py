"""Runs in the fork server, before any rank: pays for the imports once, so that a new rank costs milliseconds.

Importing this module ties the fork server's life to the launcher's and imports torch. Nothing but
:mod:`dcpbench.ranks.launcher` shall name it, and nothing here may start a thread or touch a device: threads and CUDA
contexts do not survive the fork.
"""

from __future__ import annotations

import gc
import importlib
import os
from typing import Final

from dcpbench.ranks.lifetime import LAUNCHER_VARIABLE, die_with_parent

__all__: list[str] = []

_MODULES: Final = (
    "torch._dynamo",  # the first DTensor would have every rank import it
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.elastic.multiprocessing.errors",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "dcpbench.ranks.execute",
    "dcpbench.ranks.groups",
    "dcpbench.ranks.worker",
)

if (launcher := os.environ.get(LAUNCHER_VARIABLE)) is not None:
    die_with_parent(int(launcher))

# Collecting while modules load costs a tenth of the time, and finds nothing.
gc.disable()
try:
    for name in _MODULES:
        importlib.import_module(name)
finally:
    gc.enable()
# What is alive now stays alive; frozen, it is not looked at again in every rank, and its pages stay shared.
gc.freeze()
