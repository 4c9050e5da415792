"""Makes a generated model parallel: DDP, FSDP2, HSDP, tensor parallel, and products of these. Runs on ranks."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from dcpbench.models.case import AXES, Parallelism
from dcpbench.models.modules import Attention, Experts, Mlp, Model, Norm, Positions
from dcpbench.models.tree import CONTAINERS, TIME, ModelSpec

__all__ = ["parallelize"]


def parallelize(model: Model, spec: ModelSpec, how: Parallelism, mesh: DeviceMesh | None) -> nn.Module:
    """Returns what is called in place of ``model``, which has become parallel in place; all ranks call it.

    What a kind of parallelism cannot cut stays as it is: under tensor parallelism tied weights, heads and experts that
    do not divide, and dims smaller than the axis; under FSDP2 0-d and empty parameters.
    """
    if mesh is not None and AXES[how.kind][-1] == "tp":
        parallelize_module(model, mesh["tp"] if mesh.ndim > 1 else mesh, _plan(model, spec, how))
        for parameter, meant in zip(model.named_parameters(remove_duplicate=False), spec.parameters(), strict=True):
            parameter[1].requires_grad_(meant.is_trained)  # what was cut has become trained
    if how.is_checkpointed:
        for name, child in list(model.named_children()):
            if not isinstance(child, nn.ModuleList | nn.ModuleDict):
                model.register_module(name, checkpoint_wrapper(child))
    if mesh is not None and how.shards:
        _shard(model, spec, how, _data_mesh(mesh, how))
    if how.kind == "ddp":
        has_idle = any(not p.is_used for p in spec.parameters())
        return DistributedDataParallel(model, find_unused_parameters=has_idle)
    return model


def _data_mesh(mesh: DeviceMesh, how: Parallelism) -> DeviceMesh:
    """Returns the part of the mesh over which FSDP2 shards, and replicates where it has two axes."""
    match how.kind:
        case "fsdp_tp":
            return mesh["dp"]
        case "dp_cp_tp":
            return mesh["dp", "cp"]._flatten("dp_cp")
        case "hsdp_tp":
            return mesh["dp", "cp"]
    return mesh


def _shard(model: Model, spec: ModelSpec, how: Parallelism, mesh: DeviceMesh) -> None:
    whole = {p for p in model.parameters() if not p.numel() or not p.dim()}
    leaves = [fqn for fqn, block in spec.walk() if block.kind not in CONTAINERS and block.shapes(spec.width)]
    chosen = {"blocks": leaves, "some": leaves[::2], "model": []}[how.units]
    found = dict(_by_fqn(model))
    for fqn in chosen:
        fully_shard(found[fqn], mesh=mesh, ignored_params=whole)
    if how.units != "some":
        fully_shard(model, mesh=mesh, ignored_params=whole)


def _by_fqn(model: nn.Module) -> Any:
    """Yields each module with its FQN; of one that is wrapped, the wrapper."""

    def visit(module: nn.Module, prefix: str) -> Any:
        for name, child in module.named_children():
            yield f"{prefix}{name}", child
            yield from visit(getattr(child, "_checkpoint_wrapped_module", child), f"{prefix}{name}.")

    return visit(model, "")


def _plan(model: Model, spec: ModelSpec, how: Parallelism) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {}
    tied = {p.same_as for n, p in enumerate(spec.parameters()) if p.same_as != n}
    tied |= {n for n, p in enumerate(spec.parameters()) if p.same_as in tied}
    kept = {p.fqn.removesuffix(".weight") for n, p in enumerate(spec.parameters()) if n in tied}
    modules = dict(model.named_modules())
    for fqn, block in spec.walk():
        module = modules[fqn]
        if block.kind == "linear" and fqn not in kept and _can_cut(spec.width, how):
            plan[fqn] = _lone(how)
        elif isinstance(module, Positions) and all(_fills(size, how) for size in (spec.width, block.size)):
            plan[f"{fqn}.embedding"] = _lone(how)
        elif isinstance(module, Mlp) and _can_cut(block.size, how) and block.size > 1:
            # the hidden activation stays a DTensor: its features may not divide evenly
            plan[f"{fqn}.up"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
            plan[f"{fqn}.down"] = RowwiseParallel(input_layouts=Shard(-1))
        elif isinstance(module, Norm) and how.tp <= TIME:
            plan[fqn] = _cut_along_time()
            plan[f"{fqn}.norm"] = SequenceParallel(use_local_output=False)
        elif isinstance(module, Experts) and block.size % how.tp == 0:
            plan[fqn] = ExpertParallel()
        elif isinstance(module, Attention) and block.size % how.tp == 0:
            plan |= {f"{fqn}.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
            plan[f"{fqn}.wo"] = RowwiseParallel()
    return plan


def _can_cut(size: int, how: Parallelism) -> bool:
    """Reads as: DTensor cuts a dim of ``size`` along tp, and FSDP2 has something to cut further on each rank."""
    return _fills(size, how) if how.shards else size >= how.tp


def _fills(size: int, how: Parallelism) -> bool:
    """Reads as: cut along tp, a dim of ``size`` leaves no rank with nothing."""
    return size >= how.tp and -(-size // -(-size // how.tp)) == how.tp


def _lone(how: Parallelism) -> ParallelStyle:
    if how.style == "column":
        return ColwiseParallel(output_layouts=Replicate())
    return RowwiseParallel(input_layouts=Replicate())


def _cut_along_time() -> ParallelStyle:
    """Returns the style of a module between whole activations that works on a part of the sequence."""
    return PrepareModuleInputOutput(
        input_layouts=(Replicate(),),
        desired_input_layouts=(Shard(1),),
        use_local_input=False,
        output_layouts=(Shard(1),),
        desired_output_layouts=(Replicate(),),
    )


class ExpertParallel(ParallelStyle):
    """Cuts the stacks of experts along their first dim; what goes in and comes out is whole."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._cut, self._whole_in, self._whole_out)

    @staticmethod
    def _cut(_name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            shards = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            module.register_parameter(name, nn.Parameter(shards, requires_grad=parameter.requires_grad))

    @staticmethod
    def _whole_in(_module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return tuple(DTensor.from_local(x, mesh, [Replicate()], run_check=False) for x in inputs)

    @staticmethod
    def _whole_out(_module: nn.Module, output: Any, _mesh: DeviceMesh) -> Any:
        return output.redistribute(placements=[Replicate()]).to_local()
