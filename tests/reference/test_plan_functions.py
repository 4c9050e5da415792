"""The steps of planning as functions, and those that walk through state dicts: side by side with torch's."""

import dataclasses
import itertools
from collections import OrderedDict

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import _dedup_save_plans as torchs_dedup
from torch.distributed.checkpoint import _nested_dict as torchs_nested_dict
from torch.distributed.checkpoint import _traverse as torchs_traverse
from torch.distributed.checkpoint import default_planner as torchs
from torch.distributed.checkpoint import planner_helpers as torchs_helpers
from torch.distributed.checkpoint import resharding as torchs_resharding
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.tensor import Replicate, Shard
from virtual_ranks import shard

import reference
from reference import _dedup_save_plans as our_dedup
from reference import _dedup_tensors, _nested_dict, _traverse, default_planner, planner_helpers, resharding, utils
from reference.leaves import PlanningError

HELD = {"w": torch.arange(6.0).reshape(2, 3), "s": torch.tensor(1), "o": [1, 2], "n": None}


def plans_of(functions, world_size, placement):
    whole = torch.arange(12.0).reshape(4, 3)
    return [
        functions.create_default_local_save_plan({**HELD, "d": shard(whole, r, range(world_size), [placement])}, r == 0)
        for r in range(world_size)
    ]


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_local_and_global_save_plans_are_torchs(placement):
    mine, theirs = (plans_of(functions, 2, placement) for functions in (default_planner, torchs))
    assert mine == theirs
    for to_lowest in (True, False):
        ours, yours = (
            dedup.dedup_save_plans(plans, to_lowest) for dedup, plans in ((our_dedup, mine), (torchs_dedup, theirs))
        )
        if to_lowest:
            assert ours == yours == _dedup_tensors.dedup_tensors(mine)
        for hints in (True, False):
            final, metadata = default_planner.create_default_global_save_plan(ours, hints)
            assert (final, metadata) == torchs.create_default_global_save_plan(ours, hints)
            assert [[item.index.index for item in plan.items] for plan in final] == [
                [item.index.index for item in plan.items]
                for plan in torchs.create_default_global_save_plan(ours, hints)[0]
            ]
            assert default_planner._validate_global_plan(final, metadata) == []
    with pytest.raises(PlanningError, match="'w' but got several"):
        default_planner.create_default_global_save_plan(mine)


def test_faults_of_a_global_plan_are_told():
    plans = plans_of(default_planner, 2, Shard(0))
    final, metadata = default_planner.create_default_global_save_plan(our_dedup.dedup_save_plans(plans))
    metadata.state_dict_metadata["d"].chunks.pop()
    (fault,) = default_planner._validate_global_plan(final, metadata)
    assert "'d'" in fault
    assert len(torchs._validate_global_plan(final, metadata)) == 1
    assert default_planner._validate_global_plan(final[:1], metadata) == []


@pytest.mark.parametrize("strict", [True, False])
def test_local_load_plans_are_torchs(strict):
    _, metadata = torchs.create_default_global_save_plan(plans_of(torchs, 1, Shard(0)))
    whole = torch.zeros(4, 3)
    state = {**HELD, "d": shard(whole, 1, range(3), [Shard(1)])}
    mine, theirs = (f.create_default_local_load_plan(state, metadata, strict) for f in (default_planner, torchs))
    assert mine == theirs
    assert default_planner.create_default_global_load_plan([mine]) == [mine]
    state["missing"] = torch.ones(1)
    if strict:
        for functions, error in ((default_planner, PlanningError), (torchs, RuntimeError)):
            with pytest.raises(error, match="missing"):
                functions.create_default_local_load_plan(state, metadata)
        assert issubclass(PlanningError, RuntimeError)
    else:
        assert default_planner.create_default_local_load_plan(state, metadata, strict=False) == theirs


def test_local_metadata_is_torchs():
    state = {**HELD, "d": shard(torch.arange(12.0).reshape(4, 3), 1, range(2), [Shard(0)])}
    assert default_planner._create_default_local_metadata(state) == torchs._create_default_local_metadata(state)


@st.composite
def chunk_lists(draw):
    size = draw(st.lists(st.integers(1, 8), min_size=0, max_size=3))
    return [_grid(draw, size), _grid(draw, size)], torch.Size(size)


def _grid(draw, size):
    boxes = [((), ())]
    for extent in size:
        cuts = sorted({0, extent, *draw(st.lists(st.integers(0, extent), max_size=2))})
        runs = [(low, high - low) for low, high in itertools.pairwise(cuts)]
        boxes = [((*at, low), (*sizes, length)) for at, sizes in boxes for low, length in runs]
    return [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in draw(st.permutations(boxes))]


