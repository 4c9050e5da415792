"""A benchmark state on one rank: its local tensors, the state dict around them, its digest. Runs on ranks.

The memory lives across calls; the DTensors around it are made anew for each, since the process group is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dcpbench.bench.filling import STALE, fill
from dcpbench.bench.workloads import StateTensor, Workload
from dcpbench.geometry import Region
from dcpbench.layout import Layout, Placement
from dcpbench.ranks.dtensors import dtensor
from dcpbench.ranks.meshes import mesh_of

__all__ = ["RankState"]

_WORDS = {2: np.uint16, 4: np.uint32}


@dataclass
class RankState:
    """What this rank holds of a workload.

    Attributes:
        workload: the whole.
        layout: how it lies on the ranks.
        rank: this one.
        device: where the tensors are: ``cpu`` or ``cuda``.
        locals: a contiguous tensor for each of the workload's, in its order; some may be empty.
        digest: of what they must hold.
    """

    workload: Workload
    layout: Layout
    rank: int
    device: str
    locals: list[torch.Tensor] = field(default_factory=list)
    digest: str = ""

    def __post_init__(self) -> None:
        self.locals = [
            torch.empty(self.region(index).shape, dtype=getattr(torch, tensor.dtype), device=self.device)
            for index, tensor in enumerate(self.workload.tensors)
        ]
        self.fill()
        self.digest = self.found_digest()

    @property
    def local_bytes(self) -> int:
        """Bytes that this rank holds."""
        return sum(local.nbytes for local in self.locals)

    def region(self, index: int) -> Region:
        """Returns what this rank holds of tensor ``index``."""
        region = self.layout.region(index, self.workload.tensors[index].shape, self.rank)
        assert region is not None
        return region

    def fill(self) -> None:
        """Writes what belongs there into every tensor."""
        for index, local in enumerate(self.locals):
            local.copy_(self._expected(index)) if self.device != "cpu" else self._fill(index, local)

    def make_stale(self) -> None:
        """Overwrites every tensor, so that what a load leaves out is seen."""
        for local in self.locals:
            _bytes(local).fill_(STALE)

    def found_digest(self) -> str:
        """Returns the digest of what the tensors hold now."""
        digest = hashlib.blake2b(digest_size=16)
        for local in self.locals:
            if local.numel():
                digest.update(_bytes(local).cpu().numpy().data)
        return digest.hexdigest()

    def fault(self) -> str:
        """Returns where the tensors differ from what must be there, in one sentence; empty if nowhere."""
        if self.found_digest() == self.digest:
            return ""
        wrong = [index for index in range(len(self.locals)) if not self._is_right(index)]
        if not wrong:
            return "the digest differed, then it did not: the tensors changed after the load"
        name, local = self.workload.tensors[wrong[0]].name, _bytes(self.locals[wrong[0]])
        held = "what it held before the load" if bool((local == STALE).all()) else "other bytes than were saved"
        return f"{name!r} holds {held} on rank {self.rank}; {len(wrong)} of {len(self.locals)} tensors are wrong"

    def state_dict(self) -> dict[str, Any]:
        """Returns a fresh flat state dict around the tensors; all ranks call it, since meshes are made."""
        mesh = mesh_of(self.layout.mesh, self.device)
        return {
            tensor.name: self._given(tensor, self.layout.leaves[index].placements, self.locals[index], mesh)
            for index, tensor in enumerate(self.workload.tensors)
        }

    def _given(
        self, tensor: StateTensor, placements: tuple[Placement, ...] | None, local: torch.Tensor, mesh: Any
    ) -> torch.Tensor:
        if placements is None:
            return local
        return dtensor(local, tensor.shape, mesh, placements, local.dtype)

    def _is_right(self, index: int) -> bool:
        return torch.equal(_bytes(self.locals[index]).cpu(), _bytes(self._expected(index)))

    def _expected(self, index: int) -> torch.Tensor:
        local = torch.empty_like(self.locals[index], device="cpu")
        self._fill(index, local)
        return local

    def _fill(self, index: int, local: torch.Tensor) -> None:
        tensor = self.workload.tensors[index]
        words = _bytes(local).numpy().view(_WORDS[local.itemsize]).reshape(local.shape)
        fill(words, tensor.name, tensor.shape, self.region(index))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
