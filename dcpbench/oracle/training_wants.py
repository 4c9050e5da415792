"""Which keys a state dict must have, and which must be back after one was set. Part of the oracle of training cases.

Source: documentation of ``StateDictOptions`` in ``torch.distributed.checkpoint.state_dict``.
"""

from __future__ import annotations

from collections.abc import Set

from dcpbench.models.case import TrainingCase

__all__ = ["expected_keys", "has_state", "wanted_after_set"]


def expected_keys(case: TrainingCase, held: Set[str], rank: int) -> dict[str, str]:
    """Returns what must be read on ``rank``: from what it is called there to what the loop calls it.

    Args:
        case: what is read, and with which options.
        held: keys of the loop's own state.
        rank: with ``full_state_dict`` and ``cpu_offload`` rank 0 alone gets something.
    """
    options = case.options
    if options.is_on_rank_0 and rank:
        return {}
    found: dict[str, str] = {}
    for key in held & _of_form(case, held):
        if key.startswith("optim/"):
            found[key] = key
            continue
        fqn = key.removeprefix("model/")
        if options.ignore_frozen_params and fqn in _frozen(case):
            continue
        if options.submodule and not fqn.startswith(f"{options.submodule}."):
            continue
        is_cut = options.submodule and not options.keep_submodule_prefixes
        found[f"model/{fqn.removeprefix(f'{options.submodule}.')}" if is_cut else key] = key
    return found


def wanted_after_set(case: TrainingCase, held: Set[str], *, is_same_loop: bool) -> set[str]:
    """Returns the keys of the loop's own state that must be back after a set.

    Args:
        case: what was set, and with which options.
        held: keys of what was read.
        is_same_loop: what was left out has never changed, so that it must be as it was, too.
    """
    frozen = _frozen(case) if case.options.ignore_frozen_params and not is_same_loop else set()
    kept = {key for key in held if key == "rng" or key.startswith("sched/")}
    return kept | {key for key in _of_form(case, held) if key.removeprefix("model/") not in frozen}


def has_state(key: str, held: Set[str]) -> bool:
    """Reads as: the optimizer keeps something for the parameter that ``key`` is about."""
    prefix = "/".join(key.split("/")[:3]) + "/"
    return any(other.startswith(prefix) for other in held)


def _of_form(case: TrainingCase, held: Set[str]) -> set[str]:
    sections = ("model/",) * case.has_model + ("optim/",) * case.has_optimizers
    return {key for key in held if key.startswith(sections)}


def _frozen(case: TrainingCase) -> set[str]:
    return {parameter.fqn for parameter in case.model.parameters() if not parameter.is_trained}
