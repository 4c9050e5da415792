"""The states that benchmarks save: named, versioned, frozen, each with a digest. Standard library only.

A workload says which tensors there are; a layout (:mod:`dcpbench.bench.placing`) says where they lie. Whatever
changes a digest makes old figures incomparable: raise :data:`VERSION` with it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dcpbench.bench.shapes import Llama, MixtureOfExperts, Parameter, Scaled
from dcpbench.errors import expected

__all__ = ["NAMES", "VERSION", "StateTensor", "Workload", "fitted", "workload"]

VERSION = 1

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a state; a 0-d one lies whole on every rank.

    Attributes:
        name: its key in the flat state dict.
        shape: global.
        dtype: a name of torch's.
        tp_dim: the dim that tensor parallelism cuts; None where it replicates.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tp_dim: int | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class Workload:
    """A state.

    Attributes:
        name: of :data:`NAMES`; of one rank's view, with ``@rank-R-of-N`` behind it.
        scale: of the bytes, 1.0 being the published size.
        tensors: what is saved.
        version: of the definition.
    """

    name: str
    scale: float
    tensors: tuple[StateTensor, ...]
    version: int = VERSION

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @functools.cached_property
    def digest(self) -> str:
        """Of all names, shapes and dtypes: workloads with the same digest are the same."""
        content = [[t.name, list(t.shape), t.dtype, t.tp_dim] for t in self.tensors]
        return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


_MODELS: dict[str, Llama | MixtureOfExperts] = {
    "llama3-8b": Llama(width=4096, num_layers=32, kv_width=1024, hidden=14_336),
    "llama3-70b": Llama(width=8192, num_layers=80, kv_width=1024, hidden=28_672),
    "llama3-405b": Llama(width=16_384, num_layers=126, kv_width=1024, hidden=53_248),
    "moe-1t": MixtureOfExperts(),
}
_SMALL_TENSORS = 65_536
_SMALL_BYTES = 64 * 64 * 4
_HUGE = (65_536, 131_072)

NAMES = (*_MODELS, "many-small", "few-huge")
"""Four models with AdamW state; 16 KiB tensors, whose number is scaled; four tensors of 16 GiB."""

_VIEW = re.compile(r"(?P<name>[\w.-]+)@rank-(?P<rank>\d+)-of-(?P<size>\d+)")


def workload(name: str, scale: float = 1.0) -> Workload:
    """Returns the workload ``name`` at ``scale`` of its published bytes.

    ``NAME@rank-3-of-64`` is what rank 3 of 64 holds of it under FSDP2, as tensors of their own: saved by one rank,
    without the other 63.

    Raises:
        UsageError: there is no such workload, or the scale is not above 0 and at most 1.
    """
    if not 0 < scale <= 1:
        raise expected("a scale above 0 and at most 1", "scale", scale, "Give, for example, 0.001.")
    base, rank, size = _parsed(name)
    full = Workload(base, scale, tuple(_tensors(base, scale)))
    return full if size is None else _view(full, rank, size)


def fitted(name: str, num_bytes: int) -> Workload:
    """Returns the largest scale of the workload ``name`` that has at most ``num_bytes``, or its smallest one.

    Raises:
        UsageError: there is no such workload.
    """
    if name == "many-small":
        return workload(name, min(1.0, max(1, num_bytes // _SMALL_BYTES) / _SMALL_TENSORS))
    low, high = 1e-9, 1.0
    if workload(name).num_bytes <= num_bytes:
        return workload(name)
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if workload(name, middle).num_bytes <= num_bytes else (low, middle)
    return workload(name, float(f"{low:.6g}"))


def _parsed(name: str) -> tuple[str, int, int | None]:
    match = _VIEW.fullmatch(name)
    base = match["name"] if match else name
    if base not in NAMES:
        raise expected(f"one of {', '.join(NAMES)}", "--workload", name, "Or one rank's view: llama3-70b@rank-3-of-64.")
    if match is None:
        return base, 0, None
    rank, size = int(match["rank"]), int(match["size"])
    if rank >= size:
        raise expected(f"a rank below {size}", "--workload", name, f"Give, for example, {base}@rank-0-of-{size}.")
    return base, rank, size


def _tensors(name: str, scale: float) -> Iterator[StateTensor]:
    width = _scaled(math.sqrt(scale))
    if name == "many-small":
        for number in range(max(1, round(_SMALL_TENSORS * scale))):
            yield StateTensor(f"blocks.{number}.weight", (64, 64), "float32", 0)
    elif name == "few-huge":
        for number in range(4):
            yield StateTensor(f"table.{number}.weight", (width(_HUGE[0]), width(_HUGE[1])), "bfloat16", 0)
    else:
        yield from _with_adamw(list(_MODELS[name].parameters(width)))


def _scaled(factor: float) -> Scaled:
    return lambda published: max(1, round(published * factor))


def _with_adamw(parameters: list[Parameter]) -> Iterator[StateTensor]:
    """Yields 14 bytes per parameter, as MLPerf Storage counts: bfloat16 weights; float32 masters and both moments."""
    for one in parameters:
        yield StateTensor(f"model.{one.name}", one.shape, "bfloat16", one.tp_dim)
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        for one in parameters:
            yield StateTensor(f"optim.{one.name}.{kind}", one.shape, "float32", one.tp_dim)
    for one in parameters:
        yield StateTensor(f"optim.{one.name}.step", (), "float32")


def _view(full: Workload, rank: int, size: int) -> Workload:
    def local(tensor: StateTensor) -> StateTensor:
        if not tensor.shape:
            return tensor
        rows = -(-tensor.shape[0] // size)
        held = max(0, min(tensor.shape[0], (rank + 1) * rows) - rank * rows)
        return replace(tensor, shape=(held, *tensor.shape[1:]))

    return Workload(f"{full.name}@rank-{rank}-of-{size}", full.scale, tuple(map(local, full.tensors)))
