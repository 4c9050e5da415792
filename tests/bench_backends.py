"""Backends that look good for wrong reasons: each cheats in one way that a benchmark must see. Only ranks import it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.tensor import DTensor

import reference
from dcpbench.backends.protocol import EngineBackend, StorageBackend
from dcpbench.bench.state import RankState

_kept: dict[str, object] = {}


def _save(state_dict, checkpoint_id):
    reference.save(state_dict, checkpoint_id=checkpoint_id)


def _load(state_dict, checkpoint_id):
    reference.load(state_dict, checkpoint_id=checkpoint_id)


def _local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def _save_and_keep(state_dict, checkpoint_id):
    _save(state_dict, checkpoint_id)
    _kept.clear()
    _kept.update({name: copy.deepcopy(_local(value)) for name, value in state_dict.items()})


def _load_what_was_kept(state_dict, checkpoint_id):
    for name, value in state_dict.items():
        _local(value).copy_(_kept[name])


def _load_wrong(state_dict, checkpoint_id):
    _load(state_dict, checkpoint_id)
    for value in state_dict.values():
        if dist.get_rank() == 1 and _local(value).numel():
            _local(value).view(-1).view(torch.uint8)[-1] ^= 1
            return


def _load_but_on_rank_1(state_dict, checkpoint_id):
    own = {n: v.clone() if dist.get_rank() == 1 else v for n, v in state_dict.items()}
    _load(own, checkpoint_id)


def _warm_up_and_load(state_dict, checkpoint_id):
    """Loads, having read the files before the clock could see it: a page cache that was never cold."""
    for path in Path(checkpoint_id).iterdir():
        path.read_bytes()
    _load(state_dict, checkpoint_id)


def _raise(state_dict, checkpoint_id):
    raise RuntimeError("no room for this")


def _unsynced(checkpoint_id):
    return FileSystemWriter(checkpoint_id, sync_files=False)


skips_fsync = StorageBackend("skips-fsync", _unsynced, FileSystemReader)
reads_from_memory = EngineBackend("reads-from-memory", _save_and_keep, _load_what_was_kept)
wrong_bytes = EngineBackend("wrong-bytes", _save, _load_wrong)
forgets_a_rank = EngineBackend("forgets-a-rank", _save, _load_but_on_rank_1)
raises = EngineBackend("raises", _raise, _raise)


def stay_resident(rank, world_size):
    """Makes eviction do nothing, as a file system may that keeps its pages."""
    from dcpbench.bench import measuring

    measuring.evict = lambda folder: None


def digests(rank, world_size, *, name, scale, layout):
    """Returns the digest of a state, that after some damage, and what is said of the damage."""
    from dcpbench.bench.placing import place
    from dcpbench.bench.workloads import workload

    wanted = workload(name, scale)
    state = RankState(wanted, place(layout, wanted, world_size), rank, "cpu")
    before, held = state.digest, next(local for local in state.locals if local.numel())
    held.view(-1)[0] += 1
    damaged, fault = state.found_digest(), state.fault()
    state.make_stale()
    stale = state.fault()
    state.fill()
    return before, damaged, fault, stale, state.fault()


def counted(rank, world_size):
    """Returns what is counted of two collectives, a clone and a copy, and of a sum, which is neither."""
    from dcpbench.bench.dispatch import Counting

    tensor = torch.ones(4)
    with Counting() as counting:
        dist.all_reduce(tensor)
        dist.broadcast_object_list([rank], src=0)
        torch.empty(4).copy_(tensor.clone())
        tensor.add_(1)
    return dict(counting.collectives), counting.num_copies
