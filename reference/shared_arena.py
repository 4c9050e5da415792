"""Memory that another process can take over without a copy: one anonymous file, however many tensors are in it.

It has no name in any file system, so nothing is left behind whoever is killed; and since it is one file, thousands of
tensors need one file descriptor and not thousands.
"""

from __future__ import annotations

import mmap
import os
import weakref

import torch

__all__ = ["Arena"]

_MIN_CHUNK_BYTES = 64 << 20
"""Address space to begin with; only what is written takes memory."""

_ALIGNMENT = 64


class Arena:
    """Gives out uninitialised memory, and knows where in its file it lies.

    The file is closed with the arena; memory that is still in use somewhere, in any process, stays.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("dcp-staging", os.MFD_CLOEXEC)
        self.num_bytes = 0
        self._chunks: list[tuple[int, int, mmap.mmap]] = []  # (address, where in the file, memory)
        self._used = 0
        self._close = weakref.finalize(self, os.close, self.fd)

    def allocate(self, like: torch.Tensor) -> torch.Tensor:
        """Return uninitialised CPU memory of the size, dtype and (if dense) strides of `like`, with its own storage."""
        num_bytes = like.numel() * like.element_size()
        if not num_bytes:
            return torch.empty_like(like, device="cpu", memory_format=torch.preserve_format)
        stride = torch.empty_like(like, device="meta", memory_format=torch.preserve_format).stride()
        storage = self.reserve(num_bytes)
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, like.size(), stride)

    def reserve(self, num_bytes: int) -> torch.UntypedStorage:
        """Return an uninitialised storage of `num_bytes`, at least 1, which keeps its memory alive."""
        if not self._chunks or self._used + num_bytes > len(self._chunks[-1][2]):
            self._extend(num_bytes)
        _, _, memory = self._chunks[-1]
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=self._used)
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return raw.untyped_storage()

    def find(self, storage: torch.UntypedStorage) -> int | None:
        """Return where in the file `storage` begins; None if it is not from here."""
        address = storage.data_ptr()
        for begin, offset, memory in self._chunks:
            if begin <= address < begin + len(memory):
                return offset + address - begin
        return None

    def _extend(self, num_bytes: int) -> None:
        # Each time as much as there is already: a hundred chunks would be a hundred mappings.
        length = -(-max(num_bytes, self.num_bytes, _MIN_CHUNK_BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self.fd, self.num_bytes + length)
        memory = mmap.mmap(self.fd, length, offset=self.num_bytes)
        address = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
        self._chunks.append((address, self.num_bytes, memory))
        self.num_bytes += length
        self._used = 0
