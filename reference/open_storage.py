"""From a `checkpoint_id` to a ready storage reader or writer: the first thing that happens in a save or load."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from .filesystem import FileSystemReader, FileSystemWriter

__all__ = ["StorageSetupError", "open_reader", "open_storage", "open_writer", "takes_storage_second"]

Path = str | os.PathLike[str]
F = TypeVar("F", bound=Callable[..., Any])


class StorageSetupError(ValueError, RuntimeError):
    """No storage was given, and none can be told from the `checkpoint_id`; torch raises `RuntimeError` here."""


def open_writer(writer: StorageWriter | None, checkpoint_id: Path | None) -> StorageWriter:
    """Return `writer`, or one for the folder `checkpoint_id`; told of `checkpoint_id` if there is one.

    Raises:
        StorageSetupError: neither is given, or `checkpoint_id` is a URL.
    """
    if writer is None:
        writer = FileSystemWriter(_local_path(checkpoint_id, "storage_writer"))
    if checkpoint_id is not None:
        writer.reset(checkpoint_id)
    return writer


def open_reader(reader: StorageReader | None, checkpoint_id: Path | None) -> StorageReader:
    """Return `reader`, or one for the folder `checkpoint_id`; told of `checkpoint_id` if there is one.

    Raises:
        StorageSetupError: neither is given, or `checkpoint_id` is a URL.
    """
    if reader is None:
        reader = FileSystemReader(_local_path(checkpoint_id, "storage_reader"))
    if checkpoint_id is not None:
        reader.reset(checkpoint_id)
    return reader


def open_storage(storage: Any, checkpoint_id: Path | None, reader: bool = False) -> Any:
    """Return what `open_reader` or `open_writer` returns; in torch, `_storage_utils._storage_setup`."""
    return open_reader(storage, checkpoint_id) if reader else open_writer(storage, checkpoint_id)


def takes_storage_second(argument: str) -> Callable[[F], F]:
    """Let a function be called with its storage as second positional argument, as it once was; warns of it.

    Args:
        argument: what the storage is called today.
    """

    def decorate(function: F) -> F:
        @wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            if len(args) != 2:
                return function(*args, **kwargs)
            warnings.warn(f"Expected {argument}= as a keyword but got it by position.", FutureWarning, stacklevel=2)
            return function(args[0], **{argument: args[1]}, **kwargs)

        return inner  # type: ignore[return-value]

    return decorate


def _local_path(checkpoint_id: Path | None, argument: str) -> Path:
    if not checkpoint_id or "://" in str(checkpoint_id):
        raise StorageSetupError(
            f"Expected a local path but got checkpoint_id={checkpoint_id!r}. Give one, or pass {argument}."
        )
    return checkpoint_id
