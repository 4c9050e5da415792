"""Strategies for training cases. Every one builds valid cases; none filters.

All shrink towards one plain rank, one linear layer, plain SGD, one step.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from dcpbench.models.case import Form, OptimizerSpec, Parallelism, StateOptions, TrainingCase, TrainingStep
from dcpbench.models.tree import ModelSpec
from dcpbench.strategies.contents import one_in
from dcpbench.strategies.modules import SMALL, model_specs, parallelisms
from dcpbench.strategies.optimizers import optimizer_specs, plain_optimizers

__all__ = ["models", "optimizers", "options"]

_seeds = st.integers(0, 2**10)
_RESUME = (TrainingStep("save", 0), TrainingStep("load", 1))


@st.composite
def models(draw: st.DrawFn) -> TrainingCase:
    """Draws a case that saves any model under one parallelism and resumes it under another one, or the same."""
    model = draw(model_specs(), label="model")
    optimizers = plain_optimizers(draw, model)
    pair = _pair(draw, model, optimizers)
    steps = (_RESUME[0], replace(_RESUME[1], num_warm=_num_warm(draw)))
    form = draw(st.sampled_from(_forms(optimizers)), label="form")
    return TrainingCase(
        "models",
        model,
        draw(_seeds),
        optimizers,
        pair,
        steps,
        StateOptions(),
        form,
        _num_before(draw),
        _num_after(draw),
    )


@st.composite
def optimizers(draw: st.DrawFn) -> TrainingCase:
    """Draws a case of any optimizers on a small model, saved and resumed, or read and set again."""
    model = draw(model_specs(SMALL, 2), label="model")
    if one_in(draw, 12, "sparse gradients"):
        blocks = tuple(replace(block, is_sparse=block.kind == "embedding") for block in model.blocks)
        model = replace(model, blocks=blocks, dtype="float32")
    chosen = optimizer_specs(draw, model)
    num_before = _num_before(draw)
    if not num_before:
        # with dampening the first step differs from all others, and no state says that it is yet to come
        chosen = tuple(_without(spec, "dampening") for spec in chosen)
    pair = _pair(draw, model, chosen, max_world_size=4)
    form = draw(st.sampled_from(_forms(chosen)), label="form")
    flat = one_in(draw, 5, "flat")
    # LBFGS keeps other entries from step to step, so that a load cannot know what to ask for
    is_in_memory = any(spec.kind == "LBFGS" for spec in chosen) or one_in(draw, 3, "in memory")
    steps: tuple[TrainingStep, ...] = (TrainingStep("read", 0, restores=True),)
    if not is_in_memory:
        steps = (_RESUME[0], replace(_RESUME[1], num_warm=_num_warm(draw)))
    return TrainingCase(
        "optimizers",
        model,
        draw(_seeds),
        chosen,
        pair[:1] if is_in_memory else pair,
        steps,
        StateOptions(flatten_optimizer_state_dict=flat),
        form,
        num_before,
        _num_after(draw),
        keeps_gradients=one_in(draw, 3, "gradients are there"),
    )


@st.composite
def options(draw: st.DrawFn) -> TrainingCase:
    """Draws a case with any sensible StateDictOptions: read at any point of the loop, set again, or resumed."""
    model = draw(model_specs(max_blocks=3), label="model")
    chosen = plain_optimizers(draw, model)
    action = draw(st.sampled_from(["set", "resume", "read"]), label="what is done")
    is_mid_step = action == "read" and one_in(draw, 3, "in the middle of a step")
    used = _state_options(draw, model, may_confine=action == "read")
    pair = _pair(draw, model, chosen, max_world_size=4)
    steps = _RESUME if action == "resume" else (TrainingStep("read", 0, restores=action == "set"),)
    return TrainingCase(
        "options",
        model,
        draw(_seeds),
        chosen,
        pair if action == "resume" else pair[:1],
        steps,
        used,
        draw(st.sampled_from(_forms(chosen)), label="form"),
        _num_before(draw),
        _num_after(draw),
        keeps_gradients=one_in(draw, 3, "gradients are there"),
        is_mid_step=is_mid_step,
    )


def _state_options(draw: st.DrawFn, model: ModelSpec, *, may_confine: bool) -> StateOptions:
    is_full = draw(st.booleans(), label="full_state_dict")
    is_offloaded = one_in(draw, 3, "cpu_offload")
    without_frozen = one_in(draw, 4, "ignore_frozen_params")
    holders = [block.name for block in model.blocks]
    is_confined = may_confine and bool(holders) and draw(st.booleans(), label="submodule")
    return StateOptions(
        full_state_dict=is_full,
        cpu_offload=is_offloaded,
        ignore_frozen_params=without_frozen,
        keep_submodule_prefixes=not (is_confined and draw(st.booleans(), label="cut prefixes")),
        strict=not (without_frozen or one_in(draw, 4, "not strict")),
        broadcast_from_rank0=is_full and (is_offloaded or one_in(draw, 3, "broadcast_from_rank0")),
        flatten_optimizer_state_dict=one_in(draw, 3, "flat"),
        submodule=draw(st.sampled_from(holders), label="submodule") if is_confined else "",
    )


def _pair(
    draw: st.DrawFn, model: ModelSpec, chosen: tuple[OptimizerSpec, ...], max_world_size: int = 8
) -> tuple[Parallelism, ...]:
    """Draws the parallelism of a save and that of a load: the same about every second time."""
    settings = [group.settings for optimizer in chosen for group in optimizer.groups]
    is_uniform = any(each.get("foreach") for each in settings)
    # what knows no DTensor
    is_whole = any(optimizer.kind in ("LBFGS", "Adafactor", "Rprop") for optimizer in chosen)
    is_whole |= any(each.get("fused") for each in settings) or any(p.is_sparse for p in model.parameters())

    def one(label: str) -> Parallelism:
        drawn = parallelisms(model, is_uniform=is_uniform, is_whole=is_whole, max_world_size=max_world_size)
        return draw(drawn, label=label)

    saved_on = one("saved on")
    return (saved_on, saved_on if draw(st.booleans(), label="same parallelism") else one("loaded on"))


def _without(spec: OptimizerSpec, setting: str) -> OptimizerSpec:
    groups = (replace(g, settings={k: v for k, v in g.settings.items() if k != setting}) for g in spec.groups)
    return replace(spec, groups=tuple(groups))


def _forms(chosen: tuple[OptimizerSpec, ...]) -> list[Form]:
    return ["both", "apart", "stateful", "both", "model", "optimizer"][: None if chosen else 5]  # type: ignore[return-value]


def _num_after(draw: st.DrawFn) -> int:
    return draw(st.sampled_from([1, 1, 2]), label="steps after")


def _num_before(draw: st.DrawFn) -> int:
    return draw(st.sampled_from([1, 0, 2, 1]), label="steps before")


def _num_warm(draw: st.DrawFn) -> int:
    return int(one_in(draw, 4, "the other instance has taken a step"))
