"""Mutants that are wrong about which rank has what: order of a mesh, replicas, other world sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.tensor import DTensor, Replicate

from dcpbench import Case
from tests.mutants.bank import Dense, Engine, LoadPlanner, Reader, breaks, local_of, rank, tensors_of, world_size


def _any_placed(case: Case, is_meant: Any) -> bool:
    """Reads as: in some layout some tensor has placements that, on its mesh, are meant."""
    return any(
        leaf.placements is not None and is_meant(leaf.placements, layout.mesh_of(number))
        for layout in case.layouts
        for number, leaf in enumerate(layout.leaves)
    )


def _is_resharded(case: Case) -> bool:
    return len(case.layouts) > 1 and case.layouts[0] != case.layouts[-1]


@breaks(
    "R107", on=lambda case: _any_placed(case, lambda how, mesh: len(mesh.ranks) > 1 and {p.dim for p in how} == {None})
)
class replicas_on_first_rank_only(LoadPlanner):
    """Loads a tensor that is whole on all ranks on the coordinator only, as if others were sent theirs."""

    def create_local_plan(self) -> LoadPlan:
        plan = super().create_local_plan()
        return dataclasses.replace(plan, items=[item for item in plan.items if self.is_mine(item.dest_index.fqn)])

    def is_mine(self, fqn: str) -> bool:
        held = self.state_dict[fqn]
        is_whole = isinstance(held, DTensor) and all(isinstance(p, Replicate) for p in held.placements)
        return not is_whole or self.is_coordinator


@breaks(
    "R101",
    on=lambda case: _any_placed(
        case, lambda how, mesh: len({p.dim for p in how}) > 1 and None in {p.dim for p in how} and 1 not in mesh.sizes
    ),
)
class broadcasts_from_first_rank(Engine):
    """Has replicas of a shard filled by rank 0, which is in the first group of replicas only."""

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        super().load(state_dict, checkpoint_id)
        mine = [self.shard(tensor) for tensor in tensors_of(state_dict)]
        everyone: list[Any] = [mine]
        if dist.is_initialized():
            everyone = [None] * world_size()
            dist.all_gather_object(everyone, mine)
        for tensor, sent in zip(tensors_of(state_dict), everyone[0], strict=False):
            own = self.shard(tensor)
            if own is not None and sent is not None and len(sent) == len(own):
                held = local_of(tensor).detach()
                held.copy_(sent.view(held.dtype).reshape(held.shape))

    def shard(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the bytes that a rank holds of a tensor that is both cut and replicated; None for others."""
        if not isinstance(tensor, DTensor) or tensor.device_mesh.get_coordinate() is None:
            return None
        kinds = {isinstance(placement, Replicate) for placement in tensor.placements}
        held = local_of(tensor).detach()
        return held.contiguous().reshape(-1).view(torch.uint8).clone() if len(kinds) == 2 else None


@breaks(
    "R101",
    "R501",
    on=lambda case: (
        _is_resharded(case)
        and _any_placed(
            case, lambda how, mesh: list(mesh.ranks) != sorted(mesh.ranks) and any(p.dim is not None for p in how)
        )
    ),
)
class ignores_order_of_mesh(Dense):
    """Takes the ranks of a mesh for sorted."""

    def places(self, tensor: torch.Tensor) -> list[Any] | None:
        held = super().places(tensor)
        if not isinstance(tensor, DTensor) or held is None:
            return held
        mesh = tensor.device_mesh
        in_order = sorted(mesh.mesh.flatten().tolist())
        at = np.unravel_index(in_order.index(rank()), tuple(mesh.shape))
        bent = [np.arange(size) for size in tensor.shape]
        for where, size, placement in zip(at, mesh.shape, tensor.placements, strict=True):
            if not isinstance(placement, Replicate):
                bent[placement.dim] = self.cut(bent[placement.dim], placement, size, int(where))
        same = all(len(one) == len(other) for one, other in zip(held, bent, strict=True))
        return bent if same else held


@breaks(
    "R101",
    "R501",
    on=lambda case: (
        _is_resharded(case)
        and _any_placed(
            case,
            lambda how, mesh: (
                len([p for p in how if p.dim is not None]) > len({p.dim for p in how if p.dim is not None})
            ),
        )
    ),
)
class cuts_by_the_last_axis_first(Dense):
    """Cuts a dim that several mesh axes cut by the last of them first."""

    def places(self, tensor: torch.Tensor) -> list[Any] | None:
        held = super().places(tensor)
        if not isinstance(tensor, DTensor) or held is None:
            return held
        bent = [np.arange(size) for size in tensor.shape]
        axes = zip(tensor.device_mesh.get_coordinate() or (), tensor.device_mesh.shape, tensor.placements, strict=True)
        for at, size, placement in reversed(list(axes)):
            if not isinstance(placement, Replicate):
                bent[placement.dim] = self.cut(bent[placement.dim], placement, size, at)
        same = all(len(one) == len(other) for one, other in zip(held, bent, strict=True))
        return bent if same else held


@breaks("R501", "R101")
class last_rank_takes_the_rest(Dense):
    """Cuts a dim into parts of the rounded-down length, and gives what is left to the last one."""

    def parts(self, indices: Any, num_parts: int) -> list[Any]:
        length = len(indices) // num_parts
        cuts = [indices[part * length : (part + 1) * length] for part in range(num_parts - 1)]
        return [*cuts, indices[(num_parts - 1) * length :]]


@breaks("R501", on=lambda case: len({layout.world_size for layout in case.layouts}) > 1)
class needs_as_many_ranks(Engine):
    """Loads on as many ranks as saved, and on no other number."""

    def save(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        super().save(state_dict, checkpoint_id)
        (Path(checkpoint_id) / ".ranks").write_text(str(world_size()))

    def load(self, state_dict: dict[str, Any], checkpoint_id: str) -> None:
        super().load(state_dict, checkpoint_id)
        if int((Path(checkpoint_id) / ".ranks").read_text()) != world_size():
            raise RuntimeError("the checkpoint was saved on another number of ranks")


@breaks("R107", "R402", on=lambda case: case.layouts[0].world_size < case.layouts[-1].world_size)
class new_ranks_load_nothing(Reader):
    """Lets ranks that were not there at the save load nothing."""

    def set_up_storage_reader(self, metadata: Any, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        writers = {int(info.relative_path.split("_")[2]) for info in metadata.storage_data.values()}
        self.num_ranks = max(writers, default=0) + 1

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan if rank() < self.num_ranks else dataclasses.replace(plan, items=[])
