"""Which files of a folder are its checkpoint: their names, and the index that names them.

`model.safetensors.index.json` is what commits a checkpoint. For whole tensors it is Hugging Face's own index, which
gives each tensor's file. Shards have no such index in Hugging Face, and torch writes none; here they get one that lists
the files (`shard_files`), so that a save which was cut short can be told from a finished one.

A data file is written as `NAME.pending`, and takes its name once the index that lists it is in place. So nobody who
goes by names takes half a file for a whole one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .safetensors_header import MAX_HEADER_BYTES
from .strict_json import SafetensorsError, parse_json

__all__ = [
    "Index",
    "check_file_indices",
    "checkpoint_files",
    "dump_index",
    "file_name",
    "next_generation",
    "open_listed",
    "read_index",
]

INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
PENDING = ".pending"
SHARDED_FOLDER = "sharded"
T = TypeVar("T")
DATA_FILE = re.compile(
    r"(?P<shard>shard-\d{5,}-)?model-(?:g(?P<generation>\d+)-)?\d{5,}-of-\d{5,}(?:-part-\d{5,})?"
    r"\.safetensors(?P<pending>\.pending)?"
)
"""Data files, from here (where a generation tells apart saves into the same folder) or from torch."""


@dataclass(frozen=True)
class Index:
    """What an index lists: whole tensors by file, or the files that hold shards.

    Args:
        weight_map: the file of each tensor, by FQN; empty if the files hold shards.
        shard_files: files that hold shards.
    """

    weight_map: Mapping[str, str] = field(default_factory=dict)
    shard_files: Sequence[str] = ()

    @property
    def files(self) -> list[str]:
        """The names of all files, once each, sorted."""
        return sorted({*self.weight_map.values(), *self.shard_files})


def file_name(index: int, num_files: int, *, shard: int | None = None, generation: int = 0, part: int = 1) -> str:
    """Return a data file's name; torch's own names, in a fresh folder.

    Args:
        index: from 1.
        num_files: the highest index.
        shard: number of the rank, from 1, if each rank writes files of its own.
        generation: above 0 for a save into a folder in which names are taken.
        part: above 1 for further chunks of a tensor of which the rank holds several.
    """
    first = "" if shard is None else f"shard-{shard:05d}-"
    marker = f"g{generation}-" if generation else ""
    last = f"-part-{part:05d}" if part > 1 else ""
    return f"{first}model-{marker}{index:05d}-of-{num_files:05d}{last}{SUFFIX}"


def next_generation(folder: Path) -> int:
    """Return 0 for a folder without data files, else one more than the highest generation in any file name."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    taken = [int(match["generation"] or 0) for name in names if (match := DATA_FILE.fullmatch(name))]
    return max(taken) + 1 if taken else 0


def check_file_indices(fqn_to_index_mapping: Mapping[str, int]) -> None:
    """Check that each FQN's file has a number from 1.

    Raises:
        ValueError: some has not.
    """
    for fqn, index in fqn_to_index_mapping.items():
        if type(index) is not int or index < 1:
            raise ValueError(
                f"Expected file indices from 1 but got fqn_to_index_mapping[{fqn!r}]={index!r}. Count files from 1."
            )


def open_listed(folder: Path, name: str, opener: Callable[[Path], T]) -> T:
    """Return what `opener` makes of a data file: one that was committed may still lie there as pending.

    Raises:
        FileNotFoundError: there is no such file.
    """
    for path in (folder / name, folder / f"{name}{PENDING}"):
        with suppress(FileNotFoundError):
            return opener(path)
    try:
        return opener(folder / name)  # it may have got its name between the two
    except FileNotFoundError:
        raise FileNotFoundError(f"Expected the data file {name!r} but got none in {str(folder)!r}.") from None


def checkpoint_files(folder: Path) -> tuple[list[str], Mapping[str, str]]:
    """Return the names of the files that make up the checkpoint in `folder`, and the file of each tensor, if known.

    Without an index, that is every safetensors file in the folder itself.

    Raises:
        FileNotFoundError: there is no such folder, or neither an index nor a data file in it.
        SafetensorsError: the index is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder with {SUFFIX} files but got {str(folder)!r}, which is none.")
    index = read_index(folder)
    if index is None:
        names = sorted(path.name for path in folder.iterdir() if path.name.endswith(SUFFIX))
        if not names:
            raise FileNotFoundError(f"Expected {INDEX!r} or files named '*{SUFFIX}' but got none in {str(folder)!r}.")
        return names, {}
    return index.files, index.weight_map


def read_index(folder: Path) -> Index | None:
    """Return the checked index of `folder`, or None if there is none.

    Raises:
        SafetensorsError: it is damaged, or names a file outside the folder.
    """
    try:
        with (folder / INDEX).open("rb") as stream:
            raw = stream.read(MAX_HEADER_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(raw) > MAX_HEADER_BYTES:
        raise SafetensorsError(f"Expected an index of at most {MAX_HEADER_BYTES} bytes but got more in {INDEX!r}.")
    content = parse_json(raw, INDEX)
    weight_map, shard_files = content.get("weight_map"), content.get("shard_files")
    if shard_files is not None and weight_map is None:
        if not isinstance(shard_files, list):
            raise SafetensorsError(f"Expected a list of files but got shard_files={shard_files!r:.100} in {INDEX!r}.")
        return Index(shard_files=[_checked_name(name) for name in shard_files])
    if not isinstance(weight_map, dict):
        raise SafetensorsError(f"Expected a file for each tensor but got weight_map={weight_map!r:.100} in {INDEX!r}.")
    return Index({fqn: _checked_name(name) for fqn, name in weight_map.items()})


def dump_index(index: Index, total_size: int) -> bytes:
    """Return the bytes of an index file.

    Args:
        index: what it lists.
        total_size: of all tensors' bytes.
    """
    content: dict[str, Any] = {"metadata": {"total_size": total_size}}
    if index.shard_files:
        content["shard_files"] = sorted(index.shard_files)
    else:
        content["weight_map"] = dict(index.weight_map)
    return json.dumps(content, indent=2).encode()


def _checked_name(name: Any) -> str:
    # What the folder's owner has made a link is his affair: the hub's own cache is made of links.
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name or not name.endswith(SUFFIX):
        raise SafetensorsError(
            f"Expected the name of a {SUFFIX} file in the folder but got {name!r:.100} in {INDEX!r}."
        )
    return str(name)
