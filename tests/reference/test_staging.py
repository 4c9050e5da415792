"""Staged copies: nothing done to the original later shows, and they cost the tensors' own bytes."""

import gc
import threading
import tracemalloc
from collections import OrderedDict, defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from test_items import DTYPES
from torch.distributed.checkpoint.staging import AsyncStager as TorchsAsyncStager
from torch.distributed.checkpoint.staging import StagingOptions as TorchsStagingOptions
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from virtual_ranks import as_dtensor, local_part, mesh_for, noise, raw_bytes

from reference.staged_copy import staged_copy
from reference.staging import AsyncStager, BlockingAsyncStager, DefaultStager, StagingError, StagingOptions

IN_PLACE = StagingOptions(False, False, False, False)
SHARED = StagingOptions(False, True, False, False)
BACKGROUND = StagingOptions(False, False, True, False)

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


def stage(state, options=IN_PLACE):
    stager = DefaultStager(options)
    staged = stager.stage(state)
    stager.close()
    return staged.result() if isinstance(staged, Future) else staged


def storage_bytes(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def scribble(tensor):
    with torch.no_grad():
        memory = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        memory.untyped_storage().fill_(0x5A)


def kinds_of_tensors():
    base = noise((6, 8), torch.float32, 1)
    mesh = mesh_for(1, range(2))
    whole = noise((5, 4), torch.float32, 2)
    placements = [[Shard(0)], [Replicate()], [_StridedShard(0, split_factor=2)]]
    yield "plain", base.clone()
    yield "row slice", base.clone()[2:3]
    yield "column slice", base.clone()[:, 3]
    yield "transposed", base.clone().t()
    yield "every other", base.clone()[::2, ::3]
    yield "expanded", base.clone()[0, :1].expand(5)
    yield "windows", base.clone().reshape(-1).unfold(0, 4, 1)
    yield "scalar", torch.tensor(2.5)
    yield "empty", torch.zeros(0, 4)
    yield "parameter", torch.nn.Parameter(base.clone())
    yield "not a leaf", torch.nn.Parameter(base.clone()) * 2
    yield "conjugate", noise((3,), torch.complex64, 3).conj()
    yield "channels last", torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for placement in placements:
        local = local_part(whole, mesh, placement).clone()
        yield f"DTensor {placement}", as_dtensor(local, whole, mesh, placement)
    for dtype in DTYPES:
        yield str(dtype), noise((3, 2), dtype, 4)


@pytest.mark.parametrize("options", [IN_PLACE, SHARED, BACKGROUND], ids=["in place", "shared", "background"])
@pytest.mark.parametrize("name", [name for name, _ in kinds_of_tensors()])
def test_a_copy_equals_the_original_and_outlives_it(name, options):
    value = dict(kinds_of_tensors())[name]
    expected = raw_bytes(value)
    staged = stage({"t": value}, options)["t"]
    facts = (value.dtype, value.size(), value.requires_grad, isinstance(value, DTensor))
    scribble(value)
    assert raw_bytes(staged) == expected
    assert (staged.dtype, staged.size(), staged.requires_grad, isinstance(staged, DTensor)) == facts
    if isinstance(value, DTensor):
        assert staged.placements == value.placements
        assert staged.device_mesh is value.device_mesh
    elif value.untyped_storage().resizable():
        value.untyped_storage().resize_(0)
        assert raw_bytes(staged) == expected
    local = staged.to_local() if isinstance(staged, DTensor) else staged
    assert local.is_shared() == (options is SHARED) or not local.numel()


def test_a_copy_costs_the_tensors_own_bytes():
    big = torch.zeros(1 << 20)
    state = {
        "tied": big[:100],
        "tied again": big[:100],
        "as parameter": torch.nn.Parameter(big[:100]),
        "in an object": ([big[:100]], {"x": big[200:300]}),
        "column": big.reshape(1024, 1024)[:, 1],
        "expanded": big[:1].expand(1 << 20),
    }
    staged = stage(state)
    tensors = [staged[k] for k in ("tied", "tied again", "as parameter", "column", "expanded")]
    tensors += [staged["in an object"][0][0], staged["in an object"][1]["x"]]
    assert storage_bytes(tensors) == 4 * (100 + 100 + 1024 + 1)
    assert staged["expanded"].size() == (1 << 20,)
    assert staged["tied"].data_ptr() == staged["tied again"].data_ptr() == staged["as parameter"].data_ptr()


def test_the_same_object_stays_one_object():
    tensor, shared = torch.ones(2), {"n": 1}
    cyclic = [1]
    cyclic.append(cyclic)
    staged = stage({"a": tensor, "b": [tensor], "c": shared, "d": (shared, shared), "e": cyclic})
    assert staged["a"] is staged["b"][0]
    assert staged["c"] is staged["d"][0] is staged["d"][1]
    assert staged["e"][1] is staged["e"]
    assert staged["c"] is not shared


@dataclass
class Holder:
    tensor: torch.Tensor
    numbers: list = field(default_factory=list)


def test_python_values_are_copied_to_the_last_leaf():
    big = torch.arange(1000.0)
    state = {
        "list": [1, [2, {"x": [3]}]],
        "array": np.arange(10)[2:5],
        "objects": np.array([[1], None], dtype=object),
        "holder": Holder(big[3:5], [1]),
        "set": {1},
        "default": defaultdict(list, a=[1]),
        "bytes": bytearray(b"abc"),
        "tuple": ([1], big[5:6]),
        "generator": torch.Generator().manual_seed(3),
        "module": torch.nn.Linear(2, 2),
        7: {None: [1]},
    }
    state["ordered"] = OrderedDict(a=[1])
    state["ordered"]._metadata = {"version": [1]}
    weight = state["module"].weight.detach().clone()
    seed_state = state["generator"].get_state()
    staged = stage(state)
    state["list"][1][1]["x"].append(4)
    state["array"][:] = 0
    state["objects"][0].append(5)
    state["holder"].numbers.append(2)
    state["set"].add(2)
    state["default"]["a"].append(2)
    state["bytes"][0] = 0
    state["tuple"][0].append(2)
    torch.rand(3, generator=state["generator"])
    torch.nn.init.zeros_(state["module"].weight)
    state[7][None].append(2)
    state["ordered"]["a"].append(2)
    state["ordered"]._metadata["version"].append(2)
    big.zero_()
    assert staged["list"] == [1, [2, {"x": [3]}]]
    assert staged["array"].tolist() == [2, 3, 4]
    assert staged["objects"].tolist() == [[1], None]
    assert (staged["holder"].tensor.tolist(), staged["holder"].numbers) == ([3, 4], [1])
    assert staged["holder"].tensor.untyped_storage().nbytes() == 8
    assert staged["set"] == {1}
    assert (type(staged["default"]), staged["default"]) == (defaultdict, {"a": [1]})
    assert staged["bytes"] == b"abc"
    assert (staged["tuple"][0], staged["tuple"][1].tolist()) == ([1], [5])
    assert torch.equal(staged["generator"].get_state(), seed_state)
    assert torch.equal(staged["module"].weight, weight)
    assert staged[7] == {None: [1]}
    assert (staged["ordered"], staged["ordered"]._metadata) == ({"a": [1]}, {"version": [1]})


def test_gradients_are_not_copied():
    weight = torch.nn.Parameter(torch.ones(1000))
    weight.sum().backward()
    plain = torch.ones(10, requires_grad=True)
    plain.sum().backward()
    staged = stage({"w": weight, "o": (weight,), "p": plain})
    assert staged["w"].grad is staged["o"][0].grad is staged["p"].grad is None


def test_many_small_values_cost_little_beyond_themselves():
    state = {f"w{i}": torch.ones(1) for i in range(1000)}
    gc.collect()
    tracemalloc.start()
    staged = stage(state)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(staged) == 1000
    assert peak < 4 << 20
    assert kept < 1 << 20, "something of the copying was kept"


def test_what_cannot_be_copied_is_named():
    with pytest.raises(StagingError, match=r"state_dict\['a'\]\[1\], a lock"):
        stage({"a": [1, threading.Lock()]})


def test_stagers_do_not_reuse_memory_that_a_save_may_still_read():
    weight = torch.ones(4)
    for stager in (DefaultStager(IN_PLACE), DefaultStager(SHARED), BlockingAsyncStager(cache_staged_state_dict=True)):
        weight.fill_(1)
        first = stager.stage({"w": weight})
        weight.fill_(2)
        second = stager.stage({"w": weight})
        assert (first["w"].tolist(), second["w"].tolist()) == ([1] * 4, [2] * 4)
        stager.close()


def test_the_interface_is_torchs():
    assert AsyncStager is TorchsAsyncStager
    assert StagingOptions is TorchsStagingOptions
    for stager in (DefaultStager(IN_PLACE), BlockingAsyncStager()):
        assert isinstance(stager, TorchsAsyncStager)
        stager.synchronize_staging()
        stager.close()
    assert DefaultStager(IN_PLACE).should_synchronize_after_execute
    assert not BlockingAsyncStager().should_synchronize_after_execute


def test_background_copies_come_as_futures_and_their_failures_too():
    stager = DefaultStager(BACKGROUND)
    assert stager.stage({"x": 1}).result() == {"x": 1}
    failed = stager.stage({"x": threading.Lock()})
    with pytest.raises(StagingError):
        failed.result()
    with pytest.raises(StagingError):
        stager.synchronize_staging()
    stager.close()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="tells what happens without an accelerator")
def test_options_that_need_an_accelerator_say_so():
    with pytest.raises(AssertionError, match="Expected an accelerator"):
        DefaultStager()
    with pytest.warns(UserWarning, match="Pinned memory needs CUDA"):
        DefaultStager(StagingOptions(True, False, False, False))


def test_meta_tensors_stay_as_they_are():
    meta = torch.zeros(3, device="meta")
    assert staged_copy({"m": meta})["m"] is meta
