"""A real model under FSDP2 with AdamW: saved on all ranks, resumed on as many, on fewer, and without any."""

from __future__ import annotations

import pytest

TRAINING = "dcpbench.models.training"


@pytest.fixture(scope="module")
def saves():
    """What was saved in this module, by backend: training costs more than all that is done with its checkpoint."""
    return {}


@pytest.fixture
def saved(pool, backend, saves, tmp_path):
    """The uninterrupted run: where it was saved, what its state was then, and its losses after it."""
    if why := pool.lacks(backend, "objects", "resharding", "scalar-tensors", "statefuls", "local-folders"):
        pytest.skip(why)
    if backend not in saves:
        checkpoint = str(tmp_path / "llama")
        arguments = {"backend": backend, "checkpoint": checkpoint, "steps_before": 2, "steps_after": 3}
        saves[backend] = checkpoint, pool.call(f"{TRAINING}:train_and_save", pool.settings.world_size, **arguments)
    return saves[backend]


def test_training_resumes_bit_for_bit_on_as_many_ranks(pool, backend, saved):
    checkpoint, uninterrupted = saved
    resumed = pool.call(
        f"{TRAINING}:resume", pool.settings.world_size, backend=backend, checkpoint=checkpoint, steps_after=3
    )
    for before, after in zip(uninterrupted, resumed, strict=True):
        assert after["digests"] == before["digests"]
        assert after["losses"] == before["losses"]


def test_state_is_whole_on_fewer_ranks(pool, backend, saved):
    checkpoint, uninterrupted = saved
    world_size = min(3, pool.settings.world_size)
    for after in pool.call(f"{TRAINING}:resume", world_size, backend=backend, checkpoint=checkpoint, steps_after=0):
        assert after["digests"] == uninterrupted[0]["digests"]


def test_state_is_whole_without_process_group(pool, backend, saved):
    checkpoint, uninterrupted = saved
    (alone,) = pool.call(
        f"{TRAINING}:resume", 1, distributed=False, backend=backend, checkpoint=checkpoint, steps_after=1
    )
    assert alone["digests"] == uninterrupted[0]["digests"]
