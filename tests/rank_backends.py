"""A backend for test_pool.py whose ranks crash after their step; only ranks import it, since it needs torch."""

import os
import threading
import time

import torch.distributed as dist

from dcpbench.backends.protocol import EngineBackend


def _crash_soon(state_dict, checkpoint_id):
    if dist.get_rank() == 1:
        threading.Timer(0.05, os._exit, (3,)).start()


def _take_long(state_dict, checkpoint_id):
    time.sleep(600)


crashes_later = EngineBackend("crashes-later", _crash_soon, _take_long)
