"""Strategies for optimizers: every one of ``torch.optim``, with its switches, parameter groups and schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from hypothesis import strategies as st

from dcpbench.models.case import Group, OptimizerSpec
from dcpbench.models.tree import ModelSpec
from dcpbench.strategies.contents import one_in

__all__ = ["OPTIMIZERS", "optimizer_specs", "plain_optimizers"]

_DECAY: Final = {"weight_decay": (0.1,)}
_LISTS: Final = {"foreach": (True, False)}
_MAXIMIZE: Final = {"maximize": (True,)}
_FUSED: Final = {"fused": (True,)}
_ADAM: Final = {"betas": ([0.8, 0.9],), "eps": (1e-6,), "amsgrad": (True,), **_DECAY, **_MAXIMIZE, **_LISTS, **_FUSED}
_DECOUPLED: Final = {"decoupled_weight_decay": (True,)}

OPTIMIZERS: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "SGD": {
        "momentum": (0.9,),
        "dampening": (0.5,),
        "nesterov": (True,),
        **_DECAY,
        **_MAXIMIZE,
        **_LISTS,
        **_FUSED,
    },
    "Adam": {**_ADAM, **_DECOUPLED},
    "AdamW": _ADAM,
    "Adadelta": {"rho": (0.8,), **_DECAY, **_MAXIMIZE, **_LISTS},
    "Adagrad": {
        "lr_decay": (0.1,),
        "initial_accumulator_value": (0.1,),
        **_DECAY,
        **_MAXIMIZE,
        **_LISTS,
        **_FUSED,
    },
    "Adamax": {"betas": ([0.8, 0.9],), **_DECAY, **_MAXIMIZE, **_LISTS},
    "ASGD": {"lambd": (0.01,), "alpha": (0.5,), "t0": (1,), **_DECAY, **_MAXIMIZE, **_LISTS},
    "NAdam": {"momentum_decay": (0.01,), **_DECOUPLED, **_DECAY, **_MAXIMIZE, **_LISTS},
    "RAdam": {"betas": ([0.8, 0.9],), **_DECOUPLED, **_DECAY, **_MAXIMIZE, **_LISTS},
    "RMSprop": {"alpha": (0.9,), "momentum": (0.9,), "centered": (True,), **_DECAY, **_MAXIMIZE, **_LISTS},
    "Rprop": {"etas": ([0.4, 1.3],), "step_sizes": ([1e-4, 1.0],), **_MAXIMIZE, **_LISTS},
    "Adafactor": {"beta2_decay": (-0.5,), "d": (1.5,), **_DECAY, **_MAXIMIZE},
    "Muon": {"momentum": (0.8,), "nesterov": (False,), "ns_steps": (2,), **_DECAY},
    "SparseAdam": {"betas": ([0.8, 0.9],), **_MAXIMIZE},
    "LBFGS": {"max_iter": (2,), "history_size": (3,), "line_search_fn": ("strong_wolfe",)},
}
"""Every optimizer of ``torch.optim``, with values for its switches other than the defaults."""

SCHEDULERS: Final = ("step", "lambda", "cosine", "restarts", "plateau", "sequence", "one-cycle")
_TAKE_TENSOR_LR: Final = ("SGD", "Adam", "AdamW", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop")
_TAKE_SPARSE: Final = ("SparseAdam", "SGD", "Adagrad")
_LR: Final = {"LBFGS": 0.5, "Adadelta": 1.0}


def plain_optimizers(draw: st.DrawFn, model: ModelSpec) -> tuple[OptimizerSpec, ...]:
    """Draws SGD or AdamW over all that is trained, or no optimizer: for cases that look elsewhere."""
    trained = tuple(n for n, p in enumerate(model.parameters()) if p.is_trained and p.same_as == n)
    kind = draw(st.sampled_from(["SGD", "AdamW", "momentum", "AdamW", "none"]), label="optimizer")
    if kind == "none" or not trained:
        return ()
    if kind == "momentum":
        return (OptimizerSpec("SGD", (Group(trained, {"lr": 0.05, "momentum": 0.9}),)),)
    return (OptimizerSpec(kind, (Group(trained, {"lr": 0.05}),)),)


def optimizer_specs(draw: st.DrawFn, model: ModelSpec) -> tuple[OptimizerSpec, ...]:
    """Draws one or two optimizers of any kind over most of what is trained, in one to three groups each.

    Shrinks towards one SGD in one group.
    """
    free = [n for n, p in enumerate(model.parameters()) if p.same_as == n and p.is_trained]
    frozen = [n for n, p in enumerate(model.parameters()) if p.same_as == n and not p.is_trained]
    if one_in(draw, 8, "frozen ones too"):
        free = sorted([*free, *frozen])
    if len(free) > 1 and one_in(draw, 10, "one left out"):
        free.remove(draw(st.sampled_from(free), label="left out"))
    specs: list[OptimizerSpec] = []
    while free and len(specs) < 2:
        kind = draw(st.sampled_from([k for k in OPTIMIZERS if _fitting(k, model, free)]), label="optimizer")
        mine = _fitting(kind, model, free)
        if kind not in ("LBFGS", "Muon", "SparseAdam") and not specs and one_in(draw, 4, "two optimizers"):
            mine = [number for number in mine if draw(st.booleans(), label="in the first")] or mine
        free = [number for number in free if number not in mine]
        specs.append(_spec(draw, kind, mine, is_sparse=any(model.parameters()[n].is_sparse for n in mine)))
        if kind == "LBFGS" or not one_in(draw, 2, "and another"):
            break
    return tuple(specs)


def _fitting(kind: str, model: ModelSpec, free: Sequence[int]) -> list[int]:
    """Returns which of the ``free`` parameters an optimizer of this kind can have."""
    parameters = model.parameters()
    if kind == "Muon":
        fits = [len(p.shape) == 2 and 0 not in p.shape and not p.is_sparse for p in parameters]
        return [n for n in free if fits[n]]
    if kind == "SparseAdam":
        return [n for n in free if parameters[n].is_sparse]
    if any(parameters[n].is_sparse for n in free):
        return list(free) if kind in _TAKE_SPARSE else [n for n in free if not parameters[n].is_sparse]
    return list(free)


def _spec(draw: st.DrawFn, kind: str, numbers: list[int], *, is_sparse: bool) -> OptimizerSpec:
    choices = {} if is_sparse and kind != "SparseAdam" else OPTIMIZERS[kind]
    settings: dict[str, Any] = {"lr": _LR.get(kind, 0.05)}
    for name, values in choices.items():
        if one_in(draw, 4, name):
            settings[name] = draw(st.sampled_from(values), label=f"value of {name}")
    _make_consistent(kind, settings)
    num_groups = 1 if kind == "LBFGS" else draw(st.sampled_from([1, 1, 2, 3]), label="groups")
    members: list[list[int]] = [[] for _ in range(num_groups)]
    for number in numbers:
        members[draw(st.integers(0, num_groups - 1), label="group") if num_groups > 1 else 0].append(number)
    may_be_empty = one_in(draw, 8, "empty group")
    groups: list[Group] = []
    for some in members:
        if some or (may_be_empty and len(members) > 1):
            more = {"lr": settings["lr"] / (2 * len(groups))} if groups else {}
            groups.append(Group(tuple(some), {**settings, **more}))
    scheduler = draw(st.sampled_from(SCHEDULERS), label="scheduler") if one_in(draw, 4, "has scheduler") else ""
    if scheduler == "one-cycle" and not {"betas", "momentum"} & settings.keys():
        scheduler = "step"
    may_be_tensor = kind in _TAKE_TENSOR_LR and not settings.get("foreach") and not is_sparse
    return OptimizerSpec(kind, tuple(groups), scheduler, may_be_tensor and one_in(draw, 6, "tensor lr"))


def _make_consistent(kind: str, settings: dict[str, Any]) -> None:
    """Changes what the optimizer would refuse."""
    if kind == "SGD" and settings.get("nesterov"):
        settings["momentum"] = 0.9
        settings.pop("dampening", None)
    if settings.get("fused"):
        settings.pop("foreach", None)
