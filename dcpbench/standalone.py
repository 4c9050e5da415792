"""The script that `dcpbench script` fills in: shows what a case shows, with torch alone.

Run as `python THIS_FILE`, it runs itself under torchrun once per step, with that step's number of ranks, and compares
after each load. It exits with 1 where the defect shows. Nothing imports it; it stays in the package so that it is
linted and typed like the rest.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from math import inf, nan  # values of the case may need them
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import torch.distributed.checkpoint as dcp  # isort: skip  (the engine)

STEPS: list[dict[str, Any]] = []

PLACEMENTS = {"Replicate": Replicate, "Shard": Shard, "_StridedShard": _StridedShard}
NAMED_VALUES = (inf, nan)


def local_tensor(tensor: dict[str, Any], rank: int, *, is_source: bool) -> Tensor:
    """Returns what a rank holds of a tensor: its content, or for a load other bytes in each element."""
    shape, data = tensor["shards"][rank]
    dtype = getattr(torch, tensor["dtype"])
    raw = torch.tensor(list(bytes.fromhex(data)), dtype=torch.uint8)
    if not is_source:
        raw = raw ^ (1 if dtype == torch.bool else 0xFF)
    values: Tensor = raw.view(dtype).reshape(shape)
    if tensor["memory"] == "transposed":
        order = tuple(reversed(range(len(shape))))
        return values.permute(order).contiguous().permute(order)
    if tensor["memory"] == "sliced":
        outer = torch.empty([2 * size + 1 for size in shape], dtype=dtype)
        return outer[tuple(slice(1, 2 * size, 2) for size in shape)].copy_(values)
    return values


def state_dict(step: dict[str, Any], rank: int, mesh: DeviceMesh | None) -> dict[Any, Any]:
    """Returns the source of a save or the destination of a load."""
    root: dict[Any, Any] = {}
    is_source = step["action"] == "save"
    for tensor in step["tensors"]:
        if tensor["shards"][rank] is None:
            local = torch.empty(0, dtype=getattr(torch, tensor["dtype"]))
        else:
            local = local_tensor(tensor, rank, is_source=is_source)
        if tensor["placements"] is not None:
            placements = [PLACEMENTS[name](*given, **named) for name, given, named in tensor["placements"]]
            stride = torch.empty(tensor["shape"], device="meta").stride()
            shape = torch.Size(tensor["shape"])
            local = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
        put(root, tensor["path"], local)
    for path, value in step["values"]:
        put(root, path, value if is_source else "never loaded")
    return root


def put(root: Any, path: list[Any], value: Any) -> None:
    """Puts a value at a path; a part that is a tuple is a list index, any other one a key."""
    at = root
    for part, following in zip(path, [*path[1:], None], strict=True):
        held = value if following is None else [] if isinstance(following, tuple) else {}
        if isinstance(part, tuple):
            (number,) = part
            at.extend([None] * (number + 1 - len(at)))
            if following is None or at[number] is None:
                at[number] = held
            at = at[number]
        elif following is None:
            at[part] = held
        else:
            at = at.setdefault(part, held)


def get(root: Any, path: list[Any]) -> Any:
    """Returns what hangs at a path."""
    for part in path:
        root = root[part[0]] if isinstance(part, tuple) else root[part]
    return root


def compare(step: dict[str, Any], rank: int, loaded: dict[Any, Any]) -> bool:
    """Prints what differs after a load; returns whether nothing does."""
    is_right = True
    for tensor in step["tensors"]:
        if tensor["shards"][rank] is None:
            continue
        got = get(loaded, tensor["path"])
        local = (got.to_local() if isinstance(got, DTensor) else got).detach()
        flat = local.clone(memory_format=torch.contiguous_format).reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes().hex() if flat.numel() else ""
        want = tensor["shards"][rank][1]
        if data != want:
            is_right = False
            print(f"rank {rank}: {tensor['path']} holds {data[:64]}, expected {want[:64]}")
    for path, value in step["values"]:
        if repr(get(loaded, path)) != repr(value):
            is_right = False
            print(f"rank {rank}: {path} holds {get(loaded, path)!r:.80}, expected {value!r:.80}")
    return is_right


def run(number: int, folder: str) -> bool:
    """Runs one step on this rank; returns whether all was right."""
    warnings.simplefilter("ignore")
    step, rank, mesh = STEPS[number], 0, None
    if step["distributed"]:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        ranks, sizes, axes = step["mesh"]
        mesh = DeviceMesh("cpu", torch.tensor(ranks).reshape(sizes), mesh_dim_names=axes)
    held = state_dict(step, rank, mesh)
    path = os.path.join(folder, step["checkpoint"])
    is_right = True
    if step["action"] == "save":
        dcp.save(held, checkpoint_id=path)  # type: ignore[attr-defined]
    else:
        dcp.load(held, checkpoint_id=path)  # type: ignore[attr-defined]
        is_right = compare(step, rank, held)
    if step["distributed"]:
        dist.destroy_process_group()
    return is_right


def main() -> int:
    """Runs all steps, each under its own number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        for number, step in enumerate(STEPS):
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={step['world_size']}"]
            command = [sys.executable, *(launcher if step["distributed"] else []), __file__, str(number), folder]
            if subprocess.run(command, check=False).returncode:
                print(f"step {number}, a {step['action']} on {step['world_size']} ranks, failed: the defect is there")
                return 1
    print("all steps were right: the defect is not there")
    return 0


if __name__ == "__main__":
    sys.exit(not run(int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else main())
