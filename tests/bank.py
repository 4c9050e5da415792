"""The project's bank of wrong, odd and safe backends, in the form that `dcpbench power` takes."""

from __future__ import annotations

import dataclasses

from dcpbench.rules import RULES
from tests.mutants import MUTANTS as CASE_MUTANTS
from tests.mutants.durability import FAULT_MUTANTS
from tests.mutants.training import TRAINING_MUTANTS
from tests.odd_backends import ODD

__all__ = ["MUTANTS", "ODD_BACKENDS", "SAFE_BACKENDS"]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    backend: str
    defect: str
    rules: tuple[str, ...]


_OF_RULE = {rule.mutant: (code,) for code, rule in RULES.items()}

MUTANTS = {
    **{name: Entry(one.backend, one.defect, _OF_RULE.get(name, one.rules)) for name, one in CASE_MUTANTS.items()},
    **{name: Entry(one.backend, one.defect, (one.rule,)) for name, one in TRAINING_MUTANTS.items()},
    **{name: Entry(one.backend, one.defect, (one.rule,)) for name, one in FAULT_MUTANTS.items()},
}
"""All mutants; one that stands for a rule must be caught by that one."""

ODD_BACKENDS = [f"tests.odd_backends:{name}" for name in ODD]
ODD_BACKENDS += [f"tests.mutants.training:{name}" for name in ("sound", "copies", "backwards")]

SAFE_BACKENDS = ["tests.mutants.durability:SAFE"]
