"""Mutants that carry something from one save or load to the next."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from dcpbench import Case
from tests.mutants.bank import Reader, Writer, breaks, rank


def _reuses(case: Case) -> bool:
    return case.options.reuse


def _reuses_and_reshards(case: Case) -> bool:
    return case.options.reuse and len({step.layout for step in case.steps if step.action == "save"}) > 1


@breaks("R106", suite="multi_checkpoint", on=lambda case: _reuses(case) and case.tensors)
class caching_reader(Reader):
    """Keeps the files that it has read, by name, when it is pointed at another checkpoint."""

    def prepare_local_plan(self, plan: Any) -> Any:
        self.cache = getattr(self, "cache", {})
        return plan

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        key = (sinfo.relative_path, sinfo.offset, sinfo.length)
        if key not in self.cache:
            self.cache[key] = super()._slice_file(file, sinfo).read()
        return io.BytesIO(self.cache[key])


@breaks("R106", "R402", "R501", suite="multi_checkpoint", on=_reuses)
class reader_keeps_path(Reader):
    """Stays with the first checkpoint that it was pointed at."""

    def reset(self, checkpoint_id: Any = None) -> None:
        super().reset(None)


@breaks("R501", "R101", "R107", "R106", suite="multi_checkpoint", on=_reuses_and_reshards)
class reader_keeps_metadata(Reader):
    """Reads the metadata once, and uses it for all checkpoints that follow."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        self.known = getattr(self, "known", None) or super().read_metadata(*args, **kwargs)
        return self.known


@breaks("R501", suite="multi_checkpoint")
class destructive_reader(Reader):
    """Moves the file that it has read out of the way."""

    def read_data(self, plan: Any, planner: Any) -> Any:
        future = super().read_data(plan, planner)
        if rank() == 0 and plan.items:
            Path(self.path, ".metadata").rename(Path(self.path, ".metadata.done"))
        return future


@breaks("R106", suite="multi_checkpoint")
class latest_wins(Reader):
    """Loads the checkpoint whose name sorts last, as text."""

    def reset(self, checkpoint_id: Any = None) -> None:
        others = [path.parent for path in Path(checkpoint_id or self.path).parent.glob("*/.metadata")]
        super().reset(max(others, default=checkpoint_id) if checkpoint_id and others else checkpoint_id)


@breaks("R402", suite="multi_checkpoint", on=_reuses)
class objects_of_first_save(Writer):
    """Writes the values of the first save again in each later one."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        self.values = getattr(self, "values", {})
        resolve = planner.resolve_data

        def resolve_once(item: Any) -> Any:
            data = resolve(item)
            return data if isinstance(data, torch.Tensor) else self.values.setdefault(item.index.fqn, data)

        planner.resolve_data = resolve_once
        return super().write_data(plan, planner)


@breaks("R106", "R402", suite="overwriting")
class keeps_first_save(Writer):
    """Does not write over a checkpoint that exists."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if Path(self.path, ".metadata").exists():
            self.path = self.path / "discarded"
        self.fs.mkdir(self.path)
        return super().write_data(plan, planner)


@breaks("R304", "R106", suite="multi_checkpoint", on=lambda case: case.options.reuse)
class writer_keeps_path(Writer):
    """Writes all checkpoints to the first place that it was given."""

    def reset(self, checkpoint_id: Any = None) -> None:
        super().reset(None)
