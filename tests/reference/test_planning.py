"""What planning makes of a state dict: what goes where, what is refused, and what subclasses may change."""

import pickle
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.tensor import Partial, Replicate, Shard
from virtual_ranks import as_dtensor, blank_like, check, load_all, mesh_for, noise, raw_bytes, save_all, shard

import reference
from reference import CheckpointException, DefaultLoadPlanner, DefaultSavePlanner
from reference.metadata import dump_metadata, load_metadata


def sharded(whole, ranks, placements):
    return [{"w": shard(whole, rank, ranks, placements)} for rank in range(ranks.numel())]


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def test_destinations_keep_their_memory_and_their_containers(tmp_path):
    reference.save({"m": {"w": torch.ones(3), "o": 1}, "l": [torch.ones(2), 5]}, checkpoint_id=tmp_path)
    weight, inner, items = torch.zeros(3), OrderedDict(), [torch.zeros(2), 0]
    inner["w"], inner["o"] = weight, None
    state = {"m": inner, "l": items}
    reference.load(state, checkpoint_id=tmp_path)
    assert state["m"] is inner
    assert state["l"] is items
    assert inner["w"] is weight
    assert (weight.tolist(), inner["o"], items[1]) == ([1.0] * 3, 1, 5)


def test_int_keys_get_their_values_back(tmp_path):
    reference.save({"s": {0: "zero", 1: {"x": 5}}, 7: "seven"}, checkpoint_id=tmp_path)
    state = {"s": {0: None, 1: {"x": None}}, 7: None}
    reference.load(state, checkpoint_id=tmp_path)
    assert state == {"s": {0: "zero", 1: {"x": 5}}, 7: "seven"}


def test_what_is_not_loaded_is_not_touched(tmp_path):
    class Opaque:
        pass

    reference.save({"w": torch.ones(2)}, checkpoint_id=tmp_path)
    extra, tupled = Opaque(), (Opaque(), torch.zeros(1))
    state = {"w": torch.zeros(2), "extra": extra, "nested": {"tupled": tupled, "empty": {}}, "none": None}
    reference.load(state, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert state["extra"] is extra
    assert state["nested"]["tupled"] is tupled
    assert state["nested"]["empty"] == {}
    assert state["w"].tolist() == [1.0, 1.0]


def test_empty_mappings_are_recorded_and_survive(tmp_path):
    metadata = reference.save({"a": {}, "b": {"c": [], "d": ()}}, checkpoint_id=tmp_path)
    assert metadata.planner_data["a"] == ("a",)
    state = {"a": {}, "b": {"c": None, "d": None}}
    reference.load(state, checkpoint_id=tmp_path)
    assert state == {"a": {}, "b": {"c": [], "d": ()}}
    quietly(dcp.load, state, checkpoint_id=tmp_path)


@pytest.mark.parametrize(
    ("destination", "message"),
    [
        ({"w": torch.zeros(4)}, r"'w' has shape \(4,\) here and \(3,\) in the checkpoint"),
        ({"missing": 1}, "'missing' is missing from the checkpoint"),
        ({"w": "text"}, "'w' is a str here and a tensor in the checkpoint"),
        ({"o": torch.zeros(1)}, "'o' is a tensor here and an object in the checkpoint"),
    ],
)
def test_a_destination_that_does_not_fit_is_refused_on_all_ranks_before_any_change(tmp_path, destination, message):
    reference.save({"w": torch.ones(3), "o": 1, "v": torch.ones(3)}, checkpoint_id=tmp_path)
    states = [{"v": torch.zeros(3)}, {"v": torch.zeros(3), **destination}, {"v": torch.zeros(3)}]
    outcomes = load_all(states, tmp_path)
    for outcome, state in zip(outcomes, states, strict=True):
        assert isinstance(outcome, CheckpointException)
        assert list(outcome.failures) == [1]
        assert pytest.importorskip("re").search(message, str(outcome))
        assert state["v"].tolist() == [0.0] * 3


def test_all_mismatches_are_named_at_once(tmp_path):
    reference.save({"w": torch.ones(3)}, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointException, match=r"'a' is missing.*'w' has shape"):
        reference.load({"a": 1, "w": torch.zeros(2)}, checkpoint_id=tmp_path)


def test_two_leaves_of_one_name_are_refused_on_all_ranks(tmp_path):
    outcomes = save_all([{"a": 1}, {1: 0, "1": 0}], tmp_path)
    assert all("state_dict['1']" in str(outcome) for outcome in outcomes)
    assert not (tmp_path / ".metadata").exists()


@pytest.mark.parametrize(
    ("one", "other", "fact"),
    [
        (torch.ones(2), torch.ones(3), "shape"),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), "dtype"),
        (torch.ones(2), "object", "kind"),
    ],
)
def test_ranks_that_disagree_about_a_leaf_are_refused(tmp_path, one, other, fact):
    for outcome in save_all([{"w": one}, {"w": other}], tmp_path):
        assert isinstance(outcome, CheckpointException)
        assert f"'w' but got {fact}=" in str(outcome)