@given(chunk_lists())
def test_reads_for_any_chunks_are_torchs(case):
    (saved, local), size = case
    entry = TensorStorageMetadata(reference.TensorProperties(), size, saved)
    mine = planner_helpers.create_read_items_for_chunk_list("w", entry, local)
    theirs = torchs_helpers.create_read_items_for_chunk_list("w", entry, local)

    def spell(read):
        hints = (read.dest_index.index, read.storage_index.index)
        return repr((hints, dataclasses.astuple(read)))

    assert sorted(map(spell, mine)) == sorted(map(spell, theirs))
    for one in saved:
        for other in local:
            meets = resharding._check_shard_metadata_pair_overlap(one, other)
            assert meets == torchs_resharding._check_shard_metadata_pair_overlap(one, other)
            if meets:
                pair = [
                    module._shards_get_overlap_region_wrt_saved_tensor(one, other)
                    for module in (resharding, torchs_resharding)
                ]
                assert pair[0] == pair[1]


def test_items_of_one_leaf():
    items = planner_helpers._create_write_items("w", HELD["w"])
    assert items == torchs_helpers._create_write_items("w", HELD["w"])
    assert planner_helpers._create_chunk_list(HELD["w"]) == torchs_helpers._create_chunk_list(HELD["w"])
    entry = reference.BytesStorageMetadata()
    assert planner_helpers._create_read_items("o", entry, 1) == torchs_helpers._create_read_items("o", entry, 1)
    with pytest.raises(PlanningError, match="Expected a tensor"):
        planner_helpers._create_chunk_list("text")


def test_finding_what_an_index_names():
    value = shard(torch.arange(8.0), 1, range(2), [Shard(0)])
    state = {**HELD, "d": value}
    assert utils.find_state_dict_object(state, MetadataIndex("d", [4])).tolist() == [4, 5, 6, 7]
    assert utils.find_state_dict_object(state, MetadataIndex("o")) is HELD["o"]
    for index in (MetadataIndex("w"), MetadataIndex("w", [0, 0])):
        assert utils.find_state_dict_object(state, index) is not None
        assert utils.find_tensor_shard(HELD["w"], index).equal(HELD["w"])
    for index in (MetadataIndex("w", [1, 0]), MetadataIndex("o", [0]), MetadataIndex("x"), MetadataIndex("d", [0])):
        with pytest.raises(ValueError, match=r"Expected (an FQN|no offset|the offset)"):
            utils.find_state_dict_object(state, index)


LEAVES = st.one_of(st.integers(0, 3), st.just("text"), st.builds(torch.tensor, st.integers(0, 3)), st.just((1, 2)))
NESTED = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "b", 1]), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=3,
)


@given(NESTED)
def test_walking_is_torchs(nested):
    visits = [[], []]
    for module, seen in zip((_traverse, torchs_traverse), visits, strict=True):
        module.traverse_state_dict(nested, lambda path, value, seen=seen: seen.append((path, id(value))))
    assert visits[0] == visits[1]
    (flat, paths), theirs = _nested_dict.flatten_state_dict(nested), torchs_nested_dict.flatten_state_dict(nested)
    assert (list(flat), paths) == (list(theirs[0]), theirs[1])
    assert all(flat[fqn] is theirs[0][fqn] for fqn in flat)
    back, yours = (module.unflatten_state_dict(flat, paths) for module in (_nested_dict, torchs_nested_dict))
    assert spelled(back) == spelled(yours)
    for path in paths.values():
        assert _traverse.get_element(back, path) is torchs_traverse.get_element(back, path)
        assert _traverse.get_element(back, (*path, "x"), 7) == 7


def spelled(nested):
    if isinstance(nested, dict):
        return {key: spelled(value) for key, value in nested.items()}
    return [spelled(value) for value in nested] if isinstance(nested, list) else id(nested)


def test_setting_and_printing():
    nested = OrderedDict()
    _traverse.set_element(nested, ("a", 2, "b"), 1)
    _traverse.set_element(nested, ("a", 0), 2)
    assert nested == {"a": [2, None, {"b": 1}]}
    with pytest.raises(PlanningError, match="Expected a container"):
        _traverse.set_element(nested, ("a", 0, "x"), 1)
    told = [[], []]
    state = {"t": torch.ones(2, 3), "o": 1}
    for module, seen in zip((_traverse, torchs_traverse), told, strict=True):
        module.traverse_state_dict(
            state, lambda path, value, m=module, seen=seen: m.print_tensor(path, value, seen.append)
        )
    assert told[0] == told[1]


class Silent:
    def state_dict(self):
        raise AssertionError("the old names ask nobody")

    load_state_dict = state_dict


def test_old_names_work_in_one_process(tmp_path):
    state = {"w": torch.arange(3.0), "s": Silent()}
    with pytest.warns(FutureWarning, match="use `save`"):
        metadata = reference.save_state_dict(state, reference.FileSystemWriter(tmp_path), no_dist=True)
    assert set(metadata.state_dict_metadata) == {"w", "s"}
    loaded = {"w": torch.zeros(3)}
    with pytest.warns(FutureWarning, match="use `load`"):
        reference.load_state_dict(loaded, dcp.FileSystemReader(tmp_path), no_dist=True)
    assert loaded["w"].tolist() == [0, 1, 2]
    with pytest.warns(FutureWarning, match="storage_writer= as a keyword"):
        reference.save({"w": torch.ones(1)}, reference.FileSystemWriter(tmp_path / "b"))
    with pytest.warns(FutureWarning, match="storage_reader= as a keyword"):
        reference.load({"w": torch.zeros(1)}, reference.FileSystemReader(tmp_path / "b"))
