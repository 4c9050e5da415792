"""torch.save files <-> DCP checkpoints, and torch.save files into sharded tensors on real ranks."""

import enum
import subprocess
import sys
import warnings
from collections import OrderedDict, defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_pool import Ranks
from test_items import DTYPES
from torch.distributed.checkpoint import format_utils as torchs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from virtual_ranks import as_dtensor, blank_like, local_part, noise, raw_bytes

import reference
from reference import CheckpointException
from reference.format_utils import (
    BroadcastingTorchSaveReader,
    DynamicMetaLoadPlanner,
    dcp_to_torch_save,
    main,
    torch_save_to_dcp,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
WORLD_SIZE = 3
OURS = (torch_save_to_dcp, dcp_to_torch_save)
TORCHS = (torchs.torch_save_to_dcp, torchs.dcp_to_torch_save)


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(WORLD_SIZE)
    yield started
    started.close()


class Colour(enum.Enum):
    RED = 1


class Listened:
    """An object that `save` would take for a Stateful."""

    def __init__(self, number):
        self.number = number

    def state_dict(self):
        return {"wrong": 1}

    def load_state_dict(self, state):
        raise AssertionError

    def __eq__(self, other):
        return self.number == other.number

    __hash__ = None


def spell(value):
    """Everything that counts, as nested tuples that compare bit for bit."""
    if isinstance(value, torch.Tensor):
        facts = (value.dtype, tuple(value.size()), value.stride(), value.requires_grad)
        return type(value).__name__, *facts, raw_bytes(value)
    if isinstance(value, dict):
        attributes = spell(vars(value)) if hasattr(value, "__dict__") else None
        return (
            type(value).__name__,
            [(key, type(key).__name__, spell(entry)) for key, entry in value.items()],
            attributes,
        )
    if isinstance(value, list | tuple):
        return type(value).__name__, [spell(entry) for entry in value]
    return type(value).__name__, value


def state_of_training():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 3}


def all_kinds():
    tied = noise((4, 5), torch.float32, 1)
    return {
        **state_of_training(),
        "dtypes": {str(dtype): noise((3,), dtype, 2) for dtype in DTYPES},
        1: {2: torch.ones(2), (1, "x"): [], None: {}, Colour.RED: 1.5},
        "empty": {},
        "lists": [{}, [], tied, [1, [torch.zeros(0, 3)]]],
        "ordered": OrderedDict(b=1, a=tied),
        "counts": defaultdict(int, x=1),
        "tuple": (1, noise((2,), torch.int8, 3)),
        "transposed": noise((4, 5), torch.float32, 4).t(),
        "every_other": torch.arange(6)[::2].clone(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "grad": torch.ones(2, requires_grad=True),
        "scalar": torch.tensor(3.0),
        "object": Listened(4),
        "dotted.key": {"a.b": torch.ones(1)},
    }


def convert_and_back(state, folder, to_dcp, to_torch):
    torch.save(state, folder / "in.pt")
    to_dcp(folder / "in.pt", folder / "dcp")
    to_torch(folder / "dcp", folder / "out.pt")
    return torch.load(folder / "out.pt", weights_only=False)


def test_whatever_a_file_holds_survives_the_round_trip(tmp_path):
    state = all_kinds()
    back = convert_and_back(state, tmp_path, *OURS)
    assert spell(back) == spell(state)
    assert back["model"]._metadata == state["model"]._metadata
    assert back["lists"][2] is back["ordered"]["a"]
    assert (tmp_path / "out.pt").stat().st_size < 1.5 * (tmp_path / "in.pt").stat().st_size


@pytest.mark.parametrize("state", [{}, {"a": {}}, {"a": []}, {0: {0: {}}}, {"": torch.ones(1)}], ids=str)
def test_small_and_empty_state_dicts(tmp_path, state):
    assert spell(convert_and_back(state, tmp_path, *OURS)) == spell(state)


@pytest.mark.parametrize(("to_dcp", "to_torch"), [(OURS[0], TORCHS[1]), (TORCHS[0], OURS[1])], ids=["to", "from"])
def test_torchs_converters_read_ours_and_ours_read_torchs(tmp_path, to_dcp, to_torch):
    state = {**state_of_training(), "o": [1, 2], "l": [torch.ones(2), {"x": 1}], "t": (1, torch.ones(1))}
    # torch's format makes every key text and every mapping a dict.
    state["model"] = dict(state["model"])
    expected = convert_and_back(state, tmp_path, *TORCHS)
    (tmp_path / "again").mkdir()
    assert spell(convert_and_back(state, tmp_path / "again", to_dcp, to_torch)) == spell(expected)


def test_a_converted_checkpoint_loads_into_a_model_with_either(tmp_path):
    state = {"w": noise((5, 2), torch.bfloat16, 1), "n": {1: noise((3,), torch.int64, 2)}}
    torch.save(state, tmp_path / "in.pt")
    torch_save_to_dcp(tmp_path / "in.pt", tmp_path / "dcp")
    for load in (reference.load, dcp.load):
        loaded = {"w": blank_like(state["w"]), "n": {1: blank_like(state["n"][1])}}
        load(loaded, checkpoint_id=tmp_path / "dcp")
        assert spell(loaded) == spell(state)


def test_checkpoints_without_planner_data(tmp_path):
    state = {"a.b": noise((3,), torch.int32, 1), "o": {"x": (1, 2)}}
    reference.save(state, checkpoint_id=tmp_path, planner=reference.DefaultSavePlanner(flatten_state_dict=False))
    dcp_to_torch_save(tmp_path, tmp_path / "out.pt")
    assert spell(torch.load(tmp_path / "out.pt", weights_only=False)) == spell(state)


@pytest.mark.parametrize("failure", ["planning", "writing", "commit"])
@pytest.mark.parametrize("has_old", [False, True])
def test_a_failed_conversion_to_dcp_changes_nothing(tmp_path, monkeypatch, failure, has_old):
    folder = tmp_path / "dcp"
    torch.save({"old": torch.ones(2)}, tmp_path / "old.pt")
    torch.save({"new": torch.zeros(2), "o": 1}, tmp_path / "new.pt")
    if has_old:
        torch_save_to_dcp(tmp_path / "old.pt", folder)
    method = {"planning": "prepare_global_plan", "writing": "write_data", "commit": "finish"}[failure]

    def fail(self, *args, **kwargs):
        if failure == "commit":
            (self.path / ".metadata.tmp").touch()
        raise OSError(28, "boom")

    monkeypatch.setattr(reference.FileSystemWriter, method, fail)
    with pytest.raises(CheckpointException, match="boom"):
        torch_save_to_dcp(tmp_path / "new.pt", folder)
    assert folder.exists() == has_old
    if has_old:
        loaded = {"old": torch.zeros(2)}
        reference.load(loaded, checkpoint_id=folder)
        assert loaded["old"].tolist() == [1, 1]


def test_a_failed_conversion_to_a_file_changes_nothing(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(1000)}, tmp_path / "in.pt")
    torch_save_to_dcp(tmp_path / "in.pt", tmp_path / "dcp")
    target = tmp_path / "out" / "x.pt"
    target.parent.mkdir()
    target.write_bytes(b"precious")

    def half(state, stream):
        stream.write(b"PK")
        raise OSError(28, "boom")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="boom"):
        dcp_to_torch_save(tmp_path / "dcp", target)
    assert {path.name: path.read_bytes() for path in target.parent.iterdir()} == {"x.pt": b"precious"}