def test_partial_placements_are_refused_by_name(tmp_path):
    states = [{"w": as_dtensor(torch.ones(2), torch.ones(2), mesh_for(rank, [0, 1]), [Partial()])} for rank in range(2)]
    for outcome in save_all(states, tmp_path):
        assert "'w' placements=(Partial(sum),)" in str(outcome)


def test_ranks_outside_a_sub_mesh_take_part(tmp_path):
    whole = noise((5, 2), torch.float32)
    states = [{"w": shard(whole, rank, [1, 3], [Shard(0)]), "x": rank} for rank in range(4)]
    check(save_all(states, tmp_path))
    wanted = [{"w": shard(whole, rank, [2, 0, 1], [Shard(0)]), "x": None} for rank in range(4)]
    loaded = [
        {"w": as_dtensor(torch.zeros_like(w["w"].to_local()), whole, w["w"].device_mesh, [Shard(0)]), "x": None}
        for w in wanted
    ]
    check(load_all(loaded, tmp_path))
    for mine, expected in zip(loaded, wanted, strict=True):
        assert raw_bytes(mine["w"]) == raw_bytes(expected["w"])


def test_replicas_are_written_once_and_balanced_by_the_bytes_of_chunks(tmp_path):
    # Rank 0 holds a large tensor of its own: the replicated ones belong on rank 1.
    mesh = mesh_for(0, [0])
    own = as_dtensor(torch.ones(1000), torch.ones(1000), mesh, [Replicate()])
    other = as_dtensor(torch.empty(0), torch.ones(1000), mesh_for(1, [0]), [Replicate()])
    states = [{"own": own, **{f"r{i}": torch.ones(100) for i in range(4)}} for _ in range(2)]
    states[1]["own"] = other
    metadata = check(save_all(states, tmp_path))[0]
    assert {i.fqn: info.relative_path[:4] for i, info in metadata.storage_data.items()} == {
        "own": "__0_",
        **{f"r{i}": "__1_" for i in range(4)},
    }
    lowest = lambda _: DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # noqa: E731
    metadata = check(save_all(states, tmp_path, planners=lowest))[0]
    assert {info.relative_path[:4] for info in metadata.storage_data.values()} == {"__0_"}


def test_every_rank_gets_the_metadata_with_index_hints(tmp_path):
    whole = torch.arange(9)
    outcomes = check(save_all(sharded(whole, torch.arange(3), [Shard(0)]), tmp_path))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    hints = {index.offset[0]: index.index for index in outcomes[0].storage_data}
    assert hints == {0: 0, 3: 1, 6: 2}
    assert pickle.loads((Path(tmp_path) / ".metadata").read_bytes()) == outcomes[0]


def test_stateful_values_give_and_take_their_state(tmp_path):
    class Counter:
        def __init__(self, count):
            self.count = count
            self.loads = 0

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]
            self.loads += 1

    check(save_all([{"c": Counter(5), "n": 1} for _ in range(2)], tmp_path))
    states = [{"c": Counter(0), "n": 0} for _ in range(2)]
    counters = [state["c"] for state in states]
    check(load_all(states, tmp_path))
    for state, counter in zip(states, counters, strict=True):
        assert state["c"] is counter
        assert (counter.count, counter.loads, state["n"]) == (5, 1, 1)


