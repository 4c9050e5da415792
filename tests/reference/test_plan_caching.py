"""Plan caching gives the checkpoint that planning anew gives, whatever changes between saves."""

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from virtual_ranks import check, load_all, noise, raw_bytes, save_all, shard

import reference
from reference import DefaultSavePlanner, save_planner
from reference.plan_cache import PlanCache

ROWS = Shard(0)


@pytest.fixture
def cache(monkeypatch):
    made = PlanCache()
    monkeypatch.setattr(save_planner, "_cache", made)
    return made


@pytest.fixture
def num_planned(monkeypatch):
    """How many global plans were made anew."""
    made = []
    original = DefaultSavePlanner._create_global_plan

    def counting(self, all_plans):
        made.append(len(all_plans))
        return original(self, all_plans)

    monkeypatch.setattr(DefaultSavePlanner, "_create_global_plan", counting)
    return lambda: len(made)


def states(world_size, placement=ROWS, size=(6, 4), dtype=torch.float32, seed=0, extra=(), requires_grad=False):
    whole = noise(size, dtype, seed)
    made = []
    for rank in range(world_size):
        state = {"w": shard(whole, rank, range(world_size), [placement]), "n": {"o": seed}, **dict(extra)}
        state["p"] = noise((3,), dtype, seed + 1).requires_grad_(requires_grad)
        made.append(state)
    return made


def save(made, path, **options):
    planners = lambda _: DefaultSavePlanner(enable_plan_caching=True, **options)  # noqa: E731
    return check(save_all(made, path, planners=planners))[0]


def stripped(metadata):
    return metadata.state_dict_metadata, metadata.planner_data, set(metadata.storage_data)


CHANGES = {
    "nothing": {},
    "content": {"seed": 5},
    "shape": {"size": (5, 4)},
    "dtype": {"dtype": torch.int32},
    "same-size dtype": {"dtype": torch.float64, "size": (3, 4)},
    "layout": {"placement": Shard(1)},
    "replicated": {"placement": Replicate()},
    "keys": {"extra": [("new", 1)]},
    "kind": {"extra": [("n", torch.ones(2))]},
    "nesting": {"extra": [("n.o", 7), ("n", {})]},
    "requires_grad": {"requires_grad": True},
    "fewer ranks": {"world_size": 2},
    "more ranks": {"world_size": 4},
}
REUSED = {"nothing", "content"}


@pytest.mark.parametrize("change", CHANGES)
def test_a_save_after_a_change_is_the_save_made_anew(tmp_path, cache, num_planned, change):
    save(states(3), tmp_path / "before")
    after = {"world_size": 3, **CHANGES[change]}
    cached = save(states(**after), tmp_path / "cached")
    assert num_planned() == (1 if change in REUSED else 2)
    fresh = check(save_all(states(**after), tmp_path / "fresh"))[0]
    assert stripped(cached) == stripped(fresh)
    expected = states(**after)
    if change in ("kind", "nesting"):
        return
    loaded = states(**{**after, "seed": 99})
    check(load_all(loaded, tmp_path / "cached"))
    for mine, theirs in zip(loaded, expected, strict=True):
        assert raw_bytes(mine["w"]) == raw_bytes(theirs["w"])
        assert raw_bytes(mine["p"]) == raw_bytes(theirs["p"])
        assert mine["n"] == theirs["n"]


def test_planner_options_do_not_share_plans(tmp_path, cache, num_planned):
    class Mine(DefaultSavePlanner):
        pass

    made = states(3, placement=Replicate())
    save(made, tmp_path / "a")
    lowest = save(made, tmp_path / "b", dedup_save_to_lowest_rank=True)
    assert {info.relative_path for info in lowest.storage_data.values()} == {"__0_0.distcp"}
    check(save_all(made, tmp_path / "c", planners=lambda _: Mine(enable_plan_caching=True)))
    assert num_planned() == 3


def test_a_failed_save_leaves_no_plan_behind(tmp_path, cache, num_planned):
    made = states(2)
    made[1]["p"] = torch.zeros(4)
    outcomes = save_all(made, tmp_path / "bad", planners=lambda _: DefaultSavePlanner(enable_plan_caching=True))
    assert all(isinstance(outcome, reference.CheckpointException) for outcome in outcomes)
    good = save(states(2), tmp_path / "good")
    assert stripped(good) == stripped(check(save_all(states(2), tmp_path / "fresh"))[0])


def test_what_callers_do_to_results_does_not_reach_the_cache(tmp_path, cache, num_planned):
    first = save(states(2), tmp_path / "a")
    first.state_dict_metadata["w"].chunks.clear()
    first.state_dict_metadata["p"].properties.dtype = torch.int8
    first.planner_data.clear()
    second = save(states(2), tmp_path / "b")
    del second.state_dict_metadata["w"]
    third = save(states(2), tmp_path / "c")
    assert num_planned() == 1
    assert stripped(third) == stripped(check(save_all(states(2), tmp_path / "fresh"))[0])


def test_without_the_option_nothing_is_remembered(tmp_path, cache, num_planned):
    for name in "ab":
        check(save_all(states(2), tmp_path / name))
    assert num_planned() == 2
    assert not cache._entries