def test_damaged_nesting_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("reference.whole_checkpoint.describe", lambda *args: b"junk")
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pt")
    torch_save_to_dcp(tmp_path / "in.pt", tmp_path / "dcp")
    with pytest.raises(CheckpointException, match="nesting of a state dict"):
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def run_module(*words):
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "reference.format_utils", *map(str, words)],
        cwd=Path(reference.__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_line_converts_both_ways(tmp_path):
    state = state_of_training()
    torch.save(state, tmp_path / "in.pt")
    assert run_module("torch_to_dcp", tmp_path / "in.pt", tmp_path / "dcp")[0] == 0
    status, out, err = run_module("dcp_to_torch", tmp_path / "dcp", tmp_path / "out.pt")
    assert (status, err) == (0, "")
    assert str(tmp_path / "out.pt") in out
    assert spell(torch.load(tmp_path / "out.pt", weights_only=False)) == spell(state)


@pytest.mark.parametrize(
    ("mode", "src", "dst", "says"),
    [
        ("torch_to_dcp", "none", "x", "got nothing"),
        ("dcp_to_torch", "none", "x", "got nothing"),
        ("torch_to_dcp", "folder", "x", "got a folder"),
        ("dcp_to_torch", "text", "x", "got a file"),
        ("torch_to_dcp", "text", "x", "no torch.save file"),
        ("torch_to_dcp", "nothing", "x", "no torch.save file"),
        ("torch_to_dcp", "cut", "x", "convert"),
        ("torch_to_dcp", "tensor", "x", "holds a mapping but got a Tensor"),
        ("torch_to_dcp", "clash", "x", "one leaf per FQN"),
        ("torch_to_dcp", "good", "text", "place for a folder but got a file"),
        ("dcp_to_torch", "folder", "x", "got none"),
        ("dcp_to_torch", "folder", "folder", "place for a file but got a folder"),
        ("dcp_to_torch", "torn", "x", "cut short"),
        ("dcp_to_torch", "checkpoint", "none/x", "existing folder"),
    ],
)
def test_the_command_line_fails_in_one_line_and_writes_nothing(tmp_path, capsys, mode, src, dst, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("not a checkpoint")
    (tmp_path / "nothing").write_text("")
    torch.save(torch.ones(1), tmp_path / "tensor")
    torch.save({1: torch.ones(1), "1": torch.ones(1)}, tmp_path / "clash")
    torch.save({"w": torch.ones(1000)}, tmp_path / "good")
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:2000])
    for name in ("checkpoint", "torn"):
        torch_save_to_dcp(tmp_path / "good", tmp_path / name)
    (tmp_path / "torn" / "__0_0.distcp").write_bytes(b"PK")
    before = sorted(tmp_path.rglob("*"))
    assert main([mode, str(tmp_path / src), str(tmp_path / dst)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def broadcast_load(path, load_with):
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))

    def spread(whole, placement):
        return as_dtensor(local_part(whole, mesh, [placement]), whole, mesh, [placement])

    def make(seed):
        return {
            "rows": spread(noise((WORLD_SIZE - 1, 4), torch.float32, seed), Shard(0)),
            "columns": {"c": spread(noise((3, 7), torch.uint16, seed + 1), Shard(1))},
            "replica": spread(noise((3,), torch.float8_e4m3fn, seed + 2), Replicate()),
            "plain": noise((2, 2), torch.bool, seed + 3),
            "empty": torch.zeros(0, 3),
            "scalar": noise((), torch.complex64, seed + 4),
        }

    wanted, loaded = make(1), make(100)
    if dist.get_rank() == 1:
        del loaded["plain"], wanted["plain"]
    loaders = {"reference": reference.load, "torch": dcp.load}
    planner = DynamicMetaLoadPlanner()
    loaders[load_with](loaded, checkpoint_id=path, storage_reader=BroadcastingTorchSaveReader(), planner=planner)
    return [raw_bytes(loaded[key]) == raw_bytes(wanted[key]) for key in wanted if key != "columns"] + [
        raw_bytes(loaded["columns"]["c"]) == raw_bytes(wanted["columns"]["c"])
    ]


