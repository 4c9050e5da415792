"""Builds a generated model from its spec: torch's own modules, small enough for thousands of cases. Runs on ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

import torch
import torch.nn.functional as F  # noqa: N812  the name that everybody knows
from torch import Tensor, nn

from dcpbench.models.tree import CONTAINERS, INNER, TIME, Block, BlockKind, ModelSpec

__all__ = ["Model", "build_model"]


class Mlp(nn.Module):
    """Two linear layers: ``[batch, time, width]`` to the same, as every block here."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class Norm(nn.Module):
    """A LayerNorm; in a module of its own, so that sequence parallelism can cut what goes into it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


class BatchNorm(nn.Module):
    """A BatchNorm1d: parameters, buffers of floating point and a 0-d one of integers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.transpose(1, 2))
        return out.transpose(1, 2)


class Conv(nn.Module):
    """A convolution along time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.transpose(1, 2))
        return out.transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention. Under tensor parallelism a rank has some of the heads."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.head = width // num_heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (w(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return out


class Experts(nn.Module):
    """A mixture of experts: their weights in stacks ``[experts, in, out]``, softly gated so that each is trained."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, width, INNER) / width**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, INNER, width) / INNER**0.5)
        self.gate = nn.Linear(width, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        hidden = torch.bmm(flat.expand(self.up.shape[0], -1, -1), self.up)
        each = torch.bmm(F.gelu(hidden), self.down)
        share: Tensor = self.gate(flat).softmax(-1).t().unsqueeze(-1)
        mixed: Tensor = (each * share).sum(0)
        return mixed.view_as(x)


class Positions(nn.Module):
    """Adds rows of an embedding, by position; with few rows one row serves several positions."""

    def __init__(self, width: int, num_rows: int, *, is_sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_rows, width, sparse=is_sparse)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.embedding(torch.arange(TIME) % self.embedding.num_embeddings)
        return out.expand_as(x)


class Scale(nn.Module):
    """A gain: a 0-d parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Empty(nn.Module):
    """Has a parameter without elements."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.nothing.sum(0)


class Counter(nn.Module):
    """Counts its calls and keeps a running mean in persistent buffers, and the last mean in one that is not."""

    calls: Tensor
    mean: Tensor
    scratch: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scratch", torch.zeros(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            self.scratch.copy_(x.detach().mean((0, 1)))
            self.mean.lerp_(self.scratch, 0.5)
        return x + self.mean


class Unused(nn.Module):
    """Has a parameter that no forward pass touches: it never has a gradient."""

    def __init__(self, width: int, num_rows: int) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.randn(num_rows, width))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Extra(nn.Module):
    """Has extra state: how often it was called, and a note."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return x * (1 + 1 / self.num_calls)

    def get_extra_state(self) -> dict[str, Any]:
        return {"num_calls": self.num_calls, "note": "kept"}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.num_calls = state["num_calls"]


class Sequence(nn.Sequential):
    """Blocks one after the other, each added to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return run_blocks(self, x)


class Model(nn.Module):
    """A whole model: ``[batch, time, width]`` to the same.

    A frozen parameter is what the model was given from elsewhere: its values depend on the seed alone, those of the
    others on seed and instance.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        if spec.has_root_parameter:
            self.shift = nn.Parameter(torch.randn(spec.width))
        self.has_root_parameter = spec.has_root_parameter

    def forward(self, x: Tensor) -> Tensor:
        if self.has_root_parameter:
            x = x + self.shift
        return run_blocks(self, x)


def run_blocks(parent: nn.Module, x: Tensor) -> Tensor:
    """Returns ``x`` after all children of ``parent``, each added to its input."""
    for child in parent.children():
        x = run_blocks(child, x) if isinstance(child, nn.ModuleList | nn.ModuleDict) else x + child(x)
    return x


def build_model(spec: ModelSpec, seed: int, instance: int) -> Model:
    """Returns the model, not yet parallel, the same on each rank."""
    torch.default_generator.manual_seed(seed * 2 + instance)  # torch.manual_seed also looks for devices, for long
    model = Model(spec)
    linears: list[nn.Linear] = []
    for block in spec.blocks:
        model.add_module(block.name, _build(block, spec.width, linears))
    model.to(cast("torch.dtype", getattr(torch, spec.dtype)))
    torch.default_generator.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 2)
    return model


def _build(block: Block, width: int, linears: list[nn.Linear]) -> nn.Module:
    if block.kind in CONTAINERS:
        children = [_build(child, width, linears) for child in block.children]
        if block.kind == "dict":
            return nn.ModuleDict({child.name: module for child, module in zip(block.children, children, strict=True)})
        return nn.ModuleList(children) if block.kind == "list" else Sequence(*children)
    module = _MAKERS[block.kind](block, width)
    if block.is_frozen:
        module.requires_grad_(False)
    if isinstance(module, nn.Linear):
        linears.append(module)
        if block.tied_to is not None:
            module.weight = linears[block.tied_to].weight
    return module


_MAKERS: Final[dict[BlockKind, Callable[[Block, int], nn.Module]]] = {
    "linear": lambda _, width: nn.Linear(width, width),
    "mlp": lambda block, width: Mlp(width, block.size),
    "norm": lambda _, width: Norm(width),
    "batch-norm": lambda _, width: BatchNorm(width),
    "conv": lambda _, width: Conv(width),
    "attention": lambda block, width: Attention(width, block.size),
    "experts": lambda block, width: Experts(width, block.size),
    "embedding": lambda block, width: Positions(width, block.size, is_sparse=block.is_sparse),
    "scale": lambda *_: Scale(),
    "empty": lambda _, width: Empty(width),
    "counter": lambda _, width: Counter(width),
    "dropout": lambda *_: nn.Dropout(0.3),
    "unused": lambda block, width: Unused(width, block.size),
    "extra": lambda *_: Extra(),
}
