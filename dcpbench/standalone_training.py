"""The script that `dcpbench script` fills in for a case of training: shows what it shows, without dcpbench.

Run as `python THIS_FILE`, it runs itself under torchrun once per step, with that step's number of ranks, and compares.
It exits with 1 where the defect shows. Nothing imports it; in a script the modules that it imports from dcpbench stand
in full above it.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from dcpbench.models.app import App
from dcpbench.models.case import AXES, Parallelism, TrainingCase, TrainingStep
from dcpbench.models.loop import Loop
from dcpbench.models.places import leaves_of_state_dict
from dcpbench.models.tree import ModelSpec

import torch.distributed.checkpoint as dcp  # isort: skip  (the engine)
import torch.distributed.checkpoint.state_dict as functions  # isort: skip  (the engine)

CASE = TrainingCase("case", ModelSpec())

TIMEOUT_S = 120
Values = dict[str, Any]


def local(value: Any) -> Any:
    """Returns what this rank holds of a value, copied."""
    if isinstance(value, torch.Tensor):
        return (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
    return value


def whole(value: Any) -> Any:
    """Returns a value whole; all ranks call it."""
    return local(value.full_tensor() if isinstance(value, DTensor) else value)


def is_same(one: Any, other: Any) -> bool:
    """Reads as: both are of the same type, and the same to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        flat = [value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other) if value.numel()]
        return alike and (not flat or torch.equal(*flat))
    return type(one) is type(other) and repr(one) == repr(other)


def report(what: str, want: Values, got: Values, keys: Any = None) -> bool:
    """Prints what differs; returns whether nothing does."""
    wrong = [key for key in (want if keys is None else keys) if key not in got or not is_same(want[key], got[key])]
    rank = dist.get_rank() if dist.is_initialized() else 0
    for key in wrong[:3]:
        print(f"rank {rank}: {what}: {key!r} is {got.get(key, 'missing')!r:.200}, expected {want[key]!r:.200}")
    return not wrong


def held(loop: Loop) -> Values:
    """Returns what this rank holds of the loop."""
    return {key: local(value) for key, value in loop.leaves()}


def make_loop(step: TrainingStep, instance: int = 0) -> Loop:
    """Returns the training loop of a step."""
    how: Parallelism = CASE.layouts[step.layout]
    mesh: DeviceMesh | None = None
    if how.needs_mesh:
        mesh = init_device_mesh("cpu", how.sizes, mesh_dim_names=AXES[how.kind])
    return Loop(CASE, step.layout, mesh, "cpu", instance)


def trained(step: TrainingStep) -> tuple[Loop, Any]:
    """Returns a loop at the point where its state is read, and the loss there if that is within a step."""
    loop = make_loop(step)
    loop.train(0, CASE.num_before)
    return loop, loop.backward(CASE.num_before) if CASE.is_mid_step else None


def read(step: TrainingStep, folder: str) -> bool:
    """Reads the state; then saves it, or compares training with and without reading, and after setting it again."""
    loop, loss = trained(step)
    before, kept, app = held(loop), loop.keep(), App(loop, CASE, functions)
    if step.action == "save":
        state = {"app": app} if CASE.form == "stateful" else app.read()
        dcp.save({**state, **kept, "step": CASE.num_before}, checkpoint_id=f"{folder}/checkpoint")  # type: ignore[attr-defined]
        truth = {key: whole(value) for key, value in loop.leaves()}
        losses = loop.train(CASE.num_before, CASE.num_after)
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save({"truth": truth, "losses": losses}, f"{folder}/truth.pt")
        return True
    state = app.read()
    said = {key: local(value) for key, value in leaves_of_state_dict(state, loop.names)}
    is_right = CASE.options.full_state_dict or report("read", before, said, before.keys() & said.keys())
    is_right &= report("after reading", before, held(loop))
    copied = {name: copy_of(part) for name, part in state.items()} if step.restores else None
    losses = loop.train(CASE.num_before, CASE.num_after, loss)
    alone, loss = trained(step)
    losses_alone = alone.train(CASE.num_before, CASE.num_after, loss)
    is_right &= report(
        "training after reading", {"losses": losses_alone, **held(alone)}, {"losses": losses, **held(loop)}
    )
    if copied is not None:
        is_right &= restore(loop, app, copied, kept, before)
    return is_right


