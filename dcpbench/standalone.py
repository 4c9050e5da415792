"""The script that `dcpbench script` fills in: shows what a case shows, with torch alone.

Run as `python THIS_FILE`, it runs itself under torchrun for each run of steps on the same number of ranks, and compares
after each load. It exits with 1 where the defect shows. Nothing imports it; it stays in the package so that it is
linted and typed like the rest.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from itertools import groupby
from math import inf, nan
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import torch.distributed.checkpoint as dcp  # isort: skip  (the engine)
import torch.distributed.checkpoint.format_utils as formats  # isort: skip  (the engine)

STEPS: list[dict[str, Any]] = []

PLACEMENTS = {"Replicate": Replicate, "Shard": Shard, "_StridedShard": _StridedShard}
NAMED_VALUES = (inf, nan, OrderedDict)  # values of the case may need them
LIMIT_S = 30


class Unsavable:
    """A value that raises when it is pickled."""

    def __reduce_ex__(self, protocol: object) -> str:
        raise RuntimeError("this value cannot be pickled")


class Keeper:
    """A Stateful that holds a dict."""

    def __init__(self, held: dict[Any, Any], fails: bool) -> None:
        self.held, self.fails = held, fails

    def state_dict(self) -> dict[Any, Any]:
        if self.fails:
            raise RuntimeError("this Stateful has no state to give")
        return dict(self.held)

    def load_state_dict(self, held: dict[Any, Any]) -> None:
        self.held = dict(held)


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


def state_dict(step: dict[str, Any], rank: int, meshes: dict[Any, DeviceMesh]) -> dict[Any, Any]:
    """Returns the source of a save or the destination of a load."""
    root: dict[Any, Any] = {}
    is_source = step["action"] in ("save", "async_save", "import")
    for tensor in step["tensors"]:
        if rank not in tensor["ranks"]:
            continue
        if tensor["shards"][rank] is None:
            local = torch.empty(0, dtype=getattr(torch, tensor["dtype"]))
        else:
            local = local_tensor(tensor, rank, is_source=is_source)
        if tensor["placements"] is not None:
            placements = [PLACEMENTS[name](*given, **named) for name, given, named in tensor["placements"]]
            stride = torch.empty(tensor["shape"], device="meta").stride()
            shape, mesh = torch.Size(tensor["shape"]), meshes[tensor["mesh"]]
            local = DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
        put(root, tensor["path"], local)
    for value in step["values"]:
        if rank in value["ranks"]:
            held = Unsavable() if value["is_unsavable"] else value["held"][rank]
            put(root, value["path"], held if is_source else "never loaded")
    for key in step["statefuls"]:
        if isinstance(root.get(key), dict):
            root[key] = Keeper(root[key], rank in step["failing"])
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
    """Returns what hangs at a path; None if nothing does."""
    for part in path:
        root = root.held if isinstance(root, Keeper) else root
        keys = root if isinstance(root, dict) else {}
        root = root[part[0]] if isinstance(part, tuple) else keys.get(part)
    return root


def compare(step: dict[str, Any], rank: int, loaded: dict[Any, Any]) -> bool:
    """Prints what differs after a load; returns whether nothing does."""
    is_right = True
    for tensor in step["tensors"]:
        if rank not in tensor["ranks"] or tensor["shards"][rank] is None:
            continue
        got = get(loaded, tensor["path"])
        data = bytes_of(got) if isinstance(got, Tensor) else repr(got)
        want = tensor["shards"][rank][1]
        if data != want:
            is_right = False
            print(f"rank {rank}: {tensor['path']} holds {data[:64]}, expected {want[:64]}")
    for value in step["values"]:
        got = repr(get(loaded, value["path"]))
        if rank in value["ranks"] and got not in map(repr, value["may_be"]):
            is_right = False
            print(f"rank {rank}: {value['path']} holds {got:.80}, expected {value['may_be'][0]!r:.80}")
    return is_right


def bytes_of(tensor: Tensor) -> str:
    """Returns the bytes of what a rank holds of a tensor, as hex."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    flat = local.clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes().hex() if flat.numel() else ""


def check_metadata(step: dict[str, Any], path: str) -> bool:
    """Prints what the metadata of a checkpoint says wrong of its tensors; returns whether nothing is."""
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata  # type: ignore[attr-defined]
    is_right = True
    for tensor in step["tensors"]:
        entry: Any = entries[".".join(str(part[0] if isinstance(part, tuple) else part) for part in tensor["path"])]
        got = (str(entry.properties.dtype).removeprefix("torch."), tuple(entry.size))
        if got != (tensor["dtype"], tuple(tensor["shape"])):
            is_right = False
            print(f"the metadata says of {tensor['path']} {got}, expected {tensor['dtype']} {tensor['shape']}")
    return is_right


