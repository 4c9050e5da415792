"""Reading a checkpoint from a folder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ._extension import ExtensionRegistry, StreamTransformExtension
from .file_names import is_local, metadata_path
from .gc_pause import gc_paused
from .kept_plans import keeps_plans
from .metadata import MetadataError, load_metadata
from .read_items import CheckCrc, ItemReader
from .seals import check_file_seal, check_metadata_seal

__all__ = ["FileSystemReader"]


class FileSystemReader(StorageReader):
    """Reads a checkpoint from a folder, whoever wrote it.

    Args:
        path: the folder.
        _extension_registry: makes the stream extensions that items went through; None knows `ZStandard`.
        check_crc: "whole" checks the CRC of each item that is needed whole, or nearly so, and reads of any other only
            what is needed, unchecked; "always" reads and checks items whole, whatever is needed of them; "never"
            checks none.
        trusted_classes: classes beyond DCP's own that may appear in the metadata.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: ExtensionRegistry | None = None,
        *,
        check_crc: CheckCrc = "whole",
        trusted_classes: Sequence[type] = (),
    ) -> None:
        if check_crc not in ("always", "whole", "never"):
            raise ValueError(f"Expected 'always', 'whole' or 'never' but got check_crc={check_crc!r}.")
        self.path = Path(path)
        self.check_crc: CheckCrc = check_crc
        self.trusted_classes = tuple(trusted_classes)
        self._extension_registry = ExtensionRegistry() if _extension_registry is None else _extension_registry
        self.storage_data: dict[Any, Any] = {}
        self.load_id = str(uuid.uuid4())
        self.rank: int | None = None
        self.use_collectives = True
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load, from `checkpoint_id` if given. All ranks."""
        self.storage_data = {}
        self._metadata = None
        if checkpoint_id:
            self.path = Path(checkpoint_id)
        self.load_id = str(uuid.uuid4())

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002
        """Return the checkpoint's metadata, or with `rank=` that of a rank which saved alone. All ranks.

        Raises:
            FileNotFoundError: there is no checkpoint.
            MetadataError: it is damaged, or asks for anything beyond DCP's data types.
        """
        path = metadata_path(self.path, kwargs.get("rank"))
        if path.exists() and not path.is_file():
            raise MetadataError(f"Expected a file but {str(path)!r} is none.")
        raw = path.read_bytes()
        check_metadata_seal(raw)
        metadata = load_metadata(raw, trusted_classes=self.trusted_classes)
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def set_up_storage_reader(
        self,
        metadata: Metadata,
        is_coordinator: bool,  # noqa: ARG002
        *args: Any,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Take the metadata to read by. All ranks."""
        if not isinstance(metadata.storage_data, dict):
            raise MetadataError(f"Expected storage data in the metadata but got {metadata.storage_data!r}.")
        self._metadata = metadata
        self.storage_data = metadata.storage_data
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Check, before anything is changed, that every file that `plan` needs is there and long enough. All ranks.

        Raises:
            MetadataError: an item has no place in storage, or one outside the folder.
            FileNotFoundError, EOFError: a data file is missing or too short.
            ValueError: an item went through a stream extension that is not known here.
        """
        needed: dict[str, tuple[int, str]] = {}
        for item in plan.items:
            info = self._info(item.storage_index)
            if info.transform_descriptors:
                self._extension_registry.from_descriptor_list(info.transform_descriptors)
            end = info.offset + info.length
            if end > needed.get(info.relative_path, (-1, ""))[0]:
                needed[info.relative_path] = (end, item.storage_index.fqn)
        for relative_path, (end, fqn) in needed.items():
            try:
                path = self._data_path(relative_path)
                size = path.stat().st_size
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f"Expected the data file {relative_path!r} with {fqn!r} but got none in {str(self.path)!r}."
                ) from error
            if size < end:
                raise EOFError(
                    f"Expected at least {end} bytes in {relative_path!r}, which holds {fqn!r}, but got {size}. "
                    "The file is cut short."
                )
            if path.is_file() and self.check_crc != "never":
                check_file_seal(path)
        return plan

    @keeps_plans
    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged. Coordinator only."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what `plan` names, file by file in the order of their bytes. All ranks."""
        assert self._metadata is not None
        for relative_path, items in self._by_file(plan).items():
            path = self._data_path(relative_path)
            with ItemReader(path, self._metadata, planner, self.check_crc, self._transform) as reader:
                for place in sorted(items):
                    reader.read(*items[place])
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @gc_paused()
    def _by_file(self, plan: LoadPlan) -> dict[str, dict[tuple[int, int], tuple[_StorageInfo, list[ReadItem]]]]:
        """Return what is read of each item, by file and then by the item's place in it."""
        files: dict[str, dict[tuple[int, int], tuple[_StorageInfo, list[ReadItem]]]] = {}
        for item in plan.items:
            info = self._info(item.storage_index)
            items = files.setdefault(info.relative_path, {})
            items.setdefault((info.offset, info.length), (info, []))[1].append(item)
        return files

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """The folder."""
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether `checkpoint_id` can be a folder here."""
        return is_local(checkpoint_id)

    def _info(self, index: Any) -> _StorageInfo:
        info = self.storage_data.get(index)
        if not isinstance(info, _StorageInfo):
            raise MetadataError(f"Expected a place in storage for {index.fqn!r} at {index.offset!r} but got {info!r}.")
        return info

    def _transform(self, descriptors: Sequence[str], stored: IO[bytes]) -> IO[bytes]:
        stream = stored
        for extension in self._extension_registry.from_descriptor_list(descriptors):
            if isinstance(extension, StreamTransformExtension):
                stream = extension.transform_from(stream)
        return stream

    def _data_path(self, relative_path: str) -> Path:
        relative = Path(relative_path)
        if relative.is_absolute() or ".." in relative.parts or "\0" in relative_path or not relative.parts:
            raise MetadataError(
                f"Expected a path inside the checkpoint's folder but got relative_path={relative_path!r}."
            )
        path = self.path / relative
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise MetadataError(
                f"Expected a data file inside the checkpoint's folder but got relative_path={relative_path!r}, a link "
                f"to {str(path.resolve())!r}. Copy the file in place of the link."
            )
        return path