def test_meta_tensors_get_memory_only_if_planning_succeeds(tmp_path):
    reference.save({"m": {"w": torch.ones(3), "v": torch.ones(2)}}, checkpoint_id=tmp_path)
    state = {"m": {"w": torch.empty(3, device="meta"), "v": torch.empty(9, device="meta")}}
    with pytest.raises(CheckpointException):
        reference.load(state, checkpoint_id=tmp_path)
    assert state["m"]["w"].is_meta
    state["m"]["v"] = torch.empty(2, device="meta")
    reference.load(state, checkpoint_id=tmp_path)
    assert state["m"]["w"].tolist() == [1.0] * 3
    whole = torch.arange(4.0)
    check(save_all(sharded(whole, torch.arange(2), [Shard(0)]), tmp_path))
    mesh = mesh_for(1, [0, 1])
    state = {"w": as_dtensor(torch.empty(2, device="meta"), whole, mesh, [Shard(0)])}
    check(load_all([{}, state], tmp_path))
    assert state["w"].to_local().tolist() == [2.0, 3.0]


def test_checkpoints_from_before_2_4_hold_mappings_without_tensors_whole(tmp_path):
    reference.save(
        {"opt": {"groups": {"lr": 1}}, "w": torch.ones(1)}, checkpoint_id=tmp_path, planner=DefaultSavePlanner(False)
    )
    state = {"opt": {"groups": {"lr": 0}}, "w": torch.zeros(1)}
    reference.load(state, checkpoint_id=tmp_path)
    assert state == {"opt": {"groups": {"lr": 1}}, "w": torch.ones(1)}


def test_unflattened_planners_agree_with_each_other(tmp_path):
    reference.save({"a": {"b": 1}, "w": torch.ones(2)}, checkpoint_id=tmp_path, planner=DefaultSavePlanner(False))
    state = {"a": None, "w": torch.zeros(2)}
    reference.load(state, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(False))
    assert state["a"] == {"b": 1}


def test_planner_hooks_are_called(tmp_path):
    class Half(DefaultSavePlanner):
        def transform_object(self, write_item, object):
            value = super().transform_object(write_item, object)
            return value.half() if isinstance(value, torch.Tensor) else value

    class Staged(DefaultLoadPlanner):
        def resolve_tensor(self, read_item):
            return torch.empty_like(super().resolve_tensor(read_item))

        def commit_tensor(self, read_item, tensor):
            super().resolve_tensor(read_item).copy_(tensor + 1)

    reference.save({"w": torch.tensor([1.5, 2.5])}, checkpoint_id=tmp_path, planner=Half())
    state = {"w": torch.zeros(2)}
    reference.load(state, checkpoint_id=tmp_path, planner=Staged())
    assert state["w"].tolist() == [2.5, 3.5]


def test_checkpointable_tensors_use_their_own_methods(tmp_path):
    class Halves(torch.Tensor):
        def __create_write_items__(self, fqn, value):
            plain = self.as_subclass(torch.Tensor)
            return [
                reference.WriteItem(
                    MetadataIndex(fqn, chunk.offsets),
                    reference.WriteItemType.SHARD,
                    tensor_data=reference.planner.TensorWriteData(
                        chunk, reference.TensorProperties(dtype=plain.dtype), plain.size()
                    ),
                )
                for chunk in self.__create_chunk_list__()
            ]

        def __create_chunk_list__(self):
            return [ChunkStorageMetadata(torch.Size([i]), torch.Size([1])) for i in (0, 1)]

        def __get_tensor_shard__(self, index):
            return self.as_subclass(torch.Tensor)[index.offset[0] : index.offset[0] + 1]

    metadata = reference.save({"w": torch.tensor([5.0, 6.0]).as_subclass(Halves)}, checkpoint_id=tmp_path)
    assert len(metadata.state_dict_metadata["w"].chunks) == 2
    state = {"w": torch.zeros(2).as_subclass(Halves)}
    reference.load(state, checkpoint_id=tmp_path)
    assert state["w"].as_subclass(torch.Tensor).tolist() == [5.0, 6.0]


