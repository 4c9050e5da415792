"""The backend ``huggingface``: torch's safetensors storage, sharded by rank, with torch's engine and planners."""

from __future__ import annotations

from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from dcpbench.backends.protocol import StorageBackend

try:
    import safetensors  # noqa: F401
except ImportError as error:
    raise ImportError("safetensors is missing: pip install 'dcpbench[huggingface]'") from error

__all__ = ["BACKEND"]


def _writer(path: str) -> HuggingFaceStorageWriter:
    return HuggingFaceStorageWriter(path, save_distributed=True)


BACKEND = StorageBackend(
    "huggingface", _writer, HuggingFaceStorageReader, absent=("objects", "complex-dtypes", "float4-dtypes")
)
