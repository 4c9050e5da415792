from collections import OrderedDict
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from reference.flatten import FlattenError, flatten

LEAVES = st.one_of(st.integers(), st.text(max_size=2), st.none(), st.builds(lambda: torch.ones(1)), st.just((1, 2)))
KEYS = st.one_of(st.text("abc", min_size=1, max_size=2), st.integers(0, 3))
NESTED = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(deadline=None)
@given(NESTED)
def test_flatten_agrees_with_torch_wherever_torch_gives_an_answer(state_dict):
    try:
        theirs, their_paths = flatten_state_dict(state_dict)
    except ValueError:
        with pytest.raises(FlattenError):
            flatten(state_dict)
        return
    try:
        ours = flatten(state_dict)
    except FlattenError:  # an empty mapping that shares its name with a leaf, which torch drops without a word
        return
    assert list(ours.leaves) == list(theirs)
    assert all(ours.leaves[fqn] is theirs[fqn] for fqn in theirs)
    assert {fqn: path for fqn, path in ours.paths.items() if fqn in theirs} == their_paths


@settings(deadline=None)
@given(NESTED)
def test_each_slot_is_where_its_leaf_lives(state_dict):
    try:
        flat = flatten(state_dict)
    except FlattenError:
        return
    for fqn, leaf in flat.leaves.items():
        slot = flat.slots[fqn]
        assert slot.container[slot.key] is leaf


def test_put_uses_the_real_key():
    state_dict = {"a": {3: "old"}}
    flatten(state_dict).slots["a.3"].put("new")
    assert state_dict == {"a": {3: "new"}}


@pytest.mark.parametrize(
    ("state_dict", "paths"),
    [
        ({1: 0, "1": 0}, ["state_dict[1]", "state_dict['1']"]),
        ({"a.b": 0, "a": {"b": 0}}, ["state_dict['a.b']", "state_dict['a']['b']"]),
        ({"a": [{}, torch.ones(1)], "a.1": 0}, ["state_dict['a'][1]", "state_dict['a.1']"]),
        ({"a": {"b": {}}, "a.b": 0}, ["state_dict['a']['b']", "state_dict['a.b']"]),
    ],
)
def test_two_leaves_of_one_name_are_refused_with_both_paths(state_dict, paths):
    with pytest.raises(FlattenError) as caught:
        flatten(state_dict)
    for path in paths:
        assert path in str(caught.value)


def test_lists_are_entered_only_for_tensors_or_mappings():
    flat = flatten({"a": [1, [2]], "b": [1, [torch.ones(1)]], "c": (torch.ones(1),), "d": [[{}]], "e": []})
    assert list(flat.leaves) == ["a", "b.0", "b.1.0", "c", "e"]
    assert flat.paths["d.0.0"] == ("d", 0, 0)


def test_empty_mappings_have_a_path_and_no_leaf():
    flat = flatten({"a": {}, "b": OrderedDict(c=MappingProxyType({}))})
    assert not flat.leaves
    assert flat.paths == {"a": ("a",), "b.c": ("b", "c")}


def test_a_subtree_stored_whole_is_one_leaf_unless_it_holds_a_tensor():
    nested = {"a": {"x": 1}, "b": {"x": torch.ones(1)}}
    assert list(flatten(nested, is_whole=lambda _: True).leaves) == ["a", "b.x"]
