"""Planners of one's own: those of DCP's documentation, and those that set things up without their base class."""

import dataclasses
from itertools import zip_longest

import pytest
import torch
import torch.distributed.checkpoint._nested_dict as torchs_nested_dict
import torch.distributed.checkpoint._sharded_tensor_utils as torchs_sharded_tensor_utils
from torch.distributed.tensor import Replicate, Shard
from virtual_ranks import check, load_all, load_into_blank, noise, raw_bytes, save_all, shard

import reference
import reference._nested_dict as our_nested_dict
import reference._sharded_tensor_utils as our_sharded_tensor_utils
from reference import CheckpointException, DefaultLoadPlanner, DefaultSavePlanner, WriteItemType
from reference.default_planner import _EmptyStateDictLoadPlanner
from reference.state_dict_loader import _load_state_dict, _load_state_dict_from_keys


class Prefixing(DefaultSavePlanner):
    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
        super().set_up_planner({"foo_" + key: value for key, value in state_dict.items()}, storage_meta, is_coordinator)


class HalfPrecision(DefaultSavePlanner):
    def create_local_plan(self):
        plan = super().create_local_plan()
        for item in plan.items:
            if item.tensor_data is not None:
                item.tensor_data.properties.dtype = torch.float16
        return plan

    def resolve_data(self, write_item):
        item = super().resolve_data(write_item)
        return item if write_item.type == WriteItemType.BYTE_IO else item.to(torch.float16)


class Balancing(DefaultSavePlanner):
    def create_global_plan(self, all_plans):
        iters = [iter(all_plans[0].items)] * len(all_plans)
        items_per_rank = [
            [item for item in items if item is not None] for items in zip(*zip_longest(*iters), strict=True)
        ]
        all_plans = [
            dataclasses.replace(plan, items=items) for plan, items in zip(all_plans, items_per_rank, strict=True)
        ]
        return super().create_global_plan(all_plans)


class ExtraData(DefaultSavePlanner):
    def create_local_plan(self):
        return dataclasses.replace(super().create_local_plan(), planner_data="per-rank-data")

    def create_global_plan(self, all_plans):
        global_plan, metadata = super().create_global_plan(all_plans)
        return global_plan, dataclasses.replace(metadata, planner_data=[p.planner_data for p in global_plan])


def stripping(nested_dict, sharded_tensor_utils):
    class Stripping(DefaultLoadPlanner):
        def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
            self.original_state_dict = state_dict
            state_dict = {"foo_" + key: value for key, value in state_dict.items()}
            if self.flatten_sharded_tensors:
                state_dict = sharded_tensor_utils._flatten_sharded_tensors(state_dict)
            if self.flatten_state_dict:
                state_dict, self.mappings = nested_dict.flatten_state_dict(state_dict)
            self.state_dict = state_dict
            self.metadata = metadata
            self.is_coordinator = is_coordinator

        def load_bytes(self, read_item, value):
            loaded = torch.load(value, weights_only=False)
            self.original_state_dict[read_item.dest_index.fqn[4:]] = loaded

    return Stripping()


class Materializing(DefaultLoadPlanner):
    def resolve_tensor(self, read_item):
        return torch.empty_like(super().resolve_tensor(read_item), device="cpu")

    def commit_tensor(self, read_item, tensor):
        self.state_dict[read_item.dest_index.fqn] = tensor


class SetUpAlone(DefaultLoadPlanner):
    """Without the base class, and without a `load_bytes` of its own."""

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        self.original_state_dict = state_dict
        self.state_dict, self.mappings = our_nested_dict.flatten_state_dict(state_dict)
        self.metadata = metadata
        self.is_coordinator = is_coordinator


class Doubling(DefaultSavePlanner):
    """Replaces what the base class set up."""

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.state_dict = {
            key: value * 2 if isinstance(value, torch.Tensor) else value for key, value in self.state_dict.items()
        }


