"""Facts about training cases: short words by which a known defect says when it strikes.

As with plain cases, an entry explains a finding if all its facts hold for the parameter or buffer that the finding is
about, or, where the finding is about a step as a whole, for some parameter or buffer of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from dcpbench.models.case import OptimizerSpec, StateOptions, TrainingCase
from dcpbench.models.tree import Buffer, Parameter

__all__ = ["TRAINING_FACTS", "training_facts_of"]

TRAINING_FACTS = {
    "training": "the case is one of training",
    "parameter": "it is a parameter",
    "buffer": "it is a buffer",
    "no-model-state": "the model has nothing that a state dict would hold",
    "frozen": "a parameter that does not require gradients",
    "unused": "a parameter that is to be trained, but never has a gradient",
    "tied": "a parameter with several names",
    "no-dim": "a parameter or buffer without dims",
    "no-element": "a parameter without elements",
    "sparse-gradient": "a parameter whose gradients are sparse",
    "optimizer:<kind>": "the optimizer that it is in",
    "setting:<name>": "a setting of its parameter group that is on, or not the default",
    "tensor-lr": "the learning rate of its optimizer is a tensor",
    "scheduler:<kind>": "the scheduler of its optimizer",
    "several-optimizers": "there are two of them",
    "several-groups": "its optimizer has several parameter groups",
    "empty-group": "its optimizer has a parameter group without parameters",
    "no-optimizer": "a parameter that is in none",
    "key:<part>": "what the finding is about: model, optim/state, optim/group, sched, rng",
    "entry:<name>": "the entry of the optimizer state, or the setting of the group, that the finding is about",
    "bookkeeping": "that entry is in float32 whatever the parameter is in",
    "before-first-step": "no step had been taken when the state was read",
    "fresh": "the instance whose state is read or set at this step had taken none",
    "begins-in-first-step": "its optimizer makes its state, with a count of steps, in its first step",
    "stateless": "its optimizer keeps nothing for it",
    "several-ranks": "more than one took part in the step",
    "no-process-group": "there was none in the step",
    "gradients": "gradients were there when the state was read or set",
    "mid-step": "the state was read between a backward pass and the step of the optimizers",
    "parallel:<kind>": "how it was trained when its state was read",
    "load-parallel:<kind>": "how it is trained where its state is loaded",
    "checkpointed": "activation checkpointing wraps it where its state is read or loaded",
    "fsdp-over-tp": "FSDP2 shards what tensor parallelism has cut, where its state is read, set or loaded",
    "form:<kind>": "which functions were called",
    "set-together": "model and optimizers are set by one call",
    "option:<name>": "a field of StateDictOptions that is on",
    "lax": "strict=False",
    "cut-prefixes": "keep_submodule_prefixes=False",
    "submodule": "reading was confined to a part of the model",
}
"""Every fact, with the sentence that defines it."""


def training_facts_of(case: TrainingCase, key: str, step: int) -> Iterator[set[str]]:
    """Yields the facts of each parameter or buffer that a finding under ``key``, at ``step``, may be about."""
    general = set(_case_facts(case, step))
    section, fqn, entry = _parsed(key)
    if section:
        general.add(f"key:{section}")
    if entry:
        general.add(f"entry:{entry}")
    if section == "optim/state" and entry in ("mu_product", "mu", "eta"):
        general.add("bookkeeping")
    parameters = case.model.parameters()
    buffers = [buffer for buffer in case.model.buffers() if buffer.is_persistent]
    if not parameters and not buffers:
        general.add("no-model-state")
    concerned = [number for number, p in enumerate(parameters) if fqn in ("", p.fqn)]
    for number in concerned:
        yield general | set(_parameter_facts(case, parameters, number))
    found = [buffer for buffer in buffers if fqn in ("", buffer.fqn)]
    for buffer in found:
        yield general | set(_buffer_facts(buffer))
    if not concerned and not found:
        yield general


def _parsed(key: str) -> tuple[str, str, str]:
    parts = key.split("/")
    if parts[0] == "optim" and len(parts) >= 4:
        return "/".join(parts[:2]), parts[2], parts[3]
    return parts[0], parts[1] if parts[0] == "model" else "", ""


def _case_facts(case: TrainingCase, step: int) -> Iterator[str]:
    yield "training"
    yield f"form:{case.form}"
    if case.form in ("both", "stateful"):
        yield "set-together"
    if not case.num_before and not case.is_mid_step:
        yield "before-first-step"
    if case.is_mid_step:
        yield "mid-step"
    if case.keeps_gradients and case.num_before:
        yield "gradients"
    if not (case.steps[step].num_warm if case.steps[step].action == "load" else case.num_before):
        yield "fresh"
    if len(case.optimizers) > 1:
        yield "several-optimizers"
    yield from _option_facts(case.options)
    yield from _layout_facts(case, step)


def _option_facts(options: StateOptions) -> Iterator[str]:
    on = [name for name in options.__dataclass_fields__ if getattr(options, name) is True]
    yield from (f"option:{name}" for name in on if name not in ("strict", "keep_submodule_prefixes"))
    if not options.strict:
        yield "lax"
    if not options.keep_submodule_prefixes:
        yield "cut-prefixes"
    if options.submodule:
        yield "submodule"


def _layout_facts(case: TrainingCase, step: int) -> Iterator[str]:
    source = next((s for s in case.steps[: step + 1] if s.action != "load"), case.steps[0])
    layouts = [case.layouts[source.layout]]
    yield f"parallel:{layouts[0].kind}"
    if case.steps[step].action == "load":
        layouts.append(case.layouts[case.steps[step].layout])
        yield f"load-parallel:{layouts[1].kind}"
    here = layouts[-1]
    if here.shards and here.tp > 1:
        yield "fsdp-over-tp"
    if here.world_size > 1:
        yield "several-ranks"
    if not here.distributed:
        yield "no-process-group"
    if any(layout.is_checkpointed for layout in layouts):
        yield "checkpointed"


def _parameter_facts(case: TrainingCase, parameters: tuple[Parameter, ...], number: int) -> Iterator[str]:
    parameter = parameters[number]
    yield "parameter"
    if not parameter.is_trained:
        yield "frozen"
    if parameter.is_trained and not parameter.is_used:
        yield "unused"
    if sum(other.same_as == parameter.same_as for other in parameters) > 1:
        yield "tied"
    if not parameter.shape:
        yield "no-dim"
    if 0 in parameter.shape:
        yield "no-element"
    if parameter.is_sparse:
        yield "sparse-gradient"
    for spec in case.optimizers:
        for group in spec.groups:
            if parameter.same_as in group.parameters:
                yield from _optimizer_facts(spec)
                if spec.kind == "SGD" and not group.settings.get("momentum"):
                    yield "stateless"
                yield from (f"setting:{name}" for name, value in group.settings.items() if value not in (False, 0))
                return
    yield "no-optimizer"


def _optimizer_facts(spec: OptimizerSpec) -> Iterator[str]:
    yield f"optimizer:{spec.kind}"
    if spec.kind not in ("SGD", "Adagrad", "Muon", "SparseAdam", "LBFGS"):
        yield "begins-in-first-step"
    if spec.has_tensor_lr:
        yield "tensor-lr"
    if spec.scheduler:
        yield f"scheduler:{spec.scheduler}"
    if len(spec.groups) > 1:
        yield "several-groups"
    if any(not group.parameters for group in spec.groups):
        yield "empty-group"


def _buffer_facts(buffer: Buffer) -> Iterator[str]:
    yield "buffer"
    if not buffer.shape:
        yield "no-dim"
