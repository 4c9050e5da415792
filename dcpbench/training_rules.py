"""The rules about the state of models and optimizers, R6xx: a part of the catalogue (:mod:`dcpbench.rules`)."""

from __future__ import annotations

from typing import Final

from dcpbench.rule import Rule

__all__ = ["TRAINING_RULES"]

_STATE = "torch.distributed.checkpoint.state_dict"

TRAINING_RULES: Final = (
    Rule(
        "R601",
        "wrong-state",
        "training",
        "A state dict must hold each tensor and value of model and optimizers as it is when it is read.",
        f"{_STATE}.get_state_dict (documentation)",
        "rounds_moments",
    ),
    Rule(
        "R602",
        "wrong-names",
        "training",
        "A state dict must name each parameter, persistent buffer and optimizer entry by its FQN, and nothing else.",
        f"{_STATE}.get_state_dict (documentation): the keys are the canonical FQNs",
        "forgets_buffers",
    ),
    Rule(
        "R603",
        "changed-by-reading",
        "training",
        "Reading a state dict must not change training: what follows is the same to the bit as without it.",
        f"{_STATE}.get_state_dict (documentation): it returns the state",
        "steps_to_read",
    ),
    Rule(
        "R604",
        "not-resumed",
        "training",
        "After a checkpoint is loaded and set, model and optimizers must hold what was saved, under any parallelism.",
        f"{_STATE}.get_state_dict (documentation): it can be resharded with other trainers and parallelisms",
        "keeps_own_buffers",
    ),
    Rule(
        "R605",
        "diverged",
        "training",
        "Training resumed under the same parallelism must go on to the bit as if it had never stopped.",
        f"{_STATE}.set_state_dict (documentation): the counterpart of get_state_dict",
        "leaves_evaluation_mode",
    ),
    Rule(
        "R606",
        "drifted",
        "training",
        "Training resumed under another parallelism must have the losses of the uninterrupted run, but for rounding.",
        f"{_STATE}.get_state_dict (documentation): it can be resharded with other trainers and parallelisms",
        "evaluates_what_is_whole",
    ),
    Rule(
        "R607",
        "not-the-identity",
        "training",
        "Setting what was read must leave model, optimizers and the training after it as they were when it was read.",
        f"{_STATE}.set_state_dict (documentation): the counterpart of get_state_dict",
        "forgets_steps",
    ),
    Rule(
        "R608",
        "tied-to-state-dict",
        "training",
        "Model and optimizers must not keep the memory of a state dict that was set.",
        "torch.nn.Module.load_state_dict (documentation): it copies; two optimizers may be set from one state dict",
        "shares_moments",
    ),
    Rule(
        "R609",
        "spoiled-state-dict",
        "training",
        "Setting a state dict must leave it as it is: it may be set again.",
        f"{_STATE}.set_state_dict (documentation): it loads the state; the state dict is an input",
        "consumes_what_is_set",
    ),
)