def test_checkpointable_tensors_are_asked_for_data_when_it_is_needed_and_for_no_more_methods_than_that(tmp_path):
    asked = []

    class Rows(torch.Tensor):
        def __create_write_items__(self, fqn, value):
            whole = torch.Size([4, 2])
            return [
                reference.WriteItem(
                    MetadataIndex(fqn, chunk.offsets),
                    reference.WriteItemType.SHARD,
                    tensor_data=reference.planner.TensorWriteData(chunk, reference.TensorProperties(), whole),
                )
                for chunk in (ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([1, 2])) for row in range(4))
            ]

        def __get_tensor_shard__(self, index):
            asked.append(index.offset[0])
            return torch.full((1, 2), float(index.offset[0]))

    class Planner(DefaultSavePlanner):
        def finish_plan(self, new_plan):
            assert asked == []
            return super().finish_plan(new_plan)

    value = torch.zeros(4, 2).as_subclass(Rows)
    reference.save({"w": value}, checkpoint_id=tmp_path, planner=Planner())
    assert sorted(asked) == [0, 1, 2, 3]
    loaded = {"w": torch.zeros(4, 2)}
    reference.load(loaded, checkpoint_id=tmp_path)
    assert loaded["w"][:, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(CheckpointException, match=r"'w', a .*Rows without __create_chunk_list__"):
        reference.load({"w": value}, checkpoint_id=tmp_path)


def test_meta_tensors_keep_the_order_of_their_mesh_axes(tmp_path):
    whole = torch.arange(8.0)
    reference.save({"w": whole}, checkpoint_id=tmp_path)
    states = []
    for rank in range(4):
        mesh = mesh_for(rank, [[0, 1], [2, 3]])
        value = as_dtensor(torch.empty(2, device="meta"), whole, mesh, [Shard(0), Shard(0)])
        value._spec.shard_order = (type(value._spec.shard_order[0])(0, (1, 0)),)
        states.append({"w": value})
    check(load_all(states, tmp_path))
    assert [state["w"].to_local().tolist() for state in states] == [[0, 1], [4, 5], [2, 3], [6, 7]]


def test_sparse_and_meta_tensors_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointException, match=r"'s' layout=torch\.sparse_coo"):
        reference.save({"s": torch.ones(2).to_sparse()}, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointException, match="'m' on device='meta'"):
        reference.save({"m": torch.ones(2, device="meta")}, checkpoint_id=tmp_path)


def with_chunks(path, chunks):
    metadata = load_metadata((path / ".metadata").read_bytes())
    metadata.state_dict_metadata["w"].chunks = [
        ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks
    ]
    info = next(iter(metadata.storage_data.values()))
    metadata.storage_data = {MetadataIndex("w", offsets): info for offsets, _ in chunks}
    (path / ".metadata").write_bytes(dump_metadata(metadata))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([((0,), (2,)), ((3,), (1,))], r"got 0 for the element at \(2,\)"),
        ([((0,), (3,)), ((2,), (2,))], r"got 2 for the element at \(2,\), at offsets \[\(0,\), \(2,\)\]"),
        # As many elements as the tensor has, and yet not those.
        ([((0,), (2,)), ((1,), (2,))], r"got 2 for the element at \(1,\)"),
        ([((), ())], r"chunks of 1 dims for 'w' but got offsets=\(\) sizes=\(\)"),
    ],
)
def test_a_checkpoint_with_gaps_or_overlaps_is_refused_before_any_change(tmp_path, chunks, message):
    reference.save({"w": torch.ones(4)}, checkpoint_id=tmp_path)
    with_chunks(tmp_path, chunks)
    state = {"w": torch.zeros(4)}
    with pytest.raises(CheckpointException, match=message):
        reference.load(state, checkpoint_id=tmp_path)
    assert state["w"].tolist() == [0.0] * 4


def test_a_chunk_out_of_bounds_among_many_does_not_count_for_another(tmp_path):
    # Row by row, the place past the end of row 4 is the one where row 5 begins.
    rows = [((row, 0), (1, 2)) for row in range(70)]
    reference.save({"w": torch.ones(70, 2)}, checkpoint_id=tmp_path)
    with_chunks(tmp_path, [*rows[:5], ((4, 3), (1, 2)), *rows[6:]])
    state = {"w": torch.zeros(70, 2)}
    with pytest.raises(CheckpointException, match=r"'w'"):
        reference.load(state, checkpoint_id=tmp_path)
    assert not state["w"].any()


def test_a_gap_elsewhere_does_not_matter(tmp_path):
    # One rank saves its own shard alone, and loads it again.
    whole = torch.arange(4.0)
    state = {"w": shard(whole, 1, [0, 1], [Shard(0)])}
    with pytest.warns(UserWarning, match="part of 'w'"):
        reference.save(state, checkpoint_id=tmp_path)
    loaded = blank_like(state)
    reference.load(loaded, checkpoint_id=tmp_path)
    assert raw_bytes(loaded["w"]) == raw_bytes(state["w"])
    with pytest.raises(CheckpointException, match=r"got 0 for the element at \(0,\)"):
        reference.load({"w": torch.zeros(4)}, checkpoint_id=tmp_path)
