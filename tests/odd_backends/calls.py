"""Engines with DCP's signatures: save, load and convert as torch does, save in the background in a way of their own."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import format_utils
from torch.distributed.tensor import DTensor

from dcpbench import StorageBackend
from dcpbench.backends.protocol import Engine, Formats

__all__ = ["Background", "Calls"]


class Calls:
    """torch's own functions, with all of their arguments; a subclass bends one."""

    def save(self, state_dict: dict[str, Any], **given: Any) -> Any:
        return dcp.save(state_dict, **given)

    def load(self, state_dict: dict[str, Any], **given: Any) -> None:
        dcp.load(state_dict, **given)

    def dcp_to_torch_save(self, folder: str, file: str) -> None:
        format_utils.dcp_to_torch_save(folder, file)

    def torch_save_to_dcp(self, file: str, folder: str) -> None:
        format_utils.torch_save_to_dcp(file, folder)

    async_save: Any = None

    def backend(self, name: str) -> StorageBackend:
        """Returns the backend that calls these, on torch's files."""
        return StorageBackend(
            name,
            dcp.FileSystemWriter,
            dcp.FileSystemReader,
            engine=Engine(self.save, self.load, self.async_save),
            formats=Formats(self.dcp_to_torch_save, self.torch_save_to_dcp),
        )


class Background(Calls):
    """Copies the state dict itself, and saves the copy in a thread that starts late."""

    def async_save(self, state_dict: dict[str, Any], **given: Any) -> Future[Any]:
        held, problem, future = {}, None, Future[Any]()
        try:
            held = self.copy(state_dict)
        except Exception as error:  # every rank shall hear of it
            problem = repr(error)
        self.raise_any(problem, given)
        threading.Thread(target=self.run, args=(held, given, future), daemon=True).start()
        return future

    def raise_any(self, problem: str | None, given: dict[str, Any]) -> None:
        group, problems = given.get("process_group"), [problem]
        if dist.is_initialized() and not given.get("no_dist"):
            problems *= dist.get_world_size(group)
            dist.all_gather_object(problems, problem, group=group)
        if found := [one for one in problems if one is not None]:
            raise RuntimeError("; ".join(found))

    def run(self, held: dict[str, Any], given: dict[str, Any], future: Future[Any]) -> None:
        time.sleep(0.02)
        try:
            future.set_result(dcp.save(held, **given))
        except BaseException as error:  # CheckpointException is one
            future.set_exception(error)

    def copy(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self.copy(held) for key, held in value.items()} if type(value) is dict else self.value(value)
        if isinstance(value, list) and any(isinstance(held, dict | list | torch.Tensor) for held in value):
            return [self.copy(held) for held in value]
        return self.tensor(value.detach()) if isinstance(value, torch.Tensor) else self.value(value)

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor):
            return DTensor(tensor._local_tensor.clone(), tensor._spec, requires_grad=False)
        return tensor.clone()

    def value(self, value: Any) -> Any:
        stream = io.BytesIO()
        torch.save(value, stream)
        stream.seek(0)
        return torch.load(stream, weights_only=False)
