"""The backends that ship beside torch and the reference, each against the real thing; and places other than folders."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.distributed import checkpoint as dcp

from dcpbench import StorageBackend, UsageError, judge
from dcpbench.backends import registry
from dcpbench.case import Case, Layout, LeafLayout, Mesh, ObjectLeaf, Part, Placement, Step, TensorLeaf
from dcpbench.objects import encode
from dcpbench.ranks.backends_seen import BackendsSeen

NEEDED = {
    "fsspec": ("fsspec",),
    "gathered": (),
    "huggingface": ("fsspec", "safetensors"),
    "s3": ("s3fs", "moto.server"),
}
W, B = TensorLeaf((Part("key", "w"),), (7, 3)), TensorLeaf((Part("key", "b"),), (4,), "bfloat16")
VALUE = ObjectLeaf((Part("key", "step"),), encode(12))


def case(*steps, objects=()) -> Case:
    def layout(world):
        cut = LeafLayout((Placement(0),))
        return Layout(world, Mesh(("dp",), (world,), tuple(range(world))), (cut, cut))

    return Case("adapter", 3, (W, B), objects, (layout(2), layout(1)), steps)


RESHARDED = case(Step("save", 0), Step("load", 1))
CASES = {
    "resharded": RESHARDED,
    "partial": case(Step("save", 1), Step("load", 0, without=(1,))),
    "beside": case(Step("save", 0, "a"), Step("save", 0, "b", 1), Step("load", 1, "a"), Step("load", 0, "b")),
    "missing": case(Step("load", 0, "absent", misuse="no-checkpoint")),
    "objects": case(Step("save", 0), Step("load", 1), objects=(VALUE,)),
}


def skip_without(name):
    for module in NEEDED[name]:
        pytest.importorskip(module, reason=f"{module} is missing: pip install 'dcpbench[{name}]'")


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("what", CASES)
def test_an_adapter_does_what_it_says(name, what, pool):
    skip_without(name)
    if (name, what) == ("huggingface", "objects"):
        pytest.skip("values make its files unreadable: suites/known_defects/huggingface.toml")
    verdict = judge(CASES[what], pool.run(CASES[what], name))
    assert verdict.status == "PASS", verdict.findings[0].text() if verdict.findings else verdict.reason


def test_each_adapter_is_tested_and_resolves():
    assert set(NEEDED) == set(registry.SHIPPED) - set(registry.KNOWN)
    for name in NEEDED:
        skip_without(name)
        assert registry.resolve(name).name == name


def test_what_is_missing_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "s3fs", None)
    monkeypatch.delitem(importlib.sys.modules, "dcpbench.backends.s3_dcp", raising=False)
    with pytest.raises(UsageError, match=r"s3fs is missing: pip install 'dcpbench\[s3\]'"):
        registry.resolve("s3")


@contextmanager
def shelf() -> Iterator[str]:
    """A place below a folder that the environment names; what is done to it is written down there."""
    folder = Path(os.environ["SHELF"])
    (folder / "log").write_text("entered\n")
    os.environ["SHELF_KEY"] = "open"
    try:
        yield str(folder / "place")
    finally:
        with (folder / "log").open("a") as log:
            log.write("left\n")


class Locked(dcp.FileSystemWriter):
    """Writes only where the location's key is known."""

    def __init__(self, path: str) -> None:
        assert os.environ["SHELF_KEY"] == "open"
        super().__init__(path)


on_a_shelf = StorageBackend("on-a-shelf", Locked, dcp.FileSystemReader, location=shelf)


def test_a_place_is_entered_once_and_left(pool, tmp_path, monkeypatch):
    monkeypatch.setenv("SHELF", str(tmp_path))
    seen = BackendsSeen(lambda: pool.pool)
    name = "tests.test_adapters:on_a_shelf"
    try:
        place = seen.place(name)
        assert seen.place(name) is place
        assert dict(place.environ) == {"SHELF_KEY": "open"}
        for _ in range(2):
            assert judge(RESHARDED, pool.pool.run(RESHARDED, name, place=place)).status == "PASS"
        (own,) = (tmp_path / "place").iterdir()
        assert len({path.name for path in own.iterdir()}) == 2
        assert "local-folders" in seen.declared(name)
    finally:
        seen.close()
    assert (tmp_path / "log").read_text() == "entered\nleft\n"
