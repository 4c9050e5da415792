"""Converting between DCP checkpoints and `torch.save` files.

    python -m reference.format_utils torch_to_dcp  FILE    FOLDER
    python -m reference.format_utils dcp_to_torch  FOLDER  FILE

Each runs in one process and holds the whole state dict in memory. A conversion that fails leaves the destination as
it was.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .broadcast_reader import BroadcastingTorchSaveReader, DynamicMetaLoadPlanner
from .collectives import CheckpointException
from .filesystem import FileSystemReader, FileSystemWriter
from .state_dict_loader import load
from .state_dict_saver import save
from .whole_checkpoint import WholeLoadPlanner, WholeSavePlanner

__all__ = ["BroadcastingTorchSaveReader", "DynamicMetaLoadPlanner", "dcp_to_torch_save", "torch_save_to_dcp"]


def dcp_to_torch_save(dcp_checkpoint_dir: str | os.PathLike[str], torch_save_path: str | os.PathLike[str]) -> None:
    """Write what a DCP checkpoint holds into one `torch.save` file; one process.

    The file appears whole or not at all: it is written beside its place and renamed. Objects in the checkpoint are
    unpickled, so convert only what you trust.

    Args:
        dcp_checkpoint_dir: the checkpoint's folder, written here or by torch. The nesting comes back exactly if
            `torch_save_to_dcp` of this package wrote it; else as DCP records it, with every key as text.
        torch_save_path: replaced if it exists.

    Raises:
        CheckpointException: the checkpoint is missing, damaged or incomplete.
        OSError: the file cannot be written.

    Source: torch.distributed.checkpoint.format_utils.
    """
    planner = WholeLoadPlanner()
    load({}, storage_reader=FileSystemReader(dcp_checkpoint_dir), planner=planner, no_dist=True)
    target = Path(torch_save_path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            torch.save(planner.loaded, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def torch_save_to_dcp(torch_save_path: str | os.PathLike[str], dcp_checkpoint_dir: str | os.PathLike[str]) -> None:
    """Write what a `torch.save` file holds into a DCP checkpoint; one process.

    A checkpoint that is already in the folder stays loadable until the new one is committed; a folder that this made
    is removed again on failure. The file is unpickled, so convert only what you trust.

    Args:
        torch_save_path: must hold a mapping. Its nesting, keys of any type, empty containers, strides and tied tensors
            come back from `dcp_to_torch_save`.
        dcp_checkpoint_dir: made if needed.

    Raises:
        ValueError: the file holds something other than a mapping.
        CheckpointException: the state dict cannot be stored, or the folder cannot be written.
        OSError, pickle.UnpicklingError, RuntimeError: the file cannot be read.

    Source: torch.distributed.checkpoint.format_utils.
    """
    state_dict: Any = torch.load(torch_save_path, map_location="cpu", weights_only=False)
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"Expected a file that holds a mapping but got a {type(state_dict).__qualname__} in "
            f"{str(torch_save_path)!r}. Save {{name: value}} instead."
        )
    folder = Path(dcp_checkpoint_dir)
    was_there = folder.exists()
    try:
        save({}, storage_writer=FileSystemWriter(folder), planner=WholeSavePlanner(state_dict), no_dist=True)
    except BaseException:
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        raise


_MODES = {"torch_to_dcp": torch_save_to_dcp, "dcp_to_torch": dcp_to_torch_save}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, or 1 with one line on stderr (2: wrong usage).

    Args:
        arguments: default: those of this process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m reference.format_utils", description="Convert between DCP checkpoints and torch.save files."
    )
    parser.add_argument("mode", choices=sorted(_MODES), help="which way to convert")
    parser.add_argument("src", type=Path, help="what to convert: a torch.save file, or a checkpoint's folder")
    parser.add_argument("dst", type=Path, help="where to: a checkpoint's folder, or a torch.save file")
    options = parser.parse_args(arguments)
    try:
        _check_places(options.mode, options.src, options.dst)
        _MODES[options.mode](options.src, options.dst)
    except (CheckpointException, Exception) as error:
        sys.stderr.write(f"format_utils: cannot convert {str(options.src)!r}: {_in_one_line(error)}\n")
        return 1
    sys.stdout.write(f"{options.src} -> {options.dst}\n")
    return 0


def _check_places(mode: str, src: Path, dst: Path) -> None:
    reads_file = mode == "torch_to_dcp"
    wanted, other = ("a torch.save file", "a folder") if reads_file else ("a checkpoint's folder", "a file")
    if not src.exists():
        raise FileNotFoundError(f"Expected {wanted} but got nothing at src={str(src)!r}.")
    if src.is_dir() == reads_file:
        raise ValueError(f"Expected {wanted} but got {other}, src={str(src)!r}. The other mode converts that.")
    if dst.exists() and dst.is_dir() != reads_file:
        wanted, other = ("a folder", "a file") if reads_file else ("a file", "a folder")
        raise ValueError(f"Expected a place for {wanted} but got {other}, dst={str(dst)!r}. Use another path.")
    if not reads_file and not dst.absolute().parent.is_dir():
        raise FileNotFoundError(f"Expected an existing folder for dst={str(dst)!r} but got none. Make it first.")


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    elif isinstance(error, pickle.UnpicklingError | EOFError):
        return f"it is no torch.save file ({type(error).__name__})"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:400] + "…"


if __name__ == "__main__":
    sys.exit(main())
