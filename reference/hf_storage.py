"""Checkpoints in a folder of safetensors files, under torch's module name; see `hf_writer` and `hf_reader`."""

from .hf_reader import HuggingFaceStorageReader
from .hf_writer import HuggingFaceStorageWriter

__all__ = ["HuggingFaceStorageReader", "HuggingFaceStorageWriter"]
