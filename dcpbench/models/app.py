"""Model and optimizers of a training loop as an application saves them: by state-dict functions. Runs on ranks."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.stateful import Stateful

from dcpbench.models.case import TrainingCase
from dcpbench.models.loop import Loop

__all__ = ["App"]


class App(Stateful):
    """Model and optimizers of a loop, read and set by ``functions``, a module such as torch's ``state_dict``."""

    def __init__(self, loop: Loop, case: TrainingCase, functions: Any) -> None:
        self._loop = loop
        self._case = case
        self._functions = functions

    def state_dict(self) -> dict[str, Any]:
        return self.read()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.set(state_dict)

    def read(self) -> dict[str, Any]:
        """Returns what the case reads, under ``model`` and ``optim``."""
        functions, loop, options = self._functions, self._loop, self._case.options
        how: dict[str, Any] = {
            "options": functions.StateDictOptions(
                full_state_dict=options.full_state_dict,
                cpu_offload=options.cpu_offload,
                ignore_frozen_params=options.ignore_frozen_params,
                keep_submodule_prefixes=options.keep_submodule_prefixes,
                flatten_optimizer_state_dict=options.flatten_optimizer_state_dict,
            )
        }
        if options.submodule:
            how["submodules"] = {dict(loop.bare.named_children())[options.submodule]}
        match self._case.form:
            case "model":
                return {"model": functions.get_model_state_dict(loop.model, **how)}
            case "optimizer":
                return {"optim": functions.get_optimizer_state_dict(loop.model, loop.optimizers, **how)}
            case "apart":
                read = {"model": functions.get_model_state_dict(loop.model, **how)}
                if loop.optimizers:
                    read["optim"] = functions.get_optimizer_state_dict(loop.model, loop.optimizers, **how)
                return read
        model, optim = functions.get_state_dict(loop.model, loop.optimizers, **how)
        return {"model": model, "optim": optim}

    def set(self, state_dict: dict[str, Any]) -> None:
        """Sets what :meth:`read` has returned, or a load has filled."""
        functions, loop, options = self._functions, self._loop, self._case.options
        how = functions.StateDictOptions(
            full_state_dict=options.full_state_dict,
            broadcast_from_rank0=options.broadcast_from_rank0,
            strict=options.strict,
        )
        model, optim = state_dict.get("model"), state_dict.get("optim")
        match self._case.form:
            case "both" | "stateful":
                functions.set_state_dict(
                    loop.model, loop.optimizers, model_state_dict=model, optim_state_dict=optim, options=how
                )
            case _:
                if model is not None:
                    functions.set_model_state_dict(loop.model, model, options=how)
                if optim is not None:
                    functions.set_optimizer_state_dict(loop.model, loop.optimizers, optim, options=how)
