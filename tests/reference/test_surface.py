import ast
import dataclasses
import enum
import importlib
import inspect
import operator
import pkgutil
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

OPTIONAL = {"isal"}
"""Makes something faster where it is installed."""


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
        top = name.split(".")[0]
        assert top in {"torch", "numpy", "typing_extensions", *OPTIONAL} or top in sys.stdlib_module_names, (file, name)


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


MODULES_LEFT_OUT = {
    "_async_executor": "how torch runs a save in the background; `async_saver` here",
    "_async_process_executor": "as above; `process_saver` here",
    "_async_thread_executor": "as above; `lanes` here",
    "_checkpointer": "an experiment that nobody can call: it passes arguments that `save` does not take",
    "_experimental": "an experiment with an interface of its own",
    "_fsspec_filesystem": "storage over a library that is not needed otherwise; torch's own classes plug in",
    "_hf_utils": "names of the safetensors format; `hf_metadata` here",
    "_pg_transport": "moves state dicts between ranks: no checkpoint",
    "_state_dict_stager": "how torch stages; `staged_copy` here",
    "_version": "a switch inside torch's traversal, which here is an argument of `flatten`",
    "logger": "torch's own telemetry",
    "logging_handlers": "torch's own telemetry",
}
"""Modules of torch's that need not be here; if one is here, its names are compared like any others."""

NAMES_LEFT_OUT: dict[str, str] = {}
"""`module.name`, or `module.Class.attribute`, and why it is not here."""

OTHER_SIGNATURES: dict[str, str] = {}
"""`module.name`, or `module.Class.method`, and why it cannot be called as torch's can."""


def torchs_modules():
    return [None, *(module.name for module in pkgutil.iter_modules(dcp.__path__))]


def pair(name):
    suffix = f".{name}" if name else ""
    theirs = importlib.import_module(f"torch.distributed.checkpoint{suffix}")
    try:
        return theirs, importlib.import_module(f"reference{suffix}")
    except ModuleNotFoundError:
        return theirs, None


def public_names(module):
    names = getattr(module, "__all__", None)
    if names is not None:
        return names
    is_package = hasattr(module, "__path__")
    return [
        name
        for name, value in vars(module).items()
        if name[0] != "_"
        and not inspect.ismodule(value)
        and (is_package or getattr(value, "__module__", None) == module.__name__)
    ]


def members(cls):
    """What code that uses an object of this class may rely on."""
    names = {name for name in dir(cls) if not name.startswith("_")} | {"__init__"}
    return sorted(names - {"name", "value"} if issubclass(cls, enum.Enum) else names)


def takes(function):
    """The parameters that a caller may give; those that we add can only be given by keyword, and have defaults."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return [(p.name, p.kind, spelled(p.default)) for p in parameters]


def spelled(default):
    if isinstance(default, enum.Enum):
        return default.value
    return "a function" if inspect.isfunction(default) else default


def is_called_alike(theirs, ours):
    wanted, offered = takes(theirs), takes(ours)
    if wanted is None or wanted == offered:
        return True
    added = [p for p in offered if p not in wanted]
    can_be_left_out = all(
        kind is inspect.Parameter.KEYWORD_ONLY and default is not inspect.Parameter.empty for _, kind, default in added
    )
    return can_be_left_out and [p for p in offered if p in wanted] == wanted


def test_modules_left_out_are_torchs():
    assert set(MODULES_LEFT_OUT) <= set(torchs_modules())
    missing = {name for name in torchs_modules() if pair(name)[1] is None}
    assert missing <= set(MODULES_LEFT_OUT)


@pytest.mark.parametrize("name", torchs_modules(), ids=str)
@pytest.mark.filterwarnings("ignore")
def test_torchs_public_names_are_here_and_are_called_alike(name):
    theirs, ours = pair(name)
    if ours is None:
        return
    left_out, called_otherwise = [], []
    for public in public_names(theirs):
        place = f"{name}.{public}" if name else public
        value = getattr(theirs, public)
        own = getattr(ours, public, None)
        if not hasattr(ours, public):
            left_out.append(place)
        elif own is value:
            continue
        elif inspect.isclass(value):
            left_out += [f"{place}.{member}" for member in members(value) if not hasattr(own, member)]
            called_otherwise += [
                f"{place}.{member}"
                for member in members(value)
                if hasattr(own, member)
                and callable(getattr(value, member))
                and not is_called_alike(getattr(value, member), getattr(own, member))
            ]
            if dataclasses.is_dataclass(value):
                fields = [[(f.name, f.default) for f in dataclasses.fields(cls)] for cls in (value, own)]
                assert fields[0] == fields[1], place
            if issubclass(value, enum.Enum):
                assert {m.name: m.value for m in value} == {m.name: m.value for m in own}, place
        elif callable(value) and not is_called_alike(value, own):
            called_otherwise.append(place)
    prefix = f"{name}." if name else ""
    assert left_out == [place for place in NAMES_LEFT_OUT if place.startswith(prefix) and place in left_out]
    assert called_otherwise == [p for p in OTHER_SIGNATURES if p.startswith(prefix) and p in called_otherwise]


def test_what_is_left_out_is_told_with_a_reason_and_nothing_else_is_told():
    assert all(
        len(reason) > 10 for told in (MODULES_LEFT_OUT, NAMES_LEFT_OUT, OTHER_SIGNATURES) for reason in told.values()
    )
    for place in NAMES_LEFT_OUT:
        module, _, attribute = place.partition(".")
        with pytest.raises(AttributeError):
            operator.attrgetter(attribute)(importlib.import_module(f"reference.{module}"))


def test_modules_reached_as_attributes_are_here_too():
    for name in ("planner", "default_planner", "storage", "filesystem", "metadata", "staging", "stateful", "api"):
        assert inspect.ismodule(getattr(reference, name))
    for name in ("state_dict_saver", "state_dict_loader", "optimizer", "utils", "planner_helpers"):
        assert inspect.ismodule(getattr(reference, name)), name


def test_importing_needs_no_more_than_torch():
    code = "import sys, reference; print('hypothesis' in sys.modules, 'dcpbench' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parent, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"]
