"""Stream extensions: what an item's bytes go through on their way into a file, and back.

A `FileSystemWriter` is given instances; the name that each gives of itself is stored beside the item, and a
`FileSystemReader` makes them again from these names by its registry.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Sequence
from typing import IO, Any

from torch.distributed.checkpoint._extension import Extension, StreamTransformExtension

__all__ = ["Extension", "ExtensionRegistry", "StreamTransformExtension", "ZStandard"]

_MODULES = ("zstandard", "pyzstd")
_READ_BYTES = 128 << 10


class ZStandard(StreamTransformExtension):
    """Compresses with Zstandard, by the package `zstandard` or, in its absence, `pyzstd`.

    Raises:
        ValueError: neither is installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._name, self._module = _zstd_module()

    @staticmethod
    def is_available() -> bool:
        """Whether one of the packages is installed."""
        try:
            _zstd_module()
        except ValueError:
            return False
        return True

    @staticmethod
    def registry_name() -> str:
        """Return the name under which registries know this class."""
        return "stream.zstd"

    @staticmethod
    def from_descriptor(version: str) -> ZStandard:
        """Return an instance that reads what was written under `version`.

        Raises:
            ValueError: the version is not 1, or no package is installed.
        """
        if version.partition(".")[0] != "1":
            raise ValueError(f"Expected version 1 of {ZStandard.registry_name()!r} but got version={version!r}.")
        return ZStandard()

    def get_descriptor(self) -> str:
        """Return the name and version that are stored beside each item."""
        return f"{self.registry_name()}/1"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        """Return a stream that writes what is written to it compressed to `output`, and closes it when closed."""
        if self._name == "zstandard":
            writer: IO[bytes] = self._module.ZstdCompressor().stream_writer(output)
            return writer
        return _Compressing(output, self._module.ZstdCompressor())  # type: ignore[return-value]

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:  # noqa: A002  torch's name
        """Return a stream that gives the bytes whose compressed form `input` gives."""
        if self._name == "zstandard":
            reader: IO[bytes] = self._module.ZstdDecompressor().stream_reader(input)
            return reader
        return io.BufferedReader(_Decompressing(input, self._module.EndlessZstdDecompressor()))


class ExtensionRegistry:
    """Makes extensions from their stored names. Knows `ZStandard`, and what is registered."""

    def __init__(self) -> None:
        self.extensions: dict[str, type[Extension]] = {ZStandard.registry_name(): ZStandard}

    def register(self, cls: type[Extension]) -> None:
        """Let names that begin with `cls.registry_name()` make a `cls`."""
        self.extensions[cls.registry_name()] = cls

    def from_descriptor_list(self, descriptors: Sequence[str]) -> Sequence[Extension]:
        """Return an extension for each of `descriptors`, in their order.

        Args:
            descriptors: each `name[@local-domain][/version]`, as `Extension.get_descriptor` gave it on saving.

        Raises:
            ValueError: no class of that name is registered; or what its `from_descriptor` raises.
        """
        return [self._from_descriptor(descriptor) for descriptor in descriptors]

    def _from_descriptor(self, descriptor: str) -> Extension:
        name, _, version = descriptor.partition("/")
        extension = self.extensions.get(name)
        if extension is None:
            raise ValueError(
                f"Expected a registered extension but got {descriptor!r}. Known: {', '.join(sorted(self.extensions))}. "
                "Register its class with an ExtensionRegistry and give that to the reader."
            )
        return extension.from_descriptor(version)


def _zstd_module() -> tuple[str, Any]:
    for name in _MODULES:
        try:
            return name, importlib.import_module(name)
        except ImportError:
            continue
    raise ValueError(f"Expected the package {' or '.join(_MODULES)} for Zstandard but found neither. Install one.")


class _Compressing(io.RawIOBase):
    """Compresses what is written to it; closing it ends the frame and closes the stream below."""

    def __init__(self, output: IO[bytes], compressor: Any) -> None:
        self._output = output
        self._compressor = compressor

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._output.write(self._compressor.compress(content))
        return len(memoryview(content).cast("B"))

    def close(self) -> None:
        if not self.closed:
            self._output.write(self._compressor.flush())
            self._output.close()
            super().close()


class _Decompressing(io.RawIOBase):
    """Gives the content of a compressed stream."""

    def __init__(self, stream: IO[bytes], decompressor: Any) -> None:
        self._stream = stream
        self._decompressor = decompressor

    def readable(self) -> bool:
        return True

    def readinto(self, memory: Any) -> int:
        view = memoryview(memory).cast("B")
        content = b""
        while not content:
            compressed = self._stream.read(_READ_BYTES) if self._decompressor.needs_input else b""
            content = self._decompressor.decompress(compressed, len(view))
            if not content and not compressed and self._decompressor.needs_input:
                break
        view[: len(content)] = content
        return len(content)
