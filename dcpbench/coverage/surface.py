"""The public surface of torch.distributed.checkpoint, read off torch itself: a new argument is a new row."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
from typing import Any, Final

__all__ = ["SECTIONS", "surface"]

_DCP: Final = "torch.distributed.checkpoint"

SECTIONS: Final[dict[str, tuple[tuple[str, tuple[str, ...]], ...]]] = {
    "Saving and loading": (
        ("state_dict_saver", ("save", "async_save", "AsyncCheckpointerType")),
        ("state_dict_loader", ("load",)),
    ),
    "Planners": (("default_planner", ("DefaultSavePlanner", "DefaultLoadPlanner")),),
    "Files": (("filesystem", ("FileSystemWriter", "FileSystemReader", "SerializationFormat")),),
    "fsspec": (("_fsspec_filesystem", ("FsspecWriter", "FsspecReader")),),
    "Hugging Face": (
        ("hf_storage", ("HuggingFaceStorageWriter", "HuggingFaceStorageReader")),
        ("quantized_hf_storage", ("QuantizedHuggingFaceStorageReader",)),
    ),
    "State of models and optimizers": (
        (
            "state_dict",
            (
                "StateDictOptions",
                "get_model_state_dict",
                "get_optimizer_state_dict",
                "get_state_dict",
                "set_model_state_dict",
                "set_optimizer_state_dict",
                "set_state_dict",
            ),
        ),
        ("stateful", ("Stateful",)),
    ),
    "Formats": (
        (
            "format_utils",
            ("dcp_to_torch_save", "torch_save_to_dcp", "BroadcastingTorchSaveReader", "DynamicMetaLoadPlanner"),
        ),
    ),
    "Staging": (("staging", ("StagingOptions", "DefaultStager", "BlockingAsyncStager")),),
    "Extensions": (("_extension", ("Extension", "StreamTransformExtension", "ZStandard", "ExtensionRegistry")),),
}
"""Modules and their public names, by section. Deprecated names (save_state_dict, load_state_dict) hand on to these."""


def surface() -> dict[str, list[str]]:
    """Returns the rows of each section: ``function.argument``, ``Class.argument``, ``Enum.MEMBER`` or a bare name."""
    found: dict[str, list[str]] = {}
    for section, modules in SECTIONS.items():
        rows: list[str] = []
        for module, names in modules:
            held = importlib.import_module(f"{_DCP}.{module}")
            for name in names:
                rows += [f"{name}.{part}" for part in _parts(getattr(held, name))] or [name]
        found[section] = rows
    return found


def _parts(thing: Any) -> list[str]:
    """Returns the arguments of a function or a constructor, the fields of a dataclass, the members of an enum."""
    if inspect.isclass(thing) and issubclass(thing, enum.Enum):
        return list(thing.__members__)
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing)]
    if inspect.isclass(thing) and (getattr(thing, "_is_protocol", False) or "__init__" not in vars(thing)):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(thing).parameters.values()
    return [one.name for one in parameters if one.kind not in kinds and one.name != "self"]