@pytest.mark.parametrize("load_with", ["reference", "torch"])
def test_a_file_is_broadcast_into_shards(ranks, tmp_path, load_with):
    torch.save(
        {
            "rows": noise((WORLD_SIZE - 1, 4), torch.float32, 1),
            "columns": {"c": noise((3, 7), torch.uint16, 2)},
            "replica": noise((3,), torch.float8_e4m3fn, 3),
            "plain": noise((2, 2), torch.bool, 4),
            "empty": torch.zeros(0, 3),
            "scalar": noise((), torch.complex64, 5),
            "not asked for": 1,
        },
        tmp_path / "in.pt",
    )
    assert all(all(kept) for kept in ranks.values(broadcast_load, tmp_path / "in.pt", load_with))


def broadcast_failure(path, what):
    state = {"w": torch.full((4,), 5.0)}
    planner, checkpoint_id = DynamicMetaLoadPlanner(), path / "in.pt"
    reader = BroadcastingTorchSaveReader(coordinator_rank=1 if what == "coordinator" else 0)
    if what == "missing":
        state["absent"] = torch.zeros(1)
    elif what == "shape":
        state["w"] = torch.full((3,), 5.0)
    elif what == "object":
        state["o"] = 1
    elif what == "file":
        checkpoint_id = path / "none.pt"
    elif what == "planner" and dist.get_rank() == 1:
        planner.commit_tensor = lambda *args: 1 / 0
    try:
        reference.load(state, checkpoint_id=checkpoint_id, storage_reader=reader, planner=planner)
    except CheckpointException as error:
        return set(state["w"].tolist()) == {5.0}, str(error)
    return None


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("missing", "'absent'"),
        ("shape", "shape (3,)"),
        ("object", "only tensors"),
        ("file", "none.pt"),
        ("coordinator", "coordinator_rank=1"),
        ("planner", "division by zero"),
    ],
)
def test_a_failing_broadcast_load_reaches_every_rank(ranks, tmp_path, what, says):
    torch.save({"w": torch.zeros(4), "more": torch.zeros(2)}, tmp_path / "in.pt")
    for is_unchanged, text in ranks.values(broadcast_failure, tmp_path, what):
        assert says in text
        assert is_unchanged or what == "planner"


def test_one_process_needs_no_group_to_load_a_file(tmp_path):
    torch.save({"w": torch.arange(4.0), "n": {"x": torch.ones(2)}}, tmp_path / "in.pt")
    with torch.device("meta"):
        state = {"w": torch.zeros(4), "n": {"x": torch.zeros(2)}}
    reference.load(
        state,
        checkpoint_id=tmp_path / "in.pt",
        storage_reader=BroadcastingTorchSaveReader(),
        planner=DynamicMetaLoadPlanner(),
    )
    assert (state["w"].tolist(), state["n"]["x"].tolist()) == ([0, 1, 2, 3], [1, 1])


def test_a_change_of_dtype_is_told(tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "in.pt")
    state = {"w": torch.zeros(4, dtype=torch.int32)}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        reference.load(
            state,
            checkpoint_id=tmp_path / "in.pt",
            storage_reader=BroadcastingTorchSaveReader(),
            planner=DynamicMetaLoadPlanner(),
        )
    assert state["w"].tolist() == [0, 1, 2, 3]
    assert any("'w' was saved as torch.float32" in str(warning.message) for warning in told)
