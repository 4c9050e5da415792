"""Mutants that mix what is there with what was there: files, entries, buffers, caches."""

from __future__ import annotations

import dataclasses
import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

from dcpbench import Case
from tests.mutants.bank import Background, Dense, Engine, Reader, Writer, breaks, rank
from tests.odd_backends.dense import _gather, _raise_any


def _saves_over(case: Case) -> bool:
    names = [step.checkpoint for step in case.steps if step.saves and step.misuse == "none"]
    return len(names) > len(set(names))


def _shrinks_over(case: Case) -> bool:
    """Reads as: a save over a checkpoint is made by fewer ranks than the one before."""
    saves = [step for step in case.steps if step.saves]
    return _saves_over(case) and case.layouts[saves[0].layout].world_size > case.layouts[saves[-1].layout].world_size


def _loads_again(case: Case) -> bool:
    """Reads as: with a reader that is kept, a checkpoint is loaded, saved over and loaded again."""
    loaded: set[str] = set()
    replaced: set[str] = set()
    for step in case.steps:
        if step.action == "load" and step.checkpoint in replaced:
            return case.options.reuse
        if step.action == "load":
            loaded.add(step.checkpoint)
        elif step.saves and step.checkpoint in loaded:
            replaced.add(step.checkpoint)
    return False


@breaks("R106", "R402", "R101", suite="overwriting", on=_shrinks_over)
class reads_all_files_there(Dense):
    """Writes a file per rank and reads every such file, those of an earlier save on more ranks too."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        held, problem = {}, None
        try:
            held = {self.key(path): self.pack(value) for path, value in self.leaves(state_dict)}
            Path(checkpoint_id).mkdir(parents=True, exist_ok=True)
            (Path(checkpoint_id) / f"rank-{rank():04}.pkl").write_bytes(pickle.dumps(held))
        except Exception as error:  # every rank shall hear of it
            problem = repr(error)
        _raise_any(_gather(problem))

    def held_by(self, checkpoint: Path) -> dict[Any, Any]:
        files, whole = sorted(checkpoint.glob("rank-*.pkl")), {}
        if not files:
            raise FileNotFoundError(f"no checkpoint in {checkpoint}")
        for file in files:
            for key, packed in pickle.loads(file.read_bytes()).items():
                self.join(whole, key, packed)
        return whole


@breaks("R106", "R402", suite="overwriting", on=_saves_over)
class appends_to_files(Dense):
    """Opens the file that it writes to append to it, and reads what comes first."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        file = Path(checkpoint_id) / "dense.pkl"
        before = file.read_bytes() if rank() == 0 and file.exists() else b""
        super().save(state_dict, checkpoint_id)
        if rank() == 0:
            file.write_bytes(before + file.read_bytes())


def _saves_less_over(case: Case) -> bool:
    """Reads as: a save over a checkpoint lacks a leaf that the one before had."""
    saves = [step for step in case.steps if step.saves]
    return _saves_over(case) and bool(set(saves[-1].without) - set(saves[0].without))


@breaks("R108", suite="lenient_loads", on=_saves_less_over)
class keeps_old_entries(Writer):
    """Adds to the metadata what the checkpoint had before, for keys that it no longer has; and keeps those files."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)
        if is_coordinator and (Path(self.path) / ".metadata").exists():
            for file in Path(self.path).glob("*.distcp"):
                shutil.copy(file, file.with_suffix(".old"))

    def finish(self, metadata: Metadata, results: Any) -> None:
        file = Path(self.path) / ".metadata"
        before = pickle.loads(file.read_bytes()) if file.exists() else None
        super().finish(metadata, results)
        if before is None:
            return
        now = pickle.loads(file.read_bytes())
        for fqn, entry in before.state_dict_metadata.items():
            if fqn not in now.state_dict_metadata:
                now.state_dict_metadata[fqn] = entry
                moved = {
                    index: dataclasses.replace(info, relative_path=info.relative_path.replace(".distcp", ".old"))
                    for index, info in before.storage_data.items()
                    if index.fqn == fqn
                }
                now.storage_data.update(moved)
        file.write_bytes(pickle.dumps(now))


@breaks("R106", "R402", suite="overwriting", on=_loads_again)
class keeps_files_open(Reader):
    """Reads a file once, and serves from memory whatever is asked of the same path later."""

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        self.known = getattr(self, "known", {})
        key = (str(self.path), sinfo.relative_path, sinfo.offset, sinfo.length)
        if key not in self.known:
            self.known[key] = super()._slice_file(file, sinfo).read()
        return io.BytesIO(self.known[key])


def _changes_dtype(case: Case) -> bool:
    return any(leaf.later_dtype not in (None, leaf.dtype) for leaf in case.tensors)


@breaks("R101", "R102", "R501", suite="changing_states", on=_changes_dtype)
class remembers_dtypes(Dense):
    """Writes each tensor in the dtype that it had when a tensor of its key was first saved."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        root = str(Path(checkpoint_id).parent)
        self.known = getattr(self, "known", {})
        tensors = [(path, value) for path, value in self.leaves(state_dict) if isinstance(value, torch.Tensor)]
        dtypes = self.known.setdefault(root, {path: value.dtype for path, value in tensors})
        self.recast = {id(value): dtypes.get(path, value.dtype) for path, value in tensors}
        super().save(state_dict, checkpoint_id)

    def pack(self, value: Any) -> Any:
        packed = super().pack(value)
        if not isinstance(value, torch.Tensor) or packed is None:
            return packed
        dtype = self.recast.get(id(value), value.dtype)
        local = value.to_local() if isinstance(value, DTensor) else value
        return packed if dtype == value.dtype else (dtype, *packed[1:3], super().pack(local.detach().to(dtype))[3])


@breaks("R106", "R101", "R701", suite="async_saves", on=lambda case: sum(step.is_left_open for step in case.steps) > 1)
class one_staging_buffer(Background):
    """Copies tensors of a shape and dtype into buffers that it keeps, whether or not the save before is done."""

    def async_save(self, state_dict: dict[str, Any], **given: Any) -> Any:
        self.taken = 0
        return super().async_save(state_dict, **given)

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        self.buffers = getattr(self, "buffers", {})
        self.taken += 1
        key = (self.taken, tuple(local.shape), local.dtype)
        buffer = self.buffers.setdefault(key, torch.empty(local.shape, dtype=local.dtype))
        buffer.copy_(local)
        return DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer


@breaks(
    "R501", "R106", suite="multi_checkpoint", on=lambda case: len({s.checkpoint for s in case.steps if s.saves}) > 2
)
class keeps_two_checkpoints(Engine):
    """Removes all but the two newest checkpoints of a folder after each save, without being asked to."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        super().save(state_dict, checkpoint_id)
        found = [path.parent for path in Path(checkpoint_id).parent.glob("*/.metadata")]
        newest = sorted(found, key=lambda path: (path / ".metadata").stat().st_mtime_ns)
        for folder in newest[:-2] if rank() == 0 else []:
            shutil.rmtree(folder)


@breaks("R101", on=lambda case: case.layouts[0].world_size > 1)
class one_chunk_for_all(Reader):
    """Takes chunks of a tensor that are of one size for the same: it keeps what it read by key and size."""

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        self.first: dict[Any, Any] = {}
        return super().prepare_local_plan(plan)

    def bend(self, item: ReadItem) -> ReadItem:
        key = (item.storage_index.fqn, self.storage_data[item.storage_index].length, item.storage_offsets, item.lengths)
        return dataclasses.replace(item, storage_index=self.first.setdefault(key, item.storage_index))
