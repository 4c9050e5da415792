"""`save` and `async_save`, under torch's module name."""

from .async_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save
from .engine import save

__all__ = ["AsyncCheckpointerType", "AsyncSaveResponse", "async_save", "save"]