def copy_of(tree: Any) -> Any:
    """Returns a copy of a state dict, tensors included."""
    if isinstance(tree, dict):
        return {key: copy_of(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(copy_of(value) for value in tree)
    return tree.detach().clone() if isinstance(tree, torch.Tensor) else tree


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Returns all tensors of a state dict."""
    if isinstance(tree, dict | list | tuple):
        return [found for value in (tree.values() if isinstance(tree, dict) else tree) for found in tensors_of(value)]
    return [tree] if isinstance(tree, torch.Tensor) else []


def restore(loop: Loop, app: App, state: dict[str, Any], kept: dict[str, Any], before: Values) -> bool:
    """Sets what was read again and compares."""
    keys, tensors = {name: list(part) for name, part in state.items()}, tensors_of(state)
    app.set(state)
    loop.put_back(kept)
    is_right = report("after setting", before, held(loop), wanted(before))
    is_right &= report("the state dict that was set", keys, {name: list(part) for name, part in state.items()})
    restored = held(loop)
    for tensor in tensors:
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().add_(1)
    return is_right & report("after the state dict was written over", restored, held(loop))


def wanted(keys: Any) -> list[str]:
    """Returns which keys must be back after a set."""
    sections = ("sched", "rng") + ("model",) * CASE.has_model + ("optim",) * CASE.has_optimizers
    frozen = {f"model/{p.fqn}" for p in CASE.model.parameters() if not p.is_trained}
    left_out = frozen if CASE.options.ignore_frozen_params else set()
    return [key for key in keys if key.split("/")[0] in sections and key not in left_out]


def load(step: TrainingStep, folder: str) -> bool:
    """Builds another instance, loads what was saved, and compares it and the training after it."""
    loop = make_loop(step, instance=1)
    loop.train(100, step.num_warm)
    loop.clear()
    app = App(loop, CASE, functions)
    holder: dict[str, Any] = {**loop.keep(), "step": None}
    holder |= {"app": app} if CASE.form == "stateful" else app.read()
    dcp.load(holder, checkpoint_id=f"{folder}/checkpoint")  # type: ignore[attr-defined]
    if CASE.form != "stateful":
        app.set(holder)
    loop.put_back(holder)
    saved = torch.load(f"{folder}/truth.pt", weights_only=False)
    got = {key: whole(value) for key, value in loop.leaves()}
    is_right = report("after loading", saved["truth"], got, wanted(saved["truth"]))
    losses = loop.train(CASE.num_before, CASE.num_after)
    is_same_layout = len(set(CASE.layouts)) == 1 and CASE.is_resumed_whole
    return is_right & (
        not is_same_layout or report("resumed training", {"losses": saved["losses"]}, {"losses": losses})
    )


def run(number: int, folder: str) -> bool:
    """Runs one step on this rank; returns whether all was right."""
    warnings.simplefilter("ignore")
    step = CASE.steps[number]
    is_distributed = CASE.layouts[step.layout].distributed
    if is_distributed:
        dist.init_process_group("gloo")
    is_right = load(step, folder) if step.action == "load" else read(step, folder)
    if is_distributed:
        dist.destroy_process_group()
    return is_right


def main() -> int:
    """Runs all steps, each under its own number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        for number, step in enumerate(CASE.steps):
            how = CASE.layouts[step.layout]
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={how.world_size}"]
            command = [sys.executable, *(launcher if how.distributed else []), __file__, str(number), folder]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            try:
                code = subprocess.run(command, check=False, timeout=TIMEOUT_S, env=environment).returncode
            except subprocess.TimeoutExpired:
                code = -1
            if code:
                how_it_ended = f"hung for {TIMEOUT_S} s" if code == -1 else "failed"
                print(f"step {number}, a {step.action} on {how}, {how_it_ended}: the defect is there")
                return 1
    print("all steps were right: the defect is not there")
    return 0


if __name__ == "__main__":
    sys.exit(not run(int(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 1 else main())
