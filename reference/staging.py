"""Stagers: how `async_save` gets a copy of the state that training can no longer touch.

The interface is torch's: `stage` returns the copy, or a future of it if copying goes on in the background. No stager
here reuses memory of an earlier copy, since a save of that copy may still be reading it.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint.staging import AsyncStager, StagingOptions

from .staged_copy import Allocate, StagingError, staged_copy

__all__ = ["AsyncStager", "BlockingAsyncStager", "DefaultStager", "StagingError", "StagingOptions"]

_MIN_PINNED_BYTES = 5


class DefaultStager(AsyncStager):
    """Copies to CPU memory, as its options say; may be used for any number of saves, also while earlier ones run.

    Args:
        config: `use_pinned_memory` and `use_non_blocking_copy` speed up copies from a device; `use_shared_memory` puts
            the copy where another process can take it over; `use_async_staging` copies in a thread, and then the state
            must not change before the future is done.

    Raises:
        AssertionError: `use_non_blocking_copy` without an accelerator, as in torch.

    Source: torch.distributed.checkpoint.staging.
    """

    def __init__(self, config: StagingOptions = StagingOptions()) -> None:  # noqa: B008  torch's signature
        if config.use_non_blocking_copy and not torch.accelerator.is_available():
            raise AssertionError(
                "Expected an accelerator for non-blocking copies but got none. "
                "Use StagingOptions(use_non_blocking_copy=False)."
            )
        if config.use_pinned_memory and not torch.cuda.is_available():
            warnings.warn("Pinned memory needs CUDA, which is not available: ordinary memory is used.", stacklevel=2)
        self._config = config
        self.is_background = config.use_async_staging
        self._is_pinned = config.use_pinned_memory and torch.cuda.is_available() and not config.use_shared_memory
        self._executor = ThreadPoolExecutor(1, "staging") if config.use_async_staging else None
        # Made here: a stream made in the thread might turn out to be the one that training computes on.
        has_stream = config.use_async_staging and config.use_non_blocking_copy
        self._stream = torch.Stream() if has_stream else None
        self._last: Future[Any] | None = None

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> Any:  # noqa: ARG002  torch's signature
        """Return a copy of `state_dict`, or a future of one with `use_async_staging`."""
        if self._executor is None:
            return self._copy(state_dict, None)
        # What training has enqueued so far belongs to this state: the copying stream has to wait for it.
        ready = torch.accelerator.current_stream().record_event() if self._stream is not None else None
        self._last = self._executor.submit(self._copy, state_dict, ready)
        return self._last

    def synchronize_staging(self) -> None:
        """Wait until the last copy is complete; raises what made it fail."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Wait for copies under way, and end the thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=True)

    def _copy(self, state_dict: dict[str, Any], ready: torch.Event | None) -> Any:
        allocate: Allocate | None = _pinned if self._is_pinned else None
        if self._config.use_shared_memory:
            allocate = _shared
        if not self._config.use_non_blocking_copy:
            return staged_copy(state_dict, allocate=allocate)
        if self._stream is None:
            copied = staged_copy(state_dict, allocate=allocate, is_blocking=False)
            torch.accelerator.synchronize()
            return copied
        with self._stream:
            if ready is not None:
                self._stream.wait_event(ready)
            copied = staged_copy(state_dict, allocate=allocate, is_blocking=False)
        self._stream.synchronize()
        return copied


class BlockingAsyncStager(AsyncStager):
    """Copies to ordinary CPU memory before `stage` returns.

    Args:
        cache_staged_state_dict: accepted as in torch; memory is never reused, since an earlier save may still read it.
        type_check: accepted as in torch.

    Source: torch.distributed.checkpoint.staging.
    """

    _synchronize_after_execute: bool = False

    def __init__(self, cache_staged_state_dict: bool = False, type_check: bool = False) -> None:
        self.cache_staged_state_dict = cache_staged_state_dict
        self.type_check = type_check

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of `state_dict`."""
        copied: dict[str, Any] = staged_copy(state_dict)
        return copied

    def synchronize_staging(self) -> None:
        """Do nothing: `stage` has finished."""

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def _pinned(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(
        value,
        device="cpu",
        memory_format=torch.preserve_format,
        pin_memory=value.nbytes >= _MIN_PINNED_BYTES and value.device.type != "cpu",
    )


def _shared(value: torch.Tensor) -> torch.Tensor:
    stride = torch.empty_like(value, device="meta", memory_format=torch.preserve_format).stride()
    storage = torch.UntypedStorage._new_shared(value.numel() * value.element_size(), device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=value.dtype).set_(storage, 0, value.size(), stride)
