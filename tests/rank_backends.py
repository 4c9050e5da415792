"""Backends whose ranks crash after their step, or that need a process group, or none; only ranks import torch."""

import os
import threading
import time

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from dcpbench.backends.protocol import EngineBackend


def _crash_soon(state_dict, checkpoint_id):
    if dist.get_rank() == 1:
        threading.Timer(0.05, os._exit, (3,)).start()


def _take_long(state_dict, checkpoint_id):
    time.sleep(600)


crashes_later = EngineBackend("crashes-later", _crash_soon, _take_long)


def _save_as_rank(state_dict, checkpoint_id):
    assert dist.get_rank() < dist.get_world_size()
    dcp.save(state_dict, checkpoint_id=checkpoint_id)


def _save_alone(state_dict, checkpoint_id):
    assert not dist.is_initialized()
    dcp.save(state_dict, checkpoint_id=checkpoint_id)


def _load(state_dict, checkpoint_id):
    dcp.load(state_dict, checkpoint_id=checkpoint_id)


asks_for_its_rank = EngineBackend("asks-for-its-rank", _save_as_rank, _load)
asks_for_no_group = EngineBackend("asks-for-no-group", _save_alone, _load)