def overwrite(held: Any) -> None:
    """Does what training does after async_save: writes other bytes into each tensor, and changes each value."""
    held = held.held if isinstance(held, Keeper) else held
    for key, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
        if isinstance(value, dict | list | Keeper):
            overwrite(value)
        elif isinstance(value, Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            local.detach().untyped_storage().fill_(0)  # type: ignore[attr-defined]
        else:
            held[key] = "changed later"


class Job:
    """Some steps, one after the other in one process, as in a job that goes on."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.rank, self.meshes = 0, dict[Any, DeviceMesh]()
        self.held: dict[Any, Any] = {}
        self.futures: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}

    def run(self, step: dict[str, Any]) -> bool:
        """Runs one step on this rank; returns whether all was right."""
        if step["distributed"] and not dist.is_initialized():
            dist.init_process_group("gloo")
            self.rank = dist.get_rank()
        for ranks, sizes, axes in step["meshes"]:
            mesh = DeviceMesh("cpu", torch.tensor(ranks).reshape(sizes), mesh_dim_names=axes)
            self.meshes[ranks, sizes, axes] = mesh
        group = dist.new_group(list(step["members"])) if step["members"] else None
        path = step["id"].replace("FOLDER", self.folder)
        if step["action"] in ("delete", "copy", "rename", "convert", "wait"):
            return self.other(step, path)
        self.held = self.held if step["resaves"] else state_dict(step, self.rank, self.meshes)
        if step["members"] and self.rank not in step["members"]:
            return True
        given = {"checkpoint_id": path, "process_group": group, **step["call"]}
        try:
            self.call(step, given)
        except BaseException as error:
            print(f"rank {self.rank}: {type(error).__name__}: {str(error)[-300:]}")
            return step["must_fail"] and self.all_raised(step)
        if step["action"] == "save" and self.rank == 0 and not check_metadata(step, path):
            return False
        return not step["must_fail"] and (step["action"] != "load" or compare(step, self.rank, self.held))

    def all_raised(self, step: dict[str, Any]) -> bool:
        """Waits until each rank has raised, since one that ends would wake up those that wait for ever."""
        for_rank = os.path.join(self.folder, "raised-{}")
        Path(for_rank.format(self.rank)).touch()
        for _ in range(200):
            if all(Path(for_rank.format(rank)).exists() for rank in range(step["world_size"])):
                return True
            time.sleep(0.05)
        print(f"rank {self.rank}: some ranks have not raised, 10 s after this one")
        return False

    def call(self, step: dict[str, Any], given: dict[str, Any]) -> None:
        path = given["checkpoint_id"]
        if step["action"] == "load":
            reader = self.kept.get("reader") or dcp.FileSystemReader(path)  # type: ignore[attr-defined]
            planner = dcp.DefaultLoadPlanner(**step["planner"])  # type: ignore[attr-defined]
            dcp.load(self.held, storage_reader=reader, planner=planner, **given)  # type: ignore[attr-defined]
            self.kept |= {"reader": reader} if step["reuse"] else {}
            return
        writer = self.kept.get("writer") or dcp.FileSystemWriter(path, **step["writer"])  # type: ignore[attr-defined]
        self.kept |= {"writer": writer} if step["reuse"] else {}
        given |= {"storage_writer": writer, "planner": dcp.DefaultSavePlanner(**step["planner"])}  # type: ignore[attr-defined]
        if step["action"] == "import":
            torch.save(self.held, f"{path}.pt")
            formats.torch_save_to_dcp(f"{path}.pt", path)
            return
        if step["action"] == "save":
            dcp.save(self.held, **given)  # type: ignore[attr-defined]
            return
        if step["is_left_open"]:
            given["process_group"] = dist.new_group(list(range(dist.get_world_size())))
        future: Any = dcp.async_save(self.held, **given)  # type: ignore[attr-defined]
        overwrite(self.held)
        if step["is_left_open"]:
            self.futures[path] = future
        else:
            future.result()

    def other(self, step: dict[str, Any], path: str) -> bool:
        """Waits for a save, or changes folders; returns whether all was right."""
        target = os.path.join(self.folder, step["target"])
        if step["action"] == "wait":
            self.futures.pop(path).result()
        elif step["action"] == "convert":
            formats.dcp_to_torch_save(path, f"{target}.pt")
            formats.torch_save_to_dcp(f"{target}.pt", target)
            return compare(step, 0, torch.load(f"{target}.pt", weights_only=False))
        elif self.rank == 0:
            if step["action"] == "copy":
                shutil.copytree(path, target, dirs_exist_ok=True)
            elif step["action"] == "rename":
                shutil.rmtree(target, ignore_errors=True)
                shutil.move(path, target)
            else:
                shutil.rmtree(path)
        if dist.is_initialized():
            dist.barrier()
        return True


def run(first: int, last: int, folder: str) -> bool:
    """Runs some steps on this rank; returns whether all was right."""
    warnings.simplefilter("ignore")
    signal.alarm(LIMIT_S)  # who waits for ever is ended
    os.chdir(folder)
    job = Job(folder)
    outcomes = [job.run(step) for step in STEPS[first:last]]
    if dist.is_initialized():
        dist.destroy_process_group()
    return all(outcomes)


def main() -> int:
    """Runs all steps, those on equally many ranks together."""
    with tempfile.TemporaryDirectory() as folder:
        numbered = enumerate(STEPS)
        for (world_size, is_distributed), steps in groupby(
            numbered, lambda one: (one[1]["world_size"], one[1]["distributed"])
        ):
            numbers = [number for number, _ in steps]
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
            arguments = [__file__, str(numbers[0]), str(numbers[-1] + 1), folder]
            command = [sys.executable, *(launcher if is_distributed else []), *arguments]
            if subprocess.run(command, check=False).returncode:
                print(f"steps {numbers}, on {world_size} ranks, failed: the defect is there")
                return 1
    print("all steps were right: the defect is not there")
    return 0


if __name__ == "__main__":
    sys.exit(not run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]) if len(sys.argv) > 1 else main())
