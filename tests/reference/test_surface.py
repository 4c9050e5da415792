import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

import reference

SOURCE = Path(reference.__file__).parent
OWN_LOGIC = (
    "planner_helpers",
    "default_planner",
    "resharding",
    "_nested_dict",
    "_traverse",
    "_dedup",
    "state_dict_saver",
    "state_dict_loader",
    "checkpoint.utils",
)


def imports():
    for path in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield from ((path.name, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_public_name_exists_and_is_sorted():
    for path in sorted(SOURCE.glob("*.py")):
        module = importlib.import_module("reference" if path.stem == "__init__" else f"reference.{path.stem}")
        assert all(hasattr(module, name) for name in module.__all__)
        assert list(module.__all__) == sorted(module.__all__), path.name


def test_torchs_own_algorithms_are_not_used():
    found = list(imports())
    assert found
    for file, name in found:
        assert not any(part in name for part in OWN_LOGIC), (file, name)
        assert not name.startswith("dcpbench"), (file, name)
        assert name.split(".")[0] in {"torch", "numpy"} or name.split(".")[0] in sys.stdlib_module_names, (file, name)


@pytest.mark.parametrize(
    "name",
    ["CheckpointException", "SavePlan", "LoadPlan", "Metadata", "StorageReader", "StorageWriter", "WriteItem"],
)
def test_data_types_are_torchs(name):
    theirs = getattr(dcp, name, None) or getattr(dcp.api, name)
    assert getattr(reference, name) is theirs


def test_our_classes_are_torchs_subclasses():
    assert issubclass(reference.FileSystemWriter, dcp.StorageWriter)
    assert issubclass(reference.FileSystemReader, dcp.StorageReader)
    assert issubclass(reference.DefaultSavePlanner, dcp.SavePlanner)
    assert issubclass(reference.DefaultLoadPlanner, dcp.LoadPlanner)
    assert not issubclass(reference.DefaultSavePlanner, dcp.DefaultSavePlanner)


@pytest.mark.parametrize("name", ["default_planner", "storage", "api", "state_dict_saver", "state_dict_loader"])
def test_modules_of_torchs_names_hand_names_on(name):
    module = importlib.import_module(f"reference.{name}")
    assert module.__all__


def test_importing_needs_no_more_than_torch():
    code = "import sys, reference; print('hypothesis' in sys.modules, 'dcpbench' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parent, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"]