def states(world_size):
    whole = noise((6, 4), torch.float32, 1)
    return [
        {"w": shard(whole, rank, range(world_size), [Shard(0)]), "p": torch.ones(3), "n": {"o": 5}}
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(
    ("nested_dict", "sharded_tensor_utils"),
    [(our_nested_dict, our_sharded_tensor_utils), (torchs_nested_dict, torchs_sharded_tensor_utils)],
    ids=["ours", "torch's"],
)
def test_renaming_on_the_way_there_and_back(tmp_path, nested_dict, sharded_tensor_utils):
    metadata = reference.save({"w": torch.arange(3.0), "o": 7}, checkpoint_id=tmp_path, planner=Prefixing())
    assert set(metadata.state_dict_metadata) == {"foo_w", "foo_o"}
    state = {"w": torch.zeros(3), "o": None}
    weight = state["w"]
    reference.load(state, checkpoint_id=tmp_path, planner=stripping(nested_dict, sharded_tensor_utils))
    assert (weight.tolist(), state["o"]) == ([0, 1, 2], 7)
    assert state["w"] is weight


def test_a_planner_set_up_without_its_base_class_may_be_used_again(tmp_path):
    planner = SetUpAlone()
    for n in range(2):
        reference.save({"w": torch.full((2,), float(n)), "m": {1: n}}, checkpoint_id=tmp_path / str(n))
        state = {"w": torch.zeros(2), "m": {"1": None}}
        reference.load(state, checkpoint_id=tmp_path / str(n), planner=planner)
        assert state["w"].tolist() == [n, n]
        assert state["m"] == {"1": n}


def test_half_precision_on_disk(tmp_path):
    metadata = check(save_all(states(2), tmp_path, planners=lambda _: HalfPrecision()))[0]
    assert metadata.state_dict_metadata["w"].properties.dtype is torch.float16
    assert load_into_blank({"p": torch.ones(3, dtype=torch.float16)}, tmp_path)["p"].tolist() == [1, 1, 1]


def test_a_global_plan_of_ones_own(tmp_path):
    made = [{f"w{n}": torch.full((2,), n) for n in range(4)} for _ in range(3)]
    metadata = check(save_all(made, tmp_path, planners=lambda _: Balancing()))[0]
    writers = [metadata.storage_data[index].relative_path[:4] for index in sorted(metadata.storage_data, key=str)]
    assert writers == ["__0_", "__1_", "__2_", "__0_"]
    assert load_into_blank({"w3": torch.zeros(2, dtype=torch.int64)}, tmp_path)["w3"].tolist() == [3, 3]


@pytest.mark.parametrize("is_flat", [True, False])
def test_extra_planner_data(tmp_path, is_flat):
    metadata = check(save_all(states(2), tmp_path, planners=lambda _: ExtraData(flatten_state_dict=is_flat)))[0]
    assert metadata.planner_data == ["per-rank-data"] * 2


def test_tensors_may_be_made_while_loading(tmp_path):
    reference.save({"w": torch.arange(3.0)}, checkpoint_id=tmp_path)
    planner = Materializing()
    reference.load({"w": torch.zeros(3)}, checkpoint_id=tmp_path, planner=planner)
    assert planner.state_dict["w"].tolist() == [0, 1, 2]


def test_what_is_set_up_may_be_replaced(tmp_path):
    reference.save({"m": {"w": torch.arange(3.0), "o": 1}}, checkpoint_id=tmp_path, planner=Doubling())
    loaded = load_into_blank({"m": {"w": torch.zeros(3), "o": 0}}, tmp_path)
    assert (loaded["m"]["w"].tolist(), loaded["m"]["o"]) == ([0, 2, 4], 1)


def test_replicas_may_be_kept_apart_by_a_hook(tmp_path):
    seen = []

    class Seeing(DefaultSavePlanner):
        def _dedup_save_plans(self, all_plans):
            seen.append([len(plan.items) for plan in all_plans])
            return super()._dedup_save_plans(all_plans)

    for _ in range(2):  # A plan that a subclass made in its own way is never remembered.
        check(save_all(states(2), tmp_path, planners=lambda _: Seeing(enable_plan_caching=True)))
    assert seen == [[3, 3]] * 2


NESTED = {"m": {"w": torch.arange(3.0), "o": [1, 2]}, "opt": {"s": [{"x": torch.ones(2)}, 4]}, "n": 5}


def test_an_empty_state_dict_is_filled_with_everything(tmp_path):
    reference.save(NESTED, checkpoint_id=tmp_path)
    loaded, in_place = {}, {}
    reference.load(loaded, checkpoint_id=tmp_path, planner=_EmptyStateDictLoadPlanner())
    _load_state_dict(in_place, reference.FileSystemReader(tmp_path), planner=_EmptyStateDictLoadPlanner())
    for found in (loaded, in_place, _load_state_dict_from_keys(checkpoint_id=tmp_path)):
        assert found["m"]["w"].tolist() == [0, 1, 2]
        assert (found["m"]["o"], found["n"], found["opt"]["s"][1]) == ([1, 2], 5, 4)
        assert found["opt"]["s"][0]["x"].tolist() == [1, 1]
    with pytest.raises(CheckpointException, match="Expected an empty state dict"):
        reference.load({"a": 1}, checkpoint_id=tmp_path, planner=_EmptyStateDictLoadPlanner())


@pytest.mark.parametrize(
    ("keys", "expected"), [("m", {"m": ["w", "o"]}), ({"m.w", "n"}, {"m": ["w"], "n": 5}), (set(), {}), ("op", {})]
)
def test_some_keys_alone(tmp_path, keys, expected):
    reference.save(NESTED, checkpoint_id=tmp_path)
    loaded = _load_state_dict_from_keys(keys, checkpoint_id=tmp_path)
    assert {key: list(value) if isinstance(value, dict) else value for key, value in loaded.items()} == expected


def test_a_planner_says_which_keys_it_wants(tmp_path):
    class Few(_EmptyStateDictLoadPlanner):
        def _should_include_key(self, key, metadata):
            return key.startswith("opt.")

    reference.save(NESTED, checkpoint_id=tmp_path)
    loaded = {}
    reference.load(loaded, checkpoint_id=tmp_path, planner=Few())
    assert list(loaded) == ["opt"]


def test_keys_of_sharded_checkpoints_and_of_unflattened_ones(tmp_path):
    whole = noise((7, 2), torch.float32, 3)
    check(save_all([{"w": shard(whole, rank, [0, 1], [Shard(0)])} for rank in range(2)], tmp_path / "a"))
    assert raw_bytes(_load_state_dict_from_keys("w", checkpoint_id=tmp_path / "a")["w"]) == raw_bytes(whole)
    reference.save({"x": {"y": 1}, "z": 2}, checkpoint_id=tmp_path / "b", planner=DefaultSavePlanner(False))
    assert _load_state_dict_from_keys("x", checkpoint_id=tmp_path / "b") == {"x": {"y": 1}}


def test_a_change_of_dtype_is_told_once_for_all_and_may_be_refused(tmp_path):
    reference.save({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, checkpoint_id=tmp_path)
    wanted = {"a": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.zeros(2)}
    changes = (
        r"'a' was saved as torch.float32 and is loaded as torch.float64; 'b' was saved .* loaded as torch.bfloat16"
    )
    with pytest.warns(UserWarning, match=changes) as told:
        reference.load(wanted, checkpoint_id=tmp_path)
    assert len(told) == 1
    assert wanted["b"].tolist() == [1, 1]
    blank = {key: torch.zeros_like(value) for key, value in wanted.items()}
    planners = lambda _: DefaultLoadPlanner(allow_dtype_change=False)  # noqa: E731
    for outcome in load_all([{"c": torch.zeros(2)}, blank], tmp_path, planners=planners):
        assert isinstance(outcome, CheckpointException)
        assert "'a' was saved as torch.float32" in str(outcome)
        assert list(outcome.failures) == [1]
    assert not any(value.any() for value in blank.values())


def test_one_process_that_saves_a_part_alone_is_warned(tmp_path):
    state = {"w": shard(torch.arange(4.0), 1, [0, 1], [Shard(0)]), "r": shard(torch.ones(2), 1, [0, 1], [Replicate()])}
    with pytest.warns(UserWarning, match="this process's part of 'w' was saved"):
        reference.save(state, checkpoint_id=tmp_path)
    reference.save(state, checkpoint_id=tmp_path, use_collectives=False)


@pytest.mark.parametrize("own", [{0}, {1}, {0, 2}, {0, 1, 2}], ids=str)
def test_a_coordinator_that_needs_all_load_plans_gets_them(tmp_path, own):
    seen = []

    class Watching(DefaultLoadPlanner):
        def create_global_plan(self, global_plan):
            seen.append([len(plan.items) for plan in global_plan])
            return super().create_global_plan(global_plan)

    whole = noise((6, 2), torch.float32)
    saved = [{"w": shard(whole, rank, range(3), [Shard(0)])} for rank in range(3)]
    check(save_all(saved, tmp_path))
    blanks = [{"w": shard(torch.zeros_like(whole), rank, range(3), [Shard(0)])} for rank in range(3)]
    check(load_all(blanks, tmp_path, planners=lambda rank: Watching() if rank in own else DefaultLoadPlanner()))
    for blank, state in zip(blanks, saved, strict=True):
        assert raw_bytes(blank["w"].to_local()) == raw_bytes(state["w"].to_local())
    assert seen == ([[1, 1, 1]] if 0 in own else [])


def test_meta_tensors_get_memory_in_the_callers_dict_whatever_a_subclass_puts_in_its_place(tmp_path):
    class OwnDict(DefaultLoadPlanner):
        def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
            super().set_up_planner(state_dict, metadata, is_coordinator)
            self.state_dict = dict(self.state_dict)

    reference.save({"nested": {"w": torch.arange(4.0)}}, checkpoint_id=tmp_path, no_dist=True)
    loaded = {"nested": {"w": torch.empty(4, device="meta")}}
    reference.load(loaded, checkpoint_id=tmp_path, planner=OwnDict(), no_dist=True)
    assert loaded["nested"]["w"].tolist() == [0, 1, 2, 3]


def test_names_to_load_may_come_from_an_iterator(tmp_path):
    reference.save({name: torch.ones(2) for name in "abc"}, checkpoint_id=tmp_path, no_dist=True)
    loaded = {}
    planner = _EmptyStateDictLoadPlanner(keys=iter(["b", "a"]))
    _load_state_dict(loaded, reference.FileSystemReader(tmp_path), planner=planner, no_dist=True)
    assert set(loaded) == {"a", "b"}
